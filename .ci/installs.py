"""Installs as the README says, each in an isolated build, and what the installed library tells of itself.

    python .ci/installs.py nvcc      CUDA torch, without nvcc and then with it; CPU torch, if this Python has one.
                                     Leaves build/install/nvcc, an environment with the Hopper kernels
    python .ci/installs.py 3.10      from the sdist by uv, under another Python. Leaves build/install/3.10

The Hopper kernels are compiled without a GPU. torch is the index's as uv finds it, the packages constraints.txt's.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "install"
NO_CUDA = WORK / "no-cuda"
UV = Path(sys.executable).with_name("uv")
TEST_PACKAGES = ("numpy", "expecttest", "hypothesis", "pytest", "pytest-timeout", "setuptools")


def run(*command: str | Path, folder: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    """What the command prints, which is shown only if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))}: exit code {done.returncode}")
    return done.stdout


def expect(what: str, text: str, pattern: str) -> None:
    """End here unless the text is of the pattern, a shell's."""
    print(f"  {what}: {text}", flush=True)
    if not fnmatch.fnmatchcase(text, pattern):
        sys.exit(f"{what}: expected {pattern}")


def checkout() -> Path:
    """A copy of the working tree, apart from what was built in it."""
    source = WORK / "source"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return source


def cuda_of_torch(python: Path) -> str:
    """The version that the environment's torch was built with, or None."""
    return run(python, "-c", "import torch; print(torch.version.cuda)").strip()


def kernels(python: Path) -> str:
    """The installed library's CUDA architectures, and why the Hopper kernels do not run here."""
    facts = json.loads(run(python, "-m", "lite_attention.info", "--json"))
    reasons = {backend["name"]: backend["reason"] for backend in facts["backends"]}
    return f"{facts['cuda architectures']}; {reasons['sm90']}"


OPERATOR_ERROR = """
import torch, lite_attention
arguments = torch.randn(3, 1, 128, 1, 64).unbind()
keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # the call that a CUDA tensor would make
try:
    torch.ops.lite_attention.attention.default.redispatch(keyset, *arguments, None, None, 1.0)
except NotImplementedError as error:
    print(str(error).splitlines()[1])
"""


def with_and_without_nvcc() -> None:
    """The README's lines where torch has CUDA: what is said where nvcc is missing cures it."""
    source, folder = checkout(), WORK / "nvcc"
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "venv", folder)
    run(UV, "pip", "install", "--python", python, "--constraints", "constraints.txt", "torch", *TEST_PACKAGES)
    expect("CUDA of torch", cuda_of_torch(python), "1[3-9].*")

    print("without nvcc", flush=True)
    log = run(python, "-m", "pip", "install", "--verbose", ".", folder=source, environment={"CUDA_HOME": str(NO_CUDA)})
    why = f"as there was no {NO_CUDA}/bin/nvcc when it was built: *`pip install 'cuda-toolkit[[]nvcc,cccl]'`*"
    said = log[log.index("This build of lite_attention") :]
    expect("the end of the build", said.splitlines()[0], f"*is for the CPU alone. It holds no CUDA kernels, {why}")
    expect("sources compiled after it", str(said.count("Building CXX object")), "0")
    expect("info", kernels(python), f"none; this build holds no CUDA kernels, {why}")
    expect("an operator", run(python, "-c", OPERATOR_ERROR), f"  sm90: this build holds no CUDA kernels, {why}")

    print("with nvcc", flush=True)
    run(python, "-m", "pip", "install", "cuda-toolkit[nvcc,cccl]")
    run(python, "-m", "pip", "install", ".", folder=source, environment={"CMAKE_ARGS": "-DLITE_ATTENTION_WERROR=ON"})
    expect("info", kernels(python), "90a; *")
    print(run(sys.executable, "cmake/check_ptxas.py", "table", source / "build"))

    print("with the torch of this Python", flush=True)
    if cuda_of_torch(Path(sys.executable)) != "None":
        print("  which has CUDA too")
        return
    python = WORK / "cpu" / "bin" / "python"
    run(sys.executable, "-m", "venv", WORK / "cpu")
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(packages) / "packages.pth").write_text(sysconfig.get_path("purelib"))
    log = run(python, "-m", "pip", "install", "--verbose", ".", folder=source)
    expect("lines on CUDA in the build", str(log.count("CUDA")), "0")
    expect("info", kernels(python), "none; this build holds no CUDA kernels")


def under(version: str) -> None:
    """An install from the sdist with another Python."""
    folder, sdists = WORK / version, WORK / version / "sdist"
    python = folder / "bin" / "python"
    run(UV, "venv", "--python", version, folder, environment=_pyenv())
    run(UV, "build", "--sdist", "--out-dir", sdists)
    (sdist,) = sdists.glob("*.tar.gz")
    versions = ("--constraints", "constraints.txt", "--build-constraints", "constraints.txt")
    install = (UV, "pip", "install", "--python", python, *versions, sdist, *TEST_PACKAGES)
    run(*install, environment={"CUDA_HOME": str(NO_CUDA)})
    print(f"  {run(python, '--version').strip()}, torch {run(python, '-c', 'import torch; print(torch.__version__)')}")
    expect("info", kernels(python), "none; *")


def _pyenv() -> dict[str, str]:
    """Pyenv's way to offer every Python that it has, the one in use first."""
    if shutil.which("pyenv") is None:
        return {}
    versions = [*run("pyenv", "version-name").split(), *run("pyenv", "versions", "--bare").split()]
    return {"PYENV_VERSION": ":".join(versions)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    NO_CUDA.mkdir(parents=True, exist_ok=True)
    print(f"== {sys.argv[1]}", flush=True)
    shutil.rmtree(WORK / sys.argv[1], ignore_errors=True)
    if sys.argv[1] == "nvcc":
        shutil.rmtree(WORK / "source", ignore_errors=True)
        shutil.rmtree(WORK / "cpu", ignore_errors=True)
        with_and_without_nvcc()
    else:
        under(sys.argv[1])
