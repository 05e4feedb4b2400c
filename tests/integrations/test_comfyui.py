"""The ComfyUI door, in a host that calls it as ComfyUI does."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lite_attention import SkipPolicy
from lite_attention.integrations.comfyui import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    LiteAttentionOverride,
    patch_model,
)
from support.comfyui_host import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Block,
    LTXVModel,
    ModelPatcher,
    VideoModel,
    calc_cond_batch,
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
    "a scale of 0": {"scale": 0.0},
    "a keyword of its own": {"is_causal": True},
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


@pytest.mark.parametrize("img_slice", [None, 3, "xx", [0.5, 64], [0, 1, 2]])
def test_an_img_slice_that_is_no_range_is_refused(img_slice: object) -> None:
    override = LiteAttentionOverride(min_tokens=MIN_TOKENS)
    call = attention_call(transformer_options={"block_index": 0, "img_slice": img_slice})
    with pytest.raises(TypeError, match=r"^LiteAttention: img_slice is .*, expected \[start, end\]$"):
        in_model_call(override, lambda: override(Recorder(), **call))


@pytest.mark.parametrize("name", ["cond_or_uncond", "sigmas", "sample_sigmas"])
def test_a_model_call_that_says_too_little_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"transformer_options has no {name}"):
        in_model_call(LiteAttentionOverride(), lambda: None, **{name: None})


@pytest.mark.parametrize("name", ["cond_or_uncond", "uuids"])
@pytest.mark.parametrize("nonsense", [3, [[0]]])
def test_conditions_that_are_no_list_are_refused(name: str, nonsense: object) -> None:
    with pytest.raises(TypeError, match=f"^LiteAttention: {name} of transformer_options is .*, expected a list"):
        in_model_call(LiteAttentionOverride(), lambda: None, **{name: nonsense})


def test_several_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="transformer_options has multigpu_thread_device, expected none"):
        in_model_call(LiteAttentionOverride(), lambda: None, multigpu_thread_device=object())


# Several streams of model calls in one step


def in_tiles(count: int) -> Callable[..., Tensor]:
    """Calls the model for each of so many tiles, as nodes for large latents do."""

    def function(apply: Callable[..., Tensor], call: dict[str, Tensor]) -> Tensor:
        return torch.cat([apply(tile, call["timestep"]) for tile in call["input"].chunk(count, 1)], 1)

    return function


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("tells_of_samplings", [False, True])
def test_tiles_have_maps_of_their_own(
    batched: bool, tells_of_samplings: bool, model: ModelPatcher, conds: list[list[Any]]
) -> None:
    lite, override = patched(model, fixed_order=True)
    options: dict[str, Any] = {"batched": lambda _: batched, "tells_of_samplings": tells_of_samplings}
    for _ in range(2):
        whole = sample(lite, conds, schedule(4), function=in_tiles(2), **options)
        assert len(override.streams) == (2 if batched else 4)
    for tile in (slice(0, 256), slice(256, 512)):
        alone = sample(patched(model)[0], conds, schedule(4), tokens=tile, **options)
        assert_same([[side[:, tile] for side in prediction] for prediction in whole], alone)
    assert differs(whole[3], sample(model, conds, schedule(4), function=in_tiles(2))[3])


def test_tiles_in_another_batching_start_dense(model: ModelPatcher, conds: list[list[Any]]) -> None:
    ours, dense = (
        sample(each, conds, schedule(4), batched=lambda step: step == 1, function=in_tiles(2))
        for each in (patched(model, fixed_order=True)[0], model)
    )
    assert_same(ours[:2], dense[:2])
    assert differs(ours[2], dense[2])


TILE_REASON = "several model calls of a step for the same conditions, as of tiles"


@pytest.mark.parametrize("tells_of_samplings", [False, True])
def test_calls_that_nothing_tells_apart_run_dense(
    tells_of_samplings: bool, model: ModelPatcher, conds: list[list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    lite, override = patched(model)
    options: dict[str, Any] = {"function": in_tiles(2), "tells_of_samplings": tells_of_samplings}
    ours, dense = (sample(each, conds, schedule(4), **options) for each in (lite, model))
    assert_same(ours, dense)
    assert caplog.text.count("run dense from now on: " + TILE_REASON) == 2, "once for each condition"
    assert f"left to ComfyUI: {4 * 14} x {TILE_REASON}" in override.summary(), (
        "all but the first call for each condition"
    )
    assert "call 0 of a step for conditions [0]: runs dense" in override.summary()
    again = sample(lite, conds, schedule(4))
    assert differs(again[2], sample(model, conds, schedule(4))[2]), "another sampling is another matter"


def tiles_of_steps(*tiles: tuple[int, ...]) -> Callable[..., Tensor]:
    """Calls the model in each step for those of two tiles; what is left out is 0."""
    steps = iter(tiles)

    def function(apply: Callable[..., Tensor], call: dict[str, Tensor]) -> Tensor:
        parts = list(torch.zeros_like(call["input"]).chunk(2, 1))
        for tile in next(steps):
            parts[tile] = apply(call["input"].chunk(2, 1)[tile], call["timestep"])
        return torch.cat(parts, 1)

    return function


@pytest.mark.parametrize("left_out", [(1,), (0, 1, 0)])
def test_another_number_of_calls_in_a_step_is_not_silent(
    left_out: tuple[int, ...], model: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    lite, override = patched(model, fixed_order=True)
    ours, dense = (
        sample(each, [prompts(1)], schedule(5), function=tiles_of_steps((0, 1), (0, 1), left_out, (0, 1), (0, 1)))
        for each in (lite, model)
    )
    assert differs(ours[1], dense[1])
    assert_same(ours[3:], dense[3:])
    assert caplog.text.count("more or fewer model calls for the same conditions than in the steps before") == 1
    assert "more or fewer model calls" in override.summary()


def test_the_last_step_of_a_sampling_is_counted_too(model: ModelPatcher, caplog: pytest.LogCaptureFixture) -> None:
    lite, _ = patched(model, fixed_order=True)
    sample(lite, [prompts(1)], schedule(2), function=tiles_of_steps((0, 1), (1,)), tells_of_samplings=True)
    assert "more or fewer model calls" in caplog.text


def guided(run: Callable[..., list[Tensor]], model: ModelPatcher) -> ModelPatcher:
    """With a guider in place of ComfyUI's, inside of our wrapper."""
    other = model.clone()
    steps = iter(range(100))

    def guider(_: Any, *args: Any) -> list[Tensor]:
        return run(next(steps), *args)

    other.wrappers["predict_noise"] = {"guider": [guider], **other.wrappers.get("predict_noise", {})}
    return other


@pytest.mark.parametrize("fixed_order", [False, True])
def test_tiles_whose_batching_changes_by_turns_are_told_apart(
    fixed_order: bool, model: ModelPatcher, conds: list[list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """The conditions of one tile share a batch, those of the other do not: no kind of call comes twice in a step."""

    def both_tiles(step: int, model: Any, conds: Any, x: Tensor, sigma: Tensor, options: Any, _: bool) -> list[Tensor]:
        parts = [
            calc_cond_batch(model, conds, tile, sigma, options, (index == 0) != (step >= 3))
            for index, tile in enumerate(x.chunk(2, 1))
        ]
        return [torch.cat(part, 1) for part in zip(*parts, strict=True)]

    lite, override = patched(model, fixed_order=fixed_order)
    ours, dense = (sample(guided(both_tiles, each), conds, schedule(5), tokens=1024) for each in (lite, model))
    if fixed_order:
        assert differs(ours[2], dense[2])
        assert_same(ours[3:4], dense[3:4])
        assert differs(ours[4], dense[4])
        assert caplog.text == ""
    else:
        assert_same(ours, dense)
        assert caplog.text.count("run dense from now on: " + TILE_REASON) == 2, "once for each condition"
        assert "for conditions [1, 0]: runs dense" in override.summary()


@pytest.mark.parametrize("batched", [True, False])
def test_a_condition_that_comes_again_in_another_batch_is_mixed(
    batched: bool, model: ModelPatcher, conds: list[list[Any]]
) -> None:
    """Guidance asks for the positive once more each step, of another video; memory runs short after two steps."""

    def twice(step: int, model: Any, conds: Any, x: Tensor, sigma: Tensor, options: Any, _: bool) -> list[Tensor]:
        out = calc_cond_batch(model, conds, x, sigma, options, batched and step < 2)
        calc_cond_batch(model, conds[:1], x.flip(1), sigma, options, False)
        return out

    lite, override = patched(model)
    ours, dense = (sample(guided(twice, each), conds, schedule(5)) for each in (lite, model))
    assert_same([[step[0]] for step in ours], [[step[0]] for step in dense])
    assert differs(ours[4][1:], dense[4][1:]), "the negative goes on"
    assert TILE_REASON in override.summary()


@pytest.mark.parametrize("again", [True, False])
def test_calls_outside_of_evaluations_are_dense_and_said_so(
    again: bool, model: ModelPatcher, conds: list[list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """A node around ours asks for the positive of another video after each evaluation, at a sigma of its own."""
    lite, override = patched(model)
    extra = []

    def around(run: Any, model: Any, conds: Any, x: Tensor, sigma: Tensor, options: Any, batched: bool) -> list[Tensor]:
        out = run(model, conds, x, sigma, options, batched)
        if again:
            extra.append(calc_cond_batch(model, conds[:1], x.flip(1), sigma + 0.3, options, False))
        return out

    alone = sample(lite, conds, schedule(4))
    for each in (lite, model):
        each.add_wrapper_with_key("predict_noise", "around", around)
    assert_same(sample(lite, conds, schedule(4)), alone)
    sample(model, conds, schedule(4))
    assert_same(extra[:4] if again else [], extra[4:])
    assert caplog.text.count("a call for conditions [0] runs dense: a model call outside") == int(again)
    assert ("16 x a model call outside of the sampler's evaluations" in override.summary()) is again
    assert "started full" not in override.summary()


@pytest.mark.parametrize("kind", ["predict_noise", "outer_sample"])
def test_calls_before_the_first_evaluation_are_dense_too(
    kind: str, model: ModelPatcher, conds: list[list[Any]]
) -> None:
    """A node asks for the conditions of another video, at another sigma, before the sampler does."""
    sigmas = schedule(3)
    alone = sample(patched(model)[0], conds, sigmas)

    def ask_before(executor: Callable[..., Any], *args: Any) -> Any:
        options = {"transformer_options": {**lite.model_options["transformer_options"], "sample_sigmas": sigmas}}
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))
        calc_cond_batch(lite, conds, x, torch.tensor([1.1]), options, False)
        return executor(*args)

    lite, override = patched(model)
    lite.add_wrapper_with_key(kind, "before", ask_before)
    if kind == "outer_sample":  # of the host's wrappers the first is the innermost
        lite.wrappers[kind] = dict(reversed(lite.wrappers[kind].items()))
    assert_same(sample(lite, conds, sigmas), alone)
    assert "x a model call outside of the sampler's evaluations" in override.summary()


@pytest.mark.parametrize("how", ["without guards", "dynamic"])
def test_compiled_blocks_compute_what_eager_ones_do(how: str, conds: list[list[Any]]) -> None:
    """ComfyUI's own node leaves out the guards on all that is read from transformer_options."""
    outcomes = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = ModelPatcher(VideoModel())
        for block in model.diffusion_model.transformer_blocks if compiled else ():
            if how == "dynamic":
                block.compile(backend="eager", dynamic=True)
            else:
                block.compile(backend="eager", options={"guard_filter_fn": _no_guards_on_options})
        lite, override = patched(model)
        # Of two lengths, as the layers are made while the first one is compiled.
        outcomes.append([*sample(lite, conds, schedule(2), 400), *sample(lite, conds, schedule(3))])
        assert len(override.layers) == 2
        assert min(dropped(override, 0) + dropped(override, 1)) > 0.2
    assert_same(*outcomes)


def test_one_graph_for_a_block_is_refused_with_the_reason(model: ModelPatcher, conds: list[list[Any]]) -> None:
    torch._dynamo.reset()
    model.diffusion_model.transformer_blocks[0].compile(backend="eager", fullgraph=True)  # type: ignore[index, operator]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile without fullgraph=True"):
        sample(patched(model)[0], conds, schedule(1))


def _no_guards_on_options(guards: Any) -> list[bool]:
    return ["transformer_options" not in guard.name for guard in guards]


@pytest.mark.parametrize("tells_of_samplings", [False, True])
@pytest.mark.parametrize("retried", ["the call", "the evaluation"])
def test_a_call_that_fails_and_comes_again_is_the_same_call(
    retried: str, tells_of_samplings: bool, model: ModelPatcher
) -> None:
    """The second tile of the second step has no memory at first."""
    conds = [prompts(1)]
    runs = iter(range(100))

    def failing(apply: Callable[..., Tensor], call: dict[str, Tensor]) -> Tensor:
        def attend(tile: Tensor) -> Tensor:
            if next(runs) == 3:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Block, "forward", lambda *_: 1 / 0)
                    return apply(tile, call["timestep"])
            return apply(tile, call["timestep"])

        def again(action: Callable[[], Tensor], here: bool) -> Tensor:
            try:
                return action()
            except ZeroDivisionError:
                if not here:
                    raise
                return action()

        tiles = call["input"].chunk(2, 1)
        return torch.cat([again(lambda tile=tile: attend(tile), retried == "the call") for tile in tiles], 1)

    expected = sample(patched(model, fixed_order=True)[0], conds, schedule(4), function=in_tiles(2))
    lite, override = patched(model, fixed_order=True)
    if retried == "the evaluation":
        # Around ours, as by a node.
        lite.add_wrapper_with_key("predict_noise", "retries", _again)
    tells_of_samplings |= retried == "the evaluation"
    ours = sample(lite, conds, schedule(4), function=failing, tells_of_samplings=tells_of_samplings)
    assert len(override.streams) == 2
    assert "more or fewer" not in override.summary()
    # An evaluation that comes again does so on what it dropped itself: there the first tile skips more.
    for one, other in zip(ours, expected, strict=True):
        part = slice(0 if retried == "the call" else 256, 512)
        assert_same([[one[0][:, part]]], [[other[0][:, part]]])


def _again(executor: Callable[..., Any], *args: Any) -> Any:
    try:
        return executor(*args)
    except ZeroDivisionError:
        return executor(*args)


def test_an_evaluation_inside_of_another_is_no_step_of_its_own() -> None:
    """As of guiders that call each other."""
    override, sigmas = LiteAttentionOverride(fixed_order=True), schedule(2)

    def call() -> None:
        in_model_call(override, lambda: None, sample_sigmas=sigmas)

    def evaluate() -> None:
        call()
        override.around_evaluation(call)
        call()

    for _ in range(2):
        override.around_evaluation(evaluate)
    assert [stream.calls for stream in override.streams] == [(0,), (1,), (2,)]
    assert "dense" not in override.summary()


@pytest.mark.parametrize("tells_of_samplings", [False, True])
def test_guidance_that_replaces_blocks_has_a_map_of_its_own(tells_of_samplings: bool) -> None:
    """As skip-layer guidance does, which comes and goes with the steps."""
    model = ModelPatcher(LTXVModel())
    conds = [prompts(1)]
    lite, override = patched(model)
    steps = iter(range(4))

    def guided(executor: Callable[..., Tensor], *args: Any) -> Tensor:
        out = executor(*args)
        if next(steps) in (1, 2):
            *others, options = args
            replacements = {**options["patches_replace"]["dit"], ("double_block", 0): _skipped}
            executor(*others, {**options, "patches_replace": {"dit": replacements}})
        return out

    expected = sample(patched(model)[0], conds, schedule(4))
    lite.add_wrapper_with_key("apply_model", "guidance", guided)
    assert_same(sample(lite, conds, schedule(4), tells_of_samplings=tells_of_samplings), expected)
    assert len(override.streams) == 2
    assert "several model calls" not in override.summary()


def _skipped(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return args


def test_guidance_that_asks_for_a_condition_again_has_a_map_of_its_own(model: ModelPatcher) -> None:
    def function(apply: Callable[..., Tensor], call: dict[str, Tensor]) -> Tensor:
        return torch.cat([apply(call["input"], call["timestep"]), apply(call["input"].flip(1), call["timestep"])])

    conds = [prompts(1)]
    both = sample(patched(model, fixed_order=True)[0], conds, schedule(4), function=function)
    for index, flip in enumerate((False, True)):

        def once(apply: Callable[..., Tensor], call: dict[str, Tensor], flip: bool = flip) -> Tensor:
            return apply(call["input"].flip(1) if flip else call["input"], call["timestep"])

        alone = sample(patched(model)[0], conds, schedule(4), function=once)
        # The host takes what comes back for two parts of a batch.
        assert_same([[prediction[0][index : index + 1]] for prediction in both], alone)


@pytest.mark.parametrize("tiles", [1, 2])
def test_samplers_that_call_a_sigma_twice_are_right(tiles: int, model: ModelPatcher, conds: list[list[Any]]) -> None:
    def heun(step: int) -> list[int]:
        return [step, step + 1]

    sigmas = schedule(5)[:-1]
    lite, override = patched(model, fixed_order=True)
    ours = sample(lite, conds, sigmas, calls=heun, function=in_tiles(tiles))
    dense = sample(model, conds, sigmas, calls=heun, function=in_tiles(tiles))
    is_dense = [not differs(one, other) for one, other in zip(ours, dense, strict=True)]
    assert is_dense == [True] + [False] * 7
    assert len(override.streams) == 2 * tiles


def test_samplers_that_call_a_sigma_twice_run_dense_where_evaluations_are_not_told(
    model: ModelPatcher, conds: list[list[Any]]
) -> None:
    lite, override = patched(model)
    options: dict[str, Any] = {"calls": lambda step: [step, step + 1], "tells_of_samplings": False}
    ours, dense = (sample(each, conds, schedule(5)[:-1], **options) for each in (lite, model))
    assert_same(ours[2:], dense[2:])
    assert TILE_REASON in override.summary()


def test_streams_without_room_run_dense_and_the_summary_says_so(
    model: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    lite, override = patched(model, fixed_order=True)
    conds = [prompts(1)]

    def ten_times(apply: Callable[..., Tensor], call: dict[str, Tensor]) -> Tensor:
        return torch.cat([apply(call["input"].roll(50 * turn, 1), call["timestep"]) for turn in range(10)], 1)

    ours, dense = (sample(each, conds, schedule(4), function=ten_times) for each in (lite, model))
    for step in (1, 2, 3):
        taken, left = (
            differs([ours[step][0][:, part]], [dense[step][0][:, part]]) for part in (slice(4096), slice(4096, None))
        )
        assert taken
        assert not left
    assert caplog.text.count("runs dense: more than 8 streams") == 1
    assert override.left_to_comfyui["other keys than queries, as in cross-attention"] == 64
    assert_expected_inline(
        re.sub(r"\d+%", "..%", override.summary()),
        """\
call 0 of a step for conditions [0]: ..% skipped
call 1 of a step for conditions [0]: ..% skipped
call 2 of a step for conditions [0]: ..% skipped
call 3 of a step for conditions [0]: ..% skipped
call 4 of a step for conditions [0]: ..% skipped
call 5 of a step for conditions [0]: ..% skipped
call 6 of a step for conditions [0]: ..% skipped
call 7 of a step for conditions [0]: ..% skipped
left to ComfyUI: 64 x other keys than queries, as in cross-attention
left to ComfyUI: 32 x more than 8 streams (combinations of conditions, windows, tiles and calls of one step), of which each would need a skip state""",
    )
    sample(lite, conds, schedule(2))
    assert len(override.summary().splitlines()) == 2, "of the latest sampling alone"


class Window:
    """ComfyUI's comfy.context_windows.IndexListContextWindow."""

    def __init__(self, *frames: int) -> None:
        self.index_list = list(frames)


def test_context_windows_have_maps_of_their_own(model: ModelPatcher, conds: list[list[Any]]) -> None:
    """Windows that come by turns, told by their frames; windows that move have no map to go on with."""
    lite, override = patched(model)
    dense = sample(model, conds, schedule(6))
    ours = sample(lite, conds, schedule(6), window=lambda step: Window(*range(step % 2, step % 2 + 4)))
    assert [not differs(one, other) for one, other in zip(ours, dense, strict=True)] == [True, True] + [False] * 4
    assert "on frames 1 to 4" in override.summary()
    moving = sample(lite, conds, schedule(6), window=lambda step: Window(*range(step, step + 4)))
    assert_same(moving, dense)


def test_a_window_that_does_not_say_its_frames_is_refused() -> None:
    with pytest.raises(ValueError, match=r"context_window .* expected one with an index_list of frames"):
        in_model_call(LiteAttentionOverride(), lambda: None, context_window=object())


# Runs of a sampler


@pytest.mark.parametrize("tells_of_samplings", [False, True])
@pytest.mark.parametrize("same_conditions", [False, True])
def test_a_schedule_that_a_node_kept_is_a_new_run_each_time(
    same_conditions: bool, tells_of_samplings: bool, model: ModelPatcher, conds: list[list[Any]]
) -> None:
    lite, override = patched(model)
    sigmas = schedule(STEPS)
    expected = sample(patched(model)[0], conds, sigmas)
    for _ in range(6):
        given = conds if same_conditions else [prompts(1), prompts(2)]
        assert_same(sample(lite, given, sigmas, tells_of_samplings=tells_of_samplings), expected)
        assert len(override.streams) == 2


@pytest.mark.parametrize("same_conditions", [False, True])
def test_runs_of_one_step_are_dense_however_many(same_conditions: bool, model: ModelPatcher) -> None:
    for tells_of_samplings in (True, False):
        lite, override = patched(model)
        sigmas, conds = schedule(1), [prompts(1)]
        dense = sample(model, conds, sigmas)
        for _ in range(10):
            given = conds if same_conditions else [prompts(1)]
            assert_same(sample(lite, given, sigmas, tells_of_samplings=tells_of_samplings), dense)
        assert (len(override.streams) == 1) is (tells_of_samplings or same_conditions)


def test_a_run_that_begins_lower_than_the_last_ended_starts_dense(model: ModelPatcher, conds: list[list[Any]]) -> None:
    """Only ComfyUI's word tells: the same conditions, the same schedule, the first run broken off."""
    lite, _ = patched(model)
    sigmas = schedule(6)
    sample(lite, conds, sigmas, calls=lambda step: [step] if step < 2 else [])
    later = {"calls": lambda step: [step] if step > 2 else []}
    ours, dense = (sample(each, conds, sigmas, **later) for each in (lite, model))
    assert_same(ours[:1], dense[:1])


def test_the_summary_counts_turns_of_the_sigmas(model: ModelPatcher, conds: list[list[Any]]) -> None:
    lite, override = patched(model)
    assert override.summary() == "no model call yet"
    sample(lite, conds, torch.tensor([1.0, 0.6, 0.9, 0.4, 0.0]))
    assert "started full again 1 times" in override.summary()


@pytest.mark.parametrize(
    ("sigmas", "error", "text"),
    [
        (0.5, TypeError, "sigmas of transformer_options has type float, expected a tensor"),
        (torch.empty(0), ValueError, r"is \[\], expected numbers"),
        (torch.tensor([math.nan]), ValueError, r"is \[nan\], expected numbers"),
    ],
)
def test_sigmas_that_are_none_are_refused(sigmas: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        in_model_call(LiteAttentionOverride(), lambda: None, sigmas=sigmas)


def test_what_is_no_model_or_no_override_is_refused() -> None:
    with pytest.raises(TypeError, match="model has type Identity, expected ComfyUI's ModelPatcher"):
        patch_model(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="previous has type int, expected a function"):
        LiteAttentionOverride(previous=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"threshold": 1.0}, ValueError, "threshold is 1.0"),
        ({"dense_steps": -1}, ValueError, "dense_steps is -1"),
        ({"min_tokens": 0}, ValueError, "min_tokens is 0"),
        ({"fixed_order": 1}, TypeError, "fixed_order has type int"),
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
        inputs = node.INPUT_TYPES()
        names = [*inputs["required"], *inputs["optional"]]
        method = getattr(node(), node.FUNCTION)
        assert list(inspect.signature(method).parameters) == names
        defaults = {name: kind[1]["default"] for name, kind in inputs["required"].items() if len(kind) > 1}
        outputs = method(model=model, **defaults)
        assert len(outputs) == len(node.RETURN_TYPES)
        override = outputs[0].model_options["transformer_options"]["optimized_attention_override"]
        assert override.policy == SkipPolicy()
        assert isinstance(node.CATEGORY, str)
