"""The schedule of the pipeline that a transformer is in: whether a video begins, and which step of it comes.

Looked at where a model call begins in plain Python, and written to by nobody here: schedulers may be copied, restored,
replaced and shared.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from lite_attention.integrations.diffusers import _internals

__all__ = ["PipelineSchedule"]


class PipelineSchedule:
    """What the scheduler of a pipeline, the one that it has at the moment, says to one of its transformers.

    A copy or pickle of the pipeline holds one that looks at the copy's scheduler: see :meth:`join`. A transformer that
    is copied without it goes on looking at the pipeline that it was in, and at the scheduler that is copied with it: at
    that alone from when it is used on. One that is pickled alone takes the scheduler along.

    Args:
        pipeline: anything with a ``scheduler``, or None.
        scheduler: what is looked at without a pipeline.
    """

    is_empty: bool
    """Whether there never was a pipeline or a scheduler to look at."""

    def __init__(self, pipeline: object | None, scheduler: object | None = None) -> None:
        self.is_empty = pipeline is None and scheduler is None
        self._pipeline = _reference(pipeline)
        self._scheduler = scheduler
        self._copied: tuple[PipelineSchedule, ...] = ()
        self._values: list[float] = []
        self._timesteps: object | None = None
        self._take_over(self._present_timesteps())
        self._step = _internals.schedule_step(self._scheduler)

    def join(self) -> None:
        """Let the pipeline's copies tell the copies of this which pipeline they are in, until :meth:`leave`."""
        pipeline = self._pipeline()
        if hasattr(pipeline, "__dict__"):
            names = (f"_lite_attention_place_{number}" for number in itertools.count())
            vars(pipeline)[next(name for name in names if name not in vars(pipeline))] = _Place(self)

    def leave(self) -> None:
        """Take off the pipeline what :meth:`join` put there."""
        held = getattr(self._pipeline(), "__dict__", {})
        for name in [name for name, value in held.items() if isinstance(value, _Place) and value.schedule is self]:
            del held[name]

    def video_begins(self) -> bool:
        """Whether the scheduler was given other timesteps, or went back, since this was asked last."""
        for schedule in self._copied:
            before = schedule._step
            begins = schedule.video_begins()
            if begins or schedule._step != before:
                vars(self).update(vars(schedule))  # in use, so it is the one of this transformer
                return begins
        timesteps = self._present_timesteps()
        step, last = _internals.schedule_step(self._scheduler), self._step
        self._step = step
        # By identity: set_timesteps makes a tensor for each video, with the values of the one before.
        if timesteps is not self._timesteps:
            self._take_over(timesteps)
            return True
        return step is not None and last is not None and step < last

    def step(self) -> tuple[int | None, float]:
        """The step that comes next and its timestep; None and 0 where the scheduler tells none."""
        step = self._step
        return (step, self._values[step]) if step is not None and step < len(self._values) else (None, 0.0)

    def _present_scheduler(self) -> object | None:
        pipeline = self._pipeline()
        if pipeline is not None:
            self._scheduler = getattr(pipeline, "scheduler", None)
        return self._scheduler

    def _present_timesteps(self) -> object | None:
        timesteps: object | None = getattr(self._present_scheduler(), "timesteps", None)
        return timesteps

    def _take_over(self, timesteps: object | None) -> None:
        self._timesteps = timesteps
        self._values = _internals.schedule_values(timesteps)

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineSchedule:
        copied = copy.copy(self)
        memo[id(self)] = copied
        # Whether the pipeline is copied too, and which is its copy, _Place tells. Its parts may be copied without it.
        schedulers = [each._present_scheduler() for each in (self, *self._copied)]
        try:
            present = [copy.deepcopy(scheduler, memo) for scheduler in schedulers if scheduler is not None]
        except Exception:  # then nobody's copy has it either
            present = []
        copied._copied = tuple(PipelineSchedule(None, scheduler) for scheduler in present)
        return copied

    def __copy__(self) -> PipelineSchedule:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pipeline": None, "_scheduler": self._present_scheduler()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_pipeline": _nothing})


class _Place:
    """What a pipeline holds for one of its transformers: copied with it, it tells the transformer's copy where it is.

    The transformer's copy may be made first (of a handle and its pipeline, say), where nobody knows of the pipeline's.
    """

    def __init__(self, schedule: PipelineSchedule) -> None:
        self.schedule = schedule

    def __getstate__(self) -> dict[str, Any]:
        schedule = self.schedule
        seen = {"_scheduler": schedule._present_scheduler(), "_timesteps": schedule._timesteps}
        return {"schedule": schedule, "pipeline": schedule._pipeline(), "seen": seen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.schedule = state["schedule"]
        vars(self.schedule).update(state["seen"] | {"_pipeline": _reference(state["pipeline"]), "_copied": ()})


def is_plain_call() -> bool:
    """Whether Python runs as it is: what it does in compiled or captured code happens once and not in each call."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _nothing() -> None:
    return None


def _reference(pipeline: object | None) -> Callable[[], object | None]:
    """The pipeline, without keeping it, and all its models, for as long as the transformer lives."""
    if pipeline is None:
        return _nothing
    try:
        return weakref.ref(pipeline)
    except TypeError:  # not of its class
        return lambda: pipeline
