"""Problems of attention between blocks, and dense arithmetic, head by head, to compare their results with.

All tensors are ``[B, H, S, D]`` here, as arithmetic written by heads reads best so; :func:`swapped` is for the calls.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Video(NamedTuple):
    """One problem. Sizes of blocks are powers of two, for which means of small integers are exact in every dtype."""

    sizes: tuple[int, ...] = (64, 16, 64, 16, 32, 8, 64, 1)
    q_sizes: tuple[int, ...] | None = None
    volume: int = 64
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    topk: int = 3
    prefix_blocks: int = 0
    scale: float | None = None
    gate: str = "random"

    @property
    def query_sizes(self) -> tuple[int, ...]:
        return self.sizes if self.q_sizes is None else self.q_sizes


def exists(sizes: tuple[int, ...], volume: int) -> Tensor:
    """bool ``[S]``: which slots hold a token."""
    return (torch.arange(volume) < torch.tensor(sizes).unsqueeze(-1)).flatten()


def make_inputs(video: Video, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and the gate. Entries of q and k are -1, 0 or 1, so that every backend finds the same scores, and ties."""
    random = torch.Generator().manual_seed(seed)

    def padded(sizes: tuple[int, ...], heads: int, values: Tensor | None = None) -> Tensor:
        shape = (video.batch, heads, len(sizes) * video.volume, video.head_dim)
        x = torch.randn(shape, generator=random)
        if values is not None:
            # Tokens of a block are alike, or all means would be close to 0.
            alike = values[torch.randint(len(values), (*shape[:2], len(sizes), 1, video.head_dim), generator=random)]
            each = values[torch.randint(len(values), shape, generator=random)]
            x = torch.where(x > 0, each, alike.expand(-1, -1, -1, video.volume, -1).reshape(shape))
        return torch.where(exists(sizes, video.volume).unsqueeze(-1), x, 0.0).to(dtype)

    digits = torch.tensor([-1.0, 0.0, 1.0])
    q = padded(video.query_sizes, video.heads, digits)
    k = padded(video.sizes, video.kv_heads, digits)
    v = padded(video.sizes, video.kv_heads)
    gates = {"random": torch.randn(q.shape, generator=random), "zero": torch.zeros(q.shape), "none": None}
    gate = gates[video.gate]
    return q, k, v, None if gate is None else gate.to(dtype)


def per_query_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention; k and v may have fewer heads. Returns out and the natural log of the softmax denominator."""
    k, v = per_query_head(k, q.shape[1]), per_query_head(v, q.shape[1])
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(lse.unsqueeze(-1) == -math.inf, 0)
    return weights.to(v.dtype) @ v, lse


def token_mask(blocks: Tensor, sizes: tuple[int, ...], volume: int) -> Tensor:
    return blocks.repeat_interleave(volume, -1).repeat_interleave(volume, -2) & exists(sizes, volume)


def swapped(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` as ``[B, S, H, D]`` and back."""
    return x.transpose(1, 2)


def random_blocks(video: Video, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    sizes = (video.batch, video.heads, len(video.query_sizes), len(video.sizes))
    return torch.rand(sizes, generator=random) < 0.4
