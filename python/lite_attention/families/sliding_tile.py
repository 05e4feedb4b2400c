"""Sliding Tile Attention: every token of a tile of a video attends the same window of tiles around it.

The method is that of Zhang et al., "Fast Video Generation with Sliding Tile Attention" (arXiv 2502.04507). Here windows
are a keep map for :func:`lite_attention.attention`: all heads run in one launch, and the canvas and the tile are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_attention import ops
from lite_attention.maps.keep_map import ceil_div, pack_keep_map
from lite_attention.maps.tiles import FINE_TILE_N, tile_shape
from lite_attention.maps.video_tiles import Size, VideoTiles, check_size
from lite_attention.ops.modes import ordinary_tensors

__all__ = ["SlidingTileMap", "attention", "attention_in_slots", "sliding_tile_map"]

_NAME = "sliding_tile.attention"

WindowSize = Sequence[int] | Sequence[Sequence[int]]

# The canvas and the tile of the paper, for which FastVideo's kernel was made.
SEQ_SHAPE = "30x48x80"
TILE = (6, 8, 8)


class SlidingTileMap(NamedTuple):
    """What :func:`sliding_tile_map` makes: windows on one canvas, for any number of layers, steps and batch sizes.

    Its tensors are made on the stream that is current then, and go when it goes.
    """

    image_tokens: int
    """Tokens of the canvas."""
    text_tokens: int
    """Tokens after the canvas."""
    tile_n: int
    """Keys per KV tile of ``keep``."""
    keep: Tensor
    """Keep map over slots, int32 ``[1, heads, query_tiles, words]``; one head stands for all."""
    kv_tile_lens: Tensor | None
    """int32 ``[kv_tiles]``: how many keys each KV tile has; None where all are full."""
    token_of_slot: Tensor | None
    """int64 ``[slots]``: the token to put into each slot; None where tokens already lie in their slots."""
    slot_of_token: Tensor | None
    """int64 ``[S]``, its inverse."""

    def into_slots(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens along ``dim`` into slots; ``x`` itself where they are the same."""
        return x if self.token_of_slot is None else x.index_select(dim, self.token_of_slot)

    def into_tokens(self, x: Tensor, dim: int = 1) -> Tensor:
        """Slots along ``dim`` back into tokens; ``x`` itself where they are the same."""
        return x if self.slot_of_token is None else x.index_select(dim, self.slot_of_token)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: SlidingTileMap,
    text_length: int | Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a video's tokens to windows of tiles, and of and to the text behind them.

    A query attends all tokens of the tiles in the window around its own tile. Queries of the video also attend the
    text; queries of the text attend everything.

    Args:
        q: ``[B, S, H, D]``, fp32, bf16 or fp16, any strides whose last one is 1; of as many tokens as the map was made
            for. First those of the canvas, in tile order (:func:`lite_attention.maps.video_tiles.tile_tokens`), then
            those of the text.
        k, v: ``[B, S, Hkv, D]`` of q's dtype and device, ``H % Hkv == 0``.
        windows: from :func:`sliding_tile_map`, made once for all layers, steps and batch sizes.
        text_length: how many text tokens are keys, the first ones; an int, or int32 ``[B]`` on q's device, whose values
            are limited to 0 and what there is. None for all. A tensor may change without a new compilation.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.

    Returns:
        out ``[B, S, H, D]`` of q's dtype, contiguous, and lse, fp32 ``[B, H, S]``, the natural log of the softmax
        denominator. Where tokens do not lie in their slots, q, k, v, out and lse are copied, once each.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    out, lse = attention_in_slots(q, k, v, windows, text_length, scale=scale)
    return windows.into_tokens(out), windows.into_tokens(lse, dim=2)


def attention_in_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: SlidingTileMap,
    text_length: int | Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` whose results still lie in slots, for those who need only one of them in tokens.

    Args:
        q, k, v, windows, text_length, scale: as there.

    Returns:
        out ``[B, slots, H, D]`` and lse ``[B, H, slots]``; ``windows.into_tokens`` orders them.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as there.
    """
    _check_inputs(q, k, v, windows)
    query, key, value = (windows.into_slots(x) for x in (q, k, v))
    return ops.attention(
        query,
        key,
        value,
        keep=windows.keep.expand(q.shape[0], q.shape[2], -1, -1),
        kv_lens=_kv_lens(text_length, windows, q, key.shape[1]),
        scale=scale,
        tile_n=windows.tile_n,
        kv_tile_lens=windows.kv_tile_lens,
    )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, windows: SlidingTileMap) -> None:
    tokens = windows.image_tokens + windows.text_tokens
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[1] != tokens:
            raise ValueError(
                f"{_NAME}: {name} has shape {list(x.shape)}, expected [B, {tokens}, H, D]: "
                f"{windows.image_tokens} tokens of the canvas and {windows.text_tokens} of text"
            )
    number = windows.keep.shape[1]
    if number != 1 and number != q.shape[2]:
        raise ValueError(
            f"{_NAME}: windows has {number} windows, expected {q.shape[2]}, one a query head, or one for all"
        )


def _kv_lens(text_length: int | Tensor | None, windows: SlidingTileMap, q: Tensor, slots: int) -> Tensor | None:
    """The text comes last, so where it ends the keys end."""
    if text_length is None:
        return None
    text_tokens = windows.text_tokens
    image_slots = slots - text_tokens
    if isinstance(text_length, Tensor):
        if text_length.dtype != torch.int32 or text_length.dim() != 1 or text_length.shape[0] != q.shape[0]:
            raise ValueError(
                f"{_NAME}: text_length has dtype {text_length.dtype} and shape {list(text_length.shape)}, "
                f"expected torch.int32 and [{q.shape[0]}], one length a batch entry"
            )
        return text_length.clamp(0, text_tokens) + image_slots
    if isinstance(text_length, bool) or not isinstance(text_length, (int, torch.SymInt)):
        raise TypeError(f"{_NAME}: text_length has type {type(text_length).__name__}, expected int or Tensor")
    if not 0 <= text_length <= text_tokens:
        raise ValueError(
            f"{_NAME}: text_length is {text_length}, expected 0 to {text_tokens}, the tokens after the canvas"
        )
    return torch.full(q.shape[:1], image_slots + text_length, dtype=torch.int32, device=q.device)


def sliding_tile_map(
    window_size: WindowSize,
    seq_shape: str | Size = SEQ_SHAPE,
    *,
    head_dim: int,
    dtype: torch.dtype,
    tile: Size = TILE,
    text_tokens: int = 0,
    device: torch.device | str | None = None,
) -> SlidingTileMap:
    """The windows of :func:`attention`, made once and for all its calls: keep it as long as they, or a graph, use it.

    Along each axis a window of w tiles reaches ``w // 2`` tiles to both sides, so an even w counts as w + 1. At a
    border the window is moved inward, not cut off, so every query sees equally many tiles. One larger than the axis
    covers it.

    Args:
        window_size: (time, height, width) in tiles, one for all query heads or a list with one a query head.
        seq_shape: the canvas (time, height, width) in tokens, as a tuple or as text, ``"30x48x80"``.
        head_dim, dtype: D and dtype of q, which choose the tiles of the keep map.
        tile: (time, height, width) in tokens. It need not divide the canvas. If it does and its volume is a multiple of
            64, tokens lie in their slots and nothing is copied.
        text_tokens: how many tokens follow the canvas, those that ``text_length`` leaves out included.
        device: of q; by default torch's default device.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
    """
    function = "sliding_tile_map"
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with ordinary_tensors():
            return sliding_tile_map(
                window_size,
                seq_shape,
                head_dim=head_dim,
                dtype=dtype,
                tile=tile,
                text_tokens=text_tokens,
                device=device,
            )
    if text_tokens < 0:
        raise ValueError(f"{function}: text_tokens is {text_tokens}, expected at least 0")
    tiles = VideoTiles(canvas_size(function, seq_shape), check_size(f"{function}: tile", tile))
    windows = _windows(function, window_size)
    tile_m, tile_n = tile_shape(head_dim, dtype)
    device = torch.empty(0, dtype=torch.uint8, device=device).device  # with its index
    # A query tile and a KV tile must lie inside one tile of the video; both are to be had with 64 rows.
    block = ceil_div(tiles.volume, FINE_TILE_N) * FINE_TILE_N
    if block % tile_n != 0:
        tile_n = FINE_TILE_N
    layout = _Layout(tiles, block, tile_m, tile_n, text_tokens)
    numbers = {window: number for number, window in enumerate(dict.fromkeys(windows))}
    rows = _window_rows(layout, list(numbers), device)
    if len(numbers) == 1:
        keep = rows.expand(len(windows), -1, -1)
    elif len(numbers) == len(windows):
        keep = rows
    else:
        keep = torch.stack([rows[numbers[window]] for window in windows])
    in_place = tiles.number * block == tiles.tokens
    return SlidingTileMap(
        image_tokens=tiles.tokens,
        text_tokens=text_tokens,
        tile_n=tile_n,
        keep=keep.unsqueeze(0),
        kv_tile_lens=None if in_place else _kv_tile_lens(layout, device),
        token_of_slot=None if in_place else _token_of_slot(layout, device),
        slot_of_token=None if in_place else _slot_of_token(layout, device),
    )


def canvas_size(function: str, seq_shape: str | Size) -> Size:
    """The canvas as three numbers.

    Raises:
        TypeError, ValueError: it is not; the text begins with ``function``.
    """
    if isinstance(seq_shape, str):
        sizes = seq_shape.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
            raise ValueError(
                f"{function}: seq_shape is {seq_shape!r}, expected time x height x width in tokens, such as '30x48x80'"
            )
        seq_shape = int(sizes[0]), int(sizes[1]), int(sizes[2])
    return check_size(f"{function}: seq_shape", seq_shape)


def _windows(function: str, window_size: WindowSize) -> list[Size]:
    """One window for all heads, or one a head."""
    if not isinstance(window_size, (list, tuple)) or len(window_size) == 0:
        raise TypeError(f"{function}: window_size is {window_size!r}, expected a window in tiles, or one a query head")
    if isinstance(window_size[0], int):
        return [check_size(f"{function}: window_size", tuple(window_size))]
    return [
        check_size(f"{function}: window_size[{head}]", tuple(window) if isinstance(window, list) else window)
        for head, window in enumerate(window_size)
    ]


class _Layout(NamedTuple):
    """How tokens lie in slots, and into which tiles the kernel cuts these. Text follows the slots of the canvas."""

    tiles: VideoTiles
    block: int  # slots of each tile of the video
    tile_m: int
    tile_n: int
    text_tokens: int


def _axis_windows(count: int, device: torch.device) -> Tensor:
    """Of each window (by how far it reaches to both sides) which tiles along an axis (columns) the queries of each tile
    (rows) attend, bool ``[reaches, count, count]``; the last one covers the axis.
    """
    tile = torch.arange(count, device=device)
    reach = tile[: count // 2 + 1].unsqueeze(-1)
    centre = tile.clamp(reach, count - 1 - reach)
    return (centre.unsqueeze(-1) - tile).abs() <= reach.unsqueeze(-1)


def _window_rows(layout: _Layout, windows: Sequence[Size], device: torch.device) -> Tensor:
    """Packed rows of a head with each window, int32 ``[windows, query_tiles, words]``, all in one set of launches."""
    tiles, block, tile_m, tile_n, text_tokens = layout
    time, height, width = (_axis_windows(count, device) for count in tiles.counts)

    def attended_in(window: Size) -> Tensor:
        t, h, w = (min(size, count) // 2 for size, count in zip(window, tiles.counts, strict=True))
        return time[t][:, None, None, :, None, None] & height[h][:, None, None, :, None] & width[w][:, None, None, :]

    attended = torch.stack([attended_in(window) for window in windows])
    attended = attended.view(len(windows), tiles.number, tiles.number).repeat_interleave(block // tile_n, -1)
    # The text's keys are in every row, and the text's rows have every key.
    text_columns, text_rows = ceil_div(text_tokens, tile_n), ceil_div(text_tokens, tile_m)
    packed = pack_keep_map(F.pad(attended, (0, text_columns, 0, text_rows), value=True))
    video = packed[:, : tiles.number].repeat_interleave(block // tile_m, 1)
    if not tiles.exact:
        video = video * (_tile_lens(layout, tile_m, device) > 0).unsqueeze(-1)  # no work for rows without a query
    return torch.cat([video, packed[:, tiles.number :]], 1)


def _tile_lens(layout: _Layout, rows: int, device: torch.device) -> Tensor:
    """int32 ``[canvas slots / rows]``: how many of each ``rows`` consecutive slots of the canvas have a token."""
    start = torch.arange(0, layout.block, rows, dtype=torch.int32, device=device)
    return (layout.tiles.sizes(device).unsqueeze(-1) - start).clamp(0, rows).flatten()


def _kv_tile_lens(layout: _Layout, device: torch.device) -> Tensor:
    text_tiles = ceil_div(layout.text_tokens, layout.tile_n)
    return F.pad(_tile_lens(layout, layout.tile_n, device), (0, text_tiles), value=layout.tile_n)


def _token_of_slot(layout: _Layout, device: torch.device) -> Tensor:
    """A slot without a token repeats the last one of its tile: a value that the tile's keys have anyway."""
    tiles = layout.tiles
    sizes = tiles.sizes(device).to(torch.int64)
    end = sizes.cumsum(0).unsqueeze(-1)
    start = end - sizes.unsqueeze(-1)
    video = torch.minimum(start + torch.arange(layout.block, device=device), end - 1)
    return torch.cat([video.flatten(), torch.arange(tiles.tokens, tiles.tokens + layout.text_tokens, device=device)])


def _slot_of_token(layout: _Layout, device: torch.device) -> Tensor:
    slots = layout.tiles.number * layout.block
    video = layout.tiles.slots(layout.block, device)
    return torch.cat([video, torch.arange(slots, slots + layout.text_tokens, device=device)])
