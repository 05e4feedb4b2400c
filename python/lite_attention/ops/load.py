"""Loads the compiled libraries, or says why they do not load and what to do about it.

They register their kernels themselves: _ops those for the CPU, _cuda_ops those for CUDA (cpp/operators/register_cpu.cpp
and register_cuda.cpp). Schemas are defined afterwards (define.py), so an import that fails here leaves nothing behind
and a second one tells the same story.
"""

import ctypes
import importlib
from pathlib import Path
from types import ModuleType

import torch

from lite_attention.ops.interface import operator_interface

__all__ = ["WHY_NO_CUDA_KERNELS", "__version__", "host"]

OLDEST_TORCH = (2, 10)
OPERATOR_INTERFACE = operator_interface()


def _import_failure(problem: str, causes: list[str]) -> ImportError:
    lines = [f"lite_attention cannot start: {problem}", "Likely causes:"]
    lines += [f"  * {cause}" for cause in causes]
    lines.append("Reinstall it from its source folder, in the environment you run: `pip install .`")
    return ImportError("\n".join(lines))


def _check_interface(file: str, built: str | None) -> None:
    """Refuse what was compiled for operators of other schemas than the Python files have."""
    if built != OPERATOR_INTERFACE:
        raise _import_failure(
            f"its {file} was built for operator interface {built}, expected {OPERATOR_INTERFACE}, the hash of the "
            "schemas in lite_attention/ops",
            ["the Python files were updated without rebuilding", "two versions of lite_attention are installed"],
        )


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
    _check_interface("compiled part, lite_attention._host,", getattr(host, "OPERATOR_INTERFACE", None))
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
    _check_interface(f"operator library {file_name}", _told_by(path, "lite_attention_operator_interface"))
    kernels = _told_by(path, "lite_attention_kernel_hash")
    if kernels != host.KERNEL_HASH:
        raise _import_failure(
            f"its operator library {file_name} was built from the kernels {kernels}, expected {host.KERNEL_HASH}, "
            "those that lite_attention._host tells",
            ["compiled files of two builds lie beside one another"],
        )


def _told_by(library: Path, symbol: str) -> str | None:
    try:
        tell = getattr(ctypes.CDLL(str(library)), symbol)
    except AttributeError:  # from before libraries told it
        return None
    tell.restype = ctypes.c_char_p
    return str(tell().decode())


def _load_cuda_operators(host: ModuleType) -> str:
    """Why there are no CUDA kernels, or nothing if they are loaded."""
    if not host.CUDA_ARCHITECTURES:
        why = f", as {host.WHY_NO_CUDA}" if torch.version.cuda else ""  # nobody misses them where torch has no CUDA
        return f"this build holds no CUDA kernels{why}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    _load_operators(host, "_cuda_ops.so")
    return ""


host = _load_host_module()
__version__: str = host.VERSION

_load_operators(host, "_ops.so")
WHY_NO_CUDA_KERNELS = _load_cuda_operators(host)
