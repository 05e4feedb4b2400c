"""benchmarks/verify_gpu.py without a GPU: what its records hold, and that nothing unfinished or failed passes."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline

import provenance
import verify_gpu
from gpu_verified import PARTS, RERUN, RecordError, merged, objection, read_parts
from jobs import run_jobs

ROOT = Path(__file__).parents[2]


def made_up_part(name: str, **facts: Any) -> dict[str, Any]:
    return {
        "part": name,
        "complete": True,
        "passed": True,
        "kernel_hash": "0123456789ab",
        "revision": "ba9876543210",
        "date": f"2030-01-0{1 + PARTS.index(name)}T00:00:00+00:00",
        "gpu": "NVIDIA H100 80GB HBM3",
        "driver": "580.1",
        "torch": "2.11.0",
        "cuda": "13.0",
        "python": "3.12.3",
        "environment": {"machine": "made up"},
        "tools": {name: "1"},
        **facts,
    }


def made_up_parts(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [made_up_part(name, **changes.get(name, {})) for name in PARTS]


def test_parts_of_one_hash_that_passed_make_a_verified_record() -> None:
    record = merged(made_up_parts())
    assert record["verified"]
    assert (record["kernel_hash"], record["gpu"], record["date"][:10]) == (
        "0123456789ab",
        "NVIDIA H100 80GB HBM3",
        "2030-01-03",
    )
    assert record["tools"] == {"suite": "1", "fuzz": "1", "sanitize": "1"}
    assert objection(record, "0123456789ab") is None


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (made_up_parts()[:2], "missing sanitize"),
        (made_up_parts(fuzz={"complete": False, "passed": False}), "cut_short fuzz"),
        (made_up_parts(suite={"passed": False}), "failed suite"),
    ],
)
def test_what_is_missing_cut_short_or_failed_is_not_verified(parts: list[dict[str, Any]], why: str) -> None:
    record = merged(parts)
    assert not record["verified"]
    told = objection(record, "0123456789ab")
    assert told is not None
    assert f"did not pass ({why})" in told
    assert RERUN in told


def test_parts_of_different_kernels_are_refused() -> None:
    with pytest.raises(RecordError) as error:
        merged(made_up_parts(fuzz={"kernel_hash": "ffffffffffff"}))
    assert_expected_inline(
        str(error.value),
        """the parts are of different kernels (suite 0123456789ab, fuzz ffffffffffff, sanitize 0123456789ab): expected one hash""",
    )
    with pytest.raises(RecordError, match="two records of the part fuzz: expected one"):
        merged([*made_up_parts(), made_up_part("fuzz")])


def test_parts_from_two_gpus_tell_both() -> None:
    record = merged(made_up_parts(fuzz={"gpu": "NVIDIA H200"}))
    assert record["verified"]
    assert record["gpu"] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]


def test_the_objection_tells_what_to_run() -> None:
    assert_expected_inline(
        str(objection(merged(made_up_parts()), "aaaaaaaaaaaa")),
        """the kernels are aaaaaaaaaaaa, those verified on a GPU were 0123456789ab: run `python benchmarks/verify_gpu.py` on a Hopper GPU with a build of these sources, and commit gpu_verified.json""",
    )
    assert_expected_inline(
        str(objection(None, "aaaaaaaaaaaa")),
        """no run on a GPU is recorded for the kernels aaaaaaaaaaaa: run `python benchmarks/verify_gpu.py` on a Hopper GPU with a build of these sources, and commit gpu_verified.json""",
    )


def test_folders_without_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no parts in .*: expected suite\.json, fuzz\.json, sanitize\.json"):
        read_parts([tmp_path])


# The suite


TESTS = """
import os, pytest
pytestmark = pytest.mark.gpu
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no such machine")
def test_ends_badly(broken): pass
@pytest.fixture
def broken():
    yield
    raise ValueError("at its end")
"""


def suite_journal(folder: Path, *options: str) -> dict[str, Any]:
    """The journal of a run over the tests that lie in a folder."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    journal = folder / "journal"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "support.journal", f"--journal={journal}"]
    subprocess.run(
        [*command, "-p", "no:cacheprovider", "--continue-on-collection-errors", *options],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT / "tests"), "PATH": ""},
        check=False,
        capture_output=True,
    )
    return verify_gpu.read_journal(journal)


DISTRIBUTED = ["-n2"] if importlib.util.find_spec("xdist") else []


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], DISTRIBUTED], ids=["one process", "two workers"])
def test_the_journal_tells_every_outcome_and_what_was_not_collected(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("import no_such_package\n")
    results = suite_journal(tmp_path, *options)
    assert results["tests"] == 4
    assert (results["passed_tests"], results["failed_tests"], results["skipped_tests"]) == (1, 2, 1)
    assert results["failures"] == {
        "test_some.py::test_fails": "assert 1 == 2",
        "test_some.py::test_ends_badly": "ValueError: at its end",
    }
    assert results["skips"] == {"no such machine": 1}
    assert results["tests_not_run"] == []
    assert results["files_not_collected"] == {"test_other.py": "ModuleNotFoundError: No module named 'no_such_package'"}
    assert results["exit_status"] == 1


@pytest.mark.slow
def test_tests_after_a_killed_one_were_not_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS.replace("assert 1 == 2", "os._exit(0)"))
    results = suite_journal(tmp_path)
    assert results["exit_status"] is None
    assert results["passed_tests"] == 1
    assert len(results["tests_not_run"]) == 3


# Processes, cases, sanitizers


def test_jobs_run_side_by_side_and_their_lines_are_kept(tmp_path: Path) -> None:
    commands = {name: ["sh", "-c", f"echo {name}; exit {len(name)}"] for name in ("a", "bb")}
    ended = run_jobs(commands, tmp_path / "log", at_once=2, until=time.monotonic() + 60, heartbeat=lambda: None)
    assert {name: (end.status, end.lines) for name, end in ended.items()} == {"a": (1, ["a"]), "bb": (2, ["bb"])}
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["[a] a", "[bb] bb"]


def test_jobs_and_those_behind_them_end_when_the_time_is_over(tmp_path: Path) -> None:
    began = time.monotonic()
    commands = {"first": ["sh", "-c", "echo begun; sleep 60 & sleep 60"], "behind": ["sh", "-c", "exit 0"]}
    ended = run_jobs(commands, tmp_path / "log", at_once=1, until=began + 0.5, heartbeat=lambda: None)
    assert time.monotonic() - began < 30
    assert {name: end.status for name, end in ended.items()} == {"first": None, "behind": None}
    assert ended["first"].lines == ["begun"]


def test_every_case_belongs_to_one_process() -> None:
    for total, processes in ((10, 3), (2, 6), (10_000, 7)):
        numbers = [
            number for first, count in verify_gpu.shares(total, processes) for number in range(first, first + count)
        ]
        assert numbers == list(range(total))


def test_a_sanitizer_is_clean_only_if_it_came_to_its_end_and_found_nothing() -> None:
    end = ["12 launches, all values right", "========= ERROR SUMMARY: 0 errors"]
    race = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert verify_gpu.read_sanitizer(end) == {"launches": 12, "summaries": ["ERROR SUMMARY: 0 errors"], "clean": True}
    assert verify_gpu.read_sanitizer([end[0], race])["clean"]
    assert not verify_gpu.read_sanitizer(end[:1])["clean"]
    assert not verify_gpu.read_sanitizer(end[1:])["clean"]
    assert not verify_gpu.read_sanitizer([end[0], "========= ERROR SUMMARY: 3 errors"])["clean"]
    assert not verify_gpu.read_sanitizer([end[0], race.replace("0 hazards", "2 hazards")])["clean"]


# The script


STUB = """
import json, sys
options = dict(option[2:].split("=") for option in sys.argv[1:] if "=" in option)
summary = {"cases": {"attention": int(options["cases"])}, "with": {"causal": 1}, "visited_tiles": 9,
           "tiles_too_close_to_call": 0, "failures": FAILURES}
open(options["output"], "w").write(json.dumps(summary))
sys.exit(len(summary["failures"]))
"""


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: verify_gpu.HOPPER)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("failures", "status"), [("[]", 0), ("[{'number': 7, 'wrong': ['lse']}]", 1)])
def test_a_part_runs_and_records_what_came_of_it(
    failures: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fuzz.py"
    script.write_text(STUB.replace("FAILURES", failures))
    monkeypatch.setattr(verify_gpu, "FUZZ", script)
    arguments = ["--only", "fuzz", "--out", str(tmp_path), "--cases", "5", "--fuzz-workers", "2"]
    assert verify_gpu.main(arguments) == status
    part = json.loads((tmp_path / "fuzz.json").read_text())
    assert part["kernel_hash"] == provenance.kernel_hash()
    assert (part["complete"], part["passed"]) == (True, status == 0)
    assert (part["cases"], part["cases_of"], part["failed_cases"]) == (5, {"attention": 5}, 2 * status)
    assert part["seed"] == int(part["kernel_hash"], 16) % 2**31

    record = tmp_path / "gpu_verified.json"
    assert verify_gpu.main(["--merge", str(tmp_path), "--record", str(record)]) == 1
    assert json.loads(record.read_text())["missing"] == ["suite", "sanitize"]


@pytest.mark.usefixtures("on_hopper")
def test_a_part_that_is_cut_short_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fuzz.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(verify_gpu, "FUZZ", script)
    assert verify_gpu.main(["--only", "fuzz", "--out", str(tmp_path), "--minutes", "0.01"]) == 1
    part = json.loads((tmp_path / "fuzz.json").read_text())
    assert (part["complete"], part["passed"], part["cases"]) == (False, False, 0)


SANITIZER = """#!/bin/sh
[ "$1" = --version ] && echo "NVIDIA (R) Compute Sanitizer\nVersion 2025.3.1.0 (build 1)" && exit 0
[ "$2" = "$BROKEN" ] && echo "========= ERROR SUMMARY: 2 errors" && exit 86
echo "20 launches, all values right"
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("broken", ["", "racecheck"])
def test_each_sanitizer_is_recorded_and_one_that_finds_something_fails(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("BROKEN", broken)
    arguments = ["--only", "sanitize", "--out", str(tmp_path), "--sanitizer", str(program), "--sanitize-workers", "2"]
    assert verify_gpu.main(arguments) == int(bool(broken))
    part = json.loads((tmp_path / "sanitize.json").read_text())
    assert part["tools"] == {"compute-sanitizer": "2025.3.1.0"}
    assert (part["complete"], part["passed"]) == (True, not broken)
    assert {tool: found["clean"] for tool, found in part["sanitizers"].items()} == {
        tool: tool != broken for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    }
    assert part["sanitizers"]["memcheck"]["launches"] == 40
    assert set(part["sanitizers"]["racecheck"]["exit_statuses"]) == {86 if broken else 0}


@pytest.mark.usefixtures("on_hopper")
def test_a_library_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_gpu, "kernel_hash", lambda: "aaaaaaaaaaaa")
    with pytest.raises(SystemExit, match="the sources beside this script are aaaaaaaaaaaa: build it again"):
        verify_gpu.main(["--only", "fuzz", "--out", str(tmp_path)])
    assert not [*tmp_path.iterdir()]


def test_without_a_hopper_gpu_it_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        verify_gpu.main(["--only", "suite", "--out", str(tmp_path)])
    assert "this torch finds no Hopper GPU" in capsys.readouterr().err


def test_a_rehearsal_is_never_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fuzz.py"
    script.write_text(STUB.replace("FAILURES", "[]"))
    monkeypatch.setattr(verify_gpu, "FUZZ", script)
    assert verify_gpu.main(["--only", "fuzz", "--out", str(tmp_path), "--cases", "5", "--rehearse"]) == 1
    part = json.loads((tmp_path / "fuzz.json").read_text())
    assert (part["complete"], part["passed"], part["cases"]) == (False, False, 5)
