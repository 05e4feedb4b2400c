"""A value that holds for a whole process, or only inside a ``with``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

__all__ = ["ScopedDefault"]

T = TypeVar("T")


class ScopedDefault(Generic[T]):
    """What counts where nothing was given: asked when a layer is made, never in a forward.

    :meth:`set` chooses it for every thread of the process; :meth:`scope` for what runs inside, in this thread or
    asyncio task alone, and there it wins.

    Args:
        name: of the context variable.
        initial: the value until another is chosen.
    """

    def __init__(self, name: str, initial: T) -> None:
        self._of_process = initial
        # A tuple of one, so that a scope may choose None.
        self._of_scope: ContextVar[tuple[T] | None] = ContextVar(name, default=None)

    def get(self) -> T:
        """The value of the innermost scope, or that of the process."""
        scoped = self._of_scope.get()
        return self._of_process if scoped is None else scoped[0]

    def set(self, value: T) -> None:
        """Choose the value of the process."""
        self._of_process = value

    @contextmanager
    def scope(self, value: T) -> Iterator[None]:
        """Inside, the value is this one; afterwards the one before counts again."""
        token = self._of_scope.set((value,))
        try:
            yield
        finally:
            self._of_scope.reset(token)
