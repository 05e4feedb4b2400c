"""FastVideo's calls are the native ones in FastVideo's layout and words, bit for bit."""

import itertools
import math

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention import block_sparse_attention, sliding_tile_attention, sliding_tile_map, video_sparse_attn
from lite_attention.compat.fastvideo import build_vsa_metadata
from lite_attention.families import block_sparse, sliding_tile, video_sparse
from lite_attention.maps.blocks import expand_blocks
from lite_attention.maps.keep_map import pack_keep_map
from lite_attention.maps.video_tiles import Size, VideoTiles, pad_tiles, tile_tokens
from support.blocks import Video, make_inputs, random_blocks, swapped
from support.inputs import report

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)

# Sliding Tile Attention

CANVAS, TILE, TEXT = (5, 7, 9), (2, 3, 4), 20
WINDOWS = [(1, 3, 1), (3, 3, 2)]


def video_by_heads(text: int = TEXT, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, heads, math.prod(CANVAS) + text, 40).to(dtype) for heads in (2, 1, 1)]


@on_every_device
@pytest.mark.parametrize(("canvas", "tile"), [(CANVAS, TILE), ((4, 8, 12), (4, 4, 4))], ids=["copied", "in-place"])
def test_sliding_tile_attention_is_the_native_call_by_heads(canvas: Size, tile: Size, device: str) -> None:
    tokens = math.prod(canvas) + TEXT
    q, k, v = (torch.randn(2, heads, tokens, 40).to(device, torch.bfloat16) for heads in (2, 1, 1))
    lengths = torch.tensor([20, 5], dtype=torch.int32, device=device)
    out = sliding_tile_attention(q, k, v, WINDOWS, lengths, True, canvas, tile=tile, scale=0.5)
    windows = sliding_tile_map(WINDOWS, canvas, tile=tile, text_tokens=TEXT, head_dim=40, dtype=q.dtype, device=device)
    expected, _ = sliding_tile.attention(*map(swapped, (q, k, v)), windows, lengths, scale=0.5)
    assert out.shape == q.shape
    assert torch.equal(out, swapped(expected))


def test_the_canvas_may_be_written_out_and_one_window_serves_all_heads() -> None:
    q, k, v = video_by_heads()
    out = sliding_tile_attention(q, k, v, 2 * [(1, 3, 1)], 7, True, CANVAS, tile=TILE)
    assert torch.equal(sliding_tile_attention(q, k, v, (1, 3, 1), 7, seq_shape="5x7x9", tile=TILE), out)
    assert torch.equal(sliding_tile_attention(q, k, v, 2 * [[1, 3, 1]], 7, seq_shape="5x7x9", tile=TILE), out)


def test_without_text_the_text_length_is_ignored() -> None:
    q, k, v = video_by_heads(text=0)
    given = {"window_size": WINDOWS, "has_text": False, "seq_shape": CANVAS, "tile": TILE}
    expected = sliding_tile_attention(q, k, v, text_length=0, **given)
    assert torch.equal(sliding_tile_attention(q, k, v, text_length=77, **given), expected)


def test_the_seeds_calls_of_sliding_tiles_run_as_documented() -> None:
    q, k, v = torch.randn(3, 1, 2, 30 * 48 * 80 + 256, 8)
    window_size = [(1, 1, 1), (1, 1, 3)]
    out = sliding_tile_attention(q, k, v, window_size, 77)
    assert out.shape == q.shape
    q, k, v = (x[:, :, : 30 * 48 * 80] for x in (q, k, v))
    assert sliding_tile_attention(q, k, v, window_size, 0, False).shape == q.shape


def test_windows_are_traced_into_one_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return sliding_tile_attention(q, k, v, WINDOWS, lengths, True, "5x7x9", tile=TILE)

    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch, text in ((3, 25), (4, 41), (5, 90)):
            q, k, v = video_by_heads(text, batch=batch)
            lengths = torch.arange(batch, dtype=torch.int32)
            torch.testing.assert_close(compiled(q, k, v, lengths), attend(q, k, v, lengths))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_block_maps_of_any_size_are_taken_in_compiled_code(dynamic: bool | None) -> None:
    torch._dynamo.reset()

    def attend(q: Tensor, block_map: Tensor, sizes: Tensor) -> Tensor:
        return block_sparse_attention(q, q, q, block_map, sizes)[0]

    counter = CompileCounter()
    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=dynamic)
    with torch.no_grad():
        for blocks in (5, 3, 7, 12, 20, 2, 31, 1, 40, 33, 50):
            q, sizes = torch.randn(2, 2, 64 * blocks, 8), torch.full((blocks,), 60, dtype=torch.int32)
            block_map = torch.rand(2, 2, blocks, blocks) < 0.5
            torch.testing.assert_close(compiled(q, block_map, sizes), attend(q, block_map, sizes))
        assert counter.frame_count <= 4  # any size; sizes of 1, which torch compiles apart; another number of words
        shared = block_map[0]
        torch.testing.assert_close(compiled(q, shared, sizes), attend(q, shared, sizes))


@pytest.mark.gpu
def test_windows_are_made_on_the_device_in_a_captured_graph() -> None:
    q, k, v = (x.cuda() for x in video_by_heads(dtype=torch.bfloat16))
    lengths = torch.tensor([7, 20], dtype=torch.int32, device="cuda")

    def attend() -> Tensor:
        return sliding_tile_attention(q, k, v, WINDOWS, lengths, True, CANVAS, tile=TILE)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for _ in range(2):
        q.normal_()
        graph.replay()
        assert torch.equal(out, attend())


# Video Sparse Attention


@on_every_device
def test_video_sparse_attn_is_the_native_call_by_heads(device: str) -> None:
    video = Video(volume=128, sizes=(64, 128, 32, 128), q_sizes=(128, 7), heads=4, batch=2)
    q, k, v, gate = (x if x is None else x.to(device) for x in make_inputs(video, torch.bfloat16))
    assert gate is not None
    sizes, q_sizes = (torch.tensor(x, dtype=torch.int32, device=device) for x in (video.sizes, video.q_sizes))
    more = {"scale": 0.5, "prefix_blocks": 1}
    out = video_sparse_attn(q, k, v, sizes, 2, (4, 4, 8), gate, q_variable_block_sizes=q_sizes, **more)
    expected, _ = video_sparse.attention(
        *map(swapped, (q, k, v)), sizes, 2, volume=128, gate=swapped(gate), q_block_sizes=q_sizes, **more
    )
    assert out.shape == q.shape
    assert torch.equal(out, swapped(expected))
    assert swapped(out).is_contiguous()


def test_a_block_is_given_by_its_edges_or_its_volume_and_has_64_tokens_by_default() -> None:
    video = Video()
    q, k, v, _ = make_inputs(video, torch.float32)
    sizes = torch.tensor(video.sizes)
    expected = video_sparse_attn(q, k, v, sizes, 3, (4, 4, 4))
    assert torch.equal(video_sparse_attn(q, k, v, sizes, 3, 64), expected)
    assert torch.equal(video_sparse_attn(q, k, v, sizes, 3), expected)


# block_sparse_attention


@on_every_device
def test_block_sparse_attention_is_the_native_call_by_heads(device: str) -> None:
    video = Video(volume=128, sizes=(128, 70, 5, 100), heads=4, batch=2)
    q, k, v, _ = (x if x is None else x.to(device) for x in make_inputs(video, torch.bfloat16))
    blocks, sizes = random_blocks(video).to(device), torch.tensor(video.sizes, device=device)
    out, lse = block_sparse_attention(q, k, v, blocks, sizes, scale=0.5)
    expected = block_sparse.attention(*map(swapped, (q, k, v)), expand_blocks(blocks, 128), sizes, scale=0.5)
    assert torch.equal(out, swapped(expected[0]))
    assert torch.equal(lse, expected[1])


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


# Compiling, errors


@on_every_device
def test_one_graph_serves_all_inputs(device: str) -> None:
    torch._dynamo.reset()
    video, counter = Video(), CompileCounter()
    sizes = torch.tensor(video.sizes, dtype=torch.int32, device=device)

    def layer(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
        chosen = video_sparse_attn(q, k, v, sizes, video.topk, (4, 4, 4), gate)
        return chosen, *block_sparse_attention(q, k, v, blocks, sizes)

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(3):
        inputs = [x.to(device) for x in (*make_inputs(video, torch.bfloat16, seed), random_blocks(video, seed))]
        for one, other in zip(compiled(*inputs), layer(*inputs), strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1


def test_errors_name_the_argument_and_those_of_the_native_call_pass() -> None:
    of_blocks = Video(batch=2)
    q, k, v, gate = make_inputs(of_blocks, torch.float32)
    assert gate is not None
    blocks, sizes = random_blocks(of_blocks), torch.tensor(of_blocks.sizes)

    video = dict(zip("qkv", video_by_heads(), strict=True))

    def sta(**changed: object) -> object:
        given = video | {"window_size": WINDOWS, "text_length": 3, "seq_shape": "5x7x9", "tile": TILE}
        return lambda: sliding_tile_attention(**given | changed)  # type: ignore[arg-type]

    def vsa(**changed: object) -> object:
        given = {"q": q, "k": k, "v": v, "variable_block_sizes": sizes, "topk": 3}
        return lambda: video_sparse_attn(**given | changed)  # type: ignore[arg-type]

    def by_map(**changed: object) -> object:
        given = {"q": q, "k": k, "v": v, "block_map": blocks, "block_sizes": sizes}
        return lambda: block_sparse_attention(**given | changed)  # type: ignore[arg-type]

    assert_expected_inline(
        report(
            {
                "sta: q of rank 3": sta(q=video["q"][0]),
                "sta: a canvas larger than q": sta(seq_shape="50x7x9"),
                "sta: a canvas smaller than q, no text": sta(has_text=False),
                "sta: a canvas in other words": sta(seq_shape="5*7*9"),
                "sta: a window of size 0": sta(window_size=[(1, 3, 1), (3, 0, 1)]),
                "sta: three windows for two heads": sta(window_size=3 * [(1, 3, 1)]),
                "sta: more text than there is": sta(text_length=21),
                "sta: fewer keys": sta(k=video["k"][:, :, 1:]),
                "vsa: q without batch": vsa(q=q[0]),
                "vsa: v of other heads": vsa(v=v[:, :1]),
                "vsa: block of 48": vsa(block_size=(3, 4, 4)),
                "vsa: sizes": vsa(variable_block_sizes=sizes[:5]),
                "vsa: gate without batch": vsa(compress_attn_weight=gate[0]),
                "vsa: topk": vsa(topk=0),
                "map: k": by_map(k=k[0]),
                "map: too many sizes": by_map(block_sizes=sizes.repeat(2)),
                "map: q": by_map(q=q[:, :, :100]),
                "map: columns": by_map(block_map=blocks[..., :5]),
                "map: one batch entry": by_map(block_map=blocks[:1]),
                "map: packed": by_map(block_map=pack_keep_map(blocks)[:, :, :3]),
                "map: packed, elsewhere": by_map(block_map=pack_keep_map(blocks).to("meta")),
                "sta: v of another dtype": sta(v=video["v"].double()),
                "vsa: fp64": vsa(q=q.double(), k=k.double(), v=v.double()),
                "vsa: k of another dtype": vsa(k=k.bfloat16()),
                "map: k of another dtype": by_map(k=k.bfloat16()),
                "map: floats": by_map(block_map=blocks.float()),
                "metadata: grid": lambda: build_vsa_metadata((0, 4, 4)),
                "metadata: tile": lambda: build_vsa_metadata((4, 4, 4), (4, 4)),  # type: ignore[arg-type]
            }
        ),
        """\
sta: q of rank 3 -> ValueError: sliding_tile_attention: q has 3 dimensions, expected 4, [B, H, S, D]
sta: a canvas larger than q -> ValueError: sliding_tile_attention: q has 335 tokens, expected at least 3150, the canvas 50x7x9
sta: a canvas smaller than q, no text -> ValueError: sliding_tile_attention: q has 335 tokens, expected 315, the canvas 5x7x9, as has_text is False
sta: a canvas in other words -> ValueError: sliding_tile_attention: seq_shape is '5*7*9', expected time x height x width in tokens, such as '30x48x80'
sta: a window of size 0 -> ValueError: sliding_tile_map: window_size[1] is (3, 0, 1), expected three integers of at least 1: (time, height, width)
sta: three windows for two heads -> ValueError: sliding_tile.attention: windows has 3 windows, expected 2, one a query head, or one for all
sta: more text than there is -> ValueError: sliding_tile.attention: text_length is 21, expected 0 to 20, the tokens after the canvas
sta: fewer keys -> ValueError: sliding_tile.attention: k has shape [2, 334, 1, 40], expected [B, 335, H, D]: 315 tokens of the canvas and 20 of text
vsa: q without batch -> ValueError: video_sparse_attn: q has 3 dimensions, expected 4, [B, H, S, D]
vsa: v of other heads -> ValueError: video_sparse.attention: v has shape [2, 512, 1, 16], expected [2, 512, 2, 16] like k, as [B, S, H, D]
vsa: block of 48 -> ValueError: video_sparse_attn: block_size is (3, 4, 4): volume is 48 slots, expected a multiple of 64
vsa: sizes -> ValueError: video_sparse.attention: block_sizes has shape [5], expected [8], one size for each block of 64 slots of k
vsa: gate without batch -> ValueError: video_sparse_attn: compress_attn_weight has 3 dimensions, expected 4, [B, H, S, D]
vsa: topk -> ValueError: video_sparse.attention: topk is 0, expected at least 1
map: k -> ValueError: block_sparse_attention: k has 3 dimensions, expected 4, [B, H, S, D]
map: too many sizes -> ValueError: block_sparse.attention: k has 512 slots for 16 block_sizes: volume is 32 slots, expected a multiple of 64
map: q -> ValueError: block_sparse_attention: q has 100 slots, expected a multiple of the 64 of a block of k
map: columns -> ValueError: block_sparse_attention: block_map has shape [2, 2, 8, 5], expected [2, 2, 8, 8] or [2, 8, 8]
map: one batch entry -> ValueError: block_sparse_attention: block_map has shape [1, 2, 8, 8], expected [2, 2, 8, 8] or [2, 8, 8]
map: packed -> ValueError: block_sparse_attention: block_map has shape [2, 2, 3, 1], expected [2, 2, 8, 1], packed
map: packed, elsewhere -> ValueError: block_sparse_attention: block_map is on meta, expected cpu like q
sta: v of another dtype -> TypeError: sliding_tile_attention: v has dtype torch.float64, expected torch.float32 like q
vsa: fp64 -> TypeError: video_sparse_attn: q has dtype torch.float64, expected one of torch.float32, torch.bfloat16, torch.float16
vsa: k of another dtype -> TypeError: video_sparse_attn: k has dtype torch.bfloat16, expected torch.float32 like q
map: k of another dtype -> TypeError: block_sparse_attention: k has dtype torch.bfloat16, expected torch.float32 like q
map: floats -> TypeError: block_sparse_attention: block_map has dtype torch.float32, expected torch.bool or torch.int32
metadata: grid -> ValueError: build_vsa_metadata: shape is (0, 4, 4), expected three integers of at least 1: (time, height, width)
metadata: tile -> ValueError: build_vsa_metadata: tile is (4, 4), expected three integers of at least 1: (time, height, width)""",
    )


def test_what_is_no_tensor_is_named() -> None:
    q = torch.randn(1, 2, 64, 16)
    assert_expected_inline(
        report(
            {
                "sta": lambda: sliding_tile_attention([1], q, q, [(1, 1, 1)], 0, seq_shape="4x4x4"),  # type: ignore[arg-type]
                "map": lambda: block_sparse_attention(q, None, q, torch.ones(1, 2, 1, 1) > 0, torch.tensor([64])),  # type: ignore[arg-type]
                "native": lambda: video_sparse.attention(q, "k", q, torch.tensor([64]), 1),  # type: ignore[arg-type]
            }
        ),
        """\
sta -> TypeError: sliding_tile_attention: q has type list, expected a tensor
map -> TypeError: block_sparse_attention: k has type NoneType, expected a tensor
native -> TypeError: video_sparse.attention: k has type str, expected a tensor""",
    )
