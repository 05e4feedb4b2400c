"""The record of benchmarks/sequence_parallel.py: its names, its rows with what follows from the times, a summary."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from attention_record import ATTENTION, DENSE, SKIP_ATTENTION, Loop, Row
from sparse_families_record import at_least, quotient

ONE_GPU = "one_gpu"  # every other part is compared with it
LAYER, BALANCE, MODEL, PEERS = "layer", "balance", "model", "peers"
PARTS = (LAYER, BALANCE, MODEL, PEERS)

ULYSSES, RING, USP = "Ulysses", "ring", "Ulysses and ring"
METHODS = (ULYSSES, RING, USP)
TEXTBOOK, YUNCHANG = "textbook Ulysses", "yunchang"

# Least share of the ideal: one GPU's time over the number of GPUs, or the mean of the ranks' own work.
DENSE_GOAL, SPARSE_GOAL = 0.95, 0.90


def method_of(ring: int, ulysses: int) -> str:
    """The name of a mesh of so many ranks."""
    if ring == 1:
        return ULYSSES
    return RING if ulysses == 1 else USP


def density_name(density: float) -> str:
    """A share of the tiles in a word."""
    return DENSE if density == 1 else f"{density:.0%}"


def kernel_of(density: float) -> str:
    """Our operator that computes such a share of the tiles."""
    return ATTENTION if density == 1 else SKIP_ATTENTION


def over_ranks(loops: Sequence[Loop]) -> Loop:
    """What the ranks measured of one call: the slowest one's time, all of them, the lowest clock, the mean power."""

    def known(name: str) -> list[float]:
        return [loop[name] for loop in loops if loop[name] is not None]

    return {
        "ms": max(loop["ms"] for loop in loops),
        "ms_by_rank": [loop["ms"] for loop in loops],
        "launches": loops[0]["launches"],
        "sm_clock_mhz": min(known("sm_clock_mhz"), default=None),
        "power_watts": statistics.fmean(known("power_watts")) if known("power_watts") else None,
    }


def one_gpu_row(shape: Row, loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """Every GPU alone, all at the same time; a loop's `mean_ms` is the mean over the GPUs."""
    rows = [{**loop, "mean_ms": statistics.fmean(loop["ms_by_rank"])} for loop in loops]
    return {"shape": shape, "absent": absent, "loops": rows}


def one_gpu_ms(record: dict[str, Any], kernel: str, density: float) -> float | None:
    """Time of one GPU alone, or None where it was not measured."""
    loops = [loop for row in record.get(ONE_GPU, []) for loop in row["loops"]]
    found = (loop["mean_ms"] for loop in loops if (loop["kernel"], loop["density"]) == (kernel, density))
    return next(found, None)


def efficiency(alone: float | None, ranks: int, together: float | None) -> float | None:
    """One GPU's time / (number of GPUs * their time together)."""
    return quotient(alone, None if together is None else ranks * together)


def case_row(ranks: int, density: float, alone: float | None, whole: Loop, **loops_and_facts: Any) -> Row:
    """One configuration at one density.

    `exchange` is a loop of the same call without its attention: transfers, copies and merges. `attention` is one of its
    attention alone. What the call takes longer than its attention is exposed.
    """
    exchange, attention = loops_and_facts["exchange"], loops_and_facts["attention"]
    return {
        "density": density,
        **loops_and_facts,
        "whole": whole,
        "speed_up": quotient(alone, whole["ms"]),
        "efficiency": efficiency(alone, ranks, whole["ms"]),
        "exchange_share": exchange["ms"] / whole["ms"],
        "exposed_share": 1 - attention["ms"] / whole["ms"],
    }


def layer_row(shape: Row, ring: int, ulysses: int, head_chunks: int, state: Row, cases: Sequence[Row]) -> Row:
    """One configuration of the attention layer; `state` compares the skip state with that of one GPU."""
    return {
        "shape": shape,
        "method": method_of(ring, ulysses),
        "ranks": ring * ulysses,
        "ring": ring,
        "ulysses": ulysses,
        "head_chunks": head_chunks,
        "state": state,
        "cases": list(cases),
    }


def balance_row(
    shape: Row, ranks: int, head_chunks: int, densities: Sequence[float], before: Row, after: Row, **facts: Any
) -> Row:
    """Heads of different density as they come and after they were balanced; both hold loops `whole` and `attention`.

    Ideal is the mean of the ranks' attention alone, with the heads as they come.
    """
    ideal = statistics.fmean(before["attention"]["ms_by_rank"])
    return {
        "shape": shape,
        "ranks": ranks,
        "head_chunks": head_chunks,
        "densities": list(densities),
        **facts,
        "ideal_ms": ideal,
        "before": {**before, "ideal_over_time": ideal / before["whole"]["ms"]},
        "after": {**after, "ideal_over_time": ideal / after["whole"]["ms"]},
    }


def work_balance(side: Row) -> float:
    """The mean of the ranks' attention over that of the busiest rank."""
    times: list[float] = side["attention"]["ms_by_rank"]
    return statistics.fmean(times) / max(times)


def model_row(model: Row, clip: Row, ring: int, ulysses: int, cases: Sequence[Row]) -> Row:
    """A denoising step on some GPUs; see model_case."""
    return {
        "model": model,
        "clip": clip,
        "method": method_of(ring, ulysses),
        "ranks": ring * ulysses,
        "ring": ring,
        "ulysses": ulysses,
        "cases": list(cases),
    }


def model_case(model: Row, density: float, step: Loop, first_layer: Loop, **facts: Any) -> Row:
    """A step of as many layers as the model has here, and one of its first layer alone.

    `projected_ms` is what all layers of the whole model would take at that time each; nothing was measured of it.
    """
    layers, whole_layers = model["layers"], model["whole_layers"]
    layer_ms = (step["ms"] - first_layer["ms"]) / (layers - 1)
    projected = first_layer["ms"] + layer_ms * (whole_layers - 1)
    return {
        "density": density,
        **facts,
        "step": step,
        "first_layer": first_layer,
        "ms_per_layer": layer_ms,
        "projected_ms": projected,
    }


def peer_row(shape: Row, peer: str, kernel: str, ring: int, ulysses: int, alone: float | None, **facts: Any) -> Row:
    """Another implementation, dense; `alone` is the time of its own kernel on one GPU.

    Where it is absent, its loop `whole` is None.
    """
    ranks = ring * ulysses
    together = None if facts["whole"] is None else facts["whole"]["ms"]
    return {
        "shape": shape,
        "peer": peer,
        "kernel": kernel,
        "method": method_of(ring, ulysses),
        "ranks": ranks,
        "ring": ring,
        "ulysses": ulysses,
        **facts,
        "efficiency": efficiency(alone, ranks, together),
    }


def measured_peers(record: dict[str, Any]) -> list[Row]:
    """Those that are not absent."""
    return [row for row in record.get(PEERS, []) if row["whole"] is not None]


def rank_counts(record: dict[str, Any]) -> list[int]:
    """The numbers of GPUs in the layer part."""
    return sorted({row["ranks"] for row in record.get(LAYER, [])})


def best_layer(record: dict[str, Any], ranks: int, method: str, density: float) -> tuple[Row, Row] | None:
    """The fastest configuration of a method: its row, and the case of that density."""
    found = [
        (row, case)
        for row in record.get(LAYER, [])
        for case in row["cases"]
        if (row["ranks"], row["method"], case["density"]) == (ranks, method, density)
    ]
    return min(found, key=lambda pair: float(pair[1]["whole"]["ms"]), default=None)


def densities(record: dict[str, Any]) -> list[float]:
    """Those of the layer part, the highest first."""
    return sorted({case["density"] for row in record.get(LAYER, []) for case in row["cases"]}, reverse=True)


def model_efficiency(record: dict[str, Any], row: Row, density: float, time: str = "step") -> float | None:
    """One GPU's step / (number of GPUs * theirs); `time` names the loop."""

    def ms(of: Row) -> float | None:
        return next((float(case[time]["ms"]) for case in of["cases"] if case["density"] == density), None)

    alone = next((ms(one) for one in record.get(MODEL, []) if one["ranks"] == 1), None)
    return efficiency(alone, row["ranks"], ms(row))


def peer_over_ours(record: dict[str, Any], row: Row) -> float | None:
    """A peer's time over that of our dense layer by the same method, in its fastest configuration."""
    ours = best_layer(record, row["ranks"], row["method"], 1.0)
    return None if ours is None else row["whole"]["ms"] / ours[1]["whole"]["ms"]


def goals(record: dict[str, Any]) -> Iterator[Row]:
    """Ulysses in its fastest configuration, dense and sparse, and heads of different density after balancing."""
    for ranks in rank_counts(record):
        for density in densities(record):
            found = best_layer(record, ranks, ULYSSES, density)
            bound = DENSE_GOAL if density == 1 else SPARSE_GOAL
            value = None if found is None else found[1]["efficiency"]
            yield at_least(f"efficiency of {ULYSSES}, {density_name(density)}, {ranks} GPUs", value, bound)
    for row in record.get(BALANCE, []):
        name = f"mean / busiest GPU's attention, balanced heads, {row['ranks']} GPUs"
        yield at_least(name, work_balance(row["after"]), SPARSE_GOAL)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _method(row: Row) -> str:
    chunks = "" if row["head_chunks"] == 1 else f", {row['head_chunks']} chunks"
    return f"{row['method']}{chunks}"


def _layer_lines(record: dict[str, Any]) -> Iterator[str]:
    yield f"{'GPUs, method':<28}{'tiles':>7}{'ms':>10}{'attention':>11}{'exchange':>10}{'exposed':>9}{'efficiency':>12}"
    for row in record.get(LAYER, []):
        for case in row["cases"]:
            yield (
                f"{row['ranks']} {_method(row):<26}{density_name(case['density']):>7}{case['whole']['ms']:>10.3f}"
                f"{case['attention']['ms']:>11.3f}{case['exchange']['ms']:>10.3f}{case['exposed_share']:>9.1%}"
                f"{_percent(case['efficiency']):>12}"
            )


def summary(record: dict[str, Any]) -> str:
    """The run in a line for each configuration, and its goals."""
    lines = [f"{record['gpus']} x {record['gpu']}, torch {record['torch']}, kernels {record['kernel_hash']}"]
    for row in record.get(ONE_GPU, []):
        lines += [
            f"one GPU, {loop['kernel']}, {density_name(loop['density'])}: {loop['mean_ms']:.3f} ms"
            for loop in row["loops"]
        ]
    if record.get(LAYER):
        lines += _layer_lines(record)
    for row in record.get(BALANCE, []):
        lines.append(
            f"balance, {row['ranks']} GPUs: ideal {row['ideal_ms']:.3f} ms, before {row['before']['whole']['ms']:.3f} "
            f"({row['before']['ideal_over_time']:.1%}), after {row['after']['whole']['ms']:.3f} "
            f"({row['after']['ideal_over_time']:.1%})"
        )
    for row in record.get(MODEL, []):
        for case in row["cases"]:
            lines.append(
                f"step of {row['model']['name']}, {row['ranks']} GPUs, {row['method']}, "
                f"{density_name(case['density'])}: {case['step']['ms']:.1f} ms, efficiency "
                f"{_percent(model_efficiency(record, row, case['density']))}"
            )
    for row in measured_peers(record):
        lines.append(
            f"{row['peer']} ({row['method']}, {row['kernel']}), {row['ranks']} GPUs: {row['whole']['ms']:.3f} ms, "
            f"efficiency {_percent(row['efficiency'])}"
        )
    for goal in goals(record):
        value = "-" if goal["value"] is None else f"{goal['value']:.3f}"
        lines.append(f"{'met' if goal['met'] else 'MISSED':<7}{goal['name']}: {value} (>= {goal['at_least']:g})")
    lines += [f"absent: {name}: {why}"[:150] for name, why in record["absent"].items()]
    lines += [f"left out: {name}" for name in record["left_out"]]
    lines += [f"FAILED {one['part']} {one['block']}: {one['error']}"[:150] for one in record["failures"]]
    return "\n".join(lines)
