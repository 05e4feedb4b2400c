"""Sending the attention call of someone else's layer elsewhere, without touching that layer's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionHandler", "route_sdpa"]


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
    it is concerned. Inside the handler it is off.
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
        if func is scaled_dot_product_attention:
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
