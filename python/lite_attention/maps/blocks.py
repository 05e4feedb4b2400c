"""Maps over blocks: what stands for a block, how well blocks suit each other, and which tiles the chosen ones are.

A sequence in blocks lies in *slots*. Each block owns ``volume`` of them in a row, a multiple of 64, of which its tokens
take the first: ``sizes``, int32 ``[blocks]``, says how many those are. The kernels walk such a sequence in tiles of 64
queries by 64 keys (``tile_n=GRAIN``), several to a block where it is larger.

Whoever chooses blocks goes the same way: :func:`block_means`, :func:`block_scores`, :func:`choose_blocks` (or
:func:`lite_attention.top_k_map` on scores of its own), :func:`expand_blocks`, and :func:`block_tile_lens` for the keys
that exist. All of it runs on any device without waiting for it, and can be traced by torch.compile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.maps.keep_map import pack_keep_map
from lite_attention.maps.tiles import FINE_TILE_N
from lite_attention.ops import top_k_map
from lite_attention.ops.autocast import without_autocast
from lite_attention.ops.call import check_tensors
from lite_attention.ops.checks import checked_int, checked_int64, checked_number, limited_entries

__all__ = [
    "GRAIN",
    "block_means",
    "block_scores",
    "block_tile_lens",
    "choose_blocks",
    "expand_blocks",
    "topk_of_sparsity",
]

# A block is cut into KV tiles of so many keys, and into query tiles of as many rows.
GRAIN = FINE_TILE_N


def topk_of_sparsity(sparsity: float, blocks: int) -> int:
    """Blocks of keys that a block of queries keeps at a sparsity between 0 and 1: all but that share, at least one.

    Rounded up in floating point, as FastVideo does: a sparsity of 0.7 keeps 4 blocks of 10, as 1 - 0.7 is above 0.3.

    Raises:
        TypeError, ValueError: ``sparsity`` is not in [0, 1], or there is no block.
    """
    if not 0 <= checked_number("topk_of_sparsity: sparsity", sparsity) <= 1:
        raise ValueError(f"topk_of_sparsity: sparsity is {sparsity}, expected a number from 0 to 1")
    blocks = checked_int("topk_of_sparsity: blocks", blocks, lowest=1)
    return min(max(math.ceil((1 - sparsity) * blocks), 1), blocks)


def check_volume(function: str, volume: int) -> None:
    """That blocks of so many slots can be cut into tiles.

    Raises:
        TypeError, ValueError: they cannot; the text begins with ``function``.
    """
    if checked_int(f"{function}: volume", volume) < 1 or volume % GRAIN != 0:
        raise ValueError(f"{function}: volume is {volume} slots, expected a multiple of {GRAIN}")


def checked_sizes(
    function: str, name: str, sizes: Tensor, x_name: str, x: Tensor, volume: int, *, lowest: int = 1
) -> Tensor:
    """``sizes``, if they are those of the blocks of ``x``, ``[B, S, H, D]``: from ``lowest`` to ``volume`` each.

    On a GPU, where looking would mean waiting, they are limited to that.

    Raises:
        TypeError, ValueError: they are not; the text begins with ``function`` and calls the two by these names.
    """
    check_tensors(function, **{name: sizes})
    slots = x.shape[1]
    if slots == 0 or slots % volume != 0:
        raise ValueError(f"{function}: {x_name} has {slots} slots, expected a multiple of the {volume} of a block")
    if sizes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: {name} has dtype {sizes.dtype}, expected torch.int32")
    if sizes.device != x.device:
        raise ValueError(f"{function}: {name} is on {sizes.device}, expected {x.device} like {x_name}")
    if sizes.shape != (slots // volume,):
        raise ValueError(
            f"{function}: {name} has shape {list(sizes.shape)}, expected [{slots // volume}], "
            f"one size for each block of {volume} slots of {x_name}"
        )
    return limited_entries(f"{function}: {name}", sizes, lowest, volume)


def check_choice(function: str, topk: int, prefix_blocks: int, query_blocks: int, kv_blocks: int) -> None:
    """That so many blocks can be chosen.

    Raises:
        TypeError, ValueError: they cannot; the text begins with ``function``.
    """
    checked_int(f"{function}: topk", checked_int64(f"{function}: topk", topk), lowest=1)
    most = min(query_blocks, kv_blocks)
    if not 0 <= checked_int(f"{function}: prefix_blocks", prefix_blocks) <= most:
        raise ValueError(f"{function}: prefix_blocks is {prefix_blocks}, expected 0 to {most}, the blocks there are")


def block_means(x: Tensor, sizes: Tensor, volume: int) -> Tensor:
    """The mean of each block's tokens, summed in fp32 and rounded once. Reads each slot once.

    Args:
        x: ``[B, S, H, D]``, any strides. Slots without a token hold 0.
        sizes: int32 ``[S / volume]``, 1 to ``volume`` each: on the CPU others raise an error, elsewhere they are
            limited.
        volume: slots of a block, a multiple of 64.

    Returns:
        ``[B, blocks, H, D]`` of x's dtype, a transposed view of ``[B, H, blocks, D]``. Gradients pass.

    Raises:
        TypeError, ValueError: ``x`` or ``sizes`` does not fit; the text names it.
    """
    _check_bshd("block_means", x=x)
    check_volume("block_means", volume)
    return means_of_checked(x, checked_sizes("block_means", "sizes", sizes, "x", x, volume), volume)


def means_of_checked(x: Tensor, sizes: Tensor, volume: int) -> Tensor:
    """:func:`block_means` of what has been checked."""
    # Blocks of a head lie together in the result, which is how block_scores multiplies them.
    sums: Tensor = x.transpose(1, 2).unflatten(2, (-1, volume)).sum(3, dtype=torch.float32)
    return (sums / sizes.unsqueeze(-1)).to(x.dtype).transpose(1, 2)


def _check_bshd(function: str, **tensors: Tensor) -> None:
    check_tensors(function, **tensors)
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{function}: {name} has {x.dim()} dimensions, expected 4, [B, S, H, D]")


def block_scores(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """``scale * q . k`` of each block of queries with each block of keys, in one product for all heads.

    It is scaled before it is rounded to q's dtype, so that fp16 does not overflow.

    Args:
        q_means: ``[B, query_blocks, Hq, D]``.
        k_means: ``[B, kv_blocks, Hkv, D]`` of the same dtype, ``Hq % Hkv == 0``.
        scale: factor on the products.

    Returns:
        ``[B, Hq, query_blocks, kv_blocks]`` of their dtype, under autocast too: what is only decided by stays as exact
        as it was given.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
    """
    _check_bshd("block_scores", q_means=q_means, k_means=k_means)
    checked_number("block_scores: scale", scale)
    batch, query_blocks, heads, _ = q_means.shape
    kv_blocks, kv_heads = k_means.shape[1:3]
    if k_means.dtype != q_means.dtype:
        raise TypeError(f"block_scores: k_means has dtype {k_means.dtype}, expected {q_means.dtype} like q_means")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"block_scores: k_means has {kv_heads} heads, expected a divisor of q_means' {heads}")
    if k_means.shape[0] != batch or k_means.shape[3] != q_means.shape[3]:
        raise ValueError(
            f"block_scores: k_means has shape {list(k_means.shape)}, expected [{batch}, kv_blocks, kv_heads, "
            f"{q_means.shape[3]}] like q_means"
        )
    # Query heads that share their keys are rows of one product.
    rows = q_means.transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)
    columns = k_means.transpose(1, 2).flatten(0, 1).transpose(-1, -2)
    with without_autocast(rows.device):
        scores = torch.baddbmm(rows.new_zeros(()), rows, columns, beta=0, alpha=scale)
    return scores.view(batch, heads, query_blocks, kv_blocks)


def choose_blocks(q_means: Tensor, k_means: Tensor, topk: int, scale: float, *, prefix_blocks: int = 0) -> Tensor:
    """The map of the blocks of keys that suit each block of queries best; of equal scores the first.

    Args:
        q_means, k_means, scale: as for :func:`block_scores`.
        topk: blocks of keys for each block of queries, at least 1; all of them where there are fewer.
        prefix_blocks: the first so many blocks are no video but text, say. As keys they are always chosen, not counted
            in ``topk``; as queries they choose all keys.

    Returns:
        Packed map over blocks, int32 ``[B, Hq, query_blocks, ceil(kv_blocks / 32)]``.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
    """
    _check_bshd("choose_blocks", q_means=q_means, k_means=k_means)
    kv_blocks = k_means.shape[1]
    check_choice("choose_blocks", topk, prefix_blocks, q_means.shape[1], kv_blocks)
    scores = block_scores(q_means, k_means, scale)
    if prefix_blocks == 0:
        return top_k_map(scores, topk)
    scores[..., :prefix_blocks] = math.inf
    keep = top_k_map(scores, topk + prefix_blocks)
    keep[:, :, :prefix_blocks] = pack_keep_map(torch.ones(kv_blocks, dtype=torch.bool, device=keep.device))
    return keep


def expand_blocks(block_map: Tensor, volume: int) -> Tensor:
    """A bool map over blocks as a packed one over the tiles that they are cut into.

    Args:
        block_map: bool ``[..., query_blocks, kv_blocks]``.
        volume: slots of a block of queries and of a block of keys.

    Returns:
        int32 ``[..., query_blocks * volume / 64, words]``.

    Raises:
        TypeError: ``block_map`` is not bool.
        ValueError: ``volume`` is no multiple of 64, or ``block_map`` has fewer than two dimensions.
    """
    check_tensors("expand_blocks", block_map=block_map)
    if block_map.dtype != torch.bool:
        raise TypeError(f"expand_blocks: block_map has dtype {block_map.dtype}, expected torch.bool")
    if block_map.dim() < 2:
        raise ValueError(f"expand_blocks: block_map has {block_map.dim()} dimensions, expected at least 2")
    check_volume("expand_blocks", volume)
    tiles_per_block = volume // GRAIN
    if tiles_per_block == 1:
        return pack_keep_map(block_map)
    per_key_tile = pack_keep_map(block_map.repeat_interleave(tiles_per_block, -1))
    return per_key_tile.repeat_interleave(tiles_per_block, -2)


def block_tile_lens(sizes: Tensor, volume: int) -> Tensor:
    """How many keys of each KV tile exist, which :func:`lite_attention.attention` takes as ``kv_tile_lens``.

    Args:
        sizes: int32 or int64 ``[blocks]``: tokens of each block, 0 to ``volume``: on the CPU others raise an error,
            elsewhere they are limited.
        volume: slots of a block, a multiple of 64.

    Returns:
        int32 ``[blocks * volume / 64]``.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
    """
    check_tensors("block_tile_lens", sizes=sizes)
    check_volume("block_tile_lens", volume)
    if sizes.dtype not in (torch.int32, torch.int64) or sizes.dim() != 1:
        raise TypeError(
            f"block_tile_lens: sizes has dtype {sizes.dtype} and shape {list(sizes.shape)}, expected torch.int32 and "
            "[blocks]"
        )
    return tile_lens_of_checked(limited_entries("block_tile_lens: sizes", sizes, 0, volume), volume)


def tile_lens_of_checked(sizes: Tensor, volume: int) -> Tensor:
    """:func:`block_tile_lens` of what has been checked."""
    first_key = torch.arange(0, volume, GRAIN, dtype=torch.int32, device=sizes.device)
    return (sizes.to(torch.int32).unsqueeze(-1) - first_key).clamp(0, GRAIN).flatten()
