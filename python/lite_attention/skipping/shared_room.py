"""Which layers belong together, so that one compiled code can serve them all.

A layer that makes room for a map while it is traced makes it in its sisters too (see ``state.py``). Who they are, no
module can say of itself: it does not know what holds it, and that may change.
"""

from __future__ import annotations

import sys
import weakref
from typing import Generic, TypeVar

from torch import nn

__all__ = ["SharedRoom", "running_model"]

Member = TypeVar("Member", bound=nn.Module)


class SharedRoom(Generic[Member]):
    """Parts that make room together because someone said so.

    A copy or a pickle of a model holds one of its own, to which the copied members add themselves.
    """

    def __init__(self) -> None:
        self.members: weakref.WeakSet[Member] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[SharedRoom[Member]], tuple[()]]:
        return SharedRoom, ()


def running_model(part: nn.Module) -> nn.Module | None:
    """The outermost module that is being called and holds ``part``; None if it is called by itself.

    Read off the call stack, from the ``self`` of the calls that led here: who is called is always there. A trace runs
    on top of the calls around it, so it sees the model whose block is compiled.
    """
    callers = []
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        first = frame.f_code.co_varnames[: min(frame.f_code.co_argcount, 1)]
        if first and isinstance(module := frame.f_locals.get(first[0]), nn.Module):
            callers.append(module)
    for module in reversed(callers):
        if module is not part and any(inner is part for inner in module.modules()):
            return module
    return None
