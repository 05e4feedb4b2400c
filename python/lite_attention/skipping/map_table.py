"""The keep maps of a layer: where they lie, whose they are, and what can be read from them from outside."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lite_attention.maps import tiles
from lite_attention.maps.keep_map import density, pack_keep_map, unpack_keep_map
from lite_attention.ops.call import check_tensors
from lite_attention.ops.modes import real_tensors
from lite_attention.ops.own_state import OwnState
from lite_attention.skipping.branches import MAX_BRANCHES
from lite_attention.skipping.slots import MapSlot, Owner, PassShape, Room

__all__ = ["ANY_GENERATION", "MAP_SLOTS", "NO_GENERATION", "MapTable", "follows"]

# A layer remembers the maps of this many (branch, shape) pairs; the oldest makes room for one more. As many as the
# graphs that torch.compile keeps of one function by default.
MAP_SLOTS = 8

# Two numbers that nobody counts to, as callers may begin with 0. ANY_GENERATION, the lower: of a map that was chosen,
# and that the next pass may use whatever it is told. NO_GENERATION: no pass was told one yet.
ANY_GENERATION = torch.iinfo(torch.int64).min + 1  # compilers spell the lowest of all as the negative of no int64
NO_GENERATION = ANY_GENERATION + 1


class MapTable(OwnState):
    """``MAP_SLOTS`` slots, one more for each exported pair, who owns them, and which of their maps count.

    Branches are numbers from 0 to ``MAX_BRANCHES - 1``; who calls has checked them.

    Args:
        dense_steps: so many passes from the start of a generation start from the full map.
    """

    live: Tensor
    """Stamp of each branch's latest pass, negative after a reset, 0 before the first: int64 ``[MAX_BRANCHES]``."""

    passes: Tensor
    """Passes of each branch since its last reset: int64 ``[MAX_BRANCHES]``; 0 after a pass with ``start_full``."""

    generations: Tensor
    """Number that each branch's latest pass was told: int64 ``[MAX_BRANCHES]``.

    NO_GENERATION after a reset, ANY_GENERATION where a map was chosen since.
    """

    def __init__(self, dense_steps: int) -> None:
        super().__init__()
        self.dense_steps = dense_steps
        self.counts_passes = dense_steps > 1  # the first pass starts from the full map by itself
        # The slot and the stamp of each pair that has room, the oldest first.
        self._rooms: dict[Owner, Room] = {}
        # Those that compiled code goes on to use, also after another pair was given the slot.
        self._traced_rooms: dict[Room, Owner] = {}
        # Those whose memory a program shares: they keep their slots, and others have as many beside them as before.
        self._exported: set[Owner] = set()
        with real_tensors():
            self.slots = nn.ModuleList(MapSlot(torch.device("cpu")) for _ in range(MAP_SLOTS))

    def fresh_buffers(self, device: torch.device) -> dict[str, Tensor]:
        """All but the maps."""
        first = {"live": 0, "passes": 0, "generations": NO_GENERATION}
        return {
            name: torch.full((MAX_BRANCHES,), value, dtype=torch.int64, device=device) for name, value in first.items()
        }

    @torch.compiler.disable
    def start_over(self, device: torch.device) -> None:
        """As OwnState's, without any map."""
        with real_tensors():
            blank = [MapSlot.fresh_buffers(device) for _ in self.slots]
        super().start_over(device)
        self._rooms.clear()
        self._traced_rooms.clear()
        self._exported.clear()
        for slot, buffers in zip(self.slots, blank, strict=True):
            for name, buffer in buffers.items():
                setattr(slot, name, buffer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._exported = set()  # a copy shares nothing with a program
        if any(shape.device != self.device for _, shape in self._rooms):  # loaded to another device
            self.start_over(self.device)

    def after_export(self) -> None:
        with real_tensors():
            while len(self.slots) < MAP_SLOTS + len(self._exported):
                self.slots.append(MapSlot(self.device))

    @property
    def device(self) -> torch.device:
        return self.live.device

    def owners(self) -> list[Owner]:
        """The pairs of branch and shape that have room for a map, the oldest first."""
        return list(self._rooms)

    def slot(self, index: int) -> MapSlot:
        return self.slots[index]  # type: ignore[return-value]

    def skipped_tiles(self, branch: int) -> Tensor:
        """Tiles that the branch's next pass will skip, and all tiles: fp32 ``[2]``, on the device, without a sync.

        Both are 0 before the first pass and after a reset.
        """
        counts = torch.zeros(2, dtype=torch.float32, device=self.device)
        for slot, shape, stamp in self._maps_of(branch):
            all_tiles = math.prod(shape.map_shape()[:-1]) * shape.kv_tiles()
            skipped = (1.0 - density(slot.words, shape.kv_tiles())) * all_tiles
            both = torch.stack([skipped, torch.full_like(skipped, all_tiles)])
            counts = torch.where(self._counts_next(slot, branch, stamp), both, counts)
        return counts

    def keep_map(self, branch: int, caller: str) -> Tensor:
        """The map that the branch's next pass will use: bool ``[batch, heads, query_tiles, kv_tiles]``.

        Waits for the device, as all that follows.

        Raises:
            RuntimeError: the branch has not run yet, so its shape is unknown; the text begins with ``caller``.
        """
        slot, shape, stamp = self._last_map(branch, caller)
        if bool(self._counts_next(slot, branch, stamp)):
            return unpack_keep_map(slot.words, shape.kv_tiles())
        return slot.words.new_ones(*shape.map_shape()[:-1], shape.kv_tiles(), dtype=torch.bool)

    def set_keep_map(self, keep_map: Tensor, branch: int, caller: str) -> None:
        """Choose the map of the branch's next pass; bool, of the map's sizes or 1 in their place.

        It is used in whatever generation that pass is, and belongs to it from then on.

        Raises:
            RuntimeError: the branch has not run yet, so its shape is unknown.
            TypeError, ValueError: ``keep_map`` is not bool or does not broadcast to the branch's map.
        """
        check_tensors(caller, keep_map=keep_map)
        if keep_map.dtype != torch.bool:
            raise TypeError(f"{caller}: keep_map has dtype {keep_map.dtype}, expected torch.bool")
        slot, shape, stamp = self._last_map(branch, caller)
        expected = (*shape.map_shape()[:-1], shape.kv_tiles())
        sizes = list(keep_map.shape)
        if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, expected, strict=True)):
            raise ValueError(f"{caller}: keep_map has shape {sizes}, expected {list(expected)} or sizes of 1")
        slot.words.copy_(pack_keep_map(keep_map.expand(expected).to(shape.device)))
        slot.stamp.fill_(stamp)
        self.live[branch].fill_(stamp)
        self.passes[branch].fill_(self.dense_steps)  # a map that was chosen is used
        self.generations[branch].fill_(ANY_GENERATION)

    def map_words(self, branch: int, caller: str) -> Tensor:
        """The packed map that the branch's latest pass left, in place, whether or not it counts.

        Raises:
            RuntimeError: the branch has not run yet.
        """
        return self._last_map(branch, caller)[0].words

    def last_shape(self, branch: int, caller: str) -> PassShape:
        """Of the branch's latest pass.

        Raises:
            RuntimeError: the branch has not run yet.
        """
        return self._last_map(branch, caller)[1]

    def tile_shape(self, branch: int, caller: str) -> tuple[int, int]:
        """Rows of a query tile and keys of a KV tile in the branch's map."""
        shape = self.last_shape(branch, caller)
        return tiles.tile_shape(shape.head_dim, shape.dtype)

    def used_branches(self) -> list[int]:
        """Branches that have had a skipping pass."""
        return [branch for branch, live in enumerate(self.live.tolist()) if live != 0]

    def _last_map(self, branch: int, caller: str) -> tuple[MapSlot, PassShape, int]:
        """Slot, shape and stamp of the branch's latest pass, whether its map still counts or was reset."""
        live = abs(int(self.live[branch]))
        for slot, shape, stamp in self._maps_of(branch):
            if live == stamp:
                return slot, shape, stamp
        raise RuntimeError(f"{caller}: branch {branch} has no keep map yet, expected a skipping pass before")

    def _maps_of(self, branch: int) -> list[tuple[MapSlot, PassShape, int]]:
        """Each map that a pass of the branch may have left, with the stamp that tells whether it did."""
        rooms = self._traced_rooms | {room: owner for owner, room in self._rooms.items()}
        return [
            (self.slot(index), shape, stamp)
            for (index, stamp), (of_branch, shape) in rooms.items()
            if of_branch == branch and self.slot(index).words.shape == shape.map_shape()
        ]

    def _counts_next(self, slot: MapSlot, branch: int, stamp: int) -> Tensor:
        """Whether the branch's next pass will start from the slot's map: bool, 0-d.

        After a pass with ``start_full``, the next is taken to be given one that is False.
        """
        counts = follows(slot, self.live[branch], stamp)
        if self.counts_passes:
            passes = self.passes[branch]
            counts = counts & ((passes == 0) | (passes >= self.dense_steps))
        return counts


def follows(slot: MapSlot, live: Tensor, stamp: int) -> Tensor:
    """Whether the slot's map is of the pass before, in this branch and shape: bool, 0-d."""
    return (live == stamp) & (slot.stamp == stamp)
