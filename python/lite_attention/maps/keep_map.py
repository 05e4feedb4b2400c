"""The keep map: one bit per (batch, head, query tile, KV tile) that says whether the tile is computed.

A map is an int32 tensor ``[batch, heads, query_tiles, words]`` with ``words = ceil(kv_tiles / 32)``. Bit ``j % 32`` of
word ``j // 32`` stands for KV tile ``j``; bits past the last tile are 0. These helpers build maps and take them apart.
They are plain torch on any device and can be traced by torch.compile. They know nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_attention.maps.tiles import resolve_tile_n, tile_shape

WORD_BITS = 32

__all__ = [
    "WORD_BITS",
    "density",
    "full_keep_map",
    "keep_map_shape",
    "kept_tiles",
    "pack_keep_map",
    "parse_ranges",
    "tile_counts",
    "tiles_inside",
    "tiles_touched",
    "unpack_keep_map",
]


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer not below ``numerator / denominator``, for positive arguments."""
    return (numerator + denominator - 1) // denominator


def tile_counts(
    query_len: int, kv_len: int, head_dim: int, dtype: torch.dtype, tile_n: int | None = None
) -> tuple[int, int]:
    """How many (query tiles, KV tiles) cover sequences of these lengths; ``tile_n`` as for ``attention``."""
    tile_m, _ = tile_shape(head_dim, dtype)
    return ceil_div(query_len, tile_m), ceil_div(kv_len, resolve_tile_n(head_dim, tile_n))


def keep_map_shape(
    batch: int,
    heads: int,
    query_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype,
    tile_n: int | None = None,
) -> tuple[int, int, int, int]:
    """Shape ``(batch, heads, query_tiles, words)`` of the packed map for these sequences."""
    query_tiles, kv_tiles = tile_counts(query_len, kv_len, head_dim, dtype, tile_n)
    return batch, heads, query_tiles, ceil_div(kv_tiles, WORD_BITS)


def pack_keep_map(keep: Tensor) -> Tensor:
    """Pack a bool map ``[..., kv_tiles]`` into int32 words ``[..., ceil(kv_tiles / 32)]``.

    Raises:
        TypeError: ``keep`` is not bool.
    """
    if keep.dtype != torch.bool:
        raise TypeError(f"pack_keep_map: keep has dtype {keep.dtype}, expected torch.bool")
    words = ceil_div(keep.shape[-1], WORD_BITS)
    # Padded as integers: Inductor's C++ does not compile a padded bool of dynamic shape.
    padded = F.pad(keep.to(torch.int32), (0, words * WORD_BITS - keep.shape[-1]))
    bits: Tensor = padded.unflatten(-1, (words, WORD_BITS))
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=keep.device)
    return torch.sum(bits << shifts, -1, dtype=torch.int32)


def unpack_keep_map(packed: Tensor, kv_tiles: int) -> Tensor:
    """Unpack int32 words ``[..., words]`` into a bool map ``[..., kv_tiles]``.

    Raises:
        TypeError: ``packed`` is not int32.
        ValueError: ``packed`` has not the number of words that ``kv_tiles`` needs.
    """
    if packed.dtype != torch.int32:
        raise TypeError(f"unpack_keep_map: packed has dtype {packed.dtype}, expected torch.int32")
    if packed.shape[-1] != ceil_div(kv_tiles, WORD_BITS):
        raise ValueError(
            f"unpack_keep_map: packed has {packed.shape[-1]} words per row, "
            f"expected {ceil_div(kv_tiles, WORD_BITS)} for {kv_tiles} KV tiles"
        )
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :kv_tiles].to(torch.bool)


def full_keep_map(
    batch: int,
    heads: int,
    query_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    tile_n: int | None = None,
) -> Tensor:
    """The packed map that keeps every tile: int32 ``[batch, heads, query_tiles, words]``.

    ``query_len`` and ``kv_len`` are in tokens, ``heads`` counts query heads; ``head_dim``, ``dtype`` (of q) and
    ``tile_n`` (as for ``attention``) choose the tile shape.
    """
    _, kv_tiles = tile_counts(query_len, kv_len, head_dim, dtype, tile_n)
    row = pack_keep_map(torch.ones(kv_tiles, dtype=torch.bool, device=device))
    return row.repeat(*keep_map_shape(batch, heads, query_len, kv_len, head_dim, dtype, tile_n)[:-1], 1)


def kept_tiles(packed: Tensor, kv_tiles: int) -> Tensor:
    """Number of kept tiles in a packed map, int64 and 0-d, on the map's device (no synchronisation).

    Bits past the last tile do not count.
    """
    bits = kv_tiles - WORD_BITS * torch.arange(packed.shape[-1], dtype=torch.int32, device=packed.device)
    row = torch.where(bits < WORD_BITS, 0x7FFFFFFF >> (WORD_BITS - 1 - bits.clamp(0, WORD_BITS - 1)), -1)
    # Bits are summed in fields of 2, 4, 8, 16 and 32 of them. Shifts copy the sign bit, which the masks take away.
    count = packed & row
    count = count - ((count >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F
    count = count + (count >> 8)
    count = (count + (count >> 16)) & 0x3F
    return count.sum()


def density(packed: Tensor, kv_tiles: int) -> Tensor:
    """Kept tiles / all tiles of a packed map, fp32 and 0-d, on the map's device (no synchronisation)."""
    rows = packed.numel() // packed.shape[-1]
    return kept_tiles(packed, kv_tiles).to(torch.float32) / (rows * kv_tiles)


def parse_ranges(
    ranges: Sequence[int], length: int, name: str = "ranges", tokens: str = "keys"
) -> list[tuple[int, int]]:
    """Read a flat ``[start, end, ...]`` list of positions of keys, or of other ``tokens``, as ``(low, high)`` pairs.

    High is exclusive. A pair may be written ascending (``[60, 80]``) or descending (``[80, 60]``): both mean keys 60
    to 79. Pairs may touch, overlap and come in any order.

    Raises:
        TypeError: an entry is not an int.
        ValueError: odd length, or a pair that is empty, negative or past ``length``; the text names the entry.
    """
    if len(ranges) % 2 != 0:
        raise ValueError(
            f"{name} has {len(ranges)} entries, expected an even number: [start, end, start, end, ...] "
            f"(entry {len(ranges) - 1}, {ranges[-1]!r}, has no partner)"
        )
    for index, entry in enumerate(ranges):
        if isinstance(entry, bool) or not isinstance(entry, (int, torch.SymInt)):
            raise TypeError(f"{name}[{index}] is {entry!r} of type {type(entry).__name__}, expected an int")
        if entry < 0:
            raise ValueError(f"{name}[{index}] is {entry}, expected a position of at least 0")
        if entry > length:
            raise ValueError(f"{name}[{index}] is {entry}, expected at most the number of {tokens}, {length}")
    pairs = []
    for index in range(0, len(ranges), 2):
        first, second = ranges[index], ranges[index + 1]
        if first == second:
            raise ValueError(f"{name}[{index}:{index + 2}] is [{first}, {second}], an empty range")
        pairs.append((first, second) if first < second else (second, first))
    return pairs


def _token_cover(ranges: Tensor | Sequence[tuple[int, int]], kv_len: int, device: torch.device | None) -> Tensor:
    """Which keys lie in any of the half-open ranges: bool ``[kv_len]``."""
    if isinstance(ranges, Tensor):
        if ranges.dim() != 2 or ranges.shape[-1] != 2:
            raise ValueError(f"ranges has shape {list(ranges.shape)}, expected [count, 2]")
        token = torch.arange(kv_len, device=ranges.device).unsqueeze(-1)
        low, high = ranges.amin(-1), ranges.amax(-1)
        return ((token >= low) & (token < high)).any(-1)
    # Compared as scalars, not copied as a tensor: a copy to the device may not happen while a CUDA graph is captured.
    token = torch.arange(kv_len, device=device)
    cover = torch.zeros(kv_len, dtype=torch.bool, device=device)
    for low_key, high_key in ranges:
        cover = cover | ((token >= low_key) & (token < high_key))
    return cover


def tiles_touched(
    ranges: Tensor | Sequence[tuple[int, int]], kv_len: int, tile_n: int, device: torch.device | None = None
) -> Tensor:
    """KV tiles with at least one key in any range (rounds outward, as must-do does): bool ``[kv_tiles]``.

    Args:
        ranges: half-open key ranges: pairs from :func:`parse_ranges`, or an integer tensor ``[count, 2]``, whose pairs
            may also be descending, empty (they cover nothing) or reach past ``kv_len`` (the rest counts).
        kv_len: number of keys.
        tile_n: keys per KV tile.
        device: of the result; for a tensor of ranges, its own.

    Raises:
        ValueError: a tensor of ranges is not ``[count, 2]``.
    """
    cover = _token_cover(ranges, kv_len, device)
    kv_tiles = ceil_div(kv_len, tile_n)
    padded = F.pad(cover, (0, kv_tiles * tile_n - kv_len))
    return torch.any(padded.view(kv_tiles, tile_n), -1)


def tiles_inside(
    ranges: Tensor | Sequence[tuple[int, int]], kv_len: int, tile_n: int, device: torch.device | None = None
) -> Tensor:
    """KV tiles all of whose keys lie in the ranges taken together (rounds inward): bool ``[kv_tiles]``.

    Arguments and errors as for :func:`tiles_touched`. Of a ragged last tile only the keys that exist count.
    """
    cover = _token_cover(ranges, kv_len, device)
    kv_tiles = ceil_div(kv_len, tile_n)
    padded = F.pad(cover, (0, kv_tiles * tile_n - kv_len), value=True)
    return torch.all(padded.view(kv_tiles, tile_n), -1)
