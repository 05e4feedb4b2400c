"""What streaming heads see, row by row, and dense attention under such a mask."""

import math

import torch
from torch import Tensor

from support.inputs import assert_as_good_as_naive


def seen(queries: int, keys: int, first_position: int, sink_size: int, recent_size: int) -> Tensor:
    """bool ``[queries, keys]``, row by row."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for row in range(queries):
        position = row + first_position
        mask[row, : max(0, min(position + 1, sink_size))] = True
        mask[row, max(0, position + 1 - recent_size) : max(0, position + 1)] = True
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention under a bool mask that broadcasts to ``[B, Hq, Sq, Sk]``, all in one dtype."""
    group = q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~mask.to(q.device), -math.inf)
    weights = scores.softmax(-1).nan_to_num(0)  # rows without a key
    return (weights @ value).transpose(1, 2), scores.logsumexp(-1)


def check(result: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    exact, naive = dense(q, k, v, mask, torch.float64), dense(q, k, v, mask, q.dtype)
    assert result[0].dtype == q.dtype
    assert result[1].dtype == torch.float32
    for name, got, right, low in zip(("out", "lse"), result, exact, naive, strict=True):
        assert got.shape == right.shape
        assert_as_good_as_naive(name, got, right, low)
