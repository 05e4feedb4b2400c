"""Who can run an operator, and why the others cannot: the table that dispatcher, info, doors and errors all ask.

A backend is one set of kernels for one kind of device. The compiled ones (``_ops.so``, ``_cuda_ops.so``) are the
dispatcher's own kernels: a call reaches them without passing here, as long as they are asked first on their kind of
device and run on every such device of this machine. Everywhere else the dispatcher's kernel is :func:`_chooser`, which
asks the table for each call.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lite_attention.ops.load import WHY_NO_CUDA_KERNELS, host

__all__ = ["Backend", "Problem", "backends", "choose", "reasons", "register", "registered", "supported_dtypes"]

NAMESPACE = "lite_attention"  # of the operators, in torch.library
HOPPER = (9, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM: int = host.tile_shapes()[-1][0]
HEAD_DIM_MULTIPLE: int = host.HEAD_DIM_MULTIPLE
# Kinds of device that a call may come from; the rest of torch's have words of their own for what they lack.
DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
AUTOCAST_KEYS = [f"Autocast{kind.upper()}" for kind in DEVICE_TYPES]
AUTOCAST = functools.reduce(or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in AUTOCAST_KEYS))
MASKLESS_OPERATORS = ("merge_attention", "top_k_map")  # they take fp32 on every device


@dataclass(frozen=True)
class Problem:
    """What the choice of a backend may depend on."""

    operator: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int | None = None
    """D of q; None for operators without."""

    def __str__(self) -> str:
        what = _name(self.dtype)
        if self.head_dim is not None:
            what += f", head_dim {self.head_dim},"
        return f"{what} on {self.device}"


@dataclass(frozen=True)
class Backend:
    """One set of kernels for one kind of device.

    Args:
        name: in errors and in ``python -m lite_attention.info``.
        device_type: of the tensors it takes, "cpu" or "cuda" for instance.
        can_run: None for a problem that it runs, else the reason why not, as half a sentence.
        functions: its operators by name, called as ``torch.ops.lite_attention`` would be; None for compiled kernels,
            which the dispatcher holds.
        detail: what it runs with, for people; None for the names of the devices.
    """

    name: str
    device_type: str
    can_run: Callable[[Problem], str | None]
    functions: Mapping[str, Callable[..., Any]] | None
    detail: Callable[[], str] | None = None


class _Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]


@functools.cache
def _gpu(device: torch.device) -> _Gpu | None:
    """What a CUDA device is, None if torch sees none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return _Gpu(properties.name, (properties.major, properties.minor))


def _devices(device_type: str) -> list[torch.device]:
    """The devices of this machine; one without a number where they are not counted."""
    if device_type == "cuda" and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device(device_type)]


def _refused_by_every_kernel(problem: Problem) -> str | None:
    """What no compiled kernel takes, on whichever device."""
    if problem.dtype not in DTYPES:
        return f"dtype is {_name(problem.dtype)}, expected {', '.join(map(_name, DTYPES[:-1]))} or {_name(DTYPES[-1])}"
    head_dim = problem.head_dim
    if head_dim is not None and not (head_dim % HEAD_DIM_MULTIPLE == 0 and 0 < head_dim <= MAX_HEAD_DIM):
        return f"head_dim is {head_dim}, expected a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sm90_can_run(problem: Problem) -> str | None:
    """The kernels are machine code for compute capability 9.0 and run on nothing else, newer devices included."""
    if WHY_NO_CUDA_KERNELS:
        return WHY_NO_CUDA_KERNELS
    gpu = _gpu(problem.device)
    if gpu is None:
        return "torch sees no CUDA device"
    if gpu.capability != HOPPER:
        return f"{gpu.name} is of compute capability {'.'.join(map(str, gpu.capability))}, expected 9.0"
    if problem.operator not in MASKLESS_OPERATORS and problem.dtype == torch.float32:
        return "dtype is float32, expected bfloat16 or float16"
    return _refused_by_every_kernel(problem)


def _cpu_detail() -> str:
    return f"uses its {host.selected_cpu_variant()} build; this processor runs: {', '.join(host.cpu_variants())}"


_table = [
    Backend("sm90", "cuda", _sm90_can_run, functions=None),
    Backend("cpu", "cpu", _refused_by_every_kernel, functions=None, detail=_cpu_detail),
]


def backends() -> tuple[Backend, ...]:
    """Every backend, in the order in which they are asked."""
    return tuple(_table)


def _reason(backend: Backend, problem: Problem) -> str | None:
    if backend.device_type != problem.device.type:
        return f"runs on {backend.device_type} tensors"
    if backend.functions is not None and problem.operator not in backend.functions:
        return f"has no {problem.operator}"
    return backend.can_run(problem)


def availability(backend: Backend) -> tuple[bool, str]:
    """Whether the backend runs its first operator in bf16 on some device here, and with what, or why not.

    May start CUDA.
    """
    operator = "attention" if backend.functions is None else next(iter(backend.functions))
    found = {
        device: _reason(backend, Problem(operator, device, torch.bfloat16)) for device in _devices(backend.device_type)
    }
    usable = [device for device, reason in found.items() if reason is None]
    if backend.device_type == "cuda" and not torch.cuda.is_available():
        usable = []
    if not usable:
        return False, "; ".join(dict.fromkeys(filter(None, found.values()))) or "torch sees no CUDA device"
    if backend.detail is not None:
        return True, backend.detail()
    gpus = [_gpu(device) if device.type == "cuda" else None for device in usable]
    return True, ", ".join(str(device) if gpu is None else gpu.name for device, gpu in zip(usable, gpus, strict=True))


def reasons(problem: Problem) -> dict[str, str | None]:
    """For each backend by name, None if it can run the problem, else why not."""
    return {backend.name: _reason(backend, problem) for backend in _table}


def choose(problem: Problem) -> Backend:
    """The first backend that can run the problem.

    Raises:
        NotImplementedError: none can; the text lists each with its reason.
    """
    for backend in _table:
        if _reason(backend, problem) is None:
            return backend
    lines = [f"{problem.operator}: no backend runs {problem}"]
    lines += [f"  {name}: {reason}" for name, reason in reasons(problem).items()]
    lines.append("`python -m lite_attention.info` tells what can run here")
    raise NotImplementedError("\n".join(lines))


def supported_dtypes(device: torch.device, operator: str = "attention") -> tuple[torch.dtype, ...]:
    """The dtypes of q, k and v that some backend takes on the device; all of them on "meta", which stands for any."""
    if device.type == "meta":
        return DTYPES
    problems = [Problem(operator, device, dtype) for dtype in DTYPES]
    return tuple(problem.dtype for problem in problems if None in reasons(problem).values())


def register(backend: Backend, before: str | None = None) -> None:
    """Add a backend: asked after all others, or just before the one named ``before``.

    Args:
        backend: of a name that is not in the table, with functions of its own.
        before: name of a backend.

    Raises:
        ValueError: the name is taken, ``before`` is not there, or the functions are none, or of no operator's name.
    """
    names = [other.name for other in _table]
    if backend.name in names:
        raise ValueError(f"register: backend has the name {backend.name!r}, which is taken, expected another")
    if before is not None and before not in names:
        raise ValueError(f"register: before is {before!r}, expected one of {', '.join(names)}")
    if backend.device_type not in DEVICE_TYPES:
        raise ValueError(
            f"register: backend has device_type {backend.device_type!r}, expected one of {', '.join(DEVICE_TYPES)}"
        )
    unknown = sorted(set(backend.functions or {}) - set(_operators))
    if not backend.functions or unknown:
        raise ValueError(
            f"register: backend has functions for {', '.join(unknown) or 'nothing'}, expected some of "
            f"{', '.join(sorted(_operators))}"
        )
    _table.insert(len(names) if before is None else names.index(before), backend)
    _route(backend.device_type)


def unregister(name: str) -> None:
    """Take a registered backend out again.

    Raises:
        ValueError: there is none of this name, or it is compiled in.
    """
    for backend in _table:
        if backend.name == name and backend.functions is not None:
            _table.remove(backend)
            _route(backend.device_type)
            return
    names = [backend.name for backend in _table if backend.functions is not None]
    raise ValueError(
        f"unregister: name is {name!r}, expected a registered backend's ({', '.join(names) or 'there is none'})"
    )


@contextmanager
def registered(backend: Backend, before: str | None = None) -> Iterator[None]:
    """:func:`register` for a while."""
    register(backend, before)
    try:
        yield
    finally:
        unregister(backend.name)


# The dispatcher's side

_operators: list[str] = []
_routes: dict[str, torch.library.Library] = {}
"""The choosers in force, by kind of device: registrations that end with their object."""


def serve(operator: str) -> None:
    """Let the calls of an operator, which has just been defined, find their backend on every kind of device."""
    _operators.append(operator)
    for device_type in DEVICE_TYPES:
        if device_type == "cuda" and not WHY_NO_CUDA_KERNELS:
            if len(_operators) == 1:
                # Which GPUs there are may be asked once something uses them: before, a process can still be forked.
                torch.cuda._lazy_call(functools.partial(_route, "cuda"))
        elif device_type in _routes:
            _put_chooser(device_type, operator)
        else:
            _route(device_type)


def _route(device_type: str) -> None:
    """Put the chooser between calls and kernels on this kind of device, or take it away where it is not needed."""
    if device_type in _routes:
        _routes.pop(device_type)._destroy()
    if not _is_direct(device_type):
        _routes[device_type] = torch.library.Library(NAMESPACE, "IMPL")
        for operator in _operators:
            _put_chooser(device_type, operator)


def _put_chooser(device_type: str, operator: str) -> None:
    key = device_type.upper()
    chooser = _chooser(operator, device_type, _compiled(operator, key))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is overridden
        _routes[device_type].impl(operator, chooser, key, allow_override=True)


def _is_direct(device_type: str) -> bool:
    """Whether every call on this kind of device may go to the compiled kernels unasked."""
    there = [backend for backend in _table if backend.device_type == device_type]
    if not there or any(backend.functions is not None for backend in there):
        return False  # one that is asked after the kernels may run what they refuse
    (compiled,) = there
    if WHY_NO_CUDA_KERNELS and device_type == "cuda":
        return False  # without a look at the devices, which would start CUDA
    problems = [Problem("attention", device, torch.bfloat16) for device in _devices(device_type)]
    return all(compiled.can_run(problem) is None for problem in problems)


def _compiled(operator: str, key: str) -> Callable[..., Any] | None:
    """The compiled kernel that the dispatcher holds, if there is one."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", key):
        return None
    kernel = torch.library.get_kernel(f"{NAMESPACE}::{operator}", key)
    return functools.partial(kernel.call_boxed, torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)))


def _tensors(argument: Any) -> list[Tensor]:
    return [x for x in (argument if isinstance(argument, list) else [argument]) if isinstance(x, Tensor)]


def _chooser(operator: str, device_type: str, compiled: Callable[..., Any] | None) -> Callable[..., Any]:
    """A kernel that hands each call to the first backend that can run it."""

    def run(*arguments: Any, **named: Any) -> Any:
        first = next(x for x in itertools.chain.from_iterable(map(_tensors, arguments)))
        head_dim = None if operator in MASKLESS_OPERATORS or first.dim() == 0 else first.shape[-1]
        device = first.device if first.device.type == device_type else torch.device(device_type)
        backend = choose(Problem(operator, device, first.dtype, head_dim))
        function = compiled if backend.functions is None else backend.functions[operator]
        assert function is not None, backend.name  # a compiled backend that can run is one whose library is loaded
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):  # what runs here is a kernel, also where torch wrote it
            return function(*arguments, **named)

    return run
