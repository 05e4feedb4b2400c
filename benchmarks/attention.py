"""Speed of the Hopper kernels, in one run with FlashAttention-3, cuDNN and FlexAttention on the same GPU.

Writes DIR/attention_GPU.json (attention_h200.json on an H200), anew after every block, so that a run that is stopped
keeps what it measured. bf16, non-causal, random normal inputs, drawn anew for every block. Every result is compared
with an fp64 reference before it is timed. Times are means of loops of about a second (sustained.py), FlashAttention-3
before and after each block of ours, and ratios are to the mean of the two. About six minutes on an H200.

Needs nvidia-ml-py, and for FlashAttention-3 the wheel fa3-fwd; a peer that is missing is named in the record.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import keep_maps
import lite_attention
import peers
from attention_record import (
    ATTENTION,
    CUDNN,
    DENSE,
    FA3,
    FLEX,
    PATTERNS,
    SCATTERED,
    SKIP_ATTENTION,
    Loop,
    Row,
    dense_row,
    density_row,
    skip_row,
    summary,
)
from checks import Check, WrongResultError, check
from run import DTYPE, Run, parse_on_gpu, parse_some, parser_of_run, reason
from sustained import Telemetry, host_microseconds, sustained

DEVICE = "cuda"
DENSITIES = (0.75, 0.5, 0.25, 0.1)
SWEEP_LENGTHS = tuple(2**power for power in range(11, 18))
SWEEP_SHARE = 0.3  # of --seconds
SKIP_GOAL = 1.02  # most time / time of our dense call, nothing dropped
HOST_GOAL = 15.0  # most microseconds
HOST_CALLS, HOST_CALLS_IN_FLIGHT = 2000, 50  # so few that no call waits for room in the launch queue
PARTS = ("dense", "skip", "density", "sweep", "host")


@dataclass(frozen=True)
class Shape:
    """Self-attention of one size."""

    batch: int
    length: int
    heads: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"B{self.batch} S{self.length} H{self.heads} D{self.head_dim}"

    def __str__(self) -> str:
        return self.name

    @property
    def flop(self) -> int:
        return 4 * self.batch * self.heads * self.length**2 * self.head_dim

    def facts(self) -> Row:
        """As the record holds it."""
        return {"name": self.name, **asdict(self)}

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v."""
        q, k, v = torch.randn(3, self.batch, self.length, self.heads, self.head_dim, dtype=DTYPE, device=DEVICE)
        return q, k, v

    def keep_map(self, pattern: str, density: float) -> Tensor:
        """A bool keep map of one of the patterns."""
        size = (self.batch, self.heads, self.length, self.head_dim)
        return keep_maps.keep_map(pattern, density, *size, DTYPE, DEVICE)


# Least rate / FlashAttention-3's rate.
DENSE_GOALS = {
    Shape(1, 16384, 16, 128): 1.00,
    Shape(1, 32760, 40, 128): 1.00,  # Wan 2.1, a clip of 480p
    Shape(1, 75600, 10, 128): 1.00,  # Wan 2.1, a quarter of the heads of a clip of 720p
    Shape(1, 32768, 24, 64): 1.00,
    Shape(1, 16384, 16, 256): 0.95,
    Shape(2, 4096, 24, 128): 0.95,
}
# Most time / (density * FlashAttention-3's dense time), by density.
DENSITY_GOALS: dict[Shape, dict[float, float]] = {
    Shape(1, 32760, 40, 128): dict.fromkeys(DENSITIES, 1.05),
    Shape(1, 75600, 10, 128): dict.fromkeys(DENSITIES, 1.05),
    Shape(1, 32768, 24, 64): dict.fromkeys(DENSITIES, 1.10),
    Shape(1, 16384, 16, 128): {0.1: 1.15},
}
# FlexAttention needs whole blocks and a compilation for every shape: one shape is enough to place it.
FLEX_SHAPE = Shape(1, 16384, 16, 128)


@dataclass
class Candidate:
    """One call to check and to time: a kernel, and the bool map of the tiles it computes (None: all of them)."""

    kernel: str
    call: Callable[[], Any]
    pattern: str = DENSE
    keep: Tensor | None = None
    tile: tuple[int, int] = (64, 128)  # of the map; without one, the grain of the check

    @property
    def is_peer(self) -> bool:
        return self.kernel in (FA3, CUDNN, FLEX)

    @property
    def density(self) -> float:
        return 1.0 if self.keep is None else self.keep.double().mean().item()

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> Check:
        """Compare a result with the reference."""
        poison = torch.full_like(q, math.nan)
        del poison  # the allocator is likely to hand this very memory to the result
        result = self.call()
        out, lse = (result[0], result[1]) if isinstance(result, tuple) else (result, None)
        found = check(q, k, v, out, lse, self.keep, self.tile)
        if self.kernel == SKIP_ATTENTION and self.keep is not None:
            next_keep = lite_attention.unpack_keep_map(result[2], self.keep.shape[-1])
            if not torch.equal(next_keep, self.keep):
                raise WrongResultError("next_keep at threshold -inf is not the map that went in")
        return found


def dense_candidate(q: Tensor, k: Tensor, v: Tensor) -> Candidate:
    """Our dense call."""
    return Candidate(ATTENTION, lambda: lite_attention.attention(q, k, v))


def sparse_candidate(kernel: str, pattern: str, keep: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Candidate:
    """Our call over a bool map; that of skip_attention with a threshold at which it drops nothing."""
    packed = lite_attention.pack_keep_map(keep)
    never_drop = torch.tensor(-math.inf, device=q.device)

    def call() -> Any:
        if kernel == ATTENTION:
            return lite_attention.attention(q, k, v, keep=packed)
        return lite_attention.skip_attention(q, k, v, packed, never_drop)

    return Candidate(kernel, call, pattern, keep, lite_attention.tile_shape(q.shape[3], q.dtype))


def flex_candidate(pattern: str, density: float, q: Tensor, k: Tensor, v: Tensor) -> Candidate:
    """FlexAttention over random blocks of its own grain."""
    batch, length, heads, _ = q.shape
    blocks = length // peers.FLEX_BLOCK
    kept = torch.full((batch, heads, blocks), max(1, round(density * blocks)), device=q.device)
    keep = keep_maps.random_tiles(kept, blocks)
    return Candidate(FLEX, peers.flex_attention_over(keep, q, k, v), pattern, keep, (peers.FLEX_BLOCK,) * 2)


class Benchmark(Run):
    """The parts of the benchmark."""

    def __init__(self, output: Path, seconds: float) -> None:
        super().__init__("attention", output, seconds, Telemetry())
        self.dense_peers: dict[str, peers.Prepare] = {CUDNN: peers.cudnn_sdpa}
        try:
            self.dense_peers[FA3] = peers.flash_attention_3()
        except (ImportError, OSError) as error:
            self.record["absent"][FA3] = reason(error)

    def peer(self, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> list[Candidate]:
        """A dense peer, if it is there."""
        return [Candidate(kernel, self.dense_peers[kernel](q, k, v))] if kernel in self.dense_peers else []

    def checked(
        self, candidates: Sequence[Candidate], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[list[tuple[Candidate, Check]], dict[str, str]]:
        """The candidates whose results are right, and the peers whose are not, with the reason.

        A failure of ours is raised.
        """
        right, absent = [], {}
        for candidate in candidates:
            try:
                right.append((candidate, candidate.check(q, k, v)))
            except Exception as error:
                if not candidate.is_peer:
                    raise
                absent[candidate.kernel] = reason(error)
                self.say(f"  without {candidate.kernel}: {absent[candidate.kernel]}")
        return right, absent

    def loop(self, shape: Shape, candidate: Candidate, found: Check, share: float = 1.0) -> Loop:
        """One timed loop of a checked candidate."""
        loop = sustained(candidate.call, share * self.seconds, self.telemetry)
        density = candidate.density
        tflops = shape.flop * density / loop.ms * 1e-9
        self.say(
            f"  {candidate.kernel:<17}{candidate.pattern:<25}{density:6.1%}{loop.ms:10.3f} ms{tflops:5.0f} TFLOP/s"
            f"  {loop.sm_clock_mhz} MHz  {loop.power_watts} W"
        )
        facts = {"kernel": candidate.kernel, "pattern": candidate.pattern, "density": density, "tflops": tflops}
        return {**facts, **loop.facts(), "check": found.facts()}

    def dense(self, shape: Shape, goal: float | None = None, share: float = 1.0) -> Row:
        """FlashAttention-3, ours, FlashAttention-3 again, then the other peers."""
        q, k, v = shape.inputs()
        candidates = [*self.peer(FA3, q, k, v), dense_candidate(q, k, v), *self.peer(CUDNN, q, k, v)]
        if shape == FLEX_SHAPE:
            candidates.append(flex_candidate(DENSE, 1.0, q, k, v))
        right, absent = self.checked(candidates, q, k, v)
        by_kernel = {candidate.kernel: (candidate, found) for candidate, found in right}
        order = [kernel for kernel in (FA3, ATTENTION, FA3, CUDNN, FLEX) if kernel in by_kernel]
        loops = [self.loop(shape, *by_kernel[kernel], share) for kernel in order]
        return dense_row(shape.facts(), goal, loops, absent)

    def skip(self, shape: Shape) -> Row:
        """Our dense call and skip_attention on the full map, twice in turn."""
        q, k, v = shape.inputs()
        full = shape.keep_map(SCATTERED, 1.0)
        pair = [dense_candidate(q, k, v), sparse_candidate(SKIP_ATTENTION, DENSE, full, q, k, v)]
        right, _ = self.checked(pair, q, k, v)
        return skip_row(shape.facts(), SKIP_GOAL, [self.loop(shape, *one) for one in right * 2])

    def density(self, shape: Shape, density: float) -> Row:
        """Every pattern at one density, between two loops of FlashAttention-3."""
        q, k, v = shape.inputs()
        fa3, absent = self.checked(self.peer(FA3, q, k, v), q, k, v)
        candidates = []
        for pattern in PATTERNS:
            keep = shape.keep_map(pattern, density)
            candidates.append(sparse_candidate(ATTENTION, pattern, keep, q, k, v))
            if pattern == SCATTERED:
                candidates.append(sparse_candidate(SKIP_ATTENTION, pattern, keep, q, k, v))
        if shape == FLEX_SHAPE:
            candidates.append(flex_candidate(SCATTERED, density, q, k, v))
        right, missing = self.checked(candidates, q, k, v)
        loops = [self.loop(shape, *one) for one in [*fa3, *right, *fa3]]
        return density_row(shape.facts(), density, DENSITY_GOALS[shape].get(density), loops, absent | missing)

    def sweep(self, shape: Shape) -> Row:
        """Dense, in shorter loops, for the plot over sequence length."""
        return self.dense(shape, share=SWEEP_SHARE)

    def host(self) -> Row:
        """Time until an operator call on a tiny shape returns."""
        shape = Shape(1, 256, 2, 128)
        q, k, v = shape.inputs()
        keep = lite_attention.full_keep_map(1, shape.heads, shape.length, shape.length, 128, DTYPE, q.device)
        threshold = torch.tensor(-10.0, device=q.device)
        scale = shape.head_dim**-0.5
        operators = torch.ops.lite_attention
        calls: dict[str, Callable[[], object]] = {
            ATTENTION: lambda: operators.attention(q, k, v, None, None, scale),
            SKIP_ATTENTION: lambda: operators.skip_attention(q, k, v, keep, None, None, threshold, scale),
        }
        calls |= {peer.kernel: peer.call for peer in self.peer(FA3, q, k, v)}
        microseconds: dict[str, dict[str, float]] = {}
        for name, call in calls.items():
            microseconds[name] = {}
            for mode, context in {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.items():
                with context():
                    host_microseconds(call, HOST_CALLS, HOST_CALLS_IN_FLIGHT)
                    microseconds[name][mode] = host_microseconds(call, HOST_CALLS, HOST_CALLS_IN_FLIGHT)
            self.say(f"  {name}: {microseconds[name]}")
        return {"shape": shape.facts(), "goal": HOST_GOAL, "microseconds": microseconds}

    def run(self, parts: Sequence[str], quick: bool) -> None:
        """Measure the parts; quick: the first of each."""
        first = slice(1 if quick else None)
        self.block("cublas", self.cublas)
        if "dense" in parts:
            for shape, goal in list(DENSE_GOALS.items())[first]:
                self.block("dense", self.dense, shape, goal)
        if "skip" in parts:
            for shape in list(DENSE_GOALS)[first]:
                self.block("skip", self.skip, shape)
        if "density" in parts:
            for shape in list(DENSITY_GOALS)[first]:
                for density in DENSITIES:
                    self.block("density", self.density, shape, density)
        if "sweep" in parts:
            for length in SWEEP_LENGTHS[first]:
                self.block("sweep", self.sweep, Shape(1, length, 16, 128))
        if "host" in parts:
            self.block("host", self.host)


def main() -> int:
    """Entry point of the script; 1 if a block failed."""
    parser = parser_of_run(__doc__)
    parser.add_argument("--only", type=parse_some(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="the first shape of each part")
    arguments = parse_on_gpu(parser)
    benchmark = Benchmark(arguments.output, arguments.seconds)
    with torch.no_grad():
        benchmark.run(arguments.only, arguments.quick)
    benchmark.finish()
    print(summary(benchmark.record))
    print(f"wrote {benchmark.path}")
    return 1 if benchmark.record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
