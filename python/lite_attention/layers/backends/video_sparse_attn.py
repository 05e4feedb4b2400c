"""VIDEO_SPARSE_ATTN: attention between blocks chooses the blocks whose tokens attend (docs/video-sparse.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lite_attention.families import video_sparse
from lite_attention.layers.abstract import AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, Backend
from lite_attention.layers.backends._checks import expect_metadata, refuse_causal
from lite_attention.maps.blocks import topk_of_sparsity
from lite_attention.maps.tiles import HEAD_DIMS
from lite_attention.maps.video_tiles import VideoTiles, check_size
from lite_attention.ops.backends import supported_dtypes

__all__ = [
    "BACKEND",
    "VSA_TILE_SIZE",
    "VideoSparseAttentionBackend",
    "VideoSparseAttentionImpl",
    "VideoSparseAttentionMetadata",
    "VideoSparseAttentionMetadataBuilder",
]

VSA_TILE_SIZE = (4, 4, 4)

_NAME = "VIDEO_SPARSE_ATTN"


@dataclass
class VideoSparseAttentionMetadata(AttentionMetadata):
    """The blocks of a video. Under torch.compile another ``topk`` is another graph."""

    VSA_sparsity: float
    """May be assigned; ``topk`` follows."""
    topk: int = field(init=False)
    """Blocks of keys for each block of queries."""
    slots: int
    """Padded length: blocks times the tokens of a whole one."""
    slot_of_token: Tensor
    """int64 ``[tokens]``: where each token, in raster order, lies among the slots."""
    variable_block_sizes: Tensor
    """int32 ``[blocks]``: how many tokens each block has."""

    def __post_init__(self) -> None:
        self.topk = topk_of_sparsity(self.VSA_sparsity, self.variable_block_sizes.shape[0])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "VSA_sparsity" and hasattr(self, "variable_block_sizes"):
            self.topk = topk_of_sparsity(value, self.variable_block_sizes.shape[0])
        super().__setattr__(name, value)


class VideoSparseAttentionMetadataBuilder(AttentionMetadataBuilder[VideoSparseAttentionMetadata]):
    """Cuts the video of a step into blocks of 4 x 4 x 4 tokens."""

    def __init__(self) -> None:
        """A builder for one model."""
        self._tiles: VideoTiles | None = None

    def prepare(self) -> None:
        """Forget the tensors that were made."""
        self._tiles = None

    def build(  # type: ignore[override]
        self,
        *,
        current_timestep: int,
        raw_latent_shape: Sequence[int],
        patch_size: Sequence[int],
        VSA_sparsity: float,  # noqa: N803 - FastVideo's name
        device: torch.device | str | None = None,
    ) -> VideoSparseAttentionMetadata:
        """The metadata of a step.

        Args:
            current_timestep: the step.
            raw_latent_shape: (time, height, width) of the latents.
            patch_size: (time, height, width) of a token in latents; a remainder is no token.
            VSA_sparsity: share of the blocks of keys that a block of queries leaves out, from 0 to 1.
            device: of q; torch's default device if None.

        Raises:
            TypeError, ValueError: a size is not three positive integers, or the sparsity no such number.
        """
        latents_of, patch_of = (
            check_size(f"{_NAME}: {name}", tuple(size) if isinstance(size, list) else size)
            for name, size in (("raw_latent_shape", raw_latent_shape), ("patch_size", patch_size))
        )
        time, height, width = (latents // patch for latents, patch in zip(latents_of, patch_of, strict=True))
        tiles = VideoTiles((time, height, width), VSA_TILE_SIZE)
        if tiles == self._tiles:
            tiles = self._tiles  # which keeps its tensors for the steps of a video
        self._tiles = tiles
        device = torch.empty(0, dtype=torch.uint8, device=device).device  # with its index
        return VideoSparseAttentionMetadata(
            current_timestep=current_timestep,
            VSA_sparsity=VSA_sparsity,
            slots=tiles.number * tiles.volume,
            slot_of_token=tiles.raster_slots(tiles.volume, device),
            variable_block_sizes=tiles.sizes(device),
        )


class VideoSparseAttentionImpl(AttentionImpl[VideoSparseAttentionMetadata]):
    """:func:`lite_attention.families.video_sparse.attention` on tokens in raster order."""

    travels_beside = ("gate_compress",)

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
    ) -> None:
        refuse_causal(_NAME, causal)
        self.softmax_scale = softmax_scale

    def preprocess_qkv(self, qkv: Tensor, attn_metadata: VideoSparseAttentionMetadata | None) -> Tensor:
        """Tokens into the slots of their blocks; 0 where there is none."""
        metadata = expect_metadata(_NAME, attn_metadata, VideoSparseAttentionMetadata)
        slot_of_token = metadata.slot_of_token
        if qkv.shape[1] != slot_of_token.shape[0]:
            raise ValueError(
                f"{_NAME}: q, k and v have {qkv.shape[1]} tokens, expected {slot_of_token.shape[0]}, those of the "
                "video in attn_metadata. Give the layer original_seq_len where some are padding"
            )
        padded = qkv.new_zeros(qkv.shape[0], metadata.slots, *qkv.shape[2:])
        return padded.index_copy_(1, slot_of_token, qkv)

    def postprocess_output(self, output: Tensor, attn_metadata: VideoSparseAttentionMetadata | None) -> Tensor:
        """Tokens back into raster order."""
        metadata = expect_metadata(_NAME, attn_metadata, VideoSparseAttentionMetadata)
        return output.index_select(1, metadata.slot_of_token)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate_compress: Tensor | None,
        attn_metadata: VideoSparseAttentionMetadata | None,
    ) -> Tensor:
        """Attention between slots, ``[B, slots, heads, D]``."""
        metadata = expect_metadata(_NAME, attn_metadata, VideoSparseAttentionMetadata)
        out, _ = video_sparse.attention(
            query,
            key,
            value,
            metadata.variable_block_sizes,
            metadata.topk,
            volume=math.prod(VSA_TILE_SIZE),
            gate=gate_compress,
            scale=self.softmax_scale,
        )
        return out


BACKEND = Backend(
    _NAME,
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
    head_sizes=HEAD_DIMS,
    dtypes=supported_dtypes,
)
VideoSparseAttentionBackend = BACKEND.face
