"""Speed of the CPU kernels: dense against torch's own SDPA, and time against the share of tiles kept.

Every row of a comparison is timed in turn, round after round, so that a slow moment of the machine hits all of them;
figures are medians of the rounds.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import lite_attention
from lite_attention.info import facts_of_run

RESULTS = Path(__file__).parent / "results" / "cpu_attention.json"
DENSITIES = (0.75, 0.5, 0.25, 0.1)
PATTERNS = ("contiguous", "scattered")


def median_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median wall-clock seconds of each call, all called in turn `rounds` times after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def keep_map_of(
    pattern: str, density: float, heads: int, length: int, head_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """A bool keep map [1, heads, query tiles, KV tiles] with the same number of tiles in every row."""
    tile_m, tile_n = lite_attention.tile_shape(head_dim, dtype)
    query_tiles, kv_tiles = -(-length // tile_m), -(-length // tile_n)
    kept = max(1, round(density * kv_tiles))
    if pattern == "contiguous":
        start = (torch.arange(query_tiles) * kv_tiles // query_tiles - kept // 2).clamp(0, kv_tiles - kept)
        tile = torch.arange(kv_tiles)
        rows = (tile >= start[:, None]) & (tile < start[:, None] + kept)
        return rows.expand(1, heads, query_tiles, kv_tiles).contiguous()
    order = torch.rand(1, heads, query_tiles, kv_tiles).argsort(dim=-1)
    return order < kept


def measure_shape(head_dim: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the record: dense and sparse times of one head dim and dtype."""
    length, heads = arguments.length, arguments.heads
    q, k, v = (torch.randn(1, length, heads, head_dim).to(dtype) for _ in range(3))
    q_heads, k_heads, v_heads = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    full = lite_attention.full_keep_map(1, heads, length, length, head_dim, dtype)
    never_drop = torch.tensor(-torch.inf)

    calls: dict[str, Callable[[], object]] = {
        "sdpa": lambda: functional.scaled_dot_product_attention(q_heads, k_heads, v_heads),
        "dense": lambda: lite_attention.attention(q, k, v),
        "skip, nothing dropped": lambda: lite_attention.skip_attention(q, k, v, full, never_drop),
    }
    densities = {}
    for pattern in PATTERNS:
        for density in DENSITIES:
            bits = keep_map_of(pattern, density, heads, length, head_dim, dtype)
            name = f"{pattern} {density}"
            densities[name] = bits.float().mean().item()
            keep = lite_attention.pack_keep_map(bits)
            calls[name] = lambda keep=keep: lite_attention.attention(q, k, v, keep=keep)  # type: ignore[misc]
    seconds = median_seconds(calls, arguments.rounds)

    flop = 4 * length * length * heads * head_dim
    dense = seconds["dense"]
    return {
        "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "sdpa_ms": seconds["sdpa"] * 1e3,
        "dense_ms": dense * 1e3,
        "dense_gflops": flop / dense / 1e9,
        "sdpa_gflops": flop / seconds["sdpa"] / 1e9,
        "dense_over_sdpa": dense / seconds["sdpa"],
        "skip_over_dense": seconds["skip, nothing dropped"] / dense,
        "sparse": [
            {
                "pattern": name.split()[0],
                "density": density,
                "ms": seconds[name] * 1e3,
                "over_proportional": seconds[name] / (density * dense),
                "limit_ms": (1.15 * density + 0.03) * dense * 1e3,
            }
            for name, density in densities.items()
        ],
    }


def processor_name() -> str:
    """The processor's marketing name where Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_row(row: dict[str, Any]) -> None:
    """A few lines for the person watching."""
    print(
        f"D={row['head_dim']:<4}{row['dtype']:<10} dense {row['dense_ms']:7.1f} ms  {row['dense_gflops']:5.0f} GFLOP/s"
        f"  sdpa {row['sdpa_ms']:7.1f} ms  ours/sdpa {row['dense_over_sdpa']:.2f}"
        f"  skip/dense {row['skip_over_dense']:.3f}",
        flush=True,
    )
    for point in row["sparse"]:
        verdict = "ok" if point["ms"] <= point["limit_ms"] else "over 1.15 * density + 3%"
        print(
            f"    {point['pattern']:<11} density {point['density']:.3f}  {point['ms']:7.1f} ms"
            f"  time / (density * dense) {point['over_proportional']:.3f}  {verdict}",
            flush=True,
        )


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    rows = []
    for head_dim in arguments.head_dims:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows.append(measure_shape(head_dim, dtype, arguments))
            print_row(rows[-1])
    record = {
        **facts_of_run("python benchmarks/cpu_attention.py", on_gpu=False),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "length": arguments.length,
        "heads": arguments.heads,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
