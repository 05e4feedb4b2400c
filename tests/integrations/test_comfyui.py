"""The ComfyUI door, in a host that calls it as ComfyUI does."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lite_attention import SkipPolicy
from lite_attention.integrations.comfyui import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    LiteAttentionOverride,
    patch_model,
)
from lite_attention.skipping.branches import MAX_BRANCHES
from support.comfyui_host import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Block,
    LTXVModel,
    ModelPatcher,
    VideoModel,
    optimized_attention,
    prompts,
    sample,
    schedule,
)

TOKENS = 512
STEPS = 3
MIN_TOKENS = 256
# Drops most tiles of the host's attention.
LOW = -1.0


def patched(model: ModelPatcher, threshold: float = LOW, **options: Any) -> tuple[ModelPatcher, LiteAttentionOverride]:
    result = patch_model(model, threshold, min_tokens=MIN_TOKENS, **options)
    return result, result.model_options["transformer_options"]["optimized_attention_override"]


def dropped(override: LiteAttentionOverride, branch: int = 0) -> list[float]:
    return [float(layer.skip_fraction(branch)) for layer in override.layers.values()]


def assert_same(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    assert len(actual) == len(expected)
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                one, other, atol=2e-5, rtol=0, msg=lambda text, step=step: f"step {step}: {text}"
            )


def differs(one: list[Tensor], other: list[Tensor]) -> bool:
    return any(bool((a - b).abs().max() > 1e-3) for a, b in zip(one, other, strict=True))


@pytest.fixture
def model() -> ModelPatcher:
    return ModelPatcher(VideoModel())


@pytest.fixture
def conds() -> list[list[Any]]:
    return [prompts(1), prompts(2)]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("diffusion_model", [VideoModel, LTXVModel])
def test_output_is_the_unpatched_model_s_where_nothing_is_dropped(
    diffusion_model: type[VideoModel], batched: bool, conds: list[list[Any]]
) -> None:
    model = ModelPatcher(diffusion_model())
    lite, override = patched(model, -math.inf)
    sigmas = schedule(STEPS)
    assert_same(
        sample(lite, conds, sigmas, batched=lambda _: batched), sample(model, conds, sigmas, batched=lambda _: batched)
    )
    assert len(override.layers) == 2
    assert dropped(override) == [0.0, 0.0]


@pytest.mark.parametrize("diffusion_model", [VideoModel, LTXVModel])
def test_the_first_step_is_dense_and_later_ones_skip(diffusion_model: type[VideoModel], conds: list[list[Any]]) -> None:
    model = ModelPatcher(diffusion_model())
    lite, override = patched(model)
    ours, dense = sample(lite, conds, schedule(STEPS)), sample(model, conds, schedule(STEPS))
    assert_same(ours[:1], dense[:1])
    assert differs(ours[1], dense[1])
    assert min(dropped(override, 0) + dropped(override, 1)) > 0.2


@pytest.mark.parametrize("steps", [1, 2])
def test_so_many_first_steps_are_dense(steps: int, model: ModelPatcher, conds: list[list[Any]]) -> None:
    lite, _ = patched(model, dense_steps=steps)
    sigmas = schedule(STEPS)
    ours, dense = sample(lite, conds, sigmas), sample(model, conds, sigmas)
    assert_same(ours[:steps], dense[:steps])
    assert differs(ours[steps], dense[steps])


@pytest.mark.parametrize("batched", [False, True])
def test_conditions_do_not_see_each_other_s_state(batched: bool, model: ModelPatcher, conds: list[list[Any]]) -> None:
    together = sample(patched(model)[0], conds, schedule(STEPS), batched=lambda _: batched)
    for index, cond in enumerate(conds):
        alone = sample(patched(model)[0], [cond], schedule(STEPS))
        assert_same([[prediction[index]] for prediction in together], alone)


def test_prompts_of_one_side_do_not_see_each_other_s_state(model: ModelPatcher) -> None:
    first, second = prompts(1, 2)
    together = sample(patched(model)[0], [[first, second]], schedule(STEPS))
    alone = [sample(patched(model)[0], [[prompt]], schedule(STEPS)) for prompt in (first, second)]
    assert_same(together, [[(a + b) / 2] for (a,), (b,) in zip(*alone, strict=True)])


def test_another_batching_of_the_conditions_starts_dense(model: ModelPatcher, conds: list[list[Any]]) -> None:
    ours = sample(patched(model)[0], conds, schedule(STEPS), batched=lambda step: step == 1)
    dense = sample(model, conds, schedule(STEPS))
    assert_same(ours[:2], dense[:2])
    assert differs(ours[2], dense[2])  # back to the state of the first step


def test_conditions_that_join_late_have_first_steps_of_their_own(model: ModelPatcher, conds: list[list[Any]]) -> None:
    lite, _ = patched(model, dense_steps=2)
    ours, dense = (sample(each, conds, schedule(4), batched=lambda step: step > 0) for each in (lite, model))
    assert_same(ours[:3], dense[:3])
    assert differs(ours[3], dense[3])


def test_a_new_sampling_starts_dense(model: ModelPatcher, conds: list[list[Any]]) -> None:
    lite, _ = patched(model)
    sample(lite, conds, schedule(STEPS)[:-1])  # broken off
    for first in (1.0, 0.3):  # also where it begins lower than the last one ended
        assert_same(sample(lite, conds, schedule(2, first))[:1], sample(model, conds, schedule(2, first))[:1])


def test_sigmas_that_rise_within_a_sampling_start_dense(model: ModelPatcher, conds: list[list[Any]]) -> None:
    restart = torch.tensor([1.0, 0.6, 0.9, 0.4, 0.0])
    ours, dense = sample(patched(model)[0], conds, restart), sample(model, conds, restart)
    for step, is_dense in enumerate([True, False, True, False]):
        assert differs(ours[step], dense[step]) is not is_dense


def test_two_samplings_with_one_model_are_the_same(model: ModelPatcher, conds: list[list[Any]]) -> None:
    lite, _ = patched(model)
    first = sample(lite, conds, schedule(STEPS))
    again = sample(lite, [prompts(1), prompts(2)], schedule(STEPS))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))


def test_the_model_given_to_the_node_stays_as_it_is(model: ModelPatcher) -> None:
    patched(model)
    assert model.model_options == {"transformer_options": {}}
    assert model.wrappers == {}


class Recorder:
    """An override, or a function, that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return torch.zeros(1)


def attention_call(tokens: int = TOKENS, **changes: Any) -> dict[str, Any]:
    q = torch.randn(1, tokens, WIDTH)
    call = {"q": q, "k": q, "v": q, "heads": HEADS, "transformer_options": {"block_type": "double", "block_index": 0}}
    return {**call, **changes}


def options_of_call(**changes: Any) -> dict[str, Any]:
    options = {"cond_or_uncond": [0], "sigmas": torch.ones(1), "sample_sigmas": schedule(2)}
    return {name: value for name, value in {**options, **changes}.items() if value is not None}


def in_model_call(override: LiteAttentionOverride, action: Callable[[], Any], **changes: Any) -> Any:
    """Run ``action`` as the body of a model call."""
    x = torch.zeros(1)
    return override.around_model_call(
        lambda *args, **kwargs: action(), x, x, transformer_options=options_of_call(**changes)
    )


NOT_TAKEN = {
    "cross-attention": {"k": torch.randn(1, 300, WIDTH), "v": torch.randn(1, 300, WIDTH)},
    "few tokens": {"tokens": MIN_TOKENS - 1},
    "a mask": {"mask": torch.ones(TOKENS, TOKENS)},
    "another precision": {"attn_precision": torch.float64},
    "head_dim 4": {"heads": WIDTH // 4},
    "float64": {name: torch.randn(1, TOKENS, WIDTH, dtype=torch.float64) for name in "qkv"},
}


@pytest.mark.parametrize("changes", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_other_calls_reach_the_given_function_as_they_are(changes: dict[str, Any]) -> None:
    override, given = LiteAttentionOverride(min_tokens=MIN_TOKENS), Recorder()
    call = attention_call(**changes)
    in_model_call(override, lambda: override(given, call.pop("q"), call.pop("k"), call.pop("v"), **call))
    ((_, kwargs),) = given.calls
    assert all(kwargs[name] is call[name] for name in call if name != "heads")
    assert override.layers == {}


def test_calls_outside_of_a_model_call_reach_the_given_function() -> None:
    override, given = LiteAttentionOverride(min_tokens=MIN_TOKENS), Recorder()
    override(given, **attention_call())
    with pytest.raises(ZeroDivisionError):
        in_model_call(override, lambda: 1 / 0)
    override(given, **attention_call())
    assert len(given.calls) == 2


def test_an_override_that_is_there_keeps_the_other_calls(model: ModelPatcher, conds: list[list[Any]]) -> None:
    lengths = []

    def theirs(func: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(k.shape[1])
        return func(q, k, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = theirs
    lite, override = patched(patched(model)[0])  # LiteAttention twice is LiteAttention once
    assert override.previous is theirs
    assert [len(wrappers) for wrappers in lite.wrappers["apply_model"].values()] == [1]
    sample(lite, conds, schedule(1))
    assert lengths == [16] * 4  # cross-attention of two blocks and two conditions


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_layouts_are_comfyui_s(skip_reshape: bool, skip_output_reshape: bool, kv_heads: int) -> None:
    q, k, v = (torch.randn(2, TOKENS, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads))
    q, k, v = (tensor.transpose(1, 2) if skip_reshape else tensor.flatten(-2) for tensor in (q, k, v))
    layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    options = {"scale": 0.3, "enable_gqa": kv_heads != HEADS, "transformer_options": {"block_index": 0}}
    override = LiteAttentionOverride(min_tokens=MIN_TOKENS)
    given = Recorder()
    out = in_model_call(override, lambda: override(given, q, k, v, HEADS, **layout, **options))
    assert given.calls == []
    torch.testing.assert_close(out, optimized_attention(q, k, v, HEADS, **layout, scale=0.3, enable_gqa=True))


def test_text_tokens_are_kept_where_comfyui_says_where_the_video_is() -> None:
    override = LiteAttentionOverride(LOW, min_tokens=MIN_TOKENS)
    q = 6 * torch.randn(1, TOKENS, WIDTH)
    call = attention_call(q=q, k=q, v=q)
    call["transformer_options"] = {"block_type": "single", "block_index": 0, "img_slice": [100, 400]}
    for _ in range(2):
        in_model_call(override, lambda: override(Recorder(), **call))
    (layer,) = override.layers.values()
    kept = layer.keep_map()
    rows, keys = layer.tile_shape()
    assert kept[:, :, :, : math.ceil(100 / keys)].all()
    assert kept[:, :, :, 400 // keys :].all()
    assert kept[:, :, : math.ceil(100 / rows)].all()
    assert kept[:, :, 400 // rows :].all()
    assert not kept.all()


def test_a_replacement_that_is_there_still_runs_the_block(conds: list[list[Any]]) -> None:
    model = ModelPatcher(LTXVModel())
    ran = []

    def theirs(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        ran.append(args["transformer_options"]["block_index"])
        return extra["original_block"](args)

    model.set_model_patch_replace(theirs, "dit", "double_block", 1)
    lite, override = patched(patched(model)[0])
    sample(lite, conds, schedule(1))
    assert ran == [1, 1]
    assert len(override.layers) == 2


class TwiceInABlock(VideoModel):
    """Runs a second self-attention under the same block index, as ComfyUI's Wan VACE does."""

    def __init__(self) -> None:
        super().__init__(1)
        self.extra = Block()

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        return self.extra(super().forward(x, context, transformer_options), context, transformer_options)


def test_two_layers_under_one_name_are_refused(conds: list[list[Any]]) -> None:
    lite, _ = patched(ModelPatcher(TwiceInABlock()))
    with pytest.raises(ValueError, match=r"several self-attention layers .* cannot be told apart"):
        sample(lite, conds, schedule(1))


def test_a_layer_without_a_name_is_refused() -> None:
    override = LiteAttentionOverride(min_tokens=MIN_TOKENS)
    call = attention_call(transformer_options={"block_type": "double"})
    with pytest.raises(ValueError, match="transformer_options has no block_index"):
        in_model_call(override, lambda: override(Recorder(), **call))


@pytest.mark.parametrize("img_slice", [[0, TOKENS + 1], [5, 5], [-1, 8]])
def test_an_img_slice_that_does_not_fit_is_refused(img_slice: list[int]) -> None:
    override = LiteAttentionOverride(min_tokens=MIN_TOKENS)
    call = attention_call(transformer_options={"block_index": 0, "img_slice": img_slice})
    with pytest.raises(ValueError, match=r"img_slice is .* expected a range within the 512 tokens"):
        in_model_call(override, lambda: override(Recorder(), **call))


@pytest.mark.parametrize("name", ["cond_or_uncond", "sigmas", "sample_sigmas"])
def test_a_model_call_that_says_too_little_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"transformer_options has no {name}"):
        in_model_call(LiteAttentionOverride(), lambda: None, **{name: None})


@pytest.mark.parametrize("name", ["context_window", "multigpu_thread_device"])
def test_ways_of_sampling_that_are_not_supported_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"transformer_options has {name}, expected none"):
        in_model_call(LiteAttentionOverride(), lambda: None, **{name: object()})


def test_one_combination_of_conditions_too_many_is_refused() -> None:
    override, sigmas = LiteAttentionOverride(), schedule(2)
    for index in range(MAX_BRANCHES):
        in_model_call(override, lambda: None, cond_or_uncond=[index], sample_sigmas=sigmas)
    with pytest.raises(RuntimeError, match="more than 8 combinations"):
        in_model_call(override, lambda: None, cond_or_uncond=[MAX_BRANCHES], sample_sigmas=sigmas)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"threshold": 1.0}, ValueError, "threshold is 1.0"),
        ({"dense_steps": -1}, ValueError, "dense_steps is -1"),
        ({"min_tokens": 0}, ValueError, "min_tokens is 0"),
        ({"min_tokens": 0.5}, TypeError, "min_tokens has type float"),
    ],
)
def test_arguments_are_checked_when_the_model_is_patched(
    arguments: dict[str, Any], error: type[Exception], text: str, model: ModelPatcher
) -> None:
    with pytest.raises(error, match=text):
        patch_model(model, **arguments)


def test_the_node_follows_comfyui_s_conventions(model: ModelPatcher) -> None:
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        required = node.INPUT_TYPES()["required"]
        method = getattr(node(), node.FUNCTION)
        assert list(inspect.signature(method).parameters) == list(required)
        defaults = {name: kind[1]["default"] for name, kind in required.items() if len(kind) > 1}
        outputs = method(model=model, **defaults)
        assert len(outputs) == len(node.RETURN_TYPES)
        override = outputs[0].model_options["transformer_options"]["optimized_attention_override"]
        assert override.policy == SkipPolicy()
        assert isinstance(node.CATEGORY, str)
