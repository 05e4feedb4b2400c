"""The oracle's ``top_k_map``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.maps.keep_map import pack_keep_map

__all__ = ["top_k_map"]


def top_k_map(scores: Tensor, count: int) -> Tensor:
    """The packed map of the ``count`` largest scores of each row; of equal ones those of lowest index.

    Args:
        scores: ``[..., n]``. NaN ranks below everything, 0 and -0 are equal.
        count: how many bits to set in each row; all n where n is smaller.

    Returns:
        int32 ``[..., ceil(n / 32)]``.
    """
    below_all = scores.isnan()
    ranked = scores.double().masked_fill(below_all, -math.inf)
    # Two stable sorts: by score, then what is NaN behind what is -inf.
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, below_all.gather(-1, order).int().argsort(dim=-1, stable=True))
    chosen = torch.zeros_like(below_all).scatter_(-1, order[..., :count], True)
    return pack_keep_map(chosen)
