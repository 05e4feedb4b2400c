"""Video Sparse Attention against its definition: dense arithmetic in fp64, block by block, written here."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention.families.video_sparse import (
    block_sparse_attention,
    build_vsa_metadata,
    topk_of_sparsity,
    video_sparse_attn,
)
from lite_attention.maps.keep_map import pack_keep_map
from lite_attention.maps.video_tiles import VideoTiles, pad_tiles, tile_tokens, unpad_tiles, untile_tokens
from support.inputs import DTYPES, GPU_DTYPES, assert_as_good_as_naive, poisoned_memory, report

BACKENDS = [
    *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in DTYPES),
    *(pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in GPU_DTYPES),
]
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


class Video(NamedTuple):
    """One problem. Sizes of blocks are powers of two, for which means of small integers are exact in every dtype."""

    sizes: tuple[int, ...] = (64, 16, 64, 16, 32, 8, 64, 1)
    q_sizes: tuple[int, ...] | None = None
    volume: int = 64
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    topk: int = 3
    prefix_blocks: int = 0
    scale: float | None = None
    gate: str = "random"

    @property
    def query_sizes(self) -> tuple[int, ...]:
        return self.sizes if self.q_sizes is None else self.q_sizes


CASES = {
    "one of each": Video(),
    "one block a row": Video(topk=1),
    "all blocks": Video(topk=8),
    "more blocks than there are": Video(topk=100),
    "a single block": Video(sizes=(64,)),
    "blocks without padding": Video(sizes=(64,) * 6),
    "more than a word of blocks": Video(sizes=(64, 8) * 17, heads=1, kv_heads=1, topk=7),
    "no gate": Video(gate="none"),
    "a gate of zero": Video(gate="zero"),
    "batch": Video(batch=2),
    "grouped heads": Video(heads=6, kv_heads=2, batch=2),
    "one KV head": Video(heads=3, kv_heads=1),
    "scale": Video(scale=0.5),
    "wide heads": Video(head_dim=128),
    "widest heads": Video(head_dim=256, heads=1, kv_heads=1),
    "fewer query blocks": Video(q_sizes=(16, 64, 64)),
    "more query blocks": Video(sizes=(64, 16, 32), q_sizes=(16, 64, 64, 1, 8), topk=2),
    "one prefix block": Video(prefix_blocks=1),
    "two prefix blocks": Video(sizes=(64, 32, 64, 16, 64, 16, 32), prefix_blocks=2, topk=2, batch=2),
    "nothing but prefix": Video(sizes=(64, 32), prefix_blocks=2, topk=1),
    "prefix, grouped heads, other queries": Video(q_sizes=(64, 8, 64), heads=4, prefix_blocks=2, topk=2),
    "blocks of 128": Video(volume=128, sizes=(128, 64, 32, 128, 1)),
    "blocks of 256": Video(volume=256, sizes=(256, 128, 64, 16, 256), topk=2),
    "blocks of 192": Video(volume=192, sizes=(128, 64, 2, 128), topk=2),
    "blocks of 128, prefix, grouped heads": Video(volume=128, sizes=(64, 128, 32, 128), prefix_blocks=1, heads=4),
}


def exists(sizes: tuple[int, ...], volume: int) -> Tensor:
    """bool ``[S]``: which slots hold a token."""
    return (torch.arange(volume) < torch.tensor(sizes).unsqueeze(-1)).flatten()


def make_inputs(video: Video, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and the gate. Entries of q and k are -1, 0 or 1, so that every backend finds the same scores, and ties."""
    random = torch.Generator().manual_seed(seed)

    def padded(sizes: tuple[int, ...], heads: int, values: Tensor | None = None) -> Tensor:
        shape = (video.batch, heads, len(sizes) * video.volume, video.head_dim)
        x = torch.randn(shape, generator=random)
        if values is not None:
            # Tokens of a block are alike, or all means would be close to 0.
            alike = values[torch.randint(len(values), (*shape[:2], len(sizes), 1, video.head_dim), generator=random)]
            each = values[torch.randint(len(values), shape, generator=random)]
            x = torch.where(x > 0, each, alike.expand(-1, -1, -1, video.volume, -1).reshape(shape))
        return torch.where(exists(sizes, video.volume).unsqueeze(-1), x, 0.0).to(dtype)

    digits = torch.tensor([-1.0, 0.0, 1.0])
    q = padded(video.query_sizes, video.heads, digits)
    k = padded(video.sizes, video.kv_heads, digits)
    v = padded(video.sizes, video.kv_heads)
    gates = {"random": torch.randn(q.shape, generator=random), "zero": torch.zeros(q.shape), "none": None}
    gate = gates[video.gate]
    return q, k, v, None if gate is None else gate.to(dtype)


def block_means(x: Tensor, sizes: tuple[int, ...], volume: int) -> Tensor:
    starts = range(0, x.shape[2], volume)
    return torch.stack([x[:, :, start : start + size].mean(2) for start, size in zip(starts, sizes, strict=True)], 2)


def per_query_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def chosen_blocks(video: Video, q: Tensor, k: Tensor) -> Tensor:
    """bool ``[B, Hq, query_blocks, kv_blocks]`` by the rule of VSA, from exact means and scores rounded to q's dtype."""
    q_means = block_means(q.double(), video.query_sizes, video.volume)
    k_means = per_query_head(block_means(k.double(), video.sizes, video.volume), video.heads)
    scale = video.head_dim**-0.5 if video.scale is None else video.scale
    scores = (q_means @ k_means.transpose(-1, -2) * scale).to(q.dtype)
    prefix, blocks = video.prefix_blocks, len(video.sizes)
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    for b, h, row in itertools.product(*map(range, scores.shape[:3])):
        of_row = scores[b, h, row].tolist()
        ranked = sorted(range(prefix, blocks), key=lambda block, of_row=of_row: (-of_row[block], block))
        chosen[b, h, row, ranked[: video.topk]] = True
    chosen[..., :prefix] = True
    chosen[:, :, :prefix] = True
    return chosen


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention; k and v may have fewer heads. Returns out and the natural log of the softmax denominator."""
    k, v = per_query_head(k, q.shape[1]), per_query_head(v, q.shape[1])
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(lse.unsqueeze(-1) == -math.inf, 0)
    return weights.to(v.dtype) @ v, lse


def token_mask(blocks: Tensor, sizes: tuple[int, ...], volume: int) -> Tensor:
    return blocks.repeat_interleave(volume, -1).repeat_interleave(volume, -2) & exists(sizes, volume)


def by_definition(
    video: Video, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, chosen: Tensor, dtype: torch.dtype
) -> Tensor:
    """The whole of VSA in ``dtype`` from the chosen blocks: fine + gate * coarse."""
    scale = video.head_dim**-0.5 if video.scale is None else video.scale
    # Means are rounded to q's dtype also where the rest is exact: they are, before the coarse attention, by definition.
    q_means = block_means(q.double(), video.query_sizes, video.volume).to(q.dtype).to(dtype)
    k_means, v_means = (block_means(x.double(), video.sizes, video.volume).to(q.dtype).to(dtype) for x in (k, v))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    coarse, _ = masked_attention(q_means, k_means, v_means, torch.tensor(True), scale)
    fine, _ = masked_attention(q, k, v, token_mask(chosen, video.sizes, video.volume), scale)
    repeated = coarse.repeat_interleave(video.volume, 2)
    return fine + (repeated if gate is None else gate.to(dtype) * repeated)


def run(video: Video, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    def sizes(of: tuple[int, ...] | None) -> Tensor | None:
        return None if of is None else torch.tensor(of, dtype=torch.int32, device=q.device)

    block_sizes = sizes(video.sizes)
    assert block_sizes is not None
    with poisoned_memory(q.device):
        return video_sparse_attn(
            q,
            k,
            v,
            block_sizes,
            video.topk,
            video.volume,
            gate,
            q_variable_block_sizes=sizes(video.q_sizes),
            scale=video.scale,
            prefix_blocks=video.prefix_blocks,
        )


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("video", CASES.values(), ids=CASES)
def test_the_result_is_that_of_the_definition(video: Video, device: str, dtype: torch.dtype) -> None:
    q, k, v, gate = make_inputs(video, dtype)
    given = [x if x is None else x.to(device) for x in (q, k, v, gate)]
    out = run(video, *given)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert all(torch.equal(x, y.to(device)) for x, y in zip(given, (q, k, v, gate), strict=True) if x is not None)
    chosen = chosen_blocks(video, q, k)
    exact, naive = (by_definition(video, q, k, v, gate, chosen, in_dtype) for in_dtype in (torch.float64, dtype))
    tokens = exists(video.query_sizes, video.volume)
    assert_as_good_as_naive("out", out.cpu()[:, :, tokens], exact[:, :, tokens], naive[:, :, tokens])


@given(
    sizes=st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1, max_size=8),
    topk=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_any_blocks_and_any_topk_give_the_definition(sizes: list[int], topk: int, seed: int) -> None:
    video = Video(sizes=tuple(sizes), topk=topk, kv_heads=1)
    q, k, v, gate = make_inputs(video, torch.float32, seed)
    exact = by_definition(video, q, k, v, gate, chosen_blocks(video, q, k), torch.float64)
    tokens = exists(video.sizes, video.volume)
    torch.testing.assert_close(
        run(video, q, k, v, gate)[:, :, tokens], exact.float()[:, :, tokens], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_of_equal_blocks_the_first_are_attended_to(topk: int) -> None:
    q = torch.ones(1, 1, 192, 8)
    v = torch.arange(3.0).repeat_interleave(64)[None, None, :, None].repeat(1, 1, 1, 8)
    sizes = torch.full((3,), 64, dtype=torch.int32)
    out = video_sparse_attn(q, q, v, sizes, topk, compress_attn_weight=torch.zeros_like(q))
    torch.testing.assert_close(out, torch.full_like(q, sum(range(topk)) / topk))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [(4, 4, 4), (2, 4, 16), (4, 8, 8)], ids=str)
def test_with_all_blocks_and_no_coarse_part_it_is_dense_attention_of_the_video(
    tile: tuple[int, int, int], device: str
) -> None:
    tiles = VideoTiles((5, 9, 10), tile)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(2, tiles.tokens, heads, 32).to(device, dtype) for heads in (4, 2, 2))
    padded = (pad_tiles(tile_tokens(x, tiles, 1), tiles, tiles.volume, 1).transpose(1, 2) for x in (q, k, v))
    sizes = build_vsa_metadata(tiles.grid, tile, device)["variable_block_sizes"]
    gate = torch.zeros(2, 4, tiles.number * tiles.volume, 32, device=device, dtype=dtype)
    out = video_sparse_attn(*padded, sizes, tiles.number, tile, gate)
    result = untile_tokens(unpad_tiles(out.transpose(1, 2), tiles, tiles.volume, 1), tiles, 1)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result, dense, atol=tolerance, rtol=tolerance)


def test_any_strides_will_do_and_the_block_may_be_given_by_its_volume() -> None:
    video = Video(batch=2, heads=4)
    q, k, v, gate = make_inputs(video, torch.float32)
    assert gate is not None
    sizes = torch.tensor(video.sizes)
    out = video_sparse_attn(q, k, v, sizes, 3, (4, 4, 4), gate)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, gate)]
    assert torch.equal(video_sparse_attn(*strided[:3], sizes, 3, 64, strided[3]), out)
    assert torch.equal(video_sparse_attn(q, k, v, sizes, 3, compress_attn_weight=gate), out)


def test_large_fp16_activations_are_ranked_and_not_overflowed() -> None:
    x = torch.full((1, 1, 192, 64), 100.0, dtype=torch.float16)
    k = torch.cat([x[:, :, :64] / 4, x[:, :, :64] / 2, x[:, :, :64]], 2)  # unscaled scores up to 640,000
    v = torch.arange(3.0).repeat_interleave(64)[None, None, :, None].repeat(1, 1, 1, 64).half()
    sizes = torch.full((3,), 64, dtype=torch.int32)
    out = video_sparse_attn(x, k, v, sizes, 1, compress_attn_weight=torch.zeros_like(x), scale=1 / 64)
    assert torch.equal(out, torch.full_like(x, 2.0))


def test_sums_of_large_fp16_values_do_not_overflow() -> None:
    q, v = torch.zeros(1, 1, 128, 64, dtype=torch.float16), torch.full((1, 1, 128, 64), 2000.0, dtype=torch.float16)
    out = video_sparse_attn(q, q, v, torch.full((2,), 64, dtype=torch.int32), 1)
    assert torch.equal(out, 2 * v)  # fine + coarse


def test_a_gradient_is_refused() -> None:
    q, k, v, gate = make_inputs(Video(), torch.float32)
    out = run(Video(), q.requires_grad_(), k, v, gate)
    with pytest.raises(RuntimeError, match="forward-only"):
        out.sum().backward()


# block_sparse_attention


def random_blocks(video: Video, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    sizes = (video.batch, video.heads, len(video.query_sizes), len(video.sizes))
    return torch.rand(sizes, generator=random) < 0.4


BLOCK_CASES = {
    name: CASES[name]
    for name in ("one of each", "batch", "grouped heads", "scale", "fewer query blocks", "blocks of 192")
}


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("video", BLOCK_CASES.values(), ids=BLOCK_CASES)
def test_blocks_of_a_map_are_attended_to(video: Video, device: str, dtype: torch.dtype) -> None:
    q, k, v, _ = make_inputs(video, dtype)
    blocks = random_blocks(video)
    blocks[0, 0, 1] = False  # a query block that sees nothing
    sizes = torch.tensor(video.sizes, dtype=torch.int32, device=device)
    with poisoned_memory(sizes.device):
        out, lse = block_sparse_attention(*(x.to(device) for x in (q, k, v, blocks)), sizes, scale=video.scale)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    mask = token_mask(blocks, video.sizes, video.volume)
    scale = video.head_dim**-0.5 if video.scale is None else video.scale
    exact, naive = (masked_attention(*(x.to(d) for x in (q, k, v)), mask, scale) for d in (torch.float64, dtype))
    assert_as_good_as_naive("out", out.cpu(), exact[0], naive[0])
    assert_as_good_as_naive("lse", lse.cpu(), exact[1], naive[1])


@pytest.mark.parametrize("volume", [64, 128])
def test_a_packed_map_says_the_same_as_a_bool_one(volume: int) -> None:
    video = Video(volume=volume, batch=2)
    q, k, v, _ = make_inputs(video, torch.float32)
    blocks, sizes = random_blocks(video), torch.tensor(video.sizes)
    of_tiles = blocks.repeat_interleave(volume // 64, -1).repeat_interleave(volume // 64, -2)
    expected = block_sparse_attention(q, k, v, blocks, sizes)
    for result, same in zip(block_sparse_attention(q, k, v, pack_keep_map(of_tiles), sizes), expected, strict=True):
        assert torch.equal(result, same)


def test_a_map_without_batch_is_shared_by_all_batch_entries() -> None:
    video = Video(batch=2)
    q, k, v, _ = make_inputs(video, torch.float32)
    blocks, sizes = random_blocks(video)[0], torch.tensor(video.sizes)
    expected = block_sparse_attention(q, k, v, blocks.expand(2, -1, -1, -1), sizes)
    for result, same in zip(block_sparse_attention(q, k, v, blocks, sizes), expected, strict=True):
        assert torch.equal(result, same)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4])
def test_block_sparse_attention_ignores_what_padding_holds(value: float, device: str) -> None:
    video = Video(volume=128, sizes=(128, 70, 5, 100))
    q, k, v, _ = (x if x is None else x.to(device) for x in make_inputs(video, torch.bfloat16))
    tokens = exists(video.sizes, video.volume).to(device)
    blocks, sizes = random_blocks(video).to(device), torch.tensor(video.sizes, device=device)
    clean, _ = block_sparse_attention(q, k, v, blocks, sizes)
    dirty = (torch.where(tokens.unsqueeze(-1), x, value) for x in (q, k, v))
    out, _ = block_sparse_attention(*dirty, blocks, sizes)
    assert torch.equal(out[:, :, tokens], clean[:, :, tokens])


# The blocks of a video


@pytest.mark.parametrize("grid", [(4, 8, 8), (5, 9, 10), (1, 1, 1), (6, 3, 13)], ids=str)
@pytest.mark.parametrize("tile", [(4, 4, 4), (4, 4, 8)], ids=str)
def test_metadata_walks_the_tiles_in_raster_order(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    metadata = build_vsa_metadata(grid, tile)
    raster = torch.arange(math.prod(grid)).view(grid)
    in_tiles = [
        raster[t : t + tile[0], h : h + tile[1], w : w + tile[2]].flatten()
        for t, h, w in itertools.product(*(range(0, length, step) for length, step in zip(grid, tile, strict=True)))
    ]
    order, back = metadata["tile_partition_indices"], metadata["reverse_tile_partition_indices"]
    assert torch.equal(order, torch.cat(in_tiles))
    assert torch.equal(order[back], torch.arange(math.prod(grid)))
    assert metadata["variable_block_sizes"].tolist() == [len(tile) for tile in in_tiles]
    assert metadata["variable_block_sizes"].dtype == torch.int32
    assert metadata["max_block_size"] == math.prod(tile)
    slots = [block * math.prod(tile) + place for block, tokens in enumerate(in_tiles) for place in range(len(tokens))]
    assert metadata["non_pad_index"].tolist() == slots
    assert metadata["num_tiles"] == tuple(math.ceil(length / step) for length, step in zip(grid, tile, strict=True))


def test_metadata_pads_as_the_padding_helpers_do() -> None:
    tiles = VideoTiles((5, 9, 10), (4, 4, 4))
    metadata = build_vsa_metadata(tiles.grid, tiles.tile)
    x = torch.randn(2, tiles.tokens, 3)
    by_hand = torch.zeros(2, tiles.number * 64, 3)
    by_hand[:, metadata["non_pad_index"]] = x[:, metadata["tile_partition_indices"]]
    assert torch.equal(pad_tiles(tile_tokens(x, tiles, 1), tiles, 64, 1), by_hand)
    back = metadata["non_pad_index"][metadata["reverse_tile_partition_indices"]]
    assert torch.equal(by_hand[:, back], x)


def test_sparsity_leaves_its_share_of_the_blocks_and_at_least_one() -> None:
    kept = [topk_of_sparsity(sparsity, 1440) for sparsity in (0, 0.5, 0.9, 0.9999, 1)]
    assert kept == [1440, 720, 144, 1, 1]
    assert topk_of_sparsity(0.9, 624) == 63


# Compiling


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["one of each", "no gate", "two prefix blocks", "blocks of 128, prefix, grouped heads"]
)
def test_one_graph_serves_all_inputs(name: str, device: str) -> None:
    video = CASES[name]
    sizes = torch.tensor(video.sizes, dtype=torch.int32, device=device)
    counter = CompileCounter()

    def layer(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        out = video_sparse_attn(2 * q, k, v, sizes, video.topk, video.volume, gate, prefix_blocks=video.prefix_blocks)
        return out + 1

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(3):
        inputs = [x if x is None else x.to(device) for x in make_inputs(video, torch.bfloat16, seed)]
        assert torch.equal(compiled(*inputs), layer(*inputs))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_functionalised_graphs_give_the_eager_result() -> None:
    video = CASES["two prefix blocks"]
    sizes, inputs = torch.tensor(video.sizes), make_inputs(video, torch.float32)
    blocks = random_blocks(video)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(video, *inputs), run(video, *inputs))
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    for result, same in zip(
        compiled(*inputs[:3], blocks, sizes), block_sparse_attention(*inputs[:3], blocks, sizes), strict=True
    ):
        assert torch.equal(result, same)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["one of each", "two prefix blocks", "blocks of 128"])
def test_a_captured_graph_chooses_blocks_anew_at_each_replay(name: str) -> None:
    video = CASES[name]
    inputs = [x if x is None else x.cuda() for x in make_inputs(video, torch.bfloat16)]
    sizes = torch.tensor(video.sizes, dtype=torch.int32, device="cuda")

    def layer() -> Tensor:
        q, k, v, gate = inputs
        return video_sparse_attn(q, k, v, sizes, video.topk, video.volume, gate, prefix_blocks=video.prefix_blocks)

    layer()  # loads the kernels, and cuBLAS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for seed in range(1, 4):
        for x, fresh in zip(inputs, make_inputs(video, torch.bfloat16, seed), strict=True):
            if x is not None:
                x.copy_(fresh)
        graph.replay()
        assert torch.equal(out, layer())


# Errors


def test_errors_name_the_argument() -> None:
    q, k, v, gate = make_inputs(Video(heads=4), torch.float32)
    assert gate is not None
    sizes = torch.tensor(Video().sizes)

    def vsa(*changed: Tensor, topk: int = 3, **named: object) -> Tensor:
        qkv = (*changed, *(q, k, v)[len(changed) :])
        arguments: dict[str, object] = {"variable_block_sizes": sizes, "topk": topk, **named}
        return video_sparse_attn(*qkv, **arguments)  # type: ignore[arg-type]

    assert_expected_inline(
        report(
            {
                "q without batch": lambda: vsa(q[0]),
                "v of other heads": lambda: vsa(q, k, v[:, :1]),
                "k of other head dim": lambda: vsa(q, k[..., :8]),
                "heads": lambda: vsa(q[:, :3]),
                "topk": lambda: vsa(topk=0),
                "volume": lambda: vsa(block_size=(3, 4, 4)),
                "volume given": lambda: vsa(block_size=100),
                "length": lambda: vsa(q, k[:, :, :100], v[:, :, :100]),
                "no keys": lambda: vsa(q, k[:, :, :0], v[:, :, :0]),
                "sizes": lambda: vsa(variable_block_sizes=sizes[:5]),
                "sizes of floats": lambda: vsa(variable_block_sizes=sizes.float()),
                "sizes elsewhere": lambda: vsa(variable_block_sizes=sizes.to("meta")),
                "other query blocks": lambda: vsa(q[:, :, :128]),
                "query sizes": lambda: vsa(q_variable_block_sizes=sizes[:3]),
                "prefix": lambda: vsa(prefix_blocks=9),
                "gate": lambda: vsa(compress_attn_weight=gate[..., :1]),
            }
        ),
        """\
q without batch -> ValueError: video_sparse_attn: q has 3 dimensions, expected 4, [B, H, S, D]
v of other heads -> ValueError: video_sparse_attn: v has shape [1, 1, 512, 16], expected [1, 2, 512, 16] like k
k of other head dim -> ValueError: video_sparse_attn: k has shape [1, 2, 512, 8], expected [1, kv_heads, kv_len, 16] like q
heads -> ValueError: video_sparse_attn: q has 3 heads, expected a multiple of the 2 of k
topk -> ValueError: video_sparse_attn: topk is 0, expected at least 1
volume -> ValueError: video_sparse_attn: block_size is (3, 4, 4), blocks of 48 tokens, expected a multiple of 64
volume given -> ValueError: video_sparse_attn: block_size is 100, blocks of 100 tokens, expected a multiple of 64
length -> ValueError: video_sparse_attn: k has 100 slots, expected a multiple of the 64 of a block
no keys -> ValueError: video_sparse_attn: k has 0 slots, expected a multiple of the 64 of a block
sizes -> ValueError: video_sparse_attn: variable_block_sizes has shape [5], expected [8], one size for each block of 64 slots of k
sizes of floats -> TypeError: video_sparse_attn: variable_block_sizes has dtype torch.float32, expected torch.int32
sizes elsewhere -> ValueError: video_sparse_attn: variable_block_sizes is on meta, expected cpu like k
other query blocks -> ValueError: video_sparse_attn: q_variable_block_sizes is None, expected the sizes of q's blocks, as q has 128 slots and k 512
query sizes -> ValueError: video_sparse_attn: q_variable_block_sizes has shape [3], expected [8], one size for each block of 64 slots of q
prefix -> ValueError: video_sparse_attn: prefix_blocks is 9, expected 0 to 8, the blocks there are
gate -> ValueError: video_sparse_attn: compress_attn_weight has shape [1, 4, 512, 1], expected [1, 4, 512, 16] like q""",
    )


def test_errors_of_block_sparse_attention_name_the_argument() -> None:
    video = Video(batch=2)
    q, k, v, _ = make_inputs(video, torch.float32)
    blocks, sizes = random_blocks(video), torch.tensor(video.sizes)
    assert_expected_inline(
        report(
            {
                "k": lambda: block_sparse_attention(q, k[0], v, blocks, sizes),
                "no sizes": lambda: block_sparse_attention(q, k, v, blocks, sizes[:0]),
                "too many sizes": lambda: block_sparse_attention(q, k, v, blocks, sizes.repeat(2)),
                "sizes that do not divide": lambda: block_sparse_attention(q, k, v, blocks, sizes[:5]),
                "matrix of sizes": lambda: block_sparse_attention(q, k, v, blocks, sizes[None]),
                "q": lambda: block_sparse_attention(q[:, :, :100], k, v, blocks, sizes),
                "map": lambda: block_sparse_attention(q, k, v, blocks[..., :5], sizes),
                "map of one batch entry": lambda: block_sparse_attention(q, k, v, blocks[:1], sizes),
                "packed map": lambda: block_sparse_attention(q, k, v, pack_keep_map(blocks)[:, :, :3], sizes),
                "map of floats": lambda: block_sparse_attention(q, k, v, blocks.float(), sizes),
            }
        ),
        """\
k -> ValueError: block_sparse_attention: k has 3 dimensions, expected 4, [B, H, S, D]
no sizes -> ValueError: block_sparse_attention: block_sizes has shape [0], expected [1], one size for each block of 512 slots of k
too many sizes -> ValueError: block_sparse_attention: k has 512 slots for 16 block_sizes, expected a multiple of 64 for each
sizes that do not divide -> ValueError: block_sparse_attention: k has 512 slots for 5 block_sizes, expected a multiple of 64 for each
matrix of sizes -> ValueError: block_sparse_attention: block_sizes has shape [1, 8], expected [8], one size for each block of 64 slots of k
q -> ValueError: block_sparse_attention: q has 100 slots, expected a multiple of the 64 of a block of k
map -> ValueError: block_sparse_attention: block_map has shape [2, 2, 8, 5], expected [2, 2, 8, 8] or [2, 8, 8]
map of one batch entry -> ValueError: block_sparse_attention: block_map has shape [1, 2, 8, 8], expected [2, 2, 8, 8] or [2, 8, 8]
packed map -> ValueError: block_sparse_attention: block_map has shape [2, 2, 3, 1], expected [2, 2, 8, 1] for int32
map of floats -> TypeError: block_sparse_attention: block_map has dtype torch.float32, expected torch.bool or torch.int32""",
    )


def test_errors_of_the_helpers_name_the_argument() -> None:
    assert_expected_inline(
        report(
            {
                "sparsity": lambda: topk_of_sparsity(1.5, 10),
                "blocks": lambda: topk_of_sparsity(0.5, 0),
                "grid": lambda: build_vsa_metadata((0, 4, 4)),
                "tile": lambda: build_vsa_metadata((4, 4, 4), (4, 4)),  # type: ignore[arg-type]
            }
        ),
        """\
sparsity -> ValueError: topk_of_sparsity: sparsity is 1.5, expected a number from 0 to 1
blocks -> ValueError: topk_of_sparsity: blocks is 0, expected at least 1
grid -> ValueError: VideoTiles: grid is (0, 4, 4), expected three integers of at least 1: (time, height, width)
tile -> ValueError: VideoTiles: tile is (4, 4), expected three integers of at least 1: (time, height, width)""",
    )
