"""Measures on a GPU everything that the README's tables show, and turns the records into its tables.

    python benchmarks/measure_gpu.py --out FOLDER                   all of one GPU's tables

or in parts, for a machine that gives a command little time (add --minutes 9; what is cut short is not used):

    python benchmarks/measure_gpu.py --only attention,sparse_families,video_dit --out FOLDER    6 minutes
    python benchmarks/measure_gpu.py --only whole_model_720p --out FOLDER                       6 minutes
    python benchmarks/measure_gpu.py --only whole_model_480p --out FOLDER                       3 minutes
    python benchmarks/measure_gpu.py --only sequence_parallel --out FOLDER                      4 minutes, several GPUs

and then, anywhere, with the folders of all parts:

    python benchmarks/measure_gpu.py --merge FOLDER [FOLDER ...]

writes benchmarks/results/NAME_CARD.json, the plots beside them, and every table of README.md and docs/. Records of one
name and card have to be of the same kernels, GPU, driver and torch.

Everything is measured beside FlashAttention-3 in the same run, in loops long enough for the clock to settle, clock and
power in the record. Needs a Hopper GPU with no other work on it, a build with its kernels, nvidia-ml-py, the wheel
fa3-fwd, diffusers for the whole model, what the demo needs, and yunchang for several GPUs; what is missing is told
before any measurement begins. A part writes FOLDER/PART/NAME_CARD.json and FOLDER/measure_PART.log.
"""

import argparse
import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jobs import run_jobs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO = "examples/video_dit/demo.py"


class Part(NamedTuple):
    """One command, what it imports besides the package, and its usual length on an H200."""

    name: str  # of the record
    script: str
    options: tuple[str, ...]
    modules: tuple[str, ...]
    seconds: int
    default: bool = True


PEERS = ("pynvml", "fa3_fwd_interface")
PARTS = {
    "attention": Part("attention", "benchmarks/attention.py", ("--seconds=1",), PEERS, 215),
    "sparse_families": Part("sparse_families", "benchmarks/sparse_families.py", ("--seconds=0.6",), PEERS, 120),
    "video_dit": Part(
        "video_dit", DEMO, ("--comparison-steps=0",), ("matplotlib", "numpy", "PIL", "safetensors", "tqdm"), 30
    ),
    **{
        f"whole_model_{size}": Part(
            "whole_model",
            "benchmarks/whole_model.py",
            ("--seconds=0.7", f"--resolutions={size}"),
            (*PEERS, "diffusers"),
            seconds,
        )
        for size, seconds in (("480p", 180), ("720p", 330))
    },
    "sequence_parallel": Part(
        "sequence_parallel",
        "benchmarks/sequence_parallel.py",
        ("--seconds=0.5",),
        (*PEERS, "diffusers", "yunchang"),
        220,
        default=False,
    ),
}
# What records of one name and card have in common if they can stand in one table.
SAME = ("kernel_hash", "gpu", "driver", "torch", "cuda", "seconds_per_loop", "fa3", "diffusers")
ONCE = ("cublas", "host")  # parts that each run of a benchmark begins with


def card(gpu: str) -> str:
    """A GPU's short name, as in the names of files: `h100` of `NVIDIA H100 80GB HBM3`."""
    return gpu.split()[1].lower()


def missing(parts: Sequence[str]) -> list[str]:
    """Which modules that the parts import are not there, and why."""
    told = []
    for module in dict.fromkeys(module for part in parts for module in PARTS[part].modules):
        try:
            importlib.import_module(module)
        except Exception as error:  # a wheel for another torch fails in its own ways
            told.append(f"{module} ({type(error).__name__}: {error})")
    return told


def command_of(part: str, folder: Path) -> list[str]:
    """The command line of a part, whose records go below a folder."""
    _, script, options, *_ = PARTS[part]
    command = [sys.executable, str(ROOT / script), *options]
    if script == DEMO:
        record = folder / f"video_dit_{card(torch.cuda.get_device_name())}.json"
        return [*command, f"--record={record}", f"--out={Path(tempfile.gettempdir()) / 'demo.html'}"]
    return [*command, f"--output={folder}"]


def measure(parts: Sequence[str], out: Path, until: float) -> int:
    """Run the parts one after another; 1 if one failed or was cut short. Each part's records have their own folder."""
    status, began = 0, time.monotonic()
    for part in parts:
        folder = out / part
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            old.unlink()

        def heartbeat(part: str = part) -> None:
            print(f"{time.monotonic() - began:5.0f} s  {part} ...", flush=True)

        log = out / f"measure_{part}.log"
        ended = run_jobs({part: command_of(part, folder)}, log, at_once=1, until=until, heartbeat=heartbeat)[part]
        print(*ended.lines[-45:], sep="\n")
        told = "was cut short" if ended.status is None else f"ended with {ended.status}"
        print(f"{time.monotonic() - began:5.0f} s  {part} {told} after {ended.seconds:.0f} s", flush=True)
        status |= ended.status != 0
    return status


def step(row: dict[str, Any]) -> tuple[str, str]:
    """Which step of which model a row of whole_model is of."""
    return row["model"]["name"], row["clip"]["name"]


def merged(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several of a name and card: of whole_model, whose steps are measured in parts, else of one."""
    whole = dict(records[0])
    for record in records:
        if not record.get("complete", True):
            raise ValueError(f"{name}: the record of {record['date']} was cut short; measure it again")
        if record.get("failures"):
            raise ValueError(f"{name}: the record of {record['date']} holds failures: {record['failures']}")
    for record in records[1:]:
        for fact in SAME:
            if record.get(fact) != whole.get(fact):
                raise ValueError(
                    f"{name}: {fact} is {whole.get(fact)!r} in one part and {record.get(fact)!r} in another"
                )
        if not record.get("steps") or any(step(row) in map(step, whole["steps"]) for row in record["steps"]):
            raise ValueError(f"{name}: two records of the same, of {whole['date']} and {record['date']}; expected one")
        for key, value in record.items():
            if key in whole and isinstance(value, list) and key not in (*ONCE, "modes", "failures"):
                whole[key] = [*whole[key], *value]
        whole["date"] = max(whole["date"], record["date"])
        whole["wall_seconds"] = whole["wall_seconds"] + record["wall_seconds"]
    return whole


def merge(folders: Sequence[Path], results: Path) -> list[Path]:
    """Write the records that lie in folders, or one folder down, to the results; returns their paths."""
    by_file: dict[str, list[dict[str, Any]]] = {}
    names = {part.name for part in PARTS.values()}
    for path in sorted(path for folder in folders for path in folder.rglob("*.json")):
        if path.stem.rpartition("_")[0] in names:
            by_file.setdefault(path.name, []).append(json.loads(path.read_text()))
    if not by_file:
        raise ValueError(f"no records in {', '.join(map(str, folders))}")
    written = {results / file: merged(file, records) for file, records in by_file.items()}
    for path, record in written.items():
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}: {record['gpu']}, kernels {record['kernel_hash']}")
    return [*written]


def parse_parts(text: str) -> list[str]:
    """Comma-separated parts."""
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {','.join(PARTS)}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [name for name, part in PARTS.items() if part.default]
    parser.add_argument("--only", type=parse_parts, default=parts, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the records and logs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FOLDER", help="make records, plots and tables of parts"
    )
    options = parser.parse_args(arguments)
    if options.merge:
        try:
            paths = merge(options.merge, RESULTS)
        except ValueError as error:
            parser.error(str(error))
        for path in paths:
            if not path.name.startswith("video_dit"):
                subprocess.run([sys.executable, str(ROOT / "benchmarks" / "plots.py"), str(path)], check=True)
        return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "readme_tables.py")], check=False).returncode
    if options.out is None:
        parser.error("--out is missing: the folder for the records")
    if not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device")
    if told := missing(options.only):
        parser.error(f"cannot be imported: {'; '.join(told)}")
    print(f"about {sum(PARTS[part].seconds for part in options.only) / 60:.0f} minutes on an H200", flush=True)
    return measure(options.only, options.out, time.monotonic() + 60 * options.minutes)


if __name__ == "__main__":
    sys.exit(main())
