"""Which calls of torch's scaled_dot_product_attention LiteAttention does not take, told from what a trace knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lite_attention.maps import tiles
from lite_attention.ops.autocast import autocast_dtype
from lite_attention.ops.backends import Problem, choose, supported_dtypes

__all__ = ["runs_here", "why_left_to_torch", "why_scale_is_left"]

# On CUDA a row begins at a multiple of so many bytes.
ROW_ALIGNMENT = 16
FP32 = torch.finfo(torch.float32)


def why_left_to_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
    max_batch_size: int,
) -> str | None:
    """Why a call, its tensors ``[B, H, S, D]``, is torch's; None if LiteAttention takes it.

    What torch refuses is torch's, too. A reason has no sizes in it: a text with a size would bind compiled code to it.
    """
    if attn_mask is not None:
        return "a mask"
    if dropout_p != 0.0:
        return "dropout"
    if is_causal:
        return "a causal mask"
    tensors = (query, key, value)
    if any(not isinstance(x, Tensor) or x.layout != torch.strided or x.dim() != 4 for x in tensors):
        return "not three dense tensors [batch, heads, tokens, head_dim]"
    if query.shape[2] != key.shape[2]:
        return "other keys than queries, as in cross-attention"
    if value.shape[3] != query.shape[3]:
        return "a value of another head_dim"
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or value.shape != key.shape:
        return "shapes that do not fit each other"
    if any(size == 0 for size in (*query.shape, *key.shape)):
        return "a size of 0"
    if query.shape[1] != key.shape[1] and not (enable_gqa and query.shape[1] % key.shape[1] == 0):
        return "heads that do not fit each other"
    if query.shape[0] > max_batch_size:
        return f"a batch above max_batch_size, {max_batch_size}"
    if query.shape[3] % tiles.HEAD_DIM_MULTIPLE != 0 or query.shape[3] > tiles.MAX_HEAD_DIM:
        return f"a head_dim that is no multiple of {tiles.HEAD_DIM_MULTIPLE} up to {tiles.MAX_HEAD_DIM}"
    if any(x.dtype != query.dtype or x.device != query.device for x in tensors):
        return "tensors of several dtypes or devices"
    if not runs_here(query.dtype, query.device):
        return f"{query.dtype} on {query.device.type}"
    if any(x.stride(3) != 1 for x in tensors):
        return "strides whose last one is not 1"
    per_row = ROW_ALIGNMENT // query.element_size()
    if query.is_cuda and any(n % per_row != 0 for x in tensors for n in (x.storage_offset(), *x.stride()[:3])):
        return f"rows that do not begin at multiples of {ROW_ALIGNMENT} bytes"
    return why_scale_is_left(scale)


def why_scale_is_left(scale: Any) -> str | None:
    """Why a call with this factor on q.k is not LiteAttention's, whose scores grow with q.k."""
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        return "a scale that is no number"
    if isinstance(scale, bool) or (scale is not None and not FP32.tiny <= scale <= FP32.max):
        return "a scale that is no positive number of fp32"
    return None


@torch.compiler.assume_constant_result
def runs_here(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels here take the dtype, which autocast may change.

    Raises:
        NotImplementedError: nothing runs on this device; the text says why.
    """
    dtypes, dtype = supported_dtypes(device, "skip_attention"), autocast_dtype(dtype, device)
    if not dtypes:
        choose(Problem("skip_attention", device, dtype))
    return dtype in dtypes
