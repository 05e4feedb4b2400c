"""The oracle: every operator of the package in plain torch, written to be read.

Each function takes its operator's arguments and computes in ``compute_dtype`` (fp64 unless told otherwise), from dense
scores of one (batch, head) at a time, so memory grows with ``Sq * Sk``. Results stay in ``compute_dtype``: comparing
with a kernel's fp32 or bf16 result is the test's business. Runs on any device; it validates nothing and is not fast.
"""

from lite_attention.reference.attention import attention, visible_keys
from lite_attention.reference.merge_attention import merge_attention
from lite_attention.reference.skip_attention import decisions, drop_margin, skip_attention
from lite_attention.reference.top_k_map import top_k_map
from lite_attention.reference.visits import visit_order

__all__ = [
    "attention",
    "decisions",
    "drop_margin",
    "merge_attention",
    "skip_attention",
    "top_k_map",
    "visible_keys",
    "visit_order",
]
