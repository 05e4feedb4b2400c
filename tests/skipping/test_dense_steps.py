"""The clock: steps and generations told from timesteps alone."""

import copy
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention import SkipPolicy, skip_branch
from lite_attention.skipping.branches import MAX_BRANCHES
from lite_attention.skipping.dense_steps import GenerationClock
from lite_attention.skipping.slots import PassShape
from lite_attention.skipping.state import SkipState
from support.inputs import report

VIDEOS = 6
SHAPE = PassShape(1, 64, 1000, 1, 1, 64, torch.float32, torch.device("cpu"))


def steps_of(clock: GenerationClock, timesteps: list[float]) -> list[int]:
    steps = []
    for timestep in timesteps:
        clock.tick(torch.tensor([timestep]))
        steps.append(int(clock.step()))
    return steps


@pytest.mark.parametrize(
    "one",
    [[999.0, 750.0, 500.0, 20.0], [14.6, 3.1, 0.03, 0.0]],
    ids=["timesteps", "sigmas"],
)
def test_a_turn_of_the_timesteps_starts_a_generation(one: list[float]) -> None:
    assert steps_of(GenerationClock(), [*one, *one, *one]) == [0, 1, 2, 3] * 3


def test_timesteps_that_rise_are_a_turn_until_they_rise_again() -> None:
    clock = GenerationClock()
    rising = [0.0, 0.25, 0.5, 0.999]
    assert steps_of(clock, [*rising, *rising, *rising]) == [0, 0, 1, 2, *[0, 1, 2, 3] * 2]
    clock.reset()
    assert steps_of(clock, [0.0, 0.25]) == [0, 1]


@pytest.mark.parametrize("branches", [(0,), (0, 1)])
def test_a_generation_of_one_call_is_not_the_one_that_begins_above_it(branches: tuple[int, ...]) -> None:
    calls = [(timestep, branch) for timestep in (9.0, 9.5, 7.0, 5.0, 3.0) for branch in branches]
    numbers, starts = of_branches(GenerationClock(), calls)
    assert numbers[:: len(branches)] == [0, 1, 2, 2, 2]
    assert starts == [full for full in (True, True, True, False, False) for _ in branches]


def test_a_branch_that_was_left_out_of_the_last_step_alone_compares_with_the_others() -> None:
    clock = GenerationClock()
    of_branches(clock, [(9.0, 0), (9.0, 1), (7.0, 0), (7.0, 1), (5.0, 0)])
    assert of_branches(clock, [(6.0, 1), (6.0, 0), (4.0, 1)]) == ([0] * 3, [True, True, False])


@pytest.mark.parametrize("left_out", [1, 0], ids=["left out of the last steps", "called in all"])
def test_a_branch_that_others_left_behind_compares_with_them(left_out: int) -> None:
    clock = GenerationClock()
    one = [(9.0, 1), (9.0, 0), (7.0, 1), (7.0, 0), (5.0, 1 - left_out), (5.0, 0), (3.0, 1 - left_out), (3.0, 0)]
    of_branches(clock, one)
    numbers, starts = of_branches(clock, [(5.0, 1), (5.0, 0), (2.0, 1), (2.0, 0)])
    assert numbers == [0] * 4
    assert starts == [True, True, False, False]


def test_a_branch_that_is_left_out_of_some_steps_goes_on_in_its_generation() -> None:
    calls = [(9.0, 1), (9.0, 0), (8.0, 0), (7.0, 0), (6.0, 1), (6.0, 0), (5.0, 0), (4.0, 0), (4.0, 1)]
    numbers, starts = of_branches(GenerationClock(), calls)
    assert numbers == [0] * 9
    assert starts == [True, True, *[False] * 7]


def test_calls_with_one_timestep_are_one_step() -> None:
    heun = [999.0, 750.0, 750.0, 500.0, 500.0]
    assert steps_of(GenerationClock(), heun + heun) == [0, 1, 1, 2, 2] * 2


def test_neighbouring_sigmas_are_different_steps() -> None:
    assert steps_of(GenerationClock(), [1.0, 0.99999, 0.99998]) == [0, 1, 2]


def test_the_largest_timestep_counts() -> None:
    clock = GenerationClock()
    for step, timestep in enumerate((999, 800, 600)):
        clock.tick(torch.tensor([[0, timestep], [timestep, timestep]]))
        assert int(clock.step()) == step


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.uint16, torch.uint64, torch.float32, torch.bfloat16, torch.float64],
    ids=str,
)
def test_timesteps_of_any_dtype(dtype: torch.dtype) -> None:
    clock = GenerationClock()
    for step, timestep in enumerate((992, 800, 600)):
        clock.tick(torch.tensor(timestep, dtype=dtype))
        assert int(clock.step()) == step


@pytest.mark.parametrize(("dense_steps", "full"), [(0, 1), (1, 1), (3, 3)])
def test_the_first_steps_start_full(dense_steps: int, full: int) -> None:
    clock = GenerationClock(dense_steps)
    assert clock.start_full, "before the first call"
    for _ in range(2):
        for step, timestep in enumerate((900, 900, 700, 500, 300)):
            clock.tick(torch.tensor(timestep))
            assert bool(clock.start_full) == (max(0, step - 1) < full)


def test_a_reset_starts_a_generation_where_timesteps_do_not_tell() -> None:
    clock = GenerationClock()
    assert steps_of(clock, [999.0, 999.0, 500.0]) == [0, 0, 1]
    clock.tick(torch.tensor(500.0), branch=1)
    clock.reset()
    assert [int(clock.step(branch)) for branch in range(3)] == [1, 0, -1], "of the latest call, until the next"
    assert steps_of(clock, [500.0, 400.0]) == [0, 1]


def test_each_generation_of_each_clock_has_a_number_of_its_own() -> None:
    numbers = set()
    for clock in (GenerationClock(), GenerationClock()):
        for timesteps in ([9.0, 7.0, 7.0], [9.0, 8.0], [5.0, 4.0]):
            of_generation = set()
            for timestep in timesteps:
                clock.tick(torch.tensor(timestep))
                of_generation.add(int(clock.generation))
            assert len(of_generation) == 1
            numbers |= of_generation
            if timesteps[0] == 9.0 and len(timesteps) == 2:
                clock.reset()  # 5 after 8 would be the same one
    assert len(numbers) == 6


def of_branches(clock: GenerationClock, calls: Sequence[tuple[float, int]]) -> tuple[list[int], list[bool]]:
    """Of each call the generation, from 0 for the first one's, and whether it starts from the full map."""
    numbers, starts = [], []
    for timestep, branch in calls:
        clock.tick(torch.tensor(timestep), branch)
        numbers.append(int(clock.generation))
        starts.append(bool(clock.start_full))
        assert (bool(clock.told(branch)[0]), int(clock.told(branch)[1])) == (starts[-1], numbers[-1])
    return [number - numbers[0] for number in numbers], starts


def test_all_branches_are_of_one_generation() -> None:
    calls = [(timestep, branch) for timestep in (9.0, 7.0) for branch in (0, 1)]
    assert of_branches(GenerationClock(), calls * 3) == ([0] * 4 + [1] * 4 + [2] * 4, [True, True, False, False] * 3)


@pytest.mark.parametrize("late", [2.0, 3.0, 8.0], ids=["below its last", "at its last", "above it"])
def test_a_branch_that_joins_a_generation_late_starts_over(late: float) -> None:
    one = [(9.0, 0), (9.0, 1), (3.0, 0), (3.0, 1)]
    another = [(9.5, 0), (8.5, 0), (late, 0), (late, 1), (1.0, 0), (1.0, 1)]
    numbers, starts = of_branches(GenerationClock(), one + another)
    assert numbers == [0] * 4 + [1] * 6
    assert starts == [True, True, False, False] + [True, False, False, True, False, False]


def test_a_branch_that_was_left_out_of_a_generation_starts_over() -> None:
    clock = GenerationClock()
    of_branches(clock, [(9.0, 0), (9.0, 1), (7.0, 0), (7.0, 1)])
    of_branches(clock, [(9.0, 0), (7.0, 0)])
    clock.reset()
    assert of_branches(clock, [(7.0, 0), (6.0, 0), (6.0, 1), (5.0, 1)]) == ([0] * 4, [True, False, True, False])


@pytest.mark.parametrize("first", [1, 2], ids=["left out of the last", "new"])
def test_a_branch_that_is_behind_begins_a_generation_where_its_timestep_goes_against_the_others(first: int) -> None:
    clock = GenerationClock()
    of_branches(clock, [(9.0, 0), (9.0, 1), (7.0, 0), (7.0, 1)])
    of_branches(clock, [(9.5, 0), (8.0, 0), (5.0, 0)])
    calls = [(9.0, first), (6.0, first), (4.0, 0), (4.0, first), (3.0, 0)]
    assert of_branches(clock, calls) == ([0] * 5, [True, False, True, False, False])


def broken_runs(seed: int) -> int:
    """Videos whose branches begin late, end early, change their order, with layers left out and dense in between.

    How many passes start from a map. Each drops a tile of its video's own, which no pass of another video may know.
    """
    random = Random(seed)
    clock = GenerationClock(dense_steps=random.choice([0, 1, 2]))
    layers = [SkipState(SkipPolicy()) for _ in range(2)]
    resumed = 0
    for video in range(VIDEOS):
        schedule = sorted(random.sample(range(1, 1000), random.randint(2, 6)), reverse=True)
        schedule[0] = 1000 + video  # the others may begin anywhere
        begins = {branch: random.choice([0, 0, 0, 1, 2]) for branch in range(3)} | {random.randrange(3): 0}
        ends = {branch: random.choice([2, 99, 99]) for branch in range(3)}
        order = random.sample(range(3), 3)
        for step, timestep in enumerate(schedule):
            for branch in order:
                if not begins[branch] <= step < ends[branch]:
                    continue
                clock.tick(torch.tensor(float(timestep)), branch)
                for layer in layers:
                    chance = random.random()
                    if chance < 0.2:
                        layer.note_dense_pass(branch, torch.device("cpu"), clock.start_full, clock.generation)
                    elif chance < 0.8:
                        room = layer.room_for(branch, *SHAPE, False)
                        begun = layer.recall(room, branch, clock.start_full, clock.generation) if room else None
                        begun = begun or layer.first_pass(SHAPE)
                        known = ~begun.keep & (1 << VIDEOS) - 1  # a bit of each video that dropped something
                        assert not (known & ~(1 << video)).any()
                        resumed += int(known.any())
                        next_keep = begun.keep & ~(1 << video)
                        layer.remember(begun, (branch, SHAPE), next_keep, clock.start_full, clock.generation)
    return resumed


def test_no_pass_of_a_video_knows_what_one_of_another_dropped() -> None:
    with torch.no_grad():
        assert sum(broken_runs(seed) for seed in range(60)) > 500


def test_a_branch_that_ran_once_in_a_generation_notices_the_next() -> None:
    for order in ((0, 1), (1, 0)):
        calls = [(9.0, 0), (7.0, 0), (5.0, 0), (5.0, 1)]
        numbers, starts = of_branches(GenerationClock(), [*calls, *((9.0, branch) for branch in order), (7.0, 0)])
        assert numbers == [0] * 4 + [1] * 3
        assert starts == [True, False, False, True, True, True, False]


def test_streams_that_met_are_watched_on_where_another_branch_begins_a_generation() -> None:
    clock = GenerationClock()
    assert ticks(clock, [9.0, 9.0, 8.0, 8.0, 7.0], watched=True) == [True] * 5
    ticks(clock, [5.0, 4.0, 9.0], watched=False, branch=1)
    assert ticks(clock, [7.0, 6.0, 6.0], watched=True) == [True, True, True]
    assert ticks(clock, [9.0, 8.0], watched=True) == [True, False], "its own turn ends it"


def test_a_timestep_that_comes_again_in_another_step_of_the_scheduler_is_of_one_stream() -> None:
    clock, starts = GenerationClock(), []
    for step, timestep in ((None, 9.0), (1, 7.0), (2, 7.0), (3, 5.0), (3, 5.0), (4, 5.0)):
        clock.at_schedule_step(step)
        starts += ticks(clock, [timestep], watched=True)
    assert starts == [True, False, False, False, True, True]
    assert int(clock.mixed_calls) == 1


@pytest.mark.parametrize(
    ("steps", "mixed"),
    [
        ([(0, 900.2), (1, 800.4), (2, 800.2)], 0),  # one in the calls' dtype
        ([(0, 900.2), (1, 800.4), (2, 700.0)], 1),  # the second of two tiles, after the step of the first
        ([(0, 900.2), (None, 0.0), (2, 800.4)], 1),
        ([(0, 900.2), (1, 800.4), (None, 0.0)], 1),
    ],
)
def test_a_timestep_that_comes_again_where_the_scheduler_has_others_is_of_two_streams(
    steps: list[tuple[int | None, float]], mixed: int
) -> None:
    clock = GenerationClock()
    for (step, planned), timestep in zip(steps, (900.2, 800.4, 800.4), strict=True):
        clock.at_schedule_step(step, planned)
        clock.tick(torch.tensor(timestep, dtype=torch.bfloat16), watched=True)
    assert int(clock.mixed_calls) == mixed


def test_a_step_of_the_scheduler_that_is_told_before_the_first_call_is_known_on_its_device() -> None:
    clock = GenerationClock()
    clock.at_schedule_step(3, 7.0)
    clock.state.start_over(torch.device("cpu"))
    assert (int(clock.state.schedule_step), float(clock.state.schedule_timestep)) == (3, 7.0)


def test_a_reset_under_fake_tensors_is_one() -> None:
    clock = GenerationClock()
    ticks(clock, [9.0, 8.0], watched=False)
    with FakeTensorMode():
        clock.reset()
    assert ticks(clock, [7.0], watched=False) == [True]


@pytest.mark.parametrize("change", [-1.0, 0.0])
def test_watched_calls_of_another_stream_start_full(change: float) -> None:
    clock, starts = GenerationClock(), []
    for timestep, stream in ((9.0, 3), (7.0, 3), (5.0, 4), (5.0 + change, 3), (3.0, 3), (9.0, 5), (8.0, 5)):
        clock.tick(torch.tensor(timestep), watched=True, stream=torch.tensor(stream))
        starts.append(bool(clock.start_full))
    assert starts == [True, False, True, True, True, True, False]
    assert int(clock.mixed_calls) == 2


def test_the_stream_of_calls_that_are_not_watched_is_not_read() -> None:
    clock, starts = GenerationClock(), []
    for timestep, stream in ((9.0, 3), (7.0, 4), (5.0, 5)):
        clock.tick(torch.tensor(timestep), stream=torch.tensor(stream))
        starts.append(bool(clock.start_full))
    assert starts == [True, False, False]


def ticks(clock: GenerationClock, timesteps: list[float], watched: bool, branch: int = 0) -> list[bool]:
    """For each call, whether it starts from the full map."""
    starts = []
    for timestep in timesteps:
        clock.tick(torch.tensor(timestep), branch, watched)
        starts.append(bool(clock.start_full))
    return starts


def test_watched_calls_start_full_from_a_repeated_timestep_to_the_end_of_the_generation() -> None:
    clock = GenerationClock()
    one = [900.0, 700.0, 500.0, 500.0, 300.0, 300.0, 100.0]
    assert ticks(clock, one * 2, watched=True) == [True, False, False, True, True, True, True] * 2
    assert int(clock.mixed_calls) == 4
    assert ticks(clock, [900.0, 700.0, 500.0], watched=True) == [True, False, False]
    clock.reset()
    assert ticks(clock, [900.0, 900.0], watched=True) == [True, True]
    clock.reset()
    assert ticks(clock, [800.0, 700.0], watched=True) == [True, False]


def test_calls_that_are_not_watched_repeat_timesteps_as_one_stream() -> None:
    clock = GenerationClock()
    assert ticks(clock, [900.0, 700.0, 700.0, 500.0], watched=False) == [True, False, False, False]
    assert int(clock.mixed_calls) == 0


def test_a_watched_call_and_one_that_is_not_are_two_streams() -> None:
    for first in (False, True):
        clock = GenerationClock()
        starts = ticks(clock, [900.0, 700.0], first)
        starts += [*ticks(clock, [700.0], not first), *ticks(clock, [500.0], first)]
        assert starts == [True, False, True, True]


def test_branches_are_watched_for_themselves() -> None:
    clock = GenerationClock()
    ticks(clock, [900.0, 700.0, 700.0], True, branch=1)
    assert ticks(clock, [900.0, 700.0], True, branch=2) == [True, False]
    assert ticks(clock, [500.0], True, branch=1) == [True]


says_nothing = pytest.mark.parametrize("timestep", [float("nan"), float("inf"), -float("inf"), 9e12, -9e12], ids=str)


@pytest.mark.parametrize("known", [[900.0, 800.0, 700.0], [0.1, 0.2, 0.3]], ids=["falling", "rising"])
@says_nothing
def test_a_timestep_that_says_nothing_is_dense(known: list[float], timestep: float) -> None:
    clock = GenerationClock()
    ticks(clock, known, True)
    for count in range(1, 4):
        assert ticks(clock, [timestep] * count, True) == [True] * count
        assert ticks(clock, known, True) == [True, False, False]
    assert int(clock.mixed_calls) == 0


@says_nothing
@pytest.mark.parametrize("following", [900.0, 600.0, 500.0, -5.0])
@pytest.mark.parametrize("before", [[], [900.0], [900.0, 600.0]], ids=str)
def test_a_video_after_a_timestep_that_says_nothing_is_a_generation_for_every_branch(
    before: list[float], following: float, timestep: float
) -> None:
    clock = GenerationClock()
    numbers = []
    for branch in (0, 1):
        ticks(clock, before, False, branch=branch)
    for step in (timestep, following):
        for branch in (0, 1):
            clock.tick(torch.tensor(step), branch)
            full, number = clock.told(branch)
            assert full
            numbers.append(int(number))
    assert numbers[2] == numbers[3] not in numbers[:2]
    assert ticks(clock, [following - 10.0], False) == [False]


def test_what_the_clock_answered_stays_as_it_was() -> None:
    clock = GenerationClock()
    answers = []
    for timestep in (900.0, 800.0, 700.0):
        clock.tick(torch.tensor(timestep))
        answers.append((clock.step(), clock.calls(), *clock.told()))
    assert [(int(step), int(calls), bool(full)) for step, calls, full, _ in answers] == [
        (0, 1, True),
        (1, 2, False),
        (2, 3, False),
    ]
    clock.reset()
    clock.tick(torch.tensor(600.0))
    assert int(clock.told()[1]) != int(answers[-1][3])


def test_branches_have_their_own_time() -> None:
    clock = GenerationClock()
    clock.tick(torch.tensor(900.0))
    clock.tick(torch.tensor(800.0))
    with skip_branch(1):
        clock.tick(torch.tensor(800.0))
        assert int(clock.step()) == 0
        assert clock.start_full
    clock.tick(torch.tensor(700.0))
    assert int(clock.step()) == 2
    assert not clock.start_full
    clock.tick(torch.tensor(800.0), branch=1)
    assert int(clock.step(1)) == 0, "the same timestep as before in this branch"
    clock.tick(torch.tensor(700.0), branch=MAX_BRANCHES - 1)
    assert clock.start_full
    assert [int(clock.step(branch)) for branch in (0, 1, 2, MAX_BRANCHES - 1)] == [2, 0, -1, 0]


def test_casts_and_moves_of_the_model_leave_the_time_alone() -> None:
    clock = GenerationClock()
    steps_of(clock, [0.9991, 0.9990])
    clock.to(torch.bfloat16).to("meta").to_empty(device="cpu")
    assert steps_of(clock, [0.9990, 0.9989]) == [1, 2]


def test_the_time_is_kept_where_the_timesteps_are() -> None:
    clock = GenerationClock()
    steps_of(clock, [0.9, 0.8])
    generation = int(clock.generation)
    clock.tick(torch.tensor(0.7, device="meta"))
    assert clock.start_full.device.type == clock.generation.device.type == clock.step().device.type == "meta"
    assert steps_of(clock, [0.6, 0.5]) == [0, 1]
    assert int(clock.generation) != generation


def test_a_clock_made_on_meta_is_real() -> None:
    with torch.device("meta"):
        clock = GenerationClock(2)
    assert steps_of(clock, [900.0, 800.0, 700.0]) == [0, 1, 2]
    assert not clock.start_full


def test_one_graph_for_all_steps_and_generations() -> None:
    counter = CompileCounter()
    clock = GenerationClock(2)
    eager = copy.deepcopy(clock)
    compiled = torch.compile(clock.tick, fullgraph=True, backend=counter)
    between = set()  # the numbers of a copy's generations are its own
    for timestep in (900.0, 700.0, 700.0, 500.0, 900.0, 700.0, 500.0):
        compiled(torch.tensor([timestep]))
        eager.tick(torch.tensor([timestep]))
        assert int(clock.step()) == int(eager.step())
        assert bool(clock.start_full) == bool(eager.start_full)
        between.add(int(clock.generation) - int(eager.generation))
    assert len(between) == 1
    assert counter.frame_count == 1


def test_made_in_inference_mode_it_can_be_used_outside() -> None:
    with torch.inference_mode():
        clock = GenerationClock()
        clock.tick(torch.tensor(9.0))
    assert steps_of(clock, [8.0, 7.0]) == [1, 2]


@pytest.mark.parametrize("argument", ["timestep", "stream"])
def test_a_call_inside_a_transform_is_refused_and_not_noted(argument: str) -> None:
    clock = GenerationClock()
    ticks(clock, [9.0, 7.0], watched=True)
    before = {name: buffer.clone() for name, buffer in clock.state.named_buffers()}
    both = {"timestep": torch.tensor([5.0, 4.0]), "stream": torch.tensor([1, 2])}[argument]

    def tick(x: Tensor) -> Tensor:
        clock.tick(**{"timestep": torch.tensor(5.0), "watched": True} | {argument: x})
        return x

    with pytest.raises(
        NotImplementedError, match=rf"^GenerationClock: {argument} is inside a transform of torch\.func"
    ):
        torch.vmap(tick)(both)
    assert all(torch.equal(buffer, before[name]) for name, buffer in clock.state.named_buffers())


def test_errors() -> None:
    clock = GenerationClock()
    calls: dict[str, Callable[[], object]] = {
        "1.5 first steps": lambda: GenerationClock(1.5),  # type: ignore[arg-type]
        "-1 first steps": lambda: GenerationClock(-1),
        "a number": lambda: clock.tick(900.0),  # type: ignore[arg-type]
        "complex timesteps": lambda: GenerationClock().tick(torch.tensor(1j)),
        "watched by text": lambda: GenerationClock().tick(torch.tensor(1.0), watched="no"),  # type: ignore[arg-type]
        "no timesteps": lambda: clock.tick(torch.zeros(0)),
        "a stream's name": lambda: clock.tick(torch.tensor(1.0), stream="one"),  # type: ignore[arg-type]
        "a stream of floats": lambda: clock.tick(torch.tensor(1.0), stream=torch.zeros(2)),
        "schedule step -1": lambda: clock.at_schedule_step(-1),
        "schedule timestep": lambda: clock.at_schedule_step(1, "7"),  # type: ignore[arg-type]
        "branch 8": lambda: clock.step(8),
    }
    assert_expected_inline(
        report(calls),
        """\
1.5 first steps -> TypeError: GenerationClock: dense_steps has type float, expected an int
-1 first steps -> ValueError: GenerationClock: dense_steps is -1, expected at least 0
a number -> TypeError: GenerationClock: timestep has type float, expected a tensor
complex timesteps -> TypeError: GenerationClock: timestep has dtype torch.complex64, expected real numbers
watched by text -> TypeError: GenerationClock: watched has type str, expected a bool
no timesteps -> ValueError: GenerationClock: timestep has shape [0], expected at least one entry
a stream's name -> TypeError: GenerationClock: stream is str, expected a tensor of torch.int64, 0-d, or None
a stream of floats -> TypeError: GenerationClock: stream is torch.float32, 1-d, expected a tensor of torch.int64, 0-d, or None
schedule step -1 -> ValueError: GenerationClock: step is -1, expected 0 to 65534
schedule timestep -> TypeError: GenerationClock: timestep has type str, expected a number
branch 8 -> ValueError: GenerationClock: branch is 8, expected 0 to 7""",
    )


def test_a_clock_copied_in_inference_mode_ticks_outside_of_it() -> None:
    with torch.inference_mode():
        clock = copy.deepcopy(GenerationClock())
    clock.tick(torch.tensor(5.0))
    clock.tick(torch.tensor(4.0))
    assert not clock.start_full
    clock.reset()
    clock.tick(torch.tensor(3.0))
    assert clock.start_full
