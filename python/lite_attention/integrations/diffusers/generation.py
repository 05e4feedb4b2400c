"""What the layers of one transformer share: the time of the generation and the tokens that must be attended to."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from lite_attention.integrations.diffusers.guidance import stream_number
from lite_attention.maps.ranges import parse_ranges
from lite_attention.ops.modes import real_tensors
from lite_attention.ops.own_state import OwnState, StateHolder, hold
from lite_attention.skipping.dense_steps import GenerationClock

__all__ = ["MAX_MUST_DO_RANGES", "Generation", "checked_pairs"]

MAX_MUST_DO_RANGES = 16
"""Ranges that ``must_do`` may hold: a fixed number, so that changing them changes no shape."""

_logger = logging.getLogger("lite_attention")


class MustDo(OwnState):
    """Ranges of video tokens that every query attends to."""

    ranges: Tensor | None
    """int64 ``[MAX_MUST_DO_RANGES, 2]`` once there were any; rows that are empty cover nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[tuple[int, int]] = []
        self.start_over(torch.device("cpu"))

    def fresh_buffers(self, device: torch.device) -> dict[str, Tensor | None]:
        return {"ranges": torch.tensor(self._rows, dtype=torch.int64, device=device) if self._rows else None}

    @property
    def device(self) -> torch.device | None:
        return None if self.ranges is None else self.ranges.device

    def set(self, ranges: list[tuple[int, int]]) -> None:
        """Take over the ranges, in the buffer that there is."""
        if not ranges and self.ranges is None:
            return
        self._rows = [*ranges, *[(0, 0)] * (MAX_MUST_DO_RANGES - len(ranges))]
        if self.ranges is None:
            self.start_over(torch.device("cpu"))
        else:
            with real_tensors():
                self.ranges.copy_(torch.tensor(self._rows, dtype=torch.int64))


class Call:
    """Whether a call of the transformer is under way that the clock knows of."""

    is_running = False


class Generation(StateHolder):
    """The clock of one transformer, and the ranges of video tokens that must be attended to.

    Args:
        dense_steps: as for GenerationClock.
        watched: whether calls of one branch may be of several streams: see :meth:`tick`.
    """

    must_do: MustDo

    def __init__(self, dense_steps: int, watched: bool) -> None:
        super().__init__()
        self.clock = GenerationClock(dense_steps)
        self.call = Call()
        self._watched = watched
        self._told = False
        self._told_unseen = False
        self._told_modes: set[str] = set()
        hold(self, "must_do", MustDo())

    def tick(self, timestep: Tensor, conditioning: Tensor | None, caller: str) -> None:
        """Note that a call of the transformer begins.

        Args:
            timestep: of the call.
            conditioning: the text that it attends to, or None. Watched calls of a branch with another one than the
                call before, or with the same timestep, may be of another stream.
            caller: whose forward it is, for errors.

        Raises:
            TypeError: the timestep is no tensor.
        """
        if not isinstance(timestep, Tensor):
            raise TypeError(f"{caller}: timestep has type {type(timestep).__name__}, expected a tensor")
        stream = None
        if self._watched:
            stream = stream_number(conditioning, timestep.device)
            if timestep.device.type == "cpu":
                timestep = timestep.to(stream.device)  # the other way would wait for the device
        self.must_do.place(timestep.device, "LiteAttention", torch.compiler.is_compiling())
        self.clock.tick(timestep, watched=self._watched, stream=stream)

    @torch.compiler.assume_constant_result
    def say_left_to(self, mode: str) -> None:
        """Say, the first time, that attention is left to the layers' own because of another function mode."""
        if mode not in self._told_modes:
            self._told_modes.add(mode)
            _logger.warning(
                "A torch function mode, %s, is active around attention layers. It may replace the attention call, so "
                "their own attention runs inside of it, and nothing is skipped there",
                mode,
            )

    @torch.compiler.assume_constant_result
    def say_unseen(self) -> None:
        """Say, the first time, that the scheduler of the pipeline cannot be looked at."""
        if not self._told_unseen:
            self._told_unseen = True
            _logger.warning(
                "A transformer with LiteAttention is compiled as a whole, exported or captured, without a "
                "cache_context around it: nothing there sees the pipeline's scheduler, and a video that starts at or "
                "below the timestep of the last call is taken for more of the same. Call reset() on the handle before "
                "such a video, or compile the blocks one by one (compile_repeated_blocks)",
            )

    def start(self) -> None:
        """Let the next call of every branch begin a new generation."""
        self.mixed_calls()
        self.clock.reset()

    def mixed_calls(self) -> int:
        """Calls so far in which streams may have met; the first time that there are any, the log says so.

        Waits for the device.
        """
        if not self._watched:
            return 0
        with real_tensors():
            mixed = int(self.clock.mixed_calls)
        if mixed > 0 and not self._told:
            self._told = True
            _logger.warning(
                "%d model calls had another text than the call before in their branch, or its timestep in the same "
                "step of the scheduler, so that nothing tells whether they follow each other or belong to two guidance "
                "branches (or tiles of a latent): from there on all tiles of that video were computed, nothing was "
                "skipped. If each step calls the model for several streams, call each in "
                "transformer.cache_context(name), with a name of its own. If the calls of each name are one stream, "
                "say enable_lite_attention(..., guidance='named'); if all calls are (all branches in one batch, and a "
                "scheduler that calls twice at one timestep, or a text that changes), guidance='batched'",
                mixed,
            )
        return mixed


def checked_pairs(ranges: Sequence[int] | None) -> list[tuple[int, int]]:
    """``[start, end, ...]`` as pairs; TypeError or ValueError where it is something else."""
    if ranges is None:
        return []
    if not isinstance(ranges, Sequence) or isinstance(ranges, (str, bytes)):
        raise TypeError(f"must_do has type {type(ranges).__name__}, expected a list of ints: [start, end, ...]")
    pairs = parse_ranges(ranges, 2**31, "must_do", "video tokens")
    if len(pairs) > MAX_MUST_DO_RANGES:
        raise ValueError(f"must_do has {len(pairs)} ranges, expected at most {MAX_MUST_DO_RANGES}")
    return pairs
