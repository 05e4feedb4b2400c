"""Which backend a layer gets. Asked when the layer is made, never in its forward.

What is forced counts before the environment variable ``LITE_ATTENTION_BACKEND``, that before the layer's own order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from lite_attention.layers.abstract import AttentionBackend
from lite_attention.layers.registry import AttentionBackendEnum, BackendName, find_backend, is_available, known_name
from lite_attention.ops.checks import checked_int
from lite_attention.scoped_default import ScopedDefault

__all__ = [
    "STR_BACKEND_ENV_VAR",
    "backend_name_to_enum",
    "get_attn_backend",
    "get_env_variable_attn_backend",
    "get_global_forced_attn_backend",
    "global_force_attn_backend",
    "global_force_attn_backend_context_manager",
]

STR_BACKEND_ENV_VAR = "LITE_ATTENTION_BACKEND"

_forced: ScopedDefault[BackendName | None] = ScopedDefault("lite_attention.forced_backend", None)


def backend_name_to_enum(backend_name: str) -> AttentionBackendEnum | None:
    """The member of the enum of this name; None for a registered backend of another package.

    Raises:
        TypeError, ValueError: no backend has the name.
    """
    name = known_name(backend_name, "backend_name_to_enum: backend_name")
    return name if isinstance(name, AttentionBackendEnum) else None


def get_env_variable_attn_backend() -> BackendName | None:
    """The backend that ``LITE_ATTENTION_BACKEND`` asks for, None if it is unset or empty.

    Raises:
        ValueError: no backend has the name.
    """
    name = os.environ.get(STR_BACKEND_ENV_VAR, "")
    return known_name(name, f"environment variable {STR_BACKEND_ENV_VAR}") if name else None


def get_global_forced_attn_backend() -> BackendName | None:
    """The backend that layers made now, in this thread or asyncio task, get; None if it is not forced."""
    return _forced.get()


def global_force_attn_backend(attn_backend: BackendName | None) -> None:
    """All layers that this process makes from now on, in any thread, get this backend; None ends that.

    Raises:
        TypeError, ValueError: no backend has the name.
    """
    _forced.set(_known_or_none(attn_backend, "global_force_attn_backend"))


def global_force_attn_backend_context_manager(attn_backend: BackendName | None) -> AbstractContextManager[None]:
    """Layers made inside, by this thread or asyncio task, get this backend, whatever counts outside; None forces none.

    Raises:
        TypeError, ValueError: no backend has the name.
    """
    return _forced.scope(_known_or_none(attn_backend, "global_force_attn_backend_context_manager"))


def _known_or_none(name: BackendName | None, function: str) -> BackendName | None:
    return None if name is None else known_name(name, f"{function}: attn_backend")


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype,
    supported_attention_backends: Sequence[BackendName] | None = None,
    *,
    default_backend: BackendName = AttentionBackendEnum.TORCH_SDPA,
) -> type[AttentionBackend]:
    """The backend of a layer: the forced one, else the environment's, else the layer's first that is available.

    Args:
        head_size: D of the layer.
        dtype: of the layer's q, k and v, on torch's default device.
        supported_attention_backends: what the layer may be given, best first; None for any.
        default_backend: what it is given if nothing is asked for and supported_attention_backends is None.

    Raises:
        NotImplementedError: this version has no such backend.
        TypeError, ValueError: no backend has the name, the layer does not support it, or it does not take the head size
            or the dtype.
    """
    function = "get_attn_backend"
    supported = None
    if isinstance(supported_attention_backends, str):
        raise TypeError(
            f"{function}: supported_attention_backends is a str, expected a tuple of names, or None for any"
        )
    if supported_attention_backends is not None and not isinstance(supported_attention_backends, Sequence):
        raise TypeError(
            f"{function}: supported_attention_backends has type {type(supported_attention_backends).__name__}, "
            "expected a tuple of names, or None for any"
        )
    checked_int(f"{function}: head_size", head_size)
    default_backend = known_name(default_backend, f"{function}: default_backend")
    if supported_attention_backends is not None:
        supported = [
            known_name(name, f"{function}: supported_attention_backends[{index}]")
            for index, name in enumerate(supported_attention_backends)
        ]
        if not supported:
            raise ValueError(f"{function}: supported_attention_backends is empty, expected a backend, or None for any")
    source, name = _requested()
    if name is None:
        options = [default_backend] if supported is None else supported
        # A known name that this version lacks is no mistake in a list of what is supported.
        name = next((option for option in options if is_available(option)), options[0])
    elif supported is not None and name not in supported:
        raise ValueError(
            f"{function}: {source} asks for {_text(name)}, expected one of those that the layer supports: "
            f"{', '.join(map(_text, supported))}"
        )
    backend = find_backend(name)
    head_sizes, dtypes = backend.get_supported_head_sizes(), backend.get_supported_dtypes()
    if head_sizes is not None and head_size not in head_sizes:
        raise ValueError(f"{function}: head_size is {head_size}, expected {_listed(head_sizes)} for {_text(name)}")
    if dtypes is not None and dtype not in dtypes:
        device = torch.get_default_device().type
        expected = _listed(dtypes) or "none, as no backend runs there,"
        raise ValueError(f"{function}: dtype is {dtype}, expected {expected} for {_text(name)} on {device}")
    return backend


def _requested() -> tuple[str, BackendName | None]:
    forced = get_global_forced_attn_backend()
    if forced is not None:
        return "global_force_attn_backend", forced
    return f"environment variable {STR_BACKEND_ENV_VAR}", get_env_variable_attn_backend()


def _text(name: BackendName) -> str:
    return name.name if isinstance(name, AttentionBackendEnum) else name


def _listed(values: object) -> str:
    if isinstance(values, range):
        return f"a multiple of {values.step} from {values.start} to {values[-1]}"
    return " or ".join(map(str, values))  # type: ignore[call-overload]
