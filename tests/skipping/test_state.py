"""SkipState alone: whose map a pass starts from, who makes room, and when all starts over."""

import copy
import itertools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from lite_attention import SkipPolicy, unpack_keep_map
from lite_attention.skipping.branches import MAX_BRANCHES
from lite_attention.skipping.map_table import MAP_SLOTS
from lite_attention.skipping.slots import PassShape, Room
from lite_attention.skipping.state import SkipState, share_room

HEADS, QUERIES, KEYS = 2, 300, 700


def shape_of(query_len: int = QUERIES, device: str = "cpu") -> PassShape:
    return PassShape(1, query_len, KEYS, HEADS, 1, 64, torch.float32, torch.device(device))


def dropping(tile: int, shape: PassShape) -> Tensor:
    """The packed map without one KV tile."""
    return torch.full(shape.map_shape(), ~(1 << tile), dtype=torch.int32, device=shape.device)


def one_pass(
    state: SkipState,
    drop: int,
    branch: int = 0,
    shape: PassShape | None = None,
    start_full: Tensor | None = None,
    generation: int | None = None,
    compiling: bool = False,
) -> list[int]:
    """A pass that drops a tile besides those dropped before; the tiles it had been given as dropped."""
    shape = shape_of() if shape is None else shape
    number = None if generation is None else torch.tensor(generation)
    room = state.room_for(branch, *shape, compiling)
    recalled = state.first_pass(shape) if room is None else state.recall(room, branch, start_full, number)
    state.remember(recalled, (branch, shape), recalled.keep & dropping(drop, shape), start_full, number)
    return dropped(unpack_keep_map(recalled.keep, shape.kv_tiles()))


def dropped(keep: Tensor) -> list[int]:
    return [tile for tile, kept in enumerate(keep[0, 0, 0].tolist()) if not kept]


def test_each_pass_starts_from_the_map_of_the_one_before() -> None:
    state = SkipState(SkipPolicy())
    assert [one_pass(state, drop) for drop in (3, 1, 4)] == [[], [3], [1, 3]]
    assert dropped(state.keep_map(0, "test")) == [1, 3, 4]
    skipped, tiles = state.skipped_tiles(0).tolist()
    assert (skipped, tiles) == (3 * HEADS * 5, 6 * HEADS * 5)


def test_a_reset_forgets_one_branch_or_all() -> None:
    state = SkipState(SkipPolicy())
    for branch in range(3):
        one_pass(state, branch, branch)
    state.reset(1)
    assert state.skipped_tiles(1).tolist() == [0, 0]
    assert state.keep_map(1, "test").all(), "its shape is known still"
    assert [one_pass(state, 5, branch) for branch in range(3)] == [[0], [], [2]]
    state.reset()
    assert [one_pass(state, 5, branch) for branch in range(3)] == [[], [], []]
    assert state.used_branches() == [0, 1, 2]


def test_a_map_of_another_shape_is_never_used_nor_the_old_one_after_it() -> None:
    state = SkipState(SkipPolicy())
    other = shape_of(QUERIES - 1)  # as many tiles
    assert one_pass(state, 2) == []
    assert one_pass(state, 3, shape=other) == []
    assert one_pass(state, 4) == []
    assert one_pass(state, 5) == [4]
    assert state.last_shape(0, "test") == shape_of()


def test_the_oldest_map_of_the_same_branch_makes_room_and_else_the_oldest_of_all() -> None:
    state = SkipState(SkipPolicy())
    pairs = [(branch % 3, shape_of(100 + branch)) for branch in range(MAP_SLOTS)]
    for branch, shape in pairs:
        one_pass(state, 0, branch, shape)
    assert (state.owners(), state.layout_version) == (pairs, 0)
    one_pass(state, 0, 1, shape_of(500))
    one_pass(state, 0, 7, shape_of(500))
    assert state.owners() == [*pairs[2:], (1, shape_of(500)), (7, shape_of(500))]
    assert state.layout_version == 2, "graphs that read the slots are out of date"
    assert len({room for room, _ in (state.room_for(b, *s, False) for b, s in state.owners())}) == MAP_SLOTS


@contextmanager
def failing(allocation: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory runs out in the allocation of this number, if there are so many."""
    count = itertools.count()

    def limited(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            if next(count) == allocation:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return make(*args, **kwargs)

        return made

    with monkeypatch.context() as patch:
        for name in ("empty", "zeros", "ones", "full", "tensor", "where"):
            patch.setattr(torch, name, limited(getattr(torch, name)))
        yield


def memory_of(state: SkipState) -> list[tuple[str, Tensor]]:
    return [(name, buffer.clone()) for name, buffer in state.named_buffers()]


def test_a_slot_given_away_during_a_pass_keeps_the_map_of_its_new_owner() -> None:
    """Another thread's passes, while the operator computes this one's."""
    state, shape = SkipState(SkipPolicy()), shape_of()
    one_pass(state, 1)
    recalled = state.recall(state._rooms[0, shape], 0, None, None)
    for length in range(1, MAP_SLOTS):
        one_pass(state, 0, 1, shape_of(length))
    one_pass(state, 2, branch=2)
    assert (0, shape) not in state.owners()
    state.remember(recalled, (0, shape), recalled.keep & dropping(4, shape), None, None)
    assert one_pass(state, 0, branch=2) == [2]
    assert one_pass(state, 0) == [1, 4]


@pytest.mark.parametrize("allocation", range(30))
@pytest.mark.parametrize("taken", [0, 1, MAP_SLOTS])
@pytest.mark.parametrize("device_before", ["cpu", "meta"])
def test_room_that_cannot_be_allocated_changes_nothing(
    taken: int, device_before: str, allocation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SkipState(SkipPolicy(threshold=(-1.0, -2.0), dense_steps=2))
    for branch in range(taken):
        shape = shape_of(device=device_before)
        recalled = state.first_pass(shape)
        state.remember(recalled, (branch, shape), recalled.keep & dropping(branch % 6, shape), None, None)
    before = state.owners(), state.layout_version, memory_of(state)
    try:
        with failing(allocation, monkeypatch):
            one_pass(state, 0, 0, shape_of(900))
    except torch.OutOfMemoryError:
        assert (state.owners(), state.layout_version) == before[:2]
        for (name, buffer), (_, old) in zip(memory_of(state), before[2], strict=True):
            assert buffer.device == old.device, name
            assert buffer.is_meta or torch.equal(buffer, old), name
        one_pass(state, 0, 0, shape_of(900))
    else:
        assert allocation > 1
    assert [one_pass(state, drop, 0, shape_of(900)) for drop in (1, 2)] == [[], [1]]
    assert state.threshold.tolist() == [-1.0, -2.0]


def test_a_pass_on_another_device_starts_over_there() -> None:
    state = SkipState(SkipPolicy(threshold=(-1.0, -2.0)))
    one_pass(state, 0)
    elsewhere = shape_of(device="meta")
    recalled = state.first_pass(elsewhere)
    state.remember(recalled, (0, elsewhere), recalled.keep, None, None)
    assert {buffer.device.type for buffer in state.buffers()} == {"meta"}
    assert one_pass(state, 0) == []
    assert state.threshold.tolist() == [-1.0, -2.0]


def test_the_threshold_is_written_in_place_and_replaced_for_another_number_of_heads() -> None:
    state = SkipState(SkipPolicy(threshold=-4.0))
    buffer = state.threshold
    state.set_threshold(-3.0)
    assert (state.threshold is buffer, float(buffer), state.layout_version) == (True, -3.0, 0)
    state.set_threshold((-1.0, -2.0))
    assert (state.threshold.tolist(), state.layout_version) == ([-1.0, -2.0], 1)


def test_nothing_is_in_the_state_dict() -> None:
    assert SkipState(SkipPolicy()).state_dict() == {}


def test_asking_before_the_first_pass_names_who_asks() -> None:
    state = SkipState(SkipPolicy())
    assert state.skipped_tiles(0).tolist() == [0, 0]
    assert state.used_branches() == []
    for ask in (state.keep_map, state.last_shape, state.tile_shape):
        with pytest.raises(RuntimeError, match=r"^who asks: branch 2 has no keep map yet"):
            ask(2, "who asks")


# Passes that are dense by count


@pytest.mark.parametrize("dense_steps", range(4))
def test_so_many_passes_after_a_reset_start_full(dense_steps: int) -> None:
    state = SkipState(SkipPolicy(dense_steps=dense_steps))
    full = max(dense_steps, 1)
    for branch in (0, 3):
        for generation in range(2):
            for step in range(5):
                assert one_pass(state, step, branch) == list(range(full - 1, step) if step >= full else [])
                expected = [] if step + 1 < full else list(range(full - 1, step + 1))
                assert dropped(state.keep_map(branch, "test")) == expected
                assert round(float(state.skipped_tiles(branch)[0])) == HEADS * 5 * len(expected)
            if generation == 0:
                state.reset(branch)


def test_another_shape_starts_the_count_again() -> None:
    state = SkipState(SkipPolicy(dense_steps=2))
    assert [one_pass(state, 0) for _ in range(3)] == [[], [], [0]]
    assert [one_pass(state, 0, shape=shape_of(500)) for _ in range(3)] == [[], [], [0]]
    assert [one_pass(state, 0) for _ in range(3)] == [[], [], [0]]


def test_who_gives_start_full_decides_alone() -> None:
    state = SkipState(SkipPolicy(dense_steps=3))
    decisions = [torch.tensor(full) for full in (True, False, True, False)]
    assert [one_pass(state, step, start_full=full) for step, full in enumerate(decisions)] == [[], [0], [], [2]]
    assert dropped(state.keep_map(0, "test")) == [2, 3]
    assert state.passes.tolist() == [0] * MAX_BRANCHES


@pytest.mark.parametrize("counted", range(4))
def test_after_a_pass_with_start_full_the_next_map_is_the_one_it_left(counted: int) -> None:
    state = SkipState(SkipPolicy(dense_steps=3))
    for _ in range(counted):
        one_pass(state, 0)
    one_pass(state, 1, start_full=torch.tensor(True))
    assert dropped(state.keep_map(0, "test")) == [1]
    assert state.skipped_tiles(0).tolist() == pytest.approx([HEADS * 5, 6 * HEADS * 5])
    assert one_pass(state, 2, start_full=torch.tensor(False)) == [1]
    assert [one_pass(state, 3) for _ in range(4)] == [[], [], [], [3]], "who counts again counts from the start"


def test_a_map_that_was_set_is_used_whatever_the_count() -> None:
    state = SkipState(SkipPolicy(dense_steps=5))
    one_pass(state, 0)
    keep = torch.ones(1, HEADS, 5, 6, dtype=torch.bool)
    keep[..., 4] = False
    state.set_keep_map(keep, 0, "test")
    assert dropped(state.keep_map(0, "test")) == [4]
    assert [one_pass(state, 1), one_pass(state, 1)] == [[4], [1, 4]]


# Generations


def test_a_pass_of_another_generation_starts_full_and_each_branch_has_its_own() -> None:
    state = SkipState(SkipPolicy())
    assert [one_pass(state, drop, generation=7) for drop in (3, 1)] == [[], [3]]
    assert one_pass(state, 2, branch=1, generation=7) == []
    assert [one_pass(state, drop, generation=8) for drop in (4, 5)] == [[], [4]]
    assert one_pass(state, 0, branch=1, generation=7) == [2]
    assert one_pass(state, 0, generation=7) == [], "no way back to a generation that was left"


def test_passes_that_nobody_numbers_go_on_from_one_to_the_next() -> None:
    state = SkipState(SkipPolicy())
    assert [one_pass(state, drop, generation=number) for drop, number in ((3, 7), (1, None), (2, 7))] == [
        [], [3], [1, 3],
    ]  # fmt: skip


def test_dense_passes_are_counted_from_the_start_of_a_generation() -> None:
    state = SkipState(SkipPolicy(dense_steps=2))
    for generation in (7, 8):
        assert [one_pass(state, drop, generation=generation) for drop in range(4)] == [[], [], [1], [1, 2]]


@pytest.mark.parametrize("given", ["start_full", "generation", "both"])
def test_a_dense_pass_that_begins_a_generation_ends_the_map_of_its_branch(given: str) -> None:
    state, other = SkipState(SkipPolicy()), SkipState(SkipPolicy())
    for each in (state, other):
        for branch in (0, 1):
            one_pass(each, 3, branch, generation=7)

    def note(begins: bool) -> None:
        start_full = None if given == "generation" else torch.tensor(begins)
        generation = None if given == "start_full" else torch.tensor(8 if begins else 7)
        state.note_dense_pass(0, torch.device("cpu"), start_full, generation)

    note(begins=False)
    assert dropped(state.keep_map(0, "test")) == [3]
    note(begins=True)
    assert state.keep_map(0, "test").all()
    assert one_pass(state, 1) == []
    assert one_pass(state, 1, branch=1) == [3]


def test_a_dense_pass_on_another_device_ends_the_map_without_asking_it() -> None:
    state = SkipState(SkipPolicy())
    one_pass(state, 3)
    state.note_dense_pass(0, torch.device("meta"), torch.zeros((), dtype=torch.bool, device="meta"), None)
    assert one_pass(state, 1) == []


# Room for sisters


class Layers(nn.Module):
    """A model whose layers a trace would meet one by one."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.states = nn.ModuleList(SkipState(SkipPolicy()) for _ in range(count))

    def forward(self, index: int, compiling: bool = True) -> None:
        one_pass(self.all()[index], 0, compiling=compiling)

    def all(self) -> list[SkipState]:
        return list(self.states)  # type: ignore[arg-type]

    def rooms(self) -> list[int]:
        return [len(state.owners()) for state in self.all()]


def test_a_traced_state_makes_room_in_the_model_that_is_called_and_in_no_other() -> None:
    model, other = Layers(), Layers()
    other_before = copy.deepcopy(other)
    model(0, compiling=False)
    assert model.rooms() == [1, 0, 0], "eagerly each makes its own"
    model(1)
    assert model.rooms() == [1, 1, 1], "those that have seen the same as the traced one"
    assert (other.rooms(), other_before.rooms()) == ([0] * 3, [0] * 3)


def test_the_model_is_the_outermost_one_that_holds_the_state() -> None:
    class Calling(nn.Module):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, called: nn.Module) -> None:
            called(0)

    first, second, stranger = Layers(1), Layers(2), Layers(1)
    Calling(first, second)(first)
    assert (first.rooms(), second.rooms()) == ([1], [1, 1])
    first = Layers(1)
    Calling(Layers(1))(first)  # called by a module that does not hold it
    assert (first.rooms(), stranger.rooms()) == ([1], [0])


def through_pickle(layers: nn.ModuleList) -> nn.ModuleList:
    result: nn.ModuleList = pickle.loads(pickle.dumps(layers))
    return result


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_states_that_share_room_make_it_together_and_their_copies_apart(duplicate: object) -> None:
    handle = nn.ModuleList([Layers(1), Layers(1)])
    share_room(*handle)
    copied: nn.ModuleList = duplicate(handle)  # type: ignore[operator]
    for ours, theirs in ((handle, copied), (copied, handle)):
        before = [layers.rooms() for layers in theirs]
        one_pass(ours[0].all()[0], 0, compiling=True)
        assert [layers.rooms() for layers in ours] == [[1], [1]]
        assert [layers.rooms() for layers in theirs] == before


@pytest.fixture
def _threads_take_turns_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_threads_take_turns_often")
def test_threads_may_make_room_in_one_state_at_the_same_time() -> None:
    for _ in range(30):
        state, start = SkipState(SkipPolicy()), threading.Barrier(MAX_BRANCHES, timeout=60)
        rooms: list[int] = []

        def first_pass(branch: int, state: SkipState = state, start: threading.Barrier = start) -> None:
            start.wait()
            one_pass(state, branch % 6, branch)

        threads = [threading.Thread(target=first_pass, args=(branch,)) for branch in range(MAX_BRANCHES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rooms = [state.room_for(branch, *shape_of(), False)[0] for branch in range(MAX_BRANCHES)]
        assert sorted(rooms) == list(range(MAX_BRANCHES))
        assert all(dropped(state.keep_map(branch, "test")) == [branch % 6] for branch in range(MAX_BRANCHES))


def test_stamps_are_the_same_in_every_process() -> None:
    """An exported program finds the map that another process saved in it."""
    state = SkipState(SkipPolicy())
    stamps = []
    for branch in range(2):
        one_pass(state, 0, branch)
        stamps.append(int(state.live[branch]))
    assert stamps == [7509744399031928233, 156571100852764401]


def test_whatever_code_goes_on_with_a_lost_slot_a_pass_starts_full_or_from_the_pass_before() -> None:
    random = Random(0)
    shapes = [shape_of(QUERIES - less) for less in range(MAP_SLOTS + 4)]  # all of as many tiles
    resumed = 0
    for _ in range(40):
        state = SkipState(SkipPolicy())
        traced: list[tuple[PassShape, Room]] = []  # compiled code: its shape and its room for good
        latest: dict[PassShape, list[int]] = {}  # what the branch's latest pass left, if it was of this shape
        for step in range(120):
            shape = random.choice(shapes[:2] if random.random() < 0.6 else shapes)
            code = random.choice([None, *range(len(traced)), len(traced)])
            if code == len(traced):
                room = state.room_for(0, *shape, True)
                assert room is not None
                traced.append((shape, room))
            if code is None:
                given = one_pass(state, step % 6, shape=shape)
            else:
                shape, room = traced[code]
                recalled = state.recall(room, 0, None, None)
                given = dropped(unpack_keep_map(recalled.keep, shape.kv_tiles()))
                with patch.object(torch.compiler, "is_compiling", lambda: True):
                    state.remember(recalled, (0, shape), recalled.keep & dropping(step % 6, shape), None, None)
            assert given in ([], latest.get(shape, []))
            resumed += given != [] and code is not None and state._rooms.get((0, shape)) != room
            latest = {shape: sorted({*given, step % 6})}
            told = dropped(state.keep_map(0, "test"))
            assert told in ([], latest[shape])
            if code is not None:
                assert told == latest[shape], "what the code would start from"
            if random.random() < 0.1:
                state.reset()
                latest = {}
    assert resumed > 20, "some of it went on with a slot that its pair had lost"
