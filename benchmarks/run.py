"""One run of a GPU benchmark: what it was made with, its progress, and its record, which grows on disk."""

import datetime
import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import peers
from attention_record import Row
from cpu_attention import git_revision
from lite_attention.info import report
from sustained import Telemetry

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16


def reason(error: Exception) -> str:
    """An error in one line; some of torch's fill pages."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


class Run:
    """What a benchmark measures with, and its record."""

    def __init__(self, name: str, output: Path, seconds: float, revision: str | None, telemetry: Telemetry) -> None:
        self.seconds = seconds
        self.started = time.perf_counter()
        self.telemetry = telemetry
        gpu = torch.cuda.get_device_name()
        self.path = output / f"{name}_{gpu.split()[1].lower()}.json"
        environment = report()
        if revision is None:
            revision = git_revision() if shutil.which("git") else "unknown"
        self.record: dict[str, Any] = {
            "command": f"python benchmarks/{name}.py",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            # without a checkout, the revision that the package was built from
            "revision": environment["revision"] if revision == "unknown" else revision,
            "gpu": gpu,
            "driver": self.telemetry.driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "fa3": peers.fa3_version(),
            "environment": environment,
            "dtype": str(DTYPE).removeprefix("torch."),
            "seconds_per_loop": seconds,
            "absent": {},
            "failures": [],
        }

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"{time.perf_counter() - self.started:5.0f} s  {text}", flush=True)

    def block(self, part: str, measure: Callable[..., Row], *arguments: object) -> None:
        """Add the row that `measure` returns to a part of the record; a failure is recorded and the run goes on."""
        name = " ".join(map(str, arguments))
        self.say(f"{part} {name}")
        try:
            self.record.setdefault(part, []).append(measure(*arguments))
        except Exception as error:
            self.record["failures"].append({"part": part, "block": name, "error": reason(error)})
            self.say(f"FAILED {part} {name}: {reason(error)}")
        self.record["wall_seconds"] = round(time.perf_counter() - self.started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")
        gc.collect()  # models are full of cycles
        torch.cuda.empty_cache()
