"""Tiles of a video: tokens go into tile order and padded slots and come back, on any grid, traced or not."""

import copy
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from lite_attention.maps.video_tiles import Size, VideoTiles, pad_tiles, tile_tokens, unpad_tiles, untile_tokens
from support.inputs import report

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GRIDS: list[tuple[Size, Size]] = [
    ((4, 4, 6), (2, 2, 3)),
    ((5, 7, 9), (2, 3, 4)),
    ((1, 1, 10), (1, 1, 4)),
    ((3, 4, 5), (6, 8, 8)),
    ((2, 9, 3), (1, 4, 3)),
    ((1, 1, 1), (1, 1, 1)),
]
on_grids = pytest.mark.parametrize(("grid", "tile"), GRIDS)
sizes = st.tuples(*3 * [st.integers(1, 9)])


def tokens_by_tile(grid: Size, tile: Size) -> list[list[int]]:
    """The raster indices of each tile's tokens, by the rule itself: tokens sorted by tile, otherwise left in order."""
    places = list(itertools.product(*map(range, grid)))

    def tile_of(token: int) -> Size:
        time, height, width = places[token]
        return time // tile[0], height // tile[1], width // tile[2]

    order = sorted(range(len(places)), key=tile_of)
    return [list(tokens) for _, tokens in itertools.groupby(order, tile_of)]


@on_grids
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_of_a_tile_follow_each_other(grid: Size, tile: Size, device: str) -> None:
    tiles, expected = VideoTiles(grid, tile), tokens_by_tile(grid, tile)
    order = tiles.order(torch.device(device))
    assert order.dtype == torch.int64
    assert order.tolist() == list(itertools.chain.from_iterable(expected))
    assert tiles.positions(torch.device(device))[order].tolist() == list(range(tiles.tokens))


@on_grids
@pytest.mark.parametrize("device", DEVICES)
def test_sizes_count_the_tokens_of_each_tile(grid: Size, tile: Size, device: str) -> None:
    tiles, expected = VideoTiles(grid, tile), tokens_by_tile(grid, tile)
    given_sizes = tiles.sizes(torch.device(device))
    assert given_sizes.dtype == torch.int32
    assert given_sizes.tolist() == [len(tokens) for tokens in expected]
    assert tiles.number == len(expected)
    assert tiles.tokens == sum(map(len, expected))
    assert tiles.exact == all(len(tokens) == tiles.volume for tokens in expected)


@on_grids
@pytest.mark.parametrize("device", DEVICES)
def test_each_tile_owns_a_block_of_slots(grid: Size, tile: Size, device: str) -> None:
    tiles = VideoTiles(grid, tile)
    block = tiles.volume + 3
    slots = tiles.slots(block, torch.device(device)).tolist()
    in_raster = tiles.raster_slots(block, torch.device(device))
    assert in_raster[tiles.order(torch.device(device))].tolist() == slots
    expected = [range(index * block, index * block + len(t)) for index, t in enumerate(tokens_by_tile(grid, tile))]
    assert slots == list(itertools.chain.from_iterable(expected))


@given(sizes, sizes, st.integers(0, 5), st.sampled_from((0, 1, -1)), st.sampled_from((torch.float32, torch.int64)))
def test_tokens_come_back_from_tiles_and_slots(
    grid: Size, tile: Size, spare: int, dim: int, dtype: torch.dtype
) -> None:
    tiles = VideoTiles(grid, tile)
    block = tiles.volume + spare
    x = torch.arange(1, 3 * tiles.tokens + 1).to(dtype).view(3, tiles.tokens, 1).transpose(1, dim)
    tiled = tile_tokens(x, tiles, dim)
    assert torch.equal(untile_tokens(tiled, tiles, dim), x)
    padded = pad_tiles(tiled, tiles, block, dim)
    assert padded.shape[dim] == tiles.number * block
    assert torch.equal(unpad_tiles(padded, tiles, block, dim), tiled)
    assert padded.count_nonzero() == x.numel(), "slots without a token are 0"


def test_tiles_that_fill_their_slots_are_not_copied() -> None:
    tiles = VideoTiles((4, 4, 6), (2, 2, 3))
    x = torch.randn(2, tiles.tokens)
    assert pad_tiles(x, tiles, tiles.volume, 1) is x
    assert unpad_tiles(x, tiles, tiles.volume, 1) is x
    assert pad_tiles(x, tiles, tiles.volume + 1, 1) is not x


def test_gradients_pass() -> None:
    tiles = VideoTiles((2, 3, 3), (2, 2, 2))
    x = torch.randn(2, tiles.tokens, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        padded = pad_tiles(tile_tokens(x, tiles, 1), tiles, 9, 1)
        return untile_tokens(unpad_tiles(padded.square(), tiles, 9, 1), tiles, 1)

    torch.autograd.gradcheck(there_and_back, x)


def doubled_in_slots(x: torch.Tensor, tiles: VideoTiles) -> torch.Tensor:
    padded = pad_tiles(tile_tokens(x, tiles, 1), tiles, tiles.volume + 2, 1)
    return untile_tokens(unpad_tiles(2 * padded, tiles, tiles.volume + 2, 1), tiles, 1)


@pytest.mark.parametrize("held", [False, True], ids=["made-inside", "held-outside"])
@pytest.mark.parametrize(("backend", "dynamic"), [("eager", None), ("eager", True), ("aot_eager", None)])
def test_one_graph_for_the_whole_way_and_no_second_one_for_other_data(
    backend: str, dynamic: bool | None, held: bool
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter() if backend == "eager" else None
    tiles = VideoTiles((5, 7, 9), (2, 3, 4))
    compiled = torch.compile(
        lambda x: doubled_in_slots(x, tiles if held else VideoTiles((5, 7, 9), (2, 3, 4))),
        fullgraph=True,
        backend=counter or backend,
        dynamic=dynamic,
    )
    for step in range(3):
        x = torch.randn(2, 315)
        assert torch.equal(compiled(x), 2 * x)
        assert not tiles._kept._tensors or step > 0, "nothing made while tracing is kept"
        doubled_in_slots(x, tiles)  # fills what the object keeps, which must not matter to the graph
        assert len(tiles._kept._tensors) == 3
    assert counter is None or counter.frame_count == 1


def test_index_tensors_are_made_once_for_each_object() -> None:
    tiles = VideoTiles((5, 7, 9), (2, 3, 4))
    for make in (tiles.order, tiles.positions, tiles.sizes):
        assert make(CPU) is make(CPU)
    assert tiles.slots(24, CPU) is tiles.slots(24, CPU)
    assert tiles.slots(24, CPU) is not tiles.slots(32, CPU)
    assert tiles.slots(24, CPU) is not tiles.raster_slots(24, CPU)
    assert VideoTiles((5, 7, 9), (2, 3, 4)).order(CPU) is not tiles.order(CPU)


def test_index_tensors_go_with_their_object() -> None:
    gc.disable()  # so that a circle of references would show
    try:
        tiles = VideoTiles((5, 7, 9), (2, 3, 4))
        made = (
            tiles.order(CPU),
            tiles.positions(CPU),
            tiles.sizes(CPU),
            tiles.slots(24, CPU),
            tiles.raster_slots(24, CPU),
        )
        tensors = [weakref.ref(x) for x in made]
        del made
        assert all(tensor() is not None for tensor in tensors), "kept while the object lives"
        del tiles
        assert [tensor() for tensor in tensors] == 5 * [None]
    finally:
        gc.enable()


def test_copies_are_equal_and_make_tensors_of_their_own() -> None:
    tiles = VideoTiles((5, 7, 9), (2, 3, 4))
    order = tiles.order(CPU)
    for other in (copy.copy(tiles), copy.deepcopy(tiles), pickle.loads(pickle.dumps(tiles))):
        assert other == tiles
        assert hash(other) == hash(tiles)
        assert not other._kept._tensors
        assert other.order(CPU) is not order
    assert repr(tiles) == "VideoTiles(grid=(5, 7, 9), tile=(2, 3, 4))"


def test_fake_tensors_do_not_stay() -> None:
    tiles = VideoTiles((5, 7, 9), (2, 3, 4))
    with FakeTensorMode():
        assert tile_tokens(torch.empty(2, tiles.tokens), tiles, 1).shape == (2, tiles.tokens)
    assert type(tiles.order(CPU)) is torch.Tensor


def test_what_inference_mode_made_serves_training() -> None:
    tiles = VideoTiles((5, 7, 9), (2, 3, 4))
    with torch.inference_mode():
        tiles.order(CPU)
    x = torch.randn(2, tiles.tokens, requires_grad=True)
    tile_tokens(x, tiles, 1).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], object]] = {
    "grad": lambda of, x: torch.func.grad(lambda x: of(x).sum())(x),
    "jvp": lambda of, x: torch.func.jvp(of, (x,), (x,)),
    "vmap of grad": lambda of, x: torch.vmap(torch.func.grad(lambda x: of(x).sum()))(x[None]),
    "functionalize": lambda of, x: torch.func.functionalize(of)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_transform_made_serves_outside_of_it(transform: str) -> None:
    tiles = VideoTiles((5, 7, 9), (2, 3, 4))
    x = torch.randn(2, tiles.tokens)
    TRANSFORMS[transform](lambda x: untile_tokens(tile_tokens(x, tiles, 1), tiles, 1), x)
    kept = tiles.order(CPU)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)
    assert torch.equal(kept, VideoTiles(tiles.grid, tiles.tile).order(CPU))
    assert torch.equal(copy.deepcopy(kept), kept)
    assert torch.equal(torch.compile(lambda x: x[:, kept], backend="aot_eager")(x), tile_tokens(x, tiles, 1))


@pytest.mark.gpu
def test_each_stream_makes_index_tensors_of_its_own() -> None:
    device, tiles = torch.device("cuda", 0), VideoTiles((5, 7, 9), (2, 3, 4))
    first = tiles.order(device)
    assert tiles.order(torch.device("cuda")) is first, "the current device, by another name"
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what it makes is ready late
        second = tiles.order(device)
        assert second is not first
        assert tiles.order(device) is second
    assert tiles.order(device) is first
    x = torch.arange(tiles.tokens, device=device)
    assert torch.equal(untile_tokens(tile_tokens(x, tiles, 0), tiles, 0), x)
    torch.cuda.synchronize()
    assert torch.equal(second, first)


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True])
def test_a_captured_graph_replays_without_the_object(warm: bool) -> None:
    tiles = VideoTiles((5, 7, 9), (2, 3, 4))
    x = torch.randn(2, tiles.tokens, device="cuda")
    if warm:
        doubled_in_slots(x, tiles)
    torch.cuda.synchronize()
    kept = len(tiles._kept._tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = doubled_in_slots(x, tiles)
    assert len(tiles._kept._tensors) == kept
    del tiles
    torch.empty(2**20, device="cuda").fill_(float("nan"))
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(result, 2 * x)


def test_errors_name_the_argument() -> None:
    tiles = VideoTiles((2, 3, 4), (2, 2, 2))
    calls = {
        "a tile of size 0": lambda: VideoTiles((2, 3, 4), (0, 2, 2)),
        "a grid of two sizes": lambda: VideoTiles((3, 4), (2, 2, 2)),
        "a list": lambda: VideoTiles([2, 3, 4], (2, 2, 2)),
        "a float": lambda: VideoTiles((2, 3, 4), (2, 2, 2.0)),
        "a small block": lambda: tiles.slots(7, CPU),
        "other tokens to tile": lambda: tile_tokens(torch.zeros(2, 25), tiles, 1),
        "other tokens to untile": lambda: untile_tokens(torch.zeros(2, 25), tiles, -1),
        "other tokens to pad": lambda: pad_tiles(torch.zeros(25), tiles, 8, 0),
        "other slots": lambda: unpad_tiles(torch.zeros(2, 24), tiles, 8, 1),
    }
    assert_expected_inline(
        report(calls),
        """\
a tile of size 0 -> ValueError: VideoTiles: tile is (0, 2, 2), expected three integers of at least 1: (time, height, width)
a grid of two sizes -> ValueError: VideoTiles: grid is (3, 4), expected three integers of at least 1: (time, height, width)
a list -> TypeError: VideoTiles: grid is [2, 3, 4], expected a tuple of integers: (time, height, width)
a float -> TypeError: VideoTiles: tile is (2, 2, 2.0), expected a tuple of integers: (time, height, width)
a small block -> ValueError: VideoTiles: block is 7, expected at least 8, the tokens of a tile
other tokens to tile -> ValueError: tile_tokens: x has 25 entries in dimension 1, expected 24, the tokens of the grid 2x3x4
other tokens to untile -> ValueError: untile_tokens: x has 25 entries in dimension -1, expected 24, the tokens of the grid 2x3x4
other tokens to pad -> ValueError: pad_tiles: x has 25 entries in dimension 0, expected 24, the tokens of the grid 2x3x4
other slots -> ValueError: unpad_tiles: x has 24 entries in dimension 1, expected 32, 8 slots for each of 4 tiles""",
    )
