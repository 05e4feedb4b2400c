"""How the diffusers door keeps streams of calls apart: by their names, by the caller's word, and where neither is told."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, WanPipeline, WanVideoToVideoPipeline
from diffusers.modular_pipelines import WanModularPipeline
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lite_attention import LiteAttention, skip_branch
from lite_attention.integrations.diffusers import LiteAttentionHandle, enable_lite_attention
from support.inputs import report
from support.video_models import CASES, make_latents, make_transformer, run
from support.video_pipelines import generate, prompt, wan

WAN = CASES["wan"]
THRESHOLD = -2.0
TIMESTEPS = (900.0, 700.0, 500.0, 300.0)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def streams(transformer: Any, names: tuple[str | None, ...], first: int = 0) -> list[Tensor]:
    """The outputs of one generation of a stream for each name, which begins at step ``first`` where it is not the first."""
    outs = []
    for step, timestep in enumerate(TIMESTEPS):
        for stream, name in enumerate(names):
            if stream > 0 and step < first:
                continue
            latents = make_latents(WAN, step, seed=stream)
            if name is None:
                outs.append(run(transformer, WAN, latents, timestep))
            else:
                with transformer.cache_context(name):
                    outs.append(run(transformer, WAN, latents, timestep))
    return outs


def skips(handle: LiteAttentionHandle, branch: int | str = 0) -> list[bool]:
    """For each step of the latest generation, whether anything was skipped in it."""
    return (handle.skip_fraction(branch).amax(0) > 0).tolist()  # type: ignore[no-any-return]


# Layers that a call runs more than once


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_block_that_stands_in_two_depths_of_a_model_never_uses_the_map_of_the_other(compiled: bool) -> None:
    looped, unrolled = make_transformer(WAN), make_transformer(WAN)
    looped.blocks[1] = looped.blocks[0]
    unrolled.blocks[1].load_state_dict(unrolled.blocks[0].state_dict())
    handle = enable_lite_attention(looped, threshold=THRESHOLD)
    model: Any = torch.compile(looped, backend="aot_eager", fullgraph=True) if compiled else looped
    for seed in (0, 1):
        outs = [run(model, WAN, make_latents(WAN, step, seed=seed), time) for step, time in enumerate(TIMESTEPS)]
        expected = [run(unrolled, WAN, make_latents(WAN, step, seed=seed), time) for step, time in enumerate(TIMESTEPS)]
        torch.testing.assert_close(outs, expected)
        assert not any(skips(handle))


# Streams without names


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_streams_without_names_never_see_each_others_map(first: int, compiled: bool) -> None:
    transformer, dense = make_transformer(WAN), make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    called = torch.compile(transformer, fullgraph=True, backend="eager") if compiled else transformer
    for _ in range(2):
        outs = streams(called, (None, None), first)
        expected = streams(dense, (None, None), first)
        alone = make_transformer(WAN)
        enable_lite_attention(alone, threshold=THRESHOLD)
        # Up to where the second stream begins the first one skips, and what it computes is what it would alone.
        for step in range(first):
            expected[step] = run(alone, WAN, make_latents(WAN, step), TIMESTEPS[step])
        if first > 0:
            expected[first] = run(alone, WAN, make_latents(WAN, first), TIMESTEPS[first])
        torch.testing.assert_close(outs, expected, atol=1e-4, rtol=1e-4)
    assert handle.mixed_calls() == 2 * (len(TIMESTEPS) - first)


def test_a_stream_alone_skips_again_in_the_next_generation() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    streams(transformer, (None, None))
    assert skips(handle) == [False] * 4
    streams(transformer, (None,))
    assert skips(handle) == [False, True, True, True]
    assert handle.mixed_calls() == 4, "of the first"


@pytest.mark.parametrize("names", [("cond", None), (None, "cond")])
def test_a_stream_with_a_name_and_one_without_are_two(names: tuple[str | None, ...]) -> None:
    transformer, dense = make_transformer(WAN), make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    torch.testing.assert_close(streams(transformer, names), streams(dense, names), atol=1e-4, rtol=1e-4)
    assert handle.mixed_calls() > 0


def test_names_and_branches_keep_streams_apart() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    streams(transformer, ("cond", "uncond"))
    for step, timestep in enumerate(TIMESTEPS):
        for branch in (2, 3):
            with skip_branch(branch):
                run(transformer, WAN, make_latents(WAN, step, seed=branch), timestep)
    for branch in ("cond", "uncond", 2, 3):
        assert skips(handle, branch) == [False, True, True, True]
    assert handle.mixed_calls() == 0


def test_two_calls_of_one_stream_at_a_timestep_skip_where_the_caller_says_so() -> None:
    def denoise(handle: LiteAttentionHandle, transformer: nn.Module) -> list[bool]:
        for step, timestep in enumerate((900.0, 700.0, 700.0, 500.0, 500.0)):
            run(transformer, WAN, make_latents(WAN, step), timestep)
        return skips(handle)

    transformer = make_transformer(WAN)
    assert denoise(enable_lite_attention(transformer, threshold=THRESHOLD), transformer) == [False, False, False]
    told = make_transformer(WAN)
    handle = enable_lite_attention(told, threshold=THRESHOLD, guidance="batched")
    assert denoise(handle, told) == [False, True, True]
    assert handle.mixed_calls() == 0


def test_a_video_of_one_step_after_another_is_complete() -> None:
    transformer, dense = make_transformer(WAN), make_transformer(WAN)
    enable_lite_attention(transformer, threshold=THRESHOLD)
    for seed in range(3):
        latents = make_latents(WAN, seed=seed)
        torch.testing.assert_close(
            run(transformer, WAN, latents, 900.0), run(dense, WAN, latents, 900.0), atol=1e-4, rtol=1e-4
        )


def test_watching_costs_no_compile() -> None:
    counter = CompileCounter()
    transformer = make_transformer(WAN)
    enable_lite_attention(transformer, threshold=THRESHOLD)
    compiled = torch.compile(transformer, fullgraph=True, backend=counter)
    streams(compiled, (None, None), first=2)
    streams(compiled, (None,))
    assert counter.frame_count == 1


@pytest.mark.parametrize("ask", ["reset", "mixed_calls", "__repr__", "skip_fraction", "set_timesteps"])
def test_the_log_says_once_that_streams_met(ask: str, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    for _ in range(2):
        streams(pipeline.transformer, (None, None))
        with caplog.at_level(logging.WARNING, "lite_attention"):
            if ask == "set_timesteps":
                pipeline.scheduler.set_timesteps(4)
            else:
                getattr(handle, ask)()
    assert_expected_inline(
        "\n".join(record.getMessage() for record in caplog.records if record.name == "lite_attention"),
        """4 model calls had the timestep of the call before and no name, so that nothing tells whether they follow each other or belong to two guidance branches (or tiles of a latent): from there on all tiles of that video were computed, nothing was skipped. If each step calls the model once for each branch, call it in transformer.cache_context(name). If all calls are one stream (all branches in one batch, and a scheduler that calls twice at one timestep), say enable_lite_attention(..., guidance='batched')""",
    )


# Pipelines


class LoggedPipeline(WanPipeline):
    """A pipeline of the user's own around diffusers'."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class UnnamedPipeline(WanPipeline):
    """One with a loop of its own, which names no branch."""

    def __call__(self) -> list[Tensor]:  # type: ignore[override]
        self.scheduler.set_timesteps(4)
        return streams(self.transformer, (None, None))


class Loop:
    """A pipeline of the user's own: one call a step, with both branches in one batch."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def __call__(self) -> None:
        for step, timestep in enumerate(TIMESTEPS):
            run(self.transformer, WAN, make_latents(WAN, step, batch=2), timestep)


def wan_of(pipeline_class: Any, **parts: Any) -> Any:
    found = {name: part for name, part in wan().components.items() if name != "transformer_2"}
    pipeline = pipeline_class(**found | parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
def test_a_subclass_does_what_its_base_does() -> None:
    pipeline, base = wan_of(LoggedPipeline), wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    enable_lite_attention(base, threshold=THRESHOLD)
    assert torch.equal(generate(pipeline), generate(base))
    for name in ("cond", "uncond"):
        assert skips(handle, name) == [False, True, True, True]
    assert handle.mixed_calls() == 0


def test_a_subclass_that_names_no_branch_computes_everything() -> None:
    pipeline, dense = wan_of(UnnamedPipeline), wan_of(UnnamedPipeline)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    for _ in range(2):
        torch.testing.assert_close(pipeline(), dense(), atol=1e-4, rtol=1e-4)
    assert handle.mixed_calls() == 8


def test_a_loop_of_ones_own_skips() -> None:
    pipeline = Loop(make_transformer(WAN))
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    pipeline()
    assert skips(handle) == [False, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["without guidance", "with guidance"])
def test_a_pipeline_of_diffusers_that_names_no_branch(scale: float) -> None:
    def video(pipeline: Any) -> Tensor:
        latents: Tensor = pipeline(
            **prompt(0), height=224, width=224, num_inference_steps=5, guidance_scale=scale, output_type="latent",
            latents=make_latents(WAN),
        ).frames  # fmt: skip
        return latents

    dense = video(wan_of(WanVideoToVideoPipeline))
    pipeline = wan_of(WanVideoToVideoPipeline)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    latents = video(pipeline)
    if scale > 1.0:
        torch.testing.assert_close(latents, dense, atol=1e-4, rtol=1e-4)
        assert skips(handle) == [False] * 4
        assert handle.mixed_calls() == 4
    else:
        assert 0 < float((latents - dense).norm() / dense.norm()) < 0.05
        assert skips(handle) == [False, True, True, True]


@pytest.mark.slow
def test_a_scheduler_that_calls_twice_skips_in_a_pipeline_that_names_its_branches() -> None:
    pipeline = wan(FlowMatchHeunDiscreteScheduler(shift=3.0))
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    generate(pipeline)
    assert skips(handle, "cond") == [False, True, True, True]
    assert handle.mixed_calls() == 0


def test_a_modular_pipeline_is_taken() -> None:
    components = wan().components
    pipeline = WanModularPipeline()
    pipeline.update_components(transformer=components["transformer"], scheduler=components["scheduler"])
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    assert handle.layers.keys() == {f"transformer.{name}" for name in WAN.layers}
    pipeline.scheduler.set_timesteps(4)
    streams(pipeline.transformer, (None, None))  # as its blocks call it with guidance
    assert handle.mixed_calls() == 4
    handle.disable()
    assert not any(isinstance(module, LiteAttention) for module in pipeline.transformer.modules())


def test_errors() -> None:
    transformer = make_transformer(WAN)
    nameless = Loop(nn.Linear(2, 2))
    calls: dict[str, Callable[[], object]] = {
        "an unknown word": lambda: enable_lite_attention(transformer, guidance="none"),  # type: ignore[arg-type]
        "a word that is no text": lambda: enable_lite_attention(transformer, guidance=["named"]),  # type: ignore[arg-type]
        "nowhere to name them": lambda: enable_lite_attention(nameless, guidance="named"),
    }
    assert_expected_inline(
        report(calls),
        """\
an unknown word -> ValueError: enable_lite_attention: guidance is 'none', expected 'named', 'batched' or None
a word that is no text -> ValueError: enable_lite_attention: guidance is ['named'], expected 'named', 'batched' or None
nowhere to name them -> ValueError: enable_lite_attention: guidance is 'named', expected 'batched' or None: Linear has no cache_context in which branches could be named""",
    )
    assert not any(hasattr(module, "generation") for module in transformer.modules()), "all or nothing"
    enable_lite_attention(transformer, guidance="named").disable()
    enable_lite_attention(transformer, guidance="batched").disable()
