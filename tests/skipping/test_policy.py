"""SkipPolicy: what a layer is told, checked once, whole or by the loose arguments that stand for it."""

import dataclasses
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline

from lite_attention import LiteAttention, SkipPolicy
from support.inputs import report


def test_a_policy_is_a_value() -> None:
    policy = SkipPolicy(threshold=[-1, -2.5], dense_steps=2)  # type: ignore[arg-type]
    assert policy == SkipPolicy(threshold=torch.tensor([-1.0, -2.5]), dense_steps=2)  # type: ignore[arg-type]
    assert policy.threshold == (-1.0, -2.5)
    assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
    assert dataclasses.replace(policy, enabled=False) != policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.enabled = False  # type: ignore[misc]


def test_loose_arguments_stand_for_a_policy() -> None:
    assert LiteAttention().policy == SkipPolicy() == SkipPolicy(threshold=-10.0, dense_steps=0, enabled=True)
    assert LiteAttention(False, -3.0, 2).policy == SkipPolicy(threshold=-3.0, enabled=False)
    policy = SkipPolicy(threshold=(-1.0, -2.0), dense_steps=3, enabled=False)
    assert LiteAttention(policy=policy).policy == policy


def test_the_policy_of_a_layer_is_today_s() -> None:
    layer = LiteAttention(policy=SkipPolicy(dense_steps=3))
    layer.set_threshold([-1.0, -2.0])
    layer.enable_skip_optimization(False)
    assert layer.policy == SkipPolicy(threshold=(-1.0, -2.0), dense_steps=3, enabled=False)


def test_debug_permits_thresholds_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITE_ATTENTION_DEBUG", "1")
    assert SkipPolicy(threshold=1.5).threshold == 1.5

    layer = LiteAttention(threshold=1.5)
    monkeypatch.delenv("LITE_ATTENTION_DEBUG")
    layer.enable_skip_optimization(False)
    assert (layer.policy.threshold, layer.policy.enabled) == (1.5, False), "it was allowed when the layer was made"
    layer.set_threshold(2.5)
    assert layer.policy.threshold == 2.5


def test_errors_name_the_caller_and_the_argument() -> None:
    policy = SkipPolicy()
    calls: dict[str, Callable[[], object]] = {
        "above 0": lambda: SkipPolicy(threshold=0.5),
        "one above 0": lambda: SkipPolicy(threshold=(-1.0, 0.5)),
        "NaN": lambda: dataclasses.replace(policy, threshold=math.nan),
        "half a step": lambda: SkipPolicy(dense_steps=0.5),  # type: ignore[arg-type]
        "a step less": lambda: SkipPolicy(dense_steps=-1),
        "maybe": lambda: SkipPolicy(enabled="no"),  # type: ignore[arg-type]
        "by LiteAttention": lambda: LiteAttention("no"),  # type: ignore[arg-type]
        "its threshold": lambda: LiteAttention(threshold=math.nan),
        "both": lambda: LiteAttention(threshold=-10.0, policy=policy),
        "all of them": lambda: LiteAttention(True, -10.0, policy=policy),
        "a number as policy": lambda: LiteAttention(policy=-10.0),  # type: ignore[arg-type]
    }
    assert_expected_inline(
        report(calls),
        """\
above 0 -> ValueError: SkipPolicy: threshold is 0.5, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
one above 0 -> ValueError: SkipPolicy: threshold[1] is 0.5, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
NaN -> ValueError: SkipPolicy: threshold is NaN, expected a number of at most 0
half a step -> TypeError: SkipPolicy: dense_steps has type float, expected an int
a step less -> ValueError: SkipPolicy: dense_steps is -1, expected at least 0
maybe -> TypeError: SkipPolicy: enabled has type str, expected a bool
by LiteAttention -> TypeError: LiteAttention: enable_skipping has type str, expected a bool
its threshold -> ValueError: LiteAttention: threshold is NaN, expected a number of at most 0
both -> ValueError: LiteAttention: policy and threshold are given, expected one or the other
all of them -> ValueError: LiteAttention: policy and enable_skipping and threshold are given, expected one or the other
a number as policy -> TypeError: LiteAttention: policy has type float, expected a SkipPolicy""",
    )
