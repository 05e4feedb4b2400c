"""Verifies the Hopper kernels on a GPU: the tests marked gpu, the fuzz, and compute-sanitizer over every kernel.

    python benchmarks/verify_gpu.py                                 all of it, into benchmarks/results/gpu_verified.json

or in parts, for a machine that gives a command little time (add --minutes 9, and the rest is recorded as cut short):

    python benchmarks/verify_gpu.py --only suite --out FOLDER
    python benchmarks/verify_gpu.py --only fuzz --out FOLDER
    python benchmarks/verify_gpu.py --only sanitize --out FOLDER
    python benchmarks/verify_gpu.py --merge FOLDER                  needs no GPU; several folders can be named

A part writes FOLDER/PART.json from its start on, complete false until its end, and PART.log. The record holds the hash
of the kernels as the library tells it; parts of different hashes are not merged, and a library that was not built from
the sources beside this script is refused. Nothing is left out silently: what --leave-out names, tests that skipped
themselves and files that could not be collected are told with their reasons, and with the last kind it is not verified.

The exit status is 0 only if what was run passed, all of it. Needs a Hopper GPU, a build with its kernels, the extra
`test` (without pytest-xdist the suite runs in one process), and compute-sanitizer of the CUDA toolkit. No git and no
compiler is needed; a package that is only copied, not installed, is found by PYTHONPATH.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gpu_verified import PARTS, RECORD, Part, RecordError, merged, read_parts
from jobs import Ended, run_jobs
from lite_attention.info import facts_of_run
from provenance import kernel_hash

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
FUZZ, SANITIZE = TESTS / "gpu" / "fuzz_sm90.py", TESTS / "gpu" / "sanitize_sm90.py"
HOPPER = (9, 0)
SANITIZERS = {
    "memcheck": [],
    "racecheck": [],
    "synccheck": [],
    # does not see what the copy engine stores (sanitize_sm90.py)
    "initcheck": ["--check-api-memory-access", "no"],
}
FOUND_STATUS = 86  # what compute-sanitizer is told to exit with if it finds something
FAILURES_TOLD = 200


@dataclass
class Run:
    """One part as it runs: its options, and its record, which lies on disk from the start."""

    options: argparse.Namespace
    name: str
    part: Part
    out: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def until(self) -> float:
        """When it has to end."""
        return float(self.options.until)

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"{time.monotonic() - self.began:5.0f} s  {self.name}: {text}", flush=True)

    def write(self, complete: bool = False, passed: bool = False, **results: Any) -> None:
        """What is known so far. Replaced as a whole, so that a kill leaves one or the other."""
        self.part |= {**results, "seconds": round(time.monotonic() - self.began, 1)}
        complete = complete and not self.options.rehearse
        self.part |= {"complete": complete, "passed": complete and passed}
        path = self.out / f"{self.name}.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(self.part, indent=1) + "\n")
        draft.replace(path)

    def jobs(self, commands: dict[str, list[str]], at_once: int, heartbeat: Callable[[], None]) -> dict[str, Ended]:
        """Run commands into the part's log."""
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        return run_jobs(
            commands,
            self.out / f"{self.name}.log",
            at_once=at_once,
            until=self.until,
            heartbeat=heartbeat,
            # Each process is one of many, and the oracle runs on the CPU.
            environment={"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_journal(path: Path) -> dict[str, Any]:
    """Results of the suite so far, from the lines of tests/support/journal.py."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tests = [test for line in lines for test in line.get("tests", ())]
    outcomes: dict[str, tuple[str, str]] = {}
    for line in lines:
        if "test" in line and outcomes.get(line["test"], ("passed", ""))[0] != "failed":
            outcomes[line["test"]] = (line["outcome"], line["reason"])
    files = [line for line in lines if "file" in line]
    counts = Counter(outcome for outcome, _ in outcomes.values())
    skips = Counter(reason for outcome, reason in outcomes.values() if outcome == "skipped")
    return {
        "tests": len(tests),
        "passed_tests": counts["passed"],
        "failed_tests": counts["failed"],
        "skipped_tests": counts["skipped"],
        "tests_not_run": [test for test in tests if test not in outcomes],
        "failures": {test: reason for test, (outcome, reason) in outcomes.items() if outcome == "failed"},
        "skips": dict(skips.most_common()),
        "files_skipped": {line["file"]: line["reason"] for line in files if line["outcome"] == "skipped"},
        "files_not_collected": {line["file"]: line["reason"] for line in files if line["outcome"] == "failed"},
        "exit_status": next((line["exit_status"] for line in lines if "exit_status" in line), None),
    }


def suite(run: Run) -> None:
    """The tests marked gpu, in several processes."""
    workers = run.options.workers if version_of("pytest-xdist") else 0
    run.part["tools"] = {name: version_of(name) for name in ("pytest", "pytest-xdist", "pytest-timeout")}
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "support.journal", f"--journal={journal}"]
        command += ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
        command += ["-n", str(workers), "--dist", "worksteal"] if workers else []
        command += [f"--{'deselect' if '::' in name else 'ignore'}={name}" for name in run.options.leave_out]
        command += run.options.tests
        run.part |= {"selection": "-m gpu", "workers": workers, "left_out_on_request": run.options.leave_out}
        run.part["tests_named"] = run.options.tests

        def progress() -> None:
            so_far = read_journal(journal)
            done = so_far["passed_tests"] + so_far["failed_tests"] + so_far["skipped_tests"]
            run.say(f"{done} of {so_far['tests'] or '?'} tests, {so_far['failed_tests']} failed")
            run.write(**so_far)

        run.write()
        ended = run.jobs({"suite": command}, 1, progress)["suite"]
        results = read_journal(journal)
    stopped = ended.status is None or results["exit_status"] is None
    complete = not (stopped or results["tests_not_run"] or results["files_not_collected"] or run.options.tests)
    for test, reason in results["failures"].items():
        run.say(f"FAILED {test}: {reason}")
    for reason, count in Counter(results["files_not_collected"].values()).items():
        run.say(f"NOT COLLECTED {count} files: {reason}")
    if stopped:
        print(*ended.lines[-30:], sep="\n")
    run.write(complete, results["passed_tests"] > 0 and ended.status == 0, **results)


def shares(total: int, processes: int) -> list[tuple[int, int]]:
    """`(first, count)` of each process's cases."""
    edges = [total * index // processes for index in range(processes + 1)]
    return [(first, after - first) for first, after in itertools.pairwise(edges) if after > first]


def read_fuzz(paths: Sequence[Path]) -> dict[str, Any]:
    """Results of the fuzz's processes together."""
    summaries = [json.loads(path.read_text()) for path in paths if path.exists()]

    def together(name: str) -> dict[str, int]:
        return dict(sum((Counter(summary[name]) for summary in summaries), Counter[str]()))

    failures = [failure for summary in summaries for failure in summary["failures"]]
    cases = together("cases")
    return {
        "cases": sum(cases.values()),
        "cases_of": cases,
        "cases_with": together("with"),
        "visited_tiles": sum(summary["visited_tiles"] for summary in summaries),
        "tiles_too_close_to_call": sum(summary["tiles_too_close_to_call"] for summary in summaries),
        "failed_cases": len(failures),
        "failures": failures[:FAILURES_TOLD],
    }


def fuzz(run: Run) -> None:
    """Random problems against the oracle, in several processes, each with its own cases of one sequence."""
    seed = run.options.seed
    if seed is None:
        seed = int(run.part["kernel_hash"], 16) % 2**31  # other kernels, other cases
    run.part |= {"tools": {}, "seed": seed, "cases_asked": run.options.cases, "processes": run.options.fuzz_workers}
    with tempfile.TemporaryDirectory() as folder:
        commands, outputs = {}, {}
        for first, count in shares(run.options.cases, run.options.fuzz_workers):
            name = f"{first}"
            outputs[name] = Path(folder) / f"{first}.json"
            commands[name] = [sys.executable, str(FUZZ), f"--seed={seed}", f"--first={first}", f"--cases={count}"]
            commands[name] += [f"--output={outputs[name]}", *(["--device=cpu"] if run.options.rehearse else [])]

        def progress() -> None:
            so_far = read_fuzz([*outputs.values()])
            run.say(f"{so_far['cases']} of {run.options.cases} cases, {so_far['failed_cases']} failed")
            run.write(**so_far)

        run.write()
        ended = run.jobs(commands, len(commands), progress)
        results = read_fuzz([*outputs.values()])
    statuses = {name: end.status for name, end in ended.items()}
    for name, end in ended.items():
        if end.status not in (0, None):
            run.say(f"process {name} ended with {end.status}:")
            print(*[line for line in end.lines if not line[:1].isdigit()][-12:], sep="\n")
    whole = None not in statuses.values() and results["cases"] == run.options.cases
    passed = not results["failures"] and not any(statuses.values())
    run.write(whole, passed, **results, exit_statuses=statuses)


def read_sanitizer(lines: Sequence[str]) -> dict[str, Any]:
    """What a run of compute-sanitizer over sanitize_sm90.py said."""
    launches = [int(match[1]) for line in lines if (match := re.fullmatch(r"(\d+) launches, all values right", line))]
    summaries = [line.strip("= ") for line in lines if " SUMMARY: " in line]
    return {
        "launches": sum(launches),
        "summaries": summaries,
        "clean": bool(launches) and bool(summaries) and all(re.search(r"SUMMARY: 0 ", line) for line in summaries),
    }


def sanitize(run: Run) -> None:
    """A few small launches through every kernel under each of compute-sanitizer's tools, in several processes each."""
    program = run.options.sanitizer or shutil.which("compute-sanitizer")
    if program is None:
        raise SystemExit("compute-sanitizer is not on PATH: name it by --sanitizer")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    told = re.search(r"[Vv]ersion (\S+)", done.stdout)
    run.part["tools"] = {"compute-sanitizer": told[1] if told else None}
    processes = run.options.sanitize_workers
    # the slow tool first
    commands = {
        f"{tool} {share}": [
            *(program, "--tool", tool, *SANITIZERS[tool], f"--error-exitcode={FOUND_STATUS}"),
            *(sys.executable, str(SANITIZE), f"--share={share}/{processes}"),
        ]
        for tool in ("racecheck", "initcheck", "memcheck", "synccheck")
        for share in range(processes)
    }
    run.write(processes=processes)
    ended = run.jobs(commands, len(commands), lambda: run.say("..."))
    results: dict[str, Any] = {}
    for tool in SANITIZERS:
        told_by = {name: read_sanitizer(end.lines) for name, end in ended.items() if name.split()[0] == tool}
        of_tool = [ended[name] for name in told_by]
        results[tool] = {
            "launches": sum(one["launches"] for one in told_by.values()),
            "summaries": dict(Counter(line for one in told_by.values() for line in one["summaries"])),
            "exit_statuses": [end.status for end in of_tool],
            "seconds": max(end.seconds for end in of_tool),
            "clean": all(one["clean"] and ended[name].status == 0 for name, one in told_by.items()),
        }
        run.say(f"{tool}: {'clean' if results[tool]['clean'] else 'NOT CLEAN'}, {results[tool]}")
        for name in told_by:
            if not (told_by[name]["clean"] and ended[name].status == 0):
                print(f"[{name}]", *ended[name].lines[-12:], sep="\n")
    same = len({result["launches"] for result in results.values()}) == 1  # the tools watch the same ones
    complete = all(end.status is not None for end in ended.values())
    run.write(complete, same and all(results[tool]["clean"] for tool in SANITIZERS), sanitizers=results)


RUN = {"suite": suite, "fuzz": fuzz, "sanitize": sanitize}


def start(options: argparse.Namespace, name: str) -> Run:
    """A part's record with the facts that all parts hold. Refuses kernels other than those of these sources."""
    facts = facts_of_run(f"python benchmarks/verify_gpu.py --only {name}", on_gpu=not options.rehearse)
    sources = kernel_hash()
    if facts["kernel_hash"] != sources:
        raise SystemExit(
            f"the library was built from the kernels {facts['kernel_hash']}, the sources beside this script are "
            f"{sources}: build it again"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    return Run(options, name, {"part": name, "complete": False, "passed": False, **facts}, options.out)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=PARTS, help="one part, written to --out")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="of the parts and logs; needed with --only")
    made.add_argument(
        "--merge", type=Path, nargs="+", metavar="FOLDER", help="make the record of parts, and run nothing"
    )
    made.add_argument(
        "--record", type=Path, default=RECORD, metavar="FILE", help="what is written (default %(default)s)"
    )
    made.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this time; what is not done is cut short"
    )
    made.add_argument(
        "--rehearse", action="store_true", help="the same steps without the GPU; the record is never complete"
    )
    made.add_argument("--workers", type=int, default=12, help="processes of the suite (default %(default)s)")
    made.add_argument(
        "--leave-out", action="append", default=[], metavar="TEST", help="a file or test; the record tells it"
    )
    made.add_argument(
        "--tests", nargs="+", default=[], metavar="TEST", help="only these, to try; the part is not complete"
    )
    made.add_argument("--cases", type=int, default=10_000, help="of the fuzz (default %(default)s)")
    made.add_argument("--seed", type=int, help="of the fuzz (by default it follows from the hash of the kernels)")
    made.add_argument("--fuzz-workers", type=int, default=6, help="processes of the fuzz (default %(default)s)")
    made.add_argument(
        "--sanitize-workers", type=int, default=3, help="processes of each sanitizer (default %(default)s)"
    )
    made.add_argument("--sanitizer", metavar="PROGRAM", help="compute-sanitizer, if it is not on PATH")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script; 0 if everything that was asked for is complete and passed."""
    options = parser().parse_args(arguments)
    options.until = time.monotonic() + 60 * options.minutes
    if options.merge is None:
        if options.only and options.out is None:
            parser().error("--only needs --out, the folder for its record")
        if not options.rehearse and not (torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER):
            parser().error("this torch finds no Hopper GPU (compute capability 9.0)")
        options.out = options.out or ROOT / "report" / "verify_gpu"
        for name in [options.only] if options.only else PARTS:
            run = start(options, name)
            RUN[name](run)
            run.say(f"{'passed' if run.part['passed'] else 'NOT PASSED'}, wrote {run.out / name}.json")
            if options.only:
                return 0 if run.part["passed"] else 1
    try:
        record = merged(read_parts(options.merge or [options.out]))
    except RecordError as error:
        parser().error(str(error))
    options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.record}: verified {record['verified']}, kernels {record['kernel_hash']}")
    for name in ("missing", "cut_short", "failed"):
        if record[name]:
            print(f"  {name.replace('_', ' ')}: {', '.join(record[name])}")
    return 0 if record["verified"] else 1


if __name__ == "__main__":
    sys.exit(main())
