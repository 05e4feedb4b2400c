"""Three ways to choose which tiles attention computes, all without training and all called alike.

Every module is called as `attn(q, k, v)` with `[B, S, H, D]` tensors whose tokens lie in cubes of 64 (model.py), which
are the tiles of both other families: nothing is reordered for them. Switched off, each computes everything.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lite_attention import LiteAttention, attention, block_sparse, sliding_tile, top_k_map, unpack_keep_map
from lite_attention.families.sliding_tile import SlidingTileMap, sliding_tile_map
from model import BLOCK

CUBE = (BLOCK, BLOCK, BLOCK)
CUBE_TOKENS = BLOCK**3

Size = tuple[int, int, int]


class TileChoice(nn.Module):
    """Attention over chosen tiles that can tell which they were."""

    def __init__(self) -> None:
        super().__init__()
        self.skipping = True

    def skip(self, enable: bool) -> None:
        """Whether the passes that follow leave anything out."""
        self.skipping = enable

    def take_map(self) -> Tensor | None:
        """The tiles that the last pass computed, bool `[B or 1, H or 1, query_tiles, kv_tiles]`; None for all.

        To be asked once after every pass, and apart from it, so that it costs the pass no time.
        """
        raise NotImplementedError


class RememberedTiles(TileChoice):
    """LiteAttention: a pass leaves out the tiles that an earlier one found not to matter."""

    def __init__(self, threshold: float, batch: int) -> None:
        super().__init__()
        self.attention = LiteAttention(threshold=threshold, max_batch_size=batch)
        self.written: Tensor | None = None

    def skip(self, enable: bool) -> None:
        super().skip(enable)
        self.attention.enable_skip_optimization(enable)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = self.attention(query, key, value)
        if not isinstance(out, Tensor):
            raise TypeError("RememberedTiles: expected one tensor from the attention")
        return out

    def take_map(self) -> Tensor | None:
        if not self.skipping:
            return None
        # a pass computes what the one before it wrote down; the first has no map and computes everything
        used, self.written = self.written, self.attention.keep_map()
        return used


class SlidingTiles(TileChoice):
    """Sliding Tile Attention: the same window of cubes around every cube, for all layers, heads and steps."""

    def __init__(self, windows: SlidingTileMap) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.skipping:
            return attention(query, key, value)[0]
        return sliding_tile.attention(query, key, value, self.windows)[0]

    def take_map(self) -> Tensor | None:
        if not self.skipping:
            return None
        return unpack_keep_map(self.windows.keep, self.windows.image_tokens // self.windows.tile_n)


class TopBlocks(TileChoice):
    """Video Sparse Attention's fine stage alone: each cube of queries attends the cubes whose mean key suits it best.

    The coarse result and its gate are learned, so an untrained model has no use for them.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.chosen: Tensor | None = None  # packed

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.skipping:
            return attention(query, key, value)[0]
        q_means, k_means = (
            x.unflatten(1, (-1, CUBE_TOKENS)).mean(2, dtype=torch.float32).transpose(1, 2) for x in (query, key)
        )
        self.chosen = top_k_map(q_means @ k_means.transpose(-1, -2), self.count)
        sizes = torch.full((k_means.shape[2],), CUBE_TOKENS, dtype=torch.int32, device=key.device)
        out, _ = block_sparse.attention(query, key, value, self.chosen, sizes)
        return out

    def take_map(self) -> Tensor | None:
        if not self.skipping or self.chosen is None:
            return None
        return unpack_keep_map(self.chosen, self.chosen.shape[-2])


def make_windows(window: Size, grid: Size, head_dim: int, dtype: torch.dtype, device: torch.device) -> SlidingTileMap:
    """A window in cubes, as the map of all layers and steps."""
    return sliding_tile_map(window, grid, head_dim=head_dim, dtype=dtype, tile=CUBE, device=device)


def cubes_seen(windows: SlidingTileMap) -> int:
    """How many cubes every query sees: as many as the other family may choose at the same density."""
    first_row = windows.keep[0, 0, 0]
    return int(unpack_keep_map(first_row, windows.image_tokens // windows.tile_n).sum())
