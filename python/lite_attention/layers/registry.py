"""The backends that there are, by name, and the arguments of a layer that are for one of them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, overload

from lite_attention.layers.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    Backend,
)

__all__ = [
    "AttentionBackendEnum",
    "BackendName",
    "add_builtin_backend",
    "find_backend",
    "is_available",
    "known_name",
    "own_arguments",
    "register_attention_backend",
]


class AttentionBackendEnum(enum.Enum):
    """Names with a fixed meaning. Those of other packages are strings: see :func:`register_attention_backend`."""

    TORCH_SDPA = enum.auto()
    LITE_ATTN = enum.auto()
    VIDEO_SPARSE_ATTN = enum.auto()
    SLIDING_TILE_ATTN = enum.auto()
    SLA_ATTN = enum.auto()
    SAGE_SLA_ATTN = enum.auto()
    VMOBA_ATTN = enum.auto()
    FLASH_ATTN = enum.auto()
    SAGE_ATTN = enum.auto()


BackendName = AttentionBackendEnum | str
"""A member of the enum, or the name of one, or the name under which a backend was registered."""

_MISSING = {
    AttentionBackendEnum.SLA_ATTN: "sparse-linear attention has no kernels here yet",
    AttentionBackendEnum.SAGE_SLA_ATTN: "sparse-linear attention has no kernels here yet, and quantized ones neither",
    AttentionBackendEnum.VMOBA_ATTN: "attention to chosen chunks has no kernels here yet",
    AttentionBackendEnum.FLASH_ATTN: "dense attention is TORCH_SDPA, or LITE_ATTN with enable_skipping=False",
    AttentionBackendEnum.SAGE_ATTN: "quantized attention has no kernels here",
}

_backends: dict[str, type[AttentionBackend]] = {}
# What names its classes: a field of Backend, ``get_<field>_cls`` of FastVideo's class.
_PARTS = (("impl", AttentionImpl), ("metadata", AttentionMetadata), ("builder", AttentionMetadataBuilder))


def known_name(name: BackendName, function: str) -> BackendName:
    """``name`` as the enum's member where it is one; the name of another registered backend as it is.

    Raises:
        TypeError, ValueError: it is neither; the text begins with ``function``.
    """
    if isinstance(name, AttentionBackendEnum):
        return name
    if not isinstance(name, str):
        raise TypeError(f"{function} has type {type(name).__name__}, expected an AttentionBackendEnum or str")
    if name in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[name]
    if name in _backends:
        return name
    others = sorted(_backends.keys() - AttentionBackendEnum.__members__.keys())
    raise ValueError(
        f"{function} is {name!r}, expected one of {', '.join([*AttentionBackendEnum.__members__, *others])}"
    )


def is_available(name: BackendName) -> bool:
    """Whether this version has a backend of this name."""
    return _key(name) in _backends


def find_backend(name: BackendName) -> type[AttentionBackend]:
    """The backend of a known name.

    Raises:
        NotImplementedError: the name is known, but this version has no such backend.
    """
    if not is_available(name):
        reason = _MISSING[AttentionBackendEnum[_key(name)]]
        raise NotImplementedError(f"attention backend {_key(name)} is not in this version: {reason}")
    return _backends[_key(name)]


def own_arguments(impl: type[AttentionImpl[Any]], given: Mapping[str, Any], function: str) -> dict[str, Any]:
    """Of the keywords that a layer was given besides its own, those that this impl takes.

    A layer may name those of every backend that it can be given.

    Raises:
        TypeError: no backend that there is takes one of them; the text begins with ``function``.
    """
    of_backends = {name: backend.get_impl_cls().arguments for name, backend in _backends.items()}
    for argument in given:
        if not any(argument in own for own in of_backends.values()):
            known = "; ".join(f"{', '.join(sorted(own))} ({name})" for name, own in of_backends.items() if own)
            raise TypeError(f"{function}: got the argument {argument!r}, expected one that a backend takes: {known}")
    return {argument: value for argument, value in given.items() if argument in impl.arguments}


@overload
def register_attention_backend(name: Backend) -> None: ...
@overload
def register_attention_backend(name: str, backend_class: type[AttentionBackend]) -> None: ...
def register_attention_backend(name: Any, backend_class: Any = None) -> None:
    """Make a backend known, so that it can be asked for by name wherever those of this package can.

    Args:
        name: the :class:`Backend`, whose name is not one of :class:`AttentionBackendEnum`; or, of a class as
            FastVideo's code has it, what ``backend_class.get_name()`` returns.
        backend_class: that class, which derives from AttentionBackend.

    Raises:
        TypeError: an argument is something else; a class lacks a method or does not derive from AttentionImpl,
            AttentionMetadata or AttentionMetadataBuilder.
        ValueError: the name is taken or not that of the class.
    """
    function = "register_attention_backend"
    if isinstance(name, Backend):
        if backend_class is not None:
            raise TypeError(f"{function}: backend_class is {backend_class!r}, expected none beside a Backend")
        for part, base in _PARTS:
            _check_class(f"{function}: {part} of the Backend", getattr(name, part), base)
        name, backend_class = name.name, name.face
    if not isinstance(name, str):
        raise TypeError(f"{function}: name has type {type(name).__name__}, expected a Backend or str")
    if name in AttentionBackendEnum.__members__ or name in _backends:
        raise ValueError(f"{function}: name is {name!r}, which is taken, expected another name")
    _check_class(f"{function}: backend_class", backend_class, AttentionBackend)
    if backend_class.get_name() != name:
        raise ValueError(f"{function}: name is {name!r}, expected {backend_class.get_name()!r}, which get_name() says")
    for part, base in _PARTS:
        method = f"get_{part}_cls"
        _check_class(f"{function}: {backend_class.__name__}.{method}()", getattr(backend_class, method)(), base)
    impl = backend_class.get_impl_cls()
    if not isinstance(impl.arguments, frozenset):
        raise TypeError(f"{function}: {impl.__name__}.arguments is {impl.arguments!r}, expected a frozenset of str")
    _backends[name] = backend_class


def add_builtin_backend(backend: Backend) -> None:
    """Enter a backend of this package under its name in the enum."""
    _backends[AttentionBackendEnum[backend.name].name] = backend.face


def _key(name: BackendName) -> str:
    return name.name if isinstance(name, AttentionBackendEnum) else name


def _check_class(what: str, given: object, base: type) -> None:
    if not isinstance(given, type) or not issubclass(given, base):
        raise TypeError(f"{what} is {given!r}, expected a class that derives from {base.__name__}")
    lacking = sorted(getattr(given, "__abstractmethods__", ()))
    if lacking:
        raise TypeError(f"{what} is {given.__name__}, which lacks {', '.join(lacking)}")
