"""The record of benchmarks/verify_gpu.py: its parts, what makes one whole, and whether it speaks for these sources."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PARTS", "RECORD", "Part", "RecordError", "merged", "objection", "read_parts"]

Part = dict[str, Any]

PARTS = ("suite", "fuzz", "sanitize")
RECORD = Path(__file__).parent / "results" / "gpu_verified.json"
FACTS = ("kernel_hash", "revision", "date", "gpu", "driver", "torch", "cuda", "python", "environment", "tools")
RERUN = "python benchmarks/verify_gpu.py"


class RecordError(ValueError):
    """Parts that do not belong together."""


def read_parts(folders: Sequence[Path]) -> list[Part]:
    """Every part that lies in the folders."""
    paths = [path for folder in folders for part in PARTS if (path := folder / f"{part}.json").exists()]
    if not paths:
        expected = ", ".join(f"{part}.json" for part in PARTS)
        raise RecordError(f"no parts in {', '.join(map(str, folders))}: expected {expected}")
    return [json.loads(path.read_text()) for path in paths]


def merged(parts: Sequence[Part]) -> dict[str, Any]:
    """One record of several parts, all of the same kernels: verified if none is missing, cut short or failed."""
    by_name: dict[str, Part] = {}
    for part in parts:
        if part["part"] in by_name:
            raise RecordError(f"two records of the part {part['part']}: expected one")
        by_name[part["part"]] = part
    hashes = {part["part"]: part["kernel_hash"] for part in parts}
    if len({*hashes.values()}) != 1:
        told = ", ".join(f"{name} {value}" for name, value in hashes.items())
        raise RecordError(f"the parts are of different kernels ({told}): expected one hash")
    missing = [name for name in PARTS if name not in by_name]
    cut_short = [name for name in PARTS if name in by_name and not by_name[name]["complete"]]
    failed = [name for name in PARTS if name in by_name and not by_name[name]["passed"]]
    ordered = {name: by_name[name] for name in PARTS if name in by_name}
    return {
        "command": RERUN,
        "verified": not (missing or cut_short or failed),
        "complete": not (missing or cut_short),
        "missing": missing,
        "cut_short": cut_short,
        "failed": [name for name in failed if name not in cut_short],
        **{name: _common(name, ordered) for name in FACTS},
        **ordered,
    }


def _common(name: str, parts: Mapping[str, Part]) -> Any:
    """A fact of all parts: the one value, the latest date, all tools, or each different value once."""
    values = [part[name] for part in parts.values()]
    if name == "date":
        return max(values)
    if name == "tools":
        return {tool: version for tools in values for tool, version in tools.items()}
    different = [value for index, value in enumerate(values) if value not in values[:index]]
    return different[0] if len(different) == 1 else different


def objection(record: Mapping[str, Any] | None, kernels: str) -> str | None:
    """Why a record does not say that kernels of this hash were verified on a GPU, and what to run; None if it does."""
    rerun = f"run `{RERUN}` on a Hopper GPU with a build of these sources, and commit {RECORD.name}"
    if record is None:
        return f"no run on a GPU is recorded for the kernels {kernels}: {rerun}"
    if record["kernel_hash"] != kernels:
        return f"the kernels are {kernels}, those verified on a GPU were {record['kernel_hash']}: {rerun}"
    if record["verified"] is not True:
        why = [f"{name} {', '.join(record[name])}" for name in ("missing", "cut_short", "failed") if record[name]]
        return f"the run on a GPU of the kernels {kernels} did not pass ({'; '.join(why)}): mend it and {rerun}"
    return None
