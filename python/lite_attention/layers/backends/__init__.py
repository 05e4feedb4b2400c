"""The backends of this package: a file each, and its name in :data:`BUILTIN`."""

from lite_attention.layers.abstract import Backend
from lite_attention.layers.backends import lite_attn, sliding_tile_attn, torch_sdpa, video_sparse_attn

__all__ = ["BUILTIN"]

BUILTIN: tuple[Backend, ...] = tuple(
    module.BACKEND for module in (torch_sdpa, lite_attn, video_sparse_attn, sliding_tile_attn)
)
