"""`python -m lite_attention.info`: versions, tile shapes, and which backends can run here or why they cannot."""

import argparse
import datetime
import json
import platform
import subprocess
from typing import Any

import torch

from lite_attention.maps.tiles import SUPPORTED_DTYPES
from lite_attention.ops.backends import Backend, availability, backends
from lite_attention.ops.load import __version__, host


def _facts(backend: Backend) -> dict[str, Any]:
    available, reason = availability(backend)
    return {"name": backend.name, "available": available, "reason": reason}


def report() -> dict[str, Any]:
    """Everything the command prints, as plain data."""
    return {
        "lite_attention": __version__,
        "revision": host.GIT_REVISION,
        "kernel hash": host.KERNEL_HASH,
        "torch": torch.__version__,
        "torch at build": host.TORCH_BUILD_VERSION,
        "cuda of torch": torch.version.cuda or "none",
        "compiler": host.CXX_COMPILER,
        "cuda architectures": host.CUDA_ARCHITECTURES or "none",
        "cuda at build": host.CUDA_VERSION or "none",
        "cutlass at build": host.CUTLASS_VERSION or "none",
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} torch threads",
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES],
        "tiles": [
            {"head_dim up to": row[0], "tile_m": row[1], "tile_n": row[2], "visit_rows": row[3]}
            for row in host.tile_shapes()
        ],
        "backends": [_facts(backend) for backend in backends()],
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, where it tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((line.strip() for line in told.splitlines() if line.strip()), None)


def facts_of_run(command: str, *, on_gpu: bool) -> dict[str, Any]:
    """What the figures of `command` were made with, as the top of their record.

    Revision and kernel hash are those that the loaded library was built with, whatever lies beside it now.
    """
    library = report()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "kernel_hash": library["kernel hash"],
        "revision": library["revision"],
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "environment": library,
    }


def _print_text(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if isinstance(value, str):
            print(f"{name:<20}{value}")
    print(f"{'dtypes':<20}{', '.join(facts['dtypes'])}")
    print("\ntile shapes")
    for row in facts["tiles"]:
        print("  " + ", ".join(f"{name} {value}" for name, value in row.items()))
    print("\nbackends")
    for backend in facts["backends"]:
        print(f"  {backend['name']:<8}{'yes' if backend['available'] else 'no':<5}{backend['reason']}")


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="python -m lite_attention.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args()
    facts = report()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_text(facts)


if __name__ == "__main__":
    main()
