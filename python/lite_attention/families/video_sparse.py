"""Video Sparse Attention: coarse attention between blocks of tokens chooses, for each block of queries, the blocks of
keys that it attends to token by token.

The method is VSA (Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv 2505.13389), with
the names and the layout of FastVideo's kernels, so that their users can switch. Tensors are ``[B, H, S, D]`` in padded
slots (:mod:`lite_attention.maps.video_tiles`): each block owns equally many consecutive slots, of which its tokens take
the first. Only maps are built here; the attention itself is :func:`lite_attention.attention`.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from lite_attention.maps.keep_map import WORD_BITS, ceil_div, pack_keep_map, unpack_keep_map
from lite_attention.maps.tiles import FINE_TILE_N
from lite_attention.maps.video_tiles import VideoTiles
from lite_attention.ops import attention, top_k_map

__all__ = ["VSAMetadata", "block_sparse_attention", "build_vsa_metadata", "topk_of_sparsity", "video_sparse_attn"]

# A block is cut into so many keys a KV tile, and into query tiles of as many rows.
_GRAIN = FINE_TILE_N


class VSAMetadata(TypedDict):
    """What the tiles of a video say about its tokens; the tensors are shared between calls and not to be written to."""

    tile_partition_indices: Tensor
    """int64 ``[tokens]``: raster index of each token in tile order."""
    reverse_tile_partition_indices: Tensor
    """int64 ``[tokens]``: the inverse, the place in tile order of each token in raster order."""
    variable_block_sizes: Tensor
    """int32 ``[tiles]``: tokens of each tile."""
    non_pad_index: Tensor
    """int64 ``[tokens]``: the padded slot of each token in tile order."""
    num_tiles: tuple[int, int, int]
    """Tiles along time, height and width."""
    max_block_size: int
    """Slots of each tile: the tokens of a whole one."""


def build_vsa_metadata(
    shape: tuple[int, int, int], tile: tuple[int, int, int] = (4, 4, 4), device: torch.device | str | None = None
) -> VSAMetadata:
    """Orders, slots and sizes of a video's tiles, under the original's names.

    Args:
        shape: (time, height, width) of the video in tokens; the tile need not divide it.
        tile: (time, height, width) of a whole tile, in tokens.
        device: of the tensors, torch's default device if None.

    Raises:
        TypeError, ValueError: a size is not three positive integers.
    """
    tiles = VideoTiles(shape, tile)
    device = torch.get_default_device() if device is None else torch.device(device)
    return {
        "tile_partition_indices": tiles.order(device),
        "reverse_tile_partition_indices": tiles.positions(device),
        "variable_block_sizes": tiles.sizes(device),
        "non_pad_index": tiles.slots(tiles.volume, device),
        "num_tiles": tiles.counts,
        "max_block_size": tiles.volume,
    }


def topk_of_sparsity(sparsity: float, blocks: int) -> int:
    """Blocks of keys that a block of queries keeps at a sparsity between 0 and 1: all but that share, at least one.

    Raises:
        ValueError: ``sparsity`` is not in [0, 1], or there is no block.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"topk_of_sparsity: sparsity is {sparsity}, expected a number from 0 to 1")
    if blocks < 1:
        raise ValueError(f"topk_of_sparsity: blocks is {blocks}, expected at least 1")
    return min(max(math.ceil((1 - sparsity) * blocks), 1), blocks)


def _check_qkv(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{function}: {name} has {x.dim()} dimensions, expected 4, [B, H, S, D]")
    batch, heads, _, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, kv_heads, kv_len, head_dim):
            expected = f"[{batch}, kv_heads, kv_len, {head_dim}] like q" if x is k else f"{list(k.shape)} like k"
            raise ValueError(f"{function}: {name} has shape {list(x.shape)}, expected {expected}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"{function}: q has {heads} heads, expected a multiple of the {kv_heads} of k")


def _check_sizes(function: str, name: str, sizes: Tensor, x_name: str, x: Tensor, volume: int) -> None:
    """That the sizes are those of the blocks of ``x``, q or k."""
    length = x.shape[2]
    if length == 0 or length % volume != 0:
        raise ValueError(f"{function}: {x_name} has {length} slots, expected a multiple of the {volume} of a block")
    if sizes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: {name} has dtype {sizes.dtype}, expected torch.int32")
    if sizes.device != x.device:
        raise ValueError(f"{function}: {name} is on {sizes.device}, expected {x.device} like {x_name}")
    if sizes.shape != (length // volume,):
        raise ValueError(
            f"{function}: {name} has shape {list(sizes.shape)}, expected [{length // volume}], "
            f"one size for each block of {volume} slots of {x_name}"
        )


def _volume(function: str, block_size: int | tuple[int, ...]) -> int:
    volume = block_size if isinstance(block_size, int) else math.prod(block_size)
    if volume < 1 or volume % _GRAIN != 0:
        raise ValueError(
            f"{function}: block_size is {block_size}, blocks of {volume} tokens, expected a multiple of {_GRAIN}"
        )
    return volume


def _block_means(x: Tensor, sizes: Tensor, volume: int) -> Tensor:
    """The mean of each block's tokens, ``[B, H, blocks, D]``: summed in fp32, rounded once. Reads each slot once."""
    sums: Tensor = x.unflatten(2, (-1, volume)).sum(3, dtype=torch.float32)
    return (sums / sizes.unsqueeze(-1)).to(x.dtype)


def _choose_blocks(q_means: Tensor, k_means: Tensor, topk: int, prefix_blocks: int, scale: float) -> Tensor:
    """Packed map over blocks, int32 ``[B, Hq, query_blocks, words]``."""
    batch, heads, query_blocks, _ = q_means.shape
    kv_heads, kv_blocks = k_means.shape[1:3]
    # Query heads that share their keys are rows of one product. It is scaled before it is rounded to q's dtype, so that
    # fp16 does not overflow.
    rows = q_means.unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)
    columns = k_means.flatten(0, 1).transpose(-1, -2)
    scores = torch.baddbmm(rows.new_zeros(()), rows, columns, beta=0, alpha=scale)
    scores = scores.view(batch, heads, query_blocks, kv_blocks)
    if prefix_blocks == 0:
        return top_k_map(scores, topk)
    scores[..., :prefix_blocks] = math.inf
    keep = top_k_map(scores, topk + prefix_blocks)
    keep[:, :, :prefix_blocks] = pack_keep_map(torch.ones(kv_blocks, dtype=torch.bool, device=keep.device))
    return keep


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sizes: Tensor, volume: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed map; out is ``[B, S, H, D]``. Keys past a block's size do not exist."""
    first_key = torch.arange(0, volume, _GRAIN, dtype=torch.int32, device=sizes.device)
    tile_lens = (sizes.to(torch.int32).unsqueeze(-1) - first_key).clamp(0, _GRAIN).flatten()
    return attention(
        *(x.transpose(1, 2) for x in (q, k, v)), keep=keep, scale=scale, tile_n=_GRAIN, kv_tile_lens=tile_lens
    )


def _tiles_of_blocks(block_map: Tensor, volume: int) -> Tensor:
    """A bool map over blocks as a packed one over the tiles they are cut into."""
    tiles_per_block = volume // _GRAIN
    per_key_tile = pack_keep_map(block_map.repeat_interleave(tiles_per_block, -1))
    return per_key_tile.repeat_interleave(tiles_per_block, -2)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, block_sizes: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention in which each block of queries sees some of the blocks of keys.

    All blocks have equally many slots, a multiple of 64: as many as k has for each entry of ``block_sizes``.

    Args:
        q: ``[B, Hq, Sq, D]``, fp32, bf16 or fp16; any strides whose last one is 1. D is a multiple of 8, at most 256.
        k, v: ``[B, Hkv, Sk, D]`` of q's dtype and device, ``Hq % Hkv == 0``.
        block_map: bool ``[B, Hq, query_blocks, kv_blocks]``, or without B where all batch entries share it; or a packed
            map of 64 query rows by 64 keys, int32 ``[B, Hq, Sq / 64, words]``: :mod:`lite_attention.maps.keep_map`.
        block_sizes: int32 ``[kv_blocks]``: the first so many keys of each block exist, whatever the others hold.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.

    Returns:
        out, of q's shape and dtype, a transposed view of ``[B, Sq, Hq, D]``, and lse, fp32 ``[B, Hq, Sq]``, the natural
        log of the softmax denominator. Rows without a key give out 0 and lse -inf.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    function = "block_sparse_attention"
    _check_qkv(function, q, k, v)
    volume = k.shape[2] // max(block_sizes.numel(), 1)
    if volume < 1 or volume % _GRAIN != 0:
        raise ValueError(
            f"{function}: k has {k.shape[2]} slots for {block_sizes.numel()} block_sizes, "
            f"expected a multiple of {_GRAIN} for each"
        )
    _check_sizes(function, "block_sizes", block_sizes, "k", k, volume)
    batch, heads, query_len, _ = q.shape
    if query_len % volume != 0:
        raise ValueError(f"{function}: q has {query_len} slots, expected a multiple of the {volume} of a block of k")

    if block_map.dtype == torch.bool:
        expected = [batch, heads, query_len // volume, block_sizes.numel()]
        if list(block_map.shape) not in (expected, expected[1:]):
            raise ValueError(
                f"{function}: block_map has shape {list(block_map.shape)}, expected {expected} or {expected[1:]}"
            )
        keep = _tiles_of_blocks(block_map, volume).expand(batch, -1, -1, -1)
    elif block_map.dtype == torch.int32:
        expected = [batch, heads, query_len // _GRAIN, ceil_div(k.shape[2] // _GRAIN, WORD_BITS)]
        if list(block_map.shape) != expected:
            raise ValueError(f"{function}: block_map has shape {list(block_map.shape)}, expected {expected} for int32")
        keep = block_map
    else:
        raise TypeError(f"{function}: block_map has dtype {block_map.dtype}, expected torch.bool or torch.int32")

    out, lse = _attend(q, k, v, keep, block_sizes, volume, scale)
    return out.transpose(1, 2), lse


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, ...] = (4, 4, 4),
    compress_attn_weight: Tensor | None = None,
    *,
    q_variable_block_sizes: Tensor | None = None,
    scale: float | None = None,
    prefix_blocks: int = 0,
) -> Tensor:
    """Attention over the ``topk`` blocks of keys that suit each block of queries best, plus attention between blocks.

    The coarse stage is attention between the means of the blocks; its result counts for every token of a block. The
    fine stage is attention over the tokens of the chosen blocks: the ``topk`` of highest coarse score, of equal scores
    the first. The result is fine + gate * coarse.

    Args:
        q: ``[B, Hq, Sq, D]`` in padded slots, fp32, bf16 or fp16; any strides whose last one is 1. Slots without a
            token hold 0 in q, k and v, as :func:`lite_attention.maps.video_tiles.pad_tiles` leaves them: the coarse
            stage sums whole blocks.
        k, v: ``[B, Hkv, Sk, D]`` in padded slots, of q's dtype and device, ``Hq % Hkv == 0``.
        variable_block_sizes: int32 ``[kv_blocks]``, how many tokens each block of keys has, at least 1.
        topk: blocks of keys for each block of queries, at least 1; all of them where there are fewer.
        block_size: (time, height, width) of a block, or its number of slots, which is a multiple of 64.
        compress_attn_weight: the gate on the coarse result, of q's shape; 1 if None.
        q_variable_block_sizes: int32 ``[query_blocks]``, as for keys; ``variable_block_sizes`` if None.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.
        prefix_blocks: the first so many blocks are no video but text, say. As keys every query attends to them, not
            counted in ``topk``; as queries they attend to all keys.

    Returns:
        out, of q's shape and dtype, a transposed view of ``[B, Sq, Hq, D]``. Slots without a token hold no result.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    function = "video_sparse_attn"
    _check_qkv(function, q, k, v)
    volume = _volume(function, block_size)
    _check_sizes(function, "variable_block_sizes", variable_block_sizes, "k", k, volume)
    if q_variable_block_sizes is not None:
        _check_sizes(function, "q_variable_block_sizes", q_variable_block_sizes, "q", q, volume)
    elif q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{function}: q_variable_block_sizes is None, expected the sizes of q's blocks, "
            f"as q has {q.shape[2]} slots and k {k.shape[2]}"
        )
    if topk < 1:
        raise ValueError(f"{function}: topk is {topk}, expected at least 1")
    most = min(q.shape[2], k.shape[2]) // volume
    if not 0 <= prefix_blocks <= most:
        raise ValueError(f"{function}: prefix_blocks is {prefix_blocks}, expected 0 to {most}, the blocks there are")
    if compress_attn_weight is not None and compress_attn_weight.shape != q.shape:
        raise ValueError(
            f"{function}: compress_attn_weight has shape {list(compress_attn_weight.shape)}, "
            f"expected {list(q.shape)} like q"
        )

    q_sizes = variable_block_sizes if q_variable_block_sizes is None else q_variable_block_sizes
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    q_means = _block_means(q, q_sizes, volume)
    k_means, v_means = (_block_means(x, variable_block_sizes, volume) for x in (k, v))
    keep = _choose_blocks(q_means, k_means, topk, prefix_blocks, scale)
    if volume > _GRAIN:
        keep = _tiles_of_blocks(unpack_keep_map(keep, variable_block_sizes.numel()), volume)
    coarse, _ = attention(*(means.transpose(1, 2) for means in (q_means, k_means, v_means)), scale=scale)
    out, _ = _attend(q, k, v, keep, variable_block_sizes, volume, scale)

    # One pass over out, in place: neither the repeated coarse result nor its product with the gate is written out.
    blocks = out.unflatten(1, (-1, volume))
    if compress_attn_weight is None:
        blocks += coarse.unsqueeze(2)
    else:
        blocks.addcmul_(compress_attn_weight.transpose(1, 2).unflatten(1, (-1, volume)), coarse.unsqueeze(2))
    return out.transpose(1, 2)
