"""What a door is told about skipping reaches every layer whole, and its clock."""

from collections.abc import Callable, Iterable

import pytest
from torch import nn

from lite_attention import LiteAttention, SeqParallelLiteAttention, SkipPolicy
from lite_attention.integrations.comfyui import LiteAttentionOverride
from lite_attention.integrations.diffusers import enable_lite_attention
from lite_attention.integrations.sdpa import LiteSDPA
from lite_attention.layers import LocalAttention
from lite_attention.skipping.dense_steps import GenerationClock
from support.video_models import CASES, make_transformer

POLICY = SkipPolicy(threshold=(-4.0, -5.0), dense_steps=3)

Made = tuple[Iterable[LiteAttention], GenerationClock | None]


def layers_in(module: nn.Module) -> list[LiteAttention]:
    return [part for part in module.modules() if isinstance(part, LiteAttention)]


def splits(**told: object) -> Made:
    return layers_in(SeqParallelLiteAttention(2, **told)), None  # type: ignore[arg-type]


def local_attention(**told: object) -> Made:
    return layers_in(LocalAttention(2, 64, supported_attention_backends=("LITE_ATTN",), **told)), None  # type: ignore[arg-type]


def sdpa(**told: object) -> Made:
    return layers_in(LiteSDPA(nn.Sequential(nn.Identity(), nn.Identity()), "[01]", **told)), None  # type: ignore[arg-type]


def comfyui(**told: object) -> Made:
    override = LiteAttentionOverride(**told)  # type: ignore[arg-type]
    override._layer({"block_index": 0})
    return override.layers.values(), override.clock


def diffusers(**told: object) -> Made:
    transformer = make_transformer(CASES["wan"])
    handle = enable_lite_attention(transformer, **told)  # type: ignore[arg-type]
    clocks = [part for part in transformer.modules() if isinstance(part, GenerationClock)]
    return handle.layers.values(), clocks[0]  # type: ignore[return-value]


DOORS: dict[str, Callable[..., Made]] = {
    door.__name__: door for door in (splits, local_attention, sdpa, comfyui, diffusers)
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_policy_is_handed_on_whole(door: Callable[..., Made]) -> None:
    layers, clock = door(policy=POLICY)
    assert {layer.policy for layer in layers} == {POLICY}
    if clock is not None:
        assert clock._dense_steps == POLICY.dense_steps


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_loose_arguments_stand_for_it(door: Callable[..., Made]) -> None:
    assert {layer.policy for layer in door()[0]} == {SkipPolicy()}
    assert {layer.policy for layer in door(threshold=-3.0)[0]} == {SkipPolicy(threshold=-3.0)}
    with pytest.raises(ValueError, match="policy and threshold are given, expected one or the other"):
        door(policy=POLICY, threshold=-10.0)


@pytest.mark.parametrize("door", [comfyui, diffusers])
def test_first_steps_stand_for_dense_steps(door: Callable[..., Made]) -> None:
    layers, clock = door(dense_steps=2)
    assert {layer.policy.dense_steps for layer in layers} == {2}
    assert clock is not None
    assert clock._dense_steps == 2
