"""Writes the tables of README.md from the committed results, so that no figure there is typed by hand."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


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
    lines = [
        "| threshold | tiles kept | attention, s | whole run, s | speed-up of attention | PSNR to dense, dB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    dense = record["runs"][0]
    for run in record["runs"]:
        name, speed_up, psnr = "dense", "", ""
        if run is not dense:
            name = f"{run['threshold']:g}"
            speed_up = f"{dense['attention_seconds'] / run['attention_seconds']:.2f}x"
            psnr = f"{run['psnr']:.1f}"
        lines.append(
            f"| {name} | {100 * run['kept']:.0f}% | {run['attention_seconds']:.1f} | {run['total_seconds']:.1f} | "
            f"{speed_up} | {psnr} |"
        )
    return "\n".join(lines)


TABLES = {"cpu_attention": cpu_attention_table, "video_dit_cpu": video_dit_table}


def with_tables(text: str) -> str:
    """The text with every marked table made anew from its record."""
    for name, make in TABLES.items():
        record = json.loads((RESULTS / f"{name}.json").read_text())
        marked = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(
                f"README.md has no place for the table {name}: expected <!-- table {name} --> ... <!-- end -->"
            )
        table = make(record)
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = with_tables(before)
    if arguments.check:
        if before != after:
            sys.exit("README.md is out of date: run python benchmarks/readme_tables.py")
    else:
        readme.write_text(after)


if __name__ == "__main__":
    main()
