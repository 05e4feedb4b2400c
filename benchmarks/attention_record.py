"""The record of benchmarks/attention.py: its names, its rows with the ratios in them, and a short summary."""

import statistics
from collections.abc import Sequence
from typing import Any

Loop = dict[str, Any]
Row = dict[str, Any]

ATTENTION, SKIP_ATTENTION, CUBLAS = "attention", "skip_attention", "cuBLAS"
FA3, CUDNN, FLEX = "FlashAttention-3", "cuDNN SDPA", "FlexAttention"
OURS = (ATTENTION, SKIP_ATTENTION)

# What a loop computes: everything, or the tiles of a keep map (keep_maps.py says how each pattern is drawn).
DENSE = "dense"
CONTIGUOUS, SCATTERED, UNEQUAL, PER_TILE = "contiguous", "scattered", "unequal", "scattered per query tile"
PATTERNS = (CONTIGUOUS, SCATTERED, UNEQUAL, PER_TILE)
PATTERNS_WITH_GOAL = (CONTIGUOUS, SCATTERED, UNEQUAL)


def times(loops: Sequence[Loop], kernel: str) -> list[float]:
    """Milliseconds of every loop of a kernel."""
    return [loop["ms"] for loop in loops if loop["kernel"] == kernel]


def ratio(above: Sequence[float], below: Sequence[float]) -> float | None:
    """Mean / mean, or None where one of them was not measured."""
    return statistics.fmean(above) / statistics.fmean(below) if above and below else None


def spread(values: Sequence[float]) -> float | None:
    """(largest - smallest) / mean of repeated loops, or None without any."""
    return (max(values) - min(values)) / statistics.fmean(values) if values else None


def dense_row(shape: Row, goal: float | None, loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """Dense attention of one shape; goal is the least rate over FlashAttention-3's."""
    fa3 = times(loops, FA3)
    return {
        "shape": shape,
        "rate_over_fa3": ratio(fa3, times(loops, ATTENTION)),
        "goal": goal,
        "fa3_spread": spread(fa3),
        "absent": absent,
        "loops": list(loops),
    }


def skip_row(shape: Row, goal: float, loops: Sequence[Loop]) -> Row:
    """Our call that drops nothing against our dense call; goal is the most time over it."""
    dense = times(loops, ATTENTION)
    return {
        "shape": shape,
        "time_over_dense": ratio(times(loops, SKIP_ATTENTION), dense),
        "goal": goal,
        "dense_spread": spread(dense),
        "loops": list(loops),
    }


def density_row(shape: Row, density: float, goal: float | None, loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """One shape and density. Every loop but FlashAttention-3's is a point.

    Its `time_over_proportional` is its time over its real density times FlashAttention-3's dense time; goal is the most
    that this may be.
    """
    fa3 = times(loops, FA3)
    points = []
    for loop in loops:
        if loop["kernel"] == FA3:
            continue
        over = ratio([loop["ms"]], fa3)
        has_goal = loop["kernel"] in OURS and loop["pattern"] in PATTERNS_WITH_GOAL
        points.append(
            {
                **loop,
                "time_over_fa3": over,
                "time_over_proportional": None if over is None else over / loop["density"],
                "goal": goal if has_goal else None,
            }
        )
    return {
        "shape": shape,
        "density": density,
        "fa3_ms": statistics.fmean(fa3) if fa3 else None,
        "fa3_spread": spread(fa3),
        "absent": absent,
        "points": points,
    }


def rate(row: Row, kernel: str) -> float | None:
    """Mean TFLOP/s of a kernel's loops in a dense row."""
    found = [loop["tflops"] for loop in row["loops"] if loop["kernel"] == kernel]
    return statistics.fmean(found) if found else None


def point(row: Row, kernel: str, pattern: str) -> Row | None:
    """The point of a density row, if it was measured."""
    return next((one for one in row["points"] if (one["kernel"], one["pattern"]) == (kernel, pattern)), None)


def _cell(value: float | None, form: str, goal: float | None = None, more_is_better: bool = False) -> str:
    if value is None:
        return "-"
    missed = goal is not None and (value < goal if more_is_better else value > goal)
    return format(value, form) + ("!" if missed else "")


def _density_cell(row: Row, kernel: str, pattern: str) -> str:
    found = point(row, kernel, pattern)
    return "-" if found is None else _cell(found["time_over_proportional"], ".3f", found["goal"])


def summary(record: dict[str, Any]) -> str:
    """The run in at most 40 lines; '!' marks what misses its goal."""
    lines = [f"{record['gpu']}, torch {record['torch']}, kernels {record['kernel_hash']}"]
    lines += [f"{row['kernel']} {row['size']}^3: {row['tflops']:.0f} TFLOP/s" for row in record.get("cublas", [])]
    skip = {row["shape"]["name"]: row for row in record.get("skip", [])}
    if "dense" in record:
        lines.append(
            f"{'':<20}{'TFLOP/s':>8}{'FA3':>6}{'cuDNN':>6}{'rate / FA3':>12}{'FA3 spread':>12}{'skip/dense':>12}"
        )
    for row in record.get("dense", []):
        name = row["shape"]["name"]
        beside = skip.get(name)
        lines.append(
            f"{name:<20}{_cell(rate(row, ATTENTION), '.0f'):>8}{_cell(rate(row, FA3), '.0f'):>6}"
            f"{_cell(rate(row, CUDNN), '.0f'):>6}{_cell(row['rate_over_fa3'], '.3f', row['goal'], True):>12}"
            f"{_cell(row['fa3_spread'], '.3f'):>12}"
            f"{'-' if beside is None else _cell(beside['time_over_dense'], '.3f', beside['goal']):>12}"
        )
    if "density" in record:
        header = f"{'contiguous':>11}{'scattered':>11}{'skip':>8}{'unequal':>9}{'per tile':>10}"
        lines.append(f"{'time / (density * FA3)':<25}{header}")
    for row in record.get("density", []):
        lines.append(
            f"{row['shape']['name']:<20}{row['density']:>5.0%}{_density_cell(row, ATTENTION, CONTIGUOUS):>11}"
            f"{_density_cell(row, ATTENTION, SCATTERED):>11}{_density_cell(row, SKIP_ATTENTION, SCATTERED):>8}"
            f"{_density_cell(row, ATTENTION, UNEQUAL):>9}{_density_cell(row, ATTENTION, PER_TILE):>10}"
        )
    for row in record.get("host", []):
        for name, modes in row["microseconds"].items():
            goal = None if name == FA3 else row["goal"]
            figures = ", ".join(f"{mode} {_cell(value, '.1f', goal)}" for mode, value in modes.items())
            lines.append(f"host time, us: {name}: {figures}")
    lines += [f"absent: {name}: {reason}" for name, reason in record["absent"].items()]
    lines += [f"FAILED {one['part']} {one['block']}: {one['error']}"[:150] for one in record["failures"]]
    return "\n".join(lines)
