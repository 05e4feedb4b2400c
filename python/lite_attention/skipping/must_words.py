"""The ranges that a pass must compute or leave out, as packed maps that the operators broadcast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lite_attention.maps import tiles
from lite_attention.maps.keep_map import pack_keep_map
from lite_attention.maps.ranges import tiles_inside, tiles_touched
from lite_attention.skipping.arguments import CheckedRanges

__all__ = ["must_words"]


def must_words(
    do_keys: CheckedRanges | None,
    skip_keys: CheckedRanges | None,
    do_queries: CheckedRanges | None,
    query: Tensor,
    key: Tensor,
    words: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Packed maps of what is computed whatever the keep map says, and of what is left out: sizes of 1 broadcast.

    Args:
        do_keys, skip_keys, do_queries: must_do_list, must_skip_list and must_do_queries of ``LiteAttention.forward``.
        words: of a row of the keep map.
    """
    must_do = _row_of_words(do_keys, tiles_touched, query, key)
    must_skip = _row_of_words(skip_keys, tiles_inside, query, key)
    if do_queries is not None:
        tile_m, _ = tiles.tile_shape(query.shape[-1], query.dtype)
        rows = tiles_touched(do_queries, query.shape[1], tile_m, query.device)
        others = torch.zeros((), dtype=torch.int32, device=query.device) if must_do is None else must_do
        must_do = torch.where(rows[:, None], -1, others).expand(1, 1, -1, words)
    return must_do, must_skip


def _row_of_words(
    ranges: CheckedRanges | None, cover: Callable[..., Tensor], query: Tensor, key: Tensor
) -> Tensor | None:
    """The ranges as a packed map ``[1, 1, 1, words]``, by way of ``cover``: ranges -> bool per KV tile."""
    if ranges is None:
        return None
    _, tile_n = tiles.tile_shape(query.shape[-1], query.dtype)
    return pack_keep_map(cover(ranges, key.shape[1], tile_n, query.device)).view(1, 1, 1, -1)
