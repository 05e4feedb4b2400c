"""LiteAttention's drop rule written with dense torch operations, to study it on any device.

The package's own modules are what the demo runs. This stand-in served the GPU study of the model and its pilots, which
came before the GPU kernels: same call, same state, same decisions, at the cost of a full score matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TILE_M, TILE_N, VISIT_ROWS = 64, 128, 192  # the package's tile table for head_dim <= 128
LOG2_E = math.log2(math.e)


def visiting_order(query_len: int, kv_len: int, device: torch.device | str = "cpu") -> Tensor:
    """KV tiles in the order in which each query tile visits them: int64 `[query_tiles, kv_tiles]`, diagonal first."""
    kv_tiles = math.ceil(kv_len / TILE_N)
    first_row = torch.arange(0, query_len, TILE_M, device=device) // VISIT_ROWS * VISIT_ROWS
    start = first_row * kv_len // query_len // TILE_N
    return (start[:, None] + torch.arange(kv_tiles, device=device)) % kv_tiles


def tile_margins(tile_max: Tensor, keep: Tensor, order: Tensor) -> Tensor:
    """How far each tile's best row lies above that row's best so far, `[..., query_tiles, kv_tiles]`.

    +inf for the tile visited first.

    Args:
        tile_max: every row's largest score in each KV tile, `[..., query_tiles, TILE_M, kv_tiles]`.
        keep: bool `[..., query_tiles, kv_tiles]`, the tiles that are visited.
        order: from `visiting_order`.
    """
    index = order[:, None, :].expand(tile_max.shape)
    visited = torch.gather(tile_max.masked_fill(~keep.unsqueeze(-2), -math.inf), -1, index)
    running = visited.cummax(dim=-1).values
    before = torch.cat((torch.full_like(running[..., :1], -math.inf), running[..., :-1]), dim=-1)
    # a tile that is not visited gives -inf or, before any visited one, nan: neither passes a threshold
    margin = (visited - before).amax(dim=-2)
    return torch.empty_like(margin).scatter_(-1, order.expand(margin.shape), margin)


class EmulatedLiteAttention(nn.Module):
    """Drop-in for `lite_attention.LiteAttention` on sequences that are whole tiles, forward only."""

    def __init__(self, enable_skipping: bool = True, threshold: float = -10.0) -> None:
        super().__init__()
        self.enable_skipping = enable_skipping
        self.threshold = threshold
        self.keep: Tensor | None = None
        self.kept_history: list[Tensor] = []

    def set_threshold(self, threshold: float) -> None:
        self.threshold = threshold

    def enable_skip_optimization(self, enable: bool = True) -> None:
        self.enable_skipping = enable

    def reset_skip_state(self) -> None:
        self.keep = None
        self.kept_history = []

    def keep_map(self) -> Tensor | None:
        return self.keep

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, s, h, d = query.shape
        q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
        scores = torch.matmul(q, k.transpose(-1, -2)).mul_(d**-0.5 * LOG2_E)
        tiled = scores.view(b, h, s // TILE_M, TILE_M, s // TILE_N, TILE_N)
        if self.enable_skipping:
            if self.keep is None or self.keep.shape[0] != b:
                self.keep = torch.ones(b, h, s // TILE_M, s // TILE_N, dtype=torch.bool, device=q.device)
            self.kept_history.append(self.keep.float().mean(dim=(0, 2, 3)))
            margin = tile_margins(tiled.amax(dim=-1), self.keep, visiting_order(s, s, q.device))
            if not self.keep.all():
                tiled.masked_fill_(~self.keep[:, :, :, None, :, None], -math.inf)
            self.keep = self.keep & (margin > self.threshold)
        else:
            self.kept_history.append(torch.ones(h, device=q.device))
        weights = torch.softmax(scores.mul_(1 / LOG2_E), dim=-1)
        return torch.matmul(weights, v).transpose(1, 2).to(value.dtype)
