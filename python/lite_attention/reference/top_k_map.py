"""The oracle's ``top_k_map``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.maps.keep_map import pack_keep_map

__all__ = ["top_k_map"]

# Beyond the numbers of the types that scores have: stands for infinity.
_ABOVE_FINITE = 1e300


def top_k_map(scores: Tensor, count: int) -> Tensor:
    """The packed map of the ``count`` largest scores of each row; of equal ones those of lowest index.

    Args:
        scores: ``[..., n]``. NaN ranks above everything, as in :func:`torch.topk`, 0 and -0 are equal.
        count: how many bits to set in each row; all n where n is smaller.

    Returns:
        int32 ``[..., ceil(n / 32)]``.
    """
    # 0.0 + x: -0 becomes 0. NaN becomes the one infinity, as torch's sorts on a GPU place it by its sign bit.
    rank = (0.0 + scores.double()).clamp(-_ABOVE_FINITE, _ABOVE_FINITE).nan_to_num(nan=math.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return pack_keep_map(chosen.scatter_(-1, order[..., :count], True))
