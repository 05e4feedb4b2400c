"""A pytest plugin that writes what happens, as it happens, as lines of JSON: `pytest -p support.journal --journal FILE`.

A run that is killed leaves what it had done. One line tells how many tests there are to run and how many were deselected,
one each test's outcome, one each file that could not be collected or skipped itself, and the last one, with the exit
status, that the run came to its end. Works with and without pytest-xdist, whose workers write nothing.

xdist cuts the tests into one run of neighbours for each worker. Those that compile for a minute lie together, so they are
dealt out first, like cards.
"""

import json
from pathlib import Path
from typing import Any

import pytest

__all__: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="write every outcome to this file, as lines of JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--journal")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Journal(path), "journal of outcomes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--journal") is not None and hasattr(config, "workerinput"):
        workers = config.workerinput["workercount"]
        items[:] = [item for first in range(workers) for item in items[first::workers]]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test failed or was skipped, in one line."""
    text: Any = report.longrepr
    if report.skipped and isinstance(text, tuple):
        return str(text[2]).removeprefix("Skipped: ")
    crash = getattr(text, "reprcrash", None)
    lines = (crash.message if crash is not None else str(text)).strip().splitlines()
    told = (lines[0] if crash is not None else lines[-1]) if lines else ""
    return told.removeprefix("E").strip() if crash is None else told


class Journal:
    """Writes the lines, each at once."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.tests: set[str] = set()
        self.deselected = 0

    def write(self, **facts: object) -> None:
        self.file.write(json.dumps(facts) + "\n")
        self.file.flush()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += len(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # with xdist its workers have them
            self.write(tests=[item.nodeid for item in session.items], deselected=self.deselected)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        new = [test for test in ids if test not in self.tests]
        if new:  # once, and not for each worker
            self.tests.update(new)
            self.write(tests=new, deselected=None)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.write(file=report.nodeid, outcome=report.outcome, reason=_reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test is told once: by its call, or by what kept it from being called, and again if its end failed.
        if report.when == "call" or not report.passed:
            self.write(
                test=report.nodeid,
                outcome=report.outcome,
                reason="" if report.passed else _reason(report),
                seconds=round(report.duration, 2),
            )

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write(exit_status=int(exitstatus))
        self.file.close()
