"""Sending the attention call of someone else's layer elsewhere, without touching that layer's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lite_attention.ops.context import Scoped

__all__ = ["AttentionHandler", "foreign_function_mode", "route_sdpa", "unrouted_sdpa"]

# Whether a handler has left the call under way to torch.
_is_left = Scoped[bool]("lite_attention.route_sdpa")


class AttentionHandler(Protocol):
    """Takes the arguments of ``torch.nn.functional.scaled_dot_product_attention``, tensors ``[B, H, S, D]``."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention out, ``[B, H, S, D]``."""
        ...


class route_sdpa(TorchFunctionMode):  # noqa: N801 - read as a function, like torch.no_grad
    """Context manager: calls of ``scaled_dot_product_attention`` made inside it go to ``handler``.

    A mode of torch, seen by torch.compile, which traces the handler in place of the call. Only the thread that enters
    it is concerned. Inside the handler it is off, and those around it are not: what a handler leaves to torch it calls
    by :func:`unrouted_sdpa`.
    """

    def __init__(self, handler: AttentionHandler) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Route one call of a torch function."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and not _is_left.current:
            return self.handler(*args, **kwargs)
        if func is multi_head_attention_forward:
            raise NotImplementedError(
                "torch.nn.MultiheadAttention calls its attention out of reach, expected a layer that calls "
                "torch.nn.functional.scaled_dot_product_attention itself"
            )
        if getattr(func, "__module__", None) == torch._tensor.__name__:
            # Methods that torch writes in Python (Tensor.unflatten) reach their parent by super(), which Dynamo traces
            # only where they are called as methods.
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)
        return func(*args, **kwargs)


def unrouted_sdpa(*args: Any, **kwargs: Any) -> Tensor:
    """``scaled_dot_product_attention`` that goes to no handler, and to all other modes."""
    with _is_left.having(True):
        return scaled_dot_product_attention(*args, **kwargs)


def foreign_function_mode() -> str | None:
    """The class of a torch function mode around the caller that is neither torch's own nor of this package, or None."""
    for mode in _get_current_function_mode_stack():
        if not isinstance(mode, route_sdpa) and not type(mode).__module__.startswith("torch."):
            return type(mode).__name__
    return None
