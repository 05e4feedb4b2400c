"""How the diffusers door keeps streams of calls apart: by their names, by the caller's word, and where neither is told."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
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


# What is told of a branch


@pytest.mark.parametrize("told", ["by the scheduler", "by reset"])
def test_figures_of_a_branch_that_later_videos_leave_out_are_of_its_own_latest(told: str) -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    pipeline.scheduler.set_timesteps(4)
    streams(pipeline.transformer, ("cond", "uncond"))
    fractions = handle.skip_fraction("uncond")
    assert fractions.shape == (2, 4)
    for _ in range(2):
        if told == "by the scheduler":
            pipeline.scheduler.set_timesteps(4)
        else:
            handle.reset()
        assert torch.equal(handle.skip_fraction("uncond"), fractions)
        streams(pipeline.transformer, ("cond",))
        assert torch.equal(handle.skip_fraction("uncond"), fractions)
    assert skips(handle, "cond") == [False, True, True, True]


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


def with_text(latents: Tensor, timestep: float, text: Tensor) -> dict[str, Any]:
    return WAN.inputs(latents, timestep) | {"encoder_hidden_states": text}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("joins", [1, 2])
def test_guidance_without_names_that_begins_late_and_first_never_sees_the_other_map(joins: int, compiled: bool) -> None:
    """It comes at a lower timestep than the stream before it, as that one's next call would."""
    transformer, dense, alone = (make_transformer(WAN) for _ in range(3))
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    enable_lite_attention(alone, threshold=THRESHOLD)
    called: Any = torch.compile(transformer, fullgraph=True, backend="eager") if compiled else transformer
    texts = prompt(0)
    for _ in range(2):
        for step, timestep in enumerate(TIMESTEPS):
            for name in ("negative_prompt_embeds", "prompt_embeds")[step < joins :]:
                arguments = with_text(make_latents(WAN, step, seed=len(name)), timestep, texts[name])
                reference: Any = alone if step < joins else dense
                torch.testing.assert_close(called(**arguments)[0], reference(**arguments)[0], atol=1e-4, rtol=1e-4)
    assert handle.mixed_calls() == 2 * 2 * (len(TIMESTEPS) - joins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_text_that_is_made_anew_in_each_step_is_the_same(dtype: torch.dtype) -> None:
    transformer = make_transformer(WAN).to(dtype)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    text = prompt(0)["prompt_embeds"].to(dtype)
    for step, timestep in enumerate(TIMESTEPS):
        transformer(**with_text(make_latents(WAN, step).to(dtype), timestep, text.clone()))
    assert skips(handle) == [False, True, True, True]
    assert handle.mixed_calls() == 0


@pytest.mark.parametrize("change", ["entry", "length", "length with zeros"])
def test_another_text_is_another_stream(change: str) -> None:
    transformer, dense = make_transformer(WAN), make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    text = prompt(0)["prompt_embeds"]
    other = text.clone() if change == "entry" else torch.cat([text, 0 * text[:, :1] if "zeros" in change else text], 1)
    other[0, 0, 0] += change == "entry"
    for step, timestep in enumerate(TIMESTEPS):
        latents = make_latents(WAN, step)
        if step < 2:
            transformer(**with_text(latents, timestep, text))
            continue
        for model in (transformer, dense):
            model.out = model(**with_text(latents, timestep, other))[0]
        torch.testing.assert_close(transformer.out, dense.out, atol=1e-4, rtol=1e-4)
    assert skips(handle) == [False, True, False, False]
    assert handle.mixed_calls() == 1


def test_a_text_that_changes_within_one_stream_skips_where_the_caller_says_so() -> None:
    for guidance, names in (("batched", False), ("named", True)):
        transformer = make_transformer(WAN)
        handle = enable_lite_attention(transformer, threshold=THRESHOLD, guidance=guidance)  # type: ignore[arg-type]
        for step, timestep in enumerate(TIMESTEPS):
            with transformer.cache_context("cond") if names else contextlib.nullcontext():
                transformer(**with_text(make_latents(WAN, step), timestep, prompt(step)["prompt_embeds"]))
        assert skips(handle) == [False, True, True, True]
        assert handle.mixed_calls() == 0


# Streams that share a name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tiles_of_one_name_never_see_each_others_map(compiled: bool) -> None:
    transformer, dense = make_transformer(WAN), make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    expected = streams(dense, ("cond", "cond"))
    if compiled:
        transformer.forward = torch.compile(transformer.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(streams(transformer, ("cond", "cond")), expected, atol=1e-4, rtol=1e-4)
    assert skips(handle, "cond") == [False] * 4
    assert handle.mixed_calls() == 4


@pytest.mark.parametrize("begins", [0, 1, 2])
@pytest.mark.parametrize("names", [("cond", 0), (0, "cond"), (None, 0), (0, None), (None, "cond"), ("cond", None)])
def test_branches_of_one_number_that_are_chosen_in_two_ways_are_two_streams(
    names: tuple[str | int | None, str | int | None], begins: int
) -> None:
    """The later one comes first in each step."""
    transformer, dense, alone = (make_transformer(WAN) for _ in range(3))
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    enable_lite_attention(alone, threshold=THRESHOLD)
    for step, timestep in enumerate(TIMESTEPS):
        for stream in (1, 0)[step < begins :]:
            name, latents = names[stream], make_latents(WAN, step, seed=stream)
            with contextlib.ExitStack() as block:
                if isinstance(name, str):
                    block.enter_context(transformer.cache_context(name))
                elif name is not None:
                    block.enter_context(skip_branch(name))
                out = run(transformer, WAN, latents, timestep)
            expected = run(alone if step < begins else dense, WAN, latents, timestep)
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert handle.mixed_calls() > 0


def test_two_calls_of_one_name_at_a_timestep_skip_where_the_caller_says_so() -> None:
    for guidance, expected in ((None, [False, False, False]), ("named", [False, True, True])):
        transformer = make_transformer(WAN)
        handle = enable_lite_attention(transformer, threshold=THRESHOLD, guidance=guidance)  # type: ignore[arg-type]
        for step, timestep in enumerate((900.0, 700.0, 700.0, 500.0, 500.0)):
            with transformer.cache_context("cond"):
                run(transformer, WAN, make_latents(WAN, step), timestep)
        assert skips(handle, "cond") == expected
        assert (handle.mixed_calls() > 0) == (guidance is None)


def test_a_branch_that_joins_the_next_video_late_starts_over() -> None:
    transformer, dense = make_transformer(WAN), make_transformer(WAN)
    enable_lite_attention(transformer, threshold=THRESHOLD)
    streams(transformer, ("cond", "uncond"))
    for step, timestep in enumerate((950.0, 650.0, 250.0)):
        with transformer.cache_context("cond"):
            run(transformer, WAN, make_latents(WAN, step, seed=5), timestep)
    with transformer.cache_context("uncond"):
        out = run(transformer, WAN, make_latents(WAN, 2, seed=6), 250.0)
    expected = run(dense, WAN, make_latents(WAN, 2, seed=6), 250.0)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


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
                run(pipeline.transformer, WAN, make_latents(WAN), 900.0)
            else:
                getattr(handle, ask)()
    assert_expected_inline(
        "\n".join(record.getMessage() for record in caplog.records if record.name == "lite_attention"),
        """4 model calls had another text than the call before in their branch, or its timestep in the same step of the scheduler, so that nothing tells whether they follow each other or belong to two guidance branches (or tiles of a latent): from there on all tiles of that video were computed, nothing was skipped. If each step calls the model for several streams, call each in transformer.cache_context(name), with a name of its own. If the calls of each name are one stream, say enable_lite_attention(..., guidance='named'); if all calls are (all branches in one batch, and a scheduler that calls twice at one timestep, or a text that changes), guidance='batched'""",
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


class TiledPipeline(WanPipeline):
    """One that denoises a latent in two tiles, both in diffusers' name for the branch."""

    def __call__(self) -> list[Tensor]:  # type: ignore[override]
        self.scheduler.set_timesteps(len(TIMESTEPS))
        outs = []
        for step, timestep in enumerate(self.scheduler.timesteps):
            for tile in (0, 1):
                with self.transformer.cache_context("cond"):
                    outs.append(run(self.transformer, WAN, make_latents(WAN, step, seed=tile), float(timestep)))
            self.scheduler.step(outs[-1], timestep, outs[-1])
        return outs


class RoundedPipeline(WanPipeline):
    """One that rounds timesteps to bf16, as HunyuanVideo's does, so that some are the same."""

    def __call__(self) -> None:  # type: ignore[override]
        self.scheduler.set_timesteps(sigmas=[0.95, 0.9001, 0.9, 0.8999], mu=0.0)
        for step, timestep in enumerate(self.scheduler.timesteps):
            inputs = WAN.inputs(make_latents(WAN, step), 0.0) | {"timestep": timestep[None].bfloat16()}
            with self.transformer.cache_context("cond"):
                out = self.transformer(**inputs)[0]
            self.scheduler.step(out, timestep, out)


class SteppedTilesPipeline(WanPipeline):
    """One that takes the scheduler's step tile by tile, and puts its index back before or after each."""

    put_back = "before"

    def __call__(self) -> list[Tensor]:  # type: ignore[override]
        self.scheduler.set_timesteps(len(TIMESTEPS))
        tiles, outs = [make_latents(WAN, seed=tile) for tile in (0, 1)], []
        timesteps, order = self.scheduler.timesteps, self.scheduler.order
        for step, timestep in enumerate(timesteps):
            for tile in (0, 1):
                with self.transformer.cache_context("cond"):
                    outs.append(run(self.transformer, WAN, tiles[tile], float(timestep)))
                if self.put_back == "before" and order == 1:
                    self.scheduler._step_index = step
                tiles[tile] = self.scheduler.step(outs[-1], timestep, tiles[tile], return_dict=False)[0]
                if self.put_back == "after" and tile == 0:
                    self.scheduler._step_index = step
        return outs


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
        assert handle.mixed_calls() == 7, "all but the first have another text than the one before"
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


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_tiles_in_a_pipeline_that_names_its_branches_compute_everything(scheduler: Any) -> None:
    pipeline, dense = wan_of(TiledPipeline, scheduler=scheduler()), wan_of(TiledPipeline, scheduler=scheduler())
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    for _ in range(2):
        torch.testing.assert_close(pipeline(), dense(), atol=1e-4, rtol=1e-4)
    assert handle.mixed_calls() > 0


@pytest.mark.parametrize("put_back", ["before", "after"])
def test_tiles_that_take_the_schedulers_step_one_by_one_compute_everything(
    put_back: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SteppedTilesPipeline, "put_back", put_back)
    pipeline, dense = wan_of(SteppedTilesPipeline), wan_of(SteppedTilesPipeline)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    for _ in range(2):
        torch.testing.assert_close(pipeline(), dense(), atol=1e-4, rtol=1e-4)
    assert handle.mixed_calls() > 0


@pytest.mark.parametrize("copied", [False, True], ids=["enabled", "copied"])
def test_timesteps_that_a_pipeline_rounds_to_the_same_are_one_stream(copied: bool) -> None:
    pipeline = wan_of(RoundedPipeline)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    if copied:
        pipeline, handle = copy.deepcopy((pipeline, handle))
    for _ in range(2):
        pipeline()
        assert skips(handle, "cond") == [False, True]
    assert handle.mixed_calls() == 0


def test_batch_entries_that_change_places_are_another_stream() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    texts = torch.cat(list(prompt(0).values()))
    for step, timestep in enumerate(TIMESTEPS):
        inputs = WAN.inputs(make_latents(WAN, step, batch=2), timestep)
        transformer(**inputs | {"encoder_hidden_states": texts if step < 2 else texts.flip(0)})
    assert skips(handle) == [False, True, False, False]
    assert handle.mixed_calls() == 1


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
    told = make_transformer(WAN)
    enable_lite_attention(told)
    calls: dict[str, Callable[[], object]] = {
        "a timestep that is no tensor": lambda: told(**WAN.inputs(make_latents(WAN), 9.0) | {"timestep": 9.0}),
        "no timestep": lambda: told(hidden_states=make_latents(WAN)),
        "an unknown word": lambda: enable_lite_attention(transformer, guidance="none"),  # type: ignore[arg-type]
        "a word that is no text": lambda: enable_lite_attention(transformer, guidance=["named"]),  # type: ignore[arg-type]
        "nowhere to name them": lambda: enable_lite_attention(nameless, guidance="named"),
    }
    assert_expected_inline(
        report(calls),
        """\
a timestep that is no tensor -> TypeError: WanTransformer3DModel: timestep has type float, expected a tensor
no timestep -> TypeError: WanTransformer3DModel: timestep has type NoneType, expected a tensor
an unknown word -> ValueError: enable_lite_attention: guidance is 'none', expected 'named', 'batched' or None
a word that is no text -> ValueError: enable_lite_attention: guidance is ['named'], expected 'named', 'batched' or None
nowhere to name them -> ValueError: enable_lite_attention: guidance is 'named', expected 'batched' or None: Linear has no cache_context in which branches could be named""",
    )
    assert not any(hasattr(module, "generation") for module in transformer.modules()), "all or nothing"
    enable_lite_attention(transformer, guidance="named").disable()
    enable_lite_attention(transformer, guidance="batched").disable()
