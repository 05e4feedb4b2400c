"""Draws a record of a GPU benchmark into PNG files beside it, RECORD_NAME.png.

Of benchmarks/attention.py: rate against sequence length (length) and time against density (density). Of
benchmarks/whole_model.py: time of a denoising step against density (step). Of benchmarks/sparse_families.py: all of it,
into RECORD.png. Of benchmarks/sequence_parallel.py: speed-up, what it is lost to, and balance (scaling).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from attention_record import (
    ATTENTION,
    CONTIGUOUS,
    CUDNN,
    DENSE,
    FA3,
    PER_TILE,
    SCATTERED,
    SKIP_ATTENTION,
    UNEQUAL,
    Row,
    rate,
)
from sequence_parallel_record import (
    BALANCE,
    LAYER,
    METHODS,
    best_layer,
    densities,
    density_name,
    rank_counts,
)
from sparse_families_record import (
    CAUSAL,
    NEARBY_BLOCKS,
    RANDOM_BLOCKS,
    SLIDING_TILE_ATTENTION,
    SLIDING_TILES,
    STREAMING,
    STREAMING_ATTENTION,
    VIDEO_SPARSE,
    mean_of,
)
from whole_model_record import DENSITIES, find, row_name

INK, MUTED, GRID = "#1c1917", "#78716c", "#e7e5e4"
STYLE: Any = {
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}
KERNELS = {
    ATTENTION: ("lite_attention", "#c2410c", "o"),
    FA3: (FA3, "#0f766e", "s"),
    CUDNN: (CUDNN, "#4338ca", "^"),
}
SERIES = {
    (ATTENTION, CONTIGUOUS): ("contiguous", "#c2410c", "o"),
    (ATTENTION, SCATTERED): ("scattered", "#0f766e", "s"),
    (SKIP_ATTENTION, SCATTERED): ("scattered, skip_attention", "#a16207", "x"),
    (ATTENTION, UNEQUAL): ("unequal", "#4338ca", "^"),
    (ATTENTION, PER_TILE): ("scattered per query tile", "#be185d", "D"),
}


BAR_WIDTH = 0.36
# Colours and markers of what the record quotes from elsewhere.
ELSEWHERE = {"ThunderKittens": ("#4338ca", "D"), "Triton": ("#be185d", "v")}
CURVES = {
    (FA3, CAUSAL): (f"{FA3}, causal", "#0f766e", "s"),
    (ATTENTION, CAUSAL): ("lite_attention, causal", "#a16207", "^"),
    (STREAMING_ATTENTION, STREAMING): ("lite_attention, streaming", "#c2410c", "o"),
}


LEGEND_ROOM = 1.15
# Colours and markers of the ways to share a sequence.
METHOD_LOOKS = dict(zip(METHODS, (("#c2410c", "o"), ("#0f766e", "s"), ("#4338ca", "^")), strict=True))


def shape_title(shape: Row) -> str:
    """A shape in words."""
    batch = "" if shape["batch"] == 1 else f"{shape['batch']} x "
    return f"{batch}{shape['length']:,} tokens, {shape['heads']} heads of {shape['head_dim']}"


def draw_length(record: dict[str, Any], path: Path) -> None:
    """Dense TFLOP/s against sequence length."""
    rows = record["sweep"]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for kernel, (label, colour, marker) in KERNELS.items():
        points = [(row["shape"]["length"], value) for row in rows if (value := rate(row, kernel)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    lengths = [row["shape"]["length"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
    axes.set_xlabel(f"tokens ({rows[0]['shape']['heads']} heads of {rows[0]['shape']['head_dim']})")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Dense attention, {record['dtype']}, {record['gpu']}")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_shape(axes: Axes, rows: list[Row]) -> None:
    axes.plot([0, 100], [0, 1], color=INK, linewidth=1, label="in proportion to FlashAttention-3")
    for key, (label, colour, marker) in SERIES.items():
        points = sorted(
            (100 * one["density"], one["time_over_fa3"])
            for row in rows
            for one in row["points"]
            if (one["kernel"], one["pattern"]) == key and one["time_over_fa3"] is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.2, label=label)
    axes.set_title(shape_title(rows[0]["shape"]))
    axes.set_xlim(0, 80)
    axes.set_ylim(0)


def draw_density(record: dict[str, Any], path: Path) -> None:
    """Time against density, one panel for each shape."""
    by_shape: dict[str, list[Row]] = {}
    for row in record["density"]:
        by_shape.setdefault(row["shape"]["name"], []).append(row)
    lines = -(-len(by_shape) // 2)
    figure, grid = plt.subplots(
        lines, 2, figsize=(10, 3.7 * lines + 0.4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(by_shape) :]:
        axes.set_visible(False)
    for axes, rows in zip(grid.flat, by_shape.values(), strict=False):
        _draw_shape(axes, rows)
    for axes in grid[-1]:
        axes.set_xlabel("tiles kept, %")
    for axes in grid[:, 0]:
        axes.set_ylabel("time / FlashAttention-3, dense")
    figure.suptitle(f"Time against the share of tiles kept, {record['dtype']}, {record['gpu']}", fontsize=13)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_step(axes: Axes, row: Row, mode: str) -> None:
    for kernel, (label, colour, _) in KERNELS.items():
        if (loop := find(row, (kernel, 1.0), mode)) is not None:
            name = f"{label}, dense" if kernel == ATTENTION else label
            axes.axhline(loop["ms"] / 1000, color=colour, linewidth=1.2, linestyle="--", label=name)
    loops = [loop for density in DENSITIES if (loop := find(row, (SKIP_ATTENTION, density), mode)) is not None]
    points = sorted((100 * loop["tiles_kept"], loop["ms"] / 1000) for loop in loops)
    if points:
        label, colour, marker = KERNELS[ATTENTION]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    axes.set_title(f"{row_name(row)} ({row['clip']['tokens']:,} tokens)")
    axes.set_xlim(0, 100)
    axes.set_ylim(0)


def draw_step(record: dict[str, Any], path: Path) -> None:
    """Seconds of a denoising step against density, one panel for each model and clip."""
    rows, mode = record["steps"], record["modes"][-1]
    lines = -(-len(rows) // 2)
    figure, grid = plt.subplots(
        lines, 2, figsize=(10, 3.7 * lines + 0.4), sharex=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(grid.flat, rows, strict=False):
        _draw_step(axes, row, mode)
    for axes in grid[-1]:
        axes.set_xlabel("tiles kept, %")
    for axes in grid[:, 0]:
        axes.set_ylabel("seconds a step")
    figure.suptitle(f"One denoising step of Wan 2.1, {mode}, {record['dtype']}, {record['gpu']}", fontsize=13)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_rates(axes: Axes, row: Row, kernel: str, cases: dict[str, str]) -> None:
    """Bars of dense attention and of a kernel's cases, and marks for what was measured elsewhere."""
    ours = [mean_of(row, ATTENTION, DENSE, "tflops"), *(mean_of(row, kernel, case, "tflops") for case in cases)]
    fa3 = mean_of(row, FA3, DENSE, "tflops")
    bars = {FA3: {-BAR_WIDTH / 2: fa3}, ATTENTION: dict(zip([BAR_WIDTH / 2, *range(1, len(ours))], ours, strict=True))}
    for name, values in bars.items():
        label, colour, _ = KERNELS[name]
        known = {place: value for place, value in values.items() if value is not None}
        if known:
            drawn = axes.bar(list(known), list(known.values()), BAR_WIDTH, color=colour, label=label)
            axes.bar_label(drawn, fmt="%.0f", fontsize=9, padding=2)
    place_of = {case: place for place, case in enumerate(cases, start=1)}
    for name, (colour, marker) in ELSEWHERE.items():
        found = [one for one in row["measured_elsewhere"] if one["kernel"] == name and one["case"] in place_of]
        if found:
            places, rates = [place_of[one["case"]] for one in found], [one["tflops"] for one in found]
            label = f"{name}, measured elsewhere"
            axes.scatter(places, rates, s=60, color=colour, marker=marker, edgecolor="white", zorder=3, label=label)
    axes.set_xticks(range(len(ours)), [DENSE, *cases.values()])
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    axes.set_ylabel("TFLOP/s over kept pairs")


def _draw_streaming(axes: Axes, rows: list[Row]) -> None:
    for (kernel, case), (label, colour, marker) in CURVES.items():
        points = [
            (row["shape"]["length"], milliseconds)
            for row in rows
            if (milliseconds := mean_of(row, kernel, case)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    for row in rows:
        ours = mean_of(row, STREAMING_ATTENTION, STREAMING)
        if ours is not None and row["speed_up"] is not None:
            place = (row["shape"]["length"], ours)
            axes.annotate(
                f"{row['speed_up']:.1f}x", place, (0, -15), textcoords="offset points", ha="center", fontsize=9
            )
    lengths = [row["shape"]["length"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.xaxis.minorticks_off()
    axes.set_ylabel("ms")
    axes.legend(loc="upper left", fontsize=9)


def draw_families(record: dict[str, Any], path: Path) -> None:
    """Rates of sliding tiles and of video sparse blocks beside dense ones, and time of streaming heads by length."""
    figure, (tiles, blocks, heads) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for row in record.get(SLIDING_TILES, []):
        _draw_rates(tiles, row, SLIDING_TILE_ATTENTION, {window: window for window in row["windows"]})
        tiles.set_title(f"Sliding tiles, canvas {'x'.join(map(str, row['canvas']))}")
        tiles.set_xlabel(f"windows of tiles ({shape_title(row['shape'])})")
    for row in record.get(VIDEO_SPARSE, []):
        _draw_rates(blocks, row, ATTENTION, {RANDOM_BLOCKS: "random", NEARBY_BLOCKS: "half nearby"})
        density = next(iter(row["maps"].values()))["density"]
        blocks.set_title(f"Video sparse, {density:.0%} of 64 x 64 blocks")
        blocks.set_xlabel(f"choice of blocks ({shape_title(row['shape'])})")
    if rows := record.get(STREAMING):
        _draw_streaming(heads, rows)
        heads.set_title(f"Streaming heads, {rows[0]['sink_size']} + {rows[0]['recent_size']} keys")
        heads.set_xlabel(f"tokens ({rows[0]['shape']['heads']} heads of {rows[0]['shape']['head_dim']})")
    figure.suptitle(f"Sparse families, {record['dtype']}, {record['gpu']}", fontsize=13)
    shown = {
        name: handle for axes in (tiles, blocks) for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside lower left", ncols=len(shown))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_speed_up(axes: Axes, record: dict[str, Any]) -> None:
    """Of each method in its fastest configuration, by the number of GPUs."""
    counts = [1, *rank_counts(record)]
    axes.plot(counts, counts, color=INK, linewidth=1, label="ideal")
    for method, (colour, marker) in METHOD_LOOKS.items():
        for density in densities(record):
            found = [(ranks, best_layer(record, ranks, method, density)) for ranks in counts]
            points = [(ranks, pair[1]["speed_up"]) for ranks, pair in found if pair and pair[1]["speed_up"] is not None]
            if points:
                axes.plot(
                    *zip(*([(1, 1.0)] + points), strict=True),
                    color=colour,
                    marker=marker,
                    linestyle="-" if density == 1 else "--",
                    label=f"{method}, {density_name(density)}",
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_yticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("GPUs")
    axes.set_ylabel("speed-up over one GPU")
    axes.legend(fontsize=9, handlelength=3.2)


def _draw_parts(axes: Axes, record: dict[str, Any], ranks: int) -> None:
    """Time of a call and how much of it is attention, of each method in its fastest configuration."""
    names: list[str] = []
    for method in METHODS:
        for density in densities(record):
            found = best_layer(record, ranks, method, density)
            if found is None:
                continue
            row, case = found
            place, attention = len(names), case["attention"]["ms"]
            exposed = max(case["whole"]["ms"] - attention, 0.0)
            first = not names
            axes.bar(place, attention, BAR_WIDTH, color="#c2410c", label="attention" if first else None)
            axes.bar(place, exposed, BAR_WIDTH, attention, color="#a8a29e", label="exposed" if first else None)
            exchange = case["exchange"]["ms"]
            axes.scatter(place + BAR_WIDTH, exchange, marker="_", s=200, color="#4338ca")
            share = "" if case["efficiency"] is None else f"{case['efficiency']:.0%}"
            axes.text(place, attention + exposed, share, ha="center", va="bottom", fontsize=9)
            chunks = f"\n{row['head_chunks']} chunks" if row["head_chunks"] > 1 else ""
            wrapped = method.replace(" and ", " and\n")
            names.append(f"{wrapped}\n{density_name(density)}{chunks}")
    axes.scatter([], [], marker="_", s=200, color="#4338ca", label="exchange alone")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("ms a call")
    axes.set_ylim(0, LEGEND_ROOM * axes.dataLim.ymax)
    axes.legend(fontsize=9, loc="upper right", ncols=3)


def _draw_balance(axes: Axes, rows: list[Row]) -> None:
    """Attention of every GPU with the heads as they come and after balancing."""
    looks = (("before", -BAR_WIDTH / 2, "#a8a29e", "as they come"), ("after", BAR_WIDTH / 2, "#c2410c", "balanced"))
    names: list[str] = []
    for row in rows:
        first = not names
        for side, shift, colour, label in looks:
            times = row[side]["attention"]["ms_by_rank"]
            places = [len(names) + rank + shift for rank in range(len(times))]
            axes.bar(places, times, BAR_WIDTH, color=colour, label=label if first else None)
        span = (len(names) - 0.5, len(names) + row["ranks"] - 0.5)
        axes.plot(span, (row["ideal_ms"],) * 2, color=INK, linewidth=1.5, label="mean" if first else None)
        names += [f"{rank}\nof {row['ranks']}" for rank in range(row["ranks"])]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("GPU")
    axes.set_ylabel("ms of attention a call")
    axes.set_ylim(0, LEGEND_ROOM * axes.dataLim.ymax)
    axes.legend(fontsize=9, loc="upper right", ncols=3)


def draw_scaling(record: dict[str, Any], path: Path) -> None:
    """Sequence parallelism: speed-up by the number of GPUs, what a call consists of with the most, and balance."""
    figure, (speed, parts, balance) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    _draw_speed_up(speed, record)
    speed.set_title("Attention layer")
    most = max(rank_counts(record))
    _draw_parts(parts, record, most)
    parts.set_title(f"A call on {most} GPUs, and its efficiency")
    if rows := record.get(BALANCE):
        _draw_balance(balance, rows)
        lowest, highest = min(rows[0]["densities"]), max(rows[0]["densities"])
        balance.set_title(f"Heads that keep {lowest:.0%} to {highest:.0%} of their tiles")
    shape = shape_title(record[LAYER][0]["shape"])
    figure.suptitle(f"Sequence parallelism, {shape}, {record['dtype']}, {record['gpu']}", fontsize=13)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "record",
        type=Path,
        help="a JSON file that attention.py, whole_model.py, sparse_families.py or sequence_parallel.py wrote",
    )
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text())
    with plt.rc_context(STYLE):
        for part, draw, ending in (
            ("sweep", draw_length, "_length"),
            ("density", draw_density, "_density"),
            ("steps", draw_step, "_step"),
            (SLIDING_TILES, draw_families, ""),
            (LAYER, draw_scaling, "_scaling"),
        ):
            if part in record:
                path = arguments.record.with_name(f"{arguments.record.stem}{ending}.png")
                draw(record, path)
                print(f"wrote {path}")


if __name__ == "__main__":
    main()
