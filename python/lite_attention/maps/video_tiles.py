"""Videos cut into tiles: a grid of tokens in cubes, and the orders and slots that attention over cubes needs.

Tokens of a video lie in raster order: frame by frame, row by row. In *tile order* the tokens of a tile follow each
other; tiles go by time, then height, then width, and so do the tokens inside of one. A tile at the far border is cut
off where the grid ends. *Padded slots* give every tile equally many places in a row, of which its tokens take the
first. Everything here is plain torch on any device, waits for no device, and can be traced by torch.compile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lite_attention.maps.keep_map import ceil_div
from lite_attention.maps.kept import KeptTensors
from lite_attention.ops.call import check_tensors
from lite_attention.ops.checks import as_int, checked_int

__all__ = ["VideoTiles", "pad_tiles", "tile_tokens", "unpad_tiles", "untile_tokens"]

Size = tuple[int, int, int]


def check_size(what: str, size: object) -> Size:
    """``size``, if it is a tuple of three positive integers; those of numpy become ints.

    Raises:
        TypeError, ValueError: it is not; the text begins with ``what``.
    """
    entries = [as_int(entry) for entry in size] if isinstance(size, tuple) else [None]
    integers = [entry for entry in entries if entry is not None]
    if len(integers) != len(entries):
        raise TypeError(f"{what} is {size!r}, expected a tuple of integers: (time, height, width)")
    if len(integers) != 3 or min(integers) < 1:
        raise ValueError(f"{what} is {size}, expected three integers of at least 1: (time, height, width)")
    return integers[0], integers[1], integers[2]


@dataclass(frozen=True)
class VideoTiles:
    """A grid of ``T x H x W`` tokens in tiles of some size, which need not divide the grid.

    It keeps the index tensors that it makes, for each device and CUDA stream; they go when it goes. Copies make theirs
    anew. What its methods return are these tensors themselves: to be read, not written.

    Args:
        grid: (time, height, width) in tokens.
        tile: (time, height, width) of a whole tile, in tokens.

    Raises:
        TypeError, ValueError: a size is not three positive integers.
    """

    grid: Size
    tile: Size
    _kept: KeptTensors = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", check_size("VideoTiles: grid", self.grid))
        object.__setattr__(self, "tile", check_size("VideoTiles: tile", self.tile))
        object.__setattr__(self, "_kept", KeptTensors())

    def __reduce__(self) -> tuple[type[VideoTiles], tuple[Size, Size]]:
        """Two sizes are all there is to copy or pickle."""
        return VideoTiles, (self.grid, self.tile)

    @property
    def counts(self) -> Size:
        """Tiles along time, height and width."""
        (time, height, width), (tile_time, tile_height, tile_width) = self.grid, self.tile
        return ceil_div(time, tile_time), ceil_div(height, tile_height), ceil_div(width, tile_width)

    @property
    def number(self) -> int:
        """How many tiles there are."""
        return math.prod(self.counts)

    @property
    def volume(self) -> int:
        """Tokens of a whole tile."""
        return math.prod(self.tile)

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def exact(self) -> bool:
        """Whether the tile divides the grid, so that every tile is whole."""
        return self.tokens == self.number * self.volume

    def order(self, device: torch.device) -> Tensor:
        """int64 ``[tokens]``: the raster index of each token in tile order. ``x[order]`` is in tile order."""
        return self._kept.get("order", device, lambda: _order(self, device))

    def positions(self, device: torch.device) -> Tensor:
        """int64 ``[tokens]``: the place in tile order of each token in raster order, the inverse of :meth:`order`."""
        return self._kept.get("positions", device, lambda: _positions(self, device))

    def sizes(self, device: torch.device) -> Tensor:
        """int32 ``[number]``: how many tokens each tile has."""
        return self._kept.get("sizes", device, lambda: _sizes(self, device))

    def slots(self, block: int, device: torch.device) -> Tensor:
        """int64 ``[tokens]``: the slot of each token in tile order, where each tile owns ``block`` consecutive slots.

        Raises:
            TypeError, ValueError: ``block`` is no int, or a whole tile has more than ``block`` tokens.
        """
        self._check_block(block)
        return self._kept.get(("slots", block), device, lambda: _slots(self, block, device))

    def raster_slots(self, block: int, device: torch.device) -> Tensor:
        """int64 ``[tokens]``: as :meth:`slots`, of each token in raster order.

        Raises:
            TypeError, ValueError: ``block`` is no int, or a whole tile has more than ``block`` tokens.
        """
        self._check_block(block)
        return self._kept.get(("raster_slots", block), device, lambda: _raster_slots(self, block, device))

    def _check_block(self, block: int) -> None:
        if checked_int("VideoTiles: block", block) < self.volume:
            raise ValueError(f"VideoTiles: block is {block}, expected at least {self.volume}, the tokens of a tile")


class _Axis(NamedTuple):
    """Of each token along an axis, shaped to broadcast over the grid."""

    tile: Tensor
    """Index of its tile."""
    place: Tensor
    """Place inside the tile."""
    size: Tensor
    """Tokens of the tile along this axis: fewer in the last one, if it is cut off."""


def _axis_sizes(index: Tensor, length: int, tile: int) -> Tensor:
    # Not the smaller of tile and what is left: torch 2.11's Inductor fails on a minimum of index expressions.
    last = ceil_div(length, tile) - 1
    return torch.full_like(index, tile).masked_fill(index == last, length - last * tile)


def _axes(tiles: VideoTiles, device: torch.device) -> tuple[_Axis, _Axis, _Axis]:
    def axis(length: int, tile: int, *shape: int) -> _Axis:
        token = torch.arange(length, device=device).view(shape)
        return _Axis(token // tile, token % tile, _axis_sizes(token // tile, length, tile))

    (frames, rows, columns), (tile_frames, tile_rows, tile_columns) = tiles.grid, tiles.tile
    return axis(frames, tile_frames, -1, 1, 1), axis(rows, tile_rows, -1, 1), axis(columns, tile_columns, -1)


def _places(time: _Axis, height: _Axis, width: _Axis) -> Tensor:
    """int64 ``[T, H, W]``: the place of each token among those of its tile."""
    return (time.place * height.size + height.place) * width.size + width.place


def _positions(tiles: VideoTiles, device: torch.device) -> Tensor:
    time, height, width = _axes(tiles, device)
    _, rows, columns = tiles.grid
    tile_frames, tile_rows, tile_columns = tiles.tile
    # Tokens in front of a tile: earlier frames; in its own frames, earlier rows; in its own rows, earlier columns.
    earlier_columns = width.tile * tile_columns
    earlier_rows = height.tile * (tile_rows * columns) + height.size * earlier_columns
    start = time.tile * (tile_frames * rows * columns) + time.size * earlier_rows
    return (start + _places(time, height, width)).flatten()


def _order(tiles: VideoTiles, device: torch.device) -> Tensor:
    positions = tiles.positions(device)
    return torch.empty_like(positions).scatter_(0, positions, torch.arange(tiles.tokens, device=device))


def _sizes(tiles: VideoTiles, device: torch.device) -> Tensor:
    frames, rows, columns = (
        _axis_sizes(torch.arange(count, dtype=torch.int32, device=device), length, tile)
        for count, length, tile in zip(tiles.counts, tiles.grid, tiles.tile, strict=True)
    )
    return (frames[:, None, None] * rows[:, None] * columns).flatten()


def _raster_slots(tiles: VideoTiles, block: int, device: torch.device) -> Tensor:
    time, height, width = _axes(tiles, device)
    _, down, across = tiles.counts
    tile = (time.tile * down + height.tile) * across + width.tile
    return (tile * block + _places(time, height, width)).flatten()


def _slots(tiles: VideoTiles, block: int, device: torch.device) -> Tensor:
    return _raster_slots(tiles, block, device)[tiles.order(device)]


def _check_arguments(function: str, x: Tensor, dim: int, tiles: VideoTiles) -> None:
    check_tensors(function, x=x)
    if not isinstance(tiles, VideoTiles):
        raise TypeError(f"{function}: tiles has type {type(tiles).__name__}, expected VideoTiles")
    checked_int(f"{function}: dim", dim, -x.dim(), x.dim() - 1)


def _check_length(function: str, x: Tensor, dim: int, expected: int, what: str) -> None:
    if x.shape[dim] != expected:
        raise ValueError(f"{function}: x has {x.shape[dim]} entries in dimension {dim}, expected {expected}, {what}")


def _check_tokens(function: str, x: Tensor, dim: int, tiles: VideoTiles) -> None:
    _check_arguments(function, x, dim, tiles)
    if x.shape[dim] != tiles.tokens:  # words are for errors alone: Dynamo makes none of a size that may change
        _check_length(function, x, dim, tiles.tokens, "the tokens of the grid " + "x".join(map(str, tiles.grid)))


def tile_tokens(x: Tensor, tiles: VideoTiles, dim: int) -> Tensor:
    """Tokens along ``dim`` from raster order into tile order; ``x`` may have any dtype and other sizes.

    Raises:
        TypeError, ValueError: an argument does not fit: ``x`` has as many entries in ``dim`` as the grid has tokens.
    """
    _check_tokens("tile_tokens", x, dim, tiles)
    return x.index_select(dim, tiles.order(x.device))


def untile_tokens(x: Tensor, tiles: VideoTiles, dim: int) -> Tensor:
    """Tokens along ``dim`` from tile order back into raster order: the inverse of :func:`tile_tokens`.

    Raises:
        TypeError, ValueError: an argument does not fit: ``x`` has as many entries in ``dim`` as the grid has tokens.
    """
    _check_tokens("untile_tokens", x, dim, tiles)
    return x.index_select(dim, tiles.positions(x.device))


def pad_tiles(x: Tensor, tiles: VideoTiles, block: int, dim: int) -> Tensor:
    """Tokens along ``dim`` from tile order into slots: ``block`` for each tile, those without a token 0.

    Where every tile fills its slots the result is ``x`` itself.

    Raises:
        TypeError, ValueError: an argument does not fit: ``x`` has as many entries in ``dim`` as the grid has tokens,
            and ``block`` is at least a tile's.
    """
    _check_tokens("pad_tiles", x, dim, tiles)
    slots = tiles.slots(block, x.device)
    length = tiles.number * block
    if length == tiles.tokens:
        return x
    shape = list(x.shape)
    shape[dim] = length
    return x.new_zeros(shape).index_copy(dim, slots, x)


def unpad_tiles(x: Tensor, tiles: VideoTiles, block: int, dim: int) -> Tensor:
    """Tokens along ``dim`` from slots back into tile order: the inverse of :func:`pad_tiles`.

    Where every tile fills its slots the result is ``x`` itself.

    Raises:
        TypeError, ValueError: an argument does not fit: ``x`` has ``block`` entries in ``dim`` for each tile, and
            ``block`` is at least a tile's.
    """
    _check_arguments("unpad_tiles", x, dim, tiles)
    length = tiles.number * checked_int("unpad_tiles: block", block, lowest=1)
    _check_length("unpad_tiles", x, dim, length, f"{block} slots for each of {tiles.number} tiles")
    slots = tiles.slots(block, x.device)
    return x if length == tiles.tokens else x.index_select(dim, slots)
