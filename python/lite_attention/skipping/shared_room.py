"""Which layers belong together, so that one compiled code can serve them all.

A layer that makes room for a map while it is traced makes it in its sisters too (see ``state.py``). Who they are, no
module can say of itself: it does not know what holds it, and that may change.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable
from typing import Generic, TypeVar

from torch import nn

__all__ = ["SharedRoom", "note_lonely_trace"]

_logger = logging.getLogger("lite_attention")

Member = TypeVar("Member", bound=nn.Module)


class SharedRoom(Generic[Member]):
    """Parts that make room together because someone said so.

    A copy or a pickle of a model holds one of its own, to which the copied members add themselves.
    """

    def __init__(self) -> None:
        self.members: weakref.WeakSet[Member] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[SharedRoom[Member]], tuple[()]]:
        return SharedRoom, ()


# What was traced with no sister in sight: the kind of code and inputs, by the part; and the kinds warned of.
_lonely: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()
_warned: set[Hashable] = set()


def note_lonely_trace(part: nn.Module, model: nn.Module | None, inputs: Hashable) -> None:
    """Warn, once for each kind of code, where a part with no sister in sight is traced as another was before."""
    code = tuple(type(inner) for inner in (part if model is None else model).modules())
    kind = (code, inputs)
    if code not in _warned and any(kind in kinds for other, kinds in _lonely.items() if other is not part):
        _warned.add(code)
        _logger.warning(
            "%s is compiled again for another instance, as no module that is called holds both: each instance costs a "
            "compile, and beyond torch._dynamo.config.recompile_limit (8 by default) they raise or run uncompiled. If "
            "they are blocks of one model, call lite_attention.share_room(*blocks) first, and one compile serves "
            "all",
            code[0].__name__,
        )
    _lonely.setdefault(part, set()).add(kind)
