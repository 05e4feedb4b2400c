"""The oracle's ``attention``: kept tiles, lengths and masks on dense scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.maps.keep_map import ceil_div
from lite_attention.maps.tiles import resolve_tile_n, tile_shape
from lite_attention.reference.visits import expanded_map

__all__ = ["attention", "visible_keys"]


def attention(
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
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept tiles and the visible keys in them.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k, v: ``[B, Sk, Hkv, D]``, ``Hq % Hkv == 0``.
        keep: keep map int32 ``[B, Hq, query_tiles, words]``, or None for every tile. Sizes 1 broadcast.
        kv_lens: int32 ``[B]``, keys at and past it do not exist; None for all of them.
        scale: factor on q.k before the softmax.
        tile_n: keys per KV tile; None for the default of the head dim.
        kv_tile_lens: int32 ``[kv_tiles]`` or ``[B, kv_tiles]``, how many keys of each KV tile exist, the first ones.
        causal, head_windows: which keys each query row sees, see :func:`visible_keys`.

    Returns:
        out ``[B, Sq, Hq, D]`` and lse ``[B, Hq, Sq]`` (natural log), both in ``compute_dtype``.
    """
    batch, query_len, heads, head_dim = q.shape
    kv_len, group = k.shape[1], heads // k.shape[2]
    tile_m, _ = tile_shape(head_dim, q.dtype)
    tile_n = resolve_tile_n(head_dim, tile_n)
    query_tiles, kv_tiles = ceil_div(query_len, tile_m), ceil_div(kv_len, tile_n)
    in_tile = torch.arange(kv_len, device=q.device) % tile_n
    tile_lens = None if kv_tile_lens is None else kv_tile_lens.expand(batch, kv_tiles)
    kept = None if keep is None else expanded_map(keep, kv_tiles, batch, heads, query_tiles)

    out = torch.empty(batch, query_len, heads, head_dim, dtype=compute_dtype, device=q.device)
    lse = torch.empty(batch, heads, query_len, dtype=compute_dtype, device=q.device)
    for b in range(batch):
        for h in range(heads):
            query, key, value = (x.to(compute_dtype) for x in (q[b, :, h], k[b, :, h // group], v[b, :, h // group]))
            scores = query @ key.T
            scores[:, _kv_len(kv_lens, b, kv_len) :] = -math.inf
            if kept is not None:
                per_key = kept[b, h].repeat_interleave(tile_n, -1)[:, :kv_len]
                scores.masked_fill_(~per_key.repeat_interleave(tile_m, 0)[:query_len], -math.inf)
            if tile_lens is not None:
                scores[:, in_tile >= tile_lens[b].repeat_interleave(tile_n)[:kv_len]] = -math.inf
            if causal is not None:
                keys = _kv_len(kv_lens, b, kv_len)
                window = None if head_windows is None else head_windows[h]
                scores.masked_fill_(~visible_keys(query_len, kv_len, keys, causal, window, q.device), -math.inf)
            out[b, :, h], lse[b, h] = _masked_softmax(scores, value, scale)
    return out, lse


def visible_keys(
    query_len: int, kv_len: int, existing_keys: int, causal: str, window: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys each query row of one batch entry and head sees: bool ``[query_len, kv_len]``.

    Args:
        existing_keys: keys that the batch entry has.
        causal: "top-left": row i is at position i; "bottom-right": the last row is at the last existing key. A row sees
            keys up to its position.
        window: (sink_size, recent_size), or None: of those keys, only the first sink_size ones and the recent_size
            last ones.
    """
    key = torch.arange(kv_len, device=device)
    first_position = {"top-left": 0, "bottom-right": existing_keys - query_len}[causal]
    position = (torch.arange(query_len, device=device) + first_position).unsqueeze(-1)
    visible = key <= position
    if window is not None:
        sink_size, recent_size = window.to(torch.int64)
        visible &= (key < sink_size) | (key > position - recent_size)
    return visible


def _masked_softmax(scores: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention from raw scores ``[Sq, Sk]`` with -inf where a key is not used; rows without a key give 0 and -inf.

    A key that is not used is nothing to the row, whatever its value holds: kernels hold to that less strictly.
    """
    scaled = scores * scale
    lse = torch.logsumexp(scaled, -1)
    weight = torch.exp(scaled - lse.unsqueeze(-1)).masked_fill(lse.unsqueeze(-1) == -math.inf, 0.0)
    out = weight @ value
    spoilt = ~value.isfinite().all(-1)
    if spoilt.any():  # there 0 times what lies in V is NaN
        out = weight[:, ~spoilt] @ value[~spoilt]
        used = scores[:, spoilt, None] != -math.inf
        out = out + torch.where(used, weight[:, spoilt, None] * value[spoilt], 0.0).sum(1)
    return out, lse


def _kv_len(kv_lens: Tensor | None, index: int, default: int) -> int:
    return default if kv_lens is None else int(kv_lens[index])
