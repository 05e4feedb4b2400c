"""Functions that stand in place of the forward of someone else's modules while a context lasts.

Several contexts may stand in one module, and be left in any order. What is inside of each other is a chain: each
function holds the one below it, the module's own at the end. A function of a context that was left, wherever it still
stands, is as good as not there. Copies and pickles of a module are made without them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

__all__ = ["Context", "Forward", "put", "stand_in", "stands", "take_away"]

_logger = logging.getLogger("lite_attention")

Forward = Callable[..., Any]
# What pickle and copy ask a module for its state with; an attribute of the module itself comes before the class's.
_GETSTATE = "__getstate__"


class Context(Protocol):
    """Whose functions stand in modules: read in every call."""

    entered: bool


def stand_in(function: Forward, module: nn.Module, context: Context, *arguments: Any) -> functools.partial[Any]:
    """``function(below, context, *arguments, ...)`` as the forward of ``module``; below is the forward of now.

    A partial, which torch.compile sees through. Keep it, and put the same in again: compiled code is bound to it.
    """
    routed = functools.partial(function, module.forward, context, *arguments)
    functools.update_wrapper(routed, module.forward)
    _kinds.add(function)
    return routed


# The functions that have stood in for a forward, by which partials of ours are known.
_kinds: set[Callable[..., Any]] = set()


def _is_ours(forward: object) -> bool:
    return isinstance(forward, functools.partial) and forward.func in _kinds


def stands(module: nn.Module, routed: functools.partial[Any]) -> bool:
    """Whether ``routed`` stands in for the module's forward, at the top or inside of others."""
    forward = vars(module).get("forward")
    while _is_ours(forward):
        if forward is routed:
            return True
        forward = forward.args[0]  # type: ignore[union-attr]
    return False


def put(module: nn.Module, routed: functools.partial[Any]) -> None:
    """Let ``routed`` stand in for the module's forward, unless it does already."""
    if stands(module, routed):
        return
    vars(module)["forward"] = routed
    vars(module)[_GETSTATE] = functools.partial(_state_without, module)


def take_away(module: nn.Module, routed: functools.partial[Any], where: str) -> None:
    """Take ``routed``, whose context was left, out of the module with whatever else of ours has no use any more.

    What someone else has put over it since stays. ``where`` begins the warning that says so.
    """
    top = forward = vars(module).get("forward")
    while _is_ours(forward) and forward is not routed:
        forward = forward.args[0]  # type: ignore[union-attr]
    if forward is not routed and forward is not None and forward != routed.args[0]:
        _logger.warning(
            "%s: its forward was replaced by %s inside the context, which stays; it calls the module's own from now on",
            where,
            getattr(forward, "__qualname__", type(forward).__qualname__),
        )
    while _is_ours(top) and not top.args[1].entered:  # type: ignore[union-attr]
        top = top.args[0]  # type: ignore[union-attr]
        _set_forward(module, vars(module), top)
    if not _is_ours(top):
        vars(module).pop(_GETSTATE, None)


def _set_forward(module: nn.Module, attributes: dict[str, Any], forward: Any) -> None:
    """Note the module's forward among its attributes, where it is not simply its class's."""
    if _is_own(module, forward):
        attributes.pop("forward", None)
    else:
        attributes["forward"] = forward


def _is_own(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


def _state_without(module: nn.Module) -> Any:
    """What is copied or pickled of the module: all but what stands in it for a while."""
    state = type(module).__getstate__(module)
    if isinstance(state, dict) and "forward" in state:
        state = {key: value for key, value in state.items() if key != _GETSTATE}
        forward = state["forward"]
        while _is_ours(forward):
            forward = forward.args[0]
        _set_forward(module, state, forward)
    return state
