"""The attention layers on several ranks compute what one rank does, keep its state, compile, and pass gradients on."""

import copy
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh

from lite_attention.layers import (
    AttentionBackendEnum,
    DistributedAttention,
    DistributedAttention_VSA,
    get_sequence_parallel_mesh,
    register_attention_backend,
    sequence_parallel_mesh,
    set_forward_context,
    set_sequence_parallel_mesh,
)
from lite_attention.layers.registry import _backends
from lite_attention.parallel.mesh import SequenceMesh, sequence_mesh
from lite_attention.parallel.shards import gather_sequence, shard_sequence
from support.inputs import Case, correlated_passes, report
from support.layer_models import (
    HEADS,
    STEPS,
    TEXT,
    TOKENS,
    DiT,
    LinearBackend,
    Metadata,
    dense,
    rotary_embedding,
    text,
    turned,
    video,
)
from support.ranks import mesh_of, run_on_ranks

TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN = list(AttentionBackendEnum)[:4]
HEAD_SIZE = 32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
on_ranks = pytest.mark.parametrize("ranks", [2, 4])

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def ulysses(device: str, ranks: int) -> SequenceMesh:
    return sequence_mesh(mesh_of(device, 1, ranks), "test")


def normal(seed: int, batch: int, tokens: int, *heads: int, device: str = "cpu") -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, tokens, count, HEAD_SIZE, generator=random) for count in heads]
    return [x.to(device, DTYPES[device]) for x in made]


def attend_on_ranks(
    device: str, ranks: int, backend: AttentionBackendEnum, batch: int, kv_heads: int, tokens: int, text_tokens: int
) -> tuple[Tensor, Tensor | None]:
    mesh = ulysses(device, ranks)
    whole = normal(0, batch, tokens, 8, kv_heads, kv_heads, device=device)
    beside = normal(1, batch, text_tokens, 8, kv_heads, kv_heads, device=device) if text_tokens else 3 * [None]
    layer = DistributedAttention(
        8,
        HEAD_SIZE,
        kv_heads,
        supported_attention_backends=(backend,),
        mesh=mesh_of(device, 1, ranks),
        dtype=DTYPES[device],
    )
    freqs_cis = tuple(x.to(device) for x in rotary_embedding(tokens))
    with torch.no_grad():
        out, text_out = layer(*(shard_sequence(x, mesh) for x in whole), tokens, *beside, freqs_cis)
        assert not gather_sequence(out, mesh)[:, tokens:].any()
        return gather_sequence(out, mesh, tokens).cpu(), None if text_out is None else text_out.cpu()


@on_devices
@on_ranks
@pytest.mark.parametrize("backend", [TORCH_SDPA, LITE_ATTN])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "tokens", "text_tokens"), [(1, 8, 200, 0), (1, 4, 201, 30), (2, 8, 202, 17), (2, 4, 203, 0)]
)
def test_ranks_together_attend_as_one(
    device: str,
    ranks: int,
    backend: AttentionBackendEnum,
    batch: int,
    kv_heads: int,
    tokens: int,
    text_tokens: int,
) -> None:
    results = run_on_ranks(ranks, device, attend_on_ranks, device, ranks, backend, batch, kv_heads, tokens, text_tokens)
    q, k, v = normal(0, batch, tokens, 8, kv_heads, kv_heads, device=device)
    freqs_cis = rotary_embedding(tokens)
    q, k, v = turned(q.cpu(), freqs_cis), turned(k.cpu(), freqs_cis), v.cpu().double()
    if text_tokens:
        beside = normal(1, batch, text_tokens, 8, kv_heads, kv_heads, device=device)
        q, k, v = (torch.cat([x, y.cpu().double()], 1) for x, y in zip((q, k, v), beside, strict=True))
    expected = dense(q, k, v)
    tolerance = {"cpu": 1e-5, "cuda": 2e-2}[device]
    for out, text_out in results:
        torch.testing.assert_close(out.double(), expected[:, :tokens], atol=tolerance, rtol=0)
        if text_tokens:
            torch.testing.assert_close(text_out.double(), expected[:, tokens:], atol=tolerance, rtol=0)
        else:
            assert text_out is None


def skip_on_ranks(device: str, ranks: int, thresholds: list[float]) -> tuple[list[Tensor], Tensor]:
    """Outs of all steps, and the map of all heads."""
    mesh = ulysses(device, ranks)
    with sequence_parallel_mesh(mesh_of(device, 1, ranks)):
        layer = DistributedAttention(
            HEADS,
            HEAD_SIZE,
            supported_attention_backends=(LITE_ATTN,),
            dtype=DTYPES[device],
            threshold=thresholds,
        )
    outs = []
    case = Case(query_len=450, kv_len=450, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_SIZE)
    with torch.no_grad():
        for step, qkv in enumerate(correlated_passes(case, DTYPES[device], passes=4)):
            shards = [shard_sequence(x.to(device), mesh) for x in qkv]
            beside = [0.01 * x for x in normal(step, 1, 60, HEADS, HEADS, HEADS, device=device)]
            out, text_out = layer(*shards, 450, *beside)
            outs += [gather_sequence(out, mesh, 450).cpu(), text_out.cpu()]
    keep = layer.attn_impl.attention.keep_map()
    everyone = gather_sequence(keep.to(torch.int32), mesh, dim=1)
    return outs, everyone.cpu()


@on_devices
@on_ranks
def test_the_skip_state_of_ranks_is_that_of_one(device: str, ranks: int) -> None:
    thresholds = [-0.05, -30.0, -8.0, -2.0]
    (outs, keep), *_ = run_on_ranks(1, device, skip_on_ranks, device, 1, thresholds)
    skipped = 1 - keep.float().mean((0, 2, 3))
    assert len(set(skipped.tolist())) == HEADS, "each head skips as much as its threshold says"
    for others, other_keep in run_on_ranks(ranks, device, skip_on_ranks, device, ranks, thresholds):
        assert torch.equal(other_keep, keep)
        assert all(torch.equal(x, y) for x, y in zip(others, outs, strict=True))


def denoise_on_ranks(
    device: str, ranks: int, backend: AttentionBackendEnum, compiler: str | None = None
) -> dict[str, Any]:
    """Four steps of the model; with a compiler, beside an eager copy."""
    torch._dynamo.reset()
    mesh = ulysses(device, ranks)
    dtype = DTYPES[device]
    model = DiT(backend, mesh_of(device, 1, ranks), blocks=2, dtype=dtype).to(device, dtype)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(compiler) if compiler else None
    compiled = torch.compile(model, fullgraph=True, backend=counter) if counter else model
    metadata = Metadata(backend, device, dtype)
    outs, difference = [], 0.0
    with torch.no_grad():
        for step in range(STEPS):
            shard, beside = shard_sequence(video(step, 2), mesh).to(device, dtype), text(2).to(device, dtype)
            with set_forward_context(step, metadata.of_step(step)):
                out = compiled(shard, beside)
                if counter:
                    difference = max(difference, float((out - eager(shard, beside)).abs().max()))
            outs.append(gather_sequence(out, mesh, TOKENS).cpu())
    states = list(zip(model.lite_layers(), eager.lite_layers(), strict=True))
    return {
        "outs": outs,
        "difference": difference,
        "graphs": counter.frame_count if counter else 0,
        "skipped": sum(float(one.skip_fraction()) for one, _ in states),
        "same state": not counter or all(torch.equal(one.keep_map(), other.keep_map()) for one, other in states),
    }


BACKENDS = [TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN]
on_backends = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


def same_video(one: list[Tensor], other: list[Tensor], device: str) -> bool:
    """The linear layers round otherwise for shards of another length; in bf16 a choice of tiles may turn on that."""
    differences = torch.stack([(x - y).abs() for x, y in zip(one, other, strict=True)])
    return float(differences.max()) <= 1e-4 if device == "cpu" else float(differences.mean()) <= 2e-2


@pytest.mark.slow
@on_devices
@on_backends
def test_a_model_on_ranks_gives_the_video_of_one_eager_and_compiled(device: str, backend: AttentionBackendEnum) -> None:
    alone, *_ = run_on_ranks(1, device, denoise_on_ranks, device, 1, backend)
    for result in run_on_ranks(4, device, denoise_on_ranks, device, 4, backend):
        assert same_video(result["outs"], alone["outs"], device)
    for result in run_on_ranks(2, device, denoise_on_ranks, device, 2, backend, "aot_eager"):
        assert same_video(result["outs"], alone["outs"], device)
        assert result["graphs"] == 1
        assert result["difference"] <= {"cpu": 1e-5, "cuda": 5e-2}[device]
        assert result["same state"]
        assert result["skipped"] > 0 or backend is not LITE_ATTN


def one_layer(device: str, ranks: int, backend: AttentionBackendEnum) -> Tensor:
    mesh = ulysses(device, ranks)
    layer_class = DistributedAttention_VSA if backend is VIDEO_SPARSE_ATTN else DistributedAttention
    layer = layer_class(
        HEADS,
        HEAD_SIZE,
        supported_attention_backends=(backend,),
        prefix="blocks.1.attn",
        mesh=mesh_of(device, 1, ranks),
        dtype=DTYPES[device],
    ).to(device)
    shards = [shard_sequence(x, mesh) for x in normal(0, 2, TOKENS, *4 * (HEADS,), device=device)]
    metadata = Metadata(backend, device, DTYPES[device])
    outs = []
    with torch.no_grad():
        for step in range(2):
            with set_forward_context(step, metadata.of_step(step)):
                if backend is VIDEO_SPARSE_ATTN:
                    out, _ = layer(*shards[:3], TOKENS, gate_compress=shards[3])
                else:
                    out, text_out = layer(*shards[:3], TOKENS, *normal(1, 2, TEXT, *3 * (HEADS,), device=device))
                    outs.append(text_out.cpu())
            outs.append(gather_sequence(out, mesh, TOKENS).cpu())
    return torch.cat(outs, 1)


@on_devices
@on_ranks
@pytest.mark.parametrize("backend", [VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN], ids=lambda backend: backend.name)
def test_each_rank_takes_its_heads_to_the_bit(device: str, ranks: int, backend: AttentionBackendEnum) -> None:
    alone, *_ = run_on_ranks(1, device, one_layer, device, 1, backend)
    for out in run_on_ranks(ranks, device, one_layer, device, ranks, backend):
        assert torch.equal(out, alone)


def gradients(device: str, ranks: int, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of q, k and v, whole, and of the text's, summed over the ranks."""
    mesh = ulysses(device, ranks)
    whole, beside = normal(0, 2, tokens, 8, 4, 4), normal(1, 2, TEXT, 8, 4, 4)
    weight, text_weight = normal(2, 2, tokens, 8)[0], normal(3, 2, TEXT, 8)[0]
    shards = [shard_sequence(x.to(device), mesh).requires_grad_() for x in whole]
    beside = [x.to(device).requires_grad_() for x in beside]
    layer = DistributedAttention(8, HEAD_SIZE, 4, mesh=mesh_of(device, 1, ranks))
    freqs_cis = tuple(x.to(device) for x in rotary_embedding(tokens))
    out, text_out = layer(*shards, tokens, *beside, freqs_cis)
    loss = (out * shard_sequence(weight.to(device), mesh)).sum()
    # Every rank has the text's result; the loss counts it once.
    loss = loss + (text_out * text_weight.to(device)).sum() * float(mesh.shard == 0)
    loss.backward()
    text_gradients = [gather_sequence(x.grad[None], mesh, dim=0).sum(0).cpu() for x in beside]
    return [gather_sequence(x.grad, mesh, tokens).cpu() for x in shards], text_gradients


@on_devices
@on_ranks
def test_gradients_pass_through_the_ranks(device: str, ranks: int) -> None:
    tokens = 91
    q, k, v, text_q, text_k, text_v = inputs = [
        x.double().requires_grad_() for x in normal(0, 2, tokens, 8, 4, 4) + normal(1, 2, TEXT, 8, 4, 4)
    ]
    weight = torch.cat([normal(2, 2, tokens, 8)[0], normal(3, 2, TEXT, 8)[0]], 1)
    freqs_cis = rotary_embedding(tokens)
    q, k = turned(q, freqs_cis), turned(k, freqs_cis)
    out = dense(*(torch.cat(pair, 1) for pair in ((q, text_q), (k, text_k), (v, text_v))))
    (out * weight).sum().backward()
    for found, text_found in run_on_ranks(ranks, device, gradients, device, ranks, tokens):
        for gradient, expected in zip(found + text_found, inputs, strict=True):
            torch.testing.assert_close(gradient.double(), expected.grad, atol=1e-4, rtol=0)


def registered_on_ranks(ranks: int) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """A backend of others that is told its heads."""
    told = []

    class Impl(LinearBackend.get_impl_cls()):
        def set_local_heads(self, first: int, count: int) -> None:
            told.append((first, count))

    class Backend(LinearBackend):
        @staticmethod
        def get_impl_cls() -> Any:
            return Impl

    mesh = ulysses("cpu", ranks)
    register_attention_backend("LINEAR_TEST_ATTN", Backend)
    try:
        layer = DistributedAttention(
            HEADS, HEAD_SIZE, supported_attention_backends=("LINEAR_TEST_ATTN",), mesh=mesh_of("cpu", 1, ranks)
        )
    finally:
        del _backends["LINEAR_TEST_ATTN"]
    shards = [shard_sequence(x, mesh) for x in normal(0, 1, 51, HEADS, HEADS, HEADS)]
    with torch.no_grad(), set_forward_context(0, Backend.get_builder_cls()().build(current_timestep=0, strength=0.5)):
        out, text_out = layer(*shards, 51, *normal(1, 1, 7, HEADS, HEADS, HEADS))
    return gather_sequence(out, mesh, 51), text_out, told[0] if told else None


def test_a_registered_backend_runs_on_ranks_and_is_told_its_heads() -> None:
    ((out, text_out, told),) = run_on_ranks(1, "cpu", registered_on_ranks, 1)
    assert told is None
    results = run_on_ranks(2, "cpu", registered_on_ranks, 2)
    assert [result[2] for result in results] == [(0, 2), (2, 2)]
    for other_out, other_text_out, _ in results:
        torch.testing.assert_close(other_out, out)
        torch.testing.assert_close(other_text_out, text_out)


def refusals() -> str:
    mesh = mesh_of("cpu", 1, 2)
    narrow = DistributedAttention(HEADS, HEAD_SIZE, mesh=mesh)
    x = torch.zeros(1, 10, HEADS, HEAD_SIZE)
    ring = mesh_of("cpu", 2, 1)
    calls = {
        "a ring": lambda: DistributedAttention(HEADS, HEAD_SIZE, mesh=ring),
        "a ring that was set": lambda: set_sequence_parallel_mesh(ring),
        "a mesh of other names": lambda: set_sequence_parallel_mesh(
            init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        ),
        "heads that do not divide": lambda: DistributedAttention(3, HEAD_SIZE, mesh=mesh),
        "KV heads that do not divide": lambda: DistributedAttention(HEADS, HEAD_SIZE, 1, mesh=mesh),
        "more tokens than the ranks hold": lambda: narrow(x, x, x, 21),
    }
    assert get_sequence_parallel_mesh() is None
    return report(calls)


def test_what_ranks_cannot_share_is_refused() -> None:
    first, second = run_on_ranks(2, "cpu", refusals)
    assert first == second
    assert_expected_inline(
        first,
        """\
a ring -> ValueError: DistributedAttention: mesh has 2 ranks along 'ring', expected 1, as the layers exchange heads ('ulysses'). DistributedLiteAttention attends in a ring too
a ring that was set -> ValueError: set_sequence_parallel_mesh: mesh has 2 ranks along 'ring', expected 1, as the layers exchange heads ('ulysses'). DistributedLiteAttention attends in a ring too
a mesh of other names -> ValueError: set_sequence_parallel_mesh: mesh has dimensions named 'dp', expected 'ring', 'ulysses' or both. Of a larger mesh, pass mesh['ring', 'ulysses']
heads that do not divide -> ValueError: DistributedAttention: num_heads is 3, expected a multiple of the 2 ranks that share the heads
KV heads that do not divide -> ValueError: DistributedAttention: num_kv_heads is 1, expected a multiple of the 2 ranks that share the heads
more tokens than the ranks hold -> ValueError: DistributedAttention: original_seq_len is 21, expected 1 to 20, the tokens of all shards""",
    )


def meshes_in_turn() -> list[int]:
    """Sizes of the groups that layers get which are not given a mesh."""
    mesh = mesh_of("cpu", 1, 2)

    def size(**arguments: Any) -> int:
        return DistributedAttention(HEADS, HEAD_SIZE, **arguments)._turns.group.size

    sizes = [size(), size(mesh=mesh)]
    set_sequence_parallel_mesh(mesh)
    sizes.append(size())
    with sequence_parallel_mesh(None):
        sizes += [size(), size(mesh=mesh)]
    sizes.append(size())
    set_sequence_parallel_mesh(None)
    return [*sizes, size()]


def test_a_layer_gets_the_mesh_that_was_set_when_it_was_made() -> None:
    assert run_on_ranks(2, "cpu", meshes_in_turn) == 2 * [[1, 2, 2, 1, 2, 2, 1]]
