"""``attention``: over the kept tiles and the keys visible in them; without a map or mask, dense attention."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lite_attention.ops.call import call, check_optional_tensors, check_tensors, softmax_scale
from lite_attention.ops.checks import checked_int64
from lite_attention.ops.define import check_fake_inputs, define, dense_flops, fake_out_and_lse

__all__ = ["CausalAlignment", "attention"]

SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? kv_lens, float scale, *, int? tile_n=None, "
    "Tensor? kv_tile_lens=None, str? causal=None, Tensor? head_windows=None) -> (Tensor out, Tensor lse)"
)

CausalAlignment = Literal["top-left", "bottom-right"]


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    kv_lens: Tensor | None,
    scale: float,
    *,
    tile_n: int | None = None,
    kv_tile_lens: Tensor | None = None,
    causal: str | None = None,
    head_windows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_fake_inputs(
        "attention", q=q, k=k, v=v, keep=keep, kv_lens=kv_lens, kv_tile_lens=kv_tile_lens, head_windows=head_windows
    )
    return fake_out_and_lse(q)


_OPERATOR = define(SCHEMA, fake=_fake, autocasts=("q", "k", "v"), flops=dense_flops)


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
        k, v: ``[B, Sk, Hkv, D]`` of q's dtype and device, ``Hq % Hkv == 0``. Autocast gives the three its dtype.
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
        denominator. A row that sees no key gives out 0 and lse -inf. NaN or infinity in v reaches no further than to
        the rows whose query tile computes its KV tile; keys that do not exist may hold anything.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    check_tensors("attention", q=q, k=k, v=v)
    check_optional_tensors(
        "attention", keep=keep, kv_lens=kv_lens, kv_tile_lens=kv_tile_lens, head_windows=head_windows
    )
    if causal is not None and not isinstance(causal, str):
        raise TypeError(
            f"attention: causal has type {type(causal).__name__}, expected 'top-left', 'bottom-right' or None"
        )
    result: tuple[Tensor, Tensor] = call(
        _OPERATOR,
        q,
        k,
        v,
        keep,
        kv_lens,
        softmax_scale("attention", q, scale),
        tile_n=None if tile_n is None else checked_int64("attention: tile_n", tile_n),
        kv_tile_lens=kv_tile_lens,
        causal=causal,
        head_windows=head_windows,
    )
    return result
