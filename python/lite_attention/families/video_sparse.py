"""Video Sparse Attention: a coarse attention between blocks chooses the blocks whose tokens attend to each other.

The method is that of Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention" (arXiv 2505.13389).
Only a map is made here (:mod:`lite_attention.maps.blocks`); the attention itself is :func:`lite_attention.attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention import ops
from lite_attention.families._inputs import check_qkv
from lite_attention.maps.blocks import (
    GRAIN,
    check_choice,
    check_volume,
    checked_sizes,
    choose_blocks,
    expand_blocks,
    means_of_checked,
    tile_lens_of_checked,
)
from lite_attention.maps.keep_map import unpack_keep_map
from lite_attention.ops.call import check_tensors, softmax_scale

__all__ = ["attention"]

_NAME = "video_sparse.attention"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_sizes: Tensor,
    topk: int,
    *,
    volume: int = GRAIN,
    gate: Tensor | None = None,
    q_block_sizes: Tensor | None = None,
    scale: float | None = None,
    prefix_blocks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over the ``topk`` blocks of keys that suit each block of queries best, plus attention between blocks.

    The coarse stage is attention between the means of the blocks; its result counts for every token of a block. The
    fine stage is attention over the tokens of the chosen blocks: the ``topk`` of highest coarse score, of equal scores
    the first. The result is fine + gate * coarse.

    Args:
        q: ``[B, Sq, Hq, D]`` in padded slots (:mod:`lite_attention.maps.video_tiles`), fp32, bf16 or fp16; any strides
            whose last one is 1. Slots without a token hold 0 in q, k and v: the coarse stage sums whole blocks.
        k, v: ``[B, Sk, Hkv, D]`` in padded slots, of q's dtype and device, ``Hq % Hkv == 0``.
        block_sizes: int32 ``[kv_blocks]``, how many tokens each block of keys has, 1 to ``volume``: on the CPU others
            raise an error, on a GPU they are limited.
        topk: blocks of keys for each block of queries, at least 1; all of them where there are fewer.
        volume: slots of a block, a multiple of 64.
        gate: the factor on the coarse result, of q's shape and any dtype; 1 if None.
        q_block_sizes: int32 ``[query_blocks]``, as for keys; ``block_sizes`` if None.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.
        prefix_blocks: the first so many blocks are no video but text, say. As keys every query attends to them, not
            counted in ``topk``; as queries they attend to all keys.

    Returns:
        out ``[B, Sq, Hq, D]`` of q's dtype, contiguous, and lse, fp32 ``[B, Hq, Sq]``, the natural log of the fine
        stage's softmax denominator. Slots without a token hold no result. As out holds the coarse result too, it is not
        one to merge with others by this lse.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    check_qkv(_NAME, q, k, v)
    if k.dtype != q.dtype:  # as they are, under autocast too: so the blocks are chosen
        raise TypeError(f"{_NAME}: k has dtype {k.dtype}, expected {q.dtype} like q")
    check_volume(_NAME, volume)
    sizes = checked_sizes(_NAME, "block_sizes", block_sizes, "k", k, volume)
    q_sizes = sizes
    if q_block_sizes is not None:
        q_sizes = checked_sizes(_NAME, "q_block_sizes", q_block_sizes, "q", q, volume)
    elif q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{_NAME}: q_block_sizes is None, expected the sizes of q's blocks, "
            f"as q has {q.shape[1]} slots and k {k.shape[1]}"
        )
    check_choice(_NAME, topk, prefix_blocks, q.shape[1] // volume, k.shape[1] // volume)
    if gate is not None:
        check_tensors(_NAME, gate=gate)
    if gate is not None and gate.shape != q.shape:
        raise ValueError(f"{_NAME}: gate has shape {list(gate.shape)}, expected {list(q.shape)} like q")

    scale = softmax_scale(_NAME, q, scale)
    q_means = means_of_checked(q, q_sizes, volume)
    k_means, v_means = (means_of_checked(x, sizes, volume) for x in (k, v))
    keep = choose_blocks(q_means, k_means, topk, scale, prefix_blocks=prefix_blocks)
    if volume > GRAIN:
        keep = expand_blocks(unpack_keep_map(keep, sizes.numel()), volume)
    coarse, _ = ops.attention(q_means, k_means, v_means, scale=scale)
    tile_lens = tile_lens_of_checked(sizes, volume)
    out, lse = ops.attention(q, k, v, keep=keep, scale=scale, tile_n=GRAIN, kv_tile_lens=tile_lens)

    # One pass over out: neither the repeated coarse result nor its product with the gate is written out. In place, but
    # in transforms of torch.func, where the gate alone may have been given more dimensions; compilers see to it.
    blocks, repeated = out.unflatten(1, (-1, volume)), coarse.unsqueeze(2)
    in_place = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if gate is None:
        blocks = blocks.add_(repeated)
    else:
        gates = gate.unflatten(1, (-1, volume))
        # A gate of a wider dtype widens what is not in place.
        blocks = blocks.addcmul_(gates, repeated) if in_place else blocks.addcmul(gates, repeated).to(out.dtype)
    return blocks.flatten(1, 2), lse
