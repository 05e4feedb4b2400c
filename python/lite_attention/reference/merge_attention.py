"""The oracle's ``merge_attention``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge_attention"]


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, compute_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Exact merge of attention over disjoint sets of keys.

    Args:
        outs: at least one ``[B, Sq, H, D]``.
        lses: as many ``[B, H, Sq]``, natural log.

    Returns:
        out and lse of attention over all the keys, in ``compute_dtype``; rows without any key give 0 and -inf.
    """
    all_lses = torch.stack([lse.to(compute_dtype) for lse in lses])
    # Masked before logarithm and exponential: their gradients would be NaN, and autograd here is the gradient's oracle.
    no_keys = (all_lses == -math.inf).all(0)
    lse = torch.logsumexp(all_lses.masked_fill(no_keys, 0.0), 0).masked_fill(no_keys, -math.inf)
    weights = torch.exp((all_lses - lse).masked_fill(no_keys, -math.inf))
    weighted = [w.transpose(1, 2).unsqueeze(-1) * out.to(compute_dtype) for w, out in zip(weights, outs, strict=True)]
    return torch.stack(weighted).sum(0), lse
