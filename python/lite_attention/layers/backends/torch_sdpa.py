"""TORCH_SDPA: torch's own dense attention. Any head size, causal or not, with gradients."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lite_attention.layers.abstract import AttentionBackend, AttentionImpl, AttentionMetadata, PlainMetadataBuilder
from lite_attention.layers.backends._arguments import check_extra_arguments

__all__ = ["TorchSDPABackend", "TorchSDPAImpl"]


class TorchSDPAImpl(AttentionImpl[AttentionMetadata]):
    """``torch.nn.functional.scaled_dot_product_attention``. Needs no metadata."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        check_extra_arguments("TORCH_SDPA", extra_impl_args)
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
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)


class TorchSDPABackend(AttentionBackend):
    """Dense attention."""

    @staticmethod
    def get_name() -> str:
        """Its name in AttentionBackendEnum."""
        return "TORCH_SDPA"

    @staticmethod
    def get_impl_cls() -> type[TorchSDPAImpl]:
        """The attention of a layer."""
        return TorchSDPAImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """The step alone."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[PlainMetadataBuilder]:
        """Makes metadata of the step alone."""
        return PlainMetadataBuilder
