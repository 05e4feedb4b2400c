"""Guidance branches: how a pipeline runs them, and a number for each name."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lite_attention.ops.context import Scoped
from lite_attention.skipping.branches import MAX_BRANCHES, branch_is_chosen, resolved_branch, skip_branch

__all__ = ["BranchNames", "Guidance", "check_guidance", "is_named", "named_branch", "stream_number"]

Guidance = Literal["named", "batched"]

# Of the name that surrounds a call, beside skip_branch, which others enter as well.
_named: Scoped[int] = Scoped("lite_attention.named_branch")

# Integers of the size of a tensor's entries, as which its bits are summed: exact, whatever the order.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Ways to choose a branch, and sizes of a shape, count in steps of these among the sums.
_PER_CHOICE, _PER_SIZE = 1_000_003, 1009
# Make 16-bit weights of the lower and the upper bits of a place. Of a product only the lower 16 bits count, which are
# the same in the 32 bits that Inductor gives to places on a GPU.
_MIX_LOW, _MIX_HIGH, _LOWER = 40503, 30029, 0xFFFF


def check_guidance(transformers: Collection[nn.Module], guidance: Guidance | None) -> None:
    """Refuse words that say nothing, and names where there is nothing to name branches in."""
    if guidance is not None and guidance not in get_args(Guidance):
        raise ValueError(f"enable_lite_attention: guidance is {guidance!r}, expected 'named', 'batched' or None")
    if guidance == "named":
        for transformer in transformers:
            if not hasattr(transformer, "cache_context"):
                raise ValueError(
                    "enable_lite_attention: guidance is 'named', expected 'batched' or None: "
                    f"{type(transformer).__name__} has no cache_context in which branches could be named"
                )


class BranchNames:
    """Numbers of the guidance branches that a pipeline names."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._free = list(range(MAX_BRANCHES))

    def number(self, name: str) -> int:
        """The branch's number, given to it where it has none yet; RuntimeError where none is left."""
        if name not in self._numbers:
            if not self._free:
                raise RuntimeError(
                    f"cache_context({name!r}): one guidance branch too many, expected at most {MAX_BRANCHES}: "
                    f"{', '.join(self._numbers)}"
                )
            # Threads that name branches at a time take a number each; of two for one name the first counts.
            number = self._free.pop(0)
            if self._numbers.setdefault(name, number) != number:
                self._free.insert(0, number)
        return self._numbers[name]

    def known_number(self, name: str) -> int:
        """The number of a branch that has run; ValueError where none of that name has."""
        if name not in self._numbers:
            known = ", ".join(map(repr, self._numbers)) or "none so far"
            raise ValueError(f"branch is {name!r}, expected a name that cache_context was given: {known}")
        return self._numbers[name]


class named_branch(skip_branch):  # noqa: N801 - as skip_branch
    """A :class:`skip_branch` that a name stands for."""

    def __enter__(self) -> skip_branch:
        _named.enter(self.branch)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        _named.leave(self.branch)


def is_named() -> bool:
    """Whether a :class:`named_branch` chose the branch of a call that begins here."""
    return _named.current is not None and _named.current == resolved_branch(None, "LiteAttention")


def stream_number(conditioning: Tensor | None, device: torch.device) -> Tensor:
    """A number that differs for calls that cannot be of one stream of a branch: int64, 0-d. Waits for nothing.

    Calls of one stream have equal conditioning, in one tensor or a new one each, and choose their branch in one way: by
    name, by :class:`lite_attention.skip_branch`, or not at all.

    Args:
        conditioning: what the model is told beside the video and the time, or None. Its bits and its shape count.
        device: where the number is made if there is no conditioning that has one.
    """
    choice = 2 if is_named() else int(branch_is_chosen())
    if conditioning is None or conditioning.element_size() not in _INTEGERS:
        return torch.full((), choice * _PER_CHOICE, dtype=torch.int64, device=device)
    shape = choice
    for size in conditioning.shape:
        shape = shape * _PER_SIZE + size
    bits = conditioning.detach().view(_INTEGERS[conditioning.element_size()]).flatten()
    # By where each stands: equal texts in another order, or batch entries that change places, are others.
    places = torch.arange(bits.numel(), device=bits.device)
    weights = ((places * _MIX_LOW) ^ ((places >> 16) * _MIX_HIGH)) & _LOWER | 1
    return (bits * weights).sum() + shape * _PER_CHOICE
