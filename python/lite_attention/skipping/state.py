"""What a layer remembers from pass to pass: its keep maps, and the threshold that decides about them.

Everything that changes between passes (maps, thresholds, resets, which shape a map belongs to) is a registered buffer
that is written in place and stays out of the state_dict. So a compiled or captured forward reads today's values, and
nothing in forward waits for the device.

How a map is found, and why it is never stale:

* A state owns ``MAP_SLOTS`` slots. A slot belongs to one (branch, shape) at a time and holds that pair's map; shape
  means batch, lengths, heads, head dim, dtype and device.
* Each (branch, shape) has a fixed number, its stamp. A pass writes its stamp beside the map it wrote and beside its
  branch. A map counts only while both carry the pass's own stamp; otherwise the pass starts from the full map.
  So a pass with another shape, a slot given to someone else and a reset (negative stamps) need no new compilation.
* A pass that is told the number of its generation uses no map of another one, whatever became of the passes between:
  the layer may have been dense, or left out, when the generation began.

Who makes room: a pass that finds none for its pair. Under torch.compile that is a trace, and where blocks are compiled
one by one, the code made of the first block must fit the others, which have no room yet and would fail its guards one
after the other. So a state that makes room while it is traced makes the same in its sisters: the states of the
outermost module that is being called and holds it, which is the model as it runs, and those that :func:`share_room`
put together with it. Other models are out of reach, however much alike (docs/design-notes.md tells what else was
thought of).

Over 400 lines: what is read from outside gets a file of its own next.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lite_attention.maps import tiles
from lite_attention.maps.keep_map import density, pack_keep_map, unpack_keep_map
from lite_attention.ops.modes import make_buffers_ordinary, ordinary_tensors
from lite_attention.skipping.branches import MAX_BRANCHES
from lite_attention.skipping.policy import SkipPolicy
from lite_attention.skipping.shared_room import SharedRoom, note_lonely_trace, running_model
from lite_attention.skipping.slots import MapSlot, Owner, PassShape, stamp_of

__all__ = ["MAP_SLOTS", "Recalled", "SkipState", "share_room"]

# A layer remembers the maps of this many (branch, shape) pairs; the oldest makes room for one more. As many as the
# graphs that torch.compile keeps of one function by default.
MAP_SLOTS = 8

_logger = logging.getLogger("lite_attention")

# Room is made rarely, and by one thread at a time: the first passes of several threads meet in one state.
_making_room = threading.Lock()


class Recalled(NamedTuple):
    """A pass that has begun: its map, and where the next one goes."""

    keep: Tensor
    """Packed, int32; its bits past the last tile are undefined."""
    follows: Tensor
    """Whether the slot holds the map of the pass before, in the same generation: bool, 0-d."""
    slot: MapSlot
    live: Tensor
    stamp: int


class SkipState(nn.Module):
    """The maps of one attention layer, one for each (branch, shape), with its threshold and its count of passes.

    Branches are numbers from 0 to ``MAX_BRANCHES - 1``; who calls has checked them.

    Args:
        policy: of the layer; its threshold can be changed later.
        verbose: log what starts over, and why, to the logger ``lite_attention``.
    """

    threshold: Tensor
    """In powers of two, fp32, 0-d or ``[heads]``."""

    live: Tensor
    """Stamp of each branch's latest pass, negative after a reset, 0 before the first: int64 ``[MAX_BRANCHES]``."""

    passes: Tensor
    """Passes of each branch since its last reset: int64 ``[MAX_BRANCHES]``; 0 after a pass with ``start_full``."""

    generations: Tensor
    """Number of the generation that each branch's latest pass was told: int64 ``[MAX_BRANCHES]``, 0 before."""

    layout_version: int
    """Grows whenever a CUDA graph captured before is out of date: a buffer in use was replaced."""

    def __init__(self, policy: SkipPolicy, verbose: bool = False) -> None:
        super().__init__()
        self.layout_version = 0
        self.threshold_values = policy.threshold
        self.dense_steps = policy.dense_steps
        self._counts_passes = policy.dense_steps > 1  # the first pass starts from the full map by itself
        self._verbose = verbose
        self._last_shapes: dict[int, PassShape] = {}  # kept for the log alone
        # The slot and the stamp of each pair that has room, the oldest first.
        self._rooms: dict[Owner, tuple[int, int]] = {}
        self._shared_room: SharedRoom[SkipState] | None = None
        with ordinary_tensors():
            for name in ("threshold", "live", "passes", "generations"):
                self.register_buffer(name, None, persistent=False)
            self.slots = nn.ModuleList(MapSlot() for _ in range(MAP_SLOTS))
            self._fill(None)

    def _fill(self, device: torch.device | None) -> None:
        """New buffers for all but the maps."""
        self.threshold = torch.tensor(self.threshold_values, dtype=torch.float32, device=device)
        self.live = torch.zeros(MAX_BRANCHES, dtype=torch.int64, device=device)
        self.passes = torch.zeros(MAX_BRANCHES, dtype=torch.int64, device=device)
        self.generations = torch.zeros(MAX_BRANCHES, dtype=torch.int64, device=device)

    # One pass: find room, recall the map, remember the next one. All of it can be traced and captured.

    @torch.compiler.assume_constant_result
    def room_for(
        self,
        branch: int,
        batch: int,
        query_len: int,
        kv_len: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        compiling: bool,
    ) -> tuple[int, int]:
        """(slot, stamp) of this branch and shape; makes room for its map if there is none yet.

        Under torch.compile this runs while the graph is traced and its result is a constant of the graph. What it says
        never goes out of date for the shapes that the graph is guarded on: a slot taken by another pair since then has
        another size, which retraces, or another stamp, which the graph sees as a full map.
        """
        shape = PassShape(batch, query_len, kv_len, heads, kv_heads, head_dim, dtype, device)
        owner = (branch, shape)
        if self._verbose:
            self._log_change(branch, shape)
        room = self._rooms.get(owner)
        if room is None:
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    f"LiteAttention: no room for a keep map of these inputs ({shape}) to export; call the module once "
                    "on inputs of this shape and branch before torch.export"
                )
            with _making_room, ordinary_tensors():
                for state in self._states_without_room(owner) if compiling else [self]:
                    state._make_room(owner)
            room = self._rooms[owner]
        return room

    def recall(
        self, room: tuple[int, int], branch: int, start_full: Tensor | None, generation: Tensor | None
    ) -> Recalled:
        """The map that this pass starts from.

        Args:
            room: of this pass, from :meth:`room_for`.
            start_full: bool, 0-d; where True, the full map. None where the state itself counts its dense passes.
            generation: number of the pass's generation, int64, 0-d; the full map where the pass before had another.
                None where nobody counts them.
        """
        index, stamp = room
        slot, live = self._slot(index), self.live[branch]
        follows = _follows(slot, live, stamp)
        if generation is not None:
            follows = follows & (self.generations[branch] == generation)
        current = follows
        if start_full is not None:
            current = current & ~start_full
        elif self._counts_passes:
            current = current & (self.passes[branch] >= self.dense_steps)
        return Recalled(torch.where(current, slot.words, -1), follows, slot, live, stamp)

    def remember(
        self,
        recalled: Recalled,
        branch: int,
        next_keep: Tensor,
        start_full: Tensor | None,
        generation: Tensor | None,
    ) -> None:
        """Note the map of the branch's next pass; the other arguments as :meth:`recall` had them."""
        _, follows, slot, live, stamp = recalled
        if self._counts_passes:
            passes = self.passes[branch]
            if start_full is None:
                passes.copy_(torch.where(follows, passes + 1, 1))
            else:
                passes.zero_()
        slot.words.copy_(next_keep)
        slot.stamp.fill_(stamp)
        live.fill_(stamp)
        if generation is not None:
            self.generations[branch].copy_(generation)

    def note_dense_pass(
        self, branch: int, device: torch.device, start_full: Tensor | None, generation: Tensor | None
    ) -> None:
        """Let the branch's map not count any more where a pass that does not use it begins a generation.

        Args:
            device: of the pass.
            start_full, generation: as :meth:`recall` has them.
        """
        if start_full is None and generation is None:
            return
        if self.device != device:
            self.reset(branch)  # no map on this device; that of another is not asked, which would wait for it
            return
        begins = start_full
        if generation is not None:
            is_other = self.generations[branch] != generation
            begins = is_other if begins is None else begins | is_other
        live = self.live[branch]
        live.copy_(torch.where(begins, -live.abs(), live))  # type: ignore[arg-type]

    # Room

    def _states_without_room(self, owner: Owner) -> list[SkipState]:
        """The state and its sisters that have so far made the same room: what one compiled code can serve."""
        model = running_model(self)
        sisters = set() if model is None else set(_states_in(model))
        if self._shared_room is not None:
            sisters.update(self._shared_room.members)
        elif sisters <= {self}:
            note_lonely_trace(self, model, owner)
        rooms = [*self._rooms.items()]
        alike = (state for state in sisters - {self} if [*state._rooms.items()] == rooms)
        return [self, *(state for state in alike if state.device == self.device)]

    def _make_room(self, owner: Owner) -> None:
        branch, shape = owner
        if owner in self._rooms:
            return  # another thread was faster
        if self.device != shape.device:
            self.start_over(shape.device)
        given_away = self._owner_to_give_way(branch) if len(self._rooms) == MAP_SLOTS else None
        index = len(self._rooms) if given_away is None else self._rooms[given_away][0]
        self._slot(index).fit(shape)
        # Noted only now: a slot that could not be allocated is nobody's.
        if given_away is not None:
            del self._rooms[given_away]
            self.outdate_captured_graphs()
        self._rooms[owner] = index, stamp_of(owner)

    def _owner_to_give_way(self, branch: int) -> Owner:
        """The oldest of the same branch, whose map of another shape is out of date; else the oldest of all."""
        owner = next((owner for owner in self._rooms if owner[0] == branch), next(iter(self._rooms)))
        if self._verbose:
            _logger.info("all %d slots are taken: the map of branch %d and (%s) makes room", MAP_SLOTS, *owner)
        return owner

    def _log_change(self, branch: int, shape: PassShape) -> None:
        last = self._last_shapes.get(branch)
        if last is not None and last != shape:
            _logger.info("branch %d: skip state reset, the inputs changed from (%s) to (%s)", branch, last, shape)
        self._last_shapes[branch] = shape

    def owners(self) -> list[Owner]:
        """The pairs of branch and shape that have room for a map, the oldest first."""
        return list(self._rooms)

    def _slot(self, index: int) -> MapSlot:
        return self.slots[index]  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.live.device

    # Starting over

    def reset(self, branch: int | None = None) -> None:
        """Forget what was dropped, in one branch or in all of them."""
        live = self.live if branch is None else self.live[branch]
        # No stamp is negative, so no map counts as current; keep_map() still sees which shape was.
        live.abs_().neg_()

    def start_over(self, device: torch.device) -> None:
        """Threshold and empty state on a device, from what Python knows alone."""
        with ordinary_tensors():
            self._fill(device)
            self._rooms.clear()
            for index in range(MAP_SLOTS):
                self._slot(index).empty(device)
        self.outdate_captured_graphs()

    def outdate_captured_graphs(self) -> None:
        """Let CUDA graphs captured before refuse to run: something they hold of this layer has changed."""
        self.layout_version += 1

    def set_threshold(self, values: float | tuple[float, ...]) -> None:
        """Another threshold from the next pass on, written in place where there are as many values as before."""
        if isinstance(values, float) and self.threshold.dim() == 0:
            self.threshold.fill_(values)
        else:
            with ordinary_tensors():
                new = torch.tensor(values, dtype=torch.float32, device=self.device)
            if new.shape == self.threshold.shape:
                self.threshold.copy_(new)
            else:
                self.threshold = new
                self.outdate_captured_graphs()
        self.threshold_values = values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SkipState:
        """As nn.Module's, but the threshold stays fp32, and what was moved (``.to``, ``to_empty``) starts over."""
        threshold, live = self.threshold, self.live
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.live is not live:
            self.start_over(self.device)
        elif self.threshold is not threshold:
            self.threshold = threshold
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        make_buffers_ordinary(self)
        if self._shared_room is not None:
            self._shared_room.members.add(self)

    # Introspection

    def skipped_tiles(self, branch: int) -> Tensor:
        """Tiles that the branch's next pass will skip, and all tiles: fp32 ``[2]``, on the device, without a sync.

        Both are 0 before the first pass and after a reset.
        """
        counts = torch.zeros(2, device=self.device)
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

        Raises:
            RuntimeError: the branch has not run yet, so its shape is unknown.
            TypeError, ValueError: ``keep_map`` is not bool or does not broadcast to the branch's map.
        """
        slot, shape, stamp = self._last_map(branch, caller)
        expected = (*shape.map_shape()[:-1], shape.kv_tiles())
        sizes = list(keep_map.shape)
        if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, expected, strict=True)):
            raise ValueError(f"{caller}: keep_map has shape {sizes}, expected {list(expected)} or sizes of 1")
        slot.words.copy_(pack_keep_map(keep_map.expand(expected).to(shape.device)))
        slot.stamp.fill_(stamp)
        self.live[branch].fill_(stamp)
        self.passes[branch].fill_(self.dense_steps)  # a map that was chosen is used

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
        return [
            (self._slot(index), shape, stamp)
            for (of_branch, shape), (index, stamp) in self._rooms.items()
            if of_branch == branch
        ]

    def _counts_next(self, slot: MapSlot, branch: int, stamp: int) -> Tensor:
        """Whether the branch's next pass will start from the slot's map: bool, 0-d.

        After a pass with ``start_full``, the next is taken to be given one that is False.
        """
        counts = _follows(slot, self.live[branch], stamp)
        if self._counts_passes:
            passes = self.passes[branch]
            counts = counts & ((passes == 0) | (passes >= self.dense_steps))
        return counts


def _follows(slot: MapSlot, live: Tensor, stamp: int) -> Tensor:
    """Whether the slot's map is of the pass before, in this branch and shape: bool, 0-d."""
    return (live == stamp) & (slot.stamp == stamp)


def share_room(*modules: nn.Module) -> None:
    """Let the layers in these modules make room together when one of them is compiled.

    For layers that no module holds and calls at the same time: a handle that keeps the layers of a model beside it, or
    of several models. Layers of one model find each other without.
    """
    room: SharedRoom[SkipState] = SharedRoom()
    for module in modules:
        for state in _states_in(module):
            state._shared_room = room
            room.members.add(state)


def _states_in(module: nn.Module) -> Iterator[SkipState]:
    return (part for part in module.modules() if isinstance(part, SkipState))
