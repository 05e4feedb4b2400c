"""Keep maps of known density for the benchmarks.

A kernel walks the `visit_rows` query rows of a *group* together, so most patterns give the query tiles of a group the
same KV tiles:

* contiguous: one run of KV tiles around the group's diagonal, wrapping at the ends;
* scattered: random KV tiles;
* unequal: scattered, and each group has a density of its own;
* scattered per query tile: each query tile has random KV tiles of its own.
"""

import torch
from torch import Tensor

from attention_record import CONTIGUOUS, PATTERNS, PER_TILE, UNEQUAL
from lite_attention import tile_shape, visit_rows
from lite_attention.maps.keep_map import ceil_div

# Unequal densities are uniform over 2 to 60% where the mean is 31%; for another mean the same spread around it, scaled.
UNEQUAL_SPREAD = (0.60 - 0.02) / (0.60 + 0.02)


def random_tiles(kept: Tensor, kv_tiles: int) -> Tensor:
    """Bool `[..., kv_tiles]` with `kept` `[...]` random tiles in each row."""
    permutation = torch.rand(*kept.shape, kv_tiles, device=kept.device).argsort(dim=-1)
    return permutation < kept.unsqueeze(-1)


def unequal_densities(mean: float, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Densities drawn uniformly around a mean, no lower than 0 and no higher than 1."""
    half_width = UNEQUAL_SPREAD * min(mean, 1 - mean)
    return mean + half_width * (2 * torch.rand(shape, device=device) - 1)


def keep_map(
    pattern: str,
    density: float,
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A bool keep map `[batch, heads, query tiles, KV tiles]` of self-attention over `length` tokens.

    Every row keeps `density` of its KV tiles, rounded to whole ones and at least one; rows of the unequal pattern
    do so on average.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"keep_map: pattern is {pattern!r}, expected one of {', '.join(map(repr, PATTERNS))}")
    tile_m, tile_n = tile_shape(head_dim, dtype)
    tiles_in_group = visit_rows(head_dim, dtype) // tile_m
    query_tiles, kv_tiles = ceil_div(length, tile_m), ceil_div(length, tile_n)
    groups = ceil_div(query_tiles, tiles_in_group)
    rows = (batch, heads, query_tiles if pattern == PER_TILE else groups)

    share = torch.full(rows, density, device=device)
    if pattern == UNEQUAL:
        share = unequal_densities(density, rows, device)
    kept = (share * kv_tiles).round().clamp(1, kv_tiles)
    if pattern == CONTIGUOUS:
        diagonal = torch.arange(groups, device=device) * tiles_in_group * tile_m // tile_n
        first = diagonal - kept // 2
        keep = (torch.arange(kv_tiles, device=device) - first.unsqueeze(-1)) % kv_tiles < kept.unsqueeze(-1)
    else:
        keep = random_tiles(kept, kv_tiles)
    if pattern != PER_TILE:
        keep = keep.repeat_interleave(tiles_in_group, dim=2)[:, :, :query_tiles]
    return keep.contiguous()
