"""How much the calls of one pass over several blocks skip together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.maps.keep_map import tile_counts

__all__ = ["SkippedShare"]


class SkippedShare:
    """Which share of their tiles the calls of one pass skip together."""

    def __init__(self) -> None:
        self._calls: list[tuple[Tensor, int]] = []

    def of_call(self, query: Tensor, keys: int) -> Tensor:
        """A scalar for one call to write its share to."""
        fraction = torch.zeros((), dtype=torch.float32, device=query.device)
        _, rows, heads, head_dim = query.shape
        self._calls.append((fraction, heads * math.prod(tile_counts(rows, keys, head_dim, query.dtype))))
        return fraction

    def write_to(self, out: Tensor) -> None:
        out.zero_()
        all_tiles = sum(tiles for _, tiles in self._calls)
        for fraction, tiles in self._calls:
            out.add_(fraction, alpha=tiles / all_tiles)
