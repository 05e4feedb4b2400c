"""Block-sparse attention: each block of queries sees the blocks of keys that the caller chose."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention import ops
from lite_attention.families._inputs import check_qkv
from lite_attention.maps.blocks import GRAIN, check_volume, checked_sizes, tile_lens_of_checked
from lite_attention.maps.keep_map import WORD_BITS, ceil_div
from lite_attention.ops.call import check_tensors
from lite_attention.ops.checks import equals_any

__all__ = ["attention"]

_NAME = "block_sparse.attention"


def volume_of_blocks(k: Tensor, block_sizes: Tensor) -> int:
    """Slots of each block of k, ``[B, Sk, Hkv, D]``, of which ``block_sizes`` has an entry each.

    Raises:
        TypeError, ValueError: there is no such number, or it is no multiple of 64.
    """
    check_tensors(_NAME, block_sizes=block_sizes)
    volume: int = k.shape[1] // max(block_sizes.numel(), 1)
    if volume < 1 or volume % GRAIN != 0:  # first, as a text with sizes in it binds compiled code to them
        check_volume(f"{_NAME}: k has {k.shape[1]} slots for {block_sizes.numel()} block_sizes", volume)
    return volume


def check_keep(function: str, name: str, keep: Tensor, q: Tensor, k: Tensor) -> None:
    """That this is a packed map for q and k, on their device.

    Raises:
        TypeError, ValueError: it is not; the text begins with ``function`` and calls it ``name``.
    """
    check_tensors(function, **{name: keep})
    if keep.dtype != torch.int32:
        raise TypeError(f"{function}: {name} has dtype {keep.dtype}, expected torch.int32")
    if keep.device != q.device:
        raise ValueError(f"{function}: {name} is on {keep.device}, expected {q.device} like q")
    batch, query_len, heads, _ = q.shape
    expected = [batch, heads, ceil_div(query_len, GRAIN), ceil_div(ceil_div(k.shape[1], GRAIN), WORD_BITS)]
    if not equals_any(list(keep.shape), expected):
        raise ValueError(f"{function}: {name} has shape {list(keep.shape)}, expected {expected}, packed")


def attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, block_sizes: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks of keys.

    All blocks of keys have equally many slots, a multiple of 64: as many as k has for each entry of ``block_sizes``.

    Args:
        q: ``[B, Sq, Hq, D]``, fp32, bf16 or fp16; any strides whose last one is 1. D is a multiple of 8, at most 256.
        k, v: ``[B, Sk, Hkv, D]`` of q's dtype and device, ``Hq % Hkv == 0``.
        keep: packed map of 64 query rows by 64 keys, int32 ``[B, Hq, query_tiles, words]``
            (:mod:`lite_attention.maps.keep_map`). :func:`lite_attention.maps.blocks.expand_blocks` makes it from a bool
            map over blocks.
        block_sizes: int32 ``[kv_blocks]``: the first so many keys of each block exist, whatever the others hold. From
            0 to a block's slots: on the CPU others raise an error, on a GPU they are limited.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.

    Returns:
        out ``[B, Sq, Hq, D]`` of q's dtype, contiguous, and lse, fp32 ``[B, Hq, Sq]``, the natural log of the softmax
        denominator. Rows without a key give out 0 and lse -inf.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    check_qkv(_NAME, q, k, v)
    check_keep(_NAME, "keep", keep, q, k)
    volume = volume_of_blocks(k, block_sizes)
    sizes = checked_sizes(_NAME, "block_sizes", block_sizes, "k", k, volume, lowest=0)
    tile_lens = tile_lens_of_checked(sizes, volume)
    return ops.attention(q, k, v, keep=keep, scale=scale, tile_n=GRAIN, kv_tile_lens=tile_lens)
