"""What a record was made with: the library that ran, the machine, and when. Every record holds these facts."""

import datetime
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lite_attention.info import report

sys.path.insert(0, str(Path(__file__).parents[1] / "cmake"))
from revision import kernel_hash  # of the sources in this tree

__all__ = ["facts_of_run", "kernel_hash", "now"]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def driver() -> str | None:
    """The version of NVIDIA's driver, where there is one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None


def facts_of_run(command: str) -> dict[str, Any]:
    """As the top of a record. Hash and revision are those that the library itself was built with."""
    library = report()
    cuda = torch.cuda.is_available()
    return {
        "command": command,
        "date": now(),
        "kernel_hash": library["kernel hash"],
        "revision": library["revision"],
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "environment": library,
    }
