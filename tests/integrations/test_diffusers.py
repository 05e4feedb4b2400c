"""The diffusers door, on diffusers' own transformers and pipelines."""

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import WanPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from lite_attention import LiteAttention, SkipPolicy
from lite_attention.integrations.diffusers import (
    LiteAttentionHandle,
    VideoModel,
    enable_lite_attention,
    models,
    register_video_model,
)
from lite_attention.maps.keep_map import ceil_div
from support.inputs import report
from support.video_models import (
    CASES,
    HEAD_DIM,
    HEADS,
    TEXT_LEN,
    TOKENS,
    VideoCase,
    make_latents,
    make_transformer,
    run,
)

WAN = CASES["wan"]
TIMESTEPS = (900.0, 700.0, 500.0, 300.0)
THRESHOLD = -2.0

every_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_model_compiled = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[] if name == "wan" else [pytest.mark.slow]) for name, case in CASES.items()],
)


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = {name: model for name, model in models._VIDEO_MODELS.items() if hasattr(diffusers, name)}
    monkeypatch.setattr(models, "_VIDEO_MODELS", known)
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def denoise(transformer: Any, case: VideoCase = WAN, seed: int = 0, batch: int = 1) -> list[Tensor]:
    """The outputs of one generation."""
    return [
        run(transformer, case, make_latents(case, step, batch, seed), timestep)
        for step, timestep in enumerate(TIMESTEPS)
    ]


def maps(handle: LiteAttentionHandle, branch: int = 0) -> list[Tensor]:
    return [layer.keep_map(branch) for layer in handle.layers.values()]


def assert_all_equal(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others)
    assert all(map(torch.equal, some, others))


# What is skipped, and what is not


@every_model
def test_output_is_unchanged_when_nothing_is_dropped(case: VideoCase) -> None:
    transformer = make_transformer(case)
    expected = denoise(transformer, case, batch=2)
    handle = enable_lite_attention(transformer, threshold=-math.inf)
    torch.testing.assert_close(denoise(transformer, case, batch=2), expected, atol=1e-5, rtol=1e-5)
    assert all(keep.all() for keep in maps(handle))


@every_model
def test_the_video_self_attention_of_every_block_skips_and_nothing_else_does(case: VideoCase) -> None:
    transformer = make_transformer(case)
    before = transformer.attn_processors
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    after = transformer.attn_processors
    changed = {name for name in before if after[name] is not before[name]}
    assert changed == {f"{name}.processor" for name in case.layers}
    assert sorted(handle.layers) == sorted(case.layers)
    denoise(transformer, case)
    fractions = handle.skip_fraction()
    assert fractions.shape == (len(case.layers), len(TIMESTEPS))
    assert (fractions[:, 0] == 0).all(), "the first step is complete"
    assert (fractions[:, 1:] > 0.05).all()
    assert (fractions.diff(dim=1) >= 0).all(), "what is dropped stays dropped"


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan"])
def test_text_is_never_skipped(name: str) -> None:
    case = CASES[name]
    transformer = make_transformer(case)
    handle = enable_lite_attention(transformer, threshold=0.0)
    denoise(transformer, case)
    first = 0 if case.text == "first" else TOKENS
    rows = slice(first // 64, ceil_div(first + TEXT_LEN, 64))
    columns = slice(first // 128, ceil_div(first + TEXT_LEN, 128))
    for keep in maps(handle):
        assert keep.shape[-2:] == (ceil_div(TOKENS + TEXT_LEN, 64), ceil_div(TOKENS + TEXT_LEN, 128))
        assert keep[:, :, rows].all()
        assert keep[..., columns].all()
        assert not keep.all()


def test_the_padding_of_text_is_not_attended_to() -> None:
    case = CASES["hunyuan"]
    outs = []
    for padding in (0.0, 100.0):
        transformer = make_transformer(case)
        enable_lite_attention(transformer, threshold=THRESHOLD)
        for step in range(2):
            inputs = case.inputs(make_latents(case, step, batch=2), TIMESTEPS[step])
            text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
            out = transformer(**inputs | {"encoder_hidden_states": torch.where(mask[..., None] > 0, text, padding)})
        outs.append(out[0])
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_chosen_layers_skip_and_the_others_stay_as_they_are() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, layers=[-1])
    assert list(handle.layers) == ["blocks.1.attn1"]
    assert type(transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"  # type: ignore[union-attr,index]


def test_must_do_ranges_count_video_tokens() -> None:
    case = CASES["cogvideox"]
    transformer = make_transformer(case)
    handle = enable_lite_attention(transformer, threshold=0.0, must_do=[480, 500])
    denoise(transformer, case)
    assert all(keep[..., (480 + TEXT_LEN) // 128].all() for keep in maps(handle))
    handle.set_must_do([740, 741])
    handle.reset()
    denoise(transformer, case)
    for keep in maps(handle):
        assert keep[..., (740 + TEXT_LEN) // 128].all()
        assert not keep[..., (480 + TEXT_LEN) // 128].all()
    handle.set_must_do(None)
    handle.reset()
    denoise(transformer, case)
    assert not any(keep[..., (740 + TEXT_LEN) // 128].all() for keep in maps(handle))


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_fused_projections_and_other_backends_elsewhere_work(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # set below, for the whole process
    transformer = make_transformer(WAN)
    expected = denoise(transformer)
    if not first:
        enable_lite_attention(transformer, threshold=-math.inf)
    transformer.fuse_qkv_projections()
    transformer.set_attention_backend("flex")  # which is not torch's scaled_dot_product_attention
    handle = enable_lite_attention(transformer, threshold=-math.inf) if first else None
    torch.testing.assert_close(denoise(transformer), expected, atol=1e-5, rtol=1e-5)
    if handle is not None:
        handle.disable()
        assert transformer.blocks[0].attn1.processor._attention_backend == "flex"  # type: ignore[union-attr,index]


def test_autocast_gives_attention_the_dtype_it_gives_torch() -> None:
    case = CASES["hunyuan"]
    transformer = make_transformer(case)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(transformer, case, make_latents(case), 900.0)
        enable_lite_attention(transformer, threshold=-math.inf)
        out = run(transformer, case, make_latents(case), 900.0)
    assert float((out - expected).norm() / expected.norm()) < 0.01


# Time and guidance


def test_a_new_generation_starts_from_the_full_map_by_itself() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    first = denoise(transformer)
    assert_all_equal(denoise(transformer), first)
    other = make_transformer(WAN)
    enable_lite_attention(other, threshold=THRESHOLD)
    assert_all_equal(denoise(transformer, seed=1), denoise(other, seed=1))
    assert handle.skip_fraction().shape == (2, 4), "of the latest generation"


def test_first_steps_are_complete() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD, dense_steps=3)
    for _ in range(2):
        denoise(transformer)
        fractions = handle.skip_fraction()
        assert (fractions[:, :3] == 0).all()
        assert (fractions[:, 3] > 0.05).all()


def test_several_calls_a_step_are_one_step() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD, dense_steps=2, guidance="batched")
    for timestep in (900.0, 700.0, 700.0, 500.0, 500.0):
        run(transformer, WAN, make_latents(WAN), timestep)
    fractions = handle.skip_fraction()
    assert fractions.shape == (2, 3)
    assert ((fractions > 0) == torch.tensor([False, False, True])).all()


def test_sequential_guidance_keeps_the_branches_apart() -> None:
    transformer = make_transformer(WAN)
    alone = [copy.deepcopy(transformer) for _ in range(2)]
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    handles = [enable_lite_attention(model, threshold=THRESHOLD) for model in alone]
    for step, timestep in enumerate(TIMESTEPS):
        for seed, name in enumerate(("cond", "uncond")):
            latents = make_latents(WAN, step, seed=seed)
            with transformer.cache_context(name):
                out = run(transformer, WAN, latents, timestep)
            assert torch.equal(out, run(alone[seed], WAN, latents, timestep))
    for branch, name in enumerate(("cond", "uncond")):
        assert_all_equal(maps(handle, branch), maps(handles[branch]))
        assert torch.equal(handle.skip_fraction(name), handles[branch].skip_fraction())
    assert not torch.equal(handle.skip_fraction("cond"), handle.skip_fraction("uncond"))


def test_batched_guidance_keeps_the_branches_apart() -> None:
    transformer = make_transformer(WAN)
    alone = [copy.deepcopy(transformer) for _ in range(2)]
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    handles = [enable_lite_attention(model, threshold=THRESHOLD) for model in alone]
    for step, timestep in enumerate(TIMESTEPS):
        both = [make_latents(WAN, step, seed=seed) for seed in range(2)]
        out = run(transformer, WAN, torch.cat(both), timestep)
        expected = [run(model, WAN, latents, timestep) for model, latents in zip(alone, both, strict=True)]
        torch.testing.assert_close(out, torch.cat(expected), atol=1e-4, rtol=0)
    for index, single in enumerate(handles):
        for keep, expected_keep in zip(maps(handle), maps(single), strict=True):
            assert (keep[index] != expected_keep[0]).float().mean() < 0.01, "but for rounding"


# The handle


@every_model
def test_disabling_gives_back_the_model_that_was(case: VideoCase) -> None:
    transformer = make_transformer(case)
    before, keys = transformer.attn_processors, set(transformer.state_dict())
    attributes = set(vars(transformer))
    expected = denoise(transformer, case)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    denoise(transformer, case)
    assert set(transformer.state_dict()) == keys
    handle.disable()
    assert transformer.attn_processors == before
    assert set(vars(transformer)) == attributes
    assert not any(isinstance(module, LiteAttention) for module in transformer.modules())
    assert_all_equal(denoise(transformer, case), expected)


def test_a_new_threshold_acts_on_every_layer() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=[-1.0] * HEADS)
    handle.set_threshold([-math.inf] * HEADS)
    denoise(transformer)
    assert (handle.skip_fraction() == 0).all()


def test_a_reset_in_mid_generation_starts_over() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    for step in range(2):
        run(transformer, WAN, make_latents(WAN, step, seed=3), TIMESTEPS[step])
    handle.reset()
    # Starts lower than where the last one broke off, so the timesteps could not tell.
    assert torch.equal(run(transformer, WAN, make_latents(WAN, 2), 600.0), run(*fresh(), make_latents(WAN, 2), 600.0))


def fresh() -> tuple[nn.Module, VideoCase]:
    transformer = make_transformer(WAN)
    enable_lite_attention(transformer, threshold=THRESHOLD)
    return transformer, WAN


def accelerate_hook(transformer: nn.Module) -> Callable[[], None]:
    add_hook_to_module(transformer, AccelerateHook())
    return lambda: remove_hook_from_module(transformer)


def diffusers_hook(transformer: nn.Module) -> Callable[[], None]:
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(ModelHook(), "hook")
    return lambda: registry.remove_hook("hook")


@pytest.mark.parametrize("hook", [accelerate_hook, diffusers_hook])
@pytest.mark.parametrize("first", [False, True], ids=["hook after", "hook before"])
def test_hooks_that_come_and_go_do_not_stop_the_clock(hook: Callable[..., Callable[[], None]], first: bool) -> None:
    def denoise_conditional(seed: int) -> list[Tensor]:
        with transformer.cache_context("cond"):
            return denoise(transformer, seed=seed)

    transformer = make_transformer(WAN)
    remove = hook(transformer) if first else None
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    remove = remove or hook(transformer)
    expected = denoise_conditional(1)
    denoise_conditional(0)
    remove()
    assert_all_equal(denoise_conditional(1), expected)
    handle.disable()
    assert transformer.forward.__func__ is type(transformer).forward  # type: ignore[attr-defined]
    enable_lite_attention(transformer, threshold=THRESHOLD)
    denoise(transformer)
    assert_all_equal(denoise(transformer, seed=1), expected)


def test_settings_made_in_inference_mode_can_be_changed_outside_of_it() -> None:
    transformer = make_transformer(WAN)
    with torch.inference_mode():
        handle = enable_lite_attention(transformer, threshold=THRESHOLD)
        handle.set_must_do([0, 10])
        denoise(transformer)
    handle.set_must_do([0, 20])
    handle.reset()
    other = make_transformer(WAN)
    enable_lite_attention(other, threshold=THRESHOLD, must_do=[0, 20])
    assert_all_equal(denoise(transformer), denoise(other))


def test_disabling_leaves_what_others_have_put_there_since() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer)
    mine = type(handle._processors["blocks.0.attn1"].processor)()
    transformer.blocks[0].attn1.set_processor(mine)  # type: ignore[union-attr,index]
    handle.disable()
    assert transformer.blocks[0].attn1.processor is mine  # type: ignore[union-attr,index]
    again = enable_lite_attention(transformer, threshold=THRESHOLD)
    handle.disable()
    denoise(transformer)
    assert (again.skip_fraction()[:, 1:] > 0.05).all(), "disabling twice does nothing to another handle"


def test_a_deep_copy_has_a_state_of_its_own() -> None:
    transformer, _ = fresh()
    expected = denoise(transformer)
    for step in range(3):
        run(transformer, WAN, make_latents(WAN, step), TIMESTEPS[step])
    duplicate = copy.deepcopy(transformer)
    with duplicate.cache_context("cond"):
        denoise(duplicate, seed=5)
    assert torch.equal(run(transformer, WAN, make_latents(WAN, 3), TIMESTEPS[3]), expected[3])


def test_skipping_can_be_switched_off_for_a_while() -> None:
    transformer = make_transformer(WAN)
    expected = denoise(transformer)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    for layer in handle.layers.values():
        layer.enable_skip_optimization(False)
    torch.testing.assert_close(denoise(transformer), expected, atol=1e-5, rtol=1e-5)
    assert (handle.skip_fraction() == 0).all()


def test_subclasses_are_treated_as_their_base() -> None:
    transformer = make_transformer(WAN)
    transformer.__class__ = type("TunedTransformer", (type(transformer),), {})
    assert tuple(enable_lite_attention(transformer).layers) == WAN.layers


def test_other_models_can_be_registered() -> None:
    class Unheard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_transformer(WAN)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return run(self.inner, WAN, x, float(timestep))

    with pytest.raises(TypeError, match="is a Unheard, expected one of CogVideoX"):
        enable_lite_attention(Unheard())
    register_video_model("Unheard", VideoModel((r"inner\.blocks\.\d+\.attn1",)))
    model = Unheard()
    handle = enable_lite_attention(model, threshold=THRESHOLD)
    for step, timestep in enumerate(TIMESTEPS):
        model(make_latents(WAN, step), torch.tensor(timestep))
    assert (handle.skip_fraction()[:, 1:] > 0.05).all()


def test_errors() -> None:
    transformer = make_transformer(WAN)
    busy = make_transformer(WAN)
    enable_lite_attention(busy)
    parallel = make_transformer(WAN)
    parallel.blocks[0].attn1.processor._parallel_config = object()  # type: ignore[union-attr,index]
    later = make_transformer(WAN)
    enable_lite_attention(later)
    later.blocks[1].attn1.processor._parallel_config = object()  # type: ignore[union-attr,index]
    deaf = make_transformer(WAN)
    deaf.blocks[0].attn1.set_processor(Deaf())  # type: ignore[union-attr,index]
    enable_lite_attention(deaf)
    masked = make_transformer(WAN)
    enable_lite_attention(masked)
    handle = enable_lite_attention(transformer)
    handle.disable()
    x = make_latents(WAN)
    mask = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    attn, hidden = masked.blocks[0].attn1, torch.randn(1, TOKENS, HEADS * HEAD_DIM)  # type: ignore[union-attr,index]
    hunyuan = make_transformer(CASES["hunyuan"])
    enable_lite_attention(hunyuan)
    joint = hunyuan.single_transformer_blocks[0].attn  # type: ignore[union-attr,index]
    many = list(range(34))
    calls = {
        "not a model": lambda: enable_lite_attention(object()),
        "a model of another kind": lambda: enable_lite_attention(nn.Linear(2, 2)),
        "twice": lambda: enable_lite_attention(busy),
        "a processor that splits tokens alone": lambda: enable_lite_attention(parallel),
        "context parallelism later": lambda: run(later, WAN, x, 900.0),
        "a processor of its own kind": lambda: run(deaf, WAN, x, 900.0),
        "a mask": lambda: attn(hidden, None, mask),
        "a float mask": lambda: joint(hidden[:, TEXT_LEN:], hidden[:, :TEXT_LEN], mask.float()),
        "no text where it is among the tokens": lambda: joint(hidden, None),
        "a number as timestep": lambda: masked(**WAN.inputs(x, 1.0) | {"timestep": 900.0}),
        "layer 2 of 2": lambda: enable_lite_attention(transformer, layers=[0, 2]),
        "layer as text": lambda: enable_lite_attention(transformer, layers=["0"]),  # type: ignore[list-item]
        "no layers": lambda: enable_lite_attention(transformer, layers=[]),
        "threshold above 0": lambda: enable_lite_attention(transformer, threshold=1.0),
        "-1 first steps": lambda: enable_lite_attention(transformer, dense_steps=-1),
        "an odd must_do": lambda: enable_lite_attention(transformer, must_do=[1]),
        "17 ranges": lambda: enable_lite_attention(transformer, must_do=many),
        "an unknown branch": lambda: enable_lite_attention(make_transformer(WAN)).skip_fraction("cond"),
    }
    assert_expected_inline(
        report(calls),
        """\
not a model -> TypeError: enable_lite_attention: transformer_or_pipeline is a object, expected a video transformer or a pipeline that has one as its component transformer
a model of another kind -> TypeError: enable_lite_attention: the transformer is a Linear, expected one of CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel; register_video_model adds others
twice -> ValueError: enable_lite_attention: LiteAttention is in this WanTransformer3DModel already, expected one handle: disable() it first
a processor that splits tokens alone -> RuntimeError: blocks.0.attn1: its processor is set up for context parallelism and the transformer is not, expected both, by transformer.enable_parallelism
context parallelism later -> RuntimeError: blocks.1.attn1: context parallelism was enabled after LiteAttention, expected before it. Call disable() on the handle, then enable_lite_attention again
a processor of its own kind -> RuntimeError: blocks.0.attn1: Deaf called scaled_dot_product_attention 0 times, expected once
a mask -> ValueError: blocks.0.attn1: attn_mask has dtype torch.bool and shape [1, 1, 1, 980], expected no mask
a float mask -> ValueError: single_transformer_blocks.0.attn: attn_mask has dtype torch.float32 and shape [1, 1, 1, 980], expected torch.bool and [1, 1, 1, 980]
no text where it is among the tokens -> ValueError: single_transformer_blocks.0.attn: encoder_hidden_states is None, expected the text, which its VideoModel has among the tokens of this layer (text='last')
a number as timestep -> TypeError: WanTransformer3DModel: timestep has type float, expected a tensor
layer 2 of 2 -> ValueError: enable_lite_attention: layers[1] is 2, expected -2 to 1: WanTransformer3DModel has 2 self-attention layers
layer as text -> TypeError: enable_lite_attention: layers[0] is '0' of type str, expected an int
no layers -> ValueError: enable_lite_attention: layers is empty, expected at least one layer, or None for all
threshold above 0 -> ValueError: enable_lite_attention: threshold is 1.0, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
-1 first steps -> ValueError: enable_lite_attention: dense_steps is -1, expected at least 0
an odd must_do -> ValueError: must_do has 1 entries, expected an even number: [start, end, start, end, ...] (entry 0, 1, has no partner)
17 ranges -> ValueError: must_do has 17 ranges, expected at most 16
an unknown branch -> ValueError: branch is 'cond', expected a name that cache_context was given: none so far""",
    )
    assert not any(isinstance(module, LiteAttention) for module in transformer.modules()), "all or nothing"


def test_nonsense_is_named() -> None:
    transformer = make_transformer(WAN)
    before = set(vars(transformer))
    values: dict[str, list[Any]] = {
        "threshold": ["-6", True, {}, [[-1.0]], [-1.0, None], math.nan, [], [-1.0] * 3, torch.zeros(1, 2)],
        "dense_steps": ["1", 1.0, True, [1], -1],
        "must_do": [5, "0, 5", {0: 5}, {5}, True, [0, 1.0], [0, None], [[0, 5], 1], [-1, 5], torch.tensor([0, 5])],
        "layers": [1, "01", {0}, {0: 1}, True, [True], [1.0], [None], [[0]], range(3), torch.tensor([0])],
        "mesh": [1, "cuda", [0, 1], torch.device("cpu")],
        "policy": [-6.0, "fast", {"threshold": -6.0}, SkipPolicy(threshold=(-1.0,))],
        "guidance": [True, "Named", 1],
        "transformer_or_pipeline": [None, "pipe", WanPipeline, [0], nn.Identity()],
    }
    calls: dict[str, Callable[[], object]] = {}
    for argument, nonsense in values.items():
        for value in nonsense:
            arguments = {"transformer_or_pipeline": transformer, argument: value}
            calls[f"{argument}={value}"] = functools.partial(enable_lite_attention, **arguments)
    assert_expected_inline(
        report(calls),
        """\
threshold=-6 -> TypeError: enable_lite_attention: threshold is '-6' of type str, expected a number
threshold=True -> TypeError: enable_lite_attention: threshold is True of type bool, expected a number
threshold={} -> TypeError: enable_lite_attention: threshold is {} of type dict, expected a number
threshold=[[-1.0]] -> TypeError: enable_lite_attention: threshold[0] is [-1.0] of type list, expected a number
threshold=[-1.0, None] -> TypeError: enable_lite_attention: threshold[1] is None of type NoneType, expected a number
threshold=nan -> ValueError: enable_lite_attention: threshold is NaN, expected a number of at most 0
threshold=[] -> ValueError: enable_lite_attention: threshold is empty, expected one number, or one per query head
threshold=[-1.0, -1.0, -1.0] -> ValueError: enable_lite_attention: threshold has 3 values, expected 2, one per head of blocks.0.attn1, or one number for all
threshold=tensor([[0., 0.]]) -> ValueError: enable_lite_attention: threshold has shape [1, 2], expected [] or [heads]
dense_steps=1 -> TypeError: enable_lite_attention: dense_steps has type str, expected an int
dense_steps=1.0 -> TypeError: enable_lite_attention: dense_steps has type float, expected an int
dense_steps=True -> TypeError: enable_lite_attention: dense_steps has type bool, expected an int
dense_steps=[1] -> TypeError: enable_lite_attention: dense_steps has type list, expected an int
dense_steps=-1 -> ValueError: enable_lite_attention: dense_steps is -1, expected at least 0
must_do=5 -> TypeError: must_do has type int, expected a list of ints: [start, end, ...]
must_do=0, 5 -> TypeError: must_do has type str, expected a list of ints: [start, end, ...]
must_do={0: 5} -> TypeError: must_do has type dict, expected a list of ints: [start, end, ...]
must_do={5} -> TypeError: must_do has type set, expected a list of ints: [start, end, ...]
must_do=True -> TypeError: must_do has type bool, expected a list of ints: [start, end, ...]
must_do=[0, 1.0] -> TypeError: must_do[1] is 1.0 of type float, expected an int
must_do=[0, None] -> TypeError: must_do[1] is None of type NoneType, expected an int
must_do=[[0, 5], 1] -> TypeError: must_do[0] is [0, 5] of type list, expected an int
must_do=[-1, 5] -> ValueError: must_do[0] is -1, expected a position of at least 0
must_do=tensor([0, 5]) -> TypeError: must_do has type Tensor, expected a list of ints: [start, end, ...]
layers=1 -> TypeError: enable_lite_attention: layers has type int, expected a list of ints, or None for all
layers=01 -> TypeError: enable_lite_attention: layers has type str, expected a list of ints, or None for all
layers={0} -> TypeError: enable_lite_attention: layers has type set, expected a list of ints, or None for all
layers={0: 1} -> TypeError: enable_lite_attention: layers has type dict, expected a list of ints, or None for all
layers=True -> TypeError: enable_lite_attention: layers has type bool, expected a list of ints, or None for all
layers=[True] -> TypeError: enable_lite_attention: layers[0] is True of type bool, expected an int
layers=[1.0] -> TypeError: enable_lite_attention: layers[0] is 1.0 of type float, expected an int
layers=[None] -> TypeError: enable_lite_attention: layers[0] is None of type NoneType, expected an int
layers=[[0]] -> TypeError: enable_lite_attention: layers[0] is [0] of type list, expected an int
layers=range(0, 3) -> ValueError: enable_lite_attention: layers[2] is 2, expected -2 to 1: WanTransformer3DModel has 2 self-attention layers
layers=tensor([0]) -> TypeError: enable_lite_attention: layers has type Tensor, expected a list of ints, or None for all
mesh=1 -> TypeError: enable_lite_attention: mesh has type int, expected a DeviceMesh
mesh=cuda -> TypeError: enable_lite_attention: mesh has type str, expected a DeviceMesh
mesh=[0, 1] -> TypeError: enable_lite_attention: mesh has type list, expected a DeviceMesh
mesh=cpu -> TypeError: enable_lite_attention: mesh has type device, expected a DeviceMesh
policy=-6.0 -> TypeError: enable_lite_attention: policy has type float, expected a SkipPolicy
policy=fast -> TypeError: enable_lite_attention: policy has type str, expected a SkipPolicy
policy={'threshold': -6.0} -> TypeError: enable_lite_attention: policy has type dict, expected a SkipPolicy
policy=SkipPolicy(threshold=(-1.0,), dense_steps=0, enabled=True) -> ValueError: enable_lite_attention: threshold has 1 values, expected 2, one per head of blocks.0.attn1, or one number for all
guidance=True -> ValueError: enable_lite_attention: guidance is True, expected 'named', 'batched' or None
guidance=Named -> ValueError: enable_lite_attention: guidance is 'Named', expected 'named', 'batched' or None
guidance=1 -> ValueError: enable_lite_attention: guidance is 1, expected 'named', 'batched' or None
transformer_or_pipeline=None -> TypeError: enable_lite_attention: transformer_or_pipeline is a NoneType, expected a video transformer or a pipeline that has one as its component transformer
transformer_or_pipeline=pipe -> TypeError: enable_lite_attention: transformer_or_pipeline is a str, expected a video transformer or a pipeline that has one as its component transformer
transformer_or_pipeline=<class 'diffusers.pipelines.wan.pipeline_wan.WanPipeline'> -> TypeError: enable_lite_attention: transformer_or_pipeline is a type, expected a video transformer or a pipeline that has one as its component transformer
transformer_or_pipeline=[0] -> TypeError: enable_lite_attention: transformer_or_pipeline is a list, expected a video transformer or a pipeline that has one as its component transformer
transformer_or_pipeline=Identity() -> TypeError: enable_lite_attention: the transformer is a Identity, expected one of CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel; register_video_model adds others""",
    )
    assert set(vars(transformer)) == before
    assert not any(isinstance(module, LiteAttention) for module in transformer.modules())


def test_nonsense_about_other_models_is_named() -> None:
    assert_expected_inline(
        report(
            {
                "a pattern alone": lambda: VideoModel(r"blocks\.\d+"),  # type: ignore[arg-type]
                "no pattern": lambda: VideoModel((r"blocks",), text_layers=(1,)),  # type: ignore[arg-type]
                "text": lambda: VideoModel((r"blocks",), text="before"),  # type: ignore[arg-type]
                "token_split": lambda: VideoModel((r"blocks",), token_split=True),  # type: ignore[arg-type]
                "a class": lambda: register_video_model(nn.Linear, VideoModel((r"x",))),  # type: ignore[arg-type]
                "a dict": lambda: register_video_model("Linear", {"layers": "x"}),  # type: ignore[arg-type]
            }
        ),
        """\
a pattern alone -> TypeError: VideoModel: layers is 'blocks\\\\.\\\\d+', expected a tuple of regular expressions
no pattern -> TypeError: VideoModel: text_layers is (1,), expected a tuple of regular expressions
text -> ValueError: VideoModel: text is 'before', expected 'none', 'first' or 'last'
token_split -> ValueError: VideoModel: token_split is True, expected 'any', 'mesh only' or 'none'
a class -> TypeError: register_video_model: class_name has type type, expected a str
a dict -> TypeError: register_video_model: model has type dict, expected a VideoModel""",
    )


def test_a_threshold_of_another_length_is_refused_and_nothing_changes() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=-3.0)
    other = copy.deepcopy(transformer)
    assert_expected_inline(
        report(
            {
                "later": lambda: handle.set_threshold([-1.0] * 3),
                "above 0": lambda: handle.set_threshold([-1.0, 1.0]),
                "no number": lambda: handle.set_threshold("low"),  # type: ignore[arg-type]
            }
        ),
        """\
later -> ValueError: set_threshold: threshold has 3 values, expected 2, one per head of blocks.0.attn1, or one number for all
above 0 -> ValueError: set_threshold[1] is 1.0, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
no number -> TypeError: set_threshold is 'low' of type str, expected a number""",
    )
    assert {layer.threshold for layer in handle.layers.values()} == {-3.0}
    assert_all_equal(denoise(transformer), denoise(other))


def test_a_mesh_needs_an_accelerator() -> None:
    transformer = make_transformer(WAN)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
        with mock.patch.object(torch.accelerator, "device_count", return_value=0):
            assert_expected_inline(
                report({"mesh": lambda: enable_lite_attention(transformer, mesh=mesh)}),
                """mesh -> RuntimeError: enable_lite_attention: mesh is given where torch.accelerator.device_count() is 0, expected one at least: diffusers' context parallelism gives each rank a device by its number""",
            )
    finally:
        dist.destroy_process_group()
    assert not any(isinstance(module, LiteAttention) for module in transformer.modules())
    enable_lite_attention(transformer)


class Counting(WanAttnProcessor):
    """A processor that all layers share, as code that controls attention has it, and that counts their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        out: Tensor = super().__call__(*args, **kwargs)
        return out * 0.5 if self.calls == 3 else out


def test_a_processor_that_layers_share_stays_one() -> None:
    transformer, stock = make_transformer(WAN), make_transformer(WAN)
    shared, expected = Counting(), Counting()
    transformer.set_attn_processor(shared)
    stock.set_attn_processor(expected)
    handle = enable_lite_attention(transformer, threshold=-math.inf)
    torch.testing.assert_close(denoise(transformer), denoise(stock), atol=1e-4, rtol=1e-4)
    assert shared.calls == expected.calls == 16
    handle.disable()
    assert all(processor is shared for processor in transformer.attn_processors.values())


def test_a_backend_that_is_chosen_meanwhile_is_the_layers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    transformer.set_attention_backend("_native_math")
    denoise(transformer)
    assert (handle.skip_fraction()[:, 1:] > 0.05).all()
    handle.disable()
    assert {processor._attention_backend for processor in transformer.attn_processors.values()} == {"_native_math"}


class WithoutScores(TorchFunctionMode):
    """Attention without its scores, as perturbed guidance has it (diffusers' own mode does not compile)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return func(**kwargs | {"query": torch.zeros_like(kwargs["query"])})
        if getattr(func, "__module__", None) == "torch._tensor":
            return getattr(args[0], func.__name__)(*args[1:], **kwargs or {})
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_function_mode_of_someone_else_gets_the_attention_call(
    compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    transformer, stock = make_transformer(WAN), make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    model = torch.compile(transformer, fullgraph=True, backend="eager") if compiled else transformer
    with caplog.at_level(logging.WARNING, "lite_attention"), WithoutScores():
        torch.testing.assert_close(denoise(model), denoise(stock), atol=1e-4, rtol=1e-4)
    said = [record.getMessage() for record in caplog.records if record.name == "lite_attention"]
    assert len(said) == 1
    assert "WithoutScores" in said[0]
    with torch.device("cpu"):  # a mode of torch's own
        denoise(transformer)
    assert (handle.skip_fraction()[:, 1:] > 0.05).all()


def test_disabling_a_model_that_lost_blocks_gives_back_all_of_it() -> None:
    transformer, stock = make_transformer(WAN), make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    lost = transformer.blocks[0]  # type: ignore[index]
    transformer.blocks = transformer.blocks[1:]  # type: ignore[index]
    stock.blocks = stock.blocks[1:]  # type: ignore[index]
    denoise(transformer)
    handle.set_threshold([-1.0] * HEADS)
    handle.disable()
    assert type(lost.attn1.processor) is WanAttnProcessor
    assert set(vars(transformer)) == set(vars(stock))
    assert_all_equal(denoise(transformer), denoise(stock))


@pytest.mark.parametrize("when", ["enable", "disable"])
def test_a_layer_that_takes_no_processor_leaves_nothing_half_done(when: str) -> None:
    def refuse(processor: object) -> None:
        raise RuntimeError("no")

    transformer, names = make_transformer(WAN), set(vars(make_transformer(WAN)))
    layers = [block.attn1 for block in transformer.blocks]  # type: ignore[union-attr]
    if when == "disable":
        handle = enable_lite_attention(transformer)
        layers[0].set_processor = refuse
        with pytest.raises(RuntimeError, match="no"):
            handle.disable()
    else:
        layers[1].set_processor = refuse
        with pytest.raises(RuntimeError, match="no"):
            enable_lite_attention(transformer)
    assert set(vars(transformer)) == names
    assert type(layers[1 if when == "disable" else 0].processor) is WanAttnProcessor


def test_what_others_wrapped_does_nothing_once_disabled(caplog: pytest.LogCaptureFixture) -> None:
    transformer, stock = make_transformer(WAN), make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    context, forward = transformer.cache_context, transformer.forward
    transformer.cache_context = lambda name: context(name)
    transformer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    handle.disable()
    for names in [f"of many {number}" for number in range(9)]:
        with transformer.cache_context(names):
            assert_all_equal(denoise(transformer), denoise(stock))
    del transformer.forward
    assert "forward" not in vars(transformer)


class Deaf:
    """A processor that computes attention by itself."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states


# torch.compile


def everything_that_may_change(
    transformer: nn.Module, compiled: Any, handle: LiteAttentionHandle, case: VideoCase
) -> None:
    """Steps, generations, thresholds, must-do ranges and resets; every output and map equals eager's."""
    eager = copy.deepcopy(transformer)
    layers = [module for module in eager.modules() if isinstance(module, LiteAttention)]
    processors = [module for module in eager.modules() if hasattr(module, "generation")]
    generation: Any = processors[0].generation
    for step, timestep in enumerate((900.0, 700.0, 500.0, 900.0, 700.0, 500.0, 300.0)):
        if step == 1:
            handle.set_threshold(-1.0)
            handle.set_must_do([0, 10, 400, 500])
            for layer in layers:
                layer.set_threshold(-1.0)
            generation.must_do.set([(0, 10), (400, 500)])
        if step == 5:
            handle.reset()
            generation.clock.reset()
        latents = make_latents(case, step)
        torch.testing.assert_close(
            run(compiled, case, latents, timestep), run(eager, case, latents, timestep), atol=1e-4, rtol=1e-4
        )
        for name, layer in zip(handle.layers, layers, strict=True):
            differing = handle.layers[name].keep_map() != layer.keep_map()
            assert differing.float().mean() < 0.01, "but for rounding"
    assert handle.skip_fraction().shape == (len(layers), 2)


@every_model_compiled
def test_one_graph_for_all_layers_steps_and_settings(case: VideoCase) -> None:
    counter = CompileCounter()
    transformer = make_transformer(case)
    handle = enable_lite_attention(transformer, must_do=[5, 6])
    compiled = torch.compile(transformer, fullgraph=True, backend=counter)
    everything_that_may_change(transformer, compiled, handle, case)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_guidance_branch_costs_one_compile() -> None:
    counter = CompileCounter()
    transformer, _ = fresh()
    compiled = torch.compile(transformer, fullgraph=True, backend=counter)
    for step, timestep in enumerate(TIMESTEPS):
        for name in ("cond", "uncond"):
            with compiled.cache_context(name):
                run(compiled, WAN, make_latents(WAN, step), timestep)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_dynamic_shapes_cost_one_compile_a_resolution() -> None:
    counter = CompileCounter()
    transformer, _ = fresh()
    eager = copy.deepcopy(transformer)
    compiled = torch.compile(transformer, fullgraph=True, backend=counter, dynamic=True)
    for step, timestep in enumerate((900.0, 700.0, 500.0, 300.0)):
        for side in (28, 20):
            latents = make_latents(WAN, step)[..., :side]
            out = run(compiled, WAN, latents, timestep)
            torch.testing.assert_close(out, run(eager, WAN, latents, timestep), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_inductor_gives_the_outputs_and_maps_of_eager(mode: str) -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, must_do=[5, 6])
    torch._dynamo.utils.counters.clear()
    everything_that_may_change(transformer, torch.compile(transformer, fullgraph=True, mode=mode), handle, WAN)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["wan", pytest.param("ltx", marks=pytest.mark.slow)])
def test_one_compile_covers_all_repeated_blocks(name: str) -> None:
    case, counter = CASES[name], CompileCounter()
    transformer = make_transformer(case)
    handle = enable_lite_attention(transformer, must_do=[5, 6])
    uncompiled = copy.deepcopy(transformer)
    transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    for step, timestep in enumerate((900.0, 700.0, 500.0, 900.0, 700.0)):
        latents = make_latents(case, step)
        expected = run(uncompiled, case, latents, timestep)
        torch.testing.assert_close(run(transformer, case, latents, timestep), expected, atol=1e-4, rtol=1e-4)
    handle.set_threshold(-1.0)
    handle.set_must_do([9, 10])
    run(transformer, case, make_latents(case), 900.0)
    assert counter.frame_count == 1


def test_gradient_checkpointing_is_refused_while_it_skips_and_right_while_it_does_not() -> None:
    gradients = []
    for checkpointed, skipping in ((False, False), (True, False), (True, True)):
        transformer: Any = make_transformer(WAN)
        weight = transformer.get_submodule(WAN.layers[-1]).to_out[0].weight.requires_grad_()
        handle = enable_lite_attention(transformer, threshold=THRESHOLD)
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        for layer in handle.layers.values():
            layer.enable_skip_optimization(skipping)
        transformer.train()
        with torch.enable_grad():
            loss = run(transformer, WAN, make_latents(WAN), 900.0).square().sum()
        if skipping:
            kept = maps(handle)
            with pytest.raises(RuntimeError, match="LiteAttention: called inside a backward pass"):
                loss.backward()
            assert_all_equal(maps(handle), kept)
        else:
            loss.backward()
            gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)
