"""The attention layers under torch.compile: one graph for all steps, layers, threads and tasks; the results of eager."""

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from lite_attention import LiteAttention, exportable
from lite_attention.layers import (
    AttentionBackendEnum,
    AttentionImpl,
    AttentionMetadata,
    Backend,
    DistributedAttention,
    DistributedAttention_VSA,
    LocalAttention,
    PlainMetadataBuilder,
    get_forward_context,
    register_attention_backend,
    registry,
    set_forward_context,
)
from support.layer_models import HEAD_SIZE, HEADS, STEPS, TOKENS, DiT, Metadata, text, video

TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN = BACKENDS = list(AttentionBackendEnum)[:4]
on_backends = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def denoise(
    backend: AttentionBackendEnum,
    model: DiT,
    compiled: Callable[..., Tensor],
    eager: DiT,
    steps: int = STEPS,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    """Steps with metadata of their own, each compared with eager, the skip state too."""
    metadata = Metadata(backend, device, dtype)
    beside = text().to(device, dtype)
    for step in range(steps):
        x = video(step).to(device, dtype)
        with set_forward_context(step, metadata.of_step(step % STEPS)):
            torch.testing.assert_close(compiled(x, beside), eager(x, beside), atol=tolerance, rtol=tolerance)
        for one, other in zip(model.lite_layers(), eager.lite_layers(), strict=True):
            assert torch.equal(one.keep_map(), other.keep_map())


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kv_heads", [HEADS, 1])
@pytest.mark.parametrize("backend", [TORCH_SDPA, LITE_ATTN], ids=lambda backend: backend.name)
def test_a_layer_alone_takes_lengths_that_vary(
    backend: AttentionBackendEnum, kv_heads: int, dynamic: bool | None
) -> None:
    layer = LocalAttention(HEADS, HEAD_SIZE, kv_heads, supported_attention_backends=(backend,))
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
    for queries, keys in ((100, 105), (100, 100), (1, 7), (64, 1)):
        q, k = torch.randn(1, queries, HEADS, HEAD_SIZE), torch.randn(1, keys, kv_heads, HEAD_SIZE)
        torch.testing.assert_close(compiled(q, k, k), layer(q, k, k), atol=1e-5, rtol=1e-5)
        layer.apply(lambda part: part.reset_skip_state() if isinstance(part, LiteAttention) else None)


@on_backends
def test_one_graph_for_all_steps(backend: AttentionBackendEnum) -> None:
    model, counter = DiT(backend), CompileCounter()
    eager = copy.deepcopy(model)
    denoise(backend, model, torch.compile(model, fullgraph=True, backend=counter), eager)
    assert counter.frame_count == 1
    assert all(float(layer.skip_fraction()) > 0 for layer in model.lite_layers())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[2:], ids=lambda backend: backend.name)
def test_metadata_made_in_inference_mode_serve_outside_of_it(backend: AttentionBackendEnum) -> None:
    model = DiT(backend, blocks=1)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    metadata = Metadata(backend)
    for step in range(STEPS):
        with torch.inference_mode() if step % 2 == 0 else torch.no_grad():
            of_step = metadata.of_step(step)
        with torch.inference_mode() if step >= 2 else torch.no_grad(), set_forward_context(step, of_step):
            torch.testing.assert_close(compiled(video(step), text()), eager(video(step), text()), atol=1e-5, rtol=1e-5)


@on_backends
def test_one_graph_for_all_blocks_compiled_one_by_one(backend: AttentionBackendEnum) -> None:
    model, counter = DiT(backend), CompileCounter()
    eager = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    denoise(backend, model, model, eager, steps=2)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[2:], ids=lambda backend: backend.name)
def test_inductor_gives_the_results_and_the_state_of_eager(backend: AttentionBackendEnum) -> None:
    model = DiT(backend, blocks=1)
    eager = copy.deepcopy(model)
    denoise(backend, model, torch.compile(model, fullgraph=True), eager, tolerance=1e-4)


@pytest.mark.gpu
@on_backends
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_the_gpu(backend: AttentionBackendEnum, mode: str) -> None:
    dtype = torch.bfloat16
    model = DiT(backend, dtype=dtype, blocks=2).to("cuda", dtype)
    eager = copy.deepcopy(model)
    metadata = Metadata(backend, "cuda", dtype)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    torch._dynamo.utils.counters.clear()
    beside = text().to("cuda", dtype)
    for step in range(6):
        x = video(step).to("cuda", dtype)
        with set_forward_context(step, metadata.of_step(step % STEPS)):
            # Fused code rounds otherwise; in bf16 a choice of tiles may turn on that.
            assert float((compiled(x, beside) - eager(x, beside)).abs().mean()) < 2e-2
    skipped = [
        [float(module.skip_fraction()) for module in one.modules() if isinstance(module, LiteAttention)]
        for one in (model, eager)
    ]
    assert skipped[0] == pytest.approx(skipped[1], abs=0.05)
    assert all(fraction > 0 for fraction in skipped[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradients_pass_through_a_compiled_layer() -> None:
    q, k, v = torch.randn(3, 1, 50, HEADS, HEAD_SIZE)
    layer = DistributedAttention(HEADS, HEAD_SIZE)
    found = []
    for attend in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.enable_grad():
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            attend(*inputs)[0].square().sum().backward()
        found.append([x.grad for x in inputs])
    torch.testing.assert_close(found[0], found[1])


def test_another_sparsity_is_another_graph_and_no_more() -> None:
    model, counter = DiT(VIDEO_SPARSE_ATTN, blocks=1), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    metadata = Metadata(VIDEO_SPARSE_ATTN)
    for step, sparsity in enumerate((0.5, 0.5, 0.9, 0.9, 0.5)):
        metadata.arguments["VSA_sparsity"] = sparsity
        with set_forward_context(step, metadata.of_step(step)):
            torch.testing.assert_close(compiled(video(step), text()), model(video(step), text()))
    assert counter.frame_count == 2


def test_a_graph_made_without_a_context_is_not_used_inside_of_one() -> None:
    model, counter = DiT(TORCH_SDPA, blocks=1), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(video(0), text())
    for step in range(3):
        with set_forward_context(step, PlainMetadataBuilder().build(current_timestep=step)):
            compiled(video(0), text())
    compiled(video(0), text())
    assert counter.frame_count == 2


# Metadata of others, read in compiled code by threads and tasks at once.


@dataclass
class ScaledMetadata(AttentionMetadata):
    scale: Tensor


class ScaledImpl(AttentionImpl[ScaledMetadata]):
    """Its result tells which metadata it was given."""

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: ScaledMetadata) -> Tensor:
        return value * attn_metadata.scale


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = LocalAttention(1, 8, supported_attention_backends=("SCALED_TEST_ATTN",))

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x) + get_forward_context().attn_metadata.scale


@pytest.fixture
def scaled() -> tuple[Callable[[], float], CompileCounterWithBackend]:
    """What a compiled model makes of 1: twice the scale of the metadata that it sees."""
    register_attention_backend(Backend("SCALED_TEST_ATTN", ScaledImpl))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Scaled(), fullgraph=True, backend=counter)
    x = torch.ones(1, 2, 1, 8)

    def call() -> float:
        with torch.no_grad():
            return float(compiled(x)[0, 0, 0, 0])

    return call, counter


def step_of(scale: int) -> ScaledMetadata:
    return ScaledMetadata(scale, torch.tensor(float(scale)))


def test_a_compiled_model_reads_the_metadata_of_each_call(scaled: Any) -> None:
    call, counter = scaled
    for step in range(5):
        with set_forward_context(step, step_of(step)):
            assert call() == 2 * step
            with set_forward_context(step, step_of(7)):
                assert call() == 14
            assert call() == 2 * step
    assert counter.frame_count == 1


def test_asyncio_tasks_in_compiled_code_see_their_own_metadata(scaled: Any) -> None:
    call, counter = scaled

    async def task(scale: int) -> list[float]:
        with set_forward_context(scale, step_of(scale)):
            seen = []
            for _ in range(4):
                await asyncio.sleep(0)
                seen.append(call())
            return seen

    async def tasks() -> list[list[float]]:
        return await asyncio.gather(*map(task, range(5)))

    assert asyncio.run(tasks()) == [4 * [2.0 * scale] for scale in range(5)]
    assert counter.frame_count == 1


def test_threads_in_compiled_code_see_their_own_metadata(scaled: Any) -> None:
    call, counter = scaled
    with set_forward_context(0, step_of(50)):
        call()  # compiled before the threads start
        together, seen = threading.Barrier(3), {}

        def in_thread(scale: int) -> None:
            seen[scale] = []
            with set_forward_context(scale, step_of(scale)):
                for _ in range(5):
                    together.wait(30)
                    seen[scale].append(call())

        threads = [threading.Thread(target=in_thread, args=(scale,)) for scale in range(1, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert call() == 100
    assert seen == {scale: 5 * [2.0 * scale] for scale in range(1, 4)}
    assert counter.frame_count == 1


def recorded_by(recorder: str, model: nn.Module, inputs: list[Tensor]) -> Callable[..., Any]:
    if recorder == "make_fx":
        return make_fx(lambda *inputs: model(*inputs))(*inputs)
    if recorder == "torch.jit.trace":
        return torch.jit.trace(lambda *inputs: model(*inputs), tuple(inputs), check_trace=False)
    with exportable(model):
        return torch.export.export(model, tuple(inputs), strict=recorder == "strict").module()


@pytest.mark.parametrize("recorder", ["strict", "torch.export", "make_fx", "torch.jit.trace"])
@pytest.mark.parametrize("backend", [VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN], ids=lambda backend: backend.name)
@pytest.mark.parametrize("layer_class", [DistributedAttention, LocalAttention])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_no_program_keeps_the_metadata_of_one_step(recorder: str, backend: Any, layer_class: Any) -> None:
    tokens = {"text_tokens": 0, "text_length": None} if backend is SLIDING_TILE_ATTN else {}
    layer_class = DistributedAttention_VSA if backend is VIDEO_SPARSE_ATTN else layer_class
    attend = layer_class(HEADS, HEAD_SIZE, supported_attention_backends=(backend,), prefix="blocks.0")
    metadata = Metadata(backend)
    metadata.arguments |= tokens
    inputs = [torch.randn(1, TOKENS, HEADS, HEAD_SIZE) for _ in range(3)]
    said = f"{type(attend).__name__}: {'torch.export' if recorder == 'strict' else recorder} would keep the metadata"
    with set_forward_context(0, metadata.of_step(0)):
        attend(*inputs)
        with pytest.raises(NotImplementedError, match=said):
            recorded_by(recorder, attend, inputs)
        attend(*inputs)


class StepImpl(AttentionImpl[AttentionMetadata]):
    """Of a backend without metadata of its own, which reads the step in those that all have."""

    def __init__(self, num_heads: int, head_size: int, softmax_scale: float, **others: Any) -> None:
        pass

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        return value * attn_metadata.current_timestep


@pytest.mark.parametrize("recorder", ["strict", "torch.export", "make_fx", "torch.jit.trace"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_no_program_keeps_the_step_in_metadata_of_all_backends(recorder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    register_attention_backend(Backend("STEP_TEST_ATTN", StepImpl))
    attend = LocalAttention(HEADS, HEAD_SIZE, supported_attention_backends=("STEP_TEST_ATTN",))
    inputs = [torch.randn(1, 3, HEADS, HEAD_SIZE) for _ in range(3)]
    with set_forward_context(2, AttentionMetadata(2)):
        with pytest.raises(NotImplementedError, match=r"LocalAttention: .* would keep the metadata"):
            recorded_by(recorder, attend, inputs)
        assert torch.equal(attend(*inputs), 2 * inputs[2])


class TellsTheStep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + get_forward_context().current_timestep


@pytest.mark.parametrize("recorder", ["strict", "torch.export", "make_fx", "torch.jit.trace"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_no_program_keeps_the_forward_context_of_one_step(recorder: str) -> None:
    with set_forward_context(3, None), pytest.raises(NotImplementedError, match=r"get_forward_context: .* would keep"):
        recorded_by(recorder, TellsTheStep(), [torch.zeros(2)])


@pytest.mark.parametrize("recorder", ["strict", "torch.export", "make_fx"])
def test_layers_that_read_no_metadata_are_recorded_among_those_that_do(recorder: str) -> None:
    attend = LocalAttention(HEADS, HEAD_SIZE, supported_attention_backends=(TORCH_SDPA,))
    inputs = [torch.randn(1, TOKENS, HEADS, HEAD_SIZE) for _ in range(3)]
    with set_forward_context(0, Metadata(VIDEO_SPARSE_ATTN).of_step(0)):
        program = recorded_by(recorder, attend, inputs)
    torch.testing.assert_close(program(*inputs), attend(*inputs))
