"""What a build says it was made of, written at each build by cmake/WriteRevision.cmake."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lite_attention.ops.load import host

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


def write(source: Path, header: Path) -> dict[str, str]:
    """The header's definitions."""
    assert CMAKE is not None
    script = ROOT / "cmake" / "WriteRevision.cmake"
    subprocess.run([CMAKE, f"-DSOURCE={source}", f"-DHEADER={header}", "-P", script], check=True)
    return dict(re.findall(r'#define LITE_ATTENTION_(\w+) "(.+)"', header.read_text()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkout with one kernel, in a repository of its own."""
    kernel = tmp_path / "checkout" / "cpp" / "kernels" / "kernel.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("one\n")
    git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    return tmp_path / "checkout"


def test_the_hash_follows_the_kernels_and_the_revision_the_checkout(source: Path, tmp_path: Path) -> None:
    first = write(source, tmp_path / "revision.h")
    assert re.fullmatch("[0-9a-f]{12}", first["GIT_REVISION"])
    (source / "README.md").write_text("no kernel\n")
    subprocess.run(["git", "-C", source, "add", "."], check=True)
    second = write(source, tmp_path / "revision.h")
    assert second == {**first, "GIT_REVISION": first["GIT_REVISION"] + "-dirty"}
    kernel = source / "cpp" / "kernels" / "kernel.cu"
    kernel.write_text("two\n")
    third = write(source, tmp_path / "revision.h")
    kernel.rename(kernel.with_name("other.cu"))
    fourth = write(source, tmp_path / "revision.h")
    assert len({each["KERNEL_HASH"] for each in (second, third, fourth)}) == 3


def test_the_header_is_touched_only_when_it_changes(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "revision.h")
    written = (tmp_path / "revision.h").stat().st_mtime_ns
    write(source, tmp_path / "revision.h")
    assert (tmp_path / "revision.h").stat().st_mtime_ns == written


def test_without_git_the_revision_is_unknown(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(source / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert write(source, tmp_path / "revision.h")["GIT_REVISION"] == "unknown"


def test_this_build_tells_both() -> None:
    assert host.GIT_REVISION
    assert re.fullmatch("[0-9a-f]{12}", host.KERNEL_HASH)
