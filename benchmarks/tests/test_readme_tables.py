"""The tables of README.md and docs/ are those of the committed results."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

from benchmark_records import (  # noqa: E402
    made_up_record,
    made_up_sequence_parallel_record,
    made_up_sparse_families_record,
    made_up_whole_model_record,
)

import doc_tables  # noqa: E402
import readme_tables  # noqa: E402
from provenance import kernel_hash  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def video_dit_record() -> dict[str, Any]:
    """The CPU's record of the demo as a GPU might have given it."""
    record: dict[str, Any] = json.loads((RESULTS / "video_dit_cpu.json").read_text())
    record["options"] |= {"seeds": list(range(16)), "clips": 16}
    record |= {"gpu": "NVIDIA H200", "dtype": "float16", "torch": "2.11.0+cu130", "kernel_hash": "aaaabbbbcccc"}
    for run in record["runs"]:
        is_dense = run["threshold"] is None
        run |= {"attention_seconds": 0.343 if is_dense else 0.153, "total_seconds": 0.582 if is_dense else 0.396}
        run["psnr_worst"] = None if run["psnr"] is None else run["psnr"] - 5
    return record


def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", readme_tables.PAGES)
def test_tables_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text()
    assert readme_tables.with_tables(text, page) == text, "run python benchmarks/readme_tables.py"


def test_every_marked_table_is_written_by_the_script() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    marked = {
        path.relative_to(ROOT).as_posix(): re.findall("<!-- table (.*) -->", path.read_text())
        for path in pages
        if "<!-- table" in path.read_text()
    }
    assert {page: sorted(names) for page, names in marked.items()} == {
        page: sorted(places) for page, places in readme_tables.PAGES.items()
    }


def test_a_missing_place_for_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README.md has no place for the table cpu_attention"):
        readme_tables.with_tables("no tables here")
    with pytest.raises(ValueError, match=r"docs/kernel.md has no place for the table kernel_goals"):
        readme_tables.with_tables("no tables here", "docs/kernel.md")


def test_a_page_tells_that_a_record_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(RESULTS / "attention_h200.json", tmp_path)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    text = readme_tables.with_tables("<!-- table kernel_goals -->\n1.07\n<!-- end -->", "docs/kernel.md")
    assert text == f"<!-- table kernel_goals -->\n{readme_tables.NOT_MEASURED}\n<!-- end -->"


def test_goals_tell_the_worst_figure_and_how_many_meet_them() -> None:
    record = made_up_record()
    first, *others = record["dense"]
    first |= {"goal": 1.0, "rate_over_fa3": 0.5}
    for row in others:
        row |= {"goal": 1.0, "rate_over_fa3": 1.0}
    record["skip"][-1]["time_over_dense"] = None
    lines = doc_tables.kernel_goals_table(record, made_up_sparse_families_record()).splitlines()
    count, skip = len(record["dense"]), len(record["skip"])
    name = first["shape"]["name"]
    assert f"| dense rate / FlashAttention-3's | at least 1 | 0.5, {name} | {count - 1} of {count} |" in lines
    not_measured = f"not measured, {record['skip'][-1]['shape']['name']}"
    assert (
        f"| `skip_attention`, nothing dropped / dense | at most 1.02 | {not_measured} | {skip - 1} of {skip} |" in lines
    )


def test_the_share_of_the_ideal_is_that_of_the_fastest_configuration() -> None:
    record = json.loads((RESULTS / "sequence_parallel_h200.json").read_text())
    chunked = [row for row in record["layer"] if (row["method"], row["ranks"]) == ("Ulysses", 2)]
    best = max(case["efficiency"] for row in chunked for case in row["cases"] if case["density"] == 0.25)
    assert len(chunked) > 1
    header, _, goal, ulysses, *_ = doc_tables.efficiency_table(record).splitlines()
    column = header.split(" | ").index("2 GPUs, 25%")
    assert (goal.split(" | ")[column], ulysses.split(" | ")[column]) == ("90%", f"{best:.1%}")


def test_tables_carry_the_figures_of_the_record() -> None:
    record = json.loads((RESULTS / "cpu_attention.json").read_text())
    table = readme_tables.cpu_attention_table(record)
    row = record["rows"][0]
    assert f"| {row['head_dim']} | {row['dtype']} | {row['dense_gflops']:.0f} |" in table
    assert record["processor"] in table


def test_a_record_dropped_into_the_results_fills_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(RESULTS, results, ignore=shutil.ignore_patterns("*_h?00*"))
    monkeypatch.setattr(readme_tables, "RESULTS", results)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    before = readme_tables.with_tables(readme())
    assert before.count(readme_tables.NOT_MEASURED) == 5

    (results / "attention_h200.json").write_text(json.dumps(made_up_record()))
    (results / "video_dit_h200.json").write_text(json.dumps(video_dit_record()))
    (results / "whole_model_h200.json").write_text(json.dumps(made_up_whole_model_record()))
    (results / "sparse_families_h200.json").write_text(json.dumps(made_up_sparse_families_record()))
    (results / "sequence_parallel_h200.json").write_text(json.dumps(made_up_sequence_parallel_record()))
    (results / "attention_h200_density.png").touch()
    after = readme_tables.with_tables(before)
    assert readme_tables.NOT_MEASURED not in after
    assert "| B1 S32760 H40 D128 † | 700 | 682 | 600 |  | 1.026 | 1.014 |" in after
    assert "![Time against the share of tiles kept](benchmarks/results/attention_h200_density.png)" in after
    assert readme_tables.with_tables(after) == after


def test_the_gpu_table_carries_the_figures_of_the_record() -> None:
    record = made_up_record()
    lines = readme_tables.attention_table(record).splitlines()
    assert "Time / (density * FlashAttention-3's dense time) at 75 / 50 / 25 / 10% of the tiles:" in lines
    point = record["density"][3]["points"][0]
    row = next(line for line in lines if line.startswith("| B1 S32760 H40 D128 | 1."))
    assert row.split(" | ")[1].endswith(f" / {point['time_over_proportional']:.2f}")
    flex = [line for line in lines if line.startswith("FlexAttention at")]
    assert flex == ["FlexAttention at B1 S16384 H16 D128, blocks of 128 x 128: 1.79 / 1.79 / 1.79 / 1.79."]
    assert "host: `attention` 10, `skip_attention` 16, FlashAttention-3 90." in lines[-3]
    for fact in ("NVIDIA H200", "1650 to 1650 MHz", "775 TFLOP/s", "cuDNN 9.19", "fa3-fwd 0.0.3", "0123456789ab"):
        assert fact in lines[-1]


def test_the_gpu_table_leaves_cells_of_absent_peers_empty() -> None:
    record = made_up_record()
    record["absent"] = {"FlashAttention-3": "ImportError: no"}
    for row in record["dense"]:
        row["loops"] = [loop for loop in row["loops"] if loop["kernel"] == "attention"]
        row["rate_over_fa3"] = None
    for row in record["density"]:
        for point in row["points"]:
            point["time_over_proportional"] = None
    text = readme_tables.attention_table(record)
    assert "| B1 S32760 H40 D128 | 700 |  |  |  |  | 1.014 |" in text
    assert "FlashAttention-3 was absent." in text


def test_the_demo_on_a_gpu_is_told_in_milliseconds_with_its_worst_clip() -> None:
    text = readme_tables.video_dit_gpu_table(video_dit_record())
    assert "| attention, ms | whole run, ms |" in text
    assert "PSNR to dense, dB: mean / worst of 16 clips" in text
    assert "| -6 | 43% | 153 | 396 | 2.24x | 40.7 / 35.7 |" in text
    assert "| threshold, NVIDIA H200 | tiles kept" in text
    assert "NVIDIA H200, float16, 16 clips denoised together" in text
    assert "kernels aaaabbbbcccc, revision" in text


CARDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of one attention call on two cards, the second one's newer, of kernels that are not these sources'."""
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    for number, (name, gpu) in enumerate(CARDS.items()):
        record = made_up_record() | {"gpu": gpu, "date": f"2030-01-0{1 + number}T00:00:00+00:00"}
        (tmp_path / f"attention_{name}.json").write_text(json.dumps(record))
    return tmp_path


def kernels_of(path: Path, kernels: str | None) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernel_hash": kernels}))


def test_of_two_cards_the_newer_is_shown_and_the_other_on_its_page(results: Path) -> None:
    assert "dense, TFLOP/s, NVIDIA H200 |" in readme_tables.table("README.md", "attention")
    other = readme_tables.table("docs/benchmarks.md", "attention_other_cards")
    assert other.startswith("#### NVIDIA H100 80GB HBM3\n\n| dense, TFLOP/s, NVIDIA H100 80GB HBM3 |")
    (results / "attention_h100.json").unlink()
    assert readme_tables.table("docs/benchmarks.md", "attention_other_cards") == readme_tables.NO_OTHER_CARD


def test_the_card_measured_with_these_kernels_is_shown_before_a_newer_one(results: Path) -> None:
    kernels_of(results / "attention_h100.json", kernel_hash())
    assert "dense, TFLOP/s, NVIDIA H100 80GB HBM3 |" in readme_tables.table("README.md", "attention")


def test_rows_measured_with_other_kernels_are_marked_and_those_of_these_are_not(results: Path) -> None:
    kernels_of(results / "attention_h200.json", kernel_hash())
    text = readme_tables.table("README.md", "attention")
    assert "†" not in text
    kernels_of(results / "attention_h200.json", "0" * 12)
    kernels_of(results / "attention_h100.json", None)
    text = readme_tables.table("README.md", "attention")
    rows = [line for line in text.splitlines() if line.startswith(("| B1", "| B2"))]
    assert len(rows) == 10
    assert all(line.split(" | ")[0].endswith(" †") for line in rows)
    assert "| | contiguous |" in text  # a head is no row
    assert "† Measured with the kernels 000000000000, not with those of this source tree." in text
    other = readme_tables.table("docs/benchmarks.md", "attention_other_cards")
    assert "† Measured before records told their kernels." in other


def test_a_table_that_no_kernel_made_is_never_marked() -> None:
    assert "†" not in readme_tables.table("docs/many-gpus.md", "ring_maxima")
    assert "†" not in readme_tables.table("docs/design-notes.md", "tiles")


FACTS = ("command", "date", "kernel_hash", "revision", "gpu", "driver", "torch", "cuda", "python", "environment")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_record_begins_with_what_it_was_made_with(path: Path) -> None:
    record = json.loads(path.read_text())
    assert set(FACTS) <= set(record)
    assert record["date"]
    if record["kernel_hash"] is not None:  # older records are marked by having none
        assert re.fullmatch("[0-9a-f]{12}", record["kernel_hash"])
        assert record["environment"]["kernel hash"] == record["kernel_hash"]
        assert record["torch"]
    if not path.stem.endswith("_cpu") and path.stem != "cpu_attention":
        assert record["gpu"]
