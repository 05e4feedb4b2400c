"""The keep map: one bit per (batch, head, query tile, KV tile) that says whether the tile is computed.

A map is an int32 tensor ``[batch, heads, query_tiles, words]`` with ``words = ceil(kv_tiles / 32)``. Bit ``j % 32`` of
word ``j // 32`` stands for KV tile ``j``; bits past the last tile are 0. These helpers build maps and take them apart.
They are plain torch on any device and can be traced by torch.compile. They know nothing of kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_attention.maps.tiles import resolve_tile_n, tile_shape
from lite_attention.ops.call import check_tensors
from lite_attention.ops.checks import checked_int

WORD_BITS = 32

__all__ = [
    "WORD_BITS",
    "density",
    "full_keep_map",
    "keep_map_shape",
    "kept_tiles",
    "pack_keep_map",
    "tile_counts",
    "unpack_keep_map",
]


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer not below ``numerator / denominator``, for positive arguments."""
    return (numerator + denominator - 1) // denominator


def tile_counts(
    query_len: int, kv_len: int, head_dim: int, dtype: torch.dtype, tile_n: int | None = None
) -> tuple[int, int]:
    """How many (query tiles, KV tiles) cover sequences of these lengths; ``tile_n`` as for ``attention``.

    Raises:
        TypeError, ValueError: a length is negative or no int, or there are no such tiles; the text names the argument.
    """
    checked_int("query_len", query_len, lowest=0)
    checked_int("kv_len", kv_len, lowest=0)
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
    """Shape ``(batch, heads, query_tiles, words)`` of the packed map for these sequences.

    Raises:
        TypeError, ValueError: a size is negative or no int, or there are no such tiles; the text names the argument.
    """
    checked_int("batch", batch, lowest=0)
    checked_int("heads", heads, lowest=0)
    query_tiles, kv_tiles = tile_counts(query_len, kv_len, head_dim, dtype, tile_n)
    return batch, heads, query_tiles, ceil_div(kv_tiles, WORD_BITS)


def pack_keep_map(keep: Tensor) -> Tensor:
    """Pack a bool map ``[..., kv_tiles]`` into int32 words ``[..., ceil(kv_tiles / 32)]``.

    Raises:
        TypeError, ValueError: ``keep`` is no tensor of bool with a dimension of tiles.
    """
    check_tensors("pack_keep_map", keep=keep)
    if keep.dtype != torch.bool:
        raise TypeError(f"pack_keep_map: keep has dtype {keep.dtype}, expected torch.bool")
    if keep.dim() == 0:
        raise ValueError("pack_keep_map: keep has 0 dimensions, expected at least 1")
    words = ceil_div(keep.shape[-1], WORD_BITS)
    # Padded as integers: Inductor's C++ does not compile a padded bool of dynamic shape.
    padded = F.pad(keep.to(torch.int32), (0, words * WORD_BITS - keep.shape[-1]))
    bits: Tensor = padded.unflatten(-1, (words, WORD_BITS))
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=keep.device)
    return torch.sum(bits << shifts, -1, dtype=torch.int32)


def unpack_keep_map(packed: Tensor, kv_tiles: int) -> Tensor:
    """Unpack int32 words ``[..., words]`` into a bool map ``[..., kv_tiles]``.

    Raises:
        TypeError: ``packed`` is no int32 tensor, or ``kv_tiles`` no int.
        ValueError: ``packed`` has not the number of words that ``kv_tiles`` needs.
    """
    _check_packed("unpack_keep_map", packed, kv_tiles)
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :kv_tiles].to(torch.bool)


def _check_packed(function: str, packed: Tensor, kv_tiles: int) -> None:
    check_tensors(function, packed=packed)
    if packed.dtype != torch.int32:
        raise TypeError(f"{function}: packed has dtype {packed.dtype}, expected torch.int32")
    checked_int(f"{function}: kv_tiles", kv_tiles, lowest=0)
    words = packed.shape[-1] if packed.dim() > 0 else 0
    if words != ceil_div(kv_tiles, WORD_BITS):
        raise ValueError(
            f"{function}: packed has {words} words per row, "
            f"expected {ceil_div(kv_tiles, WORD_BITS)} for {kv_tiles} KV tiles"
        )


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

    Raises:
        TypeError, ValueError: a size is negative or no int, or there are no such tiles; the text names the argument.
    """
    _, kv_tiles = tile_counts(query_len, kv_len, head_dim, dtype, tile_n)
    row = pack_keep_map(torch.ones(kv_tiles, dtype=torch.bool, device=device))
    return row.repeat(*keep_map_shape(batch, heads, query_len, kv_len, head_dim, dtype, tile_n)[:-1], 1)


def kept_tiles(packed: Tensor, kv_tiles: int) -> Tensor:
    """Number of kept tiles in a packed map, int64 and 0-d, on the map's device (no synchronisation).

    Bits past the last tile do not count.

    Raises:
        TypeError, ValueError: as for :func:`unpack_keep_map`.
    """
    _check_packed("kept_tiles", packed, kv_tiles)
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
    """Kept tiles / all tiles of a packed map, fp32 and 0-d, on the map's device (no synchronisation).

    Raises:
        TypeError, ValueError: as for :func:`unpack_keep_map`.
    """
    _check_packed("density", packed, kv_tiles)
    rows = packed.numel() // packed.shape[-1]
    return kept_tiles(packed, kv_tiles).to(torch.float32) / (rows * kv_tiles)
