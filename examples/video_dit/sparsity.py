"""A differentiable count of the tiles that LiteAttention's rule would keep, to train attention worth skipping."""

from __future__ import annotations

import torch
from torch import Tensor

from emulated import LOG2_E, TILE_M, TILE_N, tile_margins, visiting_order


def soft_density(query: Tensor, key: Tensor, query_tiles: Tensor, threshold: float, width: float) -> Tensor:
    """Mean over (query tile, KV tile) of sigmoid((margin - threshold) / width), a scalar in [0, 1].

    The margin is that of the drop rule in its visiting order, in powers of two. Only the listed query tiles are
    looked at: the score matrix of all of them would be costly.

    Args:
        query, key: `[B, S, H, D]`, S a multiple of 128.
        query_tiles: int64, indices of the query tiles to look at.
        threshold, width: where the count changes from kept to dropped and how softly, in powers of two.
    """
    b, s, h, d = query.shape
    q = query.view(b, s // TILE_M, TILE_M, h, d)[:, query_tiles].permute(0, 3, 1, 2, 4).reshape(b, h, -1, d)
    scores = torch.matmul(q, key.permute(0, 2, 3, 1))
    tiled = scores.view(b, h, len(query_tiles), TILE_M, s // TILE_N, TILE_N)
    tile_max = tiled.amax(dim=-1).float() * (d**-0.5 * LOG2_E)
    order = visiting_order(s, s, query.device)[query_tiles]
    keep = torch.ones((), dtype=torch.bool, device=query.device).expand(b, h, len(query_tiles), s // TILE_N)
    margin = tile_margins(tile_max, keep, order)
    return torch.sigmoid((margin - threshold) / width).mean()
