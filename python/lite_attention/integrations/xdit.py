"""LiteAttention in xDiT (xfuser) and yunchang: attention functions that return (out, lse).

Both packages call one function for every layer of a model. Which layer a call is for comes from the caller, never from
the order of calls: in xDiT through ``attention_kwargs``, in yunchang through ``attn_processor``. Under Ulysses a rank
has some heads and the whole sequence, so a layer has one skip state on each rank. Ring attention passes K and V chunk
by chunk without saying which chunk it is; it is refused.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lite_attention.skipping.module import LiteAttention

__all__ = ["LAYER_KEY", "XDiTAttention", "YunchangAttention", "register_lite_attention"]

LAYER_KEY = "lite_attention"
"""Where xDiT's ``attention_kwargs`` hold the :class:`lite_attention.LiteAttention` of the layer that calls."""

_logger = logging.getLogger("lite_attention")

# What other callers put into attention_kwargs and LiteAttention cannot do.
_MASKS = ("attn_mask", "indices_k")


class XDiTAttention(Protocol):
    """An attention function of xDiT's registry."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        is_causal: bool,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tensors ``[batch, heads, length, head_dim]`` in, out of query's shape and lse ``[batch, heads, length]``."""
        ...


def register_lite_attention(backend: Any) -> Callable[[], None]:
    """Let xDiT's attention backend ``backend`` run LiteAttention where a layer asks for it.

    A layer asks for it by ``attention_kwargs={"lite_attention": its LiteAttention}``. All other calls, such as
    cross-attention, go to the function that was registered before.

    Args:
        backend: member of ``xfuser.core.distributed.attention_backend.AttentionBackendType``.

    Returns:
        A function that registers what was there before. What someone else has registered since stays, and a warning
        says so; LiteAttention runs no more either way.

    Raises:
        ImportError: xfuser is not installed.
        KeyError: xfuser has no function for this backend.
        RuntimeError: LiteAttention is registered for it already.
    """
    registry: dict[Any, XDiTAttention] = importlib.import_module(
        "xfuser.core.distributed.attention_backend"
    ).ATTENTION_FUNCTION_REGISTRY
    if not isinstance(backend, Hashable) or backend not in registry:
        raise KeyError(f"register_lite_attention: backend is {backend!r}, expected one that xfuser has a function for")
    original = registry[backend]
    if isinstance(original, _RoutedAttention):
        raise RuntimeError(f"register_lite_attention: LiteAttention is registered for {backend!r} already")
    ring_degree = importlib.import_module("xfuser.core.distributed").get_ring_parallel_world_size
    routed = registry[backend] = _RoutedAttention(original, ring_degree)

    def restore() -> None:
        if registry.get(backend) is routed:
            registry[backend] = original
        elif routed.serves:
            _logger.warning(
                "register_lite_attention: %r was registered for %r since, and stays; if it calls LiteAttention's "
                "function, that one calls what was there before",
                registry.get(backend),
                backend,
            )
        routed.serves = False

    return restore


class _RoutedAttention:
    """The registered function: LiteAttention for layers that ask for it, ``dense`` for all others."""

    def __init__(self, dense: XDiTAttention, ring_degree: Callable[[], int]) -> None:
        self.dense = dense
        self.ring_degree = ring_degree
        self.serves = True  # until what was there before is restored

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        is_causal: bool,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        extras = attention_kwargs or {}
        layer = extras.get(LAYER_KEY) if isinstance(extras, Mapping) else None
        if layer is None or not self.serves:
            return self.dense(query, key, value, dropout_p, is_causal, attention_kwargs)
        name = f"attention_kwargs[{LAYER_KEY!r}]"
        _check_layer(layer, name)
        _check_ring(self.ring_degree(), name)
        for mask in _MASKS:
            if extras.get(mask) is not None:
                raise ValueError(f"{name}: attention_kwargs has {mask}, expected self-attention without a mask")
        # xDiT cuts off keys that are padding; the queries keep theirs.
        keys = extras.get("valid_kv_len") or query.shape[2]
        _check_call(name, dropout_p, is_causal, key.shape[2], keys)
        out, lse = layer(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), return_softmax_lse=True)
        return out.transpose(1, 2), lse


class YunchangAttention(nn.Module):
    """The ``attn_processor`` of one ``yunchang.LongContextAttention``.

    yunchang calls it when ``attn_type`` is none of its own, for instance the text ``"lite_attention"``.

    Args:
        layer: the layer's LiteAttention.

    Raises:
        TypeError: ``layer`` is something else.
    """

    def __init__(self, layer: LiteAttention) -> None:
        super().__init__()
        _check_layer(layer, "layer")
        self.layer = layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One attention call, with yunchang's arguments.

        Args:
            query, key, value: ``[batch, length, heads, head_dim]``, the rank's heads and the whole sequence.
            softmax_scale: factor on q.k before the softmax, ``1/sqrt(head_dim)`` if None.
            dropout_p, causal, window_size, softcap, alibi_slopes: nothing but their defaults is supported.
            return_softmax: not used; lse is always returned.

        Returns:
            out of query's shape, and lse, fp32 ``[batch, heads, length]``.

        Raises:
            ValueError: an argument is not supported.
            RuntimeError: yunchang runs ring attention.
        """
        group = importlib.import_module("yunchang.globals").PROCESS_GROUP.RING_PG
        _check_ring(1 if group is None else torch.distributed.get_world_size(group), "YunchangAttention")
        _check_call("YunchangAttention", dropout_p, causal, key.shape[1], query.shape[1])
        if (
            not isinstance(window_size, (tuple, list))
            or tuple(window_size) != (-1, -1)
            or softcap != 0.0
            or alibi_slopes is not None
        ):
            raise ValueError(
                f"YunchangAttention: window_size is {window_size}, softcap {softcap}, alibi_slopes "
                f"{'None' if alibi_slopes is None else 'given'}, expected (-1, -1), 0.0 and None"
            )
        result: tuple[Tensor, Tensor] = self.layer(query, key, value, softmax_scale, return_softmax_lse=True)
        return result


def _check_layer(layer: object, name: str) -> None:
    if not isinstance(layer, LiteAttention):
        raise TypeError(f"{name} has type {type(layer).__name__}, expected a LiteAttention, the layer's own")


def _check_ring(degree: int, name: str) -> None:
    if degree > 1:
        raise RuntimeError(
            f"{name}: ring attention over {degree} ranks, expected none. A call does not say which keys it is given, "
            "so skip states could not be kept apart; use Ulysses alone"
        )


def _check_call(name: str, dropout_p: float, is_causal: bool, keys: int, expected_keys: int) -> None:
    if dropout_p != 0.0:
        raise ValueError(f"{name}: dropout_p is {dropout_p}, expected 0: skipping is for inference")
    if is_causal:
        raise ValueError(f"{name}: a causal mask, expected bidirectional attention")
    if keys != expected_keys:
        raise ValueError(f"{name}: {keys} keys, expected {expected_keys}: self-attention")
