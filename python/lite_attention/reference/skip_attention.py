"""The oracle's ``skip_attention``, and with it the oracle's drop rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.maps.keep_map import ceil_div, pack_keep_map
from lite_attention.maps.tiles import tile_shape, visit_rows
from lite_attention.reference.attention import attention
from lite_attention.reference.visits import expanded_map, visit_order

__all__ = ["decisions", "drop_margin", "skip_attention"]

LOG2_E = math.log2(math.e)


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
    next_keep, _ = decisions(q, k, keep, must_keep, kv_lens, threshold, scale, compute_dtype=compute_dtype)
    visited = keep if must_keep is None else keep | must_keep
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
        compared with the threshold: the largest ``(m_tile - m_run) * scale * log2(e)`` over a tile's rows, NaN if it is
        NaN for one of them, +inf for the first tile visited, -inf for tiles not visited. A kernel that rounds
        differently may decide differently
        only where the margin is within rounding of the threshold.
    """
    batch, query_len, heads, head_dim = q.shape
    kv_len, group = k.shape[1], heads // k.shape[2]
    tile_m, tile_n = tile_shape(head_dim, q.dtype)
    query_tiles, kv_tiles = ceil_div(query_len, tile_m), ceil_div(kv_len, tile_n)
    order = visit_order(query_len, kv_len, tile_m, tile_n, visit_rows(head_dim, q.dtype), q.device)

    kept = expanded_map(keep, kv_tiles, batch, heads, query_tiles)
    must = torch.zeros_like(kept) if must_keep is None else expanded_map(must_keep, kv_tiles, batch, heads, query_tiles)
    lens = torch.full((batch,), kv_len, device=q.device) if kv_lens is None else kv_lens.to(torch.int64)
    tile_start = torch.arange(kv_tiles, device=q.device) * tile_n
    exists = (tile_start < lens[:, None])[:, None, None, :].expand_as(kept)
    visited = (kept | must) & exists

    margins = torch.empty(kept.shape, dtype=compute_dtype, device=q.device)
    for b in range(batch):
        for h in range(heads):
            scores = q[b, :, h].to(compute_dtype) @ k[b, :, h // group].to(compute_dtype).T
            scores[:, int(lens[b]) :] = -math.inf
            # Rows past the end repeat the last one: they decide nothing of their own. Keys past it count for nothing.
            rows = torch.arange(query_tiles * tile_m, device=q.device).clamp(max=query_len - 1)
            padded = torch.nn.functional.pad(scores[rows], (0, kv_tiles * tile_n - kv_len), value=-math.inf)
            tile_max = padded.view(query_tiles, tile_m, kv_tiles, tile_n).amax(-1)
            margins[b, h] = drop_margin(tile_max, visited[b, h], order, scale)

    limit = threshold.to(compute_dtype).reshape(-1, 1, 1)
    first = margins == math.inf
    decided = visited & (must | first | ~(margins <= limit))  # not `>`: NaN never drops
    return pack_keep_map(torch.where(exists, decided, kept)), margins


def drop_margin(tile_max: Tensor, visited: Tensor, order: Tensor, scale: float) -> Tensor:
    """By how much, in powers of two, a tile raises the best score that its rows have seen so far.

    Args:
        tile_max: ``[query_tiles, tile_m, kv_tiles]`` maximum of q.k per row and tile; -inf where no key exists, NaN
            where one of the scores is NaN.
        visited: bool ``[query_tiles, kv_tiles]``.
        order: int64 ``[query_tiles, kv_tiles]`` from :func:`visit_order`.
        scale: the softmax scale.

    Returns:
        ``[query_tiles, kv_tiles]``: the largest margin over the rows, NaN if it is NaN for one of them: a score was, in
        the tile or in one before, or the difference is one of equal infinities. +inf for the first tile visited, -inf
        for tiles not visited. The oracle's drop rule is here and nowhere else.
    """
    by_visit = order.unsqueeze(1).expand_as(tile_max)
    seen = tile_max.masked_fill(~visited.unsqueeze(1), -math.inf).gather(-1, by_visit)
    best_before = seen.cummax(-1).values.roll(1, -1)
    best_before[..., 0] = -math.inf
    margin = ((seen - best_before) * (scale * LOG2_E)).amax(1)
    visits = visited.gather(-1, order)
    is_first = visits & (visits.cumsum(-1) == 1)
    margin = margin.masked_fill(is_first, math.inf).masked_fill(~visits, -math.inf)
    return torch.empty_like(margin).scatter_(-1, order, margin)
