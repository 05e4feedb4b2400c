"""The tables of several GPUs: the README's, and what of the ideal each method reaches, for docs/many-gpus.md."""

from collections.abc import Iterator
from typing import Any

from attention_record import FA3, Row
from provenance import made_with
from sequence_parallel_record import (
    BALANCE,
    DENSE_GOAL,
    LAYER,
    METHODS,
    MODEL,
    SPARSE_GOAL,
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
from table_cells import figure, markdown_table, percent


def _configuration(row: Row) -> str:
    """A row of the layer part in words."""
    shape = f" {row['ring']} x {row['ulysses']}" if row["ring"] > 1 and row["ulysses"] > 1 else ""
    chunks = f", {row['head_chunks']} head chunks" if row["head_chunks"] > 1 else ""
    return f"{row['method']}{shape}{chunks}"


def _scaling_lines(record: dict[str, Any]) -> list[str]:
    """Each method in its fastest configuration, and Ulysses in one chunk too."""
    lines = [
        f"| attention layer, {record[LAYER][0]['shape']['name']}, {record['gpu']} | GPUs | tiles kept | ms | "
        "efficiency | attention, ms | exchange alone, ms | exposed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for density in densities(record):
        alone = figure(one_gpu_ms(record, kernel_of(density), density), 2)
        lines.append(f"| one GPU | 1 | {density_name(density)} | {alone} | | | | |")
        if density == 1 and (fa3 := one_gpu_ms(record, FA3, density)) is not None:
            lines.append(f"| one GPU, {FA3} | 1 | {density_name(density)} | {figure(fa3, 2)} | | | | |")
        for ranks in rank_counts(record):
            for row in record[LAYER]:
                fastest = best_layer(record, ranks, row["method"], density)
                plain = row["method"] == ULYSSES and row["head_chunks"] == 1
                if row["ranks"] != ranks or fastest is None or not (row is fastest[0] or plain):
                    continue
                case = next(one for one in row["cases"] if one["density"] == density)
                times = (case["whole"]["ms"], case["attention"]["ms"], case["exchange"]["ms"])
                whole, attention, exchange = (figure(value, 2) for value in times)
                lines.append(
                    f"| {_configuration(row)} | {ranks} | {density_name(density)} | {whole} | "
                    f"{percent(case['efficiency'])} | {attention} | {exchange} | {percent(case['exposed_share'])} |"
                )
    return lines


def _balance_sentence(row: Row) -> str:
    kept, ideal = row["densities"], row["ideal_ms"]
    before, after = (
        f"{figure(row[side]['whole']['ms'], 2)} ms (attention of the mean GPU {work_balance(row[side]):.0%} of the "
        f"busiest one's)"
        for side in ("before", "after")
    )
    return (
        f"Heads that keep {min(kept):.0%} to {max(kept):.0%} of their tiles, {row['ranks']} GPUs, Ulysses: {before} as "
        f"they come, {after} after `balance_heads()`; {figure(ideal, 2)} ms of attention each if shared evenly."
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
                f"| {name}, {density_name(case['density'])} | {row['ranks']} | {figure(case['step']['ms'], 1)} | "
                f"{percent(value)} | {figure(case['ms_per_layer'], 1)} |"
            )


def _peer_lines(record: dict[str, Any]) -> Iterator[str]:
    yield "| dense, with its kernel | GPUs | ms | efficiency | time / ours |"
    yield "| --- | --- | --- | --- | --- |"
    for row in measured_peers(record):
        ours = figure(peer_over_ours(record, row), 3)
        yield (
            f"| {row['peer']} ({row['method']}), {row['kernel']} | {row['ranks']} | {figure(row['whole']['ms'], 2)} | "
            f"{percent(row['efficiency'])} | {ours} |"
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
        f"{record['driver']}, NCCL {record['nccl']}, torch {record['torch']}, fa3-fwd {record['fa3']}, "
        f"yunchang {record['yunchang']}, diffusers {record['diffusers']}, {made_with(record)}, "
        f"{record['date'][:10]}."
        f"{absent} Made by `{record['command']}`."
    )
    return "\n\n".join(["\n".join(lines) for lines in parts] + [conditions])


def efficiency_table(record: dict[str, Any]) -> str:
    """How much of the ideal each method reaches in its fastest configuration, and a step of a model by it."""
    columns = [(ranks, density) for ranks in rank_counts(record) for density in densities(record)]
    header = [
        f"one GPU's time / (GPUs * their time), {record['gpu']}",
        *(f"{ranks} GPUs, {density_name(d)}" for ranks, d in columns),
    ]
    lines = [["goal", *(f"{DENSE_GOAL if density == 1 else SPARSE_GOAL:.0%}" for _, density in columns)]]
    for method in METHODS:
        best = [best_layer(record, ranks, method, density) for ranks, density in columns]
        lines.append([method, *(percent(None if found is None else found[1]["efficiency"]) for found in best)])
    several = [row for row in record.get(MODEL, []) if row["ranks"] > 1]
    for method in dict.fromkeys(row["method"] for row in several):
        of_ranks = {row["ranks"]: row for row in several if row["method"] == method}
        first = next(iter(of_ranks.values()))
        reached = [
            model_efficiency(record, of_ranks[ranks], density) if ranks in of_ranks else None
            for ranks, density in columns
        ]
        name = f"{method}, a step of Wan {first['model']['name']} {first['clip']['name']}"
        lines.append([name, *map(percent, reached)])
    return markdown_table(header, lines)
