"""The grain of the keep map by head dim: one table, written once in C++ (cpp/rules/tile_shape.h)."""

from typing import NamedTuple

import torch

from lite_attention.ops import backends
from lite_attention.ops.checks import equals_any
from lite_attention.ops.load import host


class _TileShape(NamedTuple):
    max_head_dim: int
    tile_m: int
    tile_n: int
    visit_rows: int


# Plain tuples rather than calls into the host module, so that torch.compile traces through the look-up.
_TABLE = tuple(_TileShape(*row) for row in host.tile_shapes())
MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = backends.MAX_HEAD_DIM, backends.HEAD_DIM_MULTIPLE
SUPPORTED_DTYPES = backends.DTYPES
HEAD_DIMS = range(HEAD_DIM_MULTIPLE, MAX_HEAD_DIM + 1, HEAD_DIM_MULTIPLE)
FINE_TILE_N: int = host.FINE_TILE_N  # the other grain along the keys, of every head dim
UNLIMITED: int = torch.iinfo(torch.int32).max  # the recent_size of a head that sees all keys up to its position


def _look_up(head_dim: int, dtype: torch.dtype) -> _TileShape:
    if head_dim < 1 or head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE != 0:
        raise ValueError(f"head_dim is {head_dim}, expected a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}")
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, SUPPORTED_DTYPES))}")
    for row in _TABLE:
        if head_dim <= row.max_head_dim:
            return row
    raise AssertionError("unreachable: the table ends at MAX_HEAD_DIM")


def tile_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a query tile and keys of a KV tile: the grain of the keep map.

    Args:
        head_dim: D of q and k, a multiple of 8 up to 256.
        dtype: of q, k and v; today every supported dtype has the same tiles.

    Returns:
        (tile_m, tile_n), in query rows and in keys.

    Raises:
        ValueError: head_dim or dtype is not supported.
    """
    row = _look_up(head_dim, dtype)
    return row.tile_m, row.tile_n


def visit_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Query rows that a kernel walks together and that start at the same KV tile; a multiple of tile_m.

    Args:
        head_dim: D of q and k, a multiple of 8 up to 256.
        dtype: of q, k and v.

    Raises:
        ValueError: head_dim or dtype is not supported.
    """
    return _look_up(head_dim, dtype).visit_rows


def resolve_tile_n(head_dim: int, tile_n: int | None) -> int:
    """Keys per KV tile of a map: ``tile_n`` where it is a grain that the kernels have, and the default for None.

    Raises:
        ValueError: head_dim is not supported, or the kernels have no such grain for it.
    """
    default = _look_up(head_dim, SUPPORTED_DTYPES[0]).tile_n
    if tile_n is None:
        return default
    if not equals_any(tile_n, default, FINE_TILE_N):
        grains = " or ".join(map(str, sorted({default, FINE_TILE_N}, reverse=True)))
        raise ValueError(f"tile_n is {tile_n}, expected {grains} for head_dim {head_dim}")
    return tile_n
