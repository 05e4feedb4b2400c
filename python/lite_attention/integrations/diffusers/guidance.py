"""Guidance branches: how a pipeline runs them, and a number for each name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from torch import nn

from lite_attention.skipping.branches import MAX_BRANCHES

__all__ = ["BranchNames", "Guidance", "check_guidance"]

Guidance = Literal["named", "batched"]


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
