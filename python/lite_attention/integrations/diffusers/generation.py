"""What the layers of one transformer share: the time of the generation and the tokens that must be attended to."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lite_attention.maps.ranges import parse_ranges
from lite_attention.ops.modes import ordinary_tensors
from lite_attention.skipping.branches import branch_is_chosen
from lite_attention.skipping.dense_steps import GenerationClock

__all__ = ["MAX_MUST_DO_RANGES", "Generation", "checked_pairs"]

MAX_MUST_DO_RANGES = 16
"""Ranges that ``must_do`` may hold: a fixed number, so that changing them changes no shape."""

_logger = logging.getLogger("lite_attention")


class Call:
    """Whether a call of the transformer is under way that the clock knows of."""

    is_running = False


class Generation(nn.Module):
    """The clock of one transformer, and the ranges of video tokens ``[MAX_MUST_DO_RANGES, 2]`` once there are any.

    Args:
        dense_steps: as for GenerationClock.
        watched: whether calls that name no branch are suspected to be of several streams where they repeat a timestep.
    """

    must_do: Tensor | None

    def __init__(self, dense_steps: int, watched: bool) -> None:
        super().__init__()
        self.clock = GenerationClock(dense_steps)
        self.call = Call()
        self._watched = watched
        self._told = False
        self.register_buffer("must_do", None, persistent=False)

    def set_must_do(self, ranges: list[tuple[int, int]]) -> bool:
        """Take over the ranges, and say whether that made a new buffer."""
        is_new = self.must_do is None and len(ranges) > 0
        if is_new:
            with ordinary_tensors():
                empty = torch.zeros(MAX_MUST_DO_RANGES, 2, dtype=torch.int64, device=self.clock.start_full.device)
            self.register_buffer("must_do", empty, persistent=False)
        if self.must_do is not None:
            rows = [*ranges, *[(0, 0)] * (MAX_MUST_DO_RANGES - len(ranges))]
            self.must_do.copy_(torch.tensor(rows))
        return is_new

    def tick(self, timestep: Tensor) -> None:
        """Note that a call of the transformer begins, with its timestep."""
        if isinstance(timestep, Tensor) and self.clock.start_full.device != timestep.device:
            with ordinary_tensors():
                self.to(timestep.device)  # offloading moves the transformer only once its forward begins
        self.clock.tick(timestep, watched=self._watched and not branch_is_chosen())

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
        mixed = int(self.clock.mixed_calls)
        if mixed > 0 and not self._told:
            self._told = True
            _logger.warning(
                "%d model calls had the timestep of the call before and no name, so that nothing tells whether they "
                "follow each other or belong to two guidance branches (or tiles of a latent): from there on all tiles "
                "of that video were computed, nothing was skipped. If each step calls the model once for each branch, "
                "call it in transformer.cache_context(name). If all calls are one stream (all branches in one batch, "
                "and a scheduler that calls twice at one timestep), say enable_lite_attention(..., guidance='batched')",
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
