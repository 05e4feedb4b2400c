"""Which guidance branch a pass belongs to: the one choice that layers, clocks and integrations share."""

from __future__ import annotations

from types import TracebackType

import torch

__all__ = ["MAX_BRANCHES", "resolved_branch", "skip_branch"]

MAX_BRANCHES = 8

_current_branch = 0


class skip_branch:  # noqa: N801 - read as a function, like torch.no_grad
    """Context manager: passes inside it use the skip state of branch ``branch``.

    A branch is one independent stream of passes through a layer, for instance the conditional and the unconditional
    pass of sequential guidance. Without it, passes use branch 0. The choice is one per process: threads that run
    different branches at the same time pass ``branch=`` to the module instead.

    Args:
        branch: 0 to ``MAX_BRANCHES - 1``.

    Raises:
        TypeError, ValueError: ``branch`` is not such a number.
    """

    def __init__(self, branch: int) -> None:
        self.branch = resolved_branch(branch, "skip_branch")
        self._outer: list[int] = []

    def __enter__(self) -> skip_branch:
        global _current_branch
        self._outer.append(_current_branch)
        _current_branch = self.branch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current_branch
        own = _current_branch == self.branch
        _current_branch = self._outer.pop()
        if not own and error is None:
            raise RuntimeError(
                f"skip_branch({self.branch}): another branch is current at its end, expected its own. Threads that run "
                "models at the same time pass branch= to the layers instead"
            )


def resolved_branch(branch: int | None, name: str) -> int:
    """``branch`` checked, or for None the one of the surrounding :class:`skip_branch`. Errors begin with ``name``."""
    if branch is None:
        return _current_branch
    if isinstance(branch, bool) or not isinstance(branch, (int, torch.SymInt)):
        raise TypeError(f"{name}: branch has type {type(branch).__name__}, expected an int")
    if not 0 <= branch < MAX_BRANCHES:
        raise ValueError(f"{name}: branch is {branch}, expected 0 to {MAX_BRANCHES - 1}")
    return branch
