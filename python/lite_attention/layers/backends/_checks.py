"""What several backends of this package refuse."""

from __future__ import annotations

from typing import TypeVar

from lite_attention.layers.abstract import AttentionMetadata

__all__ = ["expect_metadata", "refuse_causal"]

MetadataT = TypeVar("MetadataT", bound=AttentionMetadata)


def refuse_causal(backend: str, causal: bool) -> None:
    """For backends that have no causal mask.

    Raises:
        ValueError: one is asked for.
    """
    if causal:
        raise ValueError(f"{backend}: causal is True, expected False: it has no causal mask")


def expect_metadata(backend: str, given: AttentionMetadata | None, expected: type[MetadataT]) -> MetadataT:
    """The metadata of the forward context, which must be the backend's own.

    Raises:
        TypeError: they are not.
    """
    if not isinstance(given, expected):
        raise TypeError(
            f"{backend}: attn_metadata of the forward context is of type {type(given).__name__}, expected "
            f"{expected.__name__}: call the model inside set_forward_context(current_timestep, attn_metadata)"
        )
    return given
