"""Passes of one denoising run through a layer, and the same by the operator alone."""

import torch
from torch import Tensor

from lite_attention import LiteAttention, full_keep_map, pack_keep_map, skip_attention, unpack_keep_map
from support.inputs import Case, correlated_passes

CASE = Case(batch=2, query_len=400, kv_len=700, heads=4, kv_heads=2)
THRESHOLD = -8.0


def passes(case: Case = CASE, count: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(correlated_passes(case, torch.float32, count, seed))


def by_hand(inputs: list[tuple[Tensor, Tensor, Tensor]], threshold: float = THRESHOLD) -> list[tuple[Tensor, ...]]:
    """The same passes through the operator, the map carried along by hand: (out, lse, map after the pass)."""
    (batch, query_len, heads, head_dim), kv_len = inputs[0][0].shape, inputs[0][1].shape[1]
    keep = full_keep_map(batch, heads, query_len, kv_len, head_dim, inputs[0][0].dtype)
    results = []
    for q, k, v in inputs:
        out, lse, keep = skip_attention(q, k, v, keep, threshold)
        results.append((out, lse, keep))
    return results


def kept(layer: LiteAttention, branch: int | None = None) -> Tensor:
    return pack_keep_map(layer.keep_map(branch))


def dropped_something(keep: Tensor, kv_tiles: int) -> bool:
    return not bool(unpack_keep_map(keep, kv_tiles).all())


def video(seed: int, length: int = 1024, head_dim: int = 64) -> Tensor:
    """``[1, length, 1, head_dim]``: groups of like tokens in an order of the video's own, so that maps of two differ."""
    random = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(8, head_dim, generator=random)
    groups = torch.randint(8, (-(-length // 128),), generator=random).repeat_interleave(128)[:length]
    return (centres[groups] + 0.3 * torch.randn(length, head_dim, generator=random))[None, :, None]
