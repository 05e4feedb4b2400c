"""What the backends of this package accept besides the arguments that all have."""

from __future__ import annotations

from typing import Any, TypeVar

from lite_attention.layers.abstract import AttentionMetadata

__all__ = ["check_extra_arguments", "expect_metadata", "refuse_causal"]

# A layer may name the arguments of every backend that it can be given; each backend takes its own.
EXTRA_ARGUMENTS = ("enable_skipping", "layer_index", "max_batch_size", "threshold")

MetadataT = TypeVar("MetadataT", bound=AttentionMetadata)


def check_extra_arguments(backend: str, given: dict[str, Any]) -> None:
    """That every argument is one of some backend.

    Raises:
        TypeError: it is not.
    """
    for name in given:
        if name not in EXTRA_ARGUMENTS:
            raise TypeError(f"{backend}: got the argument {name!r}, expected one of {', '.join(EXTRA_ARGUMENTS)}")


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
