"""LITE_ATTN: attention that skips the tiles which an earlier step found not to matter."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lite_attention.layers.abstract import AttentionImpl, AttentionMetadata, Backend
from lite_attention.layers.backends._checks import refuse_causal
from lite_attention.maps.tiles import HEAD_DIMS
from lite_attention.ops.backends import supported_dtypes
from lite_attention.skipping.arguments import Threshold
from lite_attention.skipping.computed_pass import remember
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy

__all__ = ["BACKEND", "LiteAttentionBackend", "LiteAttentionImpl"]

_NAME = "LITE_ATTN"


class LiteAttentionImpl(nn.Module, AttentionImpl[AttentionMetadata]):
    """A :class:`lite_attention.LiteAttention` with its state. Needs no metadata.

    Text is computed always: by every query its keys, and by its queries every key.

    Args:
        threshold: as for LiteAttention; if one value a head, then for all heads of the layer.
        enable_skipping, max_batch_size, policy: as for LiteAttention.
    """

    reads_metadata = False

    attention: LiteAttention
    """Holds the state. In a layer on several ranks it has this rank's heads."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        *,
        enable_skipping: bool | None = None,
        threshold: Threshold | None = None,
        max_batch_size: int = 4,
        policy: SkipPolicy | None = None,
    ) -> None:
        super().__init__()
        refuse_causal(_NAME, causal)
        self.softmax_scale = softmax_scale
        policy = SkipPolicy.resolve(_NAME, policy, enable_skipping=enable_skipping, threshold=threshold)
        self.attention = LiteAttention(max_batch_size=max_batch_size, policy=policy)
        thresholds = policy.threshold
        if isinstance(thresholds, tuple) and len(thresholds) != num_heads:
            raise ValueError(f"{_NAME}: threshold has {len(thresholds)} values, expected {num_heads}, one per head")

    def set_local_heads(self, first: int, count: int) -> None:
        """Keep the thresholds of these heads."""
        threshold = self.attention.threshold
        if isinstance(threshold, tuple):
            self.attention.set_threshold(threshold[first : first + count])

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None) -> Tensor:
        """One pass; see :meth:`lite_attention.LiteAttention.forward`."""
        out: Tensor = self.attention(query, key, value, self.softmax_scale)
        return out

    def forward_with_text(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None, text_tokens: int
    ) -> Tensor:
        """One pass in which no tile with text is skipped. Another share of text starts over, as another length does."""
        out, note = self.computed_pass(query, key, value, attn_metadata, text_tokens)
        note()
        return out

    def computed_pass(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None, text_tokens: int
    ) -> tuple[Tensor, Callable[[], None]]:
        """The same, remembered when the layer says so: results have yet to reach the ranks of their tokens."""
        keys, queries = key.shape[1], query.shape[1]
        computed = self.attention.computed_pass(
            query,
            key,
            value,
            self.softmax_scale,
            must_do_list=[keys - text_tokens, keys] if text_tokens > 0 else None,
            must_do_queries=[queries - text_tokens, queries] if text_tokens > 0 else None,
            told_len=operator.index(keys - text_tokens) if text_tokens > 0 else None,
        )
        return computed.out, partial(remember, computed)


BACKEND = Backend(_NAME, LiteAttentionImpl, head_sizes=HEAD_DIMS, dtypes=supported_dtypes)
LiteAttentionBackend = BACKEND.face
