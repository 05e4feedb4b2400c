"""The build's check of what ptxas made of the kernels, on outputs recorded from nvcc 13.0."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

SCRIPT = Path(__file__).parents[2] / "cmake" / "check_ptxas.py"
_spec = importlib.util.spec_from_file_location("check_ptxas", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
check_ptxas = importlib.util.module_from_spec(_spec)
sys.modules["check_ptxas"] = check_ptxas  # dataclasses look their module up
_spec.loader.exec_module(check_ptxas)

GOOD = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN14lite_attention4sm906kernelIfLi4EEEvNS0_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN14lite_attention4sm906kernelIfLi4EEEvNS0_6ParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compile time = 78.840 ms
"""
SPILLS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4sumsPfi' for 'sm_90a'
ptxas info    : Function properties for _Z4sumsPfi
    416 bytes stack frame, 804 bytes spill stores, 824 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 416 bytes cumulative stack size
ptxas info    : Compile time = 34.496 ms
"""
IGNORES_SETMAXNREG = """\
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6budgetPf' for 'sm_90a'
ptxas info    : Function properties for _Z6budgetPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 3.126 ms
"""
SERIALIZES_WGMMA = """\
ptxas info    : (C7519) warpgroup.arrive is injected in around line 65 by compiler to allow use of registers in GMMA in function '_Z8multiplyPfmmi'
ptxas info    : (C7517) warpgroup.wait is injected in around line 70 by compiler to allow use of registers defined by GMMA in function '_Z8multiplyPfmmi'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline in the function '_Z8multiplyPfmmi'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z8multiplyPfmmi' for 'sm_90a'
ptxas info    : Function properties for _Z8multiplyPfmmi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compile time = 6.980 ms
ptxas info    : Function properties for _Z6helperf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
UNREADABLE = "ptxas info    : Compiling entry function '_Z4sumsPfi' for 'sm_90a'\nptxas info    : 32 registers\n"


@pytest.fixture(autouse=True)
def _without_demangler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_ptxas.shutil, "which", lambda _: None)


def test_a_kernel_that_keeps_its_registers_passes() -> None:
    assert check_ptxas.problems(GOOD) == []
    assert check_ptxas.problems("") == []  # a source without kernels


@pytest.mark.parametrize("output", [SPILLS, IGNORES_SETMAXNREG, SERIALIZES_WGMMA, UNREADABLE])
def test_one_bad_kernel_is_found_among_good_ones(output: str) -> None:
    assert check_ptxas.problems(GOOD + output + GOOD) == check_ptxas.problems(output) != []


def test_problems_name_the_kernel_and_the_loss() -> None:
    outputs = (SPILLS, IGNORES_SETMAXNREG, SERIALIZES_WGMMA, UNREADABLE)
    assert_expected_inline(
        "\n".join(problem for output in outputs for problem in check_ptxas.problems(output)),
        """\
_Z4sumsPfi spills registers: 804 bytes stored, 824 bytes loaded
(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
(C7519) warpgroup.arrive is injected in around line 65 by compiler to allow use of registers in GMMA in function '_Z8multiplyPfmmi'
(C7517) warpgroup.wait is injected in around line 70 by compiler to allow use of registers defined by GMMA in function '_Z8multiplyPfmmi'
(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline in the function '_Z8multiplyPfmmi'
ptxas says nothing of _Z4sumsPfi that cmake/check_ptxas.py can read""",
    )


def test_the_table_has_a_row_for_every_kernel() -> None:
    assert_expected_inline(
        check_ptxas.table({"good": GOOD, "sums": SPILLS}),
        """\
source  registers  stack  spilled  kernel
good    168        0      0        _ZN14lite_attention4sm906kernelIfLi4EEEvNS0_6ParamsE
sums    32         416    1628     _Z4sumsPfi""",
    )


@pytest.mark.skipif(check_ptxas.shutil.which("c++filt") is None, reason="needs c++filt of binutils")
def test_names_are_shown_as_in_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert check_ptxas._readable("_ZN14lite_attention4sm906kernelIfLi4EEEvNS0_6ParamsE") == "kernel<float, 4>"


def launch(severity: str, output: str, returncode: int, compiled: Path) -> subprocess.CompletedProcess[str]:
    """The script as a launcher of a compiler that prints `output`."""
    compiler = f"import pathlib, sys; sys.stderr.write({output!r}); pathlib.Path({str(compiled)!r}).touch(); sys.exit({returncode})"
    command = [sys.executable, str(SCRIPT), severity, sys.executable, "-c", compiler, "-o", str(compiled)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_accepted_object_stays_with_its_log(tmp_path: Path) -> None:
    compiled = tmp_path / "good.cu.o"
    done = launch("error", GOOD, 0, compiled)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert compiled.exists()
    table = subprocess.run([sys.executable, SCRIPT, "table", tmp_path], capture_output=True, text=True, check=True)
    assert "good    168" in table.stdout


def test_an_error_fails_the_build_and_leaves_no_object(tmp_path: Path) -> None:
    compiled = tmp_path / "sums.cu.o"
    done = launch("error", SPILLS, 0, compiled)
    assert done.returncode == 1
    assert "sums.cu: error: " in done.stdout
    assert not compiled.exists()


def test_a_warning_leaves_the_object(tmp_path: Path) -> None:
    compiled = tmp_path / "sums.cu.o"
    done = launch("warning", SPILLS, 0, compiled)
    assert done.returncode == 0
    assert "sums.cu: warning: " in done.stdout
    assert compiled.exists()


def test_the_compilers_own_failure_passes_through(tmp_path: Path) -> None:
    done = launch("error", "error: expected a ';'\n", 2, tmp_path / "sums.cu.o")
    assert done.returncode == 2
    assert done.stdout == "error: expected a ';'\n"


def test_a_launcher_before_the_compiler_runs_and_what_it_repeats_is_read(tmp_path: Path) -> None:
    compiled = tmp_path / "sums.cu.o"
    cache = "import subprocess, sys; sys.stderr.write('from the cache\\n'); sys.exit(subprocess.call(sys.argv[1:]))"
    compiler = f"import pathlib, sys; sys.stderr.write({SPILLS!r}); pathlib.Path({str(compiled)!r}).touch()"
    command = [sys.executable, SCRIPT, "error", sys.executable, "-c", cache, sys.executable, "-c", compiler]
    done = subprocess.run([*command, "-o", compiled], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == "from the cache"
    assert "sums.cu: error: " in done.stdout
