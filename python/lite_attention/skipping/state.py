"""What a layer remembers from pass to pass: its keep maps, and the threshold that decides about them.

Everything that changes between passes (maps, thresholds, resets, which shape a map belongs to) is a buffer that is
written in place, and nobody's but the layer's (``ops/own_state.py``). So a compiled or captured forward reads today's
values, and nothing in forward waits for the device.

How a map is found, and why it is never stale:

* A state owns ``MAP_SLOTS`` slots. A slot belongs to one (branch, shape) at a time and holds that pair's map; shape
  means batch, lengths, heads, head dim, dtype and device.
* Each (branch, shape) has a fixed number in each slot, its stamp. A pass writes its stamp beside the map it wrote and
  beside its branch. A map counts only while both carry the pass's own stamp; otherwise the pass starts from the full
  map. So a pass with another shape, a slot given to someone else and a reset (negative stamps) need no new compilation:
  code that was compiled with a slot its pair has lost goes on writing there, and counts on it only after itself.
* A pass that is told the number of its generation uses no map of another one, whatever became of the passes between:
  the layer may have been dense, or left out, when the generation began. A map that was chosen by hand is of the
  generation of the pass that comes next.

Who makes room: a pass that finds none for its pair, once the operator has computed it, so that a call that is refused
gives nobody's slot away. Under torch.compile room is there before: it is made by the trace. Where blocks are compiled
one by one, the code made of the first block must fit the others, which have no room yet and would fail its guards one
after the other. So a state that makes room while it is traced makes the same in its sisters: the states of the
outermost module that is being called and holds it, which is the model as it runs, and those that :func:`share_room`
put together with it. Other models are out of reach, however much alike (docs/design-notes.md tells what else was
thought of).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lite_attention.ops.modes import ordinary_tensors, real_tensors
from lite_attention.ops.own_state import held_states, running_model
from lite_attention.skipping.map_table import ANY_GENERATION, NO_GENERATION, MapTable, follows
from lite_attention.skipping.policy import SkipPolicy
from lite_attention.skipping.recalled_map import recalled_map
from lite_attention.skipping.shared_room import SharedRoom, note_lonely_trace
from lite_attention.skipping.slots import Owner, PassShape, Room, slots_of_this_graph, stamp_of

__all__ = ["Recalled", "SkipState", "share_room"]

_logger = logging.getLogger("lite_attention")

# Room is made rarely, and by one thread at a time: the first passes of several threads meet in one state.
_making_room = threading.Lock()


class Recalled(NamedTuple):
    """A pass that has begun: its map, and where the next one goes."""

    keep: Tensor
    """Packed, int32; its bits past the last tile are undefined."""
    follows: Tensor | None
    """Whether ``keep`` is of the pass before, in the same generation: bool, 0-d. None: there was none."""
    room: Room | None
    """None: it has yet to be made."""
    live: Tensor | None
    """The branch's entry of ``SkipState.live``; None without room."""


class SkipState(MapTable):
    """The maps of one attention layer, one for each (branch, shape), with its threshold and its count of passes.

    Branches are numbers from 0 to ``MAX_BRANCHES - 1``; who calls has checked them.

    Args:
        policy: of the layer; its threshold can be changed later.
        verbose: log what starts over, and why, to the logger ``lite_attention``.
    """

    threshold: Tensor
    """In powers of two, fp32, 0-d or ``[heads]``."""

    def __init__(self, policy: SkipPolicy, verbose: bool = False) -> None:
        super().__init__(policy.dense_steps)
        self._set_threshold_values(policy.threshold)
        self.is_off = not policy.enabled  # as its layer was told last
        self._verbose = verbose
        self._last_shapes: dict[int, PassShape] = {}  # kept for the log alone
        self._shared_room: SharedRoom[SkipState] | None = None
        self.start_over(torch.device("cpu"))

    @property
    def layout(self) -> int:
        """As :class:`OwnState` has it; switched off and on again, as a forward may do, it is what it was."""
        return 2 * self.layout_version + self.is_off

    def _set_threshold_values(self, values: float | tuple[float, ...]) -> None:
        self.threshold_values = values
        # A count alone, so that compiled code does not depend on the values.
        self.threshold_heads = len(values) if isinstance(values, tuple) else None

    def new_threshold(self, device: torch.device) -> Tensor:
        """Made anew, for a pass of which the state is not where it is computed."""
        return torch.tensor(self.threshold_values, dtype=torch.float32, device=device)

    def fresh_buffers(self, device: torch.device) -> dict[str, Tensor]:
        return {"threshold": self.new_threshold(device), **super().fresh_buffers(device)}

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
        told_len: int | None,
        compiling: bool,
    ) -> Room | None:
        """(slot, stamp) of this branch and shape. None: it has no room yet, and :meth:`remember` will make it, or the
        graph that is traced uses every slot already.

        Under torch.compile room is made here: this runs while the graph is traced, and its result is a constant of the
        graph. The graph may go on with it when the slot is another pair's, unless that has another size, which
        retraces: its stamp is of this slot alone, so that whatever was written since, here or by the same pair
        elsewhere, it sees as a full map.
        """
        owner = branch, PassShape(batch, query_len, kv_len, heads, kv_heads, head_dim, dtype, device, told_len)
        self.check_export("LiteAttention")
        if self._verbose:
            self._log_change(*owner)
        if not compiling:
            return self._rooms.get(owner)
        with _making_room, real_tensors():
            return self._room_for_trace(owner)

    @staticmethod
    def first_pass(shape: PassShape) -> Recalled:
        """A pass that has no room yet."""
        return Recalled(torch.full(shape.map_shape(), -1, dtype=torch.int32, device=shape.device), None, None, None)

    def recall(self, room: Room, branch: int, start_full: Tensor | None, generation: Tensor | None) -> Recalled:
        """The map that this pass starts from.

        Args:
            room: of this pass, from :meth:`room_for`.
            start_full: bool, 0-d; where True, the full map. None where the state itself counts its dense passes.
            generation: number of the pass's generation, int64, 0-d; the full map where the pass before had another,
                unless the map was chosen since. None where nobody counts them.
        """
        slot, live = self.slot(room[0]), self.live[branch]
        current = is_next = follows(slot, live, room[1])
        if generation is not None:
            current = is_next = is_next & ~self._is_of_another(branch, generation)
        if start_full is not None:
            current = current & ~start_full
        elif self.counts_passes:
            current = current & (self.passes[branch] >= self.dense_steps)
        return Recalled(recalled_map(current, slot.words), is_next, room, live)

    def remember(
        self,
        recalled: Recalled,
        owner: Owner,
        next_keep: Tensor,
        start_full: Tensor | None,
        generation: Tensor | None,
    ) -> None:
        """Note the map of the branch's next pass.

        Args:
            recalled: how the pass began.
            owner: its branch and shape.
            next_keep: packed.
            start_full, generation: as :meth:`recall` had them.
        """
        branch, _ = owner
        if recalled.room is None and torch.compiler.is_compiling():
            self.live[branch].zero_()  # as before the first pass: what others left is no longer of the pass before
            return
        room, live = recalled.room, recalled.live
        # Another thread's pair may have been given the slot since. Code that is traced has none but that one.
        if room is None or not (torch.compiler.is_compiling() or self._rooms.get(owner) == room):
            room, live = self._room_made_for(owner), None
        slot, stamp = self.slot(room[0]), room[1]
        live = self.live[branch] if live is None else live
        # Only what follows writes, and none of it allocates: a pass is remembered wholly or not at all.
        if self.counts_passes:
            passes = self.passes[branch]
            if start_full is not None:
                passes.zero_()
            elif recalled.follows is None:
                passes.fill_(1)
            else:
                passes.copy_(torch.where(recalled.follows, passes + 1, 1))
        slot.words.copy_(next_keep)
        slot.stamp.fill_(stamp)
        live.fill_(stamp)
        if generation is None:
            self.generations[branch].clamp_(min=NO_GENERATION)  # what follows a chosen map is of no numbered one
        else:
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
        self.place(device, "LiteAttention", torch.compiler.is_compiling())
        begins = start_full
        if generation is not None:
            is_other = self._is_of_another(branch, generation)
            begins = is_other if begins is None else begins | is_other
        live = self.live[branch]
        live.copy_(torch.where(begins, -live.abs(), live))  # type: ignore[arg-type]
        if generation is not None:
            self.generations[branch].copy_(generation)

    def note_pass_elsewhere(
        self, branch: int, query: Tensor, start_full: Tensor | None, generation: Tensor | None
    ) -> None:
        """Let the branch be as before its first pass, after one that computes nothing here and leaves no map.

        Others compute it in a shape of their own, and so start over in the next; where skipping is off, it is a dense
        pass here as there. One of FakeTensors is not noted.

        Args:
            query: a tensor of the pass, for its device.
            start_full, generation: as :meth:`recall` has them.
        """
        if not torch.compiler.is_compiling() and is_fake(query):
            return
        if self.is_off:
            self.note_dense_pass(branch, query.device, start_full, generation)
            return
        self.place(query.device, "LiteAttention", torch.compiler.is_compiling())
        self.live[branch].zero_()

    def _is_of_another(self, branch: int, generation: Tensor) -> Tensor:
        """Whether the branch's map is of another generation: bool, 0-d."""
        number = self.generations[branch]
        return (number != generation) & (number != ANY_GENERATION)

    # Room

    def _room_for_trace(self, owner: Owner) -> Room | None:
        """The owner's, made if need be: also in the sisters that so far made the same, as one code serves them all."""
        model = running_model(self)
        sisters = set() if model is None else set(_states_in(model))
        if self._shared_room is not None:
            sisters.update(self._shared_room.members)
        if owner not in self._rooms:
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    f"LiteAttention: no room for a keep map of these inputs ({owner[1]}) to export; call the module "
                    "once on inputs of this shape and branch before torch.export"
                )
            if self._shared_room is None and sisters <= {self}:
                note_lonely_trace(self, model, owner)
            rooms = [*self._rooms.items()]
            alike = [state for state in sisters - {self} if [*state._rooms.items()] == rooms]
            for state in (self, *[state for state in alike if state.device == self.device]):
                state._make_room(owner)
        room = self._rooms.get(owner)
        if room is None:
            _logger.warning(
                "a graph has passes of a layer in more than %d pairs of branch and shape: those of branch %d and (%s) "
                "compute every tile in it",
                len(self.slots),
                *owner,
            )
            return None
        slots_of_this_graph().add(self.slot(room[0]))
        if torch.compiler.is_exporting():
            self._exported.add(owner)
        for state in {self, *sisters}:
            if state._rooms.get(owner) == room:
                state._traced_rooms[room] = owner
        return room

    def make_room(self, owner: Owner) -> None:
        """All that :meth:`remember` would have to allocate for a pass of this owner, before it writes."""
        if owner not in self._rooms:
            self._room_made_for(owner)

    @torch.compiler.disable
    def _room_made_for(self, owner: Owner) -> Room:
        with _making_room, real_tensors():
            self._make_room(owner)
            return self._rooms[owner]

    def _make_room(self, owner: Owner) -> None:
        """Not where the graph that is traced uses every slot that is to be had."""
        branch, shape = owner
        if owner in self._rooms:
            return  # another thread was faster
        is_moving = self.device != shape.device
        taken = 0 if is_moving else len(self._rooms)
        given_away = None
        if taken == len(self.slots):
            given_away = self._owner_to_give_way(branch)
            if given_away is None:
                return
        index = taken if given_away is None else self._rooms[given_away][0]
        words = self.slot(index).memory_for(shape)
        if is_moving:
            self.start_over(shape.device)
        # Only now is all memory there, and nothing has changed before.
        if given_away is not None:
            del self._rooms[given_away]
            self.outdate_captured_graphs()
        self.slot(index).hold(words)
        self._rooms[owner] = index, stamp_of(owner, index)

    def _owner_to_give_way(self, branch: int) -> Owner | None:
        """The oldest of the same branch, whose map of another shape is out of date; else the oldest of all.

        Neither one whose memory a program shares, nor one of the graph that is traced.
        """
        fixed = slots_of_this_graph()
        free = [
            owner
            for owner, room in self._rooms.items()
            if owner not in self._exported and self.slot(room[0]) not in fixed
        ]
        owner = next((owner for owner in free if owner[0] == branch), next(iter(free), None))
        if self._verbose and owner is not None:
            _logger.info("all %d slots are taken: the map of branch %d and (%s) makes room", len(self.slots), *owner)
        return owner

    def _log_change(self, branch: int, shape: PassShape) -> None:
        last = self._last_shapes.get(branch)
        if last is not None and last != shape:
            _logger.info("branch %d: skip state reset, the inputs changed from (%s) to (%s)", branch, last, shape)
        self._last_shapes[branch] = shape

    # Settings

    def reset(self, branch: int | None = None) -> None:
        """Forget what was dropped, in one branch or in all of them."""
        with ordinary_tensors():
            live = self.live if branch is None else self.live[branch]
            # No stamp is negative, so no map counts as current; keep_map() still sees which shape was.
            live.abs_().neg_()
            # Passes that are told no number go on with the generation that is under way; now none is.
            (self.generations if branch is None else self.generations[branch]).fill_(NO_GENERATION)

    def set_threshold(self, values: float | tuple[float, ...]) -> None:
        """Another threshold from the next pass on, written in place where there are as many values as before."""
        with ordinary_tensors():
            if isinstance(values, float) and self.threshold.dim() == 0:
                self.threshold.fill_(values)
            else:
                new = torch.tensor(values, dtype=torch.float32, device=self.device)
                if new.shape == self.threshold.shape:
                    self.threshold.copy_(new)
                else:
                    self.threshold = new
                    self.outdate_captured_graphs()
        self._set_threshold_values(values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._shared_room is not None:
            self._shared_room.members.add(self)


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
    return (held.state for held in held_states(module) if isinstance(held.state, SkipState))
