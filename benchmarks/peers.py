"""Other attention kernels, each as a function that prepares a call on `[B, S, H, D]` tensors."""

import importlib
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

FA3_PACKAGE = "fa3-fwd"
FLEX_BLOCK = 128

Prepare = Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]


def flash_attention_3() -> Prepare:
    """FlashAttention-3 from the wheel fa3-fwd. Raises ImportError or OSError where it is missing or does not load."""
    flash_attn_func: Callable[[Tensor, Tensor, Tensor], Tensor]
    flash_attn_func = importlib.import_module("fa3_fwd_interface").flash_attn_func
    return lambda q, k, v: lambda: flash_attn_func(q, k, v)


def cudnn_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """The scaled_dot_product_attention of torch through cuDNN, on contiguous `[B, H, S, D]` copies."""
    queries, keys, values = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)

    return call


_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


def flex_attention_over(blocks: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FlexAttention over the kept blocks of a bool map `[B, H, S / 128, S / 128]`; copies as for cuDNN."""
    queries, keys, values = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    count = blocks.sum(dim=-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    # every kept block is a full one, in which no mask is applied, and none is a partial one
    none, nowhere = torch.zeros_like(count), torch.zeros_like(indices)
    mask = BlockMask.from_kv_blocks(none, nowhere, count, indices, BLOCK_SIZE=FLEX_BLOCK)
    return lambda: _compiled_flex_attention(queries, keys, values, block_mask=mask).transpose(1, 2)


def fa3_version() -> str:
    """The installed version of the wheel, or 'absent'."""
    try:
        return metadata.version(FA3_PACKAGE)
    except metadata.PackageNotFoundError:
        return "absent"
