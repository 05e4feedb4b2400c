"""One run of a GPU benchmark: what it was made with, its progress, and its record, which grows on disk."""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import peers
from attention_record import CUBLAS, Row
from lite_attention.info import facts_of_run
from sustained import Telemetry, sustained

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16
DEVICE = "cuda"
CUBLAS_SIZE = 8192
HEAT_SECONDS = 3.0  # brings the GPU to the clock that it keeps under load


def reason(error: Exception) -> str:
    """An error in one line; some of torch's fill pages."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


class Run:
    """What a benchmark measures with, and its record."""

    def __init__(
        self,
        name: str,
        output: Path,
        seconds: float,
        telemetry: Telemetry,
        gpu: str | None = None,
    ) -> None:
        """`gpu` names what is measured; by default the current CUDA device."""
        self.seconds = seconds
        self.started = time.perf_counter()
        self.telemetry = telemetry
        self.record: dict[str, Any] = {
            **facts_of_run(f"python benchmarks/{name}.py", on_gpu=gpu is None),
            "driver": self.telemetry.driver(),
            "cudnn": torch.backends.cudnn.version(),
            "fa3": peers.fa3_version(),
            "dtype": str(DTYPE).removeprefix("torch."),
            "seconds_per_loop": seconds,
            "absent": {},
            "failures": [],
            "complete": False,
        }
        self.record["gpu"] = self.record["gpu"] or gpu
        self.path = output / f"{name}_{self.record['gpu'].split()[1].lower()}.json"

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"{time.perf_counter() - self.started:5.0f} s  {text}", flush=True)

    def cublas(self) -> Row:
        """A plain matrix product, to place the others, on a GPU that is warm by then."""
        a, b = torch.randn(2, CUBLAS_SIZE, CUBLAS_SIZE, dtype=DTYPE, device=DEVICE)
        sustained(lambda: a @ b, HEAT_SECONDS, self.telemetry)
        loop = sustained(lambda: a @ b, self.seconds, self.telemetry)
        return {"kernel": CUBLAS, "size": CUBLAS_SIZE, "tflops": 2 * CUBLAS_SIZE**3 / loop.ms * 1e-9, **loop.facts()}

    def block(self, part: str, measure: Callable[..., Row], *arguments: object) -> None:
        """Add the row that `measure` returns to a part of the record; a failure is recorded and the run goes on."""
        name = " ".join(map(str, arguments))
        self.say(f"{part} {name}")
        try:
            self.record.setdefault(part, []).append(measure(*arguments))
        except Exception as error:
            self.record["failures"].append({"part": part, "block": name, "error": reason(error)})
            self.say(f"FAILED {part} {name}: {reason(error)}")
        self.write()
        gc.collect()  # models are full of cycles
        torch.cuda.empty_cache()

    def finish(self) -> None:
        """Write that all that was asked for was measured, or failed by name."""
        self.record["complete"] = True
        self.write()

    def write(self) -> None:
        """Write what is known so far."""
        self.record["wall_seconds"] = round(time.perf_counter() - self.started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")


def parse_some(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, which gives them in their own order."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {','.join(names)}")
        return [name for name in names if name in chosen]

    return parse


def parser_of_run(description: str | None) -> argparse.ArgumentParser:
    """The options that every run has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", default=RESULTS, help="folder of the record")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one timed loop")
    return parser


def parse_on_gpu(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a run on a GPU, its random numbers seeded."""
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device")
    torch.manual_seed(0)
    return arguments
