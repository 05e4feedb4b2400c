"""The record of benchmarks/sparse_families.py: its names, its rows with their goals, and a short summary."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from attention_record import ATTENTION, DENSE, FA3, Loop, Row, spread

SLIDING_TILES, VIDEO_SPARSE, SELECTION = "sliding_tiles", "video_sparse", "selection"
STREAMING, MIXED_HEADS, CAUSAL = "streaming", "mixed_heads", "causal"
PARTS = (SLIDING_TILES, VIDEO_SPARSE, SELECTION, STREAMING, MIXED_HEADS, CAUSAL)
GROWTH = "growth"  # computed from the streaming part

# What a loop calls, beside the kernels of attention_record.py; its case says with what mask.
SLIDING_TILE_ATTENTION, STREAMING_ATTENTION = "sliding_tile_attention", "streaming_attention"
VIDEO_SPARSE_ATTENTION, TOP_K_MAP = "video_sparse_attn", "top_k_map"
RANDOM_BLOCKS, NEARBY_BLOCKS = "random blocks", "nearby and random blocks"
ONE_LAUNCH, TWO_LAUNCHES = "mixed heads, one launch", "mixed heads, two launches"
# What video_sparse_attn does before its fine stage, its fine stage and all of it; of the choice, the top-k map alone.
MEANS, CHOICE, COARSE = "means of blocks", "scores and top-k map", "attention of means"
FINE, WHOLE, ALONE = "fine stage", "whole call", "top-k map alone"

RATE_OVER_DENSE_GOAL = 0.95  # least rate of sliding tiles / our dense rate
RANDOM_BLOCKS_GOAL = 560.0  # least TFLOP/s
SELECTION_GOAL = 0.08  # most time of everything before the fine stage / the fine stage's
SPEED_UP_LENGTH, SPEED_UP_GOAL = 16384, 12.0  # least time of causal FlashAttention-3 / streaming heads'
GROWTH_FROM, GROWTH_GOAL = 16384, 1.1  # most time a token at the longest length / at this one

# TFLOP/s over the kept pairs, for the readers of the record: none of these was measured in its run.
MEASURED_ELSEWHERE = {
    SLIDING_TILES: [
        {"kernel": "ThunderKittens", "case": case, "tflops": tflops, "source": "measured earlier, on an H200"}
        for case, tflops in (("(3, 3, 3)", 536.0), ("(3, 3, 5)", 532.0), ("(3, 6, 10)", 569.0))
    ],
    VIDEO_SPARSE: [
        {"kernel": "ThunderKittens", "case": RANDOM_BLOCKS, "tflops": 556.0, "source": "published, on an H100"},
        {"kernel": "Triton", "case": RANDOM_BLOCKS, "tflops": 381.0, "source": "measured earlier, on an H200"},
    ],
}


def label(loop: Loop) -> str:
    """What a loop measures, in words."""
    return f"{loop['kernel']}, {loop['case']}"


def mean_of(row: Row, kernel: str, case: str, figure: str = "ms") -> float | None:
    """The mean over the loops of a kernel and case, or None without any."""
    found = [loop[figure] for loop in row["loops"] if (loop["kernel"], loop["case"]) == (kernel, case)]
    return statistics.fmean(found) if found else None


def quotient(above: float | None, below: float | None) -> float | None:
    """Above / below, or None where one of them was not measured."""
    return None if above is None or below is None else above / below


def at_least(name: str, value: float | None, bound: float) -> Row:
    """A goal that is met by `bound` or more; one that was not measured is not met."""
    return {"name": name, "value": value, "at_least": bound, "met": value is not None and value >= bound}


def at_most(name: str, value: float | None, bound: float) -> Row:
    """A goal that is met by `bound` or less; one that was not measured is not met."""
    return {"name": name, "value": value, "at_most": bound, "met": value is not None and value <= bound}


def _row(shape: Row, loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """What every row holds; goals are added by the row of a part."""
    again: dict[str, list[float]] = {}
    for loop in loops:
        again.setdefault(label(loop), []).append(loop["ms"])
    spreads = {name: spread(times) for name, times in again.items() if len(times) > 1}
    return {"shape": shape, "goals": [], "spreads": spreads, "absent": absent, "loops": list(loops)}


def sliding_tiles_row(shape: Row, windows: Row, loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """Windows beside dense attention; windows holds the canvas, the tile and the windows as the cases name them."""
    row = _row(shape, loops, absent)
    dense = mean_of(row, ATTENTION, DENSE, "tflops")
    for case in windows["windows"]:
        rate = mean_of(row, SLIDING_TILE_ATTENTION, case, "tflops")
        row["goals"].append(at_least(f"rate / dense, {case}", quotient(rate, dense), RATE_OVER_DENSE_GOAL))
    return {**row, **windows, "measured_elsewhere": MEASURED_ELSEWHERE[SLIDING_TILES]}


def video_sparse_row(shape: Row, maps: dict[str, Row], loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """Maps of 64 x 64 blocks beside dense attention; maps holds facts of each case's map."""
    row = _row(shape, loops, absent)
    rate = mean_of(row, ATTENTION, RANDOM_BLOCKS, "tflops")
    row["goals"].append(at_least(f"TFLOP/s, {RANDOM_BLOCKS}", rate, RANDOM_BLOCKS_GOAL))
    return {**row, "maps": maps, "measured_elsewhere": MEASURED_ELSEWHERE[VIDEO_SPARSE]}


def selection_row(shape: Row, blocks: Row, loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """The stages of video_sparse_attn, one by one and together; blocks holds how many there are and are kept."""
    row = _row(shape, loops, absent)
    before = [mean_of(row, VIDEO_SPARSE_ATTENTION, stage) for stage in (MEANS, CHOICE, COARSE)]
    known = [milliseconds for milliseconds in before if milliseconds is not None]
    total = sum(known) if len(known) == len(before) else None
    fine, whole = (mean_of(row, VIDEO_SPARSE_ATTENTION, case) for case in (FINE, WHOLE))
    row["goals"].append(at_most("what comes before / fine stage", quotient(total, fine), SELECTION_GOAL))
    return {**row, "blocks": blocks, "whole_over_fine": quotient(whole, fine)}


def streaming_row(
    shape: Row, windows: Row, loops: Sequence[Loop], eager: Sequence[Loop], absent: dict[str, str]
) -> Row:
    """Streaming heads beside causal FlashAttention-3; eager holds the loops of calls that launch one by one."""
    row = _row(shape, loops, absent)
    speed_up = quotient(mean_of(row, FA3, CAUSAL), mean_of(row, STREAMING_ATTENTION, STREAMING))
    if shape["length"] == SPEED_UP_LENGTH:
        row["goals"].append(at_least(f"causal {FA3} / streaming, {shape['length']} tokens", speed_up, SPEED_UP_GOAL))
    return {**row, **windows, "speed_up": speed_up, "eager": list(eager)}


def growth_row(rows: Sequence[Row]) -> Row:
    """Time a token of streaming heads by length; linear time has a constant one."""
    microseconds = {
        row["shape"]["length"]: 1000 * milliseconds / row["shape"]["length"]
        for row in rows
        if (milliseconds := mean_of(row, STREAMING_ATTENTION, STREAMING)) is not None
    }
    longest = max(microseconds, default=GROWTH_FROM)
    growth = quotient(microseconds.get(longest), microseconds.get(GROWTH_FROM))
    goal = at_most(f"streaming, time a token, {longest} / {GROWTH_FROM} tokens", growth, GROWTH_GOAL)
    points = [{"length": length, "microseconds_a_token": value} for length, value in microseconds.items()]
    return {"goals": [goal], "points": points}


def mixed_heads_row(shape: Row, windows: Row, loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """Full and streaming heads in one launch beside a launch for each kind, and beside causal FlashAttention-3."""
    row = _row(shape, loops, absent)
    one = mean_of(row, ATTENTION, ONE_LAUNCH)
    return {
        **row,
        **windows,
        "one_over_two_launches": quotient(one, mean_of(row, ATTENTION, TWO_LAUNCHES)),
        "speed_up": quotient(mean_of(row, FA3, CAUSAL), one),
    }


def causal_row(shape: Row, loops: Sequence[Loop], absent: dict[str, str]) -> Row:
    """Our causal call beside FlashAttention-3's."""
    row = _row(shape, loops, absent)
    return {**row, "rate_over_fa3": quotient(mean_of(row, FA3, CAUSAL), mean_of(row, ATTENTION, CAUSAL))}


def goals(record: dict[str, Any]) -> Iterator[Row]:
    """Every goal of the record."""
    for part in (*PARTS, GROWTH):
        for row in record.get(part, []):
            yield from row["goals"]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _goal_line(goal: Row) -> str:
    sign, bound = (">=", goal["at_least"]) if "at_least" in goal else ("<=", goal["at_most"])
    return f"{'met' if goal['met'] else 'MISSED':<7}{goal['name']}: {_figure(goal['value'], '.3f')} ({sign} {bound:g})"


def _loop_lines(row: Row) -> Iterator[str]:
    """One line a kernel and case."""
    yield f"{row['shape']['name']}"
    for kernel, case in dict.fromkeys((loop["kernel"], loop["case"]) for loop in row["loops"]):
        loop = next(one for one in row["loops"] if (one["kernel"], one["case"]) == (kernel, case))
        milliseconds = _figure(mean_of(row, kernel, case), ".3f")
        rate = "" if loop["tflops"] is None else f"{mean_of(row, kernel, case, 'tflops'):6.0f} TFLOP/s"
        yield f"  {label(loop):<48}{milliseconds:>10} ms{rate}{_figure(loop['sm_clock_mhz'], '.0f'):>6} MHz"
    yield from (f"  without {name}: {why}"[:150] for name, why in row["absent"].items())


def summary(record: dict[str, Any]) -> str:
    """The run in a line for each kernel and mask, and its goals."""
    lines = [f"{record['gpu']}, torch {record['torch']}, kernels {record['kernel_hash']}"]
    for part in PARTS:
        rows = record.get(part, [])
        if rows:
            lines.append(f"-- {part}")
        for row in rows:
            lines += _loop_lines(row)
    lines += [_goal_line(goal) for goal in goals(record)]
    lines += [f"absent: {name}: {why}" for name, why in record["absent"].items()]
    lines += [f"FAILED {one['part']} {one['block']}: {one['error']}"[:150] for one in record["failures"]]
    return "\n".join(lines)
