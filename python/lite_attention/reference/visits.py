"""What attention and skip_attention of the oracle share: which tiles there are, and in which order they are visited."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.maps.keep_map import ceil_div, unpack_keep_map

__all__ = ["expanded_map", "visit_order"]


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


def expanded_map(packed: Tensor, kv_tiles: int, batch: int, heads: int, query_tiles: int) -> Tensor:
    """A packed map, any of whose first three sizes may be 1, as bool ``[batch, heads, query_tiles, kv_tiles]``."""
    return unpack_keep_map(packed, kv_tiles).expand(batch, heads, query_tiles, kv_tiles)
