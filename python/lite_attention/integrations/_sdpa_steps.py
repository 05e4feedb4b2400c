"""Which call of the model is under way in a thread: its step, in which LiteSDPA counts calls."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch.compiler import is_dynamo_compiling

from lite_attention.ops.context import Scoped
from lite_attention.skipping.branches import MAX_BRANCHES, resolved_branch

__all__ = ["FOREIGN", "Flag", "Steps", "TakenBack", "UnderWay"]

# In place of a step's number: a call of which it cannot be told which step it is a part of.
FOREIGN = -1


class Flag:
    """Something that compiled code may note: that binds it to an attribute alone, to a list as a whole."""

    def __init__(self) -> None:
        self.up = False


class Steps:
    """The steps of one door that are under way: one in each thread or asyncio task at most.

    The number of a step is the branch that it began in, and of each number one is under way at most. A number, and
    not an object, as compiled code is compiled for what it meets.
    """

    def __init__(self) -> None:
        self._of_thread = _OfThread("lite_attention.LiteSDPA")
        # By number, the branches that the step has used so far, the one it began in included while it is under way.
        self._used = [[Flag() for _ in range(MAX_BRANCHES)] for _ in range(MAX_BRANCHES)]

    def __reduce__(self) -> tuple[type[Steps], tuple[()]]:
        """A copy of a door is inside of no step."""
        return Steps, ()

    @property
    def current(self) -> int | None:
        """The number of this thread's step, or FOREIGN; None if it has none."""
        return self._of_thread.current

    @property
    def are_traced(self) -> bool:
        """Whether one trace holds the step. Not where parts of it are traced, each by itself, and Python runs it."""
        return self._of_thread.is_traced

    def next_number(self, whole: bool) -> int:
        """The number of the step that this thread begins by calling the whole model, or a part of it; or FOREIGN.

        A part may be called by a step of another thread that is under way, as models do that hand their branches to
        threads: then it has a place in that step, of which this thread does not know.
        """
        number = resolved_branch(None, "LiteSDPA")
        others = (number,) if whole else range(MAX_BRANCHES)
        return FOREIGN if any(self._used[other][other].up for other in others) else number

    def enter(self, number: int) -> None:
        """Begin this thread's step."""
        self._of_thread.enter(number)
        if number != FOREIGN:
            self._used[number][number].up = True

    def leave(self, number: int) -> None:
        """End it, however it went."""
        if number != FOREIGN:
            for used in self._used[number]:
                used.up = False
        self._of_thread.leave(number)

    def may_use(self, number: int, branch: int) -> bool:
        """Whether no other step that is under way uses the branch. It is in use by this one, too, from now on.

        Of two that come at the same time neither may, for the rest of both.
        """
        if number == FOREIGN:
            return False
        self._used[number][branch].up = True
        return not any(self._used[other][branch].up for other in range(MAX_BRANCHES) if other != number)


# What these two do when they are entered is done by a graph that holds all that is called inside, or by Python: where
# that breaks the graph, torch.compile leaves `with` to Python, while it would compile the first half of a `try`, and by
# itself it compiles no method that names neither tensors nor modules, such as torch.


class UnderWay:
    """Context manager: a step."""

    def __init__(self, door: Any, number: int) -> None:
        self.door = door
        self.number = number

    def __enter__(self) -> None:
        self.door._steps.enter(self.number)
        if self.number != FOREIGN:
            for layer in self.door._each():
                layer.calls[self.number][:] = [()] * MAX_BRANCHES

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.number != FOREIGN:
                self.door._end_step(self.number)
        finally:
            self.door._steps.leave(self.number)


class TakenBack:
    """Context manager: what is called inside, if it fails, takes back what it counted, as it may be called again.

    Of a graph, torch does that.
    """

    def __init__(self, door: Any, number: int) -> None:
        self.door = door
        self.number = number
        self.before: list[list[tuple[None, ...]]] | None = None

    def __enter__(self) -> None:
        if self.number != FOREIGN and not is_dynamo_compiling():
            self.before = [list(layer.calls[self.number]) for layer in self.door._each()]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.before is not None:
            for layer, calls in zip(self.door._each(), self.before, strict=True):
                layer.calls[self.number][:] = calls


class _OfThread(Scoped[int]):
    @property
    def is_traced(self) -> bool:
        return self._traced is not None
