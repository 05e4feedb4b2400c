"""What a backend of the attention layers is made of. The names are FastVideo's, so that backends can move over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

__all__ = [
    "AttentionBackend",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "PlainMetadataBuilder",
]


@dataclass
class AttentionMetadata:
    """What a backend knows of a step before the forward; a backend that needs more derives from it.

    Of a compiled model, one graph serves all steps if the tensors keep their shapes and the other values that the
    backend reads in its forward stay the same. The step itself is not read there.
    """

    current_timestep: int

    def asdict_zerocopy(self, skip_fields: set[str] | None = None) -> dict[str, Any]:
        """The fields by name, without copies, except those in ``skip_fields``."""
        skipped = skip_fields or set()
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skipped}


MetadataT = TypeVar("MetadataT", bound=AttentionMetadata)


class AttentionMetadataBuilder(ABC, Generic[MetadataT]):
    """Makes the metadata of each step, outside the forward."""

    @abstractmethod
    def __init__(self) -> None:
        """A builder for one model."""

    @abstractmethod
    def prepare(self) -> None:
        """Get ready for another video."""

    @abstractmethod
    def build(self, **kwargs: Any) -> MetadataT:
        """The metadata of a step; a backend says which arguments it needs."""


class PlainMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    """For backends that need to know nothing."""

    def __init__(self) -> None:
        """There is nothing to set up."""

    def prepare(self) -> None:
        """Does nothing."""

    def build(self, *, current_timestep: int) -> AttentionMetadata:  # type: ignore[override]
        """Metadata that hold the step alone."""
        return AttentionMetadata(current_timestep)


class AttentionImpl(ABC, Generic[MetadataT]):
    """The attention of one layer. If it is an nn.Module too, it is a submodule of the layer.

    Tensors are ``[B, S, heads, D]``. In a layer on several ranks they hold all tokens and this rank's heads.
    Under torch.compile these methods are traced: read tensors and constants, no environment and no global state.

    Args:
        num_heads: query heads of the whole layer, on all ranks.
        head_size: D.
        softmax_scale: factor on q.k before the softmax.
        causal: a query sees the keys up to its position.
        num_kv_heads: heads of k and v of the whole layer, ``num_heads`` if None.
        prefix: name of the layer, ``"blocks.3.attn1.impl"``.
        extra_impl_args: what the layer was given besides.
    """

    travels_beside: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors of q's shape, or None, that forward gets between value and the metadata. Its layer is one
    that takes them: DistributedAttention_VSA for ``("gate_compress",)``."""

    @abstractmethod
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None: ...

    def set_local_heads(self, first: int, count: int) -> None:
        """Called once by a layer on several ranks: forward gets ``count`` query heads from number ``first`` on."""

    def preprocess_qkv(self, qkv: Tensor, attn_metadata: MetadataT) -> Tensor:
        """The video tokens of q, of k, of v, and of what travels beside them, in a call each, before forward.

        May change their number and order, the same for all.
        """
        return qkv

    def postprocess_output(self, output: Tensor, attn_metadata: MetadataT) -> Tensor:
        """The video tokens of what forward returned, back in the number and order that preprocess_qkv was given."""
        return output

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: MetadataT) -> Tensor:
        """Attention.

        Args:
            query: ``[B, Sq, Hq, D]``.
            key, value: ``[B, Sk, Hkv, D]``, ``Hq % Hkv == 0``.
            attn_metadata: of the forward context, None if it has none.

        Returns:
            ``[B, Sq, Hq, D]``.
        """

    def forward_with_text(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: MetadataT, text_tokens: int
    ) -> Tensor:
        """As forward, where the last ``text_tokens`` of query, key and value are no video.

        Backends to which all tokens are alike leave it as it is.
        """
        return self.forward(query, key, value, attn_metadata)


class AttentionBackend(ABC):
    """Names the classes of a backend. Never instantiated."""

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """The name by which it is asked for."""

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        """The attention of a layer."""

    @staticmethod
    @abstractmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """What forward is given."""

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        """What makes that."""

    @staticmethod
    def get_supported_head_sizes() -> Collection[int] | None:
        """The head sizes it takes, None for any."""
        return None

    @staticmethod
    def get_supported_dtypes() -> Collection[torch.dtype] | None:
        """The dtypes of q, k and v it takes, None for any."""
        return None
