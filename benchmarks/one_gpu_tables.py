"""The README's tables of one Hopper GPU: attention, the sparse families, a whole model."""

from collections.abc import Iterator
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
from provenance import made_with
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
from table_cells import figure, percentages
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


def _dense_lines(record: dict[str, Any]) -> list[str]:
    over_dense = {row["shape"]["name"]: row["time_over_dense"] for row in record["skip"]}
    lines = [
        f"| dense, TFLOP/s, {record['gpu']} | lite_attention | {FA3} | {CUDNN} | {FLEX} | rate / {FA3} | "
        "time of `skip_attention`, nothing dropped / dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["dense"]:
        name = row["shape"]["name"]
        rates = " | ".join(figure(rate(row, kernel), 0) for kernel in (ATTENTION, FA3, CUDNN, FLEX))
        lines.append(f"| {name} | {rates} | {figure(row['rate_over_fa3'], 3)} | {figure(over_dense.get(name), 3)} |")
    return lines


def _proportional(rows: list[Row], kernel: str, pattern: str) -> str:
    points = [point(row, kernel, pattern) for row in rows]
    return " / ".join("" if one is None else figure(one["time_over_proportional"], 2) for one in points)


def _density_lines(record: dict[str, Any]) -> list[str]:
    by_shape: dict[str, list[Row]] = {}
    for row in record["density"]:
        by_shape.setdefault(row["shape"]["name"], []).append(row)
    densities = percentages(dict.fromkeys(row["density"] for row in record["density"]))
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


def conditions(record: dict[str, Any], loops: list[Row]) -> str:
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
        f"Driver {record['driver']}, torch {record['torch']}, fa3-fwd {record['fa3']}, "
        f"cuDNN {cudnn // 10000}.{cudnn % 10000 // 100}, {made_with(record)}, {record['date'][:10]}.{absent} "
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
    lines += [f"Microseconds until a call returns on the host: {host}.", "", conditions(record, loops)]
    return "\n".join(lines)


def _rate_lines(row: Row, kernel: str) -> Iterator[str]:
    """Dense attention, and each case of a kernel: a line of the table of rates."""
    dense, fa3 = (mean_of(row, name, DENSE, "tflops") for name in (ATTENTION, FA3))
    yield f"| {row['shape']['name']}, dense | 100% | {figure(dense, 0)} | | {figure(fa3, 0)} | | |"
    loops = {loop["case"]: loop for loop in row["loops"] if loop["kernel"] == kernel and loop["case"] != DENSE}
    for case, loop in loops.items():
        value = mean_of(row, kernel, case, "tflops")
        elsewhere = ", ".join(
            f"{one['tflops']:.0f} ({one['kernel']}, {one['source']})"
            for one in row["measured_elsewhere"]
            if one["case"] == case
        )
        over_dense = figure(quotient(value, dense), 3)
        burst = figure(loop["tflops"] * loop["ms"] / loop["burst_ms"], 0)
        kept = f"{100 * loop['density']:.1f}%"
        yield f"| {case} | {kept} | {figure(value, 0)} | {burst} | | {over_dense} | {elsewhere} |"


def _streaming_lines(rows: list[Row]) -> list[str]:
    one_by_one = f"{STREAMING}, launched one by one"
    lines = [
        f"| ms, {rows[0]['shape']['heads']} heads of {rows[0]['shape']['head_dim']}, {rows[0]['sink_size']} first and "
        f"{rows[0]['recent_size']} recent keys | {' | '.join(str(row['shape']['length']) for row in rows)} |",
        "| --- |" + " --- |" * len(rows),
    ]
    for name, column in ((f"{FA3}, causal", (FA3, CAUSAL)), ("causal", (ATTENTION, CAUSAL))):
        lines.append(f"| {name} | {' | '.join(figure(mean_of(row, *column), 3) for row in rows)} |")
    ours = (STREAMING_ATTENTION, STREAMING)
    lines.append(f"| {STREAMING} | {' | '.join(figure(mean_of(row, *ours), 3) for row in rows)} |")
    eager = (mean_of({"loops": row["eager"]}, *ours) for row in rows)
    lines.append(f"| {one_by_one} | {' | '.join(figure(value, 3) for value in eager)} |")
    lines.append(f"| {FA3} / {STREAMING} | {' | '.join(figure(row['speed_up'], 1) for row in rows)} |")
    return lines


def _mixed_heads(row: Row) -> str:
    one, two = (mean_of(row, ATTENTION, case) for case in (ONE_LAUNCH, TWO_LAUNCHES))
    return (
        f"{row['full_heads']} full of {row['shape']['heads']} heads at {row['shape']['length']} tokens: one launch "
        f"{figure(one, 3)} ms, a launch for each kind {figure(two, 3)} ms, causal {FA3} "
        f"{figure(mean_of(row, FA3, CAUSAL), 3)} ms."
    )


def _causal_lines(rows: list[Row]) -> Iterator[str]:
    yield f"| {CAUSAL}, TFLOP/s | lite_attention | {FA3} | rate / {FA3} |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        rates = " | ".join(figure(mean_of(row, kernel, CAUSAL, "tflops"), 0) for kernel in (ATTENTION, FA3))
        yield f"| {row['shape']['name']} | {rates} | {figure(row['rate_over_fa3'], 3)} |"


def _selection(row: Row) -> str:
    stages = dict.fromkeys((loop["kernel"], loop["case"]) for loop in row["loops"])
    times = ", ".join(f"{case} {figure(mean_of(row, kernel, case), 3)}" for kernel, case in stages)
    share = row["goals"][0]["value"]
    over_fine = "an unknown share" if share is None else f"{share:.1%}"
    return (
        f"Milliseconds of the stages of video sparse attention, {row['shape']['name']}, {row['blocks']['kept']} of "
        f"{row['blocks']['number']} blocks: {times}. What comes before takes {over_fine} of the fine stage."
    )


def sparse_families_table(record: dict[str, Any]) -> str:
    """On a GPU: rates of sliding tiles and sparse blocks, times of streaming heads, and what measured them."""
    lines = [
        f"| TFLOP/s over kept pairs, {record['gpu']} | kept | lite_attention | in a burst | {FA3} | rate / dense | "
        "elsewhere, in a burst |",
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
    return "\n".join([*lines, conditions(record, [loop for loop in loops if loop["case"] == DENSE])])


def _milliseconds(loop: Row | None) -> str:
    return figure(None if loop is None else loop["ms"], 1)


def _step_lines(record: dict[str, Any]) -> list[str]:
    mode = record["modes"][-1]
    faster = f"{FA3} / {DENSITY_IN_ALL_MODES:.0%}"
    lines = [
        f"| {mode}, ms a step, {record['gpu']} | {' | '.join(map(column_name, COLUMNS))} | {faster} |",
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
    shares = percentages(point["density"] for point in next(iter(over.values())))
    lines = [
        f"| a layer | captured model / `skip_attention` alone, time at {shares} | skip state, MB | as lists, MB |",
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
        f"{sampled}. Driver {record['driver']}, torch {record['torch']}, diffusers "
        f"{record['diffusers']}, fa3-fwd {record['fa3']}, cuDNN {cudnn // 10000}.{cudnn % 10000 // 100}, "
        f"{made_with(record)}, {record['date'][:10]}. Made by `{record['command']}`."
    )
    parts = [*_step_lines(record), "", *_layer_lines(record), ""]
    if projection := _projection(record):
        parts += [projection, ""]
    return "\n".join([*parts, conditions])
