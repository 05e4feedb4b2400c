"""Speed of the sparse families on a Hopper GPU: sliding tiles, video sparse attention, streaming heads, causal.

Writes DIR/sparse_families_GPU.json (sparse_families_h200.json on an H200), anew after every block, so that a run that
is stopped keeps what it measured. bf16, batch 1, random normal inputs, drawn anew for every block. Rates count kept
(query, key) pairs alone: TFLOP/s = 4 * D * pairs / time. Every result is compared on some rows with an fp64 reference
that knows the mask by its rule (mask_rules.py) before it is timed. Times are means of loops of about a second
(sustained.py), FlashAttention-3 and our dense call before and after the others of a block. About two minutes.

Needs nvidia-ml-py, and for FlashAttention-3 the wheel fa3-fwd; a peer that is missing is named in the record.

Over 400 lines: the blocks of one run share its candidates, references and loops.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lite_attention
import mask_rules
import peers
from attention import Shape
from attention_record import ATTENTION, DENSE, FA3, Row
from keep_maps import random_tiles
from lite_attention.families import block_sparse, sliding_tile, streaming, video_sparse
from lite_attention.maps.blocks import block_means, block_scores, choose_blocks, topk_of_sparsity
from lite_attention.maps.tiles import FINE_TILE_N, UNLIMITED
from lite_attention.maps.video_tiles import Size, VideoTiles
from run import DTYPE, Run, parse_on_gpu, parse_some, parser_of_run, reason
from sparse_families_record import (
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
    PARTS,
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
    summary,
    video_sparse_row,
)
from sustained import Loop, Telemetry, sustained

DEVICE = "cuda"
Inputs = tuple[Tensor, Tensor, Tensor]

CANVAS, TILE = (18, 48, 80), (6, 8, 8)
WINDOWS = ((3, 3, 3), (3, 3, 5), (3, 6, 10))
SLIDING_TILES_SHAPE = Shape(1, math.prod(CANVAS), 12, 128)

BLOCK = 64  # tokens of a block of video sparse attention, 4 x 4 x 4
BLOCK_GRID = (12, 8, 8)  # of the clip whose blocks choose nearby ones
BLOCKS_KEPT, BLOCKS_NEARBY = 76, 38
VIDEO_SPARSE_SHAPE = Shape(1, math.prod(BLOCK_GRID) * BLOCK, 12, 128)

SELECTION_TILES = VideoTiles((21, 45, 80), (4, 4, 4))  # Wan 2.1, a clip of 720p
SELECTION_SHAPE = Shape(1, SELECTION_TILES.number * BLOCK, 40, 128)
SPARSITY = 0.9
# Means and scores are rounded to bf16, of 8 bits each: a choice may differ from one in fp64 among scores so close, of
# the largest one.
SCORES_ERROR = 0.02

SINK_SIZE, RECENT_SIZE = 128, 256
STREAMING_SHAPES = tuple(Shape(1, 2**power, 32, 128) for power in range(11, 17))
EAGER_LENGTH = 8192  # up to here calls are also timed one by one: launching may take as long as they run
EAGER_CALLS = 100
BURST_PAUSE_SECONDS, BURST_WARM_UPS, BURST_LAUNCHES = 0.3, 3, 10
MIXED_SHAPES = (Shape(1, 4096, 32, 128), Shape(1, 16384, 32, 128))
FULL_HEADS = 8
CAUSAL_SHAPES = tuple(Shape(1, 2**power, 16, head_dim) for head_dim in (128, 64) for power in range(12, 16))


@dataclass
class Candidate:
    """One call to check and to time, and the rule of its mask."""

    kernel: str
    case: str
    call: Callable[[], Any]
    rule: mask_rules.Rule | None  # None: a stage of another candidate, whose check covers it
    # out `[B, S, H, D]` and lse, from what the call returns
    result: Callable[[Any], tuple[Tensor, Tensor | None]] = lambda result: result

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.case}"

    def flop(self, shape: Shape) -> int | None:
        """Multiplications and additions of the kept pairs."""
        return None if self.rule is None else 4 * shape.batch * shape.head_dim * self.rule.pairs

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> mask_rules.RowCheck | None:
        """Compare a result with the reference."""
        if self.rule is None:
            return None
        poison = torch.full_like(q, math.nan)
        del poison  # the allocator is likely to hand this very memory to the result
        return mask_rules.check_rows(q, k, v, *self.result(self.call()), self.rule)


def eager(call: Callable[[], object], seconds: float, telemetry: Telemetry) -> Loop:
    """As `sustained`, of calls that are each launched on their own however short they are."""

    def many_calls() -> None:
        for _ in range(EAGER_CALLS):
            call()

    loop = sustained(many_calls, seconds, telemetry)
    return replace(loop, ms=loop.ms / EAGER_CALLS, launches=loop.launches * EAGER_CALLS)


def burst_ms(call: Callable[[], object]) -> float:
    """Median of a few single launches after a pause, before the power limit lowers the clock.

    The way in which the figures measured elsewhere were taken; nothing here is judged by it.
    """
    time.sleep(BURST_PAUSE_SECONDS)
    times: list[float] = []
    for _ in range(BURST_WARM_UPS + BURST_LAUNCHES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[BURST_WARM_UPS:])


def out_alone(out: Tensor) -> tuple[Tensor, None]:
    """The result of a kernel that returns no lse."""
    return out, None


def masked_inputs(shape: Shape, exists: Tensor) -> Inputs:
    """Random q, k and v with zeros where `exists` `[S]` is False."""
    q, k, v = (x * exists[:, None, None] for x in shape.inputs())
    return q, k, v


def nearby_blocks(heads: int) -> Tensor:
    """Bool `[heads, blocks, blocks]`: every block keeps the nearest ones of the grid, and random ones of the others."""
    axes = torch.meshgrid(*(torch.arange(count, device=DEVICE) for count in BLOCK_GRID), indexing="ij")
    places = torch.stack(axes, dim=-1).flatten(end_dim=2).float()
    distance = torch.cdist(places, places)
    nearest = distance.argsort(dim=-1, stable=True)[:, :BLOCKS_NEARBY]
    order = torch.rand(heads, *distance.shape, device=DEVICE)
    order.scatter_(2, nearest.expand(heads, -1, -1), math.inf)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(2, order.topk(BLOCKS_KEPT, dim=-1).indices, True)


def map_facts(keep: Tensor) -> Row:
    """Of a map `[heads, blocks, blocks]`: its density, and of visit_rows query rows the union of tiles over a row's."""
    tiles_together = lite_attention.visit_rows(VIDEO_SPARSE_SHAPE.head_dim, DTYPE) // BLOCK
    union = keep.unflatten(1, (-1, tiles_together)).any(dim=2)
    density = keep.double().mean().item()
    return {"density": density, "union_over_row": union.double().mean().item() / density}


class Benchmark(Run):
    """The parts of the benchmark."""

    def __init__(self, output: Path, seconds: float) -> None:
        super().__init__("sparse_families", output, seconds, Telemetry())
        self.flash_attention: dict[str, peers.Prepare] = {}
        try:
            self.flash_attention = {DENSE: peers.flash_attention_3(), CAUSAL: peers.flash_attention_3(causal=True)}
        except (ImportError, OSError) as error:
            self.record["absent"][FA3] = reason(error)

    def peer(self, case: str, rule: mask_rules.Rule, q: Tensor, k: Tensor, v: Tensor) -> list[Candidate]:
        """FlashAttention-3, dense or causal, if it is there."""
        if case not in self.flash_attention:
            return []
        return [Candidate(FA3, case, self.flash_attention[case](q, k, v), rule, out_alone)]

    @contextlib.contextmanager
    def surviving(self, part: str, shape: Shape, candidate: Candidate, absent: dict[str, str]) -> Iterator[None]:
        """A failure with a candidate is recorded and the block goes on; one of ours is a failure of the run."""
        try:
            yield
        except Exception as error:
            absent[candidate.name] = reason(error)
            self.say(f"  without {candidate.name}: {absent[candidate.name]}")
            if candidate.kernel != FA3:
                block = f"{shape}, {candidate.name}"
                self.record["failures"].append({"part": part, "block": block, "error": reason(error)})

    def loop_row(
        self,
        shape: Shape,
        candidate: Candidate,
        found: mask_rules.RowCheck | None,
        loop: Loop,
        burst: float | None = None,
    ) -> Row:
        """One timed loop of a checked candidate, as the record holds it."""
        flop = candidate.flop(shape)
        rate = None if flop is None else flop / loop.ms * 1e-9
        self.say(
            f"  {candidate.name:<48}{loop.ms:10.3f} ms{'' if rate is None else f'{rate:5.0f} TFLOP/s'}"
            f"  {loop.sm_clock_mhz} MHz  {loop.power_watts} W"
        )
        return {
            "kernel": candidate.kernel,
            "case": candidate.case,
            "density": None if flop is None else flop / shape.flop,
            "tflops": rate,
            **loop.facts(),
            "burst_ms": burst,
            "check": None if found is None else found.facts(),
        }

    def measured(
        self, part: str, shape: Shape, qkv: Inputs, around: Sequence[Candidate], inner: Sequence[Candidate]
    ) -> tuple[list[Row], dict[str, str]]:
        """Loops of the candidates whose results are right, those around before and after the others; what failed."""
        checks: dict[str, mask_rules.RowCheck | None] = {}
        absent: dict[str, str] = {}
        for candidate in (*around, *inner):
            with self.surviving(part, shape, candidate, absent):
                checks[candidate.name] = candidate.check(*qkv)
        loops = []
        for candidate in (*around, *inner, *reversed(around)):
            if candidate.name in checks:
                with self.surviving(part, shape, candidate, absent):
                    burst = burst_ms(candidate.call)
                    loop = sustained(candidate.call, self.seconds, self.telemetry)
                    loops.append(self.loop_row(shape, candidate, checks[candidate.name], loop, burst))
        return loops, absent

    def dense(self, shape: Shape, qkv: Inputs) -> list[Candidate]:
        """FlashAttention-3 and our call on everything."""
        rule = mask_rules.Dense(shape.length, shape.heads)
        return [
            *self.peer(DENSE, rule, *qkv),
            Candidate(ATTENTION, DENSE, lambda: lite_attention.attention(*qkv), rule),
        ]

    def sliding_tiles(self) -> Row:
        """Windows of tiles beside dense attention."""
        shape = SLIDING_TILES_SHAPE
        qkv = shape.inputs()
        inner = [self.window(window, qkv) for window in WINDOWS]
        loops, absent = self.measured(SLIDING_TILES, shape, qkv, self.dense(shape, qkv), inner)
        facts = {"canvas": CANVAS, "tile": TILE, "windows": [str(window) for window in WINDOWS]}
        return sliding_tiles_row(shape.facts(), facts, loops, absent)

    def window(self, window: Size, qkv: Inputs) -> Candidate:
        """sliding_tile.attention with one window for all heads and its map made before."""
        shape = SLIDING_TILES_SHAPE
        sliding = sliding_tile.sliding_tile_map(
            window, CANVAS, head_dim=shape.head_dim, dtype=DTYPE, tile=TILE, device=torch.device(DEVICE)
        )
        rule = mask_rules.SlidingTiles(CANVAS, TILE, window, shape.heads)
        return Candidate(
            SLIDING_TILE_ATTENTION,
            str(window),
            lambda: sliding_tile.attention(*qkv, sliding),
            rule,
        )

    def video_sparse(self) -> Row:
        """Maps of 64 x 64 blocks beside dense attention."""
        shape = VIDEO_SPARSE_SHAPE
        qkv = shape.inputs()
        blocks = math.prod(BLOCK_GRID)
        kept = torch.full((shape.heads, blocks), BLOCKS_KEPT, device=DEVICE)
        maps = {RANDOM_BLOCKS: random_tiles(kept, blocks), NEARBY_BLOCKS: nearby_blocks(shape.heads)}
        inner = [self.blocks(case, keep, qkv) for case, keep in maps.items()]
        loops, absent = self.measured(VIDEO_SPARSE, shape, qkv, self.dense(shape, qkv), inner)
        facts = {case: map_facts(keep) for case, keep in maps.items()}
        return video_sparse_row(shape.facts(), facts, loops, absent)

    def blocks(self, case: str, keep: Tensor, qkv: Inputs) -> Candidate:
        """Our call over the kept ones of 64 x 64 blocks."""
        packed = lite_attention.pack_keep_map(keep).unsqueeze(0)
        rule = mask_rules.Blocks(keep, BLOCK, torch.full(keep.shape[-1:], BLOCK, device=keep.device))
        return Candidate(ATTENTION, case, lambda: lite_attention.attention(*qkv, keep=packed, tile_n=BLOCK), rule)

    def selection(self) -> Row:
        """The stages of video_sparse.attention on a clip whose last blocks along two axes are cut off."""
        shape, sizes = SELECTION_SHAPE, SELECTION_TILES.sizes(torch.device(DEVICE))
        blocks, scale = sizes.numel(), shape.head_dim**-0.5
        kept = topk_of_sparsity(SPARSITY, blocks)
        exists = (torch.arange(BLOCK, device=DEVICE) < sizes.unsqueeze(-1)).flatten()
        qkv = masked_inputs(shape, exists)

        q, k, v = (x.transpose(1, 2) for x in qkv)

        def means() -> list[Tensor]:
            return [block_means(x, sizes, BLOCK) for x in qkv]

        q_means, k_means, v_means = means()
        scores = block_scores(q_means, k_means, scale)

        def choice() -> Tensor:
            return choose_blocks(q_means, k_means, kept, scale)

        packed = choice()
        keep = lite_attention.unpack_keep_map(packed, blocks)
        expected_scores, expected_coarse = mask_rules.coarse_stage(q, k, v, sizes)
        tolerance = SCORES_ERROR * expected_scores.abs().max().item()
        mask_rules.check_largest(keep, expected_scores, kept, tolerance)
        largest = lite_attention.unpack_keep_map(lite_attention.top_k_map(scores, kept), blocks)
        mask_rules.check_largest(largest, scores, kept, tolerance=0)

        def fine_part(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            fine = result[0].unflatten(1, (blocks, BLOCK)) - expected_coarse.transpose(1, 2).unsqueeze(2)
            return fine.flatten(1, 2), result[1]

        def coarse() -> object:
            return lite_attention.attention(q_means, k_means, v_means)

        rule = mask_rules.Blocks(keep[0], BLOCK, sizes)
        inner = [
            Candidate(VIDEO_SPARSE_ATTENTION, MEANS, means, None),
            Candidate(VIDEO_SPARSE_ATTENTION, CHOICE, choice, None),
            Candidate(TOP_K_MAP, ALONE, lambda: lite_attention.top_k_map(scores, kept), None),
            Candidate(VIDEO_SPARSE_ATTENTION, COARSE, coarse, None),
            Candidate(
                VIDEO_SPARSE_ATTENTION,
                FINE,
                lambda: block_sparse.attention(*qkv, packed, sizes),
                rule,
            ),
            Candidate(
                VIDEO_SPARSE_ATTENTION,
                WHOLE,
                lambda: video_sparse.attention(*qkv, sizes, kept),
                rule,
                fine_part,
            ),
        ]
        loops, absent = self.measured(SELECTION, shape, qkv, [], inner)
        return selection_row(shape.facts(), {"number": blocks, "kept": kept}, loops, absent)

    def causal_candidates(self, shape: Shape, qkv: Inputs) -> tuple[list[Candidate], Candidate]:
        """Causal FlashAttention-3, if it is there, and our causal call."""
        rule = mask_rules.Causal(shape.length, (None,) * shape.heads)
        ours = Candidate(ATTENTION, CAUSAL, lambda: lite_attention.attention(*qkv, causal="bottom-right"), rule)
        return self.peer(CAUSAL, rule, *qkv), ours

    def streaming(self, shape: Shape) -> Row:
        """Streaming heads beside causal attention; with both grains, and short ones also launched one by one."""
        qkv = shape.inputs()
        window = (SINK_SIZE, RECENT_SIZE)
        rule = mask_rules.Causal(shape.length, (window,) * shape.heads)
        table = torch.tensor([window] * shape.heads, dtype=torch.int32, device=DEVICE)

        def with_grain(tile_n: int) -> Candidate:
            return Candidate(
                ATTENTION,
                f"{STREAMING}, tile_n={tile_n}",
                lambda: lite_attention.attention(*qkv, tile_n=tile_n, causal="bottom-right", head_windows=table),
                rule,
            )

        peer, causal = self.causal_candidates(shape, qkv)
        ours = Candidate(STREAMING_ATTENTION, STREAMING, lambda: streaming.attention(*qkv, *window), rule)
        default_grain = lite_attention.tile_shape(shape.head_dim, DTYPE)[1]
        grains = [with_grain(tile_n) for tile_n in (default_grain, FINE_TILE_N)]
        loops, absent = self.measured(STREAMING, shape, qkv, peer, [causal, ours, *grains])
        one_by_one = []
        if shape.length <= EAGER_LENGTH:
            for candidate in (*peer, causal, ours):
                if candidate.name not in absent:
                    with self.surviving(STREAMING, shape, candidate, absent):
                        found = candidate.check(*qkv)
                        loop = eager(candidate.call, self.seconds, self.telemetry)
                        one_by_one.append(self.loop_row(shape, candidate, found, loop))
        facts = {"sink_size": SINK_SIZE, "recent_size": RECENT_SIZE, "tile_n": default_grain}
        return streaming_row(shape.facts(), facts, loops, one_by_one, absent)

    def growth(self) -> Row:
        """What the lengths of the streaming part say together."""
        return growth_row(self.record.get(STREAMING, []))

    def mixed_heads(self, shape: Shape) -> Row:
        """Full and streaming heads in one launch, and in one for each kind without joining their results."""
        qkv = shape.inputs()
        windows = [(0, UNLIMITED)] * FULL_HEADS + [(SINK_SIZE, RECENT_SIZE)] * (shape.heads - FULL_HEADS)
        table = torch.tensor(windows, dtype=torch.int32, device=DEVICE)
        full, sparse = ([x[:, :, heads] for x in qkv] for heads in (slice(FULL_HEADS), slice(FULL_HEADS, None)))
        sparse_table = table[FULL_HEADS:]
        rule = mask_rules.Causal(
            shape.length, (None,) * FULL_HEADS + ((SINK_SIZE, RECENT_SIZE),) * (shape.heads - FULL_HEADS)
        )

        def two_launches() -> Any:
            return (
                lite_attention.attention(*full, causal="bottom-right"),
                lite_attention.attention(*sparse, causal="bottom-right", head_windows=sparse_table),
            )

        def joined(results: Any) -> tuple[Tensor, Tensor]:
            outs, lses = zip(*results, strict=True)
            return torch.cat(outs, dim=2), torch.cat(lses, dim=1)

        def one_launch() -> Any:
            return lite_attention.attention(*qkv, causal="bottom-right", head_windows=table)

        peer, causal = self.causal_candidates(shape, qkv)
        inner = [
            causal,
            Candidate(ATTENTION, ONE_LAUNCH, one_launch, rule),
            Candidate(ATTENTION, TWO_LAUNCHES, two_launches, rule, joined),
        ]
        loops, absent = self.measured(MIXED_HEADS, shape, qkv, peer, inner)
        facts = {"full_heads": FULL_HEADS, "sink_size": SINK_SIZE, "recent_size": RECENT_SIZE}
        return mixed_heads_row(shape.facts(), facts, loops, absent)

    def causal(self, shape: Shape) -> Row:
        """Our causal call beside FlashAttention-3's."""
        qkv = shape.inputs()
        peer, ours = self.causal_candidates(shape, qkv)
        return causal_row(shape.facts(), *self.measured(CAUSAL, shape, qkv, peer, [ours]))

    def run(self, parts: Sequence[str]) -> None:
        """Measure the parts."""
        self.block("cublas", self.cublas)
        if SLIDING_TILES in parts:
            self.block(SLIDING_TILES, self.sliding_tiles)
        if VIDEO_SPARSE in parts:
            self.block(VIDEO_SPARSE, self.video_sparse)
        if SELECTION in parts:
            self.block(SELECTION, self.selection)
        if STREAMING in parts:
            for shape in STREAMING_SHAPES:
                self.block(STREAMING, self.streaming, shape)
            self.block(GROWTH, self.growth)
        if MIXED_HEADS in parts:
            for shape in MIXED_SHAPES:
                self.block(MIXED_HEADS, self.mixed_heads, shape)
        if CAUSAL in parts:
            for shape in CAUSAL_SHAPES:
                self.block(CAUSAL, self.causal, shape)


def main() -> int:
    """Entry point of the script; 1 if a block failed."""
    parser = parser_of_run(__doc__)
    parser.add_argument("--only", type=parse_some(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}")
    arguments = parse_on_gpu(parser)
    benchmark = Benchmark(arguments.output, arguments.seconds)
    try:
        with torch.no_grad():
            benchmark.run(arguments.only)
        benchmark.finish()
    finally:  # an error of the device outlives the block that made it
        print(summary(benchmark.record))
        print(f"wrote {benchmark.path}")
    return 1 if benchmark.record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
