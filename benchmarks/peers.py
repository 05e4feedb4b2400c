"""Other attention kernels, each as a function that prepares a call on `[B, S, H, D]` tensors.

Then other ways to share a sequence among processes: each of those takes a kernel that also gives the lse, and makes a
function of a rank's `[B, S / ranks, H, D]` tensors.
"""

import functools
import importlib
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

FA3_PACKAGE = "fa3-fwd"
FLEX_BLOCK = 128

Prepare = Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]
# q, k and v to out and the lse `[B, H, S]`
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def flash_attention_3(causal: bool = False) -> Prepare:
    """FlashAttention-3 from the wheel fa3-fwd. Raises ImportError or OSError where it is missing or does not load."""
    flash_attn_func: Callable[..., Tensor] = importlib.import_module("fa3_fwd_interface").flash_attn_func
    return lambda q, k, v: lambda: flash_attn_func(q, k, v, causal=causal)


def flash_attention_3_with_lse() -> Kernel:
    """The same with the lse. Raises as `flash_attention_3`."""
    flash_attn_func: Callable[..., tuple[Tensor, Tensor]]
    flash_attn_func = importlib.import_module("fa3_fwd_interface").flash_attn_func
    return lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=True)


def cudnn_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """The scaled_dot_product_attention of torch through cuDNN, on contiguous `[B, H, S, D]` copies."""
    queries, keys, values = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(queries, keys, values).transpose(1, 2)

    return call


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def flex_attention_over(blocks: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FlexAttention over the kept blocks of a bool map `[B, H, S / 128, S / 128]`; copies as for cuDNN."""
    queries, keys, values = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    count = blocks.sum(dim=-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    # every kept block is a full one, in which no mask is applied, and none is a partial one
    none, nowhere = torch.zeros_like(count), torch.zeros_like(indices)
    mask = BlockMask.from_kv_blocks(none, nowhere, count, indices, BLOCK_SIZE=FLEX_BLOCK)
    return lambda: _compiled_flex_attention()(queries, keys, values, block_mask=mask).transpose(1, 2)


def version_of(package: str) -> str:
    """The installed version of a package, or 'absent'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def fa3_version() -> str:
    """The installed version of FlashAttention-3's wheel, or 'absent'."""
    return version_of(FA3_PACKAGE)


def textbook_ulysses(kernel: Kernel, mesh: DeviceMesh) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Ulysses as its paper tells it (arXiv 2309.14509): one exchange each of q, k, v and out, one after the other."""
    group = mesh.get_group("ulysses")
    ranks = dist.get_world_size(group)

    def exchanged(pieces: Tensor) -> Tensor:
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=group)
        return received

    def heads_of_all_tokens(x: Tensor) -> Tensor:
        pieces = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()  # rank, B, S / ranks, H / ranks, D
        return exchanged(pieces).transpose(0, 1).flatten(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = kernel(heads_of_all_tokens(q), heads_of_all_tokens(k), heads_of_all_tokens(v))
        pieces = out.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
        return exchanged(pieces).permute(1, 2, 0, 3, 4).flatten(2, 3)

    return attend


def yunchang_attention(kernel: Kernel, ring: int, ulysses: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """LongContextAttention of the package yunchang (github.com/feifeibear/long-context-attention): Ulysses in a ring.

    The kernel is handed to it as its attn_processor, because the names of arguments with which it calls
    FlashAttention-3 itself (version 0.6.4) are not those of fa3-fwd. Raises ImportError where it is missing.
    """
    yunchang = importlib.import_module("yunchang")
    yunchang.set_seq_parallel_pg(ulysses, ring, dist.get_rank(), dist.get_world_size())

    def processor(q: Tensor, k: Tensor, v: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        return kernel(q, k, v)

    layer = yunchang.LongContextAttention(ring_impl_type="basic", attn_type=None, attn_processor=processor)
    return lambda q, k, v: layer(q, k, v)
