"""The operators as torch sees them: loads the compiled libraries; defines schemas, fakes and autograd.

The libraries register their kernels themselves: _ops those for the CPU (cpp/ops.cpp), _cuda_ops those for CUDA
(cpp/cuda_ops.cpp). Every operator is functional: none writes its inputs.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

NAMESPACE = "lite_attention"
OLDEST_TORCH = (2, 10)
# Raised whenever an operator's schema or meaning changes: Python files and a library of two builds must not meet.
OPERATOR_INTERFACE = 3

_SCHEMAS = {
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? kv_lens, float scale, *, int? tile_n=None, "
        "Tensor? kv_tile_lens=None, str? causal=None, Tensor? head_windows=None) -> (Tensor out, Tensor lse)"
    ),
    "skip_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor keep, Tensor? must_keep, Tensor? kv_lens, Tensor threshold, float scale)"
        " -> (Tensor out, Tensor lse, Tensor next_keep)"
    ),
    "top_k_map": "(Tensor scores, int count) -> Tensor",
    "merge_attention": "(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)",
}


def _import_failure(problem: str, causes: list[str]) -> ImportError:
    lines = [f"lite_attention cannot start: {problem}", "Likely causes:"]
    lines += [f"  * {cause}" for cause in causes]
    lines.append("Reinstall it from its source folder, in the environment you run: `pip install .`")
    return ImportError("\n".join(lines))


def _load_host_module() -> ModuleType:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise _import_failure(
            f"torch {torch.__version__} is installed, expected {oldest} or newer",
            [f"this environment was not upgraded: `pip install 'torch>={oldest}'`"],
        )
    try:
        host = importlib.import_module("lite_attention._host")
    except ImportError as error:
        raise _import_failure(
            f"its compiled part, lite_attention._host, is not there or does not load ({error})",
            [
                "the package was not installed, only its folder is on the path",
                "it was built for another Python version or processor",
                "an editable install whose build failed or was deleted",
            ],
        ) from error
    built = getattr(host, "OPERATOR_INTERFACE", None)
    if built != OPERATOR_INTERFACE:
        raise _import_failure(
            f"its compiled part implements operator interface {built}, expected {OPERATOR_INTERFACE}",
            ["the Python files were updated without rebuilding", "two versions of lite_attention are installed"],
        )
    try:
        host.selected_cpu_variant()
    except RuntimeError as error:
        raise _import_failure(str(error), ["the environment variable was meant for another processor"]) from error
    return host


def _load_operators(host: ModuleType, file_name: str) -> None:
    path = Path(str(host.__file__)).with_name(file_name)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = error.__cause__ or error  # torch wraps the loader's words
        raise _import_failure(
            f"its operator library {path.name} does not load ({reason})",
            [
                f"torch {torch.__version__} lacks part of the stable interface the library was built for",
                "the C++ runtime is older than the compiler that built the library",
                "the file is missing or truncated",
            ],
        ) from error


host = _load_host_module()
__version__: str = host.VERSION

# Kernels before schemas: an import that fails here leaves nothing behind, and a second one tells the same story.
_load_operators(host, "_ops.so")
if not host.CUDA_ARCHITECTURES:
    why_no_cuda_kernels = "this build holds no CUDA kernels"
elif torch.version.cuda is None:
    why_no_cuda_kernels = f"torch {torch.__version__} is built without CUDA"
else:
    why_no_cuda_kernels = ""
    _load_operators(host, "_cuda_ops.so")
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _register_missing_kernels(name: str) -> None:
    """A sentence instead of the dispatcher's dump for devices without a kernel."""
    devices = "'cpu'" if why_no_cuda_kernels else "'cpu' and 'cuda'"
    missing = dict.fromkeys(("XPU", "MPS"), f" in this build; it has one for {devices}")
    if why_no_cuda_kernels:
        missing["CUDA"] = f": {why_no_cuda_kernels}"
    for key, reason in missing.items():

        def no_kernel(*_: object, device_type: str = key.lower(), reason: str = reason, **__: object) -> NoReturn:
            raise NotImplementedError(
                f"{name}: no kernel for device type '{device_type}'{reason}. "
                "`python -m lite_attention.info` tells what this build can run"
            )

        _library.impl(name, no_kernel, key)


class _ForwardOnly(torch.autograd.Function):
    """Runs an operator whose inputs require a gradient; refuses when the gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[[], Any], *_: Tensor) -> Any:
        ctx.name = name
        return run()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"{ctx.name}: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), "
            "or detach its inputs"
        )


def _tensors_in(arguments: tuple[Any, ...]) -> list[Tensor]:
    lists = [argument if isinstance(argument, list) else [argument] for argument in arguments]
    return [item for items in lists for item in items if isinstance(item, Tensor)]


def _register_forward_only(name: str) -> None:
    """Every call passes here, therefore by hand: torch.library.register_autograd costs 15 us a call, this 8."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def run_below_autograd(keyset: torch._C.DispatchKeySet, *arguments: Any, **named: Any) -> Any:
        below = keyset & torch._C._after_autograd_keyset
        if torch.is_grad_enabled():
            tensors = _tensors_in((*arguments, *named.values()))
            if any(tensor.requires_grad for tensor in tensors):
                run = partial(operator.redispatch, below, *arguments, **named)
                return _ForwardOnly.apply(name, run, *tensors)  # type: ignore[no-untyped-call]
        return operator.redispatch(below, *arguments, **named)

    _library.impl(name, run_below_autograd, "Autograd", with_keyset=True)


for _name in _SCHEMAS:
    _register_missing_kernels(_name)
    _register_forward_only(_name)


def _check_fake_inputs(name: str, **tensors: Tensor | None) -> None:
    """What must hold for the result's shape to be known; the kernels check the rest when they run."""
    device = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise RuntimeError(f"{name}: {argument} is on {tensor.device}, expected {device}, every argument's device")
        if argument in ("q", "k", "v", "keep", "must_keep") and tensor.dim() != 4:
            raise RuntimeError(f"{name}: {argument} has {tensor.dim()} dimensions, expected 4")


def _out_and_lse(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::attention", lib=_library)
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    kv_lens: Tensor | None,
    scale: float,
    *,
    tile_n: int | None = None,
    kv_tile_lens: Tensor | None = None,
    causal: str | None = None,
    head_windows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_fake_inputs(
        "attention", q=q, k=k, v=v, keep=keep, kv_lens=kv_lens, kv_tile_lens=kv_tile_lens, head_windows=head_windows
    )
    return _out_and_lse(q)


@torch.library.register_fake(f"{NAMESPACE}::skip_attention", lib=_library)
def _skip_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    must_keep: Tensor | None,
    kv_lens: Tensor | None,
    threshold: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_fake_inputs(
        "skip_attention", q=q, k=k, v=v, keep=keep, must_keep=must_keep, kv_lens=kv_lens, threshold=threshold
    )
    return *_out_and_lse(q), keep.new_empty(keep.shape)


@torch.library.register_fake(f"{NAMESPACE}::top_k_map", lib=_library)
def _top_k_map_fake(scores: Tensor, count: int) -> Tensor:
    if scores.dim() == 0:
        raise RuntimeError("top_k_map: scores has 0 dimensions, expected at least 1")
    words = (scores.shape[-1] + 31) // 32
    return scores.new_empty((*scores.shape[:-1], words), dtype=torch.int32)


@torch.library.register_fake(f"{NAMESPACE}::merge_attention", lib=_library)
def _merge_attention_fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not outs or len(outs) != len(lses):
        raise RuntimeError(f"merge_attention: {len(outs)} outs and {len(lses)} lses, expected as many, at least one")
    tensors = {f"outs[{part}]": out for part, out in enumerate(outs)}
    tensors |= {f"lses[{part}]": lse for part, lse in enumerate(lses)}
    _check_fake_inputs("merge_attention", **tensors)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)
