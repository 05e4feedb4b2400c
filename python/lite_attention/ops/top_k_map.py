"""``top_k_map``: a keep map of the largest scores, built on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.ops.call import call, check_tensors
from lite_attention.ops.checks import checked_int64
from lite_attention.ops.define import define

__all__ = ["top_k_map"]

SCHEMA = "top_k_map(Tensor scores, int count) -> Tensor"


def _fake(scores: Tensor, count: int) -> Tensor:
    if scores.dim() == 0:
        raise RuntimeError("top_k_map: scores has 0 dimensions, expected at least 1")
    words = (scores.shape[-1] + 31) // 32
    return scores.new_empty((*scores.shape[:-1], words), dtype=torch.int32)


_OPERATOR = define(SCHEMA, fake=_fake)


def top_k_map(scores: Tensor, count: int) -> Tensor:
    """The keep map of the ``count`` largest scores of each row.

    Args:
        scores: ``[..., n]``, fp32, bf16 or fp16: one score for each KV tile, say. Of equal scores the one of lowest
            index ranks first; NaN ranks above everything, 0 and -0 are equal.
        count: bits to set in each row, at least 1; all n where n is smaller.

    Returns:
        The packed map, int32 ``[..., ceil(n / 32)]`` (see :mod:`lite_attention.maps.keep_map`), on the scores' device.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    check_tensors("top_k_map", scores=scores)
    result: Tensor = call(_OPERATOR, scores, checked_int64("top_k_map: count", count))
    return result
