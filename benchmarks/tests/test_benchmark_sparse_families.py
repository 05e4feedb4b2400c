"""The benchmark of the sparse families, as far as a machine without a GPU can tell: rules, checks, record, plot, table."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmark_records import made_up_selection_row, made_up_sparse_families_record  # isort: skip  (benchmarks/ on the path)
import attention
import checks
import mask_rules
import peers
import plots
import readme_tables
import run as run_module
import sparse_families as benchmark
import sparse_families_record
import sustained
from attention import Shape
from attention_record import ATTENTION, DENSE, FA3
from lite_attention import streaming_attention
from lite_attention.maps.video_tiles import VideoTiles
from mask_rules import Blocks, Causal, Dense, Rule, SlidingTiles
from sparse_families_record import (
    CAUSAL,
    GROWTH,
    NEARBY_BLOCKS,
    PARTS,
    RANDOM_BLOCKS,
    SELECTION,
    SLIDING_TILE_ATTENTION,
    SLIDING_TILES,
    STREAMING,
    STREAMING_ATTENTION,
    VIDEO_SPARSE,
    at_least,
    at_most,
    summary,
)

CANVAS, TILE = (4, 6, 10), (2, 2, 2)  # 2 x 3 x 5 tiles


def tile_order() -> list[tuple[int, int, int]]:
    """The place of each token's tile, in tile order."""
    counts = [n // size for n, size in zip(CANVAS, TILE, strict=True)]
    places = itertools.product(*map(range, counts))
    return [place for place in places for _ in range(math.prod(TILE))]


def blocks_rule() -> Blocks:
    keep = torch.rand(2, 5, 5) < 0.5
    keep[:, :, 0] = True
    return Blocks(keep, 4, torch.tensor([4, 3, 4, 1, 2]))


RULES = {
    "dense": Dense(20, 3),
    "causal": Causal(20, (None, None)),
    "streaming": Causal(20, ((3, 4), (0, 1), (5, 30), (12, 12))),
    "mixed": Causal(20, (None, (2, 5))),
    "window": SlidingTiles(CANVAS, TILE, (1, 3, 3), 2),
    "whole axes": SlidingTiles(CANVAS, TILE, (2, 3, 1), 2),
}


def all_kept(rule: Rule, heads: int, length: int) -> torch.Tensor:
    return torch.stack([rule.kept(head, torch.arange(length)) for head in range(heads)])


# --- rules ---


@pytest.mark.parametrize("name", RULES)
def test_pairs_are_as_many_as_the_rule_keeps(name: str) -> None:
    rule = RULES[name]
    heads, length = (len(rule.windows) if isinstance(rule, Causal) else rule.heads), rule.length
    assert rule.pairs == int(all_kept(rule, heads, length).sum())


def test_pairs_of_blocks_are_those_of_tokens_that_exist() -> None:
    rule = blocks_rule()
    exists = (torch.arange(4) < rule.sizes.unsqueeze(-1)).flatten()
    assert rule.pairs == int(all_kept(rule, 2, 20)[:, exists].sum())


def test_streaming_heads_see_the_first_keys_and_the_recent_ones() -> None:
    seen = Causal(12, ((2, 3),)).kept(0, torch.tensor([0, 1, 4, 11]))
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0], [0, 1], [0, 1, 2, 3, 4], [0, 1, 9, 10, 11]]


def test_windows_are_shifted_at_the_borders_not_cut() -> None:
    rule = SlidingTiles(CANVAS, TILE, (1, 3, 3), 1)
    places = tile_order()
    seen = rule.kept(0, torch.arange(rule.length))
    assert (seen.sum(dim=-1) == 1 * 3 * 3 * math.prod(TILE)).all()
    corner = {places[key] for key in seen[0].nonzero().flatten().tolist()}
    assert corner == set(itertools.product([0], [0, 1, 2], [0, 1, 2]))
    middle = places.index((1, 1, 3))
    assert {places[key] for key in seen[middle].nonzero().flatten().tolist()} == set(
        itertools.product([1], [0, 1, 2], [2, 3, 4])
    )


def test_the_check_takes_the_rule_and_refuses_any_other() -> None:
    q, k, v = torch.randn(3, 2, 300, 3, 16, dtype=torch.float64)
    rule, other = Causal(300, ((8, 40),) * 3), Causal(300, ((8, 41),) * 3)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    scores = scores.masked_fill(~all_kept(rule, 3, 300), -math.inf)
    out, lse = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)
    found = mask_rules.check_rows(q, k, v, out, lse, rule)
    assert found.rows == 2 * mask_rules.HEADS_CHECKED * (2 * mask_rules.EDGE_ROWS + mask_rules.RANDOM_ROWS)
    assert found.out_error < 1e-12
    with pytest.raises(checks.WrongResultError, match="out error"):
        mask_rules.check_rows(q, k, v, out, None, other)
    with pytest.raises(checks.WrongResultError, match="lse error"):
        mask_rules.check_rows(q, k, v, out, lse + 0.01, rule)
    out[1, 150, 1, 3] = math.nan
    with pytest.raises(checks.WrongResultError, match="not finite"):
        mask_rules.check_rows(q, k, v, out, None, rule)


def test_the_coarse_stage_counts_the_tokens_that_exist() -> None:
    sizes = torch.tensor([4, 1, 3])
    exists = (torch.arange(4) < sizes.unsqueeze(-1)).flatten()
    q, k, v = torch.randn(3, 1, 2, 12, 8) * exists[:, None]
    scores, out = mask_rules.coarse_stage(q, k, v, sizes)
    query, key = q[0, 1, 4:5].double(), k[0, 1, 8:11].double().mean(0)
    assert scores[0, 1, 1, 2].item() == pytest.approx((query @ key).item() / math.sqrt(8))
    values = torch.stack([x[:size].double().mean(0) for x, size in zip(v[0, 1].split(4), sizes, strict=True)])
    torch.testing.assert_close(out[0, 1, 1], scores[0, 1, 1].softmax(-1) @ values)


def test_a_map_keeps_the_largest_scores_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    first, second = torch.tensor([[False, True, True, False, False]]), torch.tensor([[False, True, False, True, False]])
    mask_rules.check_largest(first, scores, 2, tolerance=0)
    mask_rules.check_largest(second, scores, 2, tolerance=0.1)
    with pytest.raises(checks.WrongResultError, match="does not keep its 2 largest scores"):
        mask_rules.check_largest(second, scores, 2, tolerance=0)
    with pytest.raises(checks.WrongResultError, match="does not keep its 2 largest scores"):
        mask_rules.check_largest(torch.tensor([[True, True, False, False, False]]), scores, 2, tolerance=0.1)
    with pytest.raises(checks.WrongResultError, match="does not keep 3"):
        mask_rules.check_largest(first, scores, 3, tolerance=0)


# --- the script ---


class _NoTelemetry:
    def driver(self) -> str:
        return "none"


def _loop(call: Callable[[], object], seconds: float, telemetry: object) -> sustained.Loop:
    call()
    return sustained.Loop(2.0, 3, False, 1000.0, None)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark with tiny shapes on the CPU kernels, clocks that stand still and torch's SDPA as FlashAttention-3."""

    def prepare(causal: bool = False) -> peers.Prepare:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            inputs = (x.transpose(1, 2) for x in (q, k, v))
            return functional.scaled_dot_product_attention(*inputs, is_causal=causal).transpose(1, 2)

        return lambda q, k, v: lambda: call(q, k, v)

    for name, value in {
        "DEVICE": "cpu",
        "CANVAS": (4, 12, 24),
        "TILE": (2, 4, 8),
        "WINDOWS": ((1, 3, 1), (2, 3, 3)),
        "SLIDING_TILES_SHAPE": Shape(1, 4 * 12 * 24, 2, 64),
        "BLOCK_GRID": (2, 3, 2),
        "BLOCKS_KEPT": 5,
        "BLOCKS_NEARBY": 3,
        "VIDEO_SPARSE_SHAPE": Shape(1, 12 * 64, 2, 64),
        "SELECTION_TILES": VideoTiles((5, 8, 9), (4, 4, 4)),
        "SELECTION_SHAPE": Shape(1, 12 * 64, 2, 64),
        "SPARSITY": 0.6,
        "SINK_SIZE": 20,
        "RECENT_SIZE": 70,
        "STREAMING_SHAPES": (Shape(1, 300, 2, 64), Shape(1, 600, 2, 64)),
        "EAGER_LENGTH": 300,
        "EAGER_CALLS": 2,
        "MIXED_SHAPES": (Shape(1, 300, 3, 64),),
        "FULL_HEADS": 1,
        "CAUSAL_SHAPES": (Shape(1, 200, 2, 64), Shape(1, 200, 2, 32)),
        "Telemetry": _NoTelemetry,
        "sustained": _loop,
        "burst_ms": lambda call: 1.5,
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    for name, value in {"DEVICE": "cpu", "CUBLAS_SIZE": 64, "sustained": _loop}.items():
        monkeypatch.setattr(run_module, name, value)
    monkeypatch.setattr(attention, "DEVICE", "cpu")
    monkeypatch.setattr(sparse_families_record, "SPEED_UP_LENGTH", 300)
    monkeypatch.setattr(sparse_families_record, "GROWTH_FROM", 300)
    monkeypatch.setattr(peers, "flash_attention_3", prepare)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def run_on_the_cpu(path: Path, parts: Sequence[str]) -> dict[str, Any]:
    run = benchmark.Benchmark(path, 1.0)
    with torch.no_grad():
        run.run(parts)
    record: dict[str, Any] = json.loads((path / "sparse_families_h200.json").read_text())
    assert summary(record) == summary(run.record)
    return record


def cases(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(loop["kernel"], loop["case"]) for loop in row["loops"]]


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_checks_and_records_every_part(tmp_path: Path) -> None:
    record = run_on_the_cpu(tmp_path, PARTS)
    assert record["failures"] == []
    assert [len(record[part]) for part in (*PARTS, GROWTH)] == [1, 1, 1, 2, 1, 2, 1]
    around = [(FA3, DENSE), (ATTENTION, DENSE)]
    windows = [(SLIDING_TILE_ATTENTION, case) for case in ("(1, 3, 1)", "(2, 3, 3)")]
    assert cases(record[SLIDING_TILES][0]) == [*around, *windows, *reversed(around)]
    assert [loop["density"] for loop in record[SLIDING_TILES][0]["loops"][2:4]] == [pytest.approx(1 / 6), 1.0]
    blocks = record[VIDEO_SPARSE][0]
    assert cases(blocks)[2:4] == [(ATTENTION, RANDOM_BLOCKS), (ATTENTION, NEARBY_BLOCKS)]
    assert [blocks["maps"][case]["density"] for case in (RANDOM_BLOCKS, NEARBY_BLOCKS)] == [pytest.approx(5 / 12)] * 2
    assert record[SELECTION][0]["blocks"] == {"number": 12, "kept": 5}
    for row in (row for part in PARTS for row in record[part]):
        assert row["absent"] == {}
        for loop in row["loops"]:
            assert loop["check"] is None or loop["check"]["out_error"] < 5e-3
    short, long = record[STREAMING]
    assert short["eager"][0]["ms"] == 1.0
    assert long["eager"] == []
    assert short["goals"][0] == {
        "name": "causal FlashAttention-3 / streaming, 300 tokens",
        "value": 1.0,
        "at_least": 12.0,
        "met": False,
    }
    assert record[GROWTH][0]["goals"][0]["value"] == 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_wrong_result_is_not_timed_and_the_block_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_key_less(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink_size: int, recent_size: int) -> Any:
        return streaming_attention(q, k, v, sink_size, recent_size - 1)

    monkeypatch.setattr(benchmark.streaming, "attention", one_key_less)
    record = run_on_the_cpu(tmp_path, [STREAMING])
    row, name = record[STREAMING][0], f"{STREAMING_ATTENTION}, {STREAMING}"
    assert row["absent"][name].startswith("WrongResultError: out error")
    assert (STREAMING_ATTENTION, STREAMING) not in cases(row)
    assert len(row["loops"]) == 5
    assert row["speed_up"] is None
    assert not row["goals"][0]["met"]
    assert record["failures"][0]["block"] == f"B1 S300 H2 D64, {name}"
    assert SLIDING_TILES not in record


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_missing_peer_is_named_and_missed_by_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(causal: bool = False) -> Any:
        raise ImportError("No module named 'fa3_fwd_interface'")

    monkeypatch.setattr(peers, "flash_attention_3", missing)
    record = run_on_the_cpu(tmp_path, [CAUSAL])
    assert record["absent"] == {FA3: "ImportError: No module named 'fa3_fwd_interface'"}
    assert record["failures"] == []
    assert [cases(row) for row in record[CAUSAL]] == [[(ATTENTION, CAUSAL)]] * 2
    assert record[CAUSAL][0]["rate_over_fa3"] is None


@pytest.mark.usefixtures("on_the_cpu")
def test_nearby_blocks_keep_their_own_and_as_many_as_random_ones() -> None:
    keep = benchmark.nearby_blocks(3)
    assert (keep.sum(-1) == 5).all()
    assert keep.diagonal(dim1=1, dim2=2).all()
    assert not torch.equal(keep[0], keep[1])


# --- the record ---


def test_goals_are_judged_and_those_not_measured_are_missed() -> None:
    assert at_least("rate", 0.95, 0.95)["met"]
    assert not at_least("rate", 0.94, 0.95)["met"]
    assert at_most("share", 0.08, 0.08)["met"]
    assert not at_most("share", None, 0.08)["met"]


def test_the_rate_of_sliding_tiles_is_to_the_mean_of_the_dense_loops() -> None:
    shape = Shape(1, 69120, 12, 128).facts()
    rates = ((ATTENTION, DENSE, 700.0), (SLIDING_TILE_ATTENTION, "(3, 3, 3)", 680.0), (ATTENTION, DENSE, 660.0))
    loops = [{"kernel": kernel, "case": case, "tflops": rate, "ms": 1.0} for kernel, case, rate in rates]
    facts = {"canvas": (18, 48, 80), "tile": (6, 8, 8), "windows": ["(3, 3, 3)", "(3, 3, 5)"]}
    measured, failed = sparse_families_record.sliding_tiles_row(shape, facts, loops, {})["goals"]
    assert measured == {"name": "rate / dense, (3, 3, 3)", "value": 1.0, "at_least": 0.95, "met": True}
    assert failed == {"name": "rate / dense, (3, 3, 5)", "value": None, "at_least": 0.95, "met": False}


def test_the_choice_costs_what_comes_before_the_fine_stage() -> None:
    row = made_up_selection_row()
    assert row["goals"][0]["value"] == pytest.approx((0.9 + 0.3 + 0.1) / 26.0)
    assert row["whole_over_fine"] == pytest.approx(28.0 / 26.0)


def test_the_summary_says_which_goals_are_met() -> None:
    record = made_up_sparse_families_record()
    record["failures"] = [{"part": CAUSAL, "block": "B1 S4096 H16 D64", "error": "RuntimeError: no"}]
    lines = summary(record).splitlines()
    assert max(map(len, lines)) <= 120
    assert "MISSED rate / dense, (3, 3, 3): 0.928 (>= 0.95)" in lines
    assert "met    TFLOP/s, random blocks: 565.000 (>= 560)" in lines
    assert "met    what comes before / fine stage: 0.050 (<= 0.08)" in lines
    assert "met    streaming, time a token, 65536 / 16384 tokens: 1.000 (<= 1.1)" in lines
    assert lines[-1] == "FAILED causal B1 S4096 H16 D64: RuntimeError: no"


# --- plot and table ---


def test_the_plot_is_drawn_from_the_record_whatever_part_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made_up_sparse_families_record()
    path = tmp_path / "sparse_families_h200.json"
    monkeypatch.setattr("sys.argv", ["plots.py", str(path)])
    for missing in ((), (VIDEO_SPARSE, STREAMING)):
        path.write_text(json.dumps({part: value for part, value in record.items() if part not in missing}))
        plots.main()
        assert path.with_suffix(".png").stat().st_size > 10_000
        path.with_suffix(".png").unlink()


def test_the_table_carries_the_figures_of_the_record() -> None:
    record = made_up_sparse_families_record()
    lines = readme_tables.sparse_families_table(record).splitlines()
    assert "| B1 S69120 H12 D128, dense | 100% | 690 | | 660 | | |" in lines
    assert "| (3, 3, 3) | 15.0% | 640 | 711 | | 0.928 | 536 (ThunderKittens, measured earlier, on an H200) |" in lines
    assert any(
        line.startswith("| random blocks | 9.9% | 565 | 628 | | 0.821 | 556 (ThunderKittens, published")
        for line in lines
    )
    assert "| FlashAttention-3 / streaming | 1.8 | 3.6 | 7.1 | 14.2 | 28.4 | 56.9 |" in lines
    assert "| B1 S4096 H16 D64 | 612 | 600 | 1.020 |" in lines
    assert any("144 of 1440 blocks" in line and "takes 5.0% of the fine stage" in line for line in lines)
    for fact in ("NVIDIA H200", "1650 to 1650 MHz", "775 TFLOP/s", "python benchmarks/sparse_families.py"):
        assert fact in lines[-1]
