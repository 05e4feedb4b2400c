"""Which sources a build is made of: git's revision, and a hash of what decides the machine code of the kernels.

    python cmake/revision.py FOLDER   writes revision.h and kernel_hash.h, at every build and not when it is configured
    python cmake/revision.py          prints both

The hash covers the names and the contents of all sources in cpp/ (.h, .cpp, .cuh, .cu, .in) and of
cmake/KernelInstances.cmake, which lists and configures what nvcc compiles. It does not cover Python files, docs and
tests, the flags of the CPU kernels (CMakeLists.txt), nor compilers, architecture and CUTLASS, which
`python -m lite_attention.info` prints beside it.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["git_revision", "kernel_hash"]

ROOT = Path(__file__).parents[1]
SUFFIXES = {".h", ".cpp", ".cuh", ".cu", ".in"}
TABLE = "cmake/KernelInstances.cmake"
COMPILED = ("cpp", "cmake", "python", "CMakeLists.txt", "pyproject.toml")
DIGITS = 12


def kernel_sources(root: Path = ROOT) -> Iterator[Path]:
    """What the hash covers, in its order."""
    sources = [path for path in (root / "cpp").rglob("*") if path.suffix in SUFFIXES]
    yield from sorted([*sources, root / TABLE], key=lambda path: path.relative_to(root).as_posix())


def kernel_hash(root: Path = ROOT) -> str:
    """12 hex digits that stand for the kernels' sources."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(root).as_posix()}\n"
        for path in kernel_sources(root)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:DIGITS]


def git_revision(root: Path = ROOT) -> str:
    """The commit, with `-dirty` where tracked files differ from it or new ones would be compiled; else `unknown`."""

    def git(*arguments: str) -> str:
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # builds beside one another do not wait for the index
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, env=environment
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"  # unpacked within some other project's checkout
        revision = git("describe", "--always", "--exclude=*", "--dirty", f"--abbrev={DIGITS}")
        untracked = git("ls-files", "--others", "--exclude-standard", "--", *COMPILED)
    except (OSError, subprocess.CalledProcessError):  # no git, no checkout, no commit
        return "unknown"
    return f"{revision}-dirty" if untracked and not revision.endswith("-dirty") else revision


def main() -> None:
    """Entry point of the script."""
    if len(sys.argv) == 1:
        print(f"revision     {git_revision()}\nkernel hash  {kernel_hash()}")
        return
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    # Two, so that a commit rebuilds what tells the revision alone; each touched only when it changes.
    for name, value in (("GIT_REVISION", git_revision()), ("KERNEL_HASH", kernel_hash())):
        path = folder / f"{name.removeprefix('GIT_').lower()}.h"
        text = f'#define LITE_ATTENTION_{name} "{value}"\n'
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main()
