"""Writes the tables of README.md and docs/ from the committed results, so that no figure in them is typed by hand.

A GPU benchmark has a record for each card that it was run on, NAME_CARD.json. README.md shows one of them: of those
measured with the kernels of these sources, if there are any, the newest. docs/benchmarks.md shows the others. Each says
its card and its kernels, and rows measured with other kernels than those of these sources are marked.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from doc_tables import PAGES as DOC_PAGES
from doc_tables import Place
from one_gpu_tables import attention_table, sparse_families_table, whole_model_table
from provenance import made_with, marked, other_kernels
from sequence_parallel_tables import sequence_parallel_table

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
        f"torch {record['torch']}, {made_with(record)}, {record['date'][:10]}. Made by `{record['command']}`."
    )
    return "\n".join(lines)


def video_dit_table(record: dict[str, Any]) -> str:
    """The demo's own table: what skipping costs and saves on a whole denoising run."""
    on = "" if record["gpu"] is None else f", {record['gpu']}"
    dense = record["runs"][0]
    unit, factor, digits = ("s", 1, 1) if dense["attention_seconds"] >= 1 else ("ms", 1000, 0)
    clips = len(record["options"]["seeds"])
    quality = "PSNR to dense, dB" if clips == 1 else f"PSNR to dense, dB: mean / worst of {clips} clips"
    lines = [
        f"| threshold{on} | tiles kept | attention, {unit} | whole run, {unit} | speed-up of attention | {quality} |",
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
    return (
        f"{video_dit_table(record)}\n\n{record['gpu']}, {record['dtype']}, {record['options']['clips']} clips denoised "
        f"together, torch {record['torch']}, {made_with(record)}, {record['date'][:10]}."
    )


# Tables by the name of their place in README.md: of records of one machine, and of those that each card has its own of.
TABLES = {"cpu_attention": cpu_attention_table, "video_dit_cpu": video_dit_table}
GPU_TABLES = {
    "attention": attention_table,
    "sparse_families": sparse_families_table,
    "video_dit": video_dit_gpu_table,
    "whole_model": whole_model_table,
    "sequence_parallel": sequence_parallel_table,
}
README, OTHER_CARDS = "README.md", "docs/benchmarks.md"
PAGES: dict[str, dict[str, Place]] = {
    README: {name: Place(make, (name,)) for name, make in (TABLES | GPU_TABLES).items()},
    OTHER_CARDS: {f"{name}_other_cards": Place(make, (name,)) for name, make in GPU_TABLES.items()},
    **DOC_PAGES,
}
# A record that is not there yet leaves a word in its place.
NOT_MEASURED = "Not measured yet."
NO_OTHER_CARD = "On no other card yet."


class Measured(NamedTuple):
    """A record and where it lies."""

    path: Path
    record: dict[str, Any]

    @property
    def rank(self) -> tuple[bool, str]:
        """The largest is shown first."""
        return other_kernels(self.record) is None, self.record["date"]


def measured(name: str) -> list[Measured]:
    """Every record of a name, the one to show first; of a GPU benchmark, one for each card."""
    paths = RESULTS.glob(f"{name}_*.json" if name in GPU_TABLES else f"{name}.json")
    found = [Measured(path, json.loads(path.read_text())) for path in paths]
    if name in GPU_TABLES:  # video_dit_cpu.json is none
        found = [one for one in found if one.record["gpu"] is not None]
    return sorted(found, key=lambda one: one.rank, reverse=True)


def with_plots(text: str, shown: Measured, page: str) -> str:
    """The text with the pictures of its record behind it."""
    up = "../" * page.count("/")
    for plot in sorted(shown.path.parent.glob(f"{shown.path.stem}*.png")):
        text += f"\n\n![{PLOTS[plot.stem.removeprefix(shown.path.stem)]}]({up}{plot.relative_to(ROOT)})"
    return text


def table(page: str, name: str) -> str:
    """The text of one place."""
    make, names, runs_kernels = PAGES[page][name]
    records = [measured(record) for record in names]
    if not all(records):
        return NOT_MEASURED
    if page == OTHER_CARDS:
        others = [
            f"#### {one.record['gpu']}\n\n{with_plots(marked(make(one.record), [one.record]), one, page)}"
            for one in records[0][1:]
        ]
        return "\n\n".join(others) or NO_OTHER_CARD
    shown = [of_name[0] for of_name in records]
    text = make(*(one.record for one in shown))
    if runs_kernels:
        text = marked(text, [one.record for one in shown])
    return with_plots(text, shown[0], page) if page == README else text


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
