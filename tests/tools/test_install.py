"""What a build makes of where it runs: whether it holds CUDA kernels, what it requires, what its sdist holds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from expecttest import assert_expected_inline

from lite_attention import info
from lite_attention.ops import backends, load

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


# Whether CUDA kernels are built


class Machine:
    """A place to build in: a Python without packages but those of `site`, and a PATH of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / "site"
        self.path = folder / "path"
        self.path.mkdir()
        self.python = folder / "python"
        self.add_program(self.python, f'PYTHONPATH={self.site} exec {sys.executable} -S "$@"')

    def add_program(self, program: Path, text: str) -> None:
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)

    def add_nvcc(self, program: Path, version: str) -> None:
        release = ".".join(version.split(".")[:2])
        self.add_program(program, f"echo 'Cuda compilation tools, release {release}, V{version}'")

    def add_wheels(self, version: str, without: str = "") -> None:
        toolkit = self.site / "nvidia" / "cu13"
        self.add_nvcc(toolkit / "bin" / "nvcc", version)
        for part in (
            "nvvm/bin/cicc",
            "include/cuda_runtime.h",
            "include/cccl/cuda",
            "bin/crt/link",
            "lib/libcudart_static.a",
        ):
            if not without or not part.startswith(without):
                (toolkit / part).parent.mkdir(parents=True, exist_ok=True)
                (toolkit / part).touch()

    def configures(self, script: str, **environment: str) -> tuple[int, str]:
        """The exit code of a project that consists of a script, and what it said; folders are written as names."""
        (self.folder / "CMakeLists.txt").write_text(
            f"""
            cmake_minimum_required(VERSION 3.26...3.31)
            project(any LANGUAGES NONE)
            set(CMAKE_MODULE_PATH "{ROOT}/cmake")
            set(Python_EXECUTABLE "{self.python}")
            {script}
            """
        )
        folders = ["-S", self.folder, "-B", self.folder / "build", "-G", "Unix Makefiles"]
        done = subprocess.run(
            [str(CMAKE), "--fresh", *folders, "-DCMAKE_MAKE_PROGRAM=/bin/true"],
            env={"PATH": str(self.path), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr.replace(f"{self.folder}/", "")

    def chooses(self, torch_cuda: str = "13.0", asked: str = "AUTO", **environment: str) -> str:
        """The nvcc that the build would take, or why none; folders are written as names."""
        version = f"2.13.0+{'cu' + torch_cuda.replace('.', '') if torch_cuda else 'cpu'}"
        code, text = self.configures(
            f"""
            set(Nvcc_PLACES nvcc "{self.folder}/usual/nvcc")
            set(TorchStable_VERSION "{version}")
            set(TorchStable_CUDA "{torch_cuda}")
            set(LITE_ATTENTION_CUDA {asked} CACHE STRING "")
            include(ChooseCuda)
            message("${{why_no_cuda}}${{Nvcc_EXECUTABLE}}, libraries ${{Nvcc_LIBRARY_DIR}}")
            """,
            **environment,
        )
        return text.removesuffix(", libraries \n").strip() if code == 0 else error(text)

    def finds_cutlass(self, root: str = "", **environment: str) -> str:
        """The folder of CUTLASS's headers that the build would take, and their version; or why none."""
        code, text = self.configures(
            f"""
            set(CUTLASS_ROOT "{root}")
            find_package(Cutlass 4.2 REQUIRED)
            message("${{Cutlass_INCLUDE_DIR}} ${{Cutlass_VERSION}}")
            """,
            **environment,
        )
        return text.strip().replace("/ ", " ") if code == 0 else error(text)


def error(text: str) -> str:
    """The first error of CMake's, without where it arose and where lines were broken."""
    message = text.partition("(message):")[2].partition("Call Stack")[0]
    return f"error: {' '.join(message.split())}"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_nvcc_of_the_environments_wheels_goes_before_that_of_the_path(machine: Machine) -> None:
    machine.add_nvcc(machine.folder / "usual" / "nvcc", "13.1.80")
    assert machine.chooses() == "usual/nvcc"
    machine.add_nvcc(machine.path / "nvcc", "12.9.86")
    assert machine.chooses() == "path/nvcc"
    machine.add_wheels("13.0.88")
    assert machine.chooses() == "site/nvidia/cu13/bin/nvcc, libraries site/nvidia/cu13/lib"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "CUDACXX"])
def test_an_nvcc_that_is_named_goes_before_all_others(machine: Machine, variable: str) -> None:
    machine.add_wheels("13.0.88")
    machine.add_nvcc(machine.path / "nvcc", "12.9.86")
    nvcc = machine.folder / "named" / "bin" / "nvcc"
    machine.add_nvcc(nvcc, "12.8.61")
    named = {variable: f"{nvcc} -ccbin g++" if variable == "CUDACXX" else str(nvcc.parents[1])}
    assert machine.chooses(**named) == "named/bin/nvcc"
    nvcc.unlink()
    assert machine.chooses(**named).startswith("there was no named/bin/nvcc when it was built: ")


def test_an_nvcc_that_is_too_old_or_incomplete_is_passed_over(machine: Machine) -> None:
    machine.add_wheels("13.0.88", without="include/cccl")
    machine.add_nvcc(machine.path / "nvcc", "12.4.131")
    machine.add_nvcc(machine.folder / "usual" / "nvcc", "12.8.61")
    assert machine.chooses() == "usual/nvcc"


def test_without_cuda_kernels_a_build_knows_why_and_what_helps(machine: Machine) -> None:
    found = {"CPU torch": machine.chooses(torch_cuda=""), "switched off": machine.chooses(asked="OFF")}
    found["no nvcc"] = machine.chooses()
    found["no nvcc, wheels without one"] = machine.chooses(torch_cuda="12.8")
    machine.add_nvcc(machine.path / "nvcc", "12.4.131")
    found["an old one"] = machine.chooses()
    found["an old one, asked for"] = machine.chooses(asked="ON")
    found["nowhere, asked for"] = machine.chooses(asked="ON", CUDA_HOME="/nowhere")
    assert_expected_inline(
        "\n".join(f"{case} -> {text}" for case, text in found.items()),
        """\
CPU torch -> it was built with torch 2.13.0+cpu: install it again (`pip install .`) where torch has CUDA
switched off -> it was built with LITE_ATTENTION_CUDA=OFF: install it again (`pip install .`) without that
no nvcc -> no nvcc was found when it was built: get nvcc 12.8 or newer (with the CUDA toolkit, or `pip install 'cuda-toolkit[nvcc,cccl]'`) and install it again (`pip install .`)
no nvcc, wheels without one -> no nvcc was found when it was built: get nvcc 12.8 or newer (with the CUDA toolkit) and install it again (`pip install .`)
an old one -> path/nvcc was version 12.4.131 when it was built: get nvcc 12.8 or newer (with the CUDA toolkit, or `pip install 'cuda-toolkit[nvcc,cccl]'`) and install it again (`pip install .`)
an old one, asked for -> error: LITE_ATTENTION_CUDA is ON, but path/nvcc was version 12.4.131: get nvcc 12.8 or newer (with the CUDA toolkit, or `pip install 'cuda-toolkit[nvcc,cccl]'`)
nowhere, asked for -> error: LITE_ATTENTION_CUDA is ON, but there was no /nowhere/bin/nvcc: get nvcc 12.8 or newer (with the CUDA toolkit, or `pip install 'cuda-toolkit[nvcc,cccl]'`)""",
    )


@pytest.mark.parametrize("torch_cuda", ["", "13.0"])
def test_the_kernels_can_be_asked_for_where_torch_has_no_cuda(machine: Machine, torch_cuda: str) -> None:
    machine.add_nvcc(machine.path / "nvcc", "13.0.88")
    assert machine.chooses(torch_cuda, asked="ON") == "path/nvcc"
    assert machine.chooses(torch_cuda, asked="OFF").startswith("it was built with LITE_ATTENTION_CUDA=OFF")


@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
def test_a_library_tells_why_it_holds_no_cuda_kernels_where_torch_could_use_them(
    torch_cuda: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    build = SimpleNamespace(CUDA_ARCHITECTURES="", WHY_NO_CUDA="no nvcc was found when it was built: get one")
    why = ", as no nvcc was found when it was built: get one" if torch_cuda else ""
    assert load._load_cuda_operators(build) == f"this build holds no CUDA kernels{why}"


def test_info_repeats_why_a_build_holds_no_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    build = SimpleNamespace(CUDA_ARCHITECTURES="", WHY_NO_CUDA="no nvcc was found when it was built: get one")
    monkeypatch.setattr(backends, "WHY_NO_CUDA_KERNELS", load._load_cuda_operators(build))
    info._print_text(info.report())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sm90" in line]
    assert_expected_inline(
        line, """  sm90    no   this build holds no CUDA kernels, as no nvcc was found when it was built: get one"""
    )


def test_this_build_tells_why_it_holds_none() -> None:
    assert bool(load.host.WHY_NO_CUDA) != bool(load.host.CUDA_ARCHITECTURES)


# CUTLASS's headers

# Stands for pip and uv: writes what CUTLASS's wheel holds where it is told to, and what it was told.
INSTALLER = """
import os, pathlib, sys
if "OFFLINE" in os.environ:
    sys.exit("no network")
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
target.mkdir(parents=True, exist_ok=True)
(target / "told").write_text(" ".join(sys.argv[1:]))
include = target / "cutlass_library" / "source" / "include"
for folder in ("cute", "cutlass"):
    (include / folder).mkdir(parents=True)
(include / "cute" / "tensor.hpp").touch()
(include / "cutlass" / "version.h").write_text("#define CUTLASS_MAJOR 4\\n#define CUTLASS_MINOR 2\\n")
"""


@pytest.fixture
def installer(machine: Machine) -> Path:
    """A script that is the machine's pip."""
    script = machine.site / "pip" / "__main__.py"
    script.parent.mkdir(parents=True)
    script.write_text(INSTALLER)
    return script


@pytest.mark.parametrize("by_uv", [False, True])
def test_cutlass_is_downloaded_once_without_what_it_depends_on(machine: Machine, installer: Path, by_uv: bool) -> None:
    environment = {}
    if by_uv:
        machine.add_program(
            machine.folder / "uv", f'exec {sys.executable} {installer.rename(machine.folder / "it")} "$@"'
        )
        environment["UV"] = str(machine.folder / "uv")
    folder = "build/cutlass"
    assert machine.finds_cutlass(**environment) == f"{folder}/cutlass_library/source/include 4.2"
    told = (machine.folder / folder / "told").read_text().replace(f"{machine.folder}/", "")
    what = f"install --quiet --no-deps --target {folder} nvidia-cutlass==4.2.*"
    assert told == (f"pip {what} --python python" if by_uv else what)
    assert machine.finds_cutlass(OFFLINE="") == f"{folder}/cutlass_library/source/include 4.2"


def test_cutlass_of_the_environment_or_of_a_checkout_needs_no_network(machine: Machine, installer: Path) -> None:
    checkout = machine.folder / "checkout"
    installer_of = [sys.executable, installer, "--target"]
    subprocess.run([*installer_of, machine.site], check=True)
    assert machine.finds_cutlass(OFFLINE="") == "site/cutlass_library/source/include 4.2"
    (machine.site / "cutlass_library" / "source").rename(checkout)
    assert machine.finds_cutlass(root=str(checkout), OFFLINE="") == "checkout/include 4.2"


def test_where_cutlass_is_missing_the_build_tells_every_way_to_have_it(machine: Machine, installer: Path) -> None:
    found = {"no network": machine.finds_cutlass(OFFLINE=""), "empty root": machine.finds_cutlass(root="/nowhere")}
    assert_expected_inline(
        "\n".join(f"{case} -> {text}" for case, text in found.items()),
        """\
no network -> error: Could NOT find Cutlass (missing: Cutlass_INCLUDE_DIR) (Required is at least version "4.2") Reason given by package: The CUDA kernels need CUTLASS's headers, and nvidia-cutlass==4.2.* cannot be downloaded: install it (pip install --no-deps 'nvidia-cutlass==4.2.*') in the environment of python, or pass -C cmake.define.CUTLASS_ROOT=<checkout>. A build without these kernels: -C cmake.define.LITE_ATTENTION_CUDA=OFF. The download said: no network no network
empty root -> error: Could NOT find Cutlass (missing: Cutlass_INCLUDE_DIR) (Required is at least version "4.2") Reason given by package: CUTLASS_ROOT is /nowhere, where there is no include/cute/tensor.hpp""",
    )


# What a build requires


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "cmake" / "build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("UV", raising=False)
    return module


def add_distribution(site: Path, name: str, version: str) -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("isolated", "outside", "required"),
    [
        ({}, {"torch": "2.13.0+cpu", "pip": "23.2"}, []),
        ({}, {"torch": "3.0.0", "pip": "23.2"}, []),
        ({"torch": "2.10.0"}, {"pip": "23.2"}, []),
        ({}, {"torch": "2.9.1+cu128", "pip": "23.2"}, ["torch>=2.10"]),
        ({}, {"pip": "23.2"}, ["torch>=2.10"]),
        ({}, {}, ["torch>=2.10", "pip"]),
        ({"pip": "23.2"}, {"torch": "2.13.0"}, []),
    ],
)
@pytest.mark.parametrize("by_uv", [False, True])
def test_torch_and_pip_are_required_where_the_build_sees_none(
    backend: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    isolated: dict[str, str],
    outside: dict[str, str],
    required: list[str],
    by_uv: bool,
) -> None:
    python = tmp_path / "python"  # finds by itself what is outside, unless that is hidden by PYTHONPATH
    python.write_text(f'#!/bin/sh\nPYTHONPATH="${{PYTHONPATH-{tmp_path / "outside"}}}" exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(backend, "sys", SimpleNamespace(executable=str(python)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "isolated"))
    for site, distributions in (("isolated", isolated), ("outside", outside)):
        for name, version in distributions.items():
            add_distribution(tmp_path / site, name, version)
    if by_uv:
        monkeypatch.setenv("UV", "/usr/bin/uv")
    assert backend.missing() == [each for each in required if not (by_uv and each == "pip")]


@pytest.mark.parametrize("what", ["wheel", "editable"])
def test_wheels_and_editable_installs_require_the_same(
    backend: ModuleType, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(backend, "missing", lambda: ["torch"])
    requires = getattr(backend, f"get_requires_for_build_{what}")
    assert requires({})[-1] == "torch"


def test_every_file_names_the_same_oldest_torch(backend: ModuleType) -> None:
    oldest = backend.OLDEST_TORCH
    assert oldest == load.OLDEST_TORCH
    text = ".".join(map(str, oldest))
    assert f'dependencies = ["torch>={text}"]' in (ROOT / "pyproject.toml").read_text()
    assert f"find_package(TorchStable {text} REQUIRED)" in (ROOT / "CMakeLists.txt").read_text()
    hexadecimal = f"TORCH_TARGET_VERSION=0x{oldest[0]:02x}{oldest[1]:02x}{0:012x}"
    assert hexadecimal in (ROOT / "cmake" / "FindTorchStable.cmake").read_text()


# The sdist


@pytest.mark.slow
def test_the_sdist_holds_what_a_build_reads_and_nothing_else(tmp_path: Path) -> None:
    code = f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "cmake")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    (sdist,) = tmp_path.iterdir()
    with tarfile.open(sdist) as archive:
        names = {re.sub("^[^/]*/", "", member.name) for member in archive.getmembers()}
    folders = ("cmake", "cpp", "python/lite_attention")
    files = ("CHANGELOG.md", "CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders, *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert names == {"PKG-INFO", *listed.stdout.split()}
    assert not {Path(name).suffix for name in names} & {".jpg", ".png", ".svg", ".safetensors"}
    assert sdist.stat().st_size < 1_000_000
