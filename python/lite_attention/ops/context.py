"""Values for what is called inside a block: of this thread or asyncio task alone, and read by compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

from torch.compiler import is_dynamo_compiling

from lite_attention.ops.load import host

__all__ = ["Scoped"]

T = TypeVar("T")

# What a context variable holds: the innermost value and what was around it. A chain instead of tokens, so that one
# context manager may be entered by several threads at a time.
_Chain = tuple[T, Any]


class _ContextValue(Protocol):
    """A ContextVar whose value is an attribute that C defines. torch.compile, which cannot trace ContextVar.get, reads
    and guards on it; once it can (pytorch#186449), a plain ContextVar does.
    """

    @property
    def current(self) -> Any: ...

    @property
    def variable(self) -> ContextVar[Any]: ...


class Scoped(Generic[T]):
    """A value that holds inside a block, for what this thread or asyncio task calls there.

    Threads and tasks that run at the same time each see their own. A task starts with the values it was made in; a
    thread starts without any, whatever holds where it is started (``contextvars.copy_context().run`` hands them on).
    A generator has no context of its own: what it enters before a ``yield`` holds for its consumer, until the
    generator leaves it. Compiled code is compiled once for each value that it meets, and may enter blocks of its own
    by ``with``.

    Args:
        name: of the context variable.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._context: _ContextValue = host.ContextValue(name)
        # The blocks that torch.compile is tracing through. Only its trace ever sees another value than None: whatever
        # a ``with`` enters in a graph is left in it, and a ``with`` whose body breaks the graph is entered by Python:
        # `enter` and `leave` are no graphs of their own as long as they name neither tensors nor the module torch.
        self._traced: _Chain[T] | None = None

    @property
    def current(self) -> T | None:
        """The innermost value, None outside of every block.

        Raises:
            RuntimeError: compiled code entered a block and did not leave it in the same graph.
        """
        self._check_nothing_leaked()
        chain = self._context.current if self._traced is None else self._traced
        return None if chain is None else chain[0]

    def enter(self, value: T) -> None:
        """Begin a block; :meth:`leave` ends it, in the same thread or task."""
        if is_dynamo_compiling():
            self._traced = (value, self._traced)
        else:
            self._context.variable.set((value, self._context.current))

    def leave(self, value: T) -> None:
        """End the innermost block, which was begun with this value.

        Raises:
            RuntimeError: it was begun with another, or there is none in this thread or task. A block around others
                that is left before them ends all the same: it does not come back when they are left.
        """
        if self._traced is not None:  # a trace leaves in order what it enters
            self._traced = self._traced[1]
            return
        chain = self._context.current
        if chain is None or chain[0] is not value:
            innermost = "there is none" if chain is None else f"the innermost is that of {chain[0]!r}"
            self._context.variable.set(_without(chain, value))
            raise RuntimeError(
                f"{self._name}: left the block of {value!r} where {innermost}, expected blocks to be left in the "
                "thread or task that entered them, the last one first"
            )
        self._context.variable.set(chain[1])

    @contextmanager
    def having(self, value: T) -> Iterator[None]:
        """A block in which the value is this one."""
        self.enter(value)
        try:
            yield
        finally:
            self.leave(value)

    def _check_nothing_leaked(self) -> None:
        """Raise if Python runs in a block of a trace, which no thread can tell for its own."""
        if self._traced is not None and not is_dynamo_compiling():
            leaked, self._traced = self._traced[0], None
            raise RuntimeError(
                f"{self._name}: compiled code entered the block of {leaked!r} and did not leave it in the same graph, "
                "expected `with` around the body, or the block outside of the compiled function"
            )


def _without(chain: _Chain[T] | None, value: T) -> _Chain[T] | None:
    """The chain less its innermost entry of ``value``; itself if there is none."""
    if chain is None:
        return None
    return chain[1] if chain[0] is value else (chain[0], _without(chain[1], value))
