"""Attention for video diffusion transformers that remembers between denoising steps which tiles it may skip."""

from lite_attention import compat, reference
from lite_attention.compat.fastvideo import block_sparse_attention, sliding_tile_attention, video_sparse_attn
from lite_attention.compat.light_duo import reorder_weights_for_duo_attn, streaming_sparse_attn_func
from lite_attention.families import block_sparse, duo, sliding_tile, streaming, video_sparse
from lite_attention.families.sliding_tile import sliding_tile_map
from lite_attention.families.streaming import attention as streaming_attention
from lite_attention.maps.keep_map import full_keep_map, pack_keep_map, unpack_keep_map
from lite_attention.maps.tiles import tile_shape, visit_rows
from lite_attention.ops import attention, merge_attention, skip_attention, top_k_map
from lite_attention.ops.load import __version__
from lite_attention.ops.own_state import exportable
from lite_attention.parallel.distributed import DistributedLiteAttention
from lite_attention.parallel.splits import SeqParallelLiteAttention
from lite_attention.skipping.branches import skip_branch
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy
from lite_attention.skipping.state import share_room

__all__ = [
    "DistributedLiteAttention",
    "LiteAttention",
    "SeqParallelLiteAttention",
    "SkipPolicy",
    "__version__",
    "attention",
    "block_sparse",
    "block_sparse_attention",
    "compat",
    "duo",
    "exportable",
    "full_keep_map",
    "merge_attention",
    "pack_keep_map",
    "reference",
    "reorder_weights_for_duo_attn",
    "share_room",
    "skip_attention",
    "skip_branch",
    "sliding_tile",
    "sliding_tile_attention",
    "sliding_tile_map",
    "streaming",
    "streaming_attention",
    "streaming_sparse_attn_func",
    "tile_shape",
    "top_k_map",
    "unpack_keep_map",
    "video_sparse",
    "video_sparse_attn",
    "visit_rows",
]
