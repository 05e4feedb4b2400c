"""What the layers of one transformer share: the time of the generation and the tokens that must be attended to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lite_attention.maps.ranges import parse_ranges
from lite_attention.ops.modes import ordinary_tensors
from lite_attention.skipping.dense_steps import GenerationClock

__all__ = ["MAX_MUST_DO_RANGES", "Generation", "checked_pairs"]

MAX_MUST_DO_RANGES = 16
"""Ranges that ``must_do`` may hold: a fixed number, so that changing them changes no shape."""


class Generation(nn.Module):
    """The clock of one transformer, and the ranges of video tokens ``[MAX_MUST_DO_RANGES, 2]`` once there are any."""

    must_do: Tensor | None

    def __init__(self, dense_steps: int) -> None:
        super().__init__()
        self.clock = GenerationClock(dense_steps)
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
        self.clock.tick(timestep)


def checked_pairs(ranges: Sequence[int] | None) -> list[tuple[int, int]]:
    """``[start, end, ...]`` as pairs; TypeError or ValueError where it is something else."""
    if ranges is None:
        return []
    pairs = parse_ranges(ranges, 2**31, "must_do", "video tokens")
    if len(pairs) > MAX_MUST_DO_RANGES:
        raise ValueError(f"must_do has {len(pairs)} ranges, expected at most {MAX_MUST_DO_RANGES}")
    return pairs
