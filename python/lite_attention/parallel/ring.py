"""Ring attention: a rank's queries stay, the blocks of keys and values come round (arXiv 2310.01889)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_attention.ops import merge_attention
from lite_attention.parallel.collectives import start_shift
from lite_attention.parallel.mesh import RankGroup

__all__ = ["blocks_of_ring", "merged_parts"]


def blocks_of_ring(key: Tensor, value: Tensor, ring: RankGroup) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(rank whose they are, key, value) of each block, this rank's own first. The next one travels meanwhile."""
    kv_heads = key.shape[2]
    # Keys and values travel together: a second transfer could not begin while attention has all multiprocessors.
    kv = torch.cat([key, value], 2) if ring.size > 1 else key
    for step in range(ring.size):
        flight = start_shift(kv, ring) if step + 1 < ring.size else None
        yield (ring.rank - step) % ring.size, key, value
        if flight is not None:
            kv = flight.wait()
            key, value = kv[:, :, :kv_heads], kv[:, :, kv_heads:]


def merged_parts(parts: Sequence[tuple[Tensor, Tensor]], query: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse of all parts, as long as the query with its padding; 0 and -inf there."""
    batch, tokens, heads, _ = query.shape
    if not parts:
        return query.new_zeros(query.shape), query.new_full((batch, heads, tokens), -torch.inf, dtype=torch.float32)
    out, lse = parts[0] if len(parts) == 1 else merge_attention(*zip(*parts, strict=True))
    padding = tokens - out.shape[1]
    if padding > 0:
        out, lse = F.pad(out, (0, 0, 0, 0, 0, padding)), F.pad(lse, (0, padding), value=-torch.inf)
    return out, lse
