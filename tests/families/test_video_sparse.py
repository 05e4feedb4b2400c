"""Video Sparse Attention against its definition: dense arithmetic in fp64, block by block, written here."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention.families import video_sparse
from lite_attention.maps.video_tiles import VideoTiles, pad_tiles, tile_tokens, unpad_tiles, untile_tokens
from support.blocks import Video, exists, make_inputs, masked_attention, per_query_head, swapped, token_mask
from support.inputs import DTYPES, GPU_DTYPES, assert_as_good_as_naive, poisoned_memory, report

BACKENDS = [
    *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in DTYPES),
    *(pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in GPU_DTYPES),
]
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


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


def block_means(x: Tensor, sizes: tuple[int, ...], volume: int) -> Tensor:
    starts = range(0, x.shape[2], volume)
    return torch.stack([x[:, :, start : start + size].mean(2) for start, size in zip(starts, sizes, strict=True)], 2)


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
    """The call, ``[B, H, S, D]`` in and out as the arithmetic above."""

    def sizes(of: tuple[int, ...] | None) -> Tensor | None:
        return None if of is None else torch.tensor(of, dtype=torch.int32, device=q.device)

    block_sizes = sizes(video.sizes)
    assert block_sizes is not None
    with poisoned_memory(q.device):
        out, _ = video_sparse.attention(
            *map(swapped, (q, k, v)),
            block_sizes,
            video.topk,
            volume=video.volume,
            gate=None if gate is None else swapped(gate),
            q_block_sizes=sizes(video.q_sizes),
            scale=video.scale,
            prefix_blocks=video.prefix_blocks,
        )
    return swapped(out)


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
    q = torch.ones(1, 192, 1, 8)
    v = torch.arange(3.0).repeat_interleave(64)[None, :, None, None].repeat(1, 1, 1, 8)
    sizes = torch.full((3,), 64, dtype=torch.int32)
    out, _ = video_sparse.attention(q, q, v, sizes, topk, gate=torch.zeros_like(q))
    torch.testing.assert_close(out, torch.full_like(q, sum(range(topk)) / topk))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [(4, 4, 4), (2, 4, 16), (4, 8, 8)], ids=str)
def test_with_all_blocks_and_no_coarse_part_it_is_dense_attention_of_the_video(
    tile: tuple[int, int, int], device: str
) -> None:
    tiles = VideoTiles((5, 9, 10), tile)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(2, tiles.tokens, heads, 32).to(device, dtype) for heads in (4, 2, 2))
    padded = [pad_tiles(tile_tokens(x, tiles, 1), tiles, tiles.volume, 1) for x in (q, k, v)]
    sizes = tiles.sizes(q.device)
    out, _ = video_sparse.attention(*padded, sizes, tiles.number, volume=tiles.volume, gate=torch.zeros_like(padded[0]))
    result = untile_tokens(unpad_tiles(out, tiles, tiles.volume, 1), tiles, 1)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result, dense, atol=tolerance, rtol=tolerance)


def test_any_strides_will_do() -> None:
    video = Video(batch=2, heads=4)
    q, k, v, gate = make_inputs(video, torch.float32)
    assert gate is not None
    turned = [swapped(x) for x in (q, k, v, gate)]
    assert not turned[0].is_contiguous()
    sizes = torch.tensor(video.sizes)
    out, lse = video_sparse.attention(*turned[:3], sizes, 3, gate=turned[3])
    assert out.is_contiguous()
    straight = [x.contiguous() for x in turned]
    for same, result in zip(video_sparse.attention(*straight[:3], sizes, 3, gate=straight[3]), (out, lse), strict=True):
        torch.testing.assert_close(same, result)


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_the_lse_is_that_of_the_fine_stage(device: str, dtype: torch.dtype) -> None:
    video = Video(heads=4, batch=2)
    q, k, v, _ = make_inputs(video, dtype)
    sizes = torch.tensor(video.sizes, dtype=torch.int32, device=device)
    _, lse = video_sparse.attention(*(swapped(x.to(device)) for x in (q, k, v)), sizes, video.topk)
    mask = token_mask(chosen_blocks(video, q, k), video.sizes, video.volume)
    exact, naive = (masked_attention(*(x.to(d) for x in (q, k, v)), mask, 0.25)[1] for d in (torch.float64, dtype))
    tokens = exists(video.query_sizes, video.volume)
    assert_as_good_as_naive("lse", lse.cpu()[:, :, tokens], exact[:, :, tokens], naive[:, :, tokens])


def test_large_fp16_activations_are_ranked_and_not_overflowed() -> None:
    x = torch.full((1, 192, 1, 64), 100.0, dtype=torch.float16)
    k = torch.cat([x[:, :64] / 4, x[:, :64] / 2, x[:, :64]], 1)  # unscaled scores up to 640,000
    v = torch.arange(3.0).repeat_interleave(64)[None, :, None, None].repeat(1, 1, 1, 64).half()
    sizes = torch.full((3,), 64, dtype=torch.int32)
    out, _ = video_sparse.attention(x, k, v, sizes, 1, gate=torch.zeros_like(x), scale=1 / 64)
    assert torch.equal(out, torch.full_like(x, 2.0))


def test_sums_of_large_fp16_values_do_not_overflow() -> None:
    q, v = torch.zeros(1, 128, 1, 64, dtype=torch.float16), torch.full((1, 128, 1, 64), 2000.0, dtype=torch.float16)
    out, _ = video_sparse.attention(q, q, v, torch.full((2,), 64, dtype=torch.int32), 1)
    assert torch.equal(out, 2 * v)  # fine + coarse


@pytest.mark.parametrize("size", [-3, 0, 65, 10**6])
@pytest.mark.parametrize("device", DEVICES)
def test_sizes_out_of_range_are_refused_on_the_cpu_and_limited_on_the_gpu(device: str, size: int) -> None:
    video = Video(sizes=(64,) * 6)
    q, k, v, _ = (x if x is None else swapped(x).to(device) for x in make_inputs(video, torch.bfloat16))
    sizes = torch.tensor(video.sizes, dtype=torch.int32, device=device)
    wrong = sizes.clone()
    wrong[4] = size
    if device == "cpu":
        message = rf"^video_sparse\.attention: {{}}\[4\] is {size}, expected 1 to 64$"
        with pytest.raises(ValueError, match=message.format("block_sizes")):
            video_sparse.attention(q, k, v, wrong, 3)
        with pytest.raises(ValueError, match=message.format("q_block_sizes")):
            video_sparse.attention(q, k, v, sizes, 3, q_block_sizes=wrong)
        return
    limited = video_sparse.attention(q, k, v, wrong.clamp(1, 64), 3)
    for result, expected in zip(video_sparse.attention(q, k, v, wrong, 3), limited, strict=True):
        assert torch.equal(result, expected)
        assert bool(result.isfinite().all())


def test_autocast_attends_to_the_blocks_that_would_be_chosen_without_it() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 40 * 64, 2, 64)
    sizes = torch.full((40,), 64, dtype=torch.int32)
    expected, _ = video_sparse.attention(q, k, v, sizes, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = video_sparse.attention(q, k, v, sizes, 4)
    assert out.dtype == torch.bfloat16
    assert float((out - expected).abs().max()) < 0.02  # another block moves a row by 0.1 and more


def test_a_gradient_is_refused() -> None:
    q, k, v, gate = make_inputs(Video(), torch.float32)
    out = run(Video(), q.requires_grad_(), k, v, gate)
    with pytest.raises(RuntimeError, match="forward-only"):
        out.sum().backward()


@pytest.mark.parametrize("mapped", ["q", "k", "v", "gate"])
def test_each_input_may_be_mapped_over_alone(mapped: str) -> None:
    inputs = dict(zip(("q", "k", "v", "gate"), make_inputs(Video(), torch.float32), strict=True))
    both = torch.stack([inputs[mapped], inputs[mapped].flip(1)])
    results = torch.func.vmap(lambda x: run(Video(), **inputs | {mapped: x}))(both)
    for result, x in zip(results, both, strict=True):
        torch.testing.assert_close(result, run(Video(), **inputs | {mapped: x}))
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.vmap(lambda x: run(Video(), **inputs | {mapped: x})), backend="eager")
    torch.testing.assert_close(compiled(both), results)


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
        gate = None if gate is None else swapped(gate)
        out, _ = video_sparse.attention(
            *map(swapped, (2 * q, k, v)),
            sizes,
            video.topk,
            volume=video.volume,
            gate=gate,
            prefix_blocks=video.prefix_blocks,
        )
        return out + 1

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(3):
        inputs = [x if x is None else x.to(device) for x in make_inputs(video, torch.bfloat16, seed)]
        assert torch.equal(compiled(*inputs), layer(*inputs))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_functionalised_graphs_give_the_eager_result() -> None:
    video = CASES["two prefix blocks"]
    inputs = make_inputs(video, torch.float32)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(video, *inputs), run(video, *inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["one of each", "two prefix blocks", "blocks of 128"])
def test_a_captured_graph_chooses_blocks_anew_at_each_replay(name: str) -> None:
    video = CASES[name]
    inputs = [x if x is None else swapped(x).cuda() for x in make_inputs(video, torch.bfloat16)]
    sizes = torch.tensor(video.sizes, dtype=torch.int32, device="cuda")

    def layer() -> Tensor:
        *qkv, gate = inputs
        out, _ = video_sparse.attention(
            *qkv, sizes, video.topk, volume=video.volume, gate=gate, prefix_blocks=video.prefix_blocks
        )
        return out

    layer()  # loads the kernels, and cuBLAS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for seed in range(1, 4):
        for x, fresh in zip(inputs, make_inputs(video, torch.bfloat16, seed), strict=True):
            if x is not None:
                x.copy_(swapped(fresh))
        graph.replay()
        assert torch.equal(out, layer())


# Errors


def test_errors_name_the_argument() -> None:
    inputs = make_inputs(Video(heads=4), torch.float32)
    q, k, v, gate = (swapped(x) for x in inputs if x is not None)
    sizes = torch.tensor(Video().sizes)

    def vsa(*changed: Tensor, topk: int = 3, **named: object) -> object:
        qkv = (*changed, *(q, k, v)[len(changed) :])
        arguments: dict[str, object] = {"block_sizes": sizes, "topk": topk, **named}
        return video_sparse.attention(*qkv, **arguments)  # type: ignore[arg-type]

    assert_expected_inline(
        report(
            {
                "q without batch": lambda: vsa(q[0]),
                "v of other heads": lambda: vsa(q, k, v[:, :, :1]),
                "k of other head dim": lambda: vsa(q, k[..., :8]),
                "heads": lambda: vsa(q[:, :, :3]),
                "topk": lambda: vsa(topk=0),
                "topk beyond the operator's": lambda: vsa(topk=2**70),
                "fp64": lambda: vsa(q.double(), k.double(), v.double()),
                "k of another dtype": lambda: vsa(q, k.bfloat16()),
                "v of another dtype": lambda: vsa(q, k, v.bfloat16()),
                "volume": lambda: vsa(volume=48),
                "length": lambda: vsa(q, k[:, :100], v[:, :100]),
                "no keys": lambda: vsa(q, k[:, :0], v[:, :0]),
                "sizes": lambda: vsa(block_sizes=sizes[:5]),
                "sizes of floats": lambda: vsa(block_sizes=sizes.float()),
                "sizes elsewhere": lambda: vsa(block_sizes=sizes.to("meta")),
                "other query blocks": lambda: vsa(q[:, :128]),
                "query sizes": lambda: vsa(q_block_sizes=sizes[:3]),
                "prefix": lambda: vsa(prefix_blocks=9),
                "gate": lambda: vsa(gate=gate[..., :1]),
            }
        ),
        """\
q without batch -> ValueError: video_sparse.attention: q has 3 dimensions, expected 4, [B, S, H, D]
v of other heads -> ValueError: video_sparse.attention: v has shape [1, 512, 1, 16], expected [1, 512, 2, 16] like k, as [B, S, H, D]
k of other head dim -> ValueError: video_sparse.attention: k has shape [1, 512, 2, 8], expected [1, kv_len, kv_heads, 16] like q, as [B, S, H, D]
heads -> ValueError: video_sparse.attention: q has 3 heads, expected a multiple of the 2 of k
topk -> ValueError: video_sparse.attention: topk is 0, expected at least 1
topk beyond the operator's -> ValueError: video_sparse.attention: topk is beyond the integers of 64 bits, expected one of these
fp64 -> TypeError: video_sparse.attention: q has dtype torch.float64, expected one of torch.float32, torch.bfloat16, torch.float16
k of another dtype -> TypeError: video_sparse.attention: k has dtype torch.bfloat16, expected torch.float32 like q
v of another dtype -> TypeError: video_sparse.attention: v has dtype torch.bfloat16, expected torch.float32 like q
volume -> ValueError: video_sparse.attention: volume is 48 slots, expected a multiple of 64
length -> ValueError: video_sparse.attention: k has 100 slots, expected a multiple of the 64 of a block
no keys -> ValueError: video_sparse.attention: k has 0 slots, expected a multiple of the 64 of a block
sizes -> ValueError: video_sparse.attention: block_sizes has shape [5], expected [8], one size for each block of 64 slots of k
sizes of floats -> TypeError: video_sparse.attention: block_sizes has dtype torch.float32, expected torch.int32
sizes elsewhere -> ValueError: video_sparse.attention: block_sizes is on meta, expected cpu like k
other query blocks -> ValueError: video_sparse.attention: q_block_sizes is None, expected the sizes of q's blocks, as q has 128 slots and k 512
query sizes -> ValueError: video_sparse.attention: q_block_sizes has shape [3], expected [8], one size for each block of 64 slots of q
prefix -> ValueError: video_sparse.attention: prefix_blocks is 9, expected 0 to 8, the blocks there are
gate -> ValueError: video_sparse.attention: gate has shape [1, 512, 4, 1], expected [1, 512, 4, 16] like q""",
    )


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float64, torch.bool])
def test_a_gate_of_another_dtype_leaves_the_result_in_that_of_the_queries(gate_dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 128, 2, 64, dtype=torch.bfloat16)
    sizes, gate = torch.tensor([64, 64], dtype=torch.int32), torch.randn(q.shape).to(gate_dtype)

    def attend(q: Tensor, gate: Tensor) -> Tensor:
        return video_sparse.attention(q, k, v, sizes, 1, gate=gate)[0]

    out = attend(q, gate)
    assert out.dtype == q.dtype
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for other in (compiled(q, gate), torch.vmap(attend)(q[None], gate[None])[0]):
        assert other.dtype == q.dtype
        assert torch.equal(other, out)
