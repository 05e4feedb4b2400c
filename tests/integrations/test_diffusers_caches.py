"""The diffusers door beside others that change how a transformer runs: step caches, other forwards, dense first steps."""

import math
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LTXVideoTransformer3DModel,
    PyramidAttentionBroadcastConfig,
    WanTransformer3DModel,
)
from expecttest import assert_expected_inline
from torch import Tensor, nn

from lite_attention.integrations.diffusers import LiteAttentionHandle, enable_lite_attention
from support.inputs import report
from support.video_models import CASES, VideoCase, make_latents, make_transformer, run

WAN = CASES["wan"]
THRESHOLD = -2.0
TIMESTEPS = (900.0, 700.0, 500.0, 300.0)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


Before = Callable[[int], object]
"""What is done before a step of a generation, by its number."""


def denoise(
    transformer: Any, before: Before | None = None, seed: int = 0, case: VideoCase = WAN, name: str | None = None
) -> list[Tensor]:
    """The outputs of one generation, which is another video for another seed, in a cache_context if it has a name."""
    outs = []
    for step, timestep in enumerate(TIMESTEPS):
        if before is not None:
            before(step)
        latents = make_latents(case, step, seed=seed)
        if name is None:
            outs.append(run(transformer, case, latents, timestep))
        else:
            with transformer.cache_context(name):
                outs.append(run(transformer, case, latents, timestep))
    return outs


def fresh(**settings: Any) -> tuple[Any, LiteAttentionHandle]:
    transformer = make_transformer(WAN)
    return transformer, enable_lite_attention(transformer, threshold=THRESHOLD, **settings)


def assert_the_second_video_is_as_if_it_were_the_first(
    made: Callable[[], tuple[Any, LiteAttentionHandle, Before]], **arguments: Any
) -> LiteAttentionHandle:
    """Two videos of one transformer, and the second alone of another. The handle of the first."""
    transformer, handle, before = made()
    denoise(transformer, before, seed=0, **arguments)
    second = denoise(transformer, before, seed=1, **arguments)
    other, _, before = made()
    alone = denoise(other, before, seed=1, **arguments)
    assert all(map(torch.equal, second, alone))
    return handle


# Layers that miss the start of a video


@pytest.mark.parametrize("dense", [1, 2])
def test_a_video_whose_first_steps_are_dense_by_the_switch_starts_fresh(dense: int) -> None:
    def made() -> tuple[Any, LiteAttentionHandle, Before]:
        transformer, handle = fresh()

        def before(step: int) -> None:
            for layer in handle.layers.values():
                layer.enable_skip_optimization(step >= dense)

        return transformer, handle, before

    handle = assert_the_second_video_is_as_if_it_were_the_first(made)
    assert ((handle.skip_fraction() > 0) == torch.tensor([False] * (dense + 1) + [True] * (3 - dense))).all()


def first_block_cache(transformer: Any, leaves_out: Callable[[int], bool]) -> Before:
    """Diffusers' cache, which leaves the blocks after the first out in the steps that are chosen."""
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    (leader,) = (
        hook
        for module in transformer.modules()
        if hasattr(module, "_diffusers_hook")
        for name, hook in module._diffusers_hook.hooks.items()
        if name == "fbc_leader_block_hook"
    )

    def before(step: int) -> None:
        leader.threshold = math.inf if leaves_out(step) else -1.0

    return before


@pytest.mark.parametrize("cache_first", [False, True], ids=["cache after", "cache before"])
def test_a_block_that_a_cache_leaves_out_starts_fresh_in_the_next_video(cache_first: bool) -> None:
    transformer = make_transformer(WAN)
    before = first_block_cache(transformer, lambda step: step == 0) if cache_first else None
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    before = before or first_block_cache(transformer, lambda step: step == 0)
    for seed in range(2):
        denoise(transformer, before, seed, name="cond")
        fractions = handle.skip_fraction("cond")
        assert ((fractions[0] > 0) == torch.tensor([False, True, True, True])).all()
        first = 0 if seed == 0 else 1  # without a step before, the cache has nothing to put in place of the blocks
        assert fractions[1, :first].isnan().all(), "left out"
        assert ((fractions[1, first:] > 0) == torch.tensor([False, True, True, True][: 4 - first])).all()


def test_a_block_that_a_cache_leaves_out_in_mid_video_goes_on_with_its_map() -> None:
    transformer, handle = fresh()
    denoise(transformer, first_block_cache(transformer, lambda step: step == 2), name="cond")
    assert ((handle.skip_fraction("cond")[1] > 0) == torch.tensor([False, True, False, True])).all()


@pytest.mark.parametrize("name", ["pyramid", "faster"])
def test_videos_made_with_a_cache_of_attention_are_as_if_each_were_the_first(name: str) -> None:
    def made() -> tuple[Any, LiteAttentionHandle, Before]:
        transformer, handle = fresh()
        now = [0.0]
        if name == "pyramid":
            config: object = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(50, 950),
                spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: now[0],
            )  # fmt: skip
        else:
            config = FasterCacheConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 701),
                spatial_attention_block_identifiers=("^blocks.*attn1",), current_timestep_callback=lambda: now[0],
                attention_weight_callback=lambda _: 0.3, tensor_format="BCFHW", is_guidance_distilled=True,
            )  # fmt: skip
        transformer.enable_cache(config)

        def before(step: int) -> None:
            if step == 0:
                transformer._reset_stateful_cache()  # as pipelines do when a video ends
            now[0] = TIMESTEPS[step]

        return transformer, handle, before

    handle = assert_the_second_video_is_as_if_it_were_the_first(made, name="cond")
    fractions = handle.skip_fraction("cond")
    assert (fractions[:, 0] == 0).all()
    assert fractions.isnan().any(), "the cache leaves attention out"
    assert (fractions.nan_to_num(0.0).amax(1) > 0.05).all()


@pytest.mark.parametrize("dense_start", [False, True], ids=["skipping start", "dense start"])
def test_a_video_after_a_reset_starts_fresh(dense_start: bool) -> None:
    """Whether the layers skip in its first step or not, and where the timesteps tell nothing."""
    transformer, handle = fresh()
    for step, timestep in enumerate(TIMESTEPS[:2]):
        run(transformer, WAN, make_latents(WAN, step), timestep)
    handle.reset()
    other, other_handle = fresh()
    for step, timestep in enumerate((600.0, 500.0)):  # below where the last one ended
        for made in (handle, other_handle):
            for layer in made.layers.values():
                layer.enable_skip_optimization(step > 0 or not dense_start)
        latents = make_latents(WAN, step, seed=1)
        assert torch.equal(run(transformer, WAN, latents, timestep), run(other, WAN, latents, timestep))


def test_a_layer_that_guidance_leaves_out_starts_fresh_in_the_next_video() -> None:
    case = CASES["ltx2"]
    torch.manual_seed(0)
    transformer = case.make(perturbed_attn=True).eval()
    handle = enable_lite_attention(transformer, threshold=0.0)
    denoise(transformer, case=case)
    perturbed = case.inputs(make_latents(case), 900.0) | {
        "spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.zeros(1, 1, 1)
    }  # fmt: skip
    transformer(**perturbed)
    run(transformer, case, make_latents(case, 1), 700.0)
    fractions = handle.skip_fraction()
    assert fractions[0, 1] == 0, "its first pass of this video"
    assert fractions[1, 1] > 0


# Other forwards, as step caches like TeaCache put them in place


def counting(forward: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    return counted


@pytest.mark.parametrize("model", ["wan", "ltx"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_forward_put_into_the_class_later_takes_effect(
    model: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[model]
    transformer = make_transformer(case)
    model_class: Any = {"wan": WanTransformer3DModel, "ltx": LTXVideoTransformer3DModel}[model]
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    called = torch.compile(transformer, backend="eager") if compiled else transformer
    expected = denoise(called, case=case, name="cond")
    original, calls = model_class.forward, []

    def other(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        (out,) = original(self, *args, **kwargs)
        return (2 * out,)

    monkeypatch.setattr(model_class, "forward", other)
    outs = denoise(called, case=case, name="cond")
    for out, before in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, 2 * before, atol=1e-4, rtol=1e-4)
    assert ((handle.skip_fraction("cond") > 0).all(0) == torch.tensor([False, True, True, True])).all()
    monkeypatch.undo()
    handle.disable()
    assert transformer.forward.__func__ is original  # type: ignore[attr-defined]
    assert calls == []


def other_forward(transformer: Any, calls: list[int]) -> Any:
    return MethodType(counting(type(transformer).forward, calls), transformer)


def test_a_forward_put_onto_the_transformer_later_takes_effect_where_branches_have_names() -> None:
    (transformer, handle), calls = fresh(), list[int]()
    expected = denoise(transformer, name="cond")
    transformer.forward = other_forward(transformer, calls)
    assert all(map(torch.equal, denoise(transformer, name="cond"), expected))
    assert len(calls) == len(TIMESTEPS)
    assert handle.mixed_calls() == 0


def test_a_forward_put_onto_the_transformer_later_is_refused_where_it_takes_the_time_away() -> None:
    transformer, handle = fresh()
    denoise(transformer)
    transformer.forward = other_forward(transformer, [])
    compiled, _ = fresh()
    called = torch.compile(compiled, backend="eager")
    denoise(called)
    compiled.forward = other_forward(compiled, [])
    in_blocks, _ = fresh()
    in_blocks.compile_repeated_blocks(backend="eager")
    denoise(in_blocks)
    in_blocks.forward = other_forward(in_blocks, [])
    failed, _ = fresh()
    with pytest.raises(RuntimeError):
        failed(**WAN.inputs(make_latents(WAN), 900.0) | {"hidden_states": torch.zeros(1, 3, 5, 28, 28)})
    failed.forward = other_forward(failed, [])
    assert_expected_inline(
        report(
            {
                "eager": lambda: denoise(transformer),
                "compiled": lambda: denoise(torch.compile(compiled, backend="eager")),
                "compiled blocks": lambda: denoise(in_blocks),
                "after an error": lambda: denoise(failed),
            }
        ),
        """\
eager -> RuntimeError: blocks.0.attn1: the forward of this WanTransformer3DModel was replaced after enable_lite_attention, which does not learn the timesteps any more, expected another forward before it, or one that calls the forward that was there. Call disable() on the handle, then enable_lite_attention again
compiled -> RuntimeError: blocks.0.attn1: the forward of this WanTransformer3DModel was replaced after enable_lite_attention, which does not learn the timesteps any more, expected another forward before it, or one that calls the forward that was there. Call disable() on the handle, then enable_lite_attention again
compiled blocks -> RuntimeError: blocks.0.attn1: the forward of this WanTransformer3DModel was replaced after enable_lite_attention, which does not learn the timesteps any more, expected another forward before it, or one that calls the forward that was there. Call disable() on the handle, then enable_lite_attention again
after an error -> RuntimeError: blocks.0.attn1: the forward of this WanTransformer3DModel was replaced after enable_lite_attention, which does not learn the timesteps any more, expected another forward before it, or one that calls the forward that was there. Call disable() on the handle, then enable_lite_attention again""",
    )
    handle.disable()
    denoise(transformer)


@pytest.mark.parametrize("named", [False, True])
def test_a_forward_put_around_the_one_that_is_there_ticks_once(named: bool) -> None:
    (transformer, handle), (other, other_handle) = fresh(), fresh()
    inner = transformer.forward
    transformer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    name = "cond" if named else None
    for seed in range(2):
        assert all(map(torch.equal, denoise(transformer, seed=seed, name=name), denoise(other, seed=seed, name=name)))
    assert torch.equal(handle.skip_fraction(), other_handle.skip_fraction())
    assert handle.mixed_calls() == 0


def test_a_layer_can_be_called_alone() -> None:
    """Where no model call tells the time, no generation has begun to be remembered: every pass is complete."""
    transformer, plain = make_transformer(WAN), make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=0.0)
    tiles = torch.randn(1, 8, 128).repeat_interleave(128, 1)[:, :980]  # unlike each other: most of them could go
    x = tiles + 0.01 * torch.randn(1, 980, 128)
    for _ in range(3):
        torch.testing.assert_close(transformer.blocks[0].attn1(x), plain.blocks[0].attn1(x), atol=1e-5, rtol=1e-5)
    assert handle.layers["blocks.0.attn1"].skip_fraction() > 0.3, "had the map been used, it would have shown"
