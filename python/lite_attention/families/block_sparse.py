"""Block-sparse attention: each block of queries sees the blocks of keys that the caller chose."""

from __future__ import annotations

from torch import Tensor

from lite_attention import ops
from lite_attention.families._inputs import check_qkv
from lite_attention.maps.blocks import GRAIN, block_tile_lens, check_sizes, check_volume

__all__ = ["attention"]

_NAME = "block_sparse.attention"


def volume_of_blocks(k: Tensor, block_sizes: Tensor) -> int:
    """Slots of each block of k, ``[B, Sk, Hkv, D]``, of which ``block_sizes`` has an entry each.

    Raises:
        TypeError, ValueError: there is no such number, or it is no multiple of 64.
    """
    volume: int = k.shape[1] // max(block_sizes.numel(), 1)
    if volume < 1 or volume % GRAIN != 0:  # first, as a text with sizes in it binds compiled code to them
        check_volume(f"{_NAME}: k has {k.shape[1]} slots for {block_sizes.numel()} block_sizes", volume)
    check_sizes(_NAME, "block_sizes", block_sizes, "k", k, volume)
    return volume


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
        block_sizes: int32 ``[kv_blocks]``: the first so many keys of each block exist, whatever the others hold.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.

    Returns:
        out ``[B, Sq, Hq, D]`` of q's dtype, contiguous, and lse, fp32 ``[B, Hq, Sq]``, the natural log of the softmax
        denominator. Rows without a key give out 0 and lse -inf.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    check_qkv(_NAME, q, k, v)
    tile_lens = block_tile_lens(block_sizes, volume_of_blocks(k, block_sizes))
    return ops.attention(q, k, v, keep=keep, scale=scale, tile_n=GRAIN, kv_tile_lens=tile_lens)
