"""The package's PEP 517 backend: scikit-build-core, and what it needs that depends on where it builds.

An isolated build downloads what it requires. torch is required only where the environment that the package is meant for
has none that will do: there the build takes its headers (FindTorchStable.cmake), and gigabytes need not come again. pip
sees that environment from an isolated build (BuildingPython.cmake), other tools do not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from scikit_build_core import build as _scikit_build_core
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST_TORCH = (2, 10)
HIDING = ("PYTHONPATH", "PYTHONNOUSERSITE")  # how pip hides an environment from what it runs


def get_requires_for_build_wheel(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    """scikit-build-core's requirements, and torch and pip where they are missing."""
    return [*_scikit_build_core.get_requires_for_build_wheel(config_settings), *missing()]


def get_requires_for_build_editable(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    """As for a wheel."""
    return [*_scikit_build_core.get_requires_for_build_editable(config_settings), *missing()]


def missing() -> list[str]:
    """What the build would not find in any environment that it sees."""
    needed = []
    if not any(_is_new_enough(version) for version in _versions("torch")):
        needed.append(f"torch>={'.'.join(map(str, OLDEST_TORCH))}")
    if "UV" not in os.environ and not any(_versions("pip")):
        needed.append("pip")  # FindCutlass.cmake downloads with it, or with uv
    return needed


def _is_new_enough(version: str) -> bool:
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and tuple(map(int, release.groups())) >= OLDEST_TORCH


def _versions(distribution: str) -> list[str]:
    """The version that each environment the build sees has of a distribution; empty where it has none."""
    question = (
        "import importlib.metadata as metadata\n"
        f"try: print(metadata.version({distribution!r}))\n"
        "except metadata.PackageNotFoundError: print()"
    )
    environments = [os.environ, {name: value for name, value in os.environ.items() if name not in HIDING}]
    return [
        subprocess.run(
            [sys.executable, "-c", question], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        for environment in environments
    ]
