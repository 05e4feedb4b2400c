"""Which guidance branch a pass belongs to: the one choice that layers, clocks and integrations share."""

from __future__ import annotations

from types import TracebackType
from typing import ClassVar

from lite_attention.ops.checks import checked_int
from lite_attention.ops.context import Scoped
from lite_attention.ops.own_state import StateHolder

__all__ = ["MAX_BRANCHES", "BranchHolder", "branch_is_chosen", "resolved_branch", "skip_branch"]

MAX_BRANCHES = 8

_branch: Scoped[int] = Scoped("lite_attention.skip_branch")


class skip_branch:  # noqa: N801 - read as a function, like torch.no_grad
    """Context manager: passes inside it use the skip state of branch ``branch``.

    A branch is one independent stream of passes through a layer, for instance the conditional and the unconditional
    pass of sequential guidance. Without it, passes use branch 0. It holds for what this thread or asyncio task calls:
    others that run at the same time have their own, and a thread that is started inside starts with branch 0. A
    generator that yields inside leaves its consumer in the branch, as it does with ``torch.no_grad``: give the layer's
    ``branch`` there instead. Compiled code may enter branches, by ``with``.

    Args:
        branch: 0 to ``MAX_BRANCHES - 1``.

    Raises:
        TypeError, ValueError: ``branch`` is not such a number.
    """

    def __init__(self, branch: int) -> None:
        self.branch = resolved_branch(branch, "skip_branch")

    def __enter__(self) -> skip_branch:
        _branch.enter(self.branch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _branch.leave(self.branch)


def branch_is_chosen() -> bool:
    """Whether a :class:`skip_branch` surrounds the caller."""
    return _branch.current is not None


class BranchHolder(StateHolder):
    """A module whose calls belong to a branch.

    It reads which as an attribute of its class: torch's ``aot_compile`` leaves out the guards on globals, and would go
    on with the branch of the trace in every other.
    """

    chosen_branch: ClassVar[Scoped[int]] = _branch


def resolved_branch(branch: int | None, name: str, chosen: Scoped[int] | None = None) -> int:
    """``branch`` checked, or for None the one of the surrounding :class:`skip_branch`. Errors begin with ``name``.

    ``chosen`` is a holder's ``chosen_branch``.
    """
    if branch is None:
        return (_branch if chosen is None else chosen).current or 0
    return checked_int(f"{name}: branch", branch, 0, MAX_BRANCHES - 1)
