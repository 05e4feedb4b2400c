"""Attention for video diffusion transformers that remembers between denoising steps which tiles it may skip."""

from lite_attention import reference
from lite_attention._library import __version__
from lite_attention.branches import skip_branch
from lite_attention.functional import attention, merge_attention, skip_attention, top_k_map
from lite_attention.keep_map import full_keep_map, pack_keep_map, unpack_keep_map
from lite_attention.modules import LiteAttention, SeqParallelLiteAttention
from lite_attention.tiles import tile_shape, visit_rows

__all__ = [
    "LiteAttention",
    "SeqParallelLiteAttention",
    "__version__",
    "attention",
    "full_keep_map",
    "merge_attention",
    "pack_keep_map",
    "reference",
    "skip_attention",
    "skip_branch",
    "tile_shape",
    "top_k_map",
    "unpack_keep_map",
    "visit_rows",
]
