"""The oracle: every operator of the package in plain torch, written to be read.

Each function takes its operator's arguments and computes in ``compute_dtype`` (fp64 unless told otherwise), from dense
scores of one (batch, head) at a time, so memory grows with ``Sq * Sk``. Results stay in ``compute_dtype``: comparing
with a kernel's fp32 or bf16 result is the test's business. Runs on any device; it validates nothing and is not fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lite_attention.maps.keep_map import ceil_div, pack_keep_map, unpack_keep_map
from lite_attention.maps.tiles import resolve_tile_n, tile_shape, visit_rows

LOG2_E = math.log2(math.e)

__all__ = [
    "attention",
    "decisions",
    "merge_attention",
    "skip_attention",
    "top_k_map",
    "visible_keys",
    "visit_order",
]


def visit_order(
    query_len: int, kv_len: int, tile_m: int, tile_n: int, group_rows: int, device: torch.device | str | None = None
) -> Tensor:
    """int64 ``[query_tiles, kv_tiles]``: the KV tile that each query tile visits first, second, and so on.

    The walk starts on the diagonal of the query tile's visit group (``group_rows`` rows that a kernel walks together),
    goes up to the last tile and wraps to tile 0.
    """
    query_tiles, kv_tiles = ceil_div(query_len, tile_m), ceil_div(kv_len, tile_n)
    row = torch.arange(query_tiles, device=device) * tile_m
    first_row = row // group_rows * group_rows
    start = first_row * kv_len // query_len // tile_n
    return (start[:, None] + torch.arange(kv_tiles, device=device)) % kv_tiles


def drop_margin(tile_max: Tensor, visited: Tensor, order: Tensor, scale: float) -> Tensor:
    """By how much, in powers of two, a tile raises the best score that its rows have seen so far.

    Args:
        tile_max: ``[query_tiles, tile_m, kv_tiles]`` maximum of q.k per row and tile; -inf where no key or row exists.
        visited: bool ``[query_tiles, kv_tiles]``.
        order: int64 ``[query_tiles, kv_tiles]`` from :func:`visit_order`.
        scale: the softmax scale.

    Returns:
        ``[query_tiles, kv_tiles]``: the largest margin over the rows; +inf for the first tile visited, -inf for tiles
        not visited. The oracle's drop rule is here and nowhere else.
    """
    by_visit = order.unsqueeze(1).expand_as(tile_max)
    seen = tile_max.masked_fill(~visited.unsqueeze(1), -math.inf).gather(-1, by_visit)
    best_before = seen.cummax(-1).values.roll(1, -1)
    best_before[..., 0] = -math.inf
    raised = seen - best_before
    # -inf - -inf: a row or key that does not exist raises nothing.
    raised = raised.masked_fill(seen == -math.inf, -math.inf)
    margin = (raised * (scale * LOG2_E)).amax(1)
    return torch.empty_like(margin).scatter_(-1, order, margin)


def _expanded(packed: Tensor, kv_tiles: int, batch: int, heads: int, query_tiles: int) -> Tensor:
    """A packed map, any of whose first three sizes may be 1, as bool ``[batch, heads, query_tiles, kv_tiles]``."""
    return unpack_keep_map(packed, kv_tiles).expand(batch, heads, query_tiles, kv_tiles)


def _kv_len(kv_lens: Tensor | None, index: int, default: int) -> int:
    return default if kv_lens is None else int(kv_lens[index])


def _masked_softmax(scores: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention from raw scores ``[Sq, Sk]`` with -inf where a key is not used; rows without a key give 0 and -inf."""
    scaled = scores * scale
    lse = torch.logsumexp(scaled, -1)
    weight = torch.exp(scaled - lse.unsqueeze(-1)).masked_fill(lse.unsqueeze(-1) == -math.inf, 0.0)
    return weight @ value, lse


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
    kept = None if keep is None else _expanded(keep, kv_tiles, batch, heads, query_tiles)

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


def skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    must_keep: Tensor | None,
    kv_lens: Tensor | None,
    threshold: Tensor,
    scale: float,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over ``keep | must_keep`` that also says which of those tiles the next pass should keep.

    Args:
        q, k, v, kv_lens, scale: as for :func:`attention`.
        keep: keep map int32 ``[B, Hq, query_tiles, words]``.
        must_keep: keep map of tiles that are computed and stay kept whatever ``keep`` says; sizes 1 broadcast.
        threshold: fp32, 0-d or ``[Hq]``, in powers of two.

    Returns:
        out and lse as :func:`attention`, and next_keep, a packed map of ``keep``'s shape.
    """
    next_keep, margins = decisions(q, k, keep, must_keep, kv_lens, threshold, scale, compute_dtype=compute_dtype)
    visited = pack_keep_map(margins > -math.inf)
    out, lse = attention(q, k, v, visited, kv_lens, scale, compute_dtype=compute_dtype)
    return out, lse, next_keep


def decisions(
    q: Tensor,
    k: Tensor,
    keep: Tensor,
    must_keep: Tensor | None,
    kv_lens: Tensor | None,
    threshold: Tensor,
    scale: float,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """What :func:`skip_attention` decides, and by how much.

    Returns:
        next_keep, a packed map of ``keep``'s shape, and the margins ``[B, Hq, query_tiles, kv_tiles]`` that were
        compared with the threshold: the largest ``(m_tile - m_run) * scale * log2(e)`` over a tile's rows, +inf for
        the first tile visited, -inf for tiles not visited. A kernel that rounds differently may decide differently
        only where the margin is within rounding of the threshold.
    """
    batch, query_len, heads, head_dim = q.shape
    kv_len, group = k.shape[1], heads // k.shape[2]
    tile_m, tile_n = tile_shape(head_dim, q.dtype)
    query_tiles, kv_tiles = ceil_div(query_len, tile_m), ceil_div(kv_len, tile_n)
    order = visit_order(query_len, kv_len, tile_m, tile_n, visit_rows(head_dim, q.dtype), q.device)

    kept = _expanded(keep, kv_tiles, batch, heads, query_tiles)
    must = torch.zeros_like(kept) if must_keep is None else _expanded(must_keep, kv_tiles, batch, heads, query_tiles)
    lens = torch.full((batch,), kv_len, device=q.device) if kv_lens is None else kv_lens.to(torch.int64)
    tile_start = torch.arange(kv_tiles, device=q.device) * tile_n
    exists = (tile_start < lens[:, None])[:, None, None, :].expand_as(kept)
    visited = (kept | must) & exists

    margins = torch.empty(kept.shape, dtype=compute_dtype, device=q.device)
    for b in range(batch):
        for h in range(heads):
            scores = q[b, :, h].to(compute_dtype) @ k[b, :, h // group].to(compute_dtype).T
            scores[:, int(lens[b]) :] = -math.inf
            row_pad, key_pad = query_tiles * tile_m - query_len, kv_tiles * tile_n - kv_len
            padded = torch.nn.functional.pad(scores, (0, key_pad, 0, row_pad), value=-math.inf)
            tile_max = padded.view(query_tiles, tile_m, kv_tiles, tile_n).amax(-1)
            margins[b, h] = drop_margin(tile_max, visited[b, h], order, scale)

    limit = threshold.to(compute_dtype).reshape(-1, 1, 1)
    first = margins == math.inf
    decided = visited & (must | first | (margins > limit))
    return pack_keep_map(torch.where(exists, decided, kept)), margins


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, compute_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Exact merge of attention over disjoint sets of keys.

    Args:
        outs: at least one ``[B, Sq, H, D]``.
        lses: as many ``[B, H, Sq]``, natural log.

    Returns:
        out and lse of attention over all the keys, in ``compute_dtype``; rows without any key give 0 and -inf.
    """
    all_lses = torch.stack([lse.to(compute_dtype) for lse in lses])
    lse = torch.logsumexp(all_lses, 0)
    weights = torch.exp(all_lses - lse).masked_fill(lse == -math.inf, 0.0)
    weighted = [w.transpose(1, 2).unsqueeze(-1) * out.to(compute_dtype) for w, out in zip(weights, outs, strict=True)]
    return torch.stack(weighted).sum(0), lse


def top_k_map(scores: Tensor, count: int) -> Tensor:
    """The packed map of the ``count`` largest scores of each row; of equal ones those of lowest index.

    Args:
        scores: ``[..., n]``. NaN ranks below everything, 0 and -0 are equal.
        count: how many bits to set in each row; all n where n is smaller.

    Returns:
        int32 ``[..., ceil(n / 32)]``.
    """
    below_all = scores.isnan()
    ranked = scores.double().masked_fill(below_all, -math.inf)
    # Two stable sorts: by score, then what is NaN behind what is -inf.
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, below_all.gather(-1, order).int().argsort(dim=-1, stable=True))
    chosen = torch.zeros_like(below_all).scatter_(-1, order[..., :count], True)
    return pack_keep_map(chosen)
