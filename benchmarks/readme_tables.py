"""Writes the tables of README.md and docs/ from the committed results, so that no figure in them is typed by hand.

Over 400 lines: a table for every record, one after the other, which share how figures are written.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attention_record import (
    ATTENTION,
    CUDNN,
    DENSE,
    FA3,
    FLEX,
    OURS,
    PATTERNS,
    SCATTERED,
    SKIP_ATTENTION,
    Row,
    point,
    rate,
)
from doc_tables import PAGES as DOC_PAGES
from doc_tables import Place
from sequence_parallel_record import (
    BALANCE,
    LAYER,
    MODEL,
    ULYSSES,
    best_layer,
    densities,
    density_name,
    kernel_of,
    measured_peers,
    model_efficiency,
    one_gpu_ms,
    peer_over_ours,
    rank_counts,
    work_balance,
)
from sparse_families_record import (
    CAUSAL,
    MIXED_HEADS,
    ONE_LAUNCH,
    SELECTION,
    SLIDING_TILE_ATTENTION,
    SLIDING_TILES,
    STREAMING,
    STREAMING_ATTENTION,
    TWO_LAUNCHES,
    VIDEO_SPARSE,
    mean_of,
    quotient,
)
from whole_model_record import (
    COLUMNS,
    COLUMNS_IN_ALL_MODES,
    DENSITY_IN_ALL_MODES,
    HOST_MODEL,
    HOST_MODEL_COMPILED,
    HOST_OPERATOR,
    column_name,
    find,
    row_name,
)

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# What benchmarks/plots.py draws of a record, by the file's name without what they share with the record's.
PLOTS = {
    "": "Rates of sliding tiles and of video sparse blocks, and time of streaming heads",
    "_length": "Dense TFLOP/s against sequence length",
    "_density": "Time against the share of tiles kept",
    "_step": "Time of a denoising step against the share of tiles kept",
    "_scaling": "Speed-up of an attention layer by the number of GPUs, what a call consists of, and balance of heads",
}


def cpu_attention_table(record: dict[str, Any]) -> str:
    """Dense speed against torch's SDPA, and time against density."""
    shown = [point for point in record["rows"][0]["sparse"] if point["pattern"] == "scattered"][1:]
    densities = " / ".join(f"{100 * point['density']:.0f}" for point in shown)
    lines = [
        "| head dim | dtype | dense, GFLOP/s | torch SDPA, GFLOP/s | time / torch SDPA | "
        f"time / (density * dense) at {densities}% of the tiles, scattered |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        scattered = [point for point in row["sparse"] if point["pattern"] == "scattered"][1:]
        ratios = " / ".join(f"{point['over_proportional']:.2f}" for point in scattered)
        lines.append(
            f"| {row['head_dim']} | {row['dtype']} | {row['dense_gflops']:.0f} | {row['sdpa_gflops']:.0f} | "
            f"{row['dense_over_sdpa']:.2f} | {ratios} |"
        )
    lines.append("")
    lines.append(
        f"{record['length']} tokens, {record['heads']} heads, {record['threads']} threads of {record['processor']}, "
        f"torch {record['environment']['torch']}, {record['date'][:10]}. Made by `{record['command']}`."
    )
    return "\n".join(lines)


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percentages(densities: Iterable[float]) -> str:
    return " / ".join(f"{100 * density:.0f}" for density in densities) + "%"


def _dense_lines(record: dict[str, Any]) -> list[str]:
    over_dense = {row["shape"]["name"]: row["time_over_dense"] for row in record["skip"]}
    lines = [
        f"| dense, TFLOP/s | lite_attention | {FA3} | {CUDNN} | {FLEX} | rate / {FA3} | "
        "time of `skip_attention`, nothing dropped / dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["dense"]:
        name = row["shape"]["name"]
        rates = " | ".join(_figure(rate(row, kernel), 0) for kernel in (ATTENTION, FA3, CUDNN, FLEX))
        lines.append(f"| {name} | {rates} | {_figure(row['rate_over_fa3'], 3)} | {_figure(over_dense.get(name), 3)} |")
    return lines


def _proportional(rows: list[Row], kernel: str, pattern: str) -> str:
    points = [point(row, kernel, pattern) for row in rows]
    return " / ".join("" if one is None else _figure(one["time_over_proportional"], 2) for one in points)


def _density_lines(record: dict[str, Any]) -> list[str]:
    by_shape: dict[str, list[Row]] = {}
    for row in record["density"]:
        by_shape.setdefault(row["shape"]["name"], []).append(row)
    densities = _percentages(dict.fromkeys(row["density"] for row in record["density"]))
    lines = [
        f"Time / (density * {FA3}'s dense time) at {densities} of the tiles:",
        "",
        f"| | {' | '.join(PATTERNS)} | {SCATTERED}, `skip_attention` |",
        "| --- |" + " --- |" * (len(PATTERNS) + 1),
    ]
    columns = [*((ATTENTION, pattern) for pattern in PATTERNS), (SKIP_ATTENTION, SCATTERED)]
    for name, rows in by_shape.items():
        lines.append(f"| {name} | {' | '.join(_proportional(rows, *column) for column in columns)} |")
    for name, rows in by_shape.items():
        measured = [row for row in rows if point(row, FLEX, SCATTERED)]
        if measured:
            lines += ["", f"{FLEX} at {name}, blocks of 128 x 128: {_proportional(measured, FLEX, SCATTERED)}."]
    return lines


def _conditions(record: dict[str, Any], loops: list[Row]) -> str:
    """What a record was measured with; clocks and power are those of the loops."""
    clocks = [loop["sm_clock_mhz"] for loop in loops if loop["sm_clock_mhz"]]
    powers = [loop["power_watts"] for loop in loops if loop["power_watts"]]
    sampled = ""
    if clocks and powers:
        sampled = f" ({min(clocks):.0f} to {max(clocks):.0f} MHz, {min(powers):.0f} to {max(powers):.0f} W when dense)"
    product, cudnn = record["cublas"][0], record["cudnn"]
    absent = "".join(f" {name} was absent." for name in record["absent"])
    return (
        f"{record['dtype']}, random normal inputs, loops of {record['seconds_per_loop']:g} s on one {record['gpu']}"
        f"{sampled}; cuBLAS reaches {product['tflops']:.0f} TFLOP/s there with {product['size']}^3. "
        f"Driver {record['driver']}, torch {record['environment']['torch']}, fa3-fwd {record['fa3']}, "
        f"cuDNN {cudnn // 10000}.{cudnn % 10000 // 100}, revision {record['revision']}, {record['date'][:10]}.{absent} "
        f"Made by `{record['command']}`."
    )


def attention_table(record: dict[str, Any]) -> str:
    """On a GPU: dense rates beside the peers', time against density, host time, and what it was measured with."""
    microseconds = record["host"][0]["microseconds"]
    host = ", ".join(f"`{name}` {microseconds[name]['no_grad']:.0f}" for name in OURS)
    if FA3 in microseconds:
        host += f", {FA3} {microseconds[FA3]['no_grad']:.0f}"
    lines = [*_dense_lines(record), "", *_density_lines(record), ""]
    loops = [loop for row in record["dense"] for loop in row["loops"]]
    lines += [f"Microseconds until a call returns on the host: {host}.", "", _conditions(record, loops)]
    return "\n".join(lines)


def _rate_lines(row: Row, kernel: str) -> Iterator[str]:
    """Dense attention, and each case of a kernel: a line of the table of rates."""
    dense, fa3 = (mean_of(row, name, DENSE, "tflops") for name in (ATTENTION, FA3))
    yield f"| {row['shape']['name']}, dense | 100% | {_figure(dense, 0)} | | {_figure(fa3, 0)} | | |"
    loops = {loop["case"]: loop for loop in row["loops"] if loop["kernel"] == kernel and loop["case"] != DENSE}
    for case, loop in loops.items():
        value = mean_of(row, kernel, case, "tflops")
        elsewhere = ", ".join(
            f"{one['tflops']:.0f} ({one['kernel']}, {one['source']})"
            for one in row["measured_elsewhere"]
            if one["case"] == case
        )
        over_dense = _figure(quotient(value, dense), 3)
        burst = _figure(loop["tflops"] * loop["ms"] / loop["burst_ms"], 0)
        kept = f"{100 * loop['density']:.1f}%"
        yield f"| {case} | {kept} | {_figure(value, 0)} | {burst} | | {over_dense} | {elsewhere} |"


def _streaming_lines(rows: list[Row]) -> list[str]:
    one_by_one = f"{STREAMING}, launched one by one"
    lines = [
        f"| ms, {rows[0]['shape']['heads']} heads of {rows[0]['shape']['head_dim']}, {rows[0]['sink_size']} first and "
        f"{rows[0]['recent_size']} recent keys | {' | '.join(str(row['shape']['length']) for row in rows)} |",
        "| --- |" + " --- |" * len(rows),
    ]
    for name, column in ((f"{FA3}, causal", (FA3, CAUSAL)), ("causal", (ATTENTION, CAUSAL))):
        lines.append(f"| {name} | {' | '.join(_figure(mean_of(row, *column), 3) for row in rows)} |")
    ours = (STREAMING_ATTENTION, STREAMING)
    lines.append(f"| {STREAMING} | {' | '.join(_figure(mean_of(row, *ours), 3) for row in rows)} |")
    eager = (mean_of({"loops": row["eager"]}, *ours) for row in rows)
    lines.append(f"| {one_by_one} | {' | '.join(_figure(value, 3) for value in eager)} |")
    lines.append(f"| {FA3} / {STREAMING} | {' | '.join(_figure(row['speed_up'], 1) for row in rows)} |")
    return lines


def _mixed_heads(row: Row) -> str:
    one, two = (mean_of(row, ATTENTION, case) for case in (ONE_LAUNCH, TWO_LAUNCHES))
    return (
        f"{row['full_heads']} full of {row['shape']['heads']} heads at {row['shape']['length']} tokens: one launch "
        f"{_figure(one, 3)} ms, a launch for each kind {_figure(two, 3)} ms, causal {FA3} "
        f"{_figure(mean_of(row, FA3, CAUSAL), 3)} ms."
    )


def _causal_lines(rows: list[Row]) -> Iterator[str]:
    yield f"| {CAUSAL}, TFLOP/s | lite_attention | {FA3} | rate / {FA3} |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        rates = " | ".join(_figure(mean_of(row, kernel, CAUSAL, "tflops"), 0) for kernel in (ATTENTION, FA3))
        yield f"| {row['shape']['name']} | {rates} | {_figure(row['rate_over_fa3'], 3)} |"


def _selection(row: Row) -> str:
    stages = dict.fromkeys((loop["kernel"], loop["case"]) for loop in row["loops"])
    times = ", ".join(f"{case} {_figure(mean_of(row, kernel, case), 3)}" for kernel, case in stages)
    share = row["goals"][0]["value"]
    over_fine = "an unknown share" if share is None else f"{share:.1%}"
    return (
        f"Milliseconds of the stages of video sparse attention, {row['shape']['name']}, {row['blocks']['kept']} of "
        f"{row['blocks']['number']} blocks: {times}. What comes before takes {over_fine} of the fine stage."
    )


def sparse_families_table(record: dict[str, Any]) -> str:
    """On a GPU: rates of sliding tiles and sparse blocks, times of streaming heads, and what measured them."""
    lines = [
        f"| TFLOP/s over kept pairs | kept | lite_attention | in a burst | {FA3} | rate / dense | elsewhere, "
        "in a burst |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part, kernel in ((SLIDING_TILES, SLIDING_TILE_ATTENTION), (VIDEO_SPARSE, ATTENTION)):
        for row in record[part]:
            lines += _rate_lines(row, kernel)
    lines += ["", *(_selection(row) for row in record[SELECTION])]
    lines += ["", *_streaming_lines(record[STREAMING])]
    lines += ["", *(_mixed_heads(row) for row in record[MIXED_HEADS])]
    lines += ["", *_causal_lines(record[CAUSAL]), ""]
    loops = [loop for part in (SLIDING_TILES, VIDEO_SPARSE) for row in record[part] for loop in row["loops"]]
    return "\n".join([*lines, _conditions(record, [loop for loop in loops if loop["case"] == DENSE])])


def _milliseconds(loop: Row | None) -> str:
    return _figure(None if loop is None else loop["ms"], 1)


def _step_lines(record: dict[str, Any]) -> list[str]:
    mode = record["modes"][-1]
    faster = f"{FA3} / {DENSITY_IN_ALL_MODES:.0%}"
    lines = [
        f"| {mode}, ms a step | {' | '.join(map(column_name, COLUMNS))} | {faster} |",
        "| --- |" + " --- |" * (len(COLUMNS) + 1),
    ]
    for row in record["steps"]:
        cells = " | ".join(_milliseconds(find(row, column, mode)) for column in COLUMNS)
        ours = find(row, (SKIP_ATTENTION, DENSITY_IN_ALL_MODES), mode)
        times = "" if ours is None or ours["time_over_fa3"] is None else f"{1 / ours['time_over_fa3']:.2f}x"
        lines.append(f"| {row_name(row)} | {cells} | {times} |")
    lines += [
        "",
        f"| {' / '.join(record['modes'])}, ms a step | {' | '.join(map(column_name, COLUMNS_IN_ALL_MODES))} |",
        "| --- |" + " --- |" * len(COLUMNS_IN_ALL_MODES),
    ]
    for row in record["steps"]:
        cells = " | ".join(
            " / ".join(_milliseconds(find(row, column, mode)) for mode in record["modes"])
            for column in COLUMNS_IN_ALL_MODES
        )
        lines.append(f"| {row_name(row)} | {cells} |")
    return lines


def _layer_lines(record: dict[str, Any]) -> list[str]:
    """What LiteAttention costs a layer beside its kernels, in time and in memory."""
    over = {(row["model"]["name"], row["clip"]["name"]): row["points"] for row in record["overhead"]}
    percentages = _percentages(point["density"] for point in next(iter(over.values())))
    lines = [
        f"| a layer | captured model / `skip_attention` alone, time at {percentages} | skip state, MB | as lists, MB |",
        "| --- | --- | --- | --- |",
    ]
    for row in record["steps"]:
        name, state = (row["model"]["name"], row["clip"]["name"]), row["state"]
        ratios = " / ".join(f"{point['time_over_operator']:.4f}" for point in over.get(name, []))
        bytes_cells = " | ".join(f"{state[key] / 1e6:.2f}" for key in ("bytes_per_layer", "list_bytes_per_layer"))
        lines.append(f"| {' '.join(name)} | {ratios} | {bytes_cells} |")
    microseconds = record["host"][0]["microseconds"]
    figures = ", ".join(f"{name} {microseconds[name]:.0f}" for name in (HOST_OPERATOR, HOST_MODEL, HOST_MODEL_COMPILED))
    source = record["steps"][0]["state"]["list_source"]
    return [*lines, "", f"Lists: {source}; here 1. Microseconds a layer until a call returns on the host: {figures}."]


def _projection(record: dict[str, Any]) -> str:
    """What all layers would take, of models of which some were run; nothing where all were."""
    mode = record["modes"][-1]
    sentences = []
    for row in record["steps"]:
        found = {column: find(row, column, mode) for column in COLUMNS_IN_ALL_MODES}
        seconds = {
            column_name(column): one["projected_ms"] / 1000
            for column, one in found.items()
            if one is not None and one["projected_ms"] is not None
        }
        if seconds:
            figures = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
            sentences.append(f" {row['model']['name']} {row['clip']['name']}: {figures} s a step.")
    model = next(
        (row["model"] for row in record["steps"] if row["model"]["layers"] < row["model"]["whole_layers"]), None
    )
    if model is None:
        return ""
    return f"Projected to {model['whole_layers']} layers at the same time each, not measured:{''.join(sentences)}"


def whole_model_table(record: dict[str, Any]) -> str:
    """On a GPU: a denoising step with the peers and with ours, what a layer costs, and what it was measured with."""
    loops = [loop for row in record["steps"] for loop in row["loops"] if loop["sm_clock_mhz"] is not None]
    clocks = [loop["sm_clock_mhz"] for loop in loops]
    cudnn = record["cudnn"]
    sampled = f" ({min(clocks):.0f} to {max(clocks):.0f} MHz)" if clocks else ""
    conditions = (
        f"{record['dtype']}, random weights, batch 1, {record['steps'][0]['clip']['frames']} frames, "
        f"{record['steps'][0]['pattern']} maps, loops of {record['seconds_per_loop']:g} s on one {record['gpu']}"
        f"{sampled}. Driver {record['driver']}, torch {record['environment']['torch']}, diffusers "
        f"{record['diffusers']}, fa3-fwd {record['fa3']}, cuDNN {cudnn // 10000}.{cudnn % 10000 // 100}, revision "
        f"{record['revision']}, {record['date'][:10]}. Made by `{record['command']}`."
    )
    parts = [*_step_lines(record), "", *_layer_lines(record), ""]
    if projection := _projection(record):
        parts += [projection, ""]
    return "\n".join([*parts, conditions])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _configuration(row: Row) -> str:
    """A row of the layer part in words."""
    shape = f" {row['ring']} x {row['ulysses']}" if row["ring"] > 1 and row["ulysses"] > 1 else ""
    chunks = f", {row['head_chunks']} head chunks" if row["head_chunks"] > 1 else ""
    return f"{row['method']}{shape}{chunks}"


def _scaling_lines(record: dict[str, Any]) -> list[str]:
    """Each method in its fastest configuration, and Ulysses in one chunk too."""
    lines = [
        f"| attention layer, {record[LAYER][0]['shape']['name']} | GPUs | tiles kept | ms | efficiency | "
        "attention, ms | exchange alone, ms | exposed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for density in densities(record):
        alone = _figure(one_gpu_ms(record, kernel_of(density), density), 2)
        lines.append(f"| one GPU | 1 | {density_name(density)} | {alone} | | | | |")
        if density == 1 and (fa3 := one_gpu_ms(record, FA3, density)) is not None:
            lines.append(f"| one GPU, {FA3} | 1 | {density_name(density)} | {_figure(fa3, 2)} | | | | |")
        for ranks in rank_counts(record):
            for row in record[LAYER]:
                fastest = best_layer(record, ranks, row["method"], density)
                plain = row["method"] == ULYSSES and row["head_chunks"] == 1
                if row["ranks"] != ranks or fastest is None or not (row is fastest[0] or plain):
                    continue
                case = next(one for one in row["cases"] if one["density"] == density)
                times = (case["whole"]["ms"], case["attention"]["ms"], case["exchange"]["ms"])
                whole, attention, exchange = (_figure(value, 2) for value in times)
                lines.append(
                    f"| {_configuration(row)} | {ranks} | {density_name(density)} | {whole} | "
                    f"{_percent(case['efficiency'])} | {attention} | {exchange} | {_percent(case['exposed_share'])} |"
                )
    return lines


def _balance_sentence(row: Row) -> str:
    kept, ideal = row["densities"], row["ideal_ms"]
    before, after = (
        f"{_figure(row[side]['whole']['ms'], 2)} ms (attention of the mean GPU {work_balance(row[side]):.0%} of the "
        f"busiest one's)"
        for side in ("before", "after")
    )
    return (
        f"Heads that keep {min(kept):.0%} to {max(kept):.0%} of their tiles, {row['ranks']} GPUs, Ulysses: {before} as "
        f"they come, {after} after `balance_heads()`; {_figure(ideal, 2)} ms of attention each if shared evenly."
    )


def _model_lines(record: dict[str, Any]) -> Iterator[str]:
    rows = record[MODEL]
    model, clip = rows[0]["model"], rows[0]["clip"]
    title = f"a step of Wan {model['name']} {clip['name']}, {model['layers']} layers"
    yield f"| {title} | GPUs | ms | efficiency | ms a layer |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        for case in row["cases"]:
            name = "one GPU" if row["ranks"] == 1 else row["method"]
            value = None if row["ranks"] == 1 else model_efficiency(record, row, case["density"])
            yield (
                f"| {name}, {density_name(case['density'])} | {row['ranks']} | {_figure(case['step']['ms'], 1)} | "
                f"{_percent(value)} | {_figure(case['ms_per_layer'], 1)} |"
            )


def _peer_lines(record: dict[str, Any]) -> Iterator[str]:
    yield "| dense, with its kernel | GPUs | ms | efficiency | time / ours |"
    yield "| --- | --- | --- | --- | --- |"
    for row in measured_peers(record):
        ours = _figure(peer_over_ours(record, row), 3)
        yield (
            f"| {row['peer']} ({row['method']}), {row['kernel']} | {row['ranks']} | {_figure(row['whole']['ms'], 2)} | "
            f"{_percent(row['efficiency'])} | {ours} |"
        )


def sequence_parallel_table(record: dict[str, Any]) -> str:
    """On GPUs of one machine: an attention layer, its balance, a step of a model, peers, and what measured them."""
    parts = [_scaling_lines(record)]
    if record.get(BALANCE):
        parts.append([_balance_sentence(row) for row in record[BALANCE]])
    if record.get(MODEL):
        parts.append(list(_model_lines(record)))
    if measured_peers(record):
        parts.append(list(_peer_lines(record)))
    loops = [case["whole"] for row in record[LAYER] for case in row["cases"]]
    clocks = [loop["sm_clock_mhz"] for loop in loops if loop["sm_clock_mhz"]]
    sampled = f" (the slowest one at {min(clocks):.0f} to {max(clocks):.0f} MHz)" if clocks else ""
    absent = "".join(f" {name} was absent." for name in record["absent"])
    conditions = (
        f"Efficiency is one GPU's time / (GPUs * their time). {record['dtype']}, random normal inputs, medians of "
        f"loops of {record['seconds_per_loop']:g} s on {record['gpus']} {record['gpu']}{sampled}. Driver "
        f"{record['driver']}, NCCL {record['nccl']}, torch {record['environment']['torch']}, fa3-fwd {record['fa3']}, "
        f"yunchang {record['yunchang']}, diffusers {record['diffusers']}, revision {record['revision']}, "
        f"{record['date'][:10]}."
        f"{absent} Made by `{record['command']}`."
    )
    return "\n\n".join(["\n".join(lines) for lines in parts] + [conditions])


def video_dit_table(record: dict[str, Any]) -> str:
    """The demo's own table: what skipping costs and saves on a whole denoising run."""
    dense = record["runs"][0]
    unit, factor, digits = ("s", 1, 1) if dense["attention_seconds"] >= 1 else ("ms", 1000, 0)
    clips = len(record["options"]["seeds"])
    quality = "PSNR to dense, dB" if clips == 1 else f"PSNR to dense, dB: mean / worst of {clips} clips"
    lines = [
        f"| threshold | tiles kept | attention, {unit} | whole run, {unit} | speed-up of attention | {quality} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in record["runs"]:
        name, speed_up, psnr = "dense", "", ""
        if run is not dense:
            name = f"{run['threshold']:g}"
            speed_up = f"{dense['attention_seconds'] / run['attention_seconds']:.2f}x"
            psnr = f"{run['psnr']:.1f}" if clips == 1 else f"{run['psnr']:.1f} / {run['psnr_worst']:.1f}"
        seconds = (run["attention_seconds"], run["total_seconds"])
        shown = " | ".join(f"{factor * value:.{digits}f}" for value in seconds)
        lines.append(f"| {name} | {100 * run['kept']:.0f}% | {shown} | {speed_up} | {psnr} |")
    return "\n".join(lines)


def video_dit_gpu_table(record: dict[str, Any]) -> str:
    """The demo's table with the sentence that a second machine needs."""
    environment, options = record["environment"], record["options"]
    return (
        f"{video_dit_table(record)}\n\n{environment['device']}, {environment['dtype']}, {options['clips']} clips "
        f"denoised together, torch {environment['torch']}, {environment['date'][:10]}."
    )


# Tables by the name of their place in README.md and of their record.
TABLES = {
    "cpu_attention": cpu_attention_table,
    "video_dit_cpu": video_dit_table,
    "attention_h200": attention_table,
    "sparse_families_h200": sparse_families_table,
    "video_dit_h200": video_dit_gpu_table,
    "whole_model_h200": whole_model_table,
    "sequence_parallel_h200": sequence_parallel_table,
}
README = "README.md"
PAGES: dict[str, dict[str, Place]] = {
    README: {name: Place(make, (name,)) for name, make in TABLES.items()},
    **DOC_PAGES,
}
# A record that is not there yet leaves a word in its place.
NOT_MEASURED = "Not measured yet."


def table(page: str, name: str) -> str:
    """The text of one place."""
    make, records = PAGES[page][name]
    paths = [RESULTS / f"{record}.json" for record in records]
    if not all(path.exists() for path in paths):
        return NOT_MEASURED
    text = make(*(json.loads(path.read_text()) for path in paths))
    for plot in sorted(RESULTS.glob(f"{name}*.png")) if page == README else []:
        text += f"\n\n![{PLOTS[plot.stem.removeprefix(name)]}]({plot.relative_to(ROOT)})"
    return text


def with_tables(text: str, page: str = README) -> str:
    """The text of a page with every marked table made anew from its records."""
    for name in PAGES[page]:
        marked = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(
                f"{page} has no place for the table {name}: expected <!-- table {name} --> ... <!-- end -->"
            )
        made = table(page, name)
        text = marked.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    arguments = parser.parse_args()
    for page in PAGES:
        path = ROOT / page
        before = path.read_text()
        after = with_tables(before, page)
        if not arguments.check:
            path.write_text(after)
        elif before != after:
            sys.exit(f"{page} is out of date: run python benchmarks/readme_tables.py")


if __name__ == "__main__":
    main()
