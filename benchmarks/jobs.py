"""Commands side by side, their output in one log, until all are done or the time is over."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "run_jobs"]

HEARTBEAT_SECONDS = 15.0
KILL_AFTER_SECONDS = 5.0


@dataclass(frozen=True)
class Ended:
    """How a command ended, and its output's lines."""

    status: int | None  # None: it was stopped, or never started, because the time was over
    seconds: float
    lines: list[str]


def _stop(process: subprocess.Popen[str]) -> None:
    """End a process and those it started."""
    for number, wait in ((signal.SIGTERM, KILL_AFTER_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)  # of its own session
            process.wait(wait)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_jobs(
    commands: Mapping[str, Sequence[str]],
    log: Path,
    *,
    at_once: int,
    until: float,
    heartbeat: Callable[[], None],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Ended]:
    """Run named commands, `at_once` of them at a time, until `time.monotonic()` reaches `until`.

    Every line goes to the log behind its command's name; `heartbeat` is called every few seconds.
    """
    lock, over = threading.Lock(), threading.Event()
    running: list[subprocess.Popen[str]] = []

    with log.open("w") as file:

        def run(name: str, command: Sequence[str]) -> Ended:
            began = time.monotonic()
            lines: list[str] = []
            with lock:
                if over.is_set():
                    return Ended(None, 0.0, lines)
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                    start_new_session=True,
                )
                running.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                with lock:
                    file.write(f"[{name}] {line}")
                    file.flush()
            status = process.wait()
            with lock:
                running.remove(process)
                return Ended(None if over.is_set() else status, round(time.monotonic() - began, 1), lines)

        def stop_all() -> None:
            with lock:
                over.set()
                left = [*running]
            for process in left:
                _stop(process)

        with ThreadPoolExecutor(at_once) as pool:
            futures = {name: pool.submit(run, name, command) for name, command in commands.items()}
            try:
                next_beat = time.monotonic() + HEARTBEAT_SECONDS
                while not all(future.done() for future in futures.values()):
                    time.sleep(0.1)
                    if time.monotonic() >= until:
                        stop_all()
                        break
                    if time.monotonic() >= next_beat:
                        heartbeat()
                        next_beat += HEARTBEAT_SECONDS
            except BaseException:  # an interrupt leaves no process behind
                stop_all()
                raise
            return {name: future.result() for name, future in futures.items()}
