"""The operators as torch sees them and as Python calls them: one file an operator, with all of its Python in it."""

from lite_attention.ops.attention import CausalAlignment, attention
from lite_attention.ops.merge_attention import merge_attention
from lite_attention.ops.skip_attention import skip_attention
from lite_attention.ops.top_k_map import top_k_map

__all__ = ["CausalAlignment", "attention", "merge_attention", "skip_attention", "top_k_map"]
