"""The GPU benchmark, as far as a machine without a GPU can tell: its maps, checks, ratios, record and plots."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmark_records import made_up_record  # isort: skip  (puts benchmarks/ on the path)
import attention as benchmark
import checks
import keep_maps
import lite_attention
import peers
import plots
import run as run_module
import sustained
from attention_record import (
    ATTENTION,
    CONTIGUOUS,
    CUDNN,
    FA3,
    PATTERNS,
    PER_TILE,
    SCATTERED,
    SKIP_ATTENTION,
    UNEQUAL,
    density_row,
    summary,
)
from lite_attention.ops.load import host

LENGTH = 5000  # 79 query tiles in 27 groups, 40 KV tiles, all ragged


def made_map(pattern: str, density: float, head_dim: int = 128) -> torch.Tensor:
    return keep_maps.keep_map(pattern, density, 2, 3, LENGTH, head_dim, torch.bfloat16)


# --- maps ---


@pytest.mark.parametrize("density", [0.75, 0.5, 0.25, 0.1, 0.001, 1.0])
@pytest.mark.parametrize("pattern", [CONTIGUOUS, SCATTERED, PER_TILE])
def test_every_row_keeps_the_same_number_of_tiles(pattern: str, density: float) -> None:
    keep = made_map(pattern, density)
    assert keep.shape == (2, 3, 79, 40)
    assert (keep.sum(dim=-1) == max(1, round(density * 40))).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_group_shares_its_row_unless_tiles_draw_their_own(pattern: str, head_dim: int) -> None:
    keep = made_map(pattern, 0.25, head_dim)
    tiles = (
        lite_attention.visit_rows(head_dim, torch.bfloat16) // lite_attention.tile_shape(head_dim, torch.bfloat16)[0]
    )
    starts = torch.arange(keep.shape[2]) // tiles * tiles
    assert torch.equal(keep, keep[:, :, starts]) == (pattern != PER_TILE)
    assert not torch.equal(keep[:, :, :tiles], keep[:, :, tiles : 2 * tiles])


def test_contiguous_maps_keep_one_wrapping_run_around_the_diagonal() -> None:
    keep = made_map(CONTIGUOUS, 0.25)
    ends = (keep != keep.roll(1, dims=-1)).sum(dim=-1)
    assert (ends == 2).all()
    diagonal = torch.arange(79) // 3 * 3 * 64 // 128
    assert keep[:, :, torch.arange(79), diagonal].all()
    assert keep[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 35, 36, 37, 38, 39]


def test_unequal_densities_spread_as_2_to_60_percent_do_and_keep_their_mean() -> None:
    for mean, low, high in ((0.31, 0.02, 0.60), (0.1, 0.0064, 0.194), (0.75, 0.516, 0.984)):
        drawn = keep_maps.unequal_densities(mean, (100_000,), "cpu")
        assert drawn.min().item() == pytest.approx(low, abs=2e-3)
        assert drawn.max().item() == pytest.approx(high, abs=2e-3)
        assert drawn.mean().item() == pytest.approx(mean, abs=2e-3)


def test_unequal_maps_differ_in_density_from_group_to_group() -> None:
    keep = keep_maps.keep_map(UNEQUAL, 0.25, 4, 8, LENGTH, 128, torch.bfloat16)
    assert keep.float().mean().item() == pytest.approx(0.25, abs=0.01)
    kept = keep.sum(dim=-1)
    assert kept.min() >= 1
    assert kept.max() > 3 * kept.min()


def test_scattered_maps_are_drawn_anew_for_every_head() -> None:
    keep = made_map(SCATTERED, 0.25)
    assert not torch.equal(keep[0, 0], keep[0, 1])
    assert not torch.equal(keep[0, 0], keep[1, 0])


def test_an_unknown_pattern_is_named() -> None:
    with pytest.raises(ValueError, match=r"pattern is 'diagonal', expected one of 'contiguous'"):
        made_map("diagonal", 0.5)


# --- checks ---


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_kernel_passes_the_check_on_every_pattern(pattern: str) -> None:
    q, k, v = torch.randn(3, 2, 1000, 3, 64, dtype=torch.bfloat16)
    keep = keep_maps.keep_map(pattern, 0.4, 2, 3, 1000, 64, torch.bfloat16)
    for kernel in (ATTENTION, SKIP_ATTENTION):
        found = benchmark.sparse_candidate(kernel, pattern, keep, q, k, v).check(q, k, v)
        assert found.query_tiles == checks.TILES_CHECKED
        assert 0 < found.out_error < 5e-3
        assert found.lse_error is not None
        assert found.lse_error < 1e-5


def test_the_check_refuses_another_map_a_nan_and_a_wrong_lse() -> None:
    q, k, v = torch.randn(3, 1, 500, 2, 64)
    keep = keep_maps.keep_map(SCATTERED, 0.5, 1, 2, 500, 64, torch.float32)
    out, lse = lite_attention.attention(q, k, v, keep=lite_attention.pack_keep_map(keep))
    checks.check(q, k, v, out, lse, keep, (64, 128))
    with pytest.raises(checks.WrongResultError, match="out error"):
        checks.check(q, k, v, out, lse, ~keep, (64, 128))
    with pytest.raises(checks.WrongResultError, match="lse error"):
        checks.check(q, k, v, out, lse + 0.01, keep, (64, 128))
    with pytest.raises(checks.WrongResultError, match="lse error nan"):
        checks.check(q, k, v, out, lse * math.nan, keep, (64, 128))
    out[0, 250, 1, 3] = math.nan
    with pytest.raises(checks.WrongResultError, match="not finite"):
        checks.check(q, k, v, out, None, keep, (64, 128))


def test_a_changed_map_of_skip_attention_is_noticed() -> None:
    q, k, v = torch.randn(3, 1, 500, 2, 64, dtype=torch.bfloat16)
    keep = keep_maps.keep_map(SCATTERED, 0.5, 1, 2, 500, 64, torch.bfloat16)
    candidate = benchmark.sparse_candidate(SKIP_ATTENTION, SCATTERED, keep, q, k, v)
    right = candidate.call
    candidate.call = lambda: (*right()[:2], right()[2] ^ 1)
    with pytest.raises(checks.WrongResultError, match="next_keep"):
        candidate.check(q, k, v)


# --- the record ---


def test_ratios_are_to_the_mean_of_the_loops_before_and_after() -> None:
    shape = benchmark.Shape(1, 16384, 16, 128)
    loops = [
        {"kernel": FA3, "ms": 3.0},
        {"kernel": ATTENTION, "pattern": SCATTERED, "density": 0.25, "ms": 1.0},
        {"kernel": ATTENTION, "pattern": PER_TILE, "density": 0.25, "ms": 2.0},
        {"kernel": FA3, "ms": 5.0},
    ]
    row = density_row(shape.facts(), 0.25, 1.05, loops, {})
    assert row["fa3_ms"] == 4.0
    assert row["fa3_spread"] == 0.5
    assert [one["time_over_fa3"] for one in row["points"]] == [0.25, 0.5]
    assert [one["time_over_proportional"] for one in row["points"]] == [1.0, 2.0]
    assert [one["goal"] for one in row["points"]] == [1.05, None]
    without = density_row(shape.facts(), 0.25, 1.05, loops[1:3], {FA3: "not installed"})
    assert without["fa3_ms"] is None
    assert without["points"][0]["time_over_proportional"] is None


def test_the_summary_is_short_and_marks_what_misses_its_goal() -> None:
    record = made_up_record()
    record["dense"][0]["rate_over_fa3"] = 0.97
    record["absent"] = {FA3: "No module named 'fa3_fwd_interface'"}
    lines = summary(record).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "0.970!" in text
    assert "1.026 " in text
    assert "no_grad 16.0!" in text
    assert "absent: FlashAttention-3" in text


class _NoTelemetry:
    def driver(self) -> str:
        return "none"


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark with tiny shapes on the CPU kernels, clocks that stand still and torch's SDPA as FlashAttention-3."""
    small, other = benchmark.Shape(1, 300, 2, 64), benchmark.Shape(2, 200, 1, 256)

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def loop(call: Callable[[], object], seconds: float, telemetry: object) -> sustained.Loop:
        call()
        return sustained.Loop(2.0, 3, False, 1000.0, None)

    for name, value in {
        "DEVICE": "cpu",
        "DENSE_GOALS": {small: 1.0, other: 0.95},
        "DENSITY_GOALS": {small: {0.5: 1.05}},
        "SWEEP_LENGTHS": (128, 256),
        "HOST_CALLS": 100,
        "Telemetry": _NoTelemetry,
        "sustained": loop,
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    for name, value in {"DEVICE": "cpu", "CUBLAS_SIZE": 64, "sustained": loop}.items():
        monkeypatch.setattr(run_module, name, value)
    monkeypatch.setattr(peers, "flash_attention_3", lambda: prepare)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_records_every_part_and_what_is_absent(tmp_path: Path) -> None:
    run = benchmark.Benchmark(tmp_path, 1.0)
    with torch.no_grad():
        run.run(benchmark.PARTS, quick=False)
    record = json.loads((tmp_path / "attention_h200.json").read_text())
    assert record["failures"] == []
    assert (record["kernel_hash"], record["revision"]) == (host.KERNEL_HASH, host.GIT_REVISION)
    assert record["gpu"] == "NVIDIA H200"
    assert [len(record[part]) for part in ("cublas", *benchmark.PARTS)] == [1, 2, 2, 4, 2, 1]
    dense = record["dense"][1]
    assert [loop["kernel"] for loop in dense["loops"]] == [FA3, ATTENTION, FA3]
    assert list(dense["absent"]) == [CUDNN]
    assert dense["rate_over_fa3"] == 1.0
    assert dense["loops"][0]["check"]["out_error"] < 5e-3
    assert [loop["kernel"] for loop in record["skip"][0]["loops"]] == [ATTENTION, SKIP_ATTENTION] * 2
    half = record["density"][1]
    assert [(one["kernel"], one["pattern"]) for one in half["points"]] == [
        (ATTENTION, CONTIGUOUS),
        (ATTENTION, SCATTERED),
        (SKIP_ATTENTION, SCATTERED),
        (ATTENTION, UNEQUAL),
        (ATTENTION, PER_TILE),
    ]
    assert half["points"][0]["density"] == pytest.approx(2 / 3)
    assert half["points"][0]["time_over_proportional"] == pytest.approx(1.5)
    assert set(record["host"][0]["microseconds"]) == {ATTENTION, SKIP_ATTENTION, FA3}
    assert summary(record)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_missing_peer_and_a_failing_block_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("No module named 'fa3_fwd_interface'")

    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("attention: no kernel")

    monkeypatch.setattr(peers, "flash_attention_3", missing)
    run = benchmark.Benchmark(tmp_path, 1.0)
    with torch.no_grad():
        run.run(["dense"], quick=True)
        monkeypatch.setattr(lite_attention, "attention", broken)
        run.run(["dense"], quick=True)
    record = json.loads((tmp_path / "attention_h200.json").read_text())
    assert record["absent"] == {FA3: "ImportError: No module named 'fa3_fwd_interface'"}
    assert record["dense"][0]["rate_over_fa3"] is None
    assert len(record["dense"]) == 1
    assert record["failures"] == [
        {"part": "dense", "block": "B1 S300 H2 D64 1.0", "error": "RuntimeError: attention: no kernel"}
    ]
    assert summary(record)


def test_samples_before_a_loop_settles_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Telemetry:
        @contextlib.contextmanager
        def sampling(self) -> Iterator[list[tuple[float, float]]]:
            yield [(1.0, 1.0), (1600.0, 700.0), (1700.0, math.nan), (1650.0, 680.0)]

    monkeypatch.setattr(sustained, "_elapsed_ms", lambda call, launches: 4.0 * launches)
    loop = sustained.sustained(lambda: None, 1.0, Telemetry())  # type: ignore[arg-type]
    assert loop == sustained.Loop(4.0, 250, False, 1650.0, 690.0)


# --- plots ---


def test_plots_are_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "attention_h200.json"
    path.write_text(json.dumps(made_up_record()))
    monkeypatch.setattr("sys.argv", ["plots.py", str(path)])
    plots.main()
    for name in ("length", "density"):
        assert (tmp_path / f"attention_h200_{name}.png").stat().st_size > 10_000
