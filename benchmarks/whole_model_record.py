"""The record of benchmarks/whole_model.py: its names, its rows with what follows from the times, a short summary."""

from collections.abc import Sequence
from typing import Any

from attention_record import ATTENTION, CUDNN, FA3, SKIP_ATTENTION, Loop, Row, ratio

EAGER, COMPILED, CAPTURED = "eager", "compiled", "captured"
MODES = (EAGER, COMPILED, CAPTURED)
DENSITIES = (0.75, 0.5, 0.25, 0.1)

# What a loop's self-attention is: a kernel and the share of the tiles that it was asked to compute.
Column = tuple[str, float]
COLUMNS: tuple[Column, ...] = (
    (CUDNN, 1.0),
    (FA3, 1.0),
    (ATTENTION, 1.0),
    *((SKIP_ATTENTION, density) for density in DENSITIES),
)
DENSITY_IN_ALL_MODES = 0.25
COLUMNS_IN_ALL_MODES: tuple[Column, ...] = (*COLUMNS[:3], (SKIP_ATTENTION, DENSITY_IN_ALL_MODES))

# Names of what the host's time is told of.
HOST_SDPA, HOST_OPERATOR, HOST_MODULE = "scaled_dot_product_attention", "skip_attention", "LiteAttention"
HOST_MODEL, HOST_MODEL_COMPILED = "in a diffusers model", "in a diffusers model, compiled"

# The format that lists kept tiles: github.com/moonmath-ai/LiteAttention, version 0.4, bf16 at head dim 128.
LIST_SOURCE = (
    "github.com/moonmath-ai/LiteAttention 0.4, bf16, head dim 128: "
    "int16 [2, max_batch, heads, ceil(tokens / 128), ceil(tokens / 176) + 2], max_batch 2 unless asked otherwise"
)
LIST_QUERY_TILE, LIST_KV_TILE = 128, 176
LIST_BUFFERS, LIST_ITEM_BYTES, LIST_MAX_BATCH = 2, 2, 2


def list_bytes(heads: int, tokens: int, batch: int) -> int:
    """Bytes per layer of the skip state of LIST_SOURCE."""
    query_tiles, kv_tiles = -(-tokens // LIST_QUERY_TILE), -(-tokens // LIST_KV_TILE)
    return LIST_BUFFERS * LIST_ITEM_BYTES * batch * heads * query_tiles * (kv_tiles + 2)


def state_facts(heads: int, tokens: int, measured: int) -> Row:
    """Bytes of state per layer, ours as `measured` at batch 1, beside the list format's."""
    lists = list_bytes(heads, tokens, 1)
    return {
        "bytes_per_layer": measured,
        "list_bytes_per_layer": lists,
        "list_bytes_per_layer_as_allocated": list_bytes(heads, tokens, LIST_MAX_BATCH),
        "list_over_ours": lists / measured,
        "list_source": LIST_SOURCE,
    }


def step_row(model: Row, clip: Row, outside: Loop, loops: Sequence[Loop], **facts: Any) -> Row:
    """One model and clip.

    `outside` is the step without its layers, so that the time of one layer can be told. Where not all layers of the
    model were run, `projected_ms` is what all would take at that time each; nothing was measured of it.
    """
    rows = []
    for loop in loops:
        layer_ms = (loop["ms"] - outside["ms"]) / model["layers"]
        projected = outside["ms"] + layer_ms * model["whole_layers"]
        fa3 = [one["ms"] for one in loops if (one["kernel"], one["mode"]) == (FA3, loop["mode"])]
        rows.append(
            {
                **loop,
                "ms_per_layer": layer_ms,
                "projected_ms": projected if model["layers"] < model["whole_layers"] else None,
                "time_over_fa3": ratio([loop["ms"]], fa3),
            }
        )
    return {"model": model, "clip": clip, **facts, "outside": outside, "loops": rows}


def overhead_point(density: float, goal: float, loops: Sequence[Loop], timeline: Row | None) -> Row:
    """Layers of LiteAttention in a captured model against as many captured calls of the operator alone.

    `goal` is the most time over the operator's; `timeline` is of the model, if it could be profiled.
    """
    times = {name: [loop["ms"] for loop in loops if loop["kernel"] == name] for name in (HOST_MODEL, HOST_OPERATOR)}
    return {
        "density": density,
        "time_over_operator": ratio(times[HOST_MODEL], times[HOST_OPERATOR]),
        "goal": goal,
        "timeline": timeline,
        "loops": list(loops),
    }


def find(row: Row, column: Column, mode: str = CAPTURED) -> Row | None:
    """The loop of a step row, if it was measured."""
    found = (loop for loop in row["loops"] if (loop["kernel"], loop["density"], loop["mode"]) == (*column, mode))
    return next(found, None)


def column_name(column: Column) -> str:
    """A column in a word or two."""
    kernel, density = column
    if kernel == SKIP_ATTENTION:
        return f"{density:.0%}"
    return "dense" if kernel == ATTENTION else kernel


def row_name(row: Row) -> str:
    """Model, layers and clip of a step row."""
    return f"{row['model']['name']} {row['clip']['name']}, {row['model']['layers']} layers"


def _cell(value: float | None, form: str, goal: float | None = None) -> str:
    if value is None:
        return "-"
    return format(value, form) + ("!" if goal is not None and value > goal else "")


def summary(record: dict[str, Any]) -> str:
    """The run in at most 40 lines; '!' marks what misses its goal."""
    lines = [f"{record['gpu']}, torch {record['torch']}, kernels {record['kernel_hash']}"]
    names = {CUDNN: "cuDNN", FA3: "FA3"}
    header = "".join(f"{names.get(column[0], column_name(column)):>9}" for column in COLUMNS)
    for mode in record["modes"]:
        columns = COLUMNS if mode == record["modes"][-1] else COLUMNS_IN_ALL_MODES
        lines.append(f"{mode + ', ms a step':<24}{header}")
        for row in record.get("steps", []):
            found = [find(row, column, mode) if column in columns else None for column in COLUMNS]
            cells = "".join(f"{_cell(None if one is None else one['ms'], '.1f'):>9}" for one in found)
            lines.append(f"{row_name(row):<24}{cells}")
    for row in record.get("overhead", []):
        for point in row["points"]:
            gaps = None if point["timeline"] is None else point["timeline"]["gaps"]
            lines.append(
                f"captured / operator alone, {row['model']['name']} {row['clip']['name']}, {point['density']:.0%}: "
                f"{_cell(point['time_over_operator'], '.4f', point['goal'])}, gaps {_cell(gaps, '.2%')}"
            )
    for row in record.get("host", []):
        for name, microseconds in row["microseconds"].items():
            lines.append(f"host time a layer, us: {name} {microseconds:.0f}")
    for row in record.get("steps", []):
        state = row["state"]
        lines.append(
            f"state a layer, {row_name(row)}: {state['bytes_per_layer'] / 1e6:.2f} MB, "
            f"as lists {state['list_bytes_per_layer'] / 1e6:.2f} MB"
        )
    lines += [f"absent: {name}: {reason}" for name, reason in record["absent"].items()]
    lines += [f"FAILED {one['part']} {one['block']}: {one['error']}"[:150] for one in record["failures"]]
    return "\n".join(lines)
