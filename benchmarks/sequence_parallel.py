"""Speed of sequence parallelism on the GPUs of one machine: an attention layer, its balance, a step of a model, peers.

Writes DIR/sequence_parallel_GPU.json (sequence_parallel_h200.json on H200s), anew after every block, so that a run that
is stopped keeps what it measured. bf16, batch 1, random normal inputs. Parts:

* layer: DistributedLiteAttention by Ulysses (in several numbers of head chunks), in a ring, and both, dense and with a
  quarter of the tiles kept, beside one GPU. The same call without its attention and its attention without the rest are
  timed too, and each GPU's attention is told.
* balance: heads of different density, as they come and after balance_heads().
* model: a step of WanTransformer3DModel of diffusers, a few layers of it, whose tokens are split among the GPUs.
* peers: Ulysses as its paper tells it, and yunchang, both with FlashAttention-3.

Each part is checked before it is timed: outputs and skip state against one GPU that does the same (in a ring, split by
split). A time is the slowest GPU's median over a loop of about half a second. Every number of GPUs has processes of its
own. A rank that raises or hangs ends its block, its processes are started anew for the next one, and the run fails in
the end. No block begins after seven minutes; what is left out then is named in the record.

On a machine without GPUs, --device cpu with --sizes tiny tries the script itself.

Needs nvidia-ml-py; for the model diffusers; for the peers the wheel fa3-fwd, and yunchang. What is missing is named in
the record.

Over 400 lines: the parts of one run share its processes, inputs, checks and clocks.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import keep_maps
import lite_attention
import peers
from attention import Shape
from attention_record import ATTENTION, FA3, SCATTERED, Loop, Row
from checks import WrongResultError, check
from lite_attention import LiteAttention, merge_attention, ops
from lite_attention.parallel.distributed import DistributedLiteAttention
from lite_attention.parallel.mesh import sequence_mesh
from lite_attention.parallel.shards import shard_sequence
from lite_attention.skipping.computed_pass import ComputedPass, remember
from run import DTYPE, Run, parser_of_run, reason
from sequence_parallel_record import (
    BALANCE,
    LAYER,
    MODEL,
    ONE_GPU,
    PARTS,
    PEERS,
    TEXTBOOK,
    YUNCHANG,
    balance_row,
    best_layer,
    case_row,
    kernel_of,
    layer_row,
    method_of,
    model_case,
    model_row,
    one_gpu_ms,
    one_gpu_row,
    over_ranks,
    peer_row,
    summary,
)
from sustained import LEAST_LAUNCHES, WARM_UP_LAUNCHES, Telemetry, settled

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.rank_pool import RankError, RankPool

Layer = LiteAttention | DistributedLiteAttention

DENSITIES = (1.0, 0.25)
SEED = 0
# The states are compared on queries that lean in one direction, so that a tile matters to many of them or to few, at a
# threshold where a pass then drops a good part of the tiles.
STATE_THRESHOLD, STATE_PASSES, STATE_LEANING = 0.0, 2, 2.0
LARGEST_ERROR = 6e-3  # |out - expected| / |expected| that bf16 rounding alone may cause
# Densities of the heads of the balance part, from the densest to the sparsest, evenly spaced on a logarithmic scale.
DENSEST, SPARSEST = 0.70, 0.05
YUNCHANG_PACKAGE = "yunchang"
TASK_SECONDS, LIMIT_SECONDS = 150.0, 420.0


@dataclass(frozen=True)
class Setting:
    """What every process measures, and how."""

    device: str
    shape: Shape
    chunks: tuple[int, ...]
    seconds: float
    model: dict[str, Any]  # of wan_step.ModelSize
    clip: dict[str, Any]  # of wan_step.Clip
    compile_options: dict[str, Any] = field(default_factory=dict)


SIZES: dict[str, dict[str, Any]] = {
    "720p": {
        "shape": Shape(1, 75600, 40, 128),
        "chunks": (1, 2, 5, 10),
        "model": {"name": "14B", "heads": 40, "ffn_dim": 13824, "layers": 4, "whole_layers": 40},
        "clip": {"name": "720p", "height": 720, "width": 1280},
        "compile_options": {"fullgraph": True, "dynamic": False},
    },
    "tiny": {
        "shape": Shape(1, 600, 8, 64),
        "chunks": (1, 2),
        "model": {
            "name": "tiny",
            "heads": 4,
            "head_dim": 64,
            "ffn_dim": 64,
            "layers": 2,
            "whole_layers": 4,
            "channels": 4,
            "text_dim": 32,
            "text_tokens": 8,
            "freq_dim": 32,
        },
        "clip": {"name": "tiny", "height": 64, "width": 128, "frames": 17},
        "compile_options": {"fullgraph": True, "dynamic": False, "backend": "eager"},
    },
}


# --- in every process: measuring ---


class _NoTelemetry:
    """Where there is no GPU to ask."""

    def driver(self) -> str:
        return "none"

    @contextlib.contextmanager
    def sampling(self) -> Iterator[list[tuple[float, float]]]:
        yield []


def telemetry_of(device: str) -> Any:
    """What samples clock and power."""
    return Telemetry() if device == "cuda" else _NoTelemetry()


_telemetry = functools.cache(telemetry_of)


def call_times(call: Callable[[], object], launches: int, device: str) -> list[float]:
    """Milliseconds of each of so many calls, launched back to back."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(launches):
            call()
            marks.append(time.perf_counter())
        return [1000 * (end - start) for start, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(launches + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in itertools.pairwise(events)]


def timed(call: Callable[[], object], setting: Setting) -> Loop:
    """The median time of a call in a loop; all ranks launch it equally often."""
    call_times(call, 1, setting.device)
    estimate = torch.tensor(statistics.fmean(call_times(call, WARM_UP_LAUNCHES, setting.device)), device=setting.device)
    dist.all_reduce(estimate, dist.ReduceOp.MAX)
    launches = max(LEAST_LAUNCHES, round(1000 * setting.seconds / float(estimate)))
    with _telemetry(setting.device).sampling() as samples:
        times = call_times(call, launches, setting.device)
    clock, power = settled(samples)
    return {"ms": statistics.median(times), "launches": launches, "sm_clock_mhz": clock, "power_watts": power}


@functools.cache
def mesh_of(device: str, ring: int, ulysses: int) -> DeviceMesh:
    """The mesh of all ranks."""
    return init_device_mesh(device, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))


def measured(task: Callable[..., Any]) -> Callable[..., Any]:
    """A task whose processes leave no memory of the GPU taken to those of the next block."""

    @functools.wraps(task)
    def run(setting: Setting, *args: Any) -> Any:
        with torch.no_grad():
            result = task(setting, *args)
        torch.compiler.reset()
        gc.collect()  # models are full of cycles
        torch.cuda.empty_cache()
        return result

    return run


# --- in every process: inputs, references, what a layer consists of ---


def inputs_of(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v, the same on every rank."""
    torch.manual_seed(SEED)
    q, k, v = torch.randn(3, shape.batch, shape.length, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
    return q, k, v


def head_densities(heads: int) -> list[float]:
    """Of the heads of the balance part, in their order."""
    return [DENSEST * (SPARSEST / DENSEST) ** (head / (heads - 1)) for head in range(heads)]


def split_maps(shape: Shape, densities: Sequence[float], ring: int, rank: int, device: str) -> list[Tensor]:
    """Bool maps `[1, H, query tiles, KV tiles]` of a block of queries of the ring and every split of the keys.

    Heads have the densities; tiles are random, the same wherever they are drawn.
    """
    maps = []
    for split in range(ring):
        torch.manual_seed(SEED + 1 + rank * ring + split)
        size = (shape.batch, 1, shape.length // ring, shape.head_dim)
        of_heads = [keep_maps.keep_map(SCATTERED, density, *size, DTYPE, device) for density in densities]
        maps.append(torch.cat(of_heads, 1))
    return maps


class Reference:
    """One GPU that computes a block of queries over every split of the keys, and merges where there are several.

    Without a ring that is LiteAttention itself.
    """

    def __init__(self, ring: int, rank: int, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        query, key, value = qkv
        self.rank = rank
        self.query = query.chunk(ring, 1)[rank]
        self.splits = list(zip(key.chunk(ring, 1), value.chunk(ring, 1), strict=True))
        self.layers = [LiteAttention(threshold=STATE_THRESHOLD).to(query.device) for _ in self.splits]

    def __call__(self) -> Tensor:
        """The block's result, all heads."""
        pairs = [
            layer(self.query, key, value, return_softmax_lse=True)
            for layer, (key, value) in zip(self.layers, self.splits, strict=True)
        ]
        outs, lses = ([pair[index] for pair in pairs] for index in (0, 1))
        return outs[0] if len(outs) == 1 else merge_attention(outs, lses)[0]

    def use_queries(self, query: Tensor) -> None:
        """Compute other queries from now on."""
        self.query = query.chunk(len(self.splits), 1)[self.rank]

    def use(self, maps: Sequence[Tensor] | None) -> None:
        """Compute these tiles from now on, or all of them by the dense kernel."""
        for split, layer in enumerate(self.layers):
            impose(layer, None if maps is None else [maps[split]])


def impose(layer: Layer, maps: Sequence[Tensor] | None) -> None:
    """Let a layer, which has run, compute these tiles of all heads and drop nothing, or all by the dense kernel."""
    layer.set_threshold(-math.inf)
    layer.enable_skip_optimization(maps is not None)
    for split, keep in enumerate(maps or []):
        if isinstance(layer, DistributedLiteAttention):
            layer.set_keep_map(keep[:, layer.local_heads(keep.shape[1])], split)
        else:
            layer.set_keep_map(keep)


def required_maps(layer: Layer, maps: Sequence[Tensor], what: str) -> None:
    """A layer's state must be the part of these maps that belongs to this rank."""
    for split, keep in enumerate(maps):
        if isinstance(layer, DistributedLiteAttention):
            found, expected = layer.keep_map(split), keep[:, layer.local_heads(keep.shape[1])]
        else:
            found, expected = layer.keep_map(), keep
        if not torch.equal(found, expected):
            different = float((found != expected).double().mean())
            raise WrongResultError(f"{what}: {different:.2%} of the tiles of split {split} differ from one GPU's")


def required_equality(out: Tensor, expected: Tensor, what: str, limit: float = LARGEST_ERROR) -> Row:
    """How a result differs from the expected one; an error where rounding does not explain it."""
    error = float((out.float() - expected.float()).norm() / expected.float().norm())
    if not bool(torch.isfinite(out).all()) or not error <= limit:
        raise WrongResultError(f"{what}: error {error}, expected at most {limit}")
    return {"error": error, "equal": torch.equal(out, expected)}


@contextlib.contextmanager
def without_attention() -> Iterator[None]:
    """LiteAttention's calls without the work of their operators: results are of the right form and hold anything."""

    def lse_of(q: Tensor) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)

    def dense(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q, memory_format=torch.contiguous_format), lse_of(q)

    def skipping(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *dense(q), keep

    with mock.patch.multiple(ops, attention=dense, skip_attention=skipping):
        yield


def attention_alone(layer: DistributedLiteAttention) -> Callable[[], None]:
    """The calls of the rank's own states, one after the other, on inputs of their size that are there already."""
    calls: list[Callable[[], ComputedPass]] = []
    inputs: dict[Any, list[Tensor]] = {}
    for state in layer.states.splits:
        if not isinstance(state, LiteAttention):
            raise TypeError(f"expected the states to be LiteAttention, not {type(state).__name__}")
        shape = state.state.last_shape(0, "attention_alone")
        if shape not in inputs:
            sizes = [(shape.query_len, shape.heads)] + [(shape.kv_len, shape.kv_heads)] * 2
            inputs[shape] = [
                torch.randn(shape.batch, length, heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
                for length, heads in sizes
            ]
        # As the layer calls it, which tells it the length of the whole sequence: without, the map would be another one.
        query, key, value = inputs[shape]
        calls.append(functools.partial(state.computed_pass, query, key, value, told_len=shape.told_len))

    def run() -> None:
        for call in calls:
            remember(call())

    return run


def loops_of(layer: DistributedLiteAttention, shards: Sequence[Tensor], setting: Setting) -> dict[str, Loop]:
    """The whole call, the call without attention, and attention without the rest."""
    loops = {"whole": timed(lambda: layer(*shards), setting)}
    with without_attention():
        loops["exchange"] = timed(lambda: layer(*shards), setting)
    loops["attention"] = timed(attention_alone(layer), setting)
    return loops


# --- tasks, which run in every process ---


@measured
def one_gpu_task(setting: Setting) -> tuple[list[Row], dict[str, str]]:
    """Each GPU alone: ours at every density, FlashAttention-3; and what is absent."""
    qkv = inputs_of(setting.shape, setting.device)
    loops: list[Row] = []
    tile = lite_attention.tile_shape(setting.shape.head_dim, DTYPE)
    reference = Reference(1, 0, qkv)
    reference()
    for density in DENSITIES:
        densities = [density] * setting.shape.heads
        maps = None if density == 1 else split_maps(setting.shape, densities, 1, 0, setting.device)
        reference.use(maps)
        found = check(*qkv, reference(), None, None if maps is None else maps[0], tile)
        loop = timed(reference, setting)
        loops.append({"kernel": kernel_of(density), "density": density, **loop, "check": found.facts()})
    try:
        call = peers.flash_attention_3()(*qkv)
    except (ImportError, OSError) as error:
        return loops, {FA3: reason(error)}
    found = check(*qkv, call(), None, None, tile)
    return [*loops, {"kernel": FA3, "density": 1.0, **timed(call, setting), "check": found.facts()}], {}


@measured
def layer_task(setting: Setting, ring: int, ulysses: int, head_chunks: int) -> tuple[Row, list[Row]]:
    """One configuration of the layer: how its state compares with one GPU's, and every density."""
    mesh = mesh_of(setting.device, ring, ulysses)
    place = sequence_mesh(mesh, "benchmark")
    layer = DistributedLiteAttention(mesh, threshold=STATE_THRESHOLD, head_chunks=head_chunks).to(setting.device)
    query, key, value = inputs_of(setting.shape, setting.device)

    def shards_of(*inputs: Tensor) -> list[Tensor]:
        return [shard_sequence(x, place).clone() for x in inputs]

    def expected() -> Tensor:
        """Of the reference's result, the shard of this rank."""
        return reference().chunk(ulysses, 1)[place.ulysses.rank]

    leaning = query + STATE_LEANING * torch.randn(setting.shape.head_dim, dtype=DTYPE, device=setting.device)
    reference = Reference(ring, place.ring.rank, (leaning, key, value))
    shards = shards_of(leaning, key, value)
    for number in range(STATE_PASSES):
        state = required_equality(layer(*shards), expected(), f"pass {number} of the state check")
        required_maps(layer, [one.keep_map() for one in reference.layers], f"pass {number} of the state check")
    state |= {"equal_maps": True, "skipped": float(layer.skip_fraction())}
    reference.use_queries(query)
    shards = shards_of(query, key, value)
    del leaning

    cases = []
    for density in DENSITIES:
        densities = [density] * setting.shape.heads
        maps = None if density == 1 else split_maps(setting.shape, densities, ring, place.ring.rank, setting.device)
        reference.use(maps)
        impose(layer, maps)
        found = required_equality(layer(*shards), expected(), f"{density:.0%} of the tiles")
        loops = loops_of(layer, shards, setting)
        if maps is not None:
            required_maps(layer, maps, "after the loops")
        kept = 1.0 if maps is None else 1 - float(layer.skip_fraction())
        cases.append({"density": density, "tiles_kept": kept, "check": found, **loops})
    return state, cases


@measured
def balance_task(setting: Setting, ulysses: int, head_chunks: int) -> tuple[Row, Row, Row]:
    """Heads of different density: loops before, loops after balance_heads, what it says that it did."""
    mesh = mesh_of(setting.device, 1, ulysses)
    place = sequence_mesh(mesh, "benchmark")
    qkv = inputs_of(setting.shape, setting.device)
    shards = [shard_sequence(x, place).clone() for x in qkv]
    maps = split_maps(setting.shape, head_densities(setting.shape.heads), 1, 0, setting.device)
    reference = Reference(1, 0, qkv)
    reference()
    reference.use(maps)
    expected = reference().chunk(ulysses, 1)[place.ulysses.rank]
    layer = DistributedLiteAttention(mesh, threshold=-math.inf, head_chunks=head_chunks).to(setting.device)
    layer(*shards)
    impose(layer, maps)
    results = []
    balance: Any = None
    for name in ("before", "after"):
        if name == "after":
            balance = layer.balance_heads()
        required_maps(layer, maps, f"{name} balancing")
        found = required_equality(layer(*shards), expected, f"{name} balancing")
        loops = {"whole": timed(lambda: layer(*shards), setting), "attention": timed(attention_alone(layer), setting)}
        required_maps(layer, maps, f"{name} balancing, after the loops")
        results.append({"check": found, "tiles_kept": 1 - float(layer.skip_fraction()), **loops})
    return results[0], results[1], {"imbalance": balance._asdict()}


@measured
def model_task(setting: Setting, ring: int, ulysses: int) -> list[Row]:
    """A denoising step at every density, on one GPU or split among several: all layers here, and the first alone."""
    from lite_attention.integrations.diffusers import enable_lite_attention
    from wan_step import FIRST_TIMESTEP, SECOND_TIMESTEP, Clip, ModelSize, random_model

    size, clip = ModelSize(**setting.model), Clip(**setting.clip)
    torch.manual_seed(SEED)
    model = random_model(size, setting.device)
    latents = torch.randn(1, size.channels, *clip.latents, device=setting.device).to(DTYPE)
    text = torch.randn(1, size.text_tokens, size.text_dim, device=setting.device).to(DTYPE)
    timestep = torch.empty(1, dtype=torch.int64, device=setting.device)
    shape = Shape(1, clip.tokens, size.heads, size.head_dim)
    blocks = model.blocks

    def step() -> Tensor:
        out: Tensor = model(latents, timestep, text, return_dict=False)[0]
        return out

    def eager() -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return step()

    def start(layers: Sequence[Any]) -> None:
        """The first step of a generation starts from the full map, whatever maps were set; the second is measured."""
        for layer in layers:
            layer.enable_skip_optimization(True)
        for value in (FIRST_TIMESTEP, SECOND_TIMESTEP):
            timestep.fill_(value)
            eager()

    def maps_of(density: float, splits: int, rank: int) -> list[Tensor] | None:
        return None if density == 1 else split_maps(shape, [density] * size.heads, splits, rank, setting.device)

    expected = {}
    if ring == 1:  # in a ring one GPU would have to imitate the splits
        handle = enable_lite_attention(model, threshold=-math.inf, guidance="batched")
        alone = list(handle.layers.values())
        start(alone)
        for density in DENSITIES:
            maps = maps_of(density, 1, 0)
            for layer in alone:
                impose(layer, maps)
            expected[density] = eager()
        handle.disable()

    model.compile_repeated_blocks(**setting.compile_options)
    mesh = None if ring * ulysses == 1 else mesh_of(setting.device, ring, ulysses)
    rank = 0 if mesh is None else sequence_mesh(mesh, "benchmark").ring.rank
    # diffusers divides by the number of accelerators
    divisible = mock.patch.object(torch.accelerator, "device_count", return_value=1)
    with divisible if setting.device == "cpu" else contextlib.nullcontext():
        handle = enable_lite_attention(model, threshold=-math.inf, guidance="batched", mesh=mesh)
    layers = list(handle.layers.values())
    start(layers)
    cases = []
    for density in DENSITIES:
        maps = maps_of(density, ring, rank)
        for layer in layers:
            impose(layer, maps)
        before = time.perf_counter()
        out = step()
        facts: Row = {"preparation_seconds": time.perf_counter() - before}
        if density in expected:
            limit = LARGEST_ERROR * math.sqrt(size.layers)
            facts |= required_equality(out, expected[density], f"step at {density:.0%}", limit)
        facts["step"] = timed(step, setting)
        model.blocks = blocks[:1]
        facts["first_layer"] = timed(step, setting)
        model.blocks = blocks
        for layer in layers if maps is not None else []:
            required_maps(layer, maps or [], "after the loops")
        cases.append({"density": density, **facts})
    handle.disable()
    return cases


@measured
def peer_task(setting: Setting, peer: str, ring: int, ulysses: int) -> Row:
    """Another implementation, dense: the kernel it uses and what was measured, or why it is absent."""
    mesh = mesh_of(setting.device, ring, ulysses)
    place = sequence_mesh(mesh, "benchmark")
    name = FA3 if setting.device == "cuda" else ATTENTION  # where there is no GPU, to try the script
    try:
        kernel = peers.flash_attention_3_with_lse() if name == FA3 else lite_attention.attention
        if peer == TEXTBOOK:
            call = peers.textbook_ulysses(kernel, mesh)
        else:
            call = peers.yunchang_attention(kernel, ring, ulysses)
    except (ImportError, OSError) as error:
        return {"kernel": name, "absent": reason(error)}
    qkv = inputs_of(setting.shape, setting.device)
    shards = [shard_sequence(x, place).clone() for x in qkv]
    expected = lite_attention.attention(*qkv)[0].chunk(place.shards, 1)[place.shard]
    found = required_equality(call(*shards), expected, peer)
    return {"kernel": name, "absent": None, "check": found, "whole": timed(lambda: call(*shards), setting)}


# --- in the process that asks them ---


def meshes(ranks: int) -> list[tuple[int, int]]:
    """(ring, ulysses) of each method for so many ranks."""
    both = [(2, ranks // 2)] if ranks >= 4 else []
    return [(1, ranks), (ranks, 1), *both]


class Benchmark(Run):
    """The parts of the benchmark."""

    def __init__(self, output: Path, setting: Setting, ranks: Sequence[int], timeout: float, limit: float) -> None:
        on_gpu = setting.device == "cuda"
        super().__init__(
            "sequence_parallel",
            output,
            setting.seconds,
            telemetry_of(setting.device),
            None if on_gpu else "a CPU",
        )
        self.setting, self.ranks, self.timeout, self.limit = setting, sorted(ranks), timeout, limit
        self.pools: dict[int, RankPool] = {}
        self.record |= {
            "gpus": max(ranks),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
            "diffusers": peers.version_of("diffusers"),
            "yunchang": peers.version_of(YUNCHANG_PACKAGE),
            "left_out": [],
        }

    def on_ranks(self, ranks: int, task: Callable[..., Any], *args: Any) -> list[Any]:
        """What a task returns on each of so many ranks."""
        if ranks not in self.pools or not self.pools[ranks].alive:
            self.pools[ranks] = RankPool(ranks, self.setting.device, self.timeout)
        try:
            return self.pools[ranks].run(task, (self.setting, *args), self.timeout)
        except (RankError, TimeoutError) as error:
            print(error, file=sys.stderr, flush=True)
            raise

    def block(self, part: str, measure: Callable[..., Row], *arguments: object) -> None:
        """As the others' blocks; one whose turn comes too late is left out and named."""
        if time.perf_counter() - self.started > self.limit:
            self.record["left_out"].append(" ".join(map(str, (part, *arguments))))
            self.write()
        else:
            super().block(part, measure, *arguments)

    def say_case(self, name: str, density: float, loop: Loop) -> None:
        """One measured time."""
        self.say(f"  {name:<32}{density:6.0%}{loop['ms']:10.3f} ms  {loop['sm_clock_mhz']} MHz")

    def one_gpu(self) -> Row:
        """Every GPU alone."""
        answers = self.on_ranks(max(self.ranks), one_gpu_task)
        loops = []
        for of_ranks in zip(*(rows for rows, _ in answers), strict=True):
            first = of_ranks[0]
            facts = {name: first[name] for name in ("kernel", "density", "check")}
            loops.append({**facts, **over_ranks(of_ranks)})
            self.say_case(f"one GPU, {first['kernel']}", first["density"], loops[-1])
        absent = answers[0][1]
        self.record["absent"] |= absent
        return one_gpu_row(self.setting.shape.facts(), loops, absent)

    def layer(self, ring: int, ulysses: int, head_chunks: int) -> Row:
        """One configuration of the attention layer."""
        ranks = ring * ulysses
        answers = self.on_ranks(ranks, layer_task, ring, ulysses, head_chunks)
        states = [state for state, _ in answers]
        cases = []
        for of_ranks in zip(*(cases for _, cases in answers), strict=True):
            density = of_ranks[0]["density"]
            loops = {name: over_ranks([one[name] for one in of_ranks]) for name in ("whole", "exchange", "attention")}
            alone = one_gpu_ms(self.record, kernel_of(density), density)
            cases.append(
                case_row(
                    ranks,
                    density,
                    alone,
                    **loops,
                    tiles_kept=[one["tiles_kept"] for one in of_ranks],
                    check=[one["check"] for one in of_ranks],
                )
            )
            self.say_case(f"{ranks} GPUs, {method_of(ring, ulysses)}, {head_chunks}", density, loops["whole"])
        return layer_row(self.setting.shape.facts(), ring, ulysses, head_chunks, {"by_rank": states}, cases)

    def balance(self, ranks: int) -> Row:
        """Heads of different density, in the head chunks that were best at equal ones."""
        found = best_layer(self.record, ranks, method_of(1, ranks), min(DENSITIES))
        chunks = 1 if found is None else found[0]["head_chunks"]
        answers = self.on_ranks(ranks, balance_task, ranks, chunks)
        before, after = (self.side_of_balance([one[index] for one in answers]) for index in (0, 1))
        densities = head_densities(self.setting.shape.heads)
        for name, side in (("before", before), ("after", after)):
            self.say_case(f"{ranks} GPUs, balance, {name}", statistics.fmean(densities), side["whole"])
        return balance_row(self.setting.shape.facts(), ranks, chunks, densities, before, after, **answers[0][2])

    def side_of_balance(self, of_ranks: Sequence[Row]) -> Row:
        """Before or after balancing, over the ranks."""
        row: Row = {name: [one[name] for one in of_ranks] for name in ("tiles_kept", "check")}
        return row | {name: over_ranks([one[name] for one in of_ranks]) for name in ("whole", "attention")}

    def model(self, ring: int, ulysses: int) -> Row:
        """One denoising step."""
        ranks = ring * ulysses
        # one GPU alone, but all of them at once, as for the layer
        answers = self.on_ranks(max(self.ranks) if ranks == 1 else ranks, model_task, ring, ulysses)
        cases = []
        for of_ranks in zip(*answers, strict=True):
            density = of_ranks[0]["density"]
            loops = {name: over_ranks([one[name] for one in of_ranks]) for name in ("step", "first_layer")}
            for loop in loops.values() if ranks == 1 else []:
                loop["ms"] = statistics.fmean(loop["ms_by_rank"])
            facts: Row = dict(loops)
            for name in ("error", "equal", "preparation_seconds"):
                facts[name] = [one.get(name) for one in of_ranks]
            cases.append(model_case(self.setting.model, density, **facts))
            self.say_case(f"{ranks} GPUs, {method_of(ring, ulysses)}, a step", density, loops["step"])
        return model_row(self.setting.model, self.setting.clip, ring, ulysses, cases)

    def peers(self, peer: str, ring: int, ulysses: int) -> Row:
        """Another implementation."""
        answers = self.on_ranks(ring * ulysses, peer_task, peer, ring, ulysses)
        kernel, absent = answers[0]["kernel"], answers[0]["absent"]
        alone = one_gpu_ms(self.record, kernel, 1.0)
        facts: Row = {"absent": absent, "whole": None, "check": None}
        if absent is None:
            facts["whole"] = over_ranks([one["whole"] for one in answers])
            facts["check"] = [one["check"] for one in answers]
            self.say_case(f"{ring * ulysses} GPUs, {peer}, {method_of(ring, ulysses)}", 1.0, facts["whole"])
        else:
            self.record["absent"][peer] = absent
        return peer_row(self.setting.shape.facts(), peer, kernel, ring, ulysses, alone, **facts)

    def run(self, parts: Sequence[str], model_methods: Sequence[str]) -> None:
        """Measure the parts, one after the other, each with the most GPUs first."""
        several = [ranks for ranks in reversed(self.ranks) if ranks > 1]
        heads = self.setting.shape.heads
        self.block(ONE_GPU, self.one_gpu)
        if LAYER in parts:
            for ranks in several:
                for ring, ulysses in meshes(ranks):
                    chunks = [one for one in self.setting.chunks if one == 1 or (ring == 1 and one <= heads // ulysses)]
                    for one in chunks:
                        self.block(LAYER, self.layer, ring, ulysses, one)
        if BALANCE in parts:
            for ranks in several:
                self.block(BALANCE, self.balance, ranks)
        if MODEL in parts:
            self.block(MODEL, self.model, 1, 1)
            for ranks in several:
                for ring, ulysses in meshes(ranks):
                    if method_of(ring, ulysses) in model_methods:
                        self.block(MODEL, self.model, ring, ulysses)
        if PEERS in parts:
            for ranks in several:
                for ring, ulysses in meshes(ranks):
                    for peer in (TEXTBOOK, YUNCHANG) if ring == 1 else (YUNCHANG,):
                        self.block(PEERS, self.peers, peer, ring, ulysses)

    def close(self) -> None:
        """End the processes."""
        for pool in self.pools.values():
            pool.close()


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 and so on, up to `most`."""
    return [2**power for power in range(most.bit_length())]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of_run(__doc__)
    parser.set_defaults(seconds=0.5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; all if not given")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of GPUs; 1, 2, 4 and so on if not given")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=SIZES, default="720p", help="of all inputs; tiny tries the script")
    methods = [method_of(*mesh) for mesh in meshes(4)]
    parser.add_argument(
        "--model-methods", nargs="+", choices=methods, default=methods[:1], help="of the model; Ulysses if not given"
    )
    parser.add_argument(
        "--timeout", type=float, default=TASK_SECONDS, help="seconds until a block whose processes hang is given up"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, help="seconds after which no further block begins"
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device; --device cpu --sizes tiny tries the script without one")
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 2
    arguments.ranks = arguments.ranks or powers_of_two(gpus)
    most = min(SIZES[arguments.sizes]["shape"].heads, gpus if arguments.device == "cuda" else math.inf)
    if any(not 1 <= ranks <= most or SIZES[arguments.sizes]["shape"].length % ranks for ranks in arguments.ranks):
        parser.error(f"--ranks: {arguments.ranks}, expected numbers from 1 to {most} that divide the tokens")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script; 1 if a block failed."""
    arguments = parse_arguments(argv)
    setting = Setting(device=arguments.device, seconds=arguments.seconds, **SIZES[arguments.sizes])
    benchmark = Benchmark(arguments.output, setting, arguments.ranks, arguments.timeout, arguments.limit)
    try:
        benchmark.run(arguments.parts, arguments.model_methods)
        benchmark.finish()
    finally:
        benchmark.close()
        print(summary(benchmark.record))
        print(f"wrote {benchmark.path}")
    return 1 if benchmark.record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
