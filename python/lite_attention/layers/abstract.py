"""What a backend of the attention layers is made of. The names are FastVideo's, so that backends can move over."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

__all__ = [
    "AttentionBackend",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "Backend",
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
        extra_impl_args: those of ``arguments`` that the layer was given.
    """

    travels_beside: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors of q's shape, or None, that forward gets between value and the metadata. Its layer is one
    that takes them: DistributedAttention_VSA for ``("gate_compress",)``."""

    reads_metadata: ClassVar[bool] = True
    """Whether it reads the metadata of a step at all. Where it may, nobody records a program of the layer inside a
    forward context: it would keep those of that step."""

    arguments: ClassVar[frozenset[str]] = frozenset()
    """Keywords that a layer hands on to it. A class that does not say takes those that its ``__init__`` names besides
    the ones above, and, with a ``**`` parameter, those of its base."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "arguments" not in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters.values()
            own = frozenset(parameter.name for parameter in parameters if parameter.kind in _BY_NAME) - _OF_EVERY_IMPL
            hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
            cls.arguments = own | cls.arguments if hands_on else own

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
        """Attention, of a layer that cannot tell text from video.

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
        """As forward, where the last ``text_tokens`` of query, key and value are no video: 0 where a call has no text.

        What DistributedAttention calls. Backends to which all tokens are alike leave it as it is.
        """
        return self.forward(query, key, value, attn_metadata)

    def computed_pass(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: MetadataT, text_tokens: int
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """As forward_with_text, and what notes the pass, if anything: called last, when nothing can fail any more.

        By DistributedAttention; other layers call forward.
        """
        return self.forward_with_text(query, key, value, attn_metadata, text_tokens), None


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_OF_EVERY_IMPL = frozenset(inspect.signature(AttentionImpl.__init__).parameters)


class AttentionBackend(ABC):
    """Names the classes of a backend. Never instantiated. :class:`Backend` is the shorter way to write one."""

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


@dataclass(frozen=True)
class Backend:
    """What a backend is made of.

    Args:
        name: by which it is asked for.
        impl: the attention of a layer.
        metadata: what its forward is given of a step.
        builder: what makes that.
        head_sizes: those that it takes, None for any.
        dtypes: of q, k and v that it takes, None for any. Where they depend on the device, a function of it that
            says them.
    """

    name: str
    impl: type[AttentionImpl[Any]]
    metadata: type[AttentionMetadata] = AttentionMetadata
    builder: type[AttentionMetadataBuilder[Any]] = PlainMetadataBuilder
    head_sizes: Collection[int] | None = None
    dtypes: Collection[torch.dtype] | Callable[[torch.device], Collection[torch.dtype]] | None = None

    @cached_property
    def face(self) -> type[AttentionBackend]:
        """The class that code written for FastVideo asks, such as ``MeanBackend`` for ``MeanImpl``."""
        names = {"backend": self, "__doc__": f"The backend {self.name}.", "__module__": self.impl.__module__}
        return type(self.impl.__name__.removesuffix("Impl") + "Backend", (_Face,), names)


class _Face(AttentionBackend):
    """Answers for a :class:`Backend`."""

    backend: ClassVar[Backend]

    @classmethod
    def get_name(cls) -> str:
        return cls.backend.name

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl[Any]]:
        return cls.backend.impl

    @classmethod
    def get_metadata_cls(cls) -> type[AttentionMetadata]:
        return cls.backend.metadata

    @classmethod
    def get_builder_cls(cls) -> type[AttentionMetadataBuilder[Any]]:
        return cls.backend.builder

    @classmethod
    def get_supported_head_sizes(cls) -> Collection[int] | None:
        return cls.backend.head_sizes

    @classmethod
    def get_supported_dtypes(cls) -> Collection[torch.dtype] | None:
        """On torch's default device: where the layer is made that asks."""
        dtypes = cls.backend.dtypes
        return dtypes(torch.get_default_device()) if callable(dtypes) else dtypes
