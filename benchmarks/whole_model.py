"""Time of a whole denoising step of Wan 2.1 in diffusers: with cuDNN, with FlashAttention-3 and with ours, on one GPU.

Writes DIR/whole_model_GPU.json (whole_model_h200.json on an H200), anew after every block, so that a run that is
stopped keeps what it measured. A step is one forward pass of WanTransformer3DModel at batch 1 in bf16, with random
weights and random latents of 81 frames. Only self-attention differs; cross-attention is cuDNN's throughout. Keep maps
of known density are imposed, the same on every layer, and read back after each timed loop. Before it is timed, each
step runs on fresh inputs: dense ones are compared with cuDNN's, compiled and captured ones with eager ones, and the
attention of the first and the last layer with an fp64 reference. Times are means of loops of about a second.
About eight minutes on an H200.

Needs diffusers and nvidia-ml-py, and for FlashAttention-3 the wheel fa3-fwd; without it that peer is missing.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lite_attention
import peers
from attention_record import ATTENTION, CUDNN, FA3, SCATTERED, SKIP_ATTENTION, Loop, Row
from attention_stack import AttentionStack
from checks import WrongResultError, check
from keep_maps import keep_map
from lite_attention import LiteAttention
from lite_attention.integrations.diffusers import enable_lite_attention
from lite_attention.skipping.cuda_graphs import capture_step
from run import DTYPE, Run, parse_on_gpu, parse_some, parser_of_run, reason
from sustained import Telemetry, host_microseconds, in_graph, sustained
from timeline import timeline
from wan_step import COMPILE, DEVICE, FIRST_TIMESTEP, SECOND_TIMESTEP, Clip, ModelSize, Step, captured
from whole_model_record import (
    CAPTURED,
    COLUMNS_IN_ALL_MODES,
    COMPILED,
    DENSITIES,
    EAGER,
    HOST_MODEL,
    HOST_MODEL_COMPILED,
    HOST_MODULE,
    HOST_OPERATOR,
    HOST_SDPA,
    MODES,
    overhead_point,
    state_facts,
    step_row,
    summary,
)

LAYERS_14B = 4
SIZES = {
    "1.3B": ModelSize("1.3B", heads=12, ffn_dim=8960, layers=30, whole_layers=30),
    "14B": ModelSize("14B", heads=40, ffn_dim=13824, layers=LAYERS_14B, whole_layers=40),
}
CLIPS = {"480p": Clip("480p", 480, 832), "720p": Clip("720p", 720, 1280)}
SDPA_BACKEND = SDPBackend.CUDNN_ATTENTION
STALE, FRESH = 0, 1
# |out - expected| / |expected| that bf16 rounding alone may cause per layer; it adds up as the root of their number.
# On random weights it is 3e-3, and without a quarter of the keys 1.5e-2.
LARGEST_ERROR_OF_A_LAYER = 6e-3
OVERHEAD_LAYERS = 4
OVERHEAD_DENSITIES = (0.25, 0.1)
OVERHEAD_GOAL = 1.01  # most time / time of the operator alone
HOST_LAYERS, HOST_TOKENS, HOST_HEADS, HOST_HEAD_DIM = 8, 256, 2, 128
HOST_CALLS, HOST_CALLS_IN_FLIGHT = 200, 5


def relative_error(out: Tensor, expected: Tensor) -> float:
    """|out - expected| / |expected|."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def state_bytes(layer: LiteAttention) -> int:
    """Bytes of all that a layer keeps between passes."""
    return sum(buffer.numel() * buffer.element_size() for buffer in layer.state.buffers())


def required_error(name: str, step: Step, out: Tensor, expected: Tensor) -> float:
    """The error of a step's result, if rounding explains it."""
    error = relative_error(out, expected)
    limit = LARGEST_ERROR_OF_A_LAYER * math.sqrt(len(step.model.blocks))
    if not error <= limit:
        raise WrongResultError(f"{name}: error {error}, expected at most {limit}")
    return error


def required_density(layers: Sequence[LiteAttention], keep: Tensor) -> float:
    """The share of tiles that the layers keep, if their maps are what was imposed."""
    for index, layer in enumerate(layers):
        if not torch.equal(layer.keep_map(), keep):
            kept, imposed = (one.double().mean().item() for one in (layer.keep_map(), keep))
            raise WrongResultError(
                f"layer {index} keeps {kept:.2%} of its tiles, or others than the {imposed:.2%} imposed"
            )
    return 1 - layers[0].skip_fraction().item()


def compared_with_reference(
    step: Step, layers: Sequence[LiteAttention], keep: Tensor | None, expected: Tensor | None = None
) -> tuple[Tensor, Row]:
    """An eager step on the fresh inputs, the attention of its first and last layer compared with the reference.

    With `expected`, the step itself as well.
    """
    errors: list[float] = []

    def compare(layer: LiteAttention, arguments: tuple[Any, ...], out: Tensor) -> None:
        q, k, v = arguments[:3]
        tile = lite_attention.tile_shape(q.shape[3], q.dtype)
        errors.append(check(q, k, v, out, None, keep, tile).out_error)

    hooks = [layer.register_forward_hook(compare) for layer in (layers[0], layers[-1])]
    step.load(FRESH)
    out = step.eager()
    for hook in hooks:
        hook.remove()
    facts: Row = {"attention_errors": errors}
    if expected is not None:
        facts["step_error"] = required_error("eager, before timing", step, out, expected)
    return out, facts


def facts_of_timeline(call: Callable[[], object]) -> Row | None:
    """Those of a profiled call, if the profiler may see this GPU."""
    found = timeline(call)
    return None if found is None else found.facts()


def call_in_mode(step: Step, mode: str, layers: Sequence[LiteAttention]) -> Callable[[], Tensor]:
    """The step as a call without arguments."""
    if mode == EAGER:
        return step.eager
    return step.compiled if mode == COMPILED else captured(step, layers)


def chained(layers: Sequence[Callable[..., Any]], x: Tensor) -> Tensor:
    """Self-attention of self-attention."""
    for layer in layers:
        x = layer(x, x, x)
    return x


def operator_alone(layers: int, x: Tensor, packed: Tensor) -> Callable[[], Tensor]:
    """As many calls of the operator as a stack has layers, and its result."""
    never_drop = torch.tensor(-math.inf, device=x.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lite_attention.skip_attention(q, k, v, packed, never_drop)[0]

    return lambda: chained([attend] * layers, x)[:, :1]


@contextlib.contextmanager
def lite_stack(layers: int, x: Tensor) -> Iterator[tuple[AttentionStack, Tensor, list[LiteAttention]]]:
    """A stack with LiteAttention, its layers compiled one by one, in the second step of a generation; its timestep."""
    torch.compiler.reset()
    stack = AttentionStack(layers, DEVICE)
    stack.compile_layers(**COMPILE)
    handle = enable_lite_attention(stack, threshold=-math.inf, guidance="batched")
    timestep = torch.empty(1, dtype=torch.int64, device=DEVICE)
    with torch.compiler.set_stance("force_eager"):
        for value in (FIRST_TIMESTEP, SECOND_TIMESTEP):
            stack(x, timestep.fill_(value))
    yield stack, timestep, [layer for layer in handle.layers.values() if isinstance(layer, LiteAttention)]


class Benchmark(Run):
    """The parts of the benchmark."""

    def __init__(self, output: Path, seconds: float, modes: Sequence[str]) -> None:
        super().__init__("whole_model", output, seconds, Telemetry())
        self.modes = modes
        self.record |= {"diffusers": metadata.version("diffusers"), "modes": list(modes)}
        try:
            peers.flash_attention_3()
        except (ImportError, OSError) as error:
            self.record["absent"][FA3] = reason(error)

    def loop(self, call: Callable[[], object], **facts: Any) -> Loop:
        """One timed loop, with facts about it."""
        loop = sustained(call, self.seconds, self.telemetry)
        named = "  ".join(f"{fact}" if isinstance(fact, str) else f"{fact:.3g}" for fact in facts.values())
        self.say(f"  {named:<60}{loop.ms:10.3f} ms  {loop.sm_clock_mhz} MHz  {loop.power_watts} W")
        return {**facts, **loop.facts()}

    def steps(self, size: ModelSize, clip: Clip) -> Row:
        """Every kernel, in the modes of its column."""
        step = Step(size, clip)
        absent, checks = {}, []
        with sdpa_kernel(SDPA_BACKEND):
            step.load(FRESH)
            stock = step.eager()
            loops = self.in_modes(step, CUDNN, 1.0, stock)
            with step.without_layers():
                outside = self.loop(captured(step, []), kernel="no layers", mode=CAPTURED)
            if FA3 not in self.record["absent"]:
                try:
                    with step.flash_attention_3():
                        loops += self.in_modes(step, FA3, 1.0, stock)
                except Exception as error:
                    absent[FA3] = reason(error)
                    self.say(f"  without {FA3}: {absent[FA3]}")
            with step.lite_attention() as layers:
                state = state_facts(size.heads, clip.tokens, state_bytes(layers[0]))
                for layer in layers:
                    layer.enable_skip_optimization(False)
                checks.append({"map": "none", **compared_with_reference(step, layers, None, stock)[1]})
                loops += self.in_modes(step, ATTENTION, 1.0, stock, layers)
            with step.lite_attention() as layers:
                full = layers[0].keep_map()
                checks.append({"map": "full", **compared_with_reference(step, layers, full, stock)[1]})
                for density in DENSITIES:
                    keep = keep_map(SCATTERED, density, 1, size.heads, clip.tokens, size.head_dim, DTYPE, DEVICE)
                    for layer in layers:
                        layer.set_keep_map(keep)
                    eager, facts = compared_with_reference(step, layers, keep)
                    checks.append({"map": f"{density:.0%}", **facts})
                    loops += self.in_modes(step, SKIP_ATTENTION, density, eager, layers, keep)
        return step_row(
            size.facts(), clip.facts(), outside, loops, pattern=SCATTERED, state=state, checks=checks, absent=absent
        )

    def in_modes(
        self,
        step: Step,
        kernel: str,
        density: float,
        expected: Tensor,
        layers: Sequence[LiteAttention] = (),
        keep: Tensor | None = None,
    ) -> list[Loop]:
        """The step in every mode of its column: checked, then timed. `keep` is the map that the layers have."""
        loops = []
        for mode in self.modes if (kernel, density) in COLUMNS_IN_ALL_MODES else self.modes[-1:]:
            started = time.perf_counter()
            call = call_in_mode(step, mode, layers)
            step.load(STALE)
            call().fill_(math.nan)
            step.load(FRESH)
            error = required_error(f"{kernel} at {density:.0%}, {mode}", step, call(), expected)
            preparation = time.perf_counter() - started
            loop = self.loop(
                call, kernel=kernel, mode=mode, density=density, error=error, preparation_seconds=preparation
            )
            if keep is not None:
                loop["tiles_kept"] = required_density(layers, keep)
            if layers and mode == CAPTURED:
                loop["timeline"] = facts_of_timeline(call)
            loops.append(loop)
        return loops

    def overhead(self, size: ModelSize, clip: Clip) -> Row:
        """Layers of nothing but attention in a captured model against the operator alone, captured."""
        x = torch.randn(1, clip.tokens, size.heads, size.head_dim, device=DEVICE).to(DTYPE)
        points = []
        with lite_stack(OVERHEAD_LAYERS, x) as (stack, timestep, layers):
            stack(x, timestep)
            replay = capture_step(stack, (x, timestep), warmup_calls=1)
            for density in OVERHEAD_DENSITIES:
                keep = keep_map(SCATTERED, density, 1, size.heads, clip.tokens, size.head_dim, DTYPE, DEVICE)
                for layer in layers:
                    layer.set_keep_map(keep)
                alone = operator_alone(OVERHEAD_LAYERS, x, lite_attention.pack_keep_map(keep))
                alone()
                calls: dict[str, Callable[[], Tensor]] = {
                    HOST_OPERATOR: in_graph(alone),
                    HOST_MODEL: lambda: replay(x, timestep),
                }
                if not torch.equal(calls[HOST_MODEL](), calls[HOST_OPERATOR]()):
                    raise WrongResultError(f"overhead at {density:.0%}: the model's result is not the operator's")
                loops = [self.loop(calls[name], kernel=name, density=density) for name in [*calls, *calls]]
                required_density(layers, keep)
                points.append(overhead_point(density, OVERHEAD_GOAL, loops, facts_of_timeline(calls[HOST_MODEL])))
        return {"model": size.facts(), "clip": clip.facts(), "layers": OVERHEAD_LAYERS, "points": points}

    def host(self) -> Row:
        """Time until the calls of one layer return, on a tiny shape."""
        x = torch.randn(1, HOST_TOKENS, HOST_HEADS, HOST_HEAD_DIM, device=DEVICE).to(DTYPE)
        packed = lite_attention.full_keep_map(1, HOST_HEADS, HOST_TOKENS, HOST_TOKENS, HOST_HEAD_DIM, DTYPE, DEVICE)
        modules = [LiteAttention(threshold=-math.inf).to(DEVICE) for _ in range(HOST_LAYERS)]
        plain = AttentionStack(HOST_LAYERS, DEVICE)
        microseconds = {}

        def measure(name: str, call: Callable[[], object]) -> None:
            host_microseconds(call, HOST_CALLS_IN_FLIGHT, HOST_CALLS_IN_FLIGHT)
            microseconds[name] = host_microseconds(call, HOST_CALLS, HOST_CALLS_IN_FLIGHT) / HOST_LAYERS
            self.say(f"  {name}: {microseconds[name]:.1f} us a layer")

        with lite_stack(HOST_LAYERS, x) as (stack, timestep, _):
            measure(HOST_SDPA, lambda: plain(x, timestep))
            measure(HOST_OPERATOR, operator_alone(HOST_LAYERS, x, packed))
            measure(HOST_MODULE, lambda: chained(modules, x))
            with torch.compiler.set_stance("force_eager"):
                measure(HOST_MODEL, lambda: stack(x, timestep))
            measure(HOST_MODEL_COMPILED, lambda: stack(x, timestep))
        return {"shape": list(x.shape), "layers": HOST_LAYERS, "microseconds": microseconds}

    def run(self, sizes: Sequence[ModelSize], clips: Sequence[Clip]) -> None:
        """Measure everything, the short parts first."""
        self.block("host", self.host)
        for size in sizes:
            for clip in clips:
                self.block("overhead", self.overhead, size, clip)
        for size in sizes:
            for clip in clips:
                self.block("steps", self.steps, size, clip)


def main() -> int:
    """Entry point of the script; 1 if a block failed."""
    parser = parser_of_run(__doc__)
    for option, names, what in (
        ("--models", SIZES, "configurations"),
        ("--resolutions", CLIPS, "sizes of the video"),
        ("--modes", MODES, "how a step runs; most densities run in the last of these alone"),
    ):
        every = ",".join(names)
        parser.add_argument(option, type=parse_some(list(names)), default=list(names), help=f"{what}, some of {every}")
    parser.add_argument("--layers-14b", type=int, default=LAYERS_14B, help="layers of the 14B model that are run")
    arguments = parse_on_gpu(parser)
    sizes = {**SIZES, "14B": replace(SIZES["14B"], layers=arguments.layers_14b)}
    benchmark = Benchmark(arguments.output, arguments.seconds, arguments.modes)
    with torch.no_grad():
        benchmark.run([sizes[name] for name in arguments.models], [CLIPS[name] for name in arguments.resolutions])
    benchmark.finish()
    print(summary(benchmark.record))
    print(f"wrote {benchmark.path}")
    return 1 if benchmark.record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
