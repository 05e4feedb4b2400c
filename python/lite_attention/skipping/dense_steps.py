"""Which steps of a generation are dense: where in it a model call is, told from its timestep and on the device alone.

A generation denoises one video: its timesteps go one way, down or up. A turn therefore starts the next generation,
which must not use the skip state of the last. Nothing here waits for the device or changes a Python value, so that the
same code runs eagerly, compiled, and in a CUDA graph, which sees a new generation in the values it is replayed on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lite_attention.ops.checks import checked_int
from lite_attention.ops.modes import make_buffers_ordinary, ordinary_tensors
from lite_attention.skipping.branches import MAX_BRANCHES, resolved_branch

__all__ = ["GenerationClock"]

# Timesteps are compared as integers of this resolution: they come as sigmas from 0 to 1 or as numbers up to a thousand,
# and integers survive what nn.Module.to does to floating-point buffers.
TICKS_PER_UNIT = 2**20
NO_STEP = -1

# Each clock counts its generations from a number of its own, so that two clocks never tell a layer the same one.
GENERATIONS_PER_CLOCK = 2**32
_clocks = itertools.count(1)


class GenerationClock(nn.Module):
    """Counts the denoising steps of each guidance branch and notices when a new generation starts.

    Call :meth:`tick` once before each model call, with its timestep. Calls with the same timestep belong to one step
    (schedulers of higher order). A timestep against the direction of those before starts a new generation. Where the
    timesteps cannot tell (generations of a single step, or one broken off and followed by one that starts lower), call
    :meth:`reset`.

    A caller that cannot know whether calls with one timestep follow each other (a scheduler of higher order) or belong
    to two streams that would share a map (guidance branches that nobody names) says that they are ``watched``. From the
    first repeated timestep to the end of the generation every call then starts from the full map, which is right for
    both.

    Args:
        dense_steps: in so many steps at the start of a generation every layer computes all tiles. The first step
            is always one of them.

    Raises:
        TypeError, ValueError: ``dense_steps`` is not an int of at least 0.
    """

    start_full: Tensor
    """Whether layers start from the full map in this call: bool, 0-d, written by :meth:`tick`."""

    generation: Tensor
    """Number of this call's generation, for layers to compare: int64, 0-d, written by :meth:`tick`."""

    mixed_calls: Tensor
    """Watched calls so far that repeated the timestep of the call before: int64, 0-d."""

    _steps: Tensor
    _generations: Tensor
    _timesteps: Tensor
    _directions: Tensor
    _dense_steps: Tensor
    _watched: Tensor
    _mixed: Tensor

    def __init__(self, dense_steps: int = 0) -> None:
        super().__init__()
        self._dense_steps_value = checked_int("GenerationClock: dense_steps", dense_steps, lowest=0)
        for name, buffer in self._fresh_buffers(None).items():
            self.register_buffer(name, buffer, persistent=False)

    def _fresh_buffers(self, device: torch.device | None) -> dict[str, Tensor]:
        with ordinary_tensors():
            first = next(_clocks) * GENERATIONS_PER_CLOCK
            zeros = torch.zeros(MAX_BRANCHES, dtype=torch.int64, device=device)
            return {
                "start_full": torch.ones((), dtype=torch.bool, device=device),
                "generation": torch.full((), first, dtype=torch.int64, device=device),
                "_steps": torch.full_like(zeros, NO_STEP),
                "_generations": torch.full_like(zeros, first),
                "_timesteps": zeros,
                "_directions": zeros.clone(),
                "_dense_steps": torch.tensor(self._dense_steps_value, device=device),
                "_watched": zeros.clone(),
                "_mixed": zeros.clone(),
                "mixed_calls": torch.zeros((), dtype=torch.int64, device=device),
            }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GenerationClock:
        """As nn.Module's; a clock that was on the meta device, without values, starts over."""
        had_values = not self.start_full.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not had_values:
            for name, buffer in self._fresh_buffers(self.start_full.device).items():
                setattr(self, name, buffer)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        make_buffers_ordinary(self)

    def tick(self, timestep: Tensor, branch: int | None = None, watched: bool = False) -> None:
        """Note that a model call begins.

        Args:
            timestep: of this call, any shape and numeric dtype, on the clock's device. Of several (one for each batch
                entry, frame or token) the largest counts. May be a sigma.
            branch: 0 to ``MAX_BRANCHES - 1``; None for the one of :class:`lite_attention.skip_branch`, or 0.
            watched: whether the call may be of another stream than the branch's call before.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it.
        """
        branch = resolved_branch(branch, "GenerationClock")
        if not isinstance(timestep, Tensor):
            raise TypeError(f"GenerationClock: timestep has type {type(timestep).__name__}, expected a tensor")
        if timestep.numel() == 0:
            raise ValueError(f"GenerationClock: timestep has shape {list(timestep.shape)}, expected at least one entry")
        if timestep.device != self.start_full.device:
            raise ValueError(
                f"GenerationClock: timestep is on {timestep.device}, expected {self.start_full.device}, the clock's "
                "device"
            )
        now = (timestep.detach().amax().to(torch.float64) * TICKS_PER_UNIT).round().to(torch.int64)
        step, direction = self._steps[branch], self._directions[branch]
        change = torch.sign(now - self._timesteps[branch])
        is_new = (step == NO_STEP) | (change * direction < 0)
        new_step = torch.where(is_new, 0, step + change.abs())
        new_direction = torch.where(is_new, 0, torch.where(change == 0, direction, change))
        repeats = ~is_new & (change == 0) & ((self._watched[branch] != 0) | watched)
        mixed = torch.where(is_new, 0, self._mixed[branch] + repeats)
        self.start_full.copy_((new_step < self._dense_steps.clamp(min=1)) | (mixed > 0))
        self.mixed_calls.add_(repeats)
        self._mixed[branch].copy_(mixed)
        self._watched[branch].fill_(watched)
        generation = self._generations[branch]
        generation.add_(is_new)
        self.generation.copy_(generation)
        step.copy_(new_step)
        direction.copy_(new_direction)
        self._timesteps[branch].copy_(now)

    def step(self, branch: int | None = None) -> Tensor:
        """The branch's step in its generation, from 0: int64, 0-d, on the clock's device; -1 before the first."""
        return self._steps[resolved_branch(branch, "GenerationClock")]

    def reset(self) -> None:
        """Let the next call of every branch start a new generation."""
        self._steps.fill_(NO_STEP)
