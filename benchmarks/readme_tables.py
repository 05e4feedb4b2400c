"""Writes the tables of README.md and docs/ from the committed results, so that no figure in them is typed by hand.

Over 400 lines: a table for every record, one after the other, which share how figures are written.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from doc_tables import PAGES as DOC_PAGES
from doc_tables import Place
from one_gpu_tables import attention_table, sparse_families_table, whole_model_table
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
        f"torch {record['environment']['torch']}, {record['date'][:10]}. Made by `{record['command']}`."
    )
    return "\n".join(lines)


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
