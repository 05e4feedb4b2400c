"""FastVideo's calls: ``st_attn``'s Sliding Tile Attention and ``vsa``'s Video Sparse Attention, in ``[B, H, S, D]``."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from lite_attention.families import block_sparse, sliding_tile, video_sparse
from lite_attention.families._inputs import check_dtypes
from lite_attention.families.sliding_tile import SEQ_SHAPE, TILE, WindowSize
from lite_attention.maps.blocks import check_volume, expand_blocks
from lite_attention.maps.video_tiles import Size, VideoTiles, check_size
from lite_attention.ops.call import check_tensors
from lite_attention.ops.checks import as_int, checked_bool, equals_any

__all__ = [
    "VSAMetadata",
    "block_sparse_attention",
    "build_vsa_metadata",
    "sliding_tile_attention",
    "video_sparse_attn",
]


def _swapped(function: str, name: str, x: Tensor) -> Tensor:
    """``[B, H, S, D]`` as a view of ``[B, S, H, D]``."""
    check_tensors(function, **{name: x})
    if x.dim() != 4:
        raise ValueError(f"{function}: {name} has {x.dim()} dimensions, expected 4, [B, H, S, D]")
    return x.transpose(1, 2)


def _swapped_qkv(function: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_swapped(function, name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    check_dtypes(function, q, k, v)
    return query, key, value


def sliding_tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: WindowSize,
    text_length: int | Tensor,
    has_text: bool = True,
    seq_shape: str | Size = SEQ_SHAPE,
    *,
    tile: Size = TILE,
    scale: float | None = None,
) -> Tensor:
    """:func:`lite_attention.families.sliding_tile.attention` by the call of ``st_attn``: out alone.

    The map of the windows is made anew by each call, some forty small launches. A model makes it once, with
    :func:`lite_attention.sliding_tile_map`, and calls the native function.

    Args:
        q: ``[B, H, S, D]``, fp32, bf16 or fp16, any strides whose last one is 1. First the tokens of the canvas, in
            tile order (:func:`lite_attention.maps.video_tiles.tile_tokens`), then those of the text.
        k, v: ``[B, Hkv, S, D]`` of q's dtype and device, ``H % Hkv == 0``.
        window_size: (time, height, width) in tiles, one for all query heads or a list with one a query head. An even
            size counts as the next odd one.
        text_length: how many text tokens are keys, the first ones; an int, or int32 ``[B]`` on q's device.
        has_text: False if no text follows the canvas; ``text_length`` is then ignored.
        seq_shape: the canvas (time, height, width) in tokens, as a tuple or as text, ``"30x48x80"``.
        tile: (time, height, width) in tokens; it need not divide the canvas. The original has this one alone.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None; the original has no other.

    Returns:
        out ``[B, H, S, D]`` of q's dtype, a transposed view of ``[B, S, H, D]``.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    function = "sliding_tile_attention"
    query, key, value = _swapped_qkv(function, q, k, v)
    checked_bool(f"{function}: has_text", has_text)
    canvas = sliding_tile.canvas_size(function, seq_shape)
    image_tokens, tokens = math.prod(canvas), query.shape[1]
    if tokens < image_tokens or (tokens > image_tokens and not has_text):
        raise ValueError(
            f"{function}: q has {tokens} tokens, expected {'at least ' if has_text else ''}{image_tokens}, "
            f"the canvas {'x'.join(map(str, canvas))}{'' if has_text else ', as has_text is False'}"
        )
    windows = sliding_tile.sliding_tile_map(
        window_size,
        canvas,
        head_dim=q.shape[3],
        dtype=q.dtype,
        tile=tile,
        text_tokens=tokens - image_tokens,
        device=q.device,
    )
    length = text_length if has_text else None
    out, _ = sliding_tile.attention_in_slots(query, key, value, windows, length, scale=scale)
    return windows.into_tokens(out).transpose(1, 2)


class VSAMetadata(TypedDict):
    """What the tiles of a video say about its tokens."""

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
    """Orders, slots and sizes of a video's tiles, under the original's names; made anew by each call.

    Args:
        shape: (time, height, width) of the video in tokens; the tile need not divide it.
        tile: (time, height, width) of a whole tile, in tokens.
        device: of the tensors, torch's default device if None.

    Raises:
        TypeError, ValueError: a size is not three positive integers.
    """
    function = "build_vsa_metadata"
    tiles = VideoTiles(check_size(f"{function}: shape", shape), check_size(f"{function}: tile", tile))
    device = torch.get_default_device() if device is None else torch.device(device)
    return {
        "tile_partition_indices": tiles.order(device),
        "reverse_tile_partition_indices": tiles.positions(device),
        "variable_block_sizes": tiles.sizes(device),
        "non_pad_index": tiles.slots(tiles.volume, device),
        "num_tiles": tiles.counts,
        "max_block_size": tiles.volume,
    }


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, block_sizes: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`lite_attention.families.block_sparse.attention` in ``[B, H, S, D]``, by a bool map over blocks.

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
    query, key, value = _swapped_qkv(function, q, k, v)
    check_tensors(function, block_map=block_map)
    keep = block_map
    if block_map.dtype == torch.bool:
        volume = block_sparse.volume_of_blocks(key, block_sizes)
        batch, query_len, heads, _ = query.shape
        if query_len % volume != 0:
            raise ValueError(
                f"{function}: q has {query_len} slots, expected a multiple of the {volume} of a block of k"
            )
        expected = [batch, heads, query_len // volume, block_sizes.numel()]
        if not equals_any(list(block_map.shape), expected, expected[1:]):
            raise ValueError(
                f"{function}: block_map has shape {list(block_map.shape)}, expected {expected} or {expected[1:]}"
            )
        keep = expand_blocks(block_map, volume).expand(batch, -1, -1, -1)
    elif block_map.dtype != torch.int32:
        raise TypeError(f"{function}: block_map has dtype {block_map.dtype}, expected torch.bool or torch.int32")
    block_sparse.check_keep(function, "block_map", keep, query, key)
    out, lse = block_sparse.attention(query, key, value, keep, block_sizes, scale=scale)
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
    """:func:`lite_attention.families.video_sparse.attention` by the call of the ``vsa`` package: out alone.

    Args:
        q: ``[B, Hq, Sq, D]`` in padded slots, those without a token 0 in q, k and v; any strides whose last one is 1.
        k, v: ``[B, Hkv, Sk, D]`` in padded slots, of q's dtype and device, ``Hq % Hkv == 0``.
        variable_block_sizes: int32 ``[kv_blocks]``, how many tokens each block of keys has, at least 1.
        topk: blocks of keys for each block of queries, at least 1; all of them where there are fewer.
        block_size: (time, height, width) of a block, or its number of slots, which is a multiple of 64.
        compress_attn_weight: the gate on the coarse result, of q's shape; 1 if None.
        q_variable_block_sizes: int32 ``[query_blocks]``, as for keys; ``variable_block_sizes`` if None.
        scale, prefix_blocks: as there; the original has neither.

    Returns:
        out, of q's shape and dtype, a transposed view of ``[B, Sq, Hq, D]``. Slots without a token hold no result.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    function = "video_sparse_attn"
    query, key, value = _swapped_qkv(function, q, k, v)
    volume = as_int(block_size)
    if volume is None:
        volume = math.prod(check_size(f"{function}: block_size", block_size))
    check_volume(f"{function}: block_size is {block_size}", volume)
    gate = compress_attn_weight
    out, _ = video_sparse.attention(
        query,
        key,
        value,
        variable_block_sizes,
        topk,
        volume=volume,
        gate=None if gate is None else _swapped(function, "compress_attn_weight", gate),
        q_block_sizes=q_variable_block_sizes,
        scale=scale,
        prefix_blocks=prefix_blocks,
    )
    return out.transpose(1, 2)
