"""Streaming attention: each row sees the first tokens (the sink) and the last ones (the recent window) before it.

The heads of DuoAttention (arXiv 2410.10819) that need no more than that, and the full causal heads beside them, run in
one launch: which head is which is a table on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention import ops
from lite_attention.maps.tiles import UNLIMITED
from lite_attention.ops import CausalAlignment
from lite_attention.ops.call import check_tensors
from lite_attention.ops.checks import equals_any

__all__ = ["attention", "head_windows"]

_NAME = "streaming_attention"  # as the package exports it


def head_windows(full_heads: Tensor, sink_size: int | Tensor, recent_size: int | Tensor) -> Tensor:
    """The table that :func:`lite_attention.attention` takes as ``head_windows``: full causal and streaming heads mixed.

    Built on the device, without waiting for it. Where the heads do not change from call to call, build it once.

    Args:
        full_heads: bool ``[Hq]``, True for a head that sees all keys up to its row's position.
        sink_size: of the others, so many first keys are seen; an int, or int32 ``[Hq]``, one for each head.
        recent_size: so many last keys, the row's own included; an int from 1, or int32 ``[Hq]``.

    Returns:
        int32 ``[Hq, 2]`` on the device of ``full_heads``.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
    """
    _check_full_heads("head_windows", full_heads)
    table = _window_table("head_windows", full_heads.shape[0], sink_size, recent_size, full_heads.device)
    table[:, 1].masked_fill_(full_heads, UNLIMITED)
    return table


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_size: int | Tensor,
    recent_size: int | Tensor,
    *,
    full_heads: Tensor | None = None,
    causal: CausalAlignment = "bottom-right",
    kv_lens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention to the first ``sink_size`` and the last ``recent_size`` keys; in full heads to all of them.

    A row at position p sees key j if ``j <= p and (j < sink_size or j > p - recent_size)``. The time is linear in the
    sequence length for streaming heads: tiles that no row of theirs sees are not visited.

    Args:
        q: ``[B, Sq, Hq, D]``, fp32, bf16 or fp16; any strides whose last one is 1. D is a multiple of 8, at most 256.
        k, v: ``[B, Sk, Hkv, D]`` of q's dtype and device, ``Hq % Hkv == 0``.
        sink_size: first keys that are always seen; an int, or int32 ``[Hq]`` on q's device, one for each head.
        recent_size: last keys that are seen, the row's own included; an int from 1, or int32 ``[Hq]``.
        full_heads: bool ``[Hq]``, or ``[Hkv]`` for whole GQA groups: these heads see all keys up to the row's position.
        causal: "bottom-right": the last row is at the last existing key, for queries that continue earlier keys;
            "top-left": row i is at position i.
        kv_lens: int32 ``[B]``; keys at and past it do not exist.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.

    Returns:
        out ``[B, Sq, Hq, D]`` of q's dtype, contiguous, and lse, fp32 ``[B, Hq, Sq]``, the natural log of the softmax
        denominator. A row that sees no key gives out 0 and lse -inf.

    Raises:
        TypeError, ValueError: the sizes or full_heads do not fit; the text names them.
        RuntimeError, TypeError, NotImplementedError: as :func:`lite_attention.attention`.
    """
    _check_heads(_NAME, q, k)
    heads, kv_heads = q.shape[2], k.shape[2]
    windows = _window_table(_NAME, heads, sink_size, recent_size, q.device)
    if full_heads is not None:
        _check_full_heads(_NAME, full_heads)
        if not equals_any(full_heads.shape[0], heads, kv_heads) or full_heads.device != q.device:
            raise ValueError(
                f"{_NAME}: full_heads has {full_heads.shape[0]} heads on {full_heads.device}, expected "
                f"{heads}, one a query head, or {kv_heads}, one a KV head, on {q.device}"
            )
        group = heads // full_heads.shape[0]
        windows.view(-1, group, 2)[:, :, 1].masked_fill_(full_heads.unsqueeze(-1), UNLIMITED)
    return ops.attention(q, k, v, kv_lens=kv_lens, scale=scale, causal=causal, head_windows=windows)


def _check_heads(function: str, q: Tensor, k: Tensor) -> None:
    """What must hold before heads are counted; the operator checks the rest."""
    check_tensors(function, q=q, k=k)
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{function}: {name} has {tensor.dim()} dimensions, expected 4: [batch, length, heads, head_dim]"
            )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"{function}: k has {k.shape[2]} heads, expected a divisor of q's {q.shape[2]}")


def _check_full_heads(function: str, full_heads: Tensor) -> None:
    if not isinstance(full_heads, Tensor) or full_heads.dtype != torch.bool:
        kind = full_heads.dtype if isinstance(full_heads, Tensor) else f"type {type(full_heads).__name__}"
        raise TypeError(f"{function}: full_heads has {kind}, expected a tensor of torch.bool")
    if full_heads.dim() != 1:
        raise ValueError(f"{function}: full_heads has {full_heads.dim()} dimensions, expected 1: one bool a head")


def _window_table(
    function: str, heads: int, sink_size: int | Tensor, recent_size: int | Tensor, device: torch.device
) -> Tensor:
    """int32 ``[heads, 2]``: every head streaming."""
    table = torch.empty(heads, 2, dtype=torch.int32, device=device)
    for column, name, size, smallest in ((0, "sink_size", sink_size, 0), (1, "recent_size", recent_size, 1)):
        if isinstance(size, Tensor):
            if size.dtype != torch.int32 or size.shape != (heads,) or size.device != table.device:
                raise ValueError(
                    f"{function}: {name} is {size.dtype} {list(size.shape)} on {size.device}, expected a number or "
                    f"torch.int32 [{heads}] on {table.device}, one a head"
                )
            table[:, column].copy_(size)
            continue
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{function}: {name} has type {type(size).__name__}, expected an int or a tensor")
        if not smallest <= size <= UNLIMITED:
            raise ValueError(f"{function}: {name} is {size}, expected {smallest} to {UNLIMITED} keys")
        table[:, column].fill_(size)
    return table
