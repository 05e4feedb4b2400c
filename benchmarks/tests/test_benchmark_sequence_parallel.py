"""The benchmark of sequence parallelism, as far as a machine without GPUs can tell: a run on two processes, the record."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.ranks import run_on_ranks

from benchmark_records import (  # isort: skip  (puts benchmarks/ on the path)
    made_up_layer_row,
    made_up_rank_loop,
    made_up_sequence_parallel_record,
)
import plots
import readme_tables
import sequence_parallel as benchmark
from attention_record import ATTENTION, FA3, SKIP_ATTENTION
from checks import WrongResultError
from lite_attention import LiteAttention, merge_attention, ops
from sequence_parallel_record import (
    BALANCE,
    LAYER,
    MODEL,
    ONE_GPU,
    PARTS,
    PEERS,
    RING,
    TEXTBOOK,
    ULYSSES,
    USP,
    YUNCHANG,
    best_layer,
    case_row,
    goals,
    method_of,
    model_case,
    model_efficiency,
    over_ranks,
    peer_over_ours,
    rank_counts,
    summary,
)
from support.rank_pool import RankError

TINY = benchmark.SIZES["tiny"]["shape"]


# --- a run ---


def run_task(name: str, *args: Any) -> Any:
    """A task of the benchmark, from a module that any process of the tests finds."""
    return getattr(benchmark, name)(*args)


class _SharedPool:
    """The processes that the tests keep, as the benchmark's own."""

    alive = True

    def __init__(self, world_size: int, device: str, collective_timeout: float) -> None:
        self.where = world_size, device

    def run(self, task: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        return run_on_ranks(*self.where, run_task, task.__name__, *args, timeout=timeout)

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_a_run_on_two_processes_checks_and_records_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "RankPool", _SharedPool)
    options = "--device cpu --sizes tiny --seconds 0.001 --ranks 2 --parts"
    parts = [LAYER, BALANCE, PEERS]
    assert benchmark.main([*options.split(), *parts, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "sequence_parallel_cpu.json").read_text())
    assert record["failures"] == []
    assert record["left_out"] == []
    assert (record["gpu"], record["gpus"], record["complete"]) == ("a CPU", 2, True)
    assert [(loop["kernel"], loop["density"]) for loop in record[ONE_GPU][0]["loops"]] == [
        (ATTENTION, 1.0),
        (SKIP_ATTENTION, 0.25),
    ]
    assert list(record["absent"]) == [FA3, YUNCHANG]
    configurations = [(row["method"], row["ring"], row["ulysses"], row["head_chunks"]) for row in record[LAYER]]
    assert configurations == [(ULYSSES, 1, 2, 1), (ULYSSES, 1, 2, 2), (RING, 2, 1, 1)]
    for row in record[LAYER]:
        for state in row["state"]["by_rank"]:
            assert state["equal_maps"]
            assert 0.02 < state["skipped"] < 0.98
            assert state["equal"]
        dense, sparse = row["cases"]
        assert (dense["density"], sparse["density"]) == (1.0, 0.25)
        assert sparse["tiles_kept"] == pytest.approx([0.25] * 2, abs=0.1)
        for case in row["cases"]:
            assert len(case["whole"]["ms_by_rank"]) == 2
            assert all(one["error"] < 5e-3 for one in case["check"])
    balance = record[BALANCE][0]
    before, after = (
        max(balance[side]["tiles_kept"]) - min(balance[side]["tiles_kept"]) for side in ("before", "after")
    )
    assert before > 0.2
    assert after < 0.1
    assert balance["imbalance"]["after"] < 0.1 < balance["imbalance"]["before"]
    assert MODEL not in record
    assert [(row["peer"], row["absent"] is None) for row in record[PEERS]] == [
        (TEXTBOOK, True),
        (YUNCHANG, False),
        (YUNCHANG, False),
    ]
    assert summary(record) in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_of_a_model_is_split_checked_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "RankPool", _SharedPool)
    setting = benchmark.Setting(device="cpu", seconds=0.001, **benchmark.SIZES["tiny"])
    row = benchmark.Benchmark(tmp_path, setting, [2], 120.0, 420.0).model(1, 2)
    assert (row["method"], row["ranks"]) == (ULYSSES, 2)
    assert [case["density"] for case in row["cases"]] == [1.0, 0.25]
    for case in row["cases"]:
        assert all(error < 1e-2 for error in case["error"])
        assert len(case["step"]["ms_by_rank"]) == 2
        assert case["ms_per_layer"] == pytest.approx(case["step"]["ms"] - case["first_layer"]["ms"])


class _Pool:
    """Processes that are not there: the first ones fail at their second task."""

    made = 0

    def __init__(self, ranks: int, device: str, timeout: float) -> None:
        type(self).made += 1
        self.first, self.alive, self.tasks = type(self).made == 1, True, 0

    def run(self, task: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        self.tasks += 1
        if task.__name__ == "one_gpu_task":
            return [([{"kernel": ATTENTION, "density": 1.0, "check": {}, **made_up_rank_loop(10.0)}], {})]
        if self.first and self.tasks == 2:
            self.alive = False
            raise RankError("rank 1: ValueError: as planned\nand its traceback")
        loops = {name: made_up_rank_loop(6.0) for name in ("whole", "exchange", "attention")}
        return [({"equal_maps": True}, [{"density": 1.0, "tiles_kept": 1.0, "check": {}, **loops}])] * 2

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_a_rank_that_raises_fails_its_block_and_the_next_one_has_new_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_Pool, "made", 0)
    monkeypatch.setattr(benchmark, "RankPool", _Pool)
    options = ["--device", "cpu", "--sizes", "tiny", "--ranks", "2", "--output", str(tmp_path), "--parts", LAYER]
    assert benchmark.main(options) == 1
    record = json.loads((tmp_path / "sequence_parallel_cpu.json").read_text())
    assert record["failures"] == [
        {"part": LAYER, "block": "1 2 1", "error": "RankError: rank 1: ValueError: as planned"}
    ]
    assert [(row["method"], row["head_chunks"]) for row in record[LAYER]] == [(ULYSSES, 2), (RING, 1)]
    assert record[LAYER][0]["cases"][0]["efficiency"] == pytest.approx(10 / (2 * 6))
    assert _Pool.made == 2
    assert "and its traceback" in capsys.readouterr().err


def test_blocks_whose_turn_comes_too_late_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "RankPool", _Pool)
    options = ["--device", "cpu", "--sizes", "tiny", "--ranks", "2", "--output", str(tmp_path), "--limit", "-1"]
    run: list[benchmark.Benchmark] = []
    monkeypatch.setattr(benchmark.Benchmark, "close", lambda self: run.append(self))
    assert benchmark.main([*options, "--parts", LAYER, BALANCE]) == 0
    assert run[0].record["left_out"] == [ONE_GPU, "layer 1 2 1", "layer 1 2 2", "layer 2 1 1", "balance 2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 0", "expected numbers from 1 to 8 that divide the tokens"),
        ("--ranks 7", "expected numbers from 1 to 8 that divide the tokens"),
        ("--ranks 10", "expected numbers from 1 to 8 that divide the tokens"),
        ("--parts layers", "invalid choice: 'layers'"),
    ],
)
def test_arguments_are_checked(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--device", "cpu", "--sizes", "tiny", *options.split()])
    assert message in capsys.readouterr().err


def test_every_number_of_gpus_up_to_those_there_are_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, ranks in {1: [1], 2: [1, 2], 4: [1, 2, 4], 6: [1, 2, 4], 8: [1, 2, 4, 8]}.items():
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert benchmark.parse_arguments([]).ranks == ranks
    assert benchmark.parse_arguments([]).parts == PARTS
    assert [method_of(*mesh) for mesh in benchmark.meshes(4)] == [ULYSSES, RING, USP]
    assert [method_of(*mesh) for mesh in benchmark.meshes(2)] == [ULYSSES, RING]


# --- what the processes measure with ---


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return benchmark.inputs_of(TINY, "cpu")


def test_heads_of_the_balance_part_fall_from_dense_to_sparse_around_a_quarter() -> None:
    densities = benchmark.head_densities(40)
    assert densities == sorted(densities, reverse=True)
    assert (densities[0], densities[-1]) == (pytest.approx(0.70), pytest.approx(0.05))
    assert sum(densities) / 40 == pytest.approx(0.25, abs=0.005)
    maps = benchmark.split_maps(TINY, benchmark.head_densities(TINY.heads), 1, 0, "cpu")
    kept = maps[0].double().mean(dim=(0, 2, 3))
    assert kept[0] > 0.5 > 0.3 > kept[-1]


def test_maps_of_splits_are_the_same_wherever_they_are_drawn_and_differ_from_each_other() -> None:
    densities = [0.5] * TINY.heads
    first, again = (benchmark.split_maps(TINY, densities, 2, 1, "cpu") for _ in range(2))
    assert [keep.shape for keep in first] == [torch.Size([1, 8, 5, 3])] * 2
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], benchmark.split_maps(TINY, densities, 2, 0, "cpu")[0])


def test_the_reference_of_a_ring_computes_its_block_split_by_split_and_merges() -> None:
    query, key, value = qkv()
    reference = benchmark.Reference(2, 1, (query, key, value))
    reference()
    maps = benchmark.split_maps(TINY, [0.5] * TINY.heads, 2, 1, "cpu")
    reference.use(maps)
    block = query[:, 300:]
    pairs = []
    for split, keep in enumerate(maps):
        layer, span = LiteAttention(threshold=float("-inf")), slice(300 * split, 300 * (split + 1))
        layer(block, key[:, span], value[:, span])
        layer.set_keep_map(keep)
        pairs.append(layer(block, key[:, span], value[:, span], return_softmax_lse=True))
    outs, lses = zip(*pairs, strict=True)
    assert torch.equal(reference(), merge_attention(list(outs), list(lses))[0])


def test_a_state_or_a_result_that_differs_is_an_error() -> None:
    layer = LiteAttention(threshold=0.0)
    layer(*qkv())
    found = layer.keep_map()
    benchmark.required_maps(layer, [found], "test")
    other = found.clone()
    other[0, 3, 1, 2] ^= True
    with pytest.raises(WrongResultError, match=r"test: 0\.25% of the tiles of split 0 differ from one GPU's"):
        benchmark.required_maps(layer, [other], "test")
    out = torch.randn(2, 3)
    assert benchmark.required_equality(out, out.clone(), "test") == {"error": 0.0, "equal": True}
    with pytest.raises(WrongResultError, match="test: error 0"):
        benchmark.required_equality(out * 1.01, out, "test")
    with pytest.raises(WrongResultError, match="test: error nan"):
        benchmark.required_equality(out.index_fill(0, torch.tensor(1), torch.nan), out, "test")


def test_a_call_without_attention_calls_no_operator_and_keeps_its_map() -> None:
    layer = LiteAttention(threshold=0.0)
    layer(*qkv())
    before, attention = layer.keep_map(), ops.attention
    with benchmark.without_attention(), no_operators():
        out, lse = layer(*qkv(), return_softmax_lse=True)
        layer.enable_skip_optimization(False)
        layer(*qkv())
    assert (out.shape, lse.shape, lse.dtype) == (qkv()[0].shape, (1, 8, 600), torch.float32)
    assert torch.equal(layer.keep_map(), before)
    assert ops.attention is attention


@contextlib.contextmanager
def no_operators() -> Iterator[None]:
    """Calls of the package's operators are errors."""

    class Refuse(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.namespace != "lite_attention", func
            return func(*args, **(kwargs or {}))

    with Refuse():
        yield


# --- the record ---


def test_the_slowest_rank_counts() -> None:
    loop = over_ranks([made_up_rank_loop(10.0, rank) for rank in (2, 0, 1)])
    assert loop["ms"] == 10.0
    assert loop["ms_by_rank"] == pytest.approx([9.8, 10.0, 9.9])
    assert loop["sm_clock_mhz"] == 1600.0
    no_clock = over_ranks([{"ms": 1.0, "launches": 3, "sm_clock_mhz": None, "power_watts": None}])
    assert (no_clock["sm_clock_mhz"], no_clock["power_watts"]) == (None, None)


def test_efficiency_is_to_one_gpu_and_what_is_exposed_is_more_than_attention() -> None:
    loops = {name: over_ranks([made_up_rank_loop(ms)]) for name, ms in (("exchange", 5.0), ("attention", 16.0))}
    row = case_row(4, 1.0, 72.0, over_ranks([made_up_rank_loop(20.0)]), **loops)
    assert row["speed_up"] == pytest.approx(3.6)
    assert row["efficiency"] == pytest.approx(0.9)
    assert row["exchange_share"] == pytest.approx(0.25)
    assert row["exposed_share"] == pytest.approx(0.2)
    assert case_row(4, 1.0, None, over_ranks([made_up_rank_loop(20.0)]), **loops)["efficiency"] is None


def test_a_whole_model_is_projected_from_the_time_of_a_layer() -> None:
    step, first = made_up_rank_loop(100.0), made_up_rank_loop(40.0)
    case = model_case({"layers": 4, "whole_layers": 40}, 1.0, step, first)
    assert case["ms_per_layer"] == pytest.approx(20.0)
    assert case["projected_ms"] == pytest.approx(40 + 39 * 20)


def test_the_fastest_configuration_of_a_method_stands_for_it() -> None:
    record = made_up_sequence_parallel_record()
    assert rank_counts(record) == [2, 4]
    found = best_layer(record, 4, ULYSSES, 0.25)
    assert found is not None
    assert found[0]["head_chunks"] == 5
    assert best_layer(record, 2, USP, 1.0) is None
    assert model_efficiency(record, record[MODEL][1], 1.0) == pytest.approx(1 / 1.1)
    assert peer_over_ours(record, record[PEERS][0]) == pytest.approx(50.0 / (170 / 4 / 0.97))


def test_goals_are_those_of_ulysses_and_of_balanced_heads() -> None:
    record = made_up_sequence_parallel_record()
    found = {goal["name"]: (round(goal["value"], 3), goal["at_least"], goal["met"]) for goal in goals(record)}
    assert found == {
        "efficiency of Ulysses, dense, 2 GPUs": (0.98, 0.95, True),
        "efficiency of Ulysses, 25%, 2 GPUs": (0.89, 0.9, False),
        "efficiency of Ulysses, dense, 4 GPUs": (0.97, 0.95, True),
        "efficiency of Ulysses, 25%, 4 GPUs": (0.92, 0.9, True),
        "mean / busiest GPU's attention, balanced heads, 4 GPUs": (1.0, 0.9, True),
        "mean / busiest GPU's attention, balanced heads, 2 GPUs": (1.0, 0.9, True),
    }
    record[LAYER] = [made_up_layer_row(4, 1, 1)]
    assert not any(goal["met"] for goal in goals(record) if "Ulysses" in goal["name"])


def test_the_summary_says_what_was_met_left_out_and_absent() -> None:
    record = made_up_sequence_parallel_record()
    record |= {"absent": {YUNCHANG: "ModuleNotFoundError: no"}, "left_out": ["peers yunchang 4 1"]}
    record["failures"] = [{"part": MODEL, "block": "1 4", "error": "RankError: rank 0: RuntimeError: no"}]
    lines = summary(record).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("4 x NVIDIA H200, torch 2.11.0+cu130")
    assert "MISSED efficiency of Ulysses, 25%, 2 GPUs: 0.890 (>= 0.9)" in lines
    assert "balance, 4 GPUs: ideal 14.000 ms, before 21.000 (66.7%), after 15.000 (93.3%)" in lines
    assert "step of 14B, 4 GPUs, Ulysses, 25%: 137.5 ms, efficiency 90.9%" in lines
    assert "textbook Ulysses (Ulysses, FlashAttention-3), 4 GPUs: 50.000 ms, efficiency 88.0%" in lines
    assert lines[-3:] == [
        "absent: yunchang: ModuleNotFoundError: no",
        "left out: peers yunchang 4 1",
        "FAILED model 1 4: RankError: rank 0: RuntimeError: no",
    ]


# --- plot and table ---


def test_the_plot_is_drawn_from_the_record_whatever_part_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made_up_sequence_parallel_record()
    path = tmp_path / "sequence_parallel_h200.json"
    picture = tmp_path / "sequence_parallel_h200_scaling.png"
    monkeypatch.setattr("sys.argv", ["plots.py", str(path)])
    for missing in ((), (BALANCE, MODEL, PEERS, ONE_GPU)):
        path.write_text(json.dumps({part: value for part, value in record.items() if part not in missing}))
        plots.main()
        assert picture.stat().st_size > 10_000
        picture.unlink()


def test_the_table_carries_the_figures_of_the_record() -> None:
    text = readme_tables.sequence_parallel_table(made_up_sequence_parallel_record())
    lines = text.splitlines()
    assert "| one GPU, FlashAttention-3 | 1 | dense | 176.00 | | | | |" in lines
    assert "| Ulysses, 5 head chunks | 4 | 25% | 11.96 | 92.0% | 11.00 | 2.00 | 8.0% |" in lines
    assert "| Ulysses | 4 | 25% | 13.75 | 80.0% | 11.00 | 2.00 | 20.0% |" in lines
    assert "| Ulysses and ring 2 x 2 | 4 | dense | 46.20 | 92.0% | 42.50 | 2.00 | 8.0% |" in lines
    balance = next(line for line in lines if line.startswith("Heads that keep 5% to 70% of their tiles, 4 GPUs"))
    assert "21.00 ms (attention of the mean GPU 70% of the busiest one's) as they come, 15.00 ms" in balance
    assert "| Ulysses, 25% | 4 | 137.5 | 90.9% | 33.0 |" in lines
    assert "| textbook Ulysses (Ulysses), FlashAttention-3 | 4 | 50.00 | 88.0% | 1.141 |" in lines
    assert not any(line.startswith("| yunchang (ring)") for line in lines)
    for fact in (
        "4 NVIDIA H200 (the slowest one at 1600 to 1600 MHz)",
        "NCCL 2.28.9",
        "yunchang 0.6.4",
        "0123456789ab",
    ):
        assert fact in lines[-1]


def test_the_table_is_made_of_what_was_measured() -> None:
    record = made_up_sequence_parallel_record()
    record["absent"] = {YUNCHANG: "no"}
    for part in (BALANCE, MODEL, PEERS, ONE_GPU):
        del record[part]
    text = readme_tables.sequence_parallel_table(record)
    assert "| one GPU | 1 | dense |  | | | | |" in text
    assert "yunchang was absent." in text
