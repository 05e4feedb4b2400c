"""TORCH_SDPA: torch's own dense attention. Any head size, causal or not, with gradients."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lite_attention.layers.abstract import AttentionImpl, AttentionMetadata, Backend
from lite_attention.ops.checks import settled

__all__ = ["BACKEND", "TorchSDPABackend", "TorchSDPAImpl"]


class TorchSDPAImpl(AttentionImpl[AttentionMetadata]):
    """``torch.nn.functional.scaled_dot_product_attention``. Needs no metadata."""

    reads_metadata = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
    ) -> None:
        self.softmax_scale = softmax_scale
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None) -> Tensor:
        """Dense attention; causal counts from the first query and key."""
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=self.causal,
            scale=self.softmax_scale,
            enable_gqa=settled(query.shape[2] != key.shape[2]),
        )
        return out.transpose(1, 2)


BACKEND = Backend("TORCH_SDPA", TorchSDPAImpl)
TorchSDPABackend = BACKEND.face
