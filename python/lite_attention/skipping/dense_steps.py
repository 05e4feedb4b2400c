"""Which steps of a generation are dense: where in it a model call is, told from its timestep and on the device alone.

A generation denoises one video: its timesteps go one way, down or up. A turn in one branch therefore starts the next
generation, for all of them, which must not use the skip state of the last. Nothing here waits for the device or changes
a Python value, so that the same code runs eagerly, compiled, and in a CUDA graph, which sees a new generation in the
values it is replayed on.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from lite_attention.ops.checks import checked_bool, checked_int, checked_number
from lite_attention.ops.modes import ordinary_tensors, real_tensors
from lite_attention.ops.own_state import OwnState, hold
from lite_attention.skipping.arguments import check_no_transform
from lite_attention.skipping.branches import MAX_BRANCHES, BranchHolder, resolved_branch

__all__ = ["ClockState", "GenerationClock"]

# Timesteps are compared as integers of this resolution: they come as sigmas from 0 to 1 or as numbers up to a thousand.
TICKS_PER_UNIT = 2**20
TIMESTEP_LIMIT = 2**42
NO_STEP = -1
NO_SCHEDULE_STEP = -1
MAX_SCHEDULE_STEPS = 2**16
NO_DIRECTION = 0
DOWN = -1
NO_GENERATION = 0
# Beside the bits of the branches: one of them has gone on to another timestep since.
LEFT_OUT = 1 << MAX_BRANCHES

# Each clock numbers its generations from a random one on, so that two clocks never tell a layer the same: also not
# where the layer, or the clock, was copied or comes from another process.
GENERATIONS_PER_CLOCK = 2**20


def _first_generation() -> int:
    # Of the system's randomness, which no seed and no fork repeats.
    return (1 + secrets.randbelow(2**42)) * GENERATIONS_PER_CLOCK


class ClockState(OwnState):
    """What a clock remembers: of the latest call, 0-d, and of each branch, int64 ``[MAX_BRANCHES]``."""

    start_full: Tensor
    generation: Tensor
    newest_generation: Tensor
    """That a branch began last, which the others join at their next call; NO_GENERATION for the next call to begin."""
    next_generation: Tensor
    heading: Tensor
    """Direction of the newest generation, as the latest call that has one has it."""
    usual: Tensor
    """Direction that two changes in a row confirmed last; down at first."""
    latest_timestep: Tensor
    """Of the latest call, whatever its branch."""
    schedule_step: Tensor
    schedule_timestep: Tensor
    """Of that step in the scheduler's own list: float64."""
    starts: Tensor
    steps: Tensor
    generations: Tensor
    timesteps: Tensor
    directions: Tensor
    moments: Tensor
    """Timestep and step of the scheduler, of which two calls of one stream never have both."""
    planned: Tensor
    """The scheduler's own timestep of that step, as the call's dtype rounds it."""
    since: Tensor
    """The branches that were called since: a bit each, and LEFT_OUT where one of them has left this one's timestep."""
    streams: Tensor
    watched: Tensor
    mixed: Tensor
    calls: Tensor
    mixed_calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._schedule = (NO_SCHEDULE_STEP, 0.0)
        self.start_over(torch.device("cpu"))

    def fresh_buffers(self, device: torch.device) -> dict[str, Tensor]:
        first = _first_generation()
        step, timestep = self._schedule

        def of_branches(value: int) -> Tensor:
            return torch.full((MAX_BRANCHES,), value, dtype=torch.int64, device=device)

        def single(value: int) -> Tensor:
            return torch.full((), value, dtype=torch.int64, device=device)

        def kept(value: int) -> Tensor:
            # Not 0-d: AOTInductor does not see in the next call what was copied to a 0-d buffer.
            return torch.full((1,), value, dtype=torch.int64, device=device)

        return {
            "start_full": torch.ones((), dtype=torch.bool, device=device),
            "generation": single(first),
            "newest_generation": kept(NO_GENERATION),
            "next_generation": single(first + 1),
            "heading": kept(NO_DIRECTION),
            "usual": kept(DOWN),
            "latest_timestep": kept(0),
            "schedule_step": single(step),
            "schedule_timestep": torch.full((), timestep, dtype=torch.float64, device=device),
            "starts": of_branches(1),
            "steps": of_branches(NO_STEP),
            "generations": of_branches(first),
            "timesteps": of_branches(0),
            "directions": of_branches(NO_DIRECTION),
            "moments": of_branches(0),
            "planned": of_branches(0),
            "since": of_branches(0),
            "streams": of_branches(0),
            "watched": of_branches(0),
            "mixed": of_branches(0),
            "calls": of_branches(0),
            "mixed_calls": single(0),
        }

    def set_schedule(self, step: int, timestep: float) -> None:
        """Note a step of the scheduler, also for the buffers that the first call makes on its device."""
        self._schedule = (step, timestep)
        with real_tensors():
            self.schedule_step.fill_(step)
            self.schedule_timestep.fill_(timestep)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy goes on with the generations under way; those that it begins are its own."""
        super().__setstate__(state)
        with real_tensors():
            self.next_generation.fill_(_first_generation())

    @property
    def device(self) -> torch.device:
        return self.start_full.device


class GenerationClock(BranchHolder):
    """Counts the denoising steps of each guidance branch and notices when a new generation starts.

    Call :meth:`tick` once before each model call, with its timestep. Calls with the same timestep belong to one step
    (schedulers of higher order). A timestep against the direction of those before in its branch starts a new
    generation; so does one against the latest call's in a branch that this generation has not called yet, or that was
    left out while another went on to the next timestep. All branches denoise one video: each of the others starts over
    at its next call, whatever its timestep. Timesteps that rise are taken for a turn too, until two rises in a row have
    shown that this is how they go here; then so are those that fall. Where the timesteps cannot tell (generations of a
    single step for each branch, one that starts with the timestep that the last one ended with, or that goes on in its
    direction: one that starts lower than where the last, broken off or complete, ended, or higher after timesteps that
    rose), call :meth:`reset` before each. The time is kept where the timesteps are: on another device
    it starts with a new generation.

    A caller that cannot know whether the calls of a branch follow each other or belong to two streams that would share
    a map (guidance branches that nobody names, tiles of a latent) says that they are ``watched``. A call that repeats
    the timestep of the one before, in the same step of the scheduler (:meth:`at_schedule_step`), or that has another
    ``stream``, may then be of another one: from there to the end of the generation every call of the branch starts from
    the full map, which is right for both.

    Args:
        dense_steps: in so many steps at the start of a generation every layer computes all tiles. The first step
            is always one of them.

    Raises:
        TypeError, ValueError: ``dense_steps`` is not an int of at least 0.
    """

    state: ClockState

    def __init__(self, dense_steps: int = 0) -> None:
        super().__init__()
        self._dense_steps = checked_int("GenerationClock: dense_steps", dense_steps, lowest=0)
        hold(self, "state", ClockState())

    @property
    def start_full(self) -> Tensor:
        """Whether layers start from the full map in this call: bool, 0-d, written by :meth:`tick`."""
        return self.state.start_full

    @property
    def generation(self) -> Tensor:
        """Number of this call's generation, for layers to compare: int64, 0-d, written by :meth:`tick`."""
        return self.state.generation

    @property
    def mixed_calls(self) -> Tensor:
        """Watched calls so far that may be of another stream than the call before: int64, 0-d, written by `tick`."""
        return self.state.mixed_calls

    def tick(
        self, timestep: Tensor, branch: int | None = None, watched: bool = False, stream: Tensor | None = None
    ) -> None:
        """Note that a model call begins. One of FakeTensors is not noted.

        Args:
            timestep: of this call, any shape and numeric dtype. Of several (one for each batch entry, frame or token)
                the largest counts. May be a sigma. One that is no number below 2**42 says nothing: the call is dense,
                and the next call of every branch begins a generation.
            branch: 0 to ``MAX_BRANCHES - 1``; None for the one of :class:`lite_attention.skip_branch`, or 0.
            watched: whether the call may be of another stream than the branch's call before.
            stream: a number that the calls of one stream share: int64, 0-d. Read where the call is watched; None
                stands for 0.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it.
            NotImplementedError: inside a transform of torch.func.
        """
        branch = resolved_branch(branch, "GenerationClock", self.chosen_branch)
        if not isinstance(timestep, Tensor):
            raise TypeError(f"GenerationClock: timestep has type {type(timestep).__name__}, expected a tensor")
        if timestep.is_complex():
            raise TypeError(f"GenerationClock: timestep has dtype {timestep.dtype}, expected real numbers")
        checked_bool("GenerationClock: watched", watched)
        if stream is not None and (not isinstance(stream, Tensor) or stream.dtype != torch.int64 or stream.dim() != 0):
            found = f"{stream.dtype}, {stream.dim()}-d" if isinstance(stream, Tensor) else type(stream).__name__
            raise TypeError(f"GenerationClock: stream is {found}, expected a tensor of torch.int64, 0-d, or None")
        check_no_transform("GenerationClock", timestep=timestep, stream=stream)
        if timestep.numel() == 0:
            raise ValueError(f"GenerationClock: timestep has shape {list(timestep.shape)}, expected at least one entry")
        if not torch.compiler.is_compiling() and is_fake(timestep):
            return
        state = self.state
        state.place(timestep.device, "GenerationClock", torch.compiler.is_compiling())
        units = timestep.detach().to(torch.float64).amax()
        # Past the limit all timesteps are one integer, and NaN is none: nothing is told from them, nor from the next.
        is_time = units.abs() < TIMESTEP_LIMIT
        now = torch.where(is_time, (units * TICKS_PER_UNIT).round().to(torch.int64), state.timesteps[branch])
        step, direction, generation = state.steps[branch], state.directions[branch], state.generations[branch]
        newest, heading, latest = state.newest_generation[0], state.heading[0], state.latest_timestep[0]
        usual = state.usual[0]
        known_stream, moment = state.streams[branch], state.moments[branch]
        # One number of both: AOTInductor cannot copy a 0-d buffer as it is where nothing writes it.
        now_moment = now * MAX_SCHEDULE_STEPS + state.schedule_step
        planned_units = state.schedule_timestep.to(timestep.dtype).to(torch.float64)
        planned = (planned_units * TICKS_PER_UNIT).round().to(torch.int64)
        change = torch.sign(now - state.timesteps[branch])
        is_late = generation != newest  # another branch, or a reset, began a generation since
        # A branch that is behind joins the others, unless its timestep goes against theirs: then it is the first.
        goes_against = torch.sign(now - latest) * heading < 0
        known = torch.where(direction == NO_DIRECTION, heading, direction)
        # With none known, a change may be the first of a schedule that goes the other way, or a video after one call.
        is_unusual = (known == NO_DIRECTION) & (change * usual < 0) & ~is_late
        turned = (change * known < 0) | is_unusual | ((state.since[branch] >= LEFT_OUT) & goes_against)
        is_new = is_late | turned
        begins = (newest == NO_GENERATION) | torch.where(is_late, goes_against, turned)
        ends_watch = turned | begins
        now_stream = torch.zeros_like(now) if stream is None or not watched else stream.to(now.device)
        new_step = torch.where(is_new, 0, step + change.abs())
        new_direction = torch.where(ends_watch, NO_DIRECTION, torch.where(is_late | (change == 0), direction, change))
        new_direction = torch.where(is_unusual, change, new_direction)
        # Two steps for which the scheduler itself has one timestep.
        unknown = now * MAX_SCHEDULE_STEPS + NO_SCHEDULE_STEP
        is_planned = (moment != now_moment) & (moment != unknown) & (now_moment != unknown)
        is_planned = is_planned & (state.planned[branch] == planned)
        repeats = is_time & (change == 0) & ~is_planned & ((state.watched[branch] != 0) | watched)
        changes_stream = (known_stream != now_stream) & (state.watched[branch] != 0) & watched
        meets = ~is_new & (repeats | changes_stream)
        # Streams that met before another branch began a generation may go on meeting in it.
        mixed = torch.where(ends_watch, 0, state.mixed[branch] + meets)
        start_full = (new_step < max(self._dense_steps, 1)) | (mixed > 0) | ~is_time
        new_generation = torch.where(begins, state.next_generation, newest)
        new_heading = torch.where(is_late | (new_direction == NO_DIRECTION), heading, new_direction)
        new_usual = torch.where(~is_new & (change != 0) & (change == direction), change, usual)
        others = torch.arange(MAX_BRANCHES, device=now.device) != branch
        # Called at another timestep since theirs, or at theirs before: not just as one whose timesteps are shifted.
        shares_last = state.timesteps == state.timesteps[branch]
        leaves_out = others & (change != 0) & ((state.since & (1 << branch) != 0) | shares_last)
        now_since = torch.where(others, state.since | (1 << branch) | leaves_out * LEFT_OUT, 0)
        # Everything is computed before anything is written.
        heading.copy_(torch.where(is_time, torch.where(begins, new_direction, new_heading), NO_DIRECTION))
        usual.copy_(new_usual)
        newest.copy_(torch.where(is_time, new_generation, NO_GENERATION))
        latest.copy_(now)
        state.next_generation.add_(begins)
        generation.copy_(new_generation)
        state.generation.copy_(new_generation)
        state.start_full.copy_(start_full)
        state.starts[branch].copy_(start_full)
        step.copy_(new_step)
        direction.copy_(new_direction)
        state.timesteps[branch].copy_(now)
        state.since.copy_(now_since)
        moment.copy_(now_moment)
        state.planned[branch].copy_(planned)
        known_stream.copy_(now_stream)
        state.mixed[branch].copy_(mixed)
        state.calls[branch].add_(1)
        state.mixed_calls.add_(meets)
        state.watched[branch].fill_(watched)

    def at_schedule_step(self, step: int | None, timestep: float = 0.0) -> None:
        """Say which step of the scheduler the coming calls are for.

        So a timestep that comes again in the next step (schedulers of higher order, timesteps that are rounded) is told
        from one that two streams share. Call it from plain Python: compiled and captured calls read what was said last.

        Args:
            step: its number, from 0 and below ``MAX_SCHEDULE_STEPS - 1``; None where it is not known.
            timestep: that the scheduler has for this step. Where those of two steps differ, in the dtype of the calls,
                calls at one timestep are of two streams all the same. Left out, the step alone counts.

        Raises:
            TypeError, ValueError: ``step`` is not such a number, or ``timestep`` is none.
        """
        number = NO_SCHEDULE_STEP
        if step is not None:
            number = checked_int("GenerationClock: step", step, 0, MAX_SCHEDULE_STEPS - 2)
        self.state.set_schedule(number, float(checked_number("GenerationClock: timestep", timestep)))

    def told(self, branch: int | None = None) -> tuple[Tensor, Tensor]:
        """``start_full`` and ``generation`` of the branch's latest call, whichever calls other threads make since.

        Args:
            branch: as :meth:`tick` had it.

        Returns:
            bool and int64, 0-d.
        """
        branch = resolved_branch(branch, "GenerationClock")
        return self.state.starts[branch] != 0, self.state.generations[branch].clone()

    def calls(self, branch: int | None = None) -> Tensor:
        """How many calls of the branch were noted: int64, 0-d."""
        return self.state.calls[resolved_branch(branch, "GenerationClock")].clone()

    def step(self, branch: int | None = None) -> Tensor:
        """Of the branch's latest call, in its generation, from 0: int64, 0-d, on the clock's device; -1 before any."""
        return self.state.steps[resolved_branch(branch, "GenerationClock")].clone()

    def reset(self) -> None:
        """Let the next call of every branch start a new generation, the same for all."""
        with ordinary_tensors():
            self.state.newest_generation.fill_(NO_GENERATION)
            self.state.heading.fill_(NO_DIRECTION)
            # Their steps stay: a branch that no later generation calls has had as many in its own.
            self.state.directions.fill_(NO_DIRECTION)
            self.state.mixed.fill_(0)
