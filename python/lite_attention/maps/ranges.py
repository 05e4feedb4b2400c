"""Ranges of keys: read as users write them, and turned into the tiles that they touch or hold wholly.

Plain torch on any device, which can be traced by torch.compile and captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_attention.maps.keep_map import ceil_div
from lite_attention.ops.checks import whole_number

__all__ = ["parse_ranges", "tiles_inside", "tiles_touched"]


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
    positions = []
    for index, given in enumerate(ranges):
        entry = whole_number(given)
        if entry is None:
            raise TypeError(f"{name}[{index}] is {given!r} of type {type(given).__name__}, expected an int")
        positions.append(entry)
        if entry < 0:
            raise ValueError(f"{name}[{index}] is {entry}, expected a position of at least 0")
        if entry > length:
            raise ValueError(f"{name}[{index}] is {entry}, expected at most the number of {tokens}, {length}")
    pairs = []
    for index in range(0, len(positions), 2):
        first, second = positions[index], positions[index + 1]
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
