"""The operators with Python's defaults: optional arguments by keyword, a scale that may be left out, float thresholds.

Nothing here keeps state or knows a policy. Argument errors are the operators' own, RuntimeError with a text that names
the operator, the argument, what was got and what was expected; TypeError for what is no dense tensor at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["attention", "merge_attention", "skip_attention", "top_k_map"]

_OPERATORS = torch.ops.lite_attention

CausalAlignment = Literal["top-left", "bottom-right"]


def _softmax_scale(q: Tensor, scale: float | None) -> float:
    """The given scale, or 1/sqrt(D). For a D of 0 any number will do: the operator refuses such a q by name."""
    if scale is not None:
        return scale
    head_dim = q.shape[-1] if q.dim() > 0 else 0
    return 1.0 / math.sqrt(max(head_dim, 1))


def _check_tensors(operator: str, **tensors: Tensor) -> None:
    """What the dispatcher would refuse in words of its own: things that are no dense tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} has type {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided:
            raise TypeError(f"{operator}: {name} has layout {tensor.layout}, expected torch.strided")


def _check_optional_tensors(operator: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_tensors(operator, **{name: tensor})


def _call(operator: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The operator's result; where no gradient can be asked for, without the way through its autograd in Python."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return operator(*arguments, **named)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments, **named)


def in_fp32_range(threshold: float) -> float:
    """The threshold as an fp32 tensor can hold it: what lies beyond fp32's range becomes infinite."""
    return math.copysign(math.inf, threshold) if abs(threshold) > torch.finfo(torch.float32).max else threshold


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    tile_n: int | None = None,
    kv_tile_lens: Tensor | None = None,
    causal: CausalAlignment | None = None,
    head_windows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept tiles and the keys visible in them; without a map or mask, dense attention.

    Args:
        q: ``[B, Sq, Hq, D]``, fp32, bf16 or fp16; any strides whose last one is 1. D is a multiple of 8, at most 256.
        k, v: ``[B, Sk, Hkv, D]`` of q's dtype and device, ``Hq % Hkv == 0``.
        keep: keep map, int32 ``[B, Hq, query_tiles, words]`` (see :mod:`lite_attention.maps.keep_map`).
        kv_lens: int32 ``[B]``; keys at and past it do not exist (padded batches).
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.
        tile_n: keys per KV tile, which is the map's grain along the keys: the default of
            :func:`lite_attention.tile_shape`, or 64.
        kv_tile_lens: int32 ``[kv_tiles]`` or ``[B, kv_tiles]``: only the first so many keys of each KV tile exist. For
            sequences with gaps, such as padded blocks. Holds together with ``kv_lens``.
        causal: a query row sees the keys up to its position. "top-left": row i is at position i. "bottom-right": the
            last row is at the last existing key (``kv_lens`` or Sk), for queries that continue earlier keys.
        head_windows: int32 ``[Hq, 2]``, needs ``causal``: of the keys up to a row's position, the head sees the first
            ``sink_size`` and the last ``recent_size``, its own position included
            (``lite_attention.maps.tiles.UNLIMITED``: all).

    Returns:
        out ``[B, Sq, Hq, D]`` of q's dtype, contiguous, and lse, fp32 ``[B, Hq, Sq]``, the natural log of the softmax
        denominator. A row that sees no key gives out 0 and lse -inf.

    Raises:
        RuntimeError, TypeError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    _check_tensors("attention", q=q, k=k, v=v)
    _check_optional_tensors(
        "attention", keep=keep, kv_lens=kv_lens, kv_tile_lens=kv_tile_lens, head_windows=head_windows
    )
    if causal is not None and not isinstance(causal, str):
        raise TypeError(
            f"attention: causal has type {type(causal).__name__}, expected 'top-left', 'bottom-right' or None"
        )
    result: tuple[Tensor, Tensor] = _call(
        _OPERATORS.attention.default,
        q,
        k,
        v,
        keep,
        kv_lens,
        _softmax_scale(q, scale),
        tile_n=tile_n,
        kv_tile_lens=kv_tile_lens,
        causal=causal,
        head_windows=head_windows,
    )
    return result


def skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    threshold: float | Tensor,
    *,
    must_keep: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the kept tiles that also returns the map to use in the next pass.

    Args:
        q, k, v, kv_lens, scale: as for :func:`attention`.
        keep: keep map, int32 ``[B, Hq, query_tiles, words]``; it is not written.
        threshold: in powers of two. A tile stays in the map if it raises the best score of any of its rows by more
            than this: -inf keeps everything, 0 keeps what raises a row's maximum. A float, or an fp32 tensor on q's
            device, 0-d or one value per query head. Under torch.compile prefer a tensor: every new float recompiles.
        must_keep: keep map of tiles that are computed and stay kept whatever ``keep`` says; its first three sizes may
            each be 1.

    Returns:
        out and lse as :func:`attention`, and next_keep, a keep map of ``keep``'s shape.

    Raises:
        RuntimeError, TypeError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    _check_tensors("skip_attention", q=q, k=k, v=v, keep=keep)
    _check_optional_tensors("skip_attention", must_keep=must_keep, kv_lens=kv_lens)
    if not isinstance(threshold, Tensor):
        if not isinstance(threshold, (int, float, torch.SymFloat)):
            raise TypeError(
                f"skip_attention: threshold has type {type(threshold).__name__}, expected a number or tensor"
            )
        threshold = torch.full((), in_fp32_range(threshold), dtype=torch.float32, device=q.device)
    result: tuple[Tensor, Tensor, Tensor] = _call(
        _OPERATORS.skip_attention.default, q, k, v, keep, must_keep, kv_lens, threshold, _softmax_scale(q, scale)
    )
    return result


def top_k_map(scores: Tensor, count: int) -> Tensor:
    """The keep map of the ``count`` largest scores of each row.

    Args:
        scores: ``[..., n]``, fp32, bf16 or fp16: one score for each KV tile, say. Of equal scores the one of lowest
            index ranks first; NaN ranks below everything, 0 and -0 are equal.
        count: bits to set in each row, at least 1; all n where n is smaller.

    Returns:
        The packed map, int32 ``[..., ceil(n / 32)]`` (see :mod:`lite_attention.maps.keep_map`), on the scores' device.

    Raises:
        RuntimeError, TypeError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    _check_tensors("top_k_map", scores=scores)
    result: Tensor = _call(_OPERATORS.top_k_map.default, scores, count)
    return result


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact merge of attention results over disjoint sets of keys.

    Args:
        outs: at least one ``[B, Sq, H, D]``, all of one shape and dtype.
        lses: as many fp32 ``[B, H, Sq]``, natural log, as the other operators return them.

    Returns:
        out and lse of attention over all the keys. Rows without any key give out 0 and lse -inf.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
    """
    outs, lses = list(outs), list(lses)
    if not outs:
        raise ValueError("merge_attention: outs is empty, expected at least one partial result")
    _check_tensors("merge_attention", **{f"outs[{part}]": out for part, out in enumerate(outs)})
    _check_tensors("merge_attention", **{f"lses[{part}]": lse for part, lse in enumerate(lses)})
    result: tuple[Tensor, Tensor] = _call(_OPERATORS.merge_attention.default, outs, lses)
    return result
