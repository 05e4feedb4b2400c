"""DuoAttention's pattern files: what is published is read, what is saved is read back, gates become tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from lite_attention.families.duo import load_duo_pattern, save_duo_pattern, sparsify_attention_heads
from support.inputs import report


def test_a_published_pattern_is_read(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text(
        "6.054687500000000000e-01\t0.000000000000000000e+00\t1.250000000000000000e+00\n"
        "-1.000000000000000000e-03\t4.310607910156250000e-04\t1.000000000000000000e+00\n"
    )
    (tmp_path / "config.json").write_text(
        '{"lr": 0.02, "sink_size": 128, "recent_size": 256, "deploy_sink_size": null}'
    )
    heads, sink_size, recent_size = load_duo_pattern(tmp_path)
    assert (sink_size, recent_size) == (128, 256)
    assert heads.tolist() == [[0.60546875, 0.0, 1.0], [0.0, 0.000431060791015625, 1.0]]
    assert heads.dtype == torch.float32


@pytest.mark.parametrize("shape", [(32, 8), (1, 5), (3, 1)])
def test_what_is_saved_is_read_back(tmp_path: Path, shape: tuple[int, int]) -> None:
    heads = torch.rand(shape)
    save_duo_pattern(tmp_path / "new" / "folder", heads, 64, 256)
    read = load_duo_pattern(str(tmp_path / "new" / "folder"))
    assert torch.equal(read.full_attention_heads, heads)
    assert read[1:] == (64, 256)
    full = sparsify_attention_heads(heads, sparsity=0.5)
    save_duo_pattern(tmp_path, full, 64, 256)
    assert torch.equal(load_duo_pattern(tmp_path).full_attention_heads.bool(), full)


def test_a_threshold_keeps_the_heads_at_it_and_above() -> None:
    gates = torch.tensor([[0.2, 0.5], [0.75, 0.4]])
    assert sparsify_attention_heads(gates, threshold=0.5).tolist() == [[False, True], [True, False]]
    assert sparsify_attention_heads(gates, threshold=0.0).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_a_sparsity_streams_that_share_of_the_smallest_gates(sparsity: float) -> None:
    gates = torch.rand(10, 4)
    full = sparsify_attention_heads(gates, sparsity=sparsity)
    assert int((~full).sum()) == round(40 * sparsity)
    if 0 < sparsity < 1:
        assert gates[full].min() >= gates[~full].max()


def test_of_equal_gates_the_earlier_stays_full() -> None:
    gates = torch.tensor([[0.5, 1.0, 0.5], [0.5, 0.0, 0.5]])
    for sparsity, full in (
        (1 / 6, [[1, 1, 1], [1, 0, 1]]),
        (2 / 6, [[1, 1, 1], [1, 0, 0]]),
        (3 / 6, [[1, 1, 1], [0, 0, 0]]),
        (4 / 6, [[1, 1, 0], [0, 0, 0]]),
        (5 / 6, [[0, 1, 0], [0, 0, 0]]),
    ):
        assert sparsify_attention_heads(gates, sparsity=sparsity).int().tolist() == full


def test_errors_of_pattern_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def load(gates: str | None, config: Any = None) -> Callable[[], object]:
        def call() -> None:
            for file in Path("pattern").glob("*"):
                file.unlink()
            Path("pattern").mkdir(exist_ok=True)
            if gates is not None:
                Path("pattern/full_attention_heads.tsv").write_text(gates)
            if config is not None:
                Path("pattern/config.json").write_text(json.dumps(config))
            load_duo_pattern("pattern")

        return call

    sizes = {"sink_size": 4, "recent_size": 31}
    heads = torch.rand(2, 2)
    calls: dict[str, Callable[[], object]] = {
        "no folder": lambda: load_duo_pattern("nowhere"),
        "no gates": load(None, sizes),
        "no config": load("1\t0\n"),
        "empty": load("\n", sizes),
        "ragged": load("1\t0\n1\n", sizes),
        "spaces": load("1 0\n", sizes),
        "words": load("1\t0\n1\tfull\n", sizes),
        "NaN": load("1\tnan\n", sizes),
        "no sink_size": load("1\t0\n", {"recent_size": 3}),
        "recent_size null": load("1\t0\n", {"sink_size": 3, "recent_size": None}),
        "config is a list": load("1\t0\n", [1, 2]),
        "saving a row": lambda: save_duo_pattern("pattern", heads[0], 4, 31),
        "threshold and sparsity": lambda: sparsify_attention_heads(heads, threshold=0.5, sparsity=0.5),
        "neither": lambda: sparsify_attention_heads(heads),
        "sparsity in percent": lambda: sparsify_attention_heads(heads, sparsity=50),
    }
    assert_expected_inline(
        report(calls),
        """\
no folder -> FileNotFoundError: load_duo_pattern: nowhere/full_attention_heads.tsv is missing, expected full_attention_heads.tsv and config.json
no gates -> FileNotFoundError: load_duo_pattern: pattern/full_attention_heads.tsv is missing, expected full_attention_heads.tsv and config.json
no config -> FileNotFoundError: load_duo_pattern: pattern/config.json is missing, expected full_attention_heads.tsv and config.json
empty -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv is empty, expected a line for each layer
ragged -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv, line 2 has 1 heads, expected 2 as in the first line
spaces -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv, line 1 is '1 0', expected numbers with tabs between them
words -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv, line 2 is '1\\tfull', expected numbers with tabs between them
NaN -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv, line 1 is '1\\tnan', expected finite numbers
no sink_size -> ValueError: load_duo_pattern: pattern/config.json has sink_size None, expected a number of tokens
recent_size null -> ValueError: load_duo_pattern: pattern/config.json has recent_size None, expected a number of tokens
config is a list -> ValueError: load_duo_pattern: pattern/config.json has sink_size None, expected a number of tokens
saving a row -> ValueError: save_duo_pattern: full_attention_heads has 1 dimensions, expected 2: [layers, KV heads]
threshold and sparsity -> ValueError: sparsify_attention_heads: threshold is 0.5 and sparsity is 0.5, expected one of the two
neither -> ValueError: sparsify_attention_heads: threshold is None and sparsity is None, expected one of the two
sparsity in percent -> ValueError: sparsify_attention_heads: sparsity is 50, expected 0 to 1""",
    )
