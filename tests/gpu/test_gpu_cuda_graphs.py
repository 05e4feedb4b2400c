"""Whole denoising steps in CUDA graphs, by hand and by torch.compile: the bits of eager, state included."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lite_attention import LiteAttention, skip_branch
from lite_attention.ops.own_state import state_buffers
from lite_attention.skipping.cuda_graphs import CapturedStep, capture_step
from support.inputs import GPU
from support.stack import HEADS, LENGTH, THRESHOLD, Stack, stack_latents, time

pytestmark = pytest.mark.gpu

STEPS, GENERATIONS, BRANCHES = 20, 2, 2
HIGHER_THRESHOLD = -3.0
MUST_DO_TILE, MUST_DO = 3, [384, 512]  # the tile that these keys fill
ALLOCATION = 512  # bytes, to whose multiples torch rounds

Pair = tuple[Tensor, Tensor]


@dataclass
class Subject:
    """A model whose step is captured."""

    model: nn.Module
    layers: list[LiteAttention]
    latents: Callable[[int, int], Tensor]
    """Inputs of a generation and step."""
    predict: Callable[[nn.Module, Tensor, Tensor, int], Tensor]
    """The model, or a compiled one, on latents, timestep and guidance branch."""
    set_must_do: Callable[[list[int]], object]

    def step(self, latents: Tensor, timestep: Tensor) -> Pair:
        """Both guidance branches."""
        return self.predict(self.model, latents, timestep, 0), self.predict(self.model, latents, timestep, 1)

    def capture(self) -> CapturedStep[Pair]:
        return capture_step(self.step, (self.latents(9, 9), time(0, 0)), modules=self.model)

    def skipped(self) -> float:
        return max(float(layer.skip_fraction(branch)) for layer in self.layers for branch in range(BRANCHES))


def stack() -> Subject:
    model = Stack().to(GPU)

    def predict(model: nn.Module, latents: Tensor, timestep: Tensor, branch: int) -> Tensor:
        with skip_branch(branch):
            out: Tensor = model(latents + branch, timestep)
        return out

    return Subject(
        model,
        list(model.layers),
        stack_latents,
        predict,
        lambda ranges: model.must_do.copy_(torch.tensor([ranges])),
    )


def wan() -> Subject:
    video_models = pytest.importorskip("support.video_models", reason="needs diffusers")
    from lite_attention.integrations.diffusers import enable_lite_attention

    case = video_models.CASES["wan"]
    transformer = video_models.make_transformer(case).to(GPU, torch.bfloat16)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD, must_do=[0, 1])

    def latents(generation: int, step: int) -> Tensor:
        return video_models.make_latents(case, step, seed=generation).to(GPU, torch.bfloat16)

    def predict(model: nn.Module, latents: Tensor, timestep: Tensor, branch: int) -> Tensor:
        inputs = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text * (1 - branch)}
        with transformer.cache_context(("cond", "uncond")[branch]):
            out: Tensor = model(**inputs, return_dict=False)[0]
        return out

    text = torch.randn(1, video_models.TEXT_LEN, video_models.TEXT_DIM).to(GPU, torch.bfloat16)
    return Subject(transformer, list(handle.layers.values()), latents, predict, handle.set_must_do)


subjects = pytest.mark.parametrize("make", [stack, wan])


def steps() -> Iterator[tuple[int, int]]:
    return ((generation, step) for generation in range(GENERATIONS) for step in range(STEPS))


def change_settings(subject: Subject, generation: int, step: int) -> None:
    """What users do between steps: thresholds, ranges that must be computed, resets."""
    for layer in subject.layers:
        match generation, step:
            case 0, 5:
                layer.set_threshold(HIGHER_THRESHOLD)
            case 0, 12:
                layer.reset_skip_state()
            case 1, 3:
                layer.reset_skip_state(branch=1)
            case 1, 7:
                layer.set_threshold(-float("inf"))
    if step == 9:
        subject.set_must_do([64, 300] if generation else MUST_DO)


def assert_equal(one: Tensor, other: Tensor, name: str) -> None:
    """Bit by bit; NaN, which stands for steps that did not run, is equal to itself."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_same_state(one: Subject, other: Subject) -> None:
    for layer, same in zip(one.layers, other.layers, strict=True):
        for branch in range(BRANCHES):
            assert torch.equal(layer.keep_map(branch), same.keep_map(branch))
    others = state_buffers(other.model)
    for name, buffer in state_buffers(one.model).items():
        # The maps above; capturing makes room for others before they are written. Each clock numbers generations anew.
        if not name.endswith((".words", "generation", "generations")):
            assert_equal(buffer, others[name], name)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


@subjects
def test_a_captured_step_equals_eager_over_two_generations(make: Callable[[], Subject]) -> None:
    subject, eager = make(), make()
    captured = subject.capture()
    skipped = 0.0
    for generation, step in steps():
        for one in (subject, eager):
            change_settings(one, generation, step)
        inputs = subject.latents(generation, step), time(generation, step)
        for out, expected in zip(captured(*inputs), eager.step(*inputs), strict=True):
            assert torch.equal(out, expected)
        assert_same_state(subject, eager)
        skipped = max(skipped, subject.skipped())
    assert skipped > 0.02, "the inputs are meant to drop something"


@subjects
def test_a_captured_step_goes_on_where_eager_stopped(make: Callable[[], Subject]) -> None:
    """And eager goes on where the captured step stopped: they share one state."""
    subject, eager = make(), make()
    for step in range(6):
        if step == 3:
            captured = subject.capture()
        run = captured if step in (3, 5) else subject.step
        inputs = subject.latents(0, step), time(0, step)
        for out, expected in zip(run(*inputs), eager.step(*inputs), strict=True):
            assert torch.equal(out, expected)
        assert_same_state(subject, eager)
    assert subject.skipped() > 0.02


@subjects
def test_reduce_overhead_equals_the_same_code_without_graphs(make: Callable[[], Subject]) -> None:
    """Which for the stack is eager, and for a whole transformer what torch.compile makes of it without CUDA graphs."""
    subject, plain = make(), make()
    model = torch.compile(subject.model, fullgraph=True, mode="reduce-overhead")
    plain_model = plain.model if make is stack else torch.compile(plain.model, fullgraph=True)
    skipped = 0.0
    for generation, step in steps():
        for one in (subject, plain):
            change_settings(one, generation, step)
        inputs = subject.latents(generation, step), time(generation, step)
        for branch in range(BRANCHES):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(subject.predict(model, *inputs, branch), plain.predict(plain_model, *inputs, branch))
        assert_same_state(subject, plain)
        skipped = max(skipped, subject.skipped())
    assert skipped > 0.02
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"], "the graphs are meant to be captured"


def test_a_compiled_step_can_be_captured() -> None:
    subject, eager = stack(), stack()
    model = torch.compile(subject.model, fullgraph=True)
    captured = capture_step(
        lambda *inputs: [subject.predict(model, *inputs, branch) for branch in range(BRANCHES)],
        (subject.latents(9, 9), time(0, 0)),
        modules=subject.model,
    )
    for step in range(6):
        inputs = subject.latents(0, step), time(0, step)
        for out, expected in zip(captured(*inputs), eager.step(*inputs), strict=True):
            assert torch.equal(out, expected)
        assert_same_state(subject, eager)
    assert subject.skipped() > 0.02


def test_thresholds_ranges_maps_resets_and_time_act_on_the_next_replay() -> None:
    subject = stack()
    captured = subject.capture()
    layer = subject.layers[0]

    def kept_after(step: int, generation: int = 0) -> Tensor:
        captured(subject.latents(0, step), time(generation, step))
        return layer.keep_map()

    subject.set_must_do([0, 0])
    for step in range(3):
        few = kept_after(step)
    assert not few[..., MUST_DO_TILE].all(), "else the ranges have nothing to bring back"

    layer.reset_skip_state()
    subject.set_must_do(MUST_DO)
    assert kept_after(3)[..., MUST_DO_TILE].all()

    layer.set_threshold(-float("inf"))
    chosen = few.clone()
    chosen[..., MUST_DO_TILE] = True
    layer.set_keep_map(chosen)
    assert torch.equal(kept_after(4), chosen)
    layer.set_threshold(HIGHER_THRESHOLD)
    assert kept_after(5).sum() < chosen.sum()
    layer.set_threshold(-float("inf"))
    assert not kept_after(6).all()
    assert kept_after(0, generation=1).all()
    layer.set_keep_map(few)
    layer.reset_skip_state()
    assert kept_after(1, generation=1).all()


@subjects
@pytest.mark.parametrize("passes_before", [0, 2])
def test_warming_up_leaves_the_state_as_it_was(passes_before: int, make: Callable[[], Subject]) -> None:
    subject = make()
    for step in range(passes_before):
        subject.step(subject.latents(0, step), time(0, step))
    before = {name: buffer.cpu() for name, buffer in state_buffers(subject.model).items()}
    subject.capture()
    for name, buffer in state_buffers(subject.model).items():  # on the GPU by now
        if buffer.shape == before[name].shape:
            assert_equal(buffer.cpu(), before[name], name)
    assert (subject.skipped() > 0) == (passes_before > 0)
    if passes_before == 0:
        with pytest.raises(RuntimeError, match="branch 0 has no keep map yet"):
            subject.layers[0].keep_map()


def test_steps_of_two_shapes_share_a_pool_in_any_order() -> None:
    subject, eager = stack(), stack()
    long = subject.capture()
    short = capture_step(subject.step, (stack_latents(9, 9, 700), time(0, 0)), modules=subject.model, pool=long.pool)
    assert short.pool == long.pool
    kept = []
    for step, (length, captured) in enumerate(2 * [(LENGTH, long), (700, short), (700, short), (LENGTH, long)]):
        inputs = stack_latents(0, step, length), time(0, step)
        kept.append((captured(*inputs), eager.step(*inputs)))
        assert_same_state(subject, eager)
    # Compared at the end: no later replay has written what an earlier one returned.
    for results, expected in kept:
        assert all(map(torch.equal, results, expected))


def bytes_in(pool: tuple[int, int]) -> int:
    """What is allocated in a pool."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["allocated_size"] for segment in segments if tuple(segment["segment_pool_id"]) == pool)


def rounded_bytes(*tensors: Tensor) -> int:
    return sum(-(-tensor.nbytes // ALLOCATION) * ALLOCATION for tensor in tensors)


@subjects
def test_a_capture_takes_its_inputs_and_its_pool_and_gives_both_back(make: Callable[[], Subject]) -> None:
    # The random generator of torch notes its seed and offset for graphs.
    slack = 4 * ALLOCATION
    subject = make()
    inputs = subject.latents(0, 0), time(0, 0)
    # State, and what cuBLAS keeps for each stream, are there from here on.
    subject.step(*inputs)
    subject.capture()
    gc.collect()

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    captured = subject.capture()
    in_pool = bytes_in(captured.pool)
    taken = torch.cuda.memory_allocated() - before
    assert in_pool > 0
    assert abs(taken - in_pool - rounded_bytes(*inputs)) <= slack

    with_graph = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outs = captured(*inputs)
    assert torch.cuda.memory_allocated() - with_graph == rounded_bytes(*outs)
    assert torch.cuda.max_memory_allocated() - with_graph == rounded_bytes(*outs), "replaying needs nothing else"

    pool = captured.pool
    del outs, captured
    gc.collect()
    torch.cuda.empty_cache()
    assert abs(torch.cuda.memory_allocated() - before) <= slack
    assert bytes_in(pool) == 0


def test_neither_capturing_nor_replaying_inside_another_capture() -> None:
    subject = stack()
    captured = subject.capture()
    inputs = subject.latents(0, 0), time(0, 0)
    expected = captured(*inputs)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(RuntimeError, match="CapturedStep: the current stream is being captured already"):
            captured(*inputs)
        with pytest.raises(RuntimeError, match="capture_step: the current stream is being captured already"):
            capture_step(subject.step, inputs, modules=subject.model)
        torch.zeros(1, device=GPU).add_(1)  # torch warns of a graph without a node
    subject.model.clock.reset()
    assert all(map(torch.equal, captured(*inputs), expected))


def test_a_refused_call_changes_nothing() -> None:
    subject, eager = stack(), stack()
    captured = subject.capture()
    inputs = subject.latents(0, 0), time(0, 0)
    refused: dict[str, tuple[Tensor, ...]] = {
        r"args\[0\] is \[1, 700, 4, 64\]": (stack_latents(0, 0, 700), inputs[1]),
        r"args\[0\] is .* of torch.float16": (inputs[0].half(), inputs[1]),
        r"args\[1\] is .* on cpu": (inputs[0], inputs[1].cpu()),
        r"args\[1\] is missing": inputs[:1],
    }
    for text, arguments in refused.items():
        with pytest.raises(ValueError, match=text):
            captured(*arguments)
    assert all(map(torch.equal, captured(*inputs), eager.step(*inputs)))
    assert_same_state(subject, eager)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.enable_skip_optimization(False),
        lambda layer: layer.set_threshold([-1.0] * HEADS),
        lambda layer: layer.cpu(),
    ],
    ids=["skipping off", "threshold per head", "state moved"],
)
def test_a_changed_layout_is_refused_until_captured_again(change: Callable[[LiteAttention], object]) -> None:
    subject = stack()
    captured = subject.capture()
    inputs = subject.latents(0, 0), time(0, 0)
    captured(*inputs)
    change(subject.layers[1])
    with pytest.raises(RuntimeError, match=r"Stack.layers.1 has layout version"):
        captured(*inputs)
    subject.model.clock.reset()
    out = subject.capture()(*inputs)
    eager = stack()
    change(eager.layers[1])
    assert all(map(torch.equal, out, eager.step(*inputs)))


def test_inputs_must_be_on_the_gpu() -> None:
    subject = stack()
    with pytest.raises(ValueError, match="capture_step: the inputs are on cpu, expected a CUDA device"):
        capture_step(subject.step, (subject.latents(0, 0).cpu(), time(0, 0).cpu()), modules=subject.model)


def test_a_step_may_run_on_another_device_than_the_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, to make current the one that holds no tensor")
    subject, eager = stack(), stack()
    inputs = subject.latents(0, 0), time(0, 0)
    with torch.cuda.device(1):
        captured = subject.capture()
        out = captured(*inputs)
        assert torch.cuda.current_device() == 1
    torch.cuda.synchronize(GPU)
    assert all(map(torch.equal, out, eager.step(*inputs)))
