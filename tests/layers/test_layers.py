"""The attention layers on one rank: what they compute, which backend they get, and what they refuse."""

import asyncio
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lite_attention import LiteAttention, sliding_tile_attention, video_sparse_attn
from lite_attention.layers import (
    AttentionBackendEnum,
    AttentionMetadata,
    DistributedAttention,
    DistributedAttention_VSA,
    LocalAttention,
    PlainMetadataBuilder,
    distributed,
    get_forward_context,
    set_forward_context,
    set_sequence_parallel_mesh,
)
from lite_attention.maps.video_tiles import VideoTiles, pad_tiles, tile_tokens, unpad_tiles, untile_tokens
from support.inputs import Case, correlated_passes, report
from support.layer_models import (
    GRID,
    HEAD_SIZE,
    HEADS,
    TEXT,
    TOKENS,
    Metadata,
    dense,
    layer,
    qkv,
    rotary_embedding,
    turned,
    windows,
)

TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN = list(AttentionBackendEnum)[:4]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("backend", [TORCH_SDPA, LITE_ATTN])
@pytest.mark.parametrize(("batch", "kv_heads"), [(1, HEADS), (2, 2), (1, 1)])
def test_local_attention_is_attention(backend: AttentionBackendEnum, batch: int, kv_heads: int) -> None:
    q, k, v = qkv(60, batch, kv_heads, kv_tokens=90)
    attend = layer(LocalAttention, backend, num_kv_heads=kv_heads)
    torch.testing.assert_close(attend(q, k, v).double(), dense(q, k, v), atol=1e-5, rtol=0)
    scaled = layer(LocalAttention, backend, num_kv_heads=kv_heads, softmax_scale=0.5)
    torch.testing.assert_close(scaled(q, k, v).double(), dense(q, k, v, 0.5), atol=1e-5, rtol=0)


def test_local_attention_may_be_causal() -> None:
    q, k, v = qkv(50, kv_heads=2)
    attend = layer(LocalAttention, TORCH_SDPA, num_kv_heads=2, causal=True)
    torch.testing.assert_close(attend(q, k, v).double(), dense(q, k, v, causal=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rotary_embedding_turns_neighbouring_pairs_and_leaves_its_inputs_alone(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(60))
    before = [x.clone() for x in (q, k, v)]
    freqs_cis = rotary_embedding(60)
    out = layer(LocalAttention, TORCH_SDPA, dtype=dtype)(q, k, v, freqs_cis)
    assert out.dtype == dtype
    expected = dense(turned(q, freqs_cis), turned(k, freqs_cis), v)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("backend", [TORCH_SDPA, LITE_ATTN])
@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("text_tokens", [0, 20])
def test_distributed_attention_on_one_rank(backend: AttentionBackendEnum, padding: int, text_tokens: int) -> None:
    shards = qkv(100 + padding, batch=2, kv_heads=2)
    text = qkv(text_tokens, batch=2, kv_heads=2, seed=1) if text_tokens else (None, None, None)
    freqs_cis = rotary_embedding(100)
    attend = layer(DistributedAttention, backend, num_kv_heads=2)
    out, text_out = attend(*shards, 100, *text, freqs_cis)
    q, k, v = (x[:, :100] for x in shards)
    q, k = turned(q, freqs_cis), turned(k, freqs_cis)
    if text_tokens:
        q, k, v = (torch.cat([x.double(), y.double()], 1) for x, y in zip((q, k, v), text, strict=True))
        expected = dense(q, k, v)
        torch.testing.assert_close(text_out.double(), expected[:, 100:], atol=1e-5, rtol=0)
    else:
        expected = dense(q, k, v)
        assert text_out is None
    torch.testing.assert_close(out[:, :100].double(), expected[:, :100], atol=1e-5, rtol=0)
    assert out.shape == shards[0].shape
    assert not out[:, 100:].any()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize("grid", [GRID, (4, 8, 8)])
def test_video_sparse_attention_equals_the_call(
    batch: int, with_gate: bool, grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = VideoTiles(grid, (4, 4, 4))
    q, k, v = qkv(tiles.tokens + 2, batch, kv_heads=2)
    gate = torch.randn(q.shape) if with_gate else None
    metadata = Metadata(VIDEO_SPARSE_ATTN)
    metadata.arguments["raw_latent_shape"] = torch.Size((grid[0], 2 * grid[1], 2 * grid[2] + 1))
    attend = layer(DistributedAttention_VSA, VIDEO_SPARSE_ATTN, num_kv_heads=2)
    with set_forward_context(0, metadata.of_step(0)):
        out, text_out = attend(q, k, v, tiles.tokens, gate_compress=gate)
    assert text_out is None

    def blocks(x: Tensor) -> Tensor:
        return pad_tiles(tile_tokens(x[:, : tiles.tokens], tiles, 1), tiles, 64, 1).transpose(1, 2)

    expected = video_sparse_attn(
        *map(blocks, (q, k, v)),
        tiles.sizes(q.device),
        -(-tiles.number // 2),
        compress_attn_weight=None if gate is None else blocks(gate),
    )
    expected = untile_tokens(unpad_tiles(expected.transpose(1, 2), tiles, 64, 1), tiles, 1)
    assert torch.equal(out[:, : tiles.tokens], expected)
    assert not out[:, tiles.tokens :].any()


@pytest.mark.parametrize("text_tokens", [0, TEXT])
@pytest.mark.parametrize(("canvas", "tile"), [(GRID, (2, 3, 4)), ((4, 8, 8), (4, 4, 4))])
def test_sliding_tile_attention_equals_the_call(
    text_tokens: int, canvas: tuple[int, int, int], tile: tuple[int, int, int]
) -> None:
    tiles = VideoTiles(canvas, tile)
    batch, padding = 2, 3
    shards = qkv(tiles.tokens + padding, batch, kv_heads=2)
    text = qkv(text_tokens, batch, kv_heads=2, seed=1) if text_tokens else (None, None, None)
    lengths = torch.tensor([text_tokens, 5], dtype=torch.int32) if text_tokens else None
    metadata = Metadata(SLIDING_TILE_ATTN)
    metadata.arguments |= {"canvas": canvas, "tile": tile, "text_tokens": text_tokens, "text_length": lengths}
    for index in range(3):
        attend = layer(DistributedAttention, SLIDING_TILE_ATTN, num_kv_heads=2, prefix=f"model.blocks.{index}.attn")
        for step in range(2):
            with set_forward_context(step, metadata.of_step(step)):
                out, text_out = attend(*shards, tiles.tokens, *text)
            in_order = [tile_tokens(x[:, : tiles.tokens], tiles, 1) for x in shards]
            if text_tokens:
                in_order = [torch.cat([x, y], 1) for x, y in zip(in_order, text, strict=True)]
            expected = sliding_tile_attention(
                *(x.transpose(1, 2) for x in in_order),
                windows()[step][index],
                0 if lengths is None else lengths,
                text_tokens > 0,
                canvas,
                tile=tile,
            ).transpose(1, 2)
            assert torch.equal(out[:, : tiles.tokens], untile_tokens(expected[:, : tiles.tokens], tiles, 1))
            assert not out[:, tiles.tokens :].any()
            if text_out is not None:
                assert torch.equal(text_out, expected[:, tiles.tokens :])


def test_a_text_length_that_is_a_number_holds_for_the_batch() -> None:
    shards, text = qkv(batch=2), qkv(TEXT, batch=2, seed=1)
    attend = layer(DistributedAttention, SLIDING_TILE_ATTN)
    metadata = Metadata(SLIDING_TILE_ATTN)
    outs = []
    for length in (7, torch.tensor([7, 7], dtype=torch.int32), TEXT, None):
        metadata.arguments["text_length"] = length
        with set_forward_context(0, metadata.of_step(0)):
            outs.append(attend(*shards, None, *text)[0])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[2], outs[3])
    assert not torch.equal(outs[0], outs[2])


def test_text_lengths_of_another_batch_are_refused_by_name() -> None:
    attend = layer(DistributedAttention, SLIDING_TILE_ATTN)
    metadata = Metadata(SLIDING_TILE_ATTN)
    metadata.arguments["text_length"] = torch.tensor([3, 4], dtype=torch.int32)
    with (
        set_forward_context(0, metadata.of_step(0)),
        pytest.raises(ValueError, match=r"text_length has shape \[2\], expected \[3\], one a batch entry"),
    ):
        attend(*qkv(batch=3), None, *qkv(TEXT, batch=3, seed=1))


def test_lite_attention_skips_video_and_never_text() -> None:
    attend = layer(DistributedAttention, LITE_ATTN, threshold=-0.01)
    state = attend.attn_impl.attention
    assert isinstance(state, LiteAttention)
    assert state in set(attend.modules())
    video_tokens, text_tokens = 512, 100
    case = Case(query_len=video_tokens, kv_len=video_tokens, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_SIZE)
    for step, shards in enumerate(correlated_passes(case, torch.float32, passes=3)):
        # Left alone, keys this small and queries this alike would skip and be skipped.
        _, text_k, text_v = (0.01 * x for x in qkv(text_tokens, seed=step))
        attend(*shards, None, shards[0][:, :1].repeat(1, text_tokens, 1, 1), text_k, text_v)
    keep = state.keep_map()
    tile_m, tile_n = state.tile_shape()
    first_row, first_column = video_tokens // tile_m, video_tokens // tile_n
    assert float(keep[:, :, :first_row, :first_column].float().mean()) < 0.8
    assert bool(keep[..., first_column:].all()), "keys of the text"
    assert bool(keep[:, :, first_row:].all()), "queries of the text"


def test_another_share_of_text_starts_over() -> None:
    case = Case(query_len=640, kv_len=640, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_SIZE)
    used, fresh = (layer(DistributedAttention, LITE_ATTN, threshold=-0.01) for _ in range(2))

    def attend(which: DistributedAttention, tokens: tuple[Tensor, ...], video: int) -> tuple[Tensor, Tensor | None]:
        text = (x[:, video:] if video < 640 else None for x in tokens)
        return which(*(x[:, :video] for x in tokens), None, *text)

    first, second, third = correlated_passes(case, torch.float32, passes=3)
    attend(used, first, 576)
    assert float(used.attn_impl.attention.skip_fraction()) > 0
    for tokens, video in ((second, 512), (third, 640)):
        for mine, expected in zip(attend(used, tokens, video), attend(fresh, tokens, video), strict=True):
            assert mine is expected or torch.equal(mine, expected), "the map was of other text"
        fresh = layer(DistributedAttention, LITE_ATTN, threshold=-0.01)


def test_a_call_that_fails_after_the_attention_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(query_len=512, kv_len=512, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_SIZE)
    attend = layer(DistributedAttention, LITE_ATTN, threshold=-0.01)
    (tokens,) = correlated_passes(case, torch.float32, passes=1)
    with monkeypatch.context() as patched:
        patched.setattr(distributed.F, "pad", mock.Mock(side_effect=torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError):
            attend(*tokens, 500)
    assert attend.attn_impl.attention.used_branches() == []
    attend(*tokens, 500)
    assert float(attend.attn_impl.attention.skip_fraction()) > 0


def test_no_text_is_as_text_of_no_tokens() -> None:
    q, k, v = qkv(300)
    attend = layer(DistributedAttention, LITE_ATTN)
    with torch.no_grad():
        alone, none = attend(q, k, v)
        out, text_out = attend(q, k, v, None, *(x[:, :0] for x in qkv(TEXT)))
    assert none is None
    assert torch.equal(out, alone)
    assert text_out.shape == (q.shape[0], 0, HEADS, HEAD_SIZE)


def test_a_layer_made_in_inference_mode_moves_outside_of_it() -> None:
    with torch.inference_mode():
        made = layer(DistributedAttention, SLIDING_TILE_ATTN)
    assert made.float().attn_impl._layer.number.tolist() == [1]


def test_the_number_of_a_sliding_layer_survives_moves() -> None:
    with torch.device("meta"):
        attend = layer(DistributedAttention, SLIDING_TILE_ATTN, prefix="blocks.2")
    attend.to_empty(device="cpu").to(torch.bfloat16)
    assert attend.attn_impl._layer.number.tolist() == [2]
    assert attend.attn_impl._layer.number.dtype == torch.int64
    assert copy.deepcopy(attend).attn_impl._layer.number.tolist() == [2]
    assert attend.state_dict() == {}


def test_sliding_metadata_of_a_video_share_their_maps_until_something_changes() -> None:
    metadata = Metadata(SLIDING_TILE_ATTN)
    first, second = metadata.of_step(0), metadata.of_step(1)
    assert first.windows is second.windows
    assert first.window_of_head.shape == second.window_of_head.shape
    assert not torch.equal(first.window_of_head, second.window_of_head)
    metadata.arguments["STA_param"] = [[HEADS * [(1, 1, 1)]]]
    assert metadata.of_step(0).windows.shape[0] == 1
    metadata.arguments["text_tokens"] += 1
    assert metadata.of_step(0).layout.text_tokens == TEXT + 1


def test_metadata_as_a_dict_without_copies() -> None:
    metadata = Metadata(VIDEO_SPARSE_ATTN).of_step(3)
    fields = metadata.asdict_zerocopy({"topk", "slots"})
    assert fields.keys() == {"current_timestep", "VSA_sparsity", "slot_of_token", "variable_block_sizes"}
    assert fields["current_timestep"] == 3
    assert fields["slot_of_token"] is metadata.slot_of_token


@pytest.mark.parametrize("replaced", [True, False])
def test_another_sparsity_of_metadata_is_another_count_of_blocks(replaced: bool) -> None:
    q, k, v = qkv()
    attend, made = layer(DistributedAttention_VSA, VIDEO_SPARSE_ATTN), Metadata(VIDEO_SPARSE_ATTN)
    metadata = made.of_step(0)
    made.arguments["VSA_sparsity"] = 0.9
    expected = made.of_step(0)
    if replaced:
        metadata = dataclasses.replace(metadata, VSA_sparsity=0.9)
    else:
        metadata.VSA_sparsity = 0.9
    assert metadata.topk == expected.topk
    with set_forward_context(0, metadata):
        out, _ = attend(q, k, v)
    with set_forward_context(0, expected):
        assert torch.equal(out, attend(q, k, v)[0])
    with pytest.raises(ValueError, match=r"sparsity is 2"):
        metadata.VSA_sparsity = 2
    assert metadata.VSA_sparsity == 0.9


# The forward context.


def timestep() -> object:
    return get_forward_context().current_timestep


def test_the_innermost_forward_context_counts() -> None:
    metadata = AttentionMetadata(1)
    with set_forward_context(1, metadata, "batch"):
        with set_forward_context(2, None):
            assert (timestep(), get_forward_context().attn_metadata) == (2, None)
        assert get_forward_context().attn_metadata is metadata
        assert (timestep(), get_forward_context().forward_batch) == (1, "batch")
        with pytest.raises(KeyError), set_forward_context(3, None):
            raise KeyError
        assert timestep() == 1
    with pytest.raises(RuntimeError, match="expected a call inside set_forward_context"):
        get_forward_context()


def test_threads_and_tasks_have_forward_contexts_of_their_own() -> None:
    ready = threading.Barrier(3)
    seen: dict[int, list[object]] = {}

    def in_thread(step: int) -> None:
        seen[step] = []
        with pytest.raises(RuntimeError, match="no forward context"):
            get_forward_context()
        with set_forward_context(step, None):
            for _ in range(5):
                ready.wait(10)
                seen[step].append(timestep())

    async def task(step: int) -> list[object]:
        with set_forward_context(step, None):
            steps = []
            for _ in range(5):
                await asyncio.sleep(0)
                steps.append(timestep())
            return steps

    async def tasks() -> list[list[object]]:
        return await asyncio.gather(*map(task, range(4)))

    with set_forward_context(-1, None):
        threads = [threading.Thread(target=in_thread, args=(step,)) for step in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert asyncio.run(tasks()) == [5 * [step] for step in range(4)]
        assert timestep() == -1
    assert seen == {step: 5 * [step] for step in range(3)}


# What is refused.


def with_metadata(
    metadata: AttentionMetadata | None, attend: Any, *arguments: Any, **named: Any
) -> Callable[[], object]:
    def call() -> object:
        with set_forward_context(0, metadata):
            return attend(*arguments, **named)

    return call


def test_errors_of_the_layers_name_the_argument() -> None:
    q, k, v = qkv(60)
    text = qkv(TEXT, seed=1)
    local, whole = layer(LocalAttention, TORCH_SDPA), layer(DistributedAttention, TORCH_SDPA)
    sparse = DistributedAttention_VSA(HEADS, HEAD_SIZE)
    cos, sin = rotary_embedding(60)
    calls = {
        "heads that do not share evenly": lambda: LocalAttention(HEADS, HEAD_SIZE, 3),
        "no KV head": lambda: LocalAttention(HEADS, HEAD_SIZE, 0),
        "an unknown argument": lambda: layer(LocalAttention, LITE_ATTN, treshold=-3.0),
        "a threshold above 0": lambda: layer(LocalAttention, LITE_ATTN, threshold=1.0),
        "causal skipping": lambda: layer(LocalAttention, LITE_ATTN, causal=True),
        "causal blocks": lambda: layer(DistributedAttention_VSA, VIDEO_SPARSE_ATTN, causal=True),
        "causal windows": lambda: layer(DistributedAttention, SLIDING_TILE_ATTN, causal=True),
        "a layer without a number": lambda: layer(DistributedAttention, SLIDING_TILE_ATTN, prefix="double_blocks.1"),
        "a gated backend without a gate": lambda: layer(DistributedAttention, VIDEO_SPARSE_ATTN),
        "a gated backend on this rank's tokens": lambda: layer(LocalAttention, VIDEO_SPARSE_ATTN),
        "a gate for a backend without": lambda: layer(DistributedAttention_VSA, LITE_ATTN),
        "a mesh of something else": lambda: DistributedAttention(HEADS, HEAD_SIZE, mesh=2),
        "a mesh set to something else": lambda: set_sequence_parallel_mesh("cuda"),
        "q of rank 3": lambda: local(q[0], k, v),
        "q of other heads": lambda: local(q[:, :, :2], k, v),
        "k of another head size": lambda: local(q, k[..., :16], v),
        "v shorter than k": lambda: local(q, k, v[:, :50]),
        "k of another batch": lambda: local(q, *(x.expand(2, -1, -1, -1) for x in (k, v))),
        "q of another dtype": lambda: local(q.bfloat16(), k, v),
        "an embedding of other tokens": lambda: local(q, k[:, :50], v[:, :50], (cos, sin)),
        "an embedding of whole heads": lambda: local(q, k, v, (cos.repeat(1, 2), sin)),
        "more keys than queries": lambda: whole(q[:, :50], k, v),
        "more tokens than there are": lambda: whole(q, k, v, 61),
        "no token": lambda: whole(q, k, v, 0),
        "an embedding of the padding": lambda: whole(q, k, v, 50, freqs_cis=(cos, sin)),
        "text without keys": lambda: whole(q, k, v, None, text[0]),
        "text of another batch": lambda: whole(q, k, v, None, *(x.expand(2, -1, -1, -1) for x in text)),
        "text with fewer queries": lambda: whole(q, k, v, None, text[0][:, 1:], *text[1:]),
        "text of another dtype": lambda: whole(q, k, v, None, *(x.half() for x in text)),
        "text beside VSA": lambda: sparse(q, k, v, 60, *text),
        "VSA's q of other heads": lambda: sparse(q[:, :, :2], k, v, 60),
        "VSA's k of another dtype": lambda: sparse(q, k.half(), v, 60),
        "a gate of another shape": lambda: sparse(q, k, v, 60, gate_compress=q[:, :50]),
        "a gate of other heads": lambda: sparse(q, k, v, 60, gate_compress=q[:, :, :2]),
        "metadata of another type": with_metadata(7, local, q, k, v),
        "no head": lambda: LocalAttention(0, HEAD_SIZE),
        "no head size": lambda: LocalAttention(HEADS, 0),
        "supported backends in a text": lambda: LocalAttention(
            HEADS, HEAD_SIZE, supported_attention_backends="TORCH_SDPA"
        ),
        "thresholds of other heads": lambda: layer(LocalAttention, LITE_ATTN, threshold=[-3.0] * 3),
        "a negative layer": lambda: layer(DistributedAttention, SLIDING_TILE_ATTN, layer_index=-1),
        "q is a list": lambda: local([q], k, v),
        "half a token": lambda: whole(q, k, v, 59.5),
        "one tensor for an embedding": lambda: local(q, k, v, (cos,)),
        "a complex embedding": lambda: local(q, k, v, (torch.complex(cos, sin), sin)),
    }
    assert_expected_inline(
        report(calls),
        """\
heads that do not share evenly -> ValueError: LocalAttention: num_heads is 4, expected a multiple of num_kv_heads, 3
no KV head -> ValueError: LocalAttention: num_kv_heads is 0, expected at least 1
an unknown argument -> TypeError: LocalAttention: got the argument 'treshold', expected one that a backend takes: enable_skipping, max_batch_size, policy, threshold (LITE_ATTN); layer_index (SLIDING_TILE_ATTN)
a threshold above 0 -> ValueError: LITE_ATTN: threshold is 1.0, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
causal skipping -> ValueError: LITE_ATTN: causal is True, expected False: it has no causal mask
causal blocks -> ValueError: VIDEO_SPARSE_ATTN: causal is True, expected False: it has no causal mask
causal windows -> ValueError: SLIDING_TILE_ATTN: causal is True, expected False: it has no causal mask
a layer without a number -> ValueError: SLIDING_TILE_ATTN: prefix is 'double_blocks.1.impl', expected 'blocks.<n>' in it, or the argument layer_index
a gated backend without a gate -> ValueError: DistributedAttention: the backend is VIDEO_SPARSE_ATTN, expected one without gate_compress: DistributedAttention_VSA is its layer
a gated backend on this rank's tokens -> ValueError: LocalAttention: the backend is VIDEO_SPARSE_ATTN, expected one without gate_compress: DistributedAttention_VSA is its layer
a gate for a backend without -> ValueError: DistributedAttention_VSA: the backend is LITE_ATTN, expected one that takes gate_compress, as VIDEO_SPARSE_ATTN does
a mesh of something else -> TypeError: DistributedAttention: mesh has type int, expected a DeviceMesh
a mesh set to something else -> TypeError: set_sequence_parallel_mesh: mesh has type str, expected a DeviceMesh
q of rank 3 -> ValueError: LocalAttention: q has shape [60, 4, 32], expected [B, S, 4, 32]
q of other heads -> ValueError: LocalAttention: q has shape [1, 60, 2, 32], expected [B, S, 4, 32]
k of another head size -> ValueError: LocalAttention: k has shape [1, 60, 4, 16], expected [B, S, 4, 32]
v shorter than k -> ValueError: LocalAttention: v has shape [1, 50, 4, 32], expected [1, 60, 4, 32] like k
k of another batch -> ValueError: LocalAttention: k has batch size 2, expected 1 like q
q of another dtype -> TypeError: LocalAttention: q has dtype torch.bfloat16, expected torch.float32
an embedding of other tokens -> ValueError: LocalAttention: cos of freqs_cis has shape [60, 16], expected [50, 16], one row a token
an embedding of whole heads -> ValueError: LocalAttention: cos of freqs_cis has shape [60, 32], expected [60, 16], one row a token
more keys than queries -> ValueError: DistributedAttention: k has 60 tokens, expected 50 like q: self-attention
more tokens than there are -> ValueError: DistributedAttention: original_seq_len is 61, expected 1 to 60, the tokens of all shards
no token -> ValueError: DistributedAttention: original_seq_len is 0, expected 1 to 60, the tokens of all shards
an embedding of the padding -> ValueError: DistributedAttention: cos of freqs_cis has shape [60, 16], expected [50, 16], one row a token
text without keys -> ValueError: DistributedAttention: replicated_k and replicated_v is None, expected all of replicated_q, replicated_k and replicated_v, or none
text of another batch -> ValueError: DistributedAttention: replicated_q has batch size 2, expected 1 like q
text with fewer queries -> ValueError: DistributedAttention: replicated_q has 19 tokens, expected 20 like replicated_k
text of another dtype -> TypeError: DistributedAttention: replicated_q has dtype torch.float16, expected torch.float32
text beside VSA -> ValueError: DistributedAttention_VSA: replicated_q has shape [1, 20, 4, 32], expected None: there is no text beside the video
VSA's q of other heads -> ValueError: DistributedAttention_VSA: q has shape [1, 60, 2, 32], expected [B, S, 4, 32]
VSA's k of another dtype -> TypeError: DistributedAttention_VSA: k has dtype torch.float16, expected torch.float32
a gate of another shape -> ValueError: DistributedAttention_VSA: gate_compress has shape [1, 50, 4, 32], expected [1, 60, 4, 32] like q
a gate of other heads -> ValueError: DistributedAttention_VSA: gate_compress has shape [1, 60, 2, 32], expected [B, S, 4, 32]
metadata of another type -> TypeError: set_forward_context: attn_metadata is of type int, expected AttentionMetadata or None
no head -> ValueError: LocalAttention: num_heads is 0, expected at least 1
no head size -> ValueError: LocalAttention: head_size is 0, expected at least 1
supported backends in a text -> TypeError: get_attn_backend: supported_attention_backends is a str, expected a tuple of names, or None for any
thresholds of other heads -> ValueError: LITE_ATTN: threshold has 3 values, expected 4, one per head
a negative layer -> ValueError: SLIDING_TILE_ATTN: layer_index is -1, expected an int of at least 0
q is a list -> TypeError: LocalAttention: q has type list, expected a tensor
half a token -> TypeError: DistributedAttention: original_seq_len has type float, expected an int
one tensor for an embedding -> TypeError: LocalAttention: freqs_cis is no pair of tensors, expected (cos, sin)
a complex embedding -> TypeError: LocalAttention: cos of freqs_cis is no real tensor, expected one of shape [60, 16]""",
    )


def test_errors_about_metadata_say_what_does_not_fit() -> None:
    q, k, v = qkv()
    text = qkv(TEXT, seed=1)
    sparse, sliding = DistributedAttention_VSA(HEADS, HEAD_SIZE), layer(DistributedAttention, SLIDING_TILE_ATTN)
    fourth = layer(DistributedAttention, SLIDING_TILE_ATTN, prefix="blocks.3")
    half = DistributedAttention(2, HEAD_SIZE, supported_attention_backends=(SLIDING_TILE_ATTN,), layer_index=0)
    blocks, of_windows = Metadata(VIDEO_SPARSE_ATTN), Metadata(SLIDING_TILE_ATTN)

    def changed(metadata: Metadata, step: int = 0, **changes: object) -> Callable[[], object]:
        def call() -> object:
            other = Metadata(VIDEO_SPARSE_ATTN)
            other.builder, other.arguments = metadata.builder, metadata.arguments | changes
            return other.of_step(step)

        return call

    ragged = windows()
    ragged[1][2].pop()
    calls = {
        "blocks without a context": lambda: sparse(q, k, v, TOKENS),
        "blocks without metadata": with_metadata(None, sparse, q, k, v),
        "blocks with metadata of windows": with_metadata(of_windows.of_step(0), sparse, q, k, v),
        "windows with metadata of blocks": with_metadata(blocks.of_step(0), sliding, q, k, v),
        "windows with plain metadata": with_metadata(
            PlainMetadataBuilder().build(current_timestep=0), sliding, q, k, v
        ),
        "blocks of other tokens": with_metadata(blocks.of_step(0), sparse, *(x[:, 1:] for x in (q, k, v))),
        "windows without their text": with_metadata(of_windows.of_step(0), sliding, q, k, v),
        "windows over text": with_metadata(of_windows.of_step(0), sliding, *qkv(TOKENS + TEXT)),
        "windows of more text": with_metadata(
            of_windows.of_step(0), sliding, *qkv(TOKENS - 5), None, *qkv(TEXT + 5, seed=1)
        ),
        "windows of less text": with_metadata(
            of_windows.of_step(0), sliding, *qkv(TOKENS + 5), None, *qkv(TEXT - 5, seed=1)
        ),
        "windows of one call": with_metadata(
            of_windows.of_step(0), layer(LocalAttention, SLIDING_TILE_ATTN, prefix="blocks.0"), *qkv(TOKENS)
        ),
        "windows of fewer layers": with_metadata(of_windows.of_step(0), fourth, q, k, v, None, *text),
        "windows of more heads": with_metadata(
            of_windows.of_step(0), half, *(x[:, :, :2] for x in (q, k, v)), None, *(x[:, :, :2] for x in text)
        ),
        "latents of two sizes": changed(blocks, raw_latent_shape=(3, 4)),
        "a patch of size 0": changed(blocks, patch_size=(0, 2, 2)),
        "latents smaller than a patch": changed(blocks, raw_latent_shape=(3, 1, 4)),
        "sparsity 1.5": changed(blocks, VSA_sparsity=1.5),
        "a step past the last": changed(of_windows, 4),
        "a step before the first": changed(of_windows, -1),
        "no windows": changed(of_windows, STA_param=[]),
        "a window of two sizes": changed(of_windows, STA_param=[[HEADS * [(1, 1)]]]),
        "a layer with fewer heads": changed(of_windows, STA_param=ragged),
        "a canvas in words": changed(of_windows, canvas="5x6x9"),
        "more text than there is": changed(of_windows, text_length=TEXT + 1),
    }
    assert_expected_inline(
        report(calls),
        """\
blocks without a context -> TypeError: VIDEO_SPARSE_ATTN: attn_metadata of the forward context is of type NoneType, expected VideoSparseAttentionMetadata: call the model inside set_forward_context(current_timestep, attn_metadata)
blocks without metadata -> TypeError: VIDEO_SPARSE_ATTN: attn_metadata of the forward context is of type NoneType, expected VideoSparseAttentionMetadata: call the model inside set_forward_context(current_timestep, attn_metadata)
blocks with metadata of windows -> TypeError: VIDEO_SPARSE_ATTN: attn_metadata of the forward context is of type SlidingTileAttentionMetadata, expected VideoSparseAttentionMetadata: call the model inside set_forward_context(current_timestep, attn_metadata)
windows with metadata of blocks -> TypeError: SLIDING_TILE_ATTN: attn_metadata of the forward context is of type VideoSparseAttentionMetadata, expected SlidingTileAttentionMetadata: call the model inside set_forward_context(current_timestep, attn_metadata)
windows with plain metadata -> TypeError: SLIDING_TILE_ATTN: attn_metadata of the forward context is of type AttentionMetadata, expected SlidingTileAttentionMetadata: call the model inside set_forward_context(current_timestep, attn_metadata)
blocks of other tokens -> ValueError: VIDEO_SPARSE_ATTN: q, k and v have 314 tokens, expected 315, those of the video in attn_metadata. Give the layer original_seq_len where some are padding
windows without their text -> ValueError: SLIDING_TILE_ATTN: q has 315 tokens of video and 0 of text, expected 315, the canvas, and 20. Give the layer original_seq_len where some are padding
windows over text -> ValueError: SLIDING_TILE_ATTN: q has 335 tokens of video and 0 of text, expected 315, the canvas, and 20. Give the layer original_seq_len where some are padding
windows of more text -> ValueError: SLIDING_TILE_ATTN: q has 310 tokens of video and 25 of text, expected 315, the canvas, and 20. Give the layer original_seq_len where some are padding
windows of less text -> ValueError: SLIDING_TILE_ATTN: q has 320 tokens of video and 15 of text, expected 315, the canvas, and 20. Give the layer original_seq_len where some are padding
windows of one call -> ValueError: SLIDING_TILE_ATTN: q has 315 tokens, expected 335: 315 of the canvas and 20 of text. Give the layer original_seq_len where some are padding
windows of fewer layers -> ValueError: SLIDING_TILE_ATTN: STA_param has 3 layers, expected one of index 3, that of the layer
windows of more heads -> ValueError: SLIDING_TILE_ATTN: STA_param has 4 heads, expected 2, those of the layer
latents of two sizes -> ValueError: VIDEO_SPARSE_ATTN: raw_latent_shape is (3, 4), expected three integers of at least 1: (time, height, width)
a patch of size 0 -> ValueError: VIDEO_SPARSE_ATTN: patch_size is (0, 2, 2), expected three integers of at least 1: (time, height, width)
latents smaller than a patch -> ValueError: VideoTiles: grid is (3, 0, 2), expected three integers of at least 1: (time, height, width)
sparsity 1.5 -> ValueError: topk_of_sparsity: sparsity is 1.5, expected a number from 0 to 1
a step past the last -> ValueError: SLIDING_TILE_ATTN: current_timestep is 4, expected 0 to 3, an index of STA_param
a step before the first -> ValueError: SLIDING_TILE_ATTN: current_timestep is -1, expected 0 to 3, an index of STA_param
no windows -> ValueError: SLIDING_TILE_ATTN: STA_param has no window, expected STA_param[step][layer][head]
a window of two sizes -> ValueError: SLIDING_TILE_ATTN: STA_param[0][0][0] is (1, 1), expected three integers of at least 1: (time, height, width)
a layer with fewer heads -> ValueError: SLIDING_TILE_ATTN: STA_param[1] has 3 layers and STA_param[1][2] 3 heads, expected 3 and 4 like the first
a canvas in words -> TypeError: SLIDING_TILE_ATTN: canvas is '5x6x9', expected a tuple of integers: (time, height, width)
more text than there is -> ValueError: SLIDING_TILE_ATTN: text_length is 21, expected 0 to 20, the text_tokens""",
    )
