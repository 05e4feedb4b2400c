"""README.md's tables are those of the committed results."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import readme_tables  # noqa: E402


def test_readme_tables_are_up_to_date() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme_tables.with_tables(text) == text, "run python benchmarks/readme_tables.py"


def test_a_missing_place_for_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for the table cpu_attention"):
        readme_tables.with_tables("no tables here")


def test_tables_carry_the_figures_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "cpu_attention.json").read_text())
    table = readme_tables.cpu_attention_table(record)
    row = record["rows"][0]
    assert f"| {row['head_dim']} | {row['dtype']} | {row['dense_gflops']:.0f} |" in table
    assert record["processor"] in table
