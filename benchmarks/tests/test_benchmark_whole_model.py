"""The benchmark of whole models, as far as a machine without a GPU can tell: its checks, record, table and plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_records import made_up_whole_model_record
from expecttest import assert_expected_inline
from torch.nn import functional
from torch.nn.attention import SDPBackend

import attention_stack
import lite_attention
import peers
import plots
import readme_tables
import sustained
import timeline
import wan_step
import whole_model as benchmark
from attention_record import ATTENTION, CUDNN, FA3, SKIP_ATTENTION
from checks import WrongResultError
from lite_attention import LiteAttention
from lite_attention.integrations.diffusers import enable_lite_attention
from whole_model_record import CAPTURED, EAGER, MODES, find, list_bytes, step_row, summary

SIZE = wan_step.ModelSize(
    "tiny", heads=2, ffn_dim=64, layers=2, whole_layers=5, channels=4, text_dim=16, text_tokens=8, freq_dim=32
)
CLIP = wan_step.Clip("256p", height=256, width=320, frames=5)  # 640 tokens: 10 query tiles, 5 KV tiles


class _NoTelemetry:
    def driver(self) -> str:
        return "none"


@pytest.fixture(autouse=True)
def _no_grad_and_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that more would wait for each other
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark on the CPU kernels, with clocks that stand still, graphs that are plain calls and SDPA as its peers."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: (
            functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            .transpose(1, 2)
            .contiguous()
        )

    def loop(call: Callable[[], object], seconds: float, telemetry: object) -> sustained.Loop:
        call()
        return sustained.Loop(2.0, 3, False, 1000.0, None)

    def plain_capture(step: Any, args: tuple[Any, ...], **_: object) -> Callable[..., Any]:
        return lambda *inputs: step(*inputs)

    compile_options = {"fullgraph": True, "dynamic": False, "backend": "eager"}
    for module in (benchmark, wan_step):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "COMPILE", compile_options)
        monkeypatch.setattr(module, "capture_step", plain_capture)
        monkeypatch.setattr(module, "in_graph", lambda call: call)
    for name, value in {
        "SDPA_BACKEND": SDPBackend.MATH,
        "Telemetry": _NoTelemetry,
        "sustained": loop,
        "timeline": lambda call: timeline.Timeline(7, 2.0, 2.01),
        "HOST_CALLS": 5,
        "HOST_LAYERS": 2,
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(peers, "flash_attention_3", lambda: prepare)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def record_of(tmp_path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((tmp_path / "whole_model_h200.json").read_text())
    return record


def run_steps(tmp_path: Path, mode: str = EAGER) -> dict[str, Any]:
    run = benchmark.Benchmark(tmp_path, 1.0, [mode])
    run.block("steps", run.steps, SIZE, CLIP)
    return record_of(tmp_path)


# --- sizes ---


def test_clips_have_the_token_counts_of_81_frames() -> None:
    assert {name: (clip.latents, clip.tokens) for name, clip in benchmark.CLIPS.items()} == {
        "480p": ((21, 60, 104), 32_760),
        "720p": ((21, 90, 160), 75_600),
    }


def test_lists_take_what_their_format_says() -> None:
    # 2 buffers of int16, 40 heads, 591 query tiles, 430 KV tiles and 2 more entries
    assert list_bytes(40, 75_600, batch=2) == 2 * 2 * 2 * 40 * 591 * 432


@pytest.mark.usefixtures("on_the_cpu")
def test_the_model_is_bf16_but_for_what_diffusers_keeps_in_fp32() -> None:
    dtypes = {name: parameter.dtype for name, parameter in wan_step.random_model(SIZE).named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == dtypes["blocks.1.ffn.net.2.bias"] == torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["condition_embedder.time_embedder.linear_1.weight"]
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32


# --- a run ---


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_records_every_column_in_its_modes(tmp_path: Path) -> None:
    benchmark.Benchmark(tmp_path, 1.0, MODES).run([SIZE], [CLIP])
    record = record_of(tmp_path)
    assert record["failures"] == []
    assert {part: len(record[part]) for part in ("host", "overhead", "steps")} == {"host": 1, "overhead": 1, "steps": 1}

    (row,) = record["steps"]
    assert row["clip"]["tokens"] == CLIP.tokens
    assert [(one["kernel"], one["density"], one["mode"]) for one in row["loops"]] == [
        *((CUDNN, 1.0, mode) for mode in MODES),
        *((FA3, 1.0, mode) for mode in MODES),
        *((ATTENTION, 1.0, mode) for mode in MODES),
        (SKIP_ATTENTION, 0.75, CAPTURED),
        (SKIP_ATTENTION, 0.5, CAPTURED),
        *((SKIP_ATTENTION, 0.25, mode) for mode in MODES),
        (SKIP_ATTENTION, 0.1, CAPTURED),
    ]
    assert all(0 <= one["error"] < 0.01 for one in row["loops"])
    assert find(row, (SKIP_ATTENTION, 0.25))["timeline"]["gaps"] == pytest.approx(0.005)  # type: ignore[index]
    assert "timeline" not in find(row, (CUDNN, 1.0))  # type: ignore[operator]
    assert [one["map"] for one in row["checks"]] == ["none", "full", "75%", "50%", "25%", "10%"]
    assert all(0 < error < 5e-3 for one in row["checks"] for error in one["attention_errors"])
    # a packed map of 2 heads, 10 query tiles and one word, and the stamps, thresholds, numbers and the like
    assert 2 * 10 * 4 < row["state"]["bytes_per_layer"] < 2 * 10 * 4 + 400

    (overhead,) = record["overhead"]
    assert [point["time_over_operator"] for point in overhead["points"]] == [1.0, 1.0]
    assert [len(point["loops"]) for point in overhead["points"]] == [4, 4]
    assert len(record["host"][0]["microseconds"]) == 5
    assert min(record["host"][0]["microseconds"].values()) > 0
    assert summary(record)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_the_density_that_is_recorded_is_that_of_the_maps_after_timing(tmp_path: Path) -> None:
    (row,) = run_steps(tmp_path)["steps"]
    kept = {one["density"]: one["tiles_kept"] for one in row["loops"] if one["kernel"] == SKIP_ATTENTION}
    assert {one["mode"] for one in row["loops"]} == {EAGER}
    # whole tiles of 5
    assert kept == pytest.approx({0.75: 4 / 5, 0.5: 2 / 5, 0.25: 1 / 5, 0.1: 1 / 5})


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_map_that_changed_while_timed_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "timeline", lambda call: pytest.fail("is not reached"))
    seen: list[LiteAttention] = []
    set_keep_map = LiteAttention.set_keep_map

    def remember(layer: LiteAttention, keep: torch.Tensor) -> None:
        seen.append(layer)
        set_keep_map(layer, keep)

    def loop(call: Callable[[], object], seconds: float, telemetry: object) -> sustained.Loop:
        for layer in seen[-1:]:
            layer.reset_skip_state()
        return sustained.Loop(2.0, 3, False, 1000.0, None)

    monkeypatch.setattr(LiteAttention, "set_keep_map", remember)
    monkeypatch.setattr(benchmark, "sustained", loop)
    record = run_steps(tmp_path)
    assert [one["error"] for one in record["failures"]] == [
        "WrongResultError: layer 1 keeps 100.00% of its tiles, or others than the 80.00% imposed"
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("what", ["attention", "skip_attention"])
def test_a_kernel_that_leaves_keys_out_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    right = getattr(lite_attention.ops, what)

    def without_last_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> Any:
        options["kv_lens"] = torch.tensor([k.shape[1] * 3 // 4], dtype=torch.int32)
        return right(q, k, v, *rest, **options)

    monkeypatch.setattr(lite_attention.ops, what, without_last_keys)
    record = run_steps(tmp_path)
    (failure,) = record["failures"]
    assert failure["error"].startswith("WrongResultError: out error 0.")
    assert record["steps"] == []


@pytest.mark.usefixtures("on_the_cpu")
def test_the_step_itself_tells_keys_that_are_left_out_from_rounding() -> None:
    step = wan_step.Step(SIZE, CLIP)
    expected = step.eager()
    processor = wan_step._FlashAttention3Processor
    with step.flash_attention_3():
        assert benchmark.required_error("peer", step, step.eager(), expected) < 0.01
    for block in step.model.blocks:
        block.attn1.set_processor(processor(block.attn1.processor))
    right = wan_step._flash_attention_3

    def without_last_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys = k.shape[1] * 3 // 4
        out: torch.Tensor = right(q, k[:, :keys], v[:, :keys])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan_step, "_flash_attention_3", without_last_keys)
        with pytest.raises(WrongResultError, match=r"peer: error 0\.\d+, expected at most 0\.0084"):
            benchmark.required_error("peer", step, step.eager(), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_stale_result_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(step: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], **_: object) -> Any:
        out = step(*inputs)
        return lambda *_: out

    monkeypatch.setattr(wan_step, "capture_step", frozen)
    record = run_steps(tmp_path, CAPTURED)
    (failure,) = record["failures"]
    assert failure["error"].startswith("WrongResultError: attention at 100%, captured: error nan")


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_a_missing_and_a_wrong_peer_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros_like(q)

    monkeypatch.setattr(peers, "flash_attention_3", lambda: zeros)
    record = run_steps(tmp_path)
    assert record["failures"] == []
    (row,) = record["steps"]
    assert row["absent"][FA3].startswith("WrongResultError: FlashAttention-3 at 100%, eager: error")
    assert find(row, (FA3, 1.0), EAGER) is None
    assert find(row, (CUDNN, 1.0), EAGER)["time_over_fa3"] is None  # type: ignore[index]

    def missing() -> Any:
        raise ImportError("No module named 'fa3_fwd_interface'")

    monkeypatch.setattr(peers, "flash_attention_3", missing)
    run = benchmark.Benchmark(tmp_path, 1.0, [EAGER])
    assert run.record["absent"] == {FA3: "ImportError: No module named 'fa3_fwd_interface'"}


# --- the stack ---


def test_a_stack_computes_the_same_with_lite_attention_in_it() -> None:
    x = torch.randn(1, 300, 2, 64)
    stack = attention_stack.AttentionStack(3, "cpu")
    expected = stack(x, torch.tensor([500]))
    handle = enable_lite_attention(stack, threshold=float("-inf"), guidance="batched")
    torch.testing.assert_close(stack(x, torch.tensor([500])), expected, atol=1e-5, rtol=1e-5)
    assert len(handle.layers) == 3
    handle.disable()
    assert torch.equal(stack(x, torch.tensor([500])), expected)


# --- the record ---


def test_projections_take_the_time_outside_the_layers_once() -> None:
    model = {"layers": 2, "whole_layers": 5}
    loops = [{"kernel": FA3, "mode": EAGER, "ms": 25.0}, {"kernel": ATTENTION, "mode": EAGER, "ms": 20.0}]
    row = step_row(model, {}, {"ms": 5.0}, loops)
    assert [one["ms_per_layer"] for one in row["loops"]] == [10.0, 7.5]
    assert [one["projected_ms"] for one in row["loops"]] == [55.0, 42.5]
    assert [one["time_over_fa3"] for one in row["loops"]] == [1.0, 0.8]
    whole = step_row({"layers": 2, "whole_layers": 2}, {}, {"ms": 5.0}, loops)
    assert [one["projected_ms"] for one in whole["loops"]] == [None, None]


def test_the_summary_is_short_and_marks_what_misses_its_goal() -> None:
    text = summary(made_up_whole_model_record())
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 120
    assert_expected_inline(
        text,
        """\
NVIDIA H200, torch 2.11.0+cu130, kernels aaaabbbbcccc
eager, ms a step            cuDNN      FA3    dense      75%      50%      25%      10%
1.3B 480p, 30 layers        524.0    474.7    466.0        -        -    248.5        -
1.3B 720p, 30 layers       2276.0   2015.9   1970.0        -        -    822.5        -
14B 480p, 4 layers          266.0    243.9    240.0        -        -    142.5        -
14B 720p, 4 layers         1102.0    986.4    966.0        -        -    456.0        -
compiled, ms a step         cuDNN      FA3    dense      75%      50%      25%      10%
1.3B 480p, 30 layers        524.0    474.7    466.0        -        -    248.5        -
1.3B 720p, 30 layers       2276.0   2015.9   1970.0        -        -    822.5        -
14B 480p, 4 layers          266.0    243.9    240.0        -        -    142.5        -
14B 720p, 4 layers         1102.0    986.4    966.0        -        -    456.0        -
captured, ms a step         cuDNN      FA3    dense      75%      50%      25%      10%
1.3B 480p, 30 layers        508.0    458.7    450.0    377.5    305.0    232.5    189.0
1.3B 720p, 30 layers       2236.0   1975.9   1930.0   1547.5   1165.0    782.5    553.0
14B 480p, 4 layers          256.0    233.9    230.0    197.5    165.0    132.5    113.0
14B 720p, 4 layers         1076.0    960.4    940.0    770.0    600.0    430.0    328.0
captured / operator alone, 1.3B 480p, 25%: 1.0040, gaps 0.20%
captured / operator alone, 1.3B 480p, 10%: 1.0120!, gaps 0.20%
captured / operator alone, 1.3B 720p, 25%: 1.0040, gaps 0.20%
captured / operator alone, 1.3B 720p, 10%: 1.0120!, gaps 0.20%
captured / operator alone, 14B 480p, 25%: 1.0040, gaps 0.20%
captured / operator alone, 14B 480p, 10%: 1.0120!, gaps 0.20%
captured / operator alone, 14B 720p, 25%: 1.0040, gaps 0.20%
captured / operator alone, 14B 720p, 10%: 1.0120!, gaps 0.20%
host time a layer, us: scaled_dot_product_attention 25
host time a layer, us: skip_attention 16
host time a layer, us: LiteAttention 120
host time a layer, us: in a diffusers model 180
host time a layer, us: in a diffusers model, compiled 90
state a layer, 1.3B 480p, 30 layers: 0.39 MB, as lists 2.32 MB
state a layer, 1.3B 720p, 30 layers: 0.91 MB, as lists 12.25 MB
state a layer, 14B 480p, 4 layers: 1.31 MB, as lists 7.74 MB
state a layer, 14B 720p, 4 layers: 3.02 MB, as lists 40.85 MB""",
    )


def test_the_table_carries_the_figures_of_the_record() -> None:
    assert_expected_inline(
        readme_tables.whole_model_table(made_up_whole_model_record()),
        """\
| captured, ms a step, NVIDIA H200 | cuDNN SDPA | FlashAttention-3 | dense | 75% | 50% | 25% | 10% | FlashAttention-3 / 25% |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 1.3B 480p, 30 layers | 508.0 | 458.7 | 450.0 | 377.5 | 305.0 | 232.5 | 189.0 | 1.97x |
| 1.3B 720p, 30 layers | 2236.0 | 1975.9 | 1930.0 | 1547.5 | 1165.0 | 782.5 | 553.0 | 2.53x |
| 14B 480p, 4 layers | 256.0 | 233.9 | 230.0 | 197.5 | 165.0 | 132.5 | 113.0 | 1.77x |
| 14B 720p, 4 layers | 1076.0 | 960.4 | 940.0 | 770.0 | 600.0 | 430.0 | 328.0 | 2.23x |

| eager / compiled / captured, ms a step | cuDNN SDPA | FlashAttention-3 | dense | 25% |
| --- | --- | --- | --- | --- |
| 1.3B 480p, 30 layers | 524.0 / 524.0 / 508.0 | 474.7 / 474.7 / 458.7 | 466.0 / 466.0 / 450.0 | 248.5 / 248.5 / 232.5 |
| 1.3B 720p, 30 layers | 2276.0 / 2276.0 / 2236.0 | 2015.9 / 2015.9 / 1975.9 | 1970.0 / 1970.0 / 1930.0 | 822.5 / 822.5 / 782.5 |
| 14B 480p, 4 layers | 266.0 / 266.0 / 256.0 | 243.9 / 243.9 / 233.9 | 240.0 / 240.0 / 230.0 | 142.5 / 142.5 / 132.5 |
| 14B 720p, 4 layers | 1102.0 / 1102.0 / 1076.0 | 986.4 / 986.4 / 960.4 | 966.0 / 966.0 / 940.0 | 456.0 / 456.0 / 430.0 |

| a layer | captured model / `skip_attention` alone, time at 25 / 10% | skip state, MB | as lists, MB |
| --- | --- | --- | --- |
| 1.3B 480p | 1.0040 / 1.0120 | 0.39 | 2.32 |
| 1.3B 720p | 1.0040 / 1.0120 | 0.91 | 12.25 |
| 14B 480p | 1.0040 / 1.0120 | 1.31 | 7.74 |
| 14B 720p | 1.0040 / 1.0120 | 3.02 | 40.85 |

Lists: github.com/moonmath-ai/LiteAttention 0.4, bf16, head dim 128: int16 [2, max_batch, heads, ceil(tokens / 128), ceil(tokens / 176) + 2], max_batch 2 unless asked otherwise; here 1. Microseconds a layer until a call returns on the host: skip_attention 16, in a diffusers model 180, in a diffusers model, compiled 90.

Projected to 40 layers at the same time each, not measured: 14B 480p: cuDNN SDPA 2.54, FlashAttention-3 2.32, dense 2.28, 25% 1.31 s a step. 14B 720p: cuDNN SDPA 10.74, FlashAttention-3 9.59, dense 9.38, 25% 4.28 s a step.

bfloat16, random weights, batch 1, 81 frames, scattered maps, loops of 1 s on one NVIDIA H200 (1650 to 1650 MHz). Driver 1.2.3, torch 2.11.0+cu130, diffusers 0.42.1, fa3-fwd 0.0.3, cuDNN 9.19, kernels aaaabbbbcccc, revision 0123456789ab, 2030-01-02. Made by `python benchmarks/whole_model.py`.""",
    )


def test_unknown_names_are_refused_and_known_ones_put_in_order() -> None:
    parse = benchmark.parse_some(MODES)
    assert parse("captured,eager") == [EAGER, CAPTURED]
    with pytest.raises(Exception, match="'graph' is none of eager,compiled,captured"):
        parse("graph")


def test_the_plot_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "whole_model_h200.json"
    path.write_text(json.dumps(made_up_whole_model_record()))
    monkeypatch.setattr("sys.argv", ["plots.py", str(path)])
    plots.main()
    assert [one.name for one in tmp_path.glob("*.png")] == ["whole_model_h200_step.png"]
    assert (tmp_path / "whole_model_h200_step.png").stat().st_size > 10_000
