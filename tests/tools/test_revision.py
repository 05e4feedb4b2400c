"""What a build says it was made of, written at each build by cmake/revision.py."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lite_attention.ops.load import host

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
Change = Callable[[Path], object]


def git(source: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)


def commit(source: Path) -> None:
    git(source, "add", ".")
    git(source, "commit", "-qm", "more", "--allow-empty")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkout with one kernel, in a repository of its own."""
    folder = tmp_path / "checkout"
    kernel = folder / "cpp" / "kernels" / "kernel.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("one\n")
    (folder / "README.md").write_text("read me\n")
    shutil.copytree(ROOT / "cmake", folder / "cmake", ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "-q")
    commit(folder)
    return folder


def write(source: Path, folder: Path) -> dict[str, str]:
    """The headers' definitions."""
    subprocess.run([sys.executable, "-B", source / "cmake" / "revision.py", folder / "generated"], check=True)
    text = "".join((folder / "generated" / name).read_text() for name in ("revision.h", "kernel_hash.h"))
    return dict(re.findall(r'#define LITE_ATTENTION_(\w+) "(.+)"', text))


def append(name: str) -> Change:
    def change(source: Path) -> None:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + "# more\n")

    change.__name__ = name
    return change


def rename_kernel(source: Path) -> None:
    kernel = source / "cpp" / "kernels" / "kernel.cu"
    kernel.rename(kernel.with_name("other.cu"))


@pytest.mark.parametrize(
    "change",
    [append("cpp/kernels/kernel.cu"), append("cpp/new.h"), append("cmake/KernelInstances.cmake"), rename_kernel],
    ids=lambda change: change.__name__,
)
def test_what_decides_the_kernels_changes_their_hash(change: Change, source: Path, tmp_path: Path) -> None:
    first = write(source, tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", first["GIT_REVISION"])
    change(source)
    edited = write(source, tmp_path)
    assert edited["GIT_REVISION"] == first["GIT_REVISION"] + "-dirty"
    assert edited["KERNEL_HASH"] != first["KERNEL_HASH"]
    commit(source)
    committed = write(source, tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", committed["GIT_REVISION"])
    assert committed["GIT_REVISION"] != first["GIT_REVISION"]
    assert committed["KERNEL_HASH"] == edited["KERNEL_HASH"]


@pytest.mark.parametrize("name", ["README.md", "cpp/README.md", "python/lite_attention/info.py", "pyproject.toml"])
def test_documents_and_python_files_leave_the_hash_alone(name: str, source: Path, tmp_path: Path) -> None:
    first = write(source, tmp_path)
    append(name)(source)
    assert write(source, tmp_path) == {**first, "GIT_REVISION": first["GIT_REVISION"] + "-dirty"}


def test_a_commit_without_an_edit_changes_the_revision_alone(source: Path, tmp_path: Path) -> None:
    first = write(source, tmp_path)
    commit(source)
    second = write(source, tmp_path)
    assert second["KERNEL_HASH"] == first["KERNEL_HASH"]
    assert second["GIT_REVISION"] not in (first["GIT_REVISION"], first["GIT_REVISION"] + "-dirty")


def test_a_tag_does_not_stand_in_for_the_revision(source: Path, tmp_path: Path) -> None:
    first = write(source, tmp_path)
    git(source, "tag", "-a", "v1", "-m", "v1")
    assert write(source, tmp_path) == first


def test_files_that_no_build_reads_do_not_make_it_dirty(source: Path, tmp_path: Path) -> None:
    first = write(source, tmp_path)
    (source / "notes.txt").write_text("mine\n")
    assert write(source, tmp_path) == first


def test_a_header_is_touched_only_when_it_changes(source: Path, tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "generated").iterdir()}

    write(source, tmp_path)
    first = times()
    write(source, tmp_path)
    assert times() == first
    commit(source)
    write(source, tmp_path)
    assert {name for name, time in times().items() if time != first[name]} == {"revision.h"}


@pytest.mark.parametrize("around", ["nothing", "another checkout", "no git"])
def test_without_a_checkout_of_its_own_the_revision_is_unknown_and_the_hash_the_same(
    around: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {**write(source, tmp_path), "GIT_REVISION": "unknown"}
    if around == "no git":
        monkeypatch.setenv("PATH", "")
    else:
        shutil.rmtree(source / ".git")
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if around == "another checkout":
        git(tmp_path, "init", "-q")
        commit(tmp_path)
    assert write(source, tmp_path) == expected


PROJECT = """
cmake_minimum_required(VERSION 3.26)
project(tells LANGUAGES CXX)
list(APPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_SOURCE_DIR}/cmake")
find_package(Python REQUIRED COMPONENTS Interpreter)
include(Revision)
add_executable(tells tells.cpp)
include_revision(tells "${CMAKE_CURRENT_BINARY_DIR}/generated")
"""
PROGRAM = """
#include <cstdio>
#include "kernel_hash.h"
#include "revision.h"
int main() { std::puts(LITE_ATTENTION_GIT_REVISION " " LITE_ATTENTION_KERNEL_HASH); }
"""


@pytest.mark.slow
def test_every_build_tells_what_it_was_made_of(source: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    (source / "CMakeLists.txt").write_text(PROJECT)
    (source / "tells.cpp").write_text(PROGRAM)
    (source / ".gitignore").write_text("__pycache__\n")
    commit(source)
    assert CMAKE is not None
    subprocess.run([CMAKE, "-S", source, "-B", build], check=True, capture_output=True)

    def built() -> tuple[str, str, str]:
        """What the program tells, and what the build printed. It is configured once."""
        done = subprocess.run([CMAKE, "--build", build], check=True, capture_output=True, text=True)
        told = subprocess.run([build / "tells"], check=True, capture_output=True, text=True).stdout.split()
        return told[0], told[1], done.stdout

    revision, kernels, _ = built()
    same, _, printed = built()
    assert same == revision
    assert "Building" not in printed  # nothing changed, nothing is compiled
    append("cpp/kernels/kernel.cu")(source)  # an edit
    dirty, edited, _ = built()
    assert dirty == f"{revision}-dirty"
    assert edited != kernels
    commit(source)  # of the edit, then one without
    committed, of_commit, _ = built()
    assert of_commit == edited
    assert len({revision, dirty, committed}) == 3
    commit(source)
    empty, of_empty, _ = built()
    assert (of_empty, "-dirty" in empty) == (edited, False)
    assert empty != committed


def test_this_build_tells_both() -> None:
    assert host.GIT_REVISION
    assert re.fullmatch("[0-9a-f]{12}", host.KERNEL_HASH)
