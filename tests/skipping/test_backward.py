"""A pass inside a backward, where a checkpointed segment is computed again: it is refused, or is the same pass."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lite_attention import LiteAttention, SeqParallelLiteAttention, attention
from support.opchecks import CHECKS
from support.passes import video

REFUSAL = r"LiteAttention: called inside a backward pass, .* would skip by another map than in the forward"

Segment = Callable[[Tensor], Tensor]


class Segments:
    """A layer that has just begun a video, and functions around it whose derivatives are asked for."""

    def __init__(self, enabled: bool = True) -> None:
        self.layer = LiteAttention(threshold=0.0, enable_skipping=enabled)
        self.x = torch.zeros(1, requires_grad=True)
        self.video = 0.3 * video(1)  # so gentle that what is dropped counts

    def plain(self, x: Tensor) -> Tensor:
        """The layer's own inputs need no gradient; what it gives decides about that of ``x``."""
        return (self.layer(*3 * [self.video]) + x).pow(3).sum()

    def without_gradient(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.layer(*3 * [self.video])
        return (out + x).pow(3).sum()

    def twice(self, x: Tensor) -> Tensor:
        return self.plain(x) + self.plain(2 * x)

    def gradient(self, segment: Segment) -> float:
        self.x.grad = None
        segment(self.x).backward()
        assert self.x.grad is not None
        return float(self.x.grad)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def right() -> float:
    made = Segments()
    return made.gradient(made.plain)


def saving(ctx: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_kept = operator is torch.ops.lite_attention.skip_attention.default
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, saving)

WAYS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": SELECTIVE},
}


def test_a_second_pass_would_give_another_gradient() -> None:
    """What there is to refuse."""
    made = Segments()
    assert made.gradient(made.plain) == right()
    assert abs(made.gradient(made.plain) - right()) > 1e-3 * abs(right())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("segment", ["plain", "without_gradient", "twice"])
def test_a_checkpointed_layer_is_refused_and_its_state_left_alone(way: dict[str, Any], segment: str) -> None:
    made = Segments()
    out = checkpoint(getattr(made, segment), made.x, **way)
    kept = made.layer.keep_map()
    assert not kept.all()
    with pytest.raises(RuntimeError, match=REFUSAL):
        out.backward()
    assert torch.equal(made.layer.keep_map(), kept)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_without_skipping_and_under_no_grad_a_checkpoint_is_as_none(way: dict[str, Any]) -> None:
    dense = Segments(enabled=False)
    assert dense.gradient(lambda x: checkpoint(dense.plain, x, **way)) == dense.gradient(dense.plain)
    made, alone = Segments(), Segments()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(checkpoint(made.plain, made.x, **way), alone.plain(alone.x))
    assert torch.equal(made.layer.keep_map(), alone.layer.keep_map())


def test_a_map_of_ones_own_is_the_same_when_it_is_computed_again() -> None:
    x, qkv = torch.zeros(1, requires_grad=True), 3 * [video(1)]

    def segment(x: Tensor) -> Tensor:
        return (attention(*qkv)[0] + x).pow(3).sum()

    expected = torch.autograd.grad(segment(x), x)
    assert torch.autograd.grad(checkpoint(segment, x, use_reentrant=False), x) == expected


def test_a_pass_in_a_hook_of_a_backward_is_refused() -> None:
    made = Segments()
    out = made.x * 2
    out.register_hook(lambda gradient: made.plain(gradient).detach() + gradient)
    with pytest.raises(RuntimeError, match=REFUSAL):
        out.sum().backward()


def test_a_split_names_its_module() -> None:
    layer, x = SeqParallelLiteAttention(1), torch.zeros(1, requires_grad=True)
    out = checkpoint(lambda x: (layer(*3 * [video(1)], 0) + x).pow(3).sum(), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=f"SeqParallel{REFUSAL}"):
        out.backward()


# Compiled


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("segment", ["plain", "without_gradient"])
def test_compiled_code_in_a_checkpoint_is_not_run_in_the_backward(way: str, segment: str) -> None:
    made, counter = Segments(), CompileCounter()
    compiled = torch.compile(getattr(made, segment), fullgraph=True, backend=counter)
    for _ in range(3):
        out = checkpoint(compiled, made.x, **WAYS[way])
    assert counter.frame_count == 1
    with pytest.raises(RuntimeError, match=REFUSAL):
        out.backward()


# aot_eager divides forward and backward as Inductor does.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("segment", ["plain", "without_gradient"])
def test_a_compiled_backward_that_computes_the_map_again_says_so(backend: str, segment: str) -> None:
    made = Segments()
    compiled = torch.compile(
        lambda x: checkpoint(getattr(made, segment), x, use_reentrant=False), fullgraph=True, backend=backend
    )
    out = compiled(made.x)
    kept = made.layer.keep_map()
    with pytest.raises(RuntimeError, match=REFUSAL):
        out.backward()
    assert torch.equal(made.layer.keep_map(), kept)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_backward_to_which_the_output_is_saved_is_right(backend: str) -> None:
    made = Segments()
    assert made.gradient(torch.compile(made.plain, fullgraph=True, backend=backend)) == pytest.approx(right())
    made = Segments()
    selective = torch.compile(lambda x: checkpoint(made.plain, x, **WAYS["selective"]), fullgraph=True, backend=backend)
    assert made.gradient(selective) == pytest.approx(right())


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_a_memory_budget_gives_the_right_gradient_or_the_refusal(budget: float) -> None:
    made = Segments()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        out = torch.compile(made.plain, fullgraph=True, backend="aot_eager")(made.x)
        if budget > 0:
            assert float(torch.autograd.grad(out, made.x)[0]) == pytest.approx(right())
        else:
            with pytest.raises(RuntimeError, match=REFUSAL):
                out.backward()


def test_the_operator_that_recalls_a_map() -> None:
    words = torch.arange(6, dtype=torch.int32).view(1, 1, 3, 2)
    for counts in (torch.tensor(True), torch.tensor(False)):
        arguments = (counts, words)
        recalled = torch.ops.lite_attention_state.recall_map(*arguments)
        assert torch.equal(recalled, words if counts else torch.full_like(words, -1))
        results = opcheck(torch.ops.lite_attention_state.recall_map.default, arguments, test_utils=CHECKS)
        assert results == dict.fromkeys(CHECKS, "SUCCESS")
