"""SLIDING_TILE_ATTN: a token attends a window of tiles around its own (docs/sliding-tile.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lite_attention.families import sliding_tile
from lite_attention.families.sliding_tile import TILE, SlidingTileMap, sliding_tile_map
from lite_attention.layers.abstract import AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, Backend
from lite_attention.layers.backends._checks import expect_metadata, refuse_causal
from lite_attention.maps.kept import KeptTensors, current_place
from lite_attention.maps.tiles import HEAD_DIMS
from lite_attention.maps.video_tiles import Size, VideoTiles, check_size
from lite_attention.ops.backends import supported_dtypes
from lite_attention.ops.checks import checked_int, equals_any
from lite_attention.ops.modes import ordinary_tensors
from lite_attention.ops.own_state import OwnState, StateHolder, hold

__all__ = [
    "BACKEND",
    "SlidingTileAttentionBackend",
    "SlidingTileAttentionImpl",
    "SlidingTileAttentionMetadata",
    "SlidingTileAttentionMetadataBuilder",
]

_NAME = "SLIDING_TILE_ATTN"

# The blocks of a model, in the name of a layer.
_LAYER_INDEX = re.compile(r"(?:^|\.)blocks\.(\d+)(?:\.|$)")

Windows = Sequence[Sequence[Sequence[Sequence[int]]]]
"""(time, height, width) in tiles for each step, layer and head."""


@dataclass
class SlidingTileAttentionMetadata(AttentionMetadata):
    """The windows of all layers in a step. Steps of one video differ in ``window_of_head`` alone, in what it holds."""

    window_of_head: Tensor
    """int64 ``[layers, heads]``: which row of ``windows`` each head has."""
    windows: Tensor
    """int32 ``[different windows, query_tiles, words]``: the keep map of a head with that window."""
    layout: SlidingTileMap
    """All else that a map says; its ``keep`` is that of the first window."""
    text_length: Tensor | None
    """int32 ``[B]`` or ``[1]``: how many text tokens are keys; None for all."""


class _Table(NamedTuple):
    """``STA_param`` as tensors."""

    source: Windows
    arguments: tuple[Any, ...]
    window_of_head: list[Tensor]  # of each step, int64 [layers, heads]
    windows: Tensor
    layout: SlidingTileMap


class SlidingTileAttentionMetadataBuilder(AttentionMetadataBuilder[SlidingTileAttentionMetadata]):
    """Makes the maps of all windows of a video once, and says in each step which head has which."""

    def __init__(self) -> None:
        """A builder for one model."""
        self._table: _Table | None = None
        self._text_lengths = KeptTensors()

    def prepare(self) -> None:
        """Forget the maps that were made."""
        self._table = None
        self._text_lengths = KeptTensors()

    def build(  # type: ignore[override]
        self,
        *,
        STA_param: Windows,  # noqa: N803 - FastVideo's name
        current_timestep: int,
        canvas: Size,
        head_size: int,
        dtype: torch.dtype,
        tile: Size = TILE,
        text_tokens: int = 0,
        text_length: int | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> SlidingTileAttentionMetadata:
        """The metadata of a step.

        Args:
            STA_param: ``STA_param[step][layer][head]`` is a window, (time, height, width) in tiles. Not to be changed
                between steps: it is read when it is first seen, and after :meth:`prepare`.
            current_timestep: the step, an index of STA_param.
            canvas: (time, height, width) of the video in tokens.
            head_size, dtype: of q.
            tile: (time, height, width) in tokens; it need not divide the canvas.
            text_tokens: how many replicated tokens follow the video.
            text_length: how many of them are keys, the first ones: an int, or int32 ``[B]`` on q's device. None for
                all.
            device: of q; torch's default device if None.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it.
        """
        if checked_int(f"{_NAME}: head_size", head_size) not in HEAD_DIMS:
            raise ValueError(
                f"{_NAME}: head_size is {head_size}, expected a multiple of {HEAD_DIMS.step} up to {HEAD_DIMS[-1]}"
            )
        device = torch.empty(0, dtype=torch.uint8, device=device).device  # with its index
        arguments = (canvas, head_size, dtype, tile, text_tokens, device, current_place(device))
        table = self._table
        if table is None or table.source is not STA_param or table.arguments != arguments:
            table = self._table = _make_table(STA_param, arguments)
        steps = len(table.window_of_head)
        if not 0 <= checked_int(f"{_NAME}: current_timestep", current_timestep) < steps:
            raise ValueError(
                f"{_NAME}: current_timestep is {current_timestep}, expected 0 to {steps - 1}, an index of STA_param"
            )
        if isinstance(text_length, Tensor):
            if text_length.dtype != torch.int32 or text_length.dim() != 1:
                raise TypeError(
                    f"{_NAME}: text_length has dtype {text_length.dtype} and shape {list(text_length.shape)}, expected "
                    "torch.int32 and [B], one length a batch entry"
                )
        elif text_length is not None:
            length = checked_int(f"{_NAME}: text_length", text_length)
            if not 0 <= length <= text_tokens:
                raise ValueError(f"{_NAME}: text_length is {length}, expected 0 to {text_tokens}, the text_tokens")
            text_length = self._text_lengths.get(length, device, lambda: _text_length(length, device))
        return SlidingTileAttentionMetadata(
            current_timestep=current_timestep,
            window_of_head=table.window_of_head[current_timestep],
            windows=table.windows,
            layout=table.layout,
            text_length=text_length,
        )


def _make_table(source: Windows, arguments: tuple[Any, ...]) -> _Table:
    canvas, head_size, dtype, tile, text_tokens, device, _ = arguments
    tiles = VideoTiles(check_size(f"{_NAME}: canvas", canvas), check_size(f"{_NAME}: tile", tile))
    numbers: dict[Size, int] = {}
    _check_nesting(source)
    window_of_head = [
        [
            [
                numbers.setdefault(_window(window, (step, layer, head)), len(numbers))
                for head, window in enumerate(heads)
            ]
            for layer, heads in enumerate(layers)
        ]
        for step, layers in enumerate(source)
    ]
    if not numbers:
        raise ValueError(f"{_NAME}: STA_param has no window, expected STA_param[step][layer][head]")
    for step, layers in enumerate(window_of_head):
        for layer, heads in enumerate(layers):
            if len(layers) != len(window_of_head[0]) or len(heads) != len(window_of_head[0][0]):
                raise ValueError(
                    f"{_NAME}: STA_param[{step}] has {len(layers)} layers and STA_param[{step}][{layer}] {len(heads)} "
                    f"heads, expected {len(window_of_head[0])} and {len(window_of_head[0][0])} like the first"
                )
    with ordinary_tensors():
        made = sliding_tile_map(
            list(numbers), canvas, tile=tile, text_tokens=text_tokens, head_dim=head_size, dtype=dtype, device=device
        )
        # Tokens go from raster order into slots, or into tile order where those are the slots, in one copy.
        text = torch.arange(tiles.tokens, tiles.tokens + text_tokens, device=device)
        token_of_slot = torch.cat([tiles.order(device), text])
        slot_of_token = torch.cat([tiles.positions(device), text])
        if made.token_of_slot is not None and made.slot_of_token is not None:
            token_of_slot = token_of_slot[made.token_of_slot]
            slot_of_token = made.slot_of_token[slot_of_token]
        windows = made.keep[0].contiguous()
        return _Table(
            source,
            arguments,
            # Tensors of their own, not views of one: compilers may look at where a view begins.
            [
                numbers_of_step.clone()
                for numbers_of_step in torch.tensor(window_of_head, dtype=torch.int64, device=device)
            ],
            windows,
            made._replace(keep=windows[:1].unsqueeze(0), token_of_slot=token_of_slot, slot_of_token=slot_of_token),
        )


def _check_nesting(source: Windows) -> None:
    if not isinstance(source, (list, tuple)):
        raise TypeError(f"{_NAME}: STA_param is {source!r}, expected STA_param[step][layer][head]")
    for step, layers in enumerate(source):
        if not isinstance(layers, (list, tuple)):
            raise TypeError(f"{_NAME}: STA_param[{step}] is {layers!r}, expected a list of layers")
        for layer, heads in enumerate(layers):
            if not isinstance(heads, (list, tuple)):
                raise TypeError(f"{_NAME}: STA_param[{step}][{layer}] is {heads!r}, expected a list of windows")


def _text_length(length: int, device: torch.device) -> Tensor:
    return torch.tensor([length], dtype=torch.int32, device=device)


def _window(window: Sequence[int], where: tuple[int, int, int]) -> Size:
    step, layer, head = where
    name = f"{_NAME}: STA_param[{step}][{layer}][{head}]"
    return check_size(name, tuple(window) if isinstance(window, list) else window)


def _checked_layer_index(layer_index: int) -> int:
    if isinstance(layer_index, bool) or not isinstance(layer_index, int) or layer_index < 0:
        raise ValueError(f"{_NAME}: layer_index is {layer_index!r}, expected an int of at least 0")
    return layer_index


class _LayerNumber(OwnState):
    """A tensor: as a number it would make a graph for each layer of a model that is compiled block by block."""

    number: Tensor

    def __init__(self, layer_index: int) -> None:
        super().__init__()
        self.index = layer_index
        self.start_over(torch.device("cpu"))

    def set(self, layer_index: int) -> None:
        """Another number, in place: compiled and captured code follows."""
        self.index = layer_index
        with ordinary_tensors():
            self.number.fill_(layer_index)

    def fresh_buffers(self, device: torch.device) -> dict[str, Tensor]:
        return {"number": torch.tensor([self.index], dtype=torch.int64, device=device)}

    @property
    def device(self) -> torch.device:
        return self.number.device


class SlidingTileAttentionImpl(StateHolder, AttentionImpl[SlidingTileAttentionMetadata]):
    """:func:`lite_attention.families.sliding_tile.attention` on tokens in raster order, text after them.

    Args:
        layer_index: number of the layer in STA_param; by default n of ``"blocks.<n>."`` in the prefix.
    """

    _layer: _LayerNumber

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        *,
        layer_index: int | None = None,
    ) -> None:
        super().__init__()
        refuse_causal(_NAME, causal)
        if layer_index is None:
            found = _LAYER_INDEX.search(prefix)
            if found is None:
                raise ValueError(
                    f"{_NAME}: prefix is {prefix!r}, expected 'blocks.<n>' in it, or the argument layer_index"
                )
            layer_index = int(found[1])
        self.softmax_scale = softmax_scale
        self.num_heads = num_heads
        self._heads = 0, num_heads
        hold(self, "_layer", _LayerNumber(_checked_layer_index(layer_index)))

    @property
    def layer_index(self) -> int:
        """Number of the layer in STA_param; it may be assigned, in a copy of a block for instance."""
        return self._layer.index

    @layer_index.setter
    def layer_index(self, layer_index: int) -> None:
        self._layer.set(_checked_layer_index(layer_index))

    def set_local_heads(self, first: int, count: int) -> None:
        """Use the windows of these heads."""
        self._heads = first, count

    def forward_with_text(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: SlidingTileAttentionMetadata | None,
        text_tokens: int,
    ) -> Tensor:
        """The same, of a call that says how many tokens are text."""
        layout = expect_metadata(_NAME, attn_metadata, SlidingTileAttentionMetadata).layout
        video_tokens = query.shape[1] - text_tokens
        if not equals_any((video_tokens, text_tokens), (layout.image_tokens, layout.text_tokens)):
            raise ValueError(
                f"{_NAME}: q has {video_tokens} tokens of video and {text_tokens} of text, expected "
                f"{layout.image_tokens}, the canvas, and {layout.text_tokens}. Give the layer original_seq_len where "
                "some are padding"
            )
        return self.forward(query, key, value, attn_metadata)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: SlidingTileAttentionMetadata | None
    ) -> Tensor:
        """Attention through the windows of this layer and step; text, where the metadata know of some, comes last."""
        metadata = expect_metadata(_NAME, attn_metadata, SlidingTileAttentionMetadata)
        layers, heads = metadata.window_of_head.shape
        if heads != self.num_heads:
            raise ValueError(f"{_NAME}: STA_param has {heads} heads, expected {self.num_heads}, those of the layer")
        # A graph must not depend on the number; there index_select has the last word.
        if not torch.compiler.is_compiling() and self.layer_index >= layers:
            raise ValueError(
                f"{_NAME}: STA_param has {layers} layers, expected one of index {self.layer_index}, that of the layer"
            )
        expected = metadata.layout.image_tokens + metadata.layout.text_tokens
        if query.shape[1] != expected:
            raise ValueError(
                f"{_NAME}: q has {query.shape[1]} tokens, expected {expected}: {metadata.layout.image_tokens} of the "
                f"canvas and {metadata.layout.text_tokens} of text. Give the layer original_seq_len where some are "
                "padding"
            )
        self._layer.place(query.device, _NAME, torch.compiler.is_compiling())
        windows = metadata.window_of_head.narrow(1, *self._heads).index_select(0, self._layer.number).flatten()
        sliding = metadata.layout._replace(keep=metadata.windows.index_select(0, windows).unsqueeze(0))
        text_length, batch = metadata.text_length, query.shape[0]
        if text_length is not None and not equals_any(text_length.shape[0], 1, batch):
            raise ValueError(
                f"{_NAME}: text_length has shape {list(text_length.shape)}, expected [{batch}], one a batch entry"
            )
        out, _ = sliding_tile.attention_in_slots(
            query,
            key,
            value,
            sliding,
            None if text_length is None else text_length.expand(batch),
            scale=self.softmax_scale,
        )
        return sliding.into_tokens(out)


BACKEND = Backend(
    _NAME,
    SlidingTileAttentionImpl,
    SlidingTileAttentionMetadata,
    SlidingTileAttentionMetadataBuilder,
    head_sizes=HEAD_DIMS,
    dtypes=supported_dtypes,
)
SlidingTileAttentionBackend = BACKEND.face
