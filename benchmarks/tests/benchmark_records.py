"""Made-up records of the GPU benchmarks (benchmarks/run.py), put together as the scripts do it.

Over 400 lines: rows of every script's record, which no other file uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

import attention as benchmark  # noqa: E402
from attention_record import (  # noqa: E402
    ATTENTION,
    CUDNN,
    DENSE,
    FA3,
    FLEX,
    PATTERNS,
    SCATTERED,
    SKIP_ATTENTION,
    dense_row,
    density_row,
    skip_row,
)
from sequence_parallel_record import (  # noqa: E402
    BALANCE,
    LAYER,
    MODEL,
    ONE_GPU,
    PEERS,
    TEXTBOOK,
    YUNCHANG,
    balance_row,
    case_row,
    kernel_of,
    layer_row,
    model_case,
    model_row,
    one_gpu_row,
    over_ranks,
    peer_row,
)
from sparse_families_record import (  # noqa: E402
    ALONE,
    CAUSAL,
    CHOICE,
    COARSE,
    FINE,
    GROWTH,
    MEANS,
    MIXED_HEADS,
    NEARBY_BLOCKS,
    ONE_LAUNCH,
    RANDOM_BLOCKS,
    SELECTION,
    SLIDING_TILE_ATTENTION,
    SLIDING_TILES,
    STREAMING,
    STREAMING_ATTENTION,
    TOP_K_MAP,
    TWO_LAUNCHES,
    VIDEO_SPARSE,
    VIDEO_SPARSE_ATTENTION,
    WHOLE,
    causal_row,
    growth_row,
    mixed_heads_row,
    selection_row,
    sliding_tiles_row,
    streaming_row,
    video_sparse_row,
)
from whole_model_record import (  # noqa: E402
    CAPTURED,
    COLUMNS,
    COLUMNS_IN_ALL_MODES,
    HOST_MODEL,
    HOST_MODEL_COMPILED,
    HOST_MODULE,
    HOST_OPERATOR,
    HOST_SDPA,
    MODES,
    overhead_point,
    state_facts,
    step_row,
)

FACTS_OF_RUN = (
    *("date", "kernel_hash", "revision", "gpu", "driver", "torch", "cuda", "python", "environment"),
    *("cudnn", "fa3", "dtype", "seconds_per_loop", "complete"),
)


def made_up_loop(
    shape: benchmark.Shape, kernel: str, tflops: float, pattern: str = "dense", density: float = 1.0
) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "pattern": pattern,
        "density": density,
        "tflops": tflops,
        "ms": shape.flop * density / tflops * 1e-9,
        "launches": 100,
        "graph": False,
        "sm_clock_mhz": 1650.0,
        "power_watts": 695.0,
        "check": {"query_tiles": 6, "out_error": 2.3e-3, "lse_error": 1e-6},
    }


def made_up_dense_row(shape: benchmark.Shape, goal: float | None) -> dict[str, Any]:
    rates = ((FA3, 680.0), (ATTENTION, 700.0), (FA3, 684.0), (CUDNN, 600.0))
    return dense_row(shape.facts(), goal, [made_up_loop(shape, *one) for one in rates], {FLEX: "RuntimeError: no"})


def made_up_density_row(shape: benchmark.Shape, density: float) -> dict[str, Any]:
    loops = [made_up_loop(shape, FA3, 680.0)]
    for number, pattern in enumerate(PATTERNS):
        loops.append(made_up_loop(shape, ATTENTION, 670.0 - 30 * number, pattern, density))
    loops.append(made_up_loop(shape, SKIP_ATTENTION, 600.0, SCATTERED, density))
    if shape == benchmark.FLEX_SHAPE:
        loops.append(made_up_loop(shape, FLEX, 380.0, SCATTERED, density))
    loops.append(made_up_loop(shape, FA3, 684.0))
    return density_row(shape.facts(), density, benchmark.DENSITY_GOALS[shape].get(density), loops, {})


def made_up_record() -> dict[str, Any]:
    skip_loops = ((ATTENTION, 700.0), (SKIP_ATTENTION, 690.0)) * 2
    return {
        "command": "python benchmarks/attention.py",
        "date": "2030-01-02T03:04:05+00:00",
        "kernel_hash": "aaaabbbbcccc",
        "revision": "0123456789ab",
        "gpu": "NVIDIA H200",
        "driver": "1.2.3",
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "python": "3.12.3",
        "environment": {"lite_attention": "0.1.0"},
        "cudnn": 91900,
        "fa3": "0.0.3",
        "complete": True,
        "dtype": "bfloat16",
        "seconds_per_loop": 1.0,
        "absent": {},
        "failures": [],
        "cublas": [{"kernel": "cuBLAS", "size": 8192, "tflops": 775.0, "ms": 1.4}],
        "dense": [made_up_dense_row(shape, goal) for shape, goal in benchmark.DENSE_GOALS.items()],
        "skip": [
            skip_row(shape.facts(), benchmark.SKIP_GOAL, [made_up_loop(shape, *one) for one in skip_loops])
            for shape in benchmark.DENSE_GOALS
        ],
        "density": [
            made_up_density_row(shape, density) for shape in benchmark.DENSITY_GOALS for density in benchmark.DENSITIES
        ],
        "sweep": [made_up_dense_row(benchmark.Shape(1, n, 16, 128), None) for n in benchmark.SWEEP_LENGTHS],
        "host": [
            {
                "goal": benchmark.HOST_GOAL,
                "microseconds": {
                    ATTENTION: {"no_grad": 10.0, "inference_mode": 9.0},
                    SKIP_ATTENTION: {"no_grad": 16.0, "inference_mode": 12.0},
                    FA3: {"no_grad": 90.0, "inference_mode": 88.0},
                },
            }
        ],
        "wall_seconds": 300.0,
    }


def made_up_step_row(model: dict[str, Any], clip: dict[str, Any], dense_ms: float, rest_ms: float) -> dict[str, Any]:
    slower = {CUDNN: 1.2, FA3: 1.03}
    loops = []
    for kernel, density in COLUMNS:
        for mode in MODES if (kernel, density) in COLUMNS_IN_ALL_MODES else MODES[-1:]:
            ms = slower.get(kernel, 1.0) * density * dense_ms + rest_ms * (1.0 if mode == CAPTURED else 1.1)
            loop = {"kernel": kernel, "density": density, "mode": mode, "ms": ms, "sm_clock_mhz": 1650.0}
            loops.append({**loop, "tiles_kept": density} if kernel == SKIP_ATTENTION else loop)
    state = state_facts(model["heads"], clip["tokens"], measured=clip["tokens"] * model["heads"])
    return step_row(model, clip, {"ms": 2.0}, loops, pattern=SCATTERED, state=state, checks=[], absent={})


def made_up_overhead_row(model: dict[str, Any], clip: dict[str, Any]) -> dict[str, Any]:
    points = []
    for density, over in ((0.25, 1.004), (0.1, 1.012)):
        loops = [{"kernel": HOST_OPERATOR, "ms": 10.0}, {"kernel": HOST_MODEL, "ms": 10.0 * over}] * 2
        points.append(overhead_point(density, 1.01, loops, {"kernels": 30, "gaps": 0.002}))
    return {"model": model, "clip": clip, "points": points}


def made_up_whole_model_record() -> dict[str, Any]:
    models = [
        {"name": "1.3B", "heads": 12, "layers": 30, "whole_layers": 30},
        {"name": "14B", "heads": 40, "layers": 4, "whole_layers": 40},
    ]
    clips = [{"name": "480p", "tokens": 32760, "frames": 81}, {"name": "720p", "tokens": 75600, "frames": 81}]
    cases = [(model, clip) for model in models for clip in clips]
    times = [(290.0, 160.0), (1530.0, 400.0), (130.0, 100.0), (680.0, 260.0)]
    attention = made_up_record()
    return {
        "command": "python benchmarks/whole_model.py",
        **{fact: attention[fact] for fact in FACTS_OF_RUN},
        "absent": {},
        "failures": [],
        "diffusers": "0.42.1",
        "modes": list(MODES),
        "host": [
            {
                "microseconds": {
                    HOST_SDPA: 25.0,
                    HOST_OPERATOR: 16.0,
                    HOST_MODULE: 120.0,
                    HOST_MODEL: 180.0,
                    HOST_MODEL_COMPILED: 90.0,
                }
            }
        ],
        "overhead": [made_up_overhead_row(*case) for case in cases],
        "steps": [made_up_step_row(*case, *time) for case, time in zip(cases, times, strict=True)],
        "wall_seconds": 500.0,
    }


def made_up_family_loop(
    shape: benchmark.Shape, kernel: str, case: str, tflops: float, density: float = 1.0
) -> dict[str, Any]:
    loop = made_up_loop(shape, kernel, tflops, density=density)
    del loop["pattern"]
    return {
        **loop,
        "burst_ms": 0.9 * loop["ms"],
        "case": case,
        "check": {"rows": 576, "out_error": 2.3e-3, "lse_error": 1e-6},
    }


def made_up_stage(kernel: str, case: str, ms: float) -> dict[str, Any]:
    return {"kernel": kernel, "case": case, "tflops": None, "density": None, "ms": ms, "sm_clock_mhz": 1980.0}


def made_up_sliding_tiles_row() -> dict[str, Any]:
    shape = benchmark.Shape(1, 69120, 12, 128)
    around = [made_up_family_loop(shape, FA3, DENSE, 660.0), made_up_family_loop(shape, ATTENTION, DENSE, 690.0)]
    windows = {"(3, 3, 3)": (640.0, 0.15), "(3, 3, 5)": (660.0, 0.25), "(3, 6, 10)": (690.0, 1.0)}
    inner = [made_up_family_loop(shape, SLIDING_TILE_ATTENTION, case, *one) for case, one in windows.items()]
    facts = {"canvas": (18, 48, 80), "tile": (6, 8, 8), "windows": list(windows)}
    return sliding_tiles_row(shape.facts(), facts, [*around, *inner, *around], {})


def made_up_video_sparse_row() -> dict[str, Any]:
    shape = benchmark.Shape(1, 49152, 12, 128)
    loops = [
        made_up_family_loop(shape, FA3, DENSE, 665.0),
        made_up_family_loop(shape, ATTENTION, DENSE, 688.0),
        made_up_family_loop(shape, ATTENTION, RANDOM_BLOCKS, 565.0, 0.099),
        made_up_family_loop(shape, ATTENTION, NEARBY_BLOCKS, 590.0, 0.099),
    ]
    maps = {case: {"density": 0.099, "union_over_row": 2.7} for case in (RANDOM_BLOCKS, NEARBY_BLOCKS)}
    return video_sparse_row(shape.facts(), maps, loops, {})


def made_up_selection_row() -> dict[str, Any]:
    shape = benchmark.Shape(1, 92160, 40, 128)
    stages = {MEANS: 0.9, CHOICE: 0.3, COARSE: 0.1, FINE: 26.0, WHOLE: 28.0}
    loops = [made_up_stage(VIDEO_SPARSE_ATTENTION, case, ms) for case, ms in stages.items()]
    loops.insert(2, made_up_stage(TOP_K_MAP, ALONE, 0.2))
    return selection_row(shape.facts(), {"number": 1440, "kept": 144}, loops, {})


WINDOW_FACTS = {"sink_size": 128, "recent_size": 256}


def made_up_streaming_row(length: int) -> dict[str, Any]:
    shape = benchmark.Shape(1, length, 32, 128)
    density = 384 / length
    loops = [
        made_up_family_loop(shape, FA3, CAUSAL, 600.0, 0.5),
        made_up_family_loop(shape, ATTENTION, CAUSAL, 610.0, 0.5),
        made_up_family_loop(shape, STREAMING_ATTENTION, STREAMING, 400.0, density),
    ]
    eager = [made_up_family_loop(shape, STREAMING_ATTENTION, STREAMING, 300.0, density)] if length <= 8192 else []
    return streaming_row(shape.facts(), WINDOW_FACTS, loops, eager, {})


def made_up_mixed_heads_row(length: int) -> dict[str, Any]:
    shape = benchmark.Shape(1, length, 32, 128)
    loops = [
        made_up_family_loop(shape, FA3, CAUSAL, 600.0, 0.5),
        made_up_family_loop(shape, ATTENTION, ONE_LAUNCH, 560.0, 0.14),
        made_up_family_loop(shape, ATTENTION, TWO_LAUNCHES, 530.0, 0.14),
    ]
    return mixed_heads_row(shape.facts(), {"full_heads": 8, **WINDOW_FACTS}, loops, {})


def made_up_causal_row(length: int, head_dim: int) -> dict[str, Any]:
    shape = benchmark.Shape(1, length, 16, head_dim)
    loops = [
        made_up_family_loop(shape, FA3, CAUSAL, 600.0, 0.5),
        made_up_family_loop(shape, ATTENTION, CAUSAL, 612.0, 0.5),
    ]
    return causal_row(shape.facts(), loops, {})


def made_up_sparse_families_record() -> dict[str, Any]:
    attention = made_up_record()
    streaming = [made_up_streaming_row(2**power) for power in range(11, 17)]
    return {
        "command": "python benchmarks/sparse_families.py",
        **{fact: attention[fact] for fact in FACTS_OF_RUN},
        "absent": {},
        "failures": [],
        "cublas": attention["cublas"],
        SLIDING_TILES: [made_up_sliding_tiles_row()],
        VIDEO_SPARSE: [made_up_video_sparse_row()],
        SELECTION: [made_up_selection_row()],
        STREAMING: streaming,
        GROWTH: [growth_row(streaming)],
        MIXED_HEADS: [made_up_mixed_heads_row(length) for length in (4096, 16384)],
        CAUSAL: [made_up_causal_row(length, head_dim) for head_dim in (128, 64) for length in (4096, 32768)],
        "wall_seconds": 150.0,
    }


# Milliseconds of a made-up attention layer on one GPU, by density.
LAYER_MS = {1.0: 170.0, 0.25: 44.0}
# (ring, ulysses, head chunks): its efficiency when dense and at 25%.
LAYER_EFFICIENCY = {
    (1, 4, 1): (0.93, 0.80),
    (1, 4, 5): (0.97, 0.92),
    (4, 1, 1): (0.90, 0.75),
    (2, 2, 1): (0.92, 0.78),
    (1, 2, 1): (0.96, 0.88),
    (1, 2, 5): (0.98, 0.89),
    (2, 1, 1): (0.94, 0.84),
}


def made_up_rank_loop(ms: float, rank: int = 0) -> dict[str, Any]:
    return {"ms": ms * (1 - 0.01 * rank), "launches": 10, "sm_clock_mhz": 1600.0 + rank, "power_watts": 690.0}


def made_up_loop_of_ranks(ms: float, ranks: int) -> dict[str, Any]:
    return over_ranks([made_up_rank_loop(ms, rank) for rank in range(ranks)])


def made_up_layer_row(ring: int, ulysses: int, head_chunks: int) -> dict[str, Any]:
    shape, ranks, cases = benchmark.Shape(1, 75600, 40, 128), ring * ulysses, []
    for (density, alone), value in zip(LAYER_MS.items(), LAYER_EFFICIENCY[ring, ulysses, head_chunks], strict=True):
        ms = alone / ranks / value
        times = {"whole": ms, "exchange": 2.0, "attention": alone / ranks}
        loops = {name: made_up_loop_of_ranks(time, ranks) for name, time in times.items()}
        checks = [{"error": 0.0, "equal": ring == 1}] * ranks
        cases.append(case_row(ranks, density, alone, **loops, tiles_kept=[density] * ranks, check=checks))
    state = {"by_rank": [{"error": 0.0, "equal": ring == 1, "equal_maps": True, "skipped": 0.4}] * ranks}
    return layer_row(shape.facts(), ring, ulysses, head_chunks, state, cases)


def made_up_balance_row(ranks: int) -> dict[str, Any]:
    work = [20.0 - 4 * rank for rank in range(ranks)]
    mean = sum(work) / ranks
    sides = [
        {
            "whole": made_up_loop_of_ranks(max(each) + 1, ranks),
            "attention": over_ranks([made_up_rank_loop(ms) for ms in each]),
            "tiles_kept": [0.25] * ranks,
            "check": [{"error": 0.0, "equal": True}] * ranks,
        }
        for each in (work, [mean] * ranks)
    ]
    shape = benchmark.Shape(1, 75600, 40, 128).facts()
    densities = [0.7 * (0.05 / 0.7) ** (head / 39) for head in range(40)]
    return balance_row(shape, ranks, 5, densities, *sides, imbalance={"before": 0.4, "after": 0.001})


def made_up_model_row(ring: int, ulysses: int) -> dict[str, Any]:
    model = {"name": "14B", "layers": 4, "whole_layers": 40}
    clip = {"name": "720p", "height": 720, "width": 1280}
    ranks, cases = ring * ulysses, []
    for density, alone in {1.0: 1000.0, 0.25: 500.0}.items():
        ms = alone / ranks * (1 if ranks == 1 else 1.1)
        step, first = (made_up_loop_of_ranks(value, ranks) for value in (ms, 0.28 * ms))
        cases.append(model_case(model, density, step, first, error=[1e-3] * ranks))
    return model_row(model, clip, ring, ulysses, cases)


def made_up_peer_row(peer: str, ring: int, ulysses: int, ms: float | None) -> dict[str, Any]:
    shape = benchmark.Shape(1, 75600, 40, 128).facts()
    whole = None if ms is None else made_up_loop_of_ranks(ms, ring * ulysses)
    absent = "ModuleNotFoundError: No module named 'yunchang'" if ms is None else None
    return peer_row(shape, peer, FA3, ring, ulysses, 176.0, whole=whole, absent=absent, check=None)


def made_up_sequence_parallel_record() -> dict[str, Any]:
    attention = made_up_record()
    loops = [(kernel_of(density), density, ms) for density, ms in LAYER_MS.items()] + [(FA3, 1.0, 176.0)]
    alone = [
        {"kernel": kernel, "density": density, **over_ranks([made_up_rank_loop(ms)] * 4)}
        for kernel, density, ms in loops
    ]
    return {
        "command": "python benchmarks/sequence_parallel.py",
        **{fact: attention[fact] for fact in FACTS_OF_RUN},
        "gpus": 4,
        "nccl": "2.28.9",
        "diffusers": "0.42.1",
        "yunchang": "0.6.4",
        "absent": {},
        "left_out": [],
        "failures": [],
        ONE_GPU: [one_gpu_row(benchmark.Shape(1, 75600, 40, 128).facts(), alone, {})],
        LAYER: [made_up_layer_row(*configuration) for configuration in LAYER_EFFICIENCY],
        BALANCE: [made_up_balance_row(ranks) for ranks in (4, 2)],
        MODEL: [made_up_model_row(*mesh) for mesh in ((1, 1), (1, 4), (1, 2))],
        PEERS: [
            made_up_peer_row(TEXTBOOK, 1, 4, 50.0),
            made_up_peer_row(YUNCHANG, 1, 4, 52.0),
            made_up_peer_row(YUNCHANG, 4, 1, None),
        ],
        "wall_seconds": 360.0,
    }
