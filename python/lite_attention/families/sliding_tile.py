"""Sliding Tile Attention: every token of a tile of a video attends the same window of tiles around it.

The method is that of Zhang et al., "Fast Video Generation with Sliding Tile Attention" (arXiv 2502.04507), the call
that of the ``st_attn`` kernel in FastVideo. Here windows are a keep map for :func:`lite_attention.attention`: all heads
run in one launch, and the canvas and the tile are free.
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
from lite_attention.maps.video_tiles import Size, VideoTiles, check_size, keep_tensor

__all__ = ["SlidingTileMap", "sliding_tile_attention", "sliding_tile_map"]

WindowSize = Sequence[int] | Sequence[Sequence[int]]

# The canvas and the tile that the call of st_attn takes for granted.
SEQ_SHAPE = "30x48x80"
TILE = (6, 8, 8)


class SlidingTileMap(NamedTuple):
    """What :func:`sliding_tile_map` makes: windows on one canvas, for any number of layers, steps and batch sizes."""

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

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, text_length: int | Tensor | None = None, *, scale: float | None = None
    ) -> Tensor:
        """Attention through these windows.

        Args:
            q, k, v: as for :func:`sliding_tile_attention`, with as many tokens as the map was made for.
            text_length: as there; None for all text tokens.
            scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.

        Returns:
            out, ``[B, H, S, D]`` of q's dtype.

        Raises:
            RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        """
        self._check_inputs(q, k, v)
        query, key, value = (self._into_slots(x.transpose(1, 2)) for x in (q, k, v))
        out, _ = ops.attention(
            query,
            key,
            value,
            keep=self.keep.expand(q.shape[0], q.shape[1], -1, -1),
            kv_lens=self._kv_lens(text_length, q, key.shape[1]),
            scale=scale,
            tile_n=self.tile_n,
            kv_tile_lens=self.kv_tile_lens,
        )
        if self.slot_of_token is not None:
            out = out.index_select(1, self.slot_of_token)
        return out.transpose(1, 2)

    def _check_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        tokens = self.image_tokens + self.text_tokens
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4 or x.shape[2] != tokens:
                raise ValueError(
                    f"sliding_tile_attention: {name} has shape {list(x.shape)}, expected [B, H, {tokens}, D]: "
                    f"{self.image_tokens} tokens of the canvas and {self.text_tokens} of text"
                )
        windows = self.keep.shape[1]
        if windows != 1 and windows != q.shape[1]:
            raise ValueError(
                f"sliding_tile_attention: window_size has {windows} windows, expected {q.shape[1]}, one a query head, "
                "or one for all"
            )

    def _into_slots(self, x: Tensor) -> Tensor:
        return x if self.token_of_slot is None else x.index_select(1, self.token_of_slot)

    def _kv_lens(self, text_length: int | Tensor | None, q: Tensor, slots: int) -> Tensor | None:
        """The text comes last, so where it ends the keys end."""
        if text_length is None:
            return None
        image_slots = slots - self.text_tokens
        if isinstance(text_length, Tensor):
            if text_length.dtype != torch.int32 or text_length.dim() != 1 or text_length.shape[0] != q.shape[0]:
                raise ValueError(
                    f"sliding_tile_attention: text_length has dtype {text_length.dtype} and shape "
                    f"{list(text_length.shape)}, expected torch.int32 and [{q.shape[0]}], one length a batch entry"
                )
            return text_length.clamp(0, self.text_tokens) + image_slots
        if isinstance(text_length, bool) or not isinstance(text_length, (int, torch.SymInt)):
            raise TypeError(
                f"sliding_tile_attention: text_length has type {type(text_length).__name__}, expected int or Tensor"
            )
        if not 0 <= text_length <= self.text_tokens:
            raise ValueError(
                f"sliding_tile_attention: text_length is {text_length}, expected 0 to {self.text_tokens}, the tokens "
                "after the canvas"
            )
        return torch.full(q.shape[:1], image_slots + text_length, dtype=torch.int32, device=q.device)


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
    """Attention of a video's tokens to windows of tiles, and of and to the text behind them.

    A query attends all tokens of the tiles in the window around its own tile. Along each axis a window of w tiles
    reaches ``w // 2`` tiles to both sides, so an even w counts as w + 1. At a border the window is moved inward, not
    cut off, so every query sees equally many tiles. A window larger than the axis covers it. Queries of the video also
    attend the text; queries of the text attend everything.

    Args:
        q: ``[B, H, S, D]``, fp32, bf16 or fp16, any strides whose last one is 1. First the tokens of the canvas, in
            tile order (:func:`lite_attention.maps.video_tiles.tile_tokens`), then those of the text.
        k, v: ``[B, Hkv, S, D]`` of q's dtype and device, ``H % Hkv == 0``.
        window_size: (time, height, width) in tiles, one for all query heads or a list with one a query head.
        text_length: how many text tokens are keys, the first ones; an int, or int32 ``[B]`` on q's device, whose values
            are limited to 0 and what there is. A tensor may change without a new compilation.
        has_text: False if no text follows the canvas; ``text_length`` is then ignored.
        seq_shape: the canvas (time, height, width) in tokens, as a tuple or as text, ``"30x48x80"``.
        tile: (time, height, width) in tokens. It need not divide the canvas. If it does and its volume is a multiple of
            64, nothing is copied; otherwise q, k, v and out are, once each.
        scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.

    Returns:
        out, ``[B, H, S, D]`` of q's dtype.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    tiles = _video_tiles("sliding_tile_attention", seq_shape, tile)
    if q.dim() != 4:
        raise ValueError(f"sliding_tile_attention: q has {q.dim()} dimensions, expected 4")
    text_tokens = q.shape[2] - tiles.tokens
    if text_tokens < 0 or (text_tokens > 0 and not has_text):
        raise ValueError(
            f"sliding_tile_attention: q has {q.shape[2]} tokens, expected {'at least ' if has_text else ''}"
            f"{tiles.tokens}, the canvas {'x'.join(map(str, tiles.grid))}{'' if has_text else ', as has_text is False'}"
        )
    windows = _windows("sliding_tile_attention", window_size)
    sliding = _sliding_tile_map(windows, tiles, text_tokens, q.shape[3], q.dtype, q.device)
    return sliding.attend(q, k, v, text_length if has_text else None, scale=scale)


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
    """The windows of :func:`sliding_tile_attention`, made once and for all calls of its ``attend``.

    Eager calls of ``sliding_tile_attention`` remember what they need. A compiled model and a captured CUDA graph would
    make it anew in each call: give them a map made outside, and keep it as long as they are used.

    Args:
        window_size, seq_shape, tile: as for :func:`sliding_tile_attention`.
        head_dim, dtype: D and dtype of q, which choose the tiles of the keep map.
        text_tokens: how many tokens follow the canvas, those that ``text_length`` leaves out included.
        device: of q; by default torch's default device.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
    """
    if text_tokens < 0:
        raise ValueError(f"sliding_tile_map: text_tokens is {text_tokens}, expected at least 0")
    tiles = _video_tiles("sliding_tile_map", seq_shape, tile)
    windows = _windows("sliding_tile_map", window_size)
    device = torch.empty(0, device=device).device  # with its index
    return _sliding_tile_map(windows, tiles, text_tokens, head_dim, dtype, device)


def _video_tiles(function: str, seq_shape: str | Size, tile: Size) -> VideoTiles:
    if isinstance(seq_shape, str):
        sizes = seq_shape.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
            raise ValueError(
                f"{function}: seq_shape is {seq_shape!r}, expected time x height x width in tokens, such as '30x48x80'"
            )
        seq_shape = int(sizes[0]), int(sizes[1]), int(sizes[2])
    return VideoTiles(check_size(f"{function}: seq_shape", seq_shape), check_size(f"{function}: tile", tile))


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


def _sliding_tile_map(
    windows: list[Size], tiles: VideoTiles, text_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> SlidingTileMap:
    tile_m, tile_n = tile_shape(head_dim, dtype)
    # A query tile and a KV tile must lie inside one tile of the video; both are to be had with 64 rows.
    block = ceil_div(tiles.volume, FINE_TILE_N) * FINE_TILE_N
    if block % tile_n != 0:
        tile_n = FINE_TILE_N
    layout = _Layout(tiles, block, tile_m, tile_n, text_tokens)
    rows = {window: keep_tensor(_window_rows, device, layout, window) for window in dict.fromkeys(windows)}
    if len(rows) == 1:
        keep = rows[windows[0]].expand(len(windows), -1, -1)
    else:
        keep = torch.stack([rows[window] for window in windows])
    in_place = tiles.number * block == tiles.tokens
    return SlidingTileMap(
        image_tokens=tiles.tokens,
        text_tokens=text_tokens,
        tile_n=tile_n,
        keep=keep.unsqueeze(0),
        kv_tile_lens=None if in_place else keep_tensor(_kv_tile_lens, device, layout),
        token_of_slot=None if in_place else keep_tensor(_token_of_slot, device, layout),
        slot_of_token=None if in_place else keep_tensor(_slot_of_token, device, layout),
    )


def _axis_window(count: int, window: int, device: torch.device) -> Tensor:
    """Which tiles along an axis (columns) the queries of each tile (rows) attend, bool ``[count, count]``."""
    half = window // 2
    reach = min(2 * half + 1, count)
    tile = torch.arange(count, device=device)
    first = (tile - half).clamp(0, count - reach).unsqueeze(-1)
    return (tile >= first) & (tile < first + reach)


def _window_rows(layout: _Layout, window: Size, device: torch.device) -> Tensor:
    """Packed rows of a head with this window, int32 ``[query_tiles, words]``."""
    tiles, block, tile_m, tile_n, text_tokens = layout
    time, height, width = (_axis_window(count, size, device) for count, size in zip(tiles.counts, window, strict=True))
    attended = time[:, None, None, :, None, None] & height[:, None, None, :, None] & width[:, None, None, :]
    attended = attended.reshape(tiles.number, tiles.number).repeat_interleave(block // tile_n, -1)
    # The text's keys are in every row, and the text's rows have every key.
    text_columns, text_rows = ceil_div(text_tokens, tile_n), ceil_div(text_tokens, tile_m)
    packed = pack_keep_map(F.pad(attended, (0, text_columns, 0, text_rows), value=True))
    video = packed[: tiles.number].repeat_interleave(block // tile_m, 0)
    if not tiles.exact:
        video = video * (_tile_lens(layout, tile_m, device) > 0).unsqueeze(-1)  # no work for rows without a query
    return torch.cat([video, packed[tiles.number :]])


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
