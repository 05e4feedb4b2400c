"""DuoAttention's heads in a model: pattern files, and weights reordered so that full and streaming heads are grouped.

The attention itself is :func:`lite_attention.streaming_attention`, which takes heads in any order.
"""

from lite_attention.families.duo.patterns import (
    DuoPattern,
    load_duo_pattern,
    save_duo_pattern,
    sparsify_attention_heads,
)
from lite_attention.families.duo.weights import reorder_weights, restore_weights

__all__ = [
    "DuoPattern",
    "load_duo_pattern",
    "reorder_weights",
    "restore_weights",
    "save_duo_pattern",
    "sparsify_attention_heads",
]
