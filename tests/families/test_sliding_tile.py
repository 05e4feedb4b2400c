"""Sliding Tile Attention against a dense mask that the rule of the windows gives token by token."""

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention import attention, ops, tile_shape, unpack_keep_map
from lite_attention.families import sliding_tile
from lite_attention.families.sliding_tile import SlidingTileMap, sliding_tile_map
from support.inputs import GPU, assert_as_good_as_naive, poisoned_memory, report

Size = tuple[int, int, int]

TARGETS = [
    pytest.param("cpu", torch.float32, id="cpu-fp32"),
    pytest.param("cpu", torch.bfloat16, id="cpu-bf16"),
    pytest.param("cpu", torch.float16, id="cpu-fp16"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bf16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-fp16", marks=pytest.mark.gpu),
]
DEVICES = [
    pytest.param("cpu", torch.float32, id="cpu"),
    pytest.param("cuda", torch.bfloat16, id="cuda", marks=pytest.mark.gpu),
]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Video(NamedTuple):
    """One problem. Readable as a pytest id."""

    canvas: Size
    tile: Size
    windows: tuple[Size, ...]
    text: int = 0
    text_length: int | tuple[int, ...] = 0
    kv_heads: int | None = None
    batch: int = 1
    head_dim: int = 64

    def __str__(self) -> str:
        canvas, tile = "x".join(map(str, self.canvas)), "x".join(map(str, self.tile))
        return f"{canvas}-of-{tile}-text{self.text}-B{self.batch}-D{self.head_dim}"

    @property
    def tokens(self) -> int:
        return math.prod(self.canvas) + self.text

    def lengths(self) -> tuple[int, ...]:
        """Text length of each batch entry."""
        return self.text_length if isinstance(self.text_length, tuple) else self.batch * (self.text_length,)

    def make_qkv(self, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, S, H, D]`` each."""
        random = torch.Generator().manual_seed(seed)
        heads = len(self.windows)
        return tuple(
            torch.randn(self.batch, self.tokens, heads, self.head_dim, generator=random).to(device, dtype)
            for heads in (heads, self.kv_heads or heads, self.kv_heads or heads)
        )

    def make_map(self, device: str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> SlidingTileMap:
        given = {
            "window_size": list(self.windows),
            "seq_shape": self.canvas,
            "tile": self.tile,
            "text_tokens": self.text,
            "head_dim": self.head_dim,
            "dtype": dtype,
            "device": device,
        }
        return sliding_tile_map(**given | changes)

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_length: int | tuple[int, ...] | Tensor | None = None,
        scale: float | None = None,
        **changes: Any,
    ) -> tuple[Tensor, Tensor]:
        """The call, its map made anew; changes are those of the map."""
        text_length = self.text_length if text_length is None else text_length
        if isinstance(text_length, tuple):
            text_length = torch.tensor(text_length, dtype=torch.int32, device=q.device)
        windows = self.make_map(q.device, q.dtype, **changes)
        return sliding_tile.attention(q, k, v, windows, text_length, scale=scale)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        """Its out."""
        return self.call(q, k, v, **given)[0]


def tile_of_token(canvas: Size, tile: Size) -> Tensor:
    """int64 ``[tokens, 3]``: the tile of each token along time, height and width, in tile order."""
    places = itertools.product(*map(range, canvas))
    tiles = [tuple(place // size for place, size in zip(where, tile, strict=True)) for where in places]
    return torch.tensor(sorted(tiles))


@functools.cache
def visible(video: Video, window: Size, text_length: int) -> Tensor:
    """bool ``[S, S]``: the keys that each query of a head with this window attends."""
    where = tile_of_token(video.canvas, video.tile)
    pixels = len(where)
    mask = torch.zeros(video.tokens, video.tokens, dtype=torch.bool)
    mask[:pixels, :pixels] = True
    for axis in range(3):
        half, count = window[axis] // 2, math.ceil(video.canvas[axis] / video.tile[axis])
        lowest, highest = half, count - 1 - half
        if lowest <= highest:
            centre = where[:, None, axis].clamp(lowest, highest)
            mask[:pixels, :pixels] &= (centre - where[None, :, axis]).abs() <= half
    mask[pixels:, :pixels] = True
    mask[:, pixels : pixels + text_length] = True
    return mask


def oracle(
    video: Video, q: Tensor, k: Tensor, v: Tensor, compute_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=compute_dtype)
    lse = torch.empty(video.batch, len(video.windows), video.tokens, dtype=compute_dtype)
    group = len(video.windows) // k.shape[2]
    for entry, text_length in enumerate(video.lengths()):
        for head, window in enumerate(video.windows):
            query, key, value = (
                x[entry, :, of].cpu().to(compute_dtype) for x, of in ((q, head), (k, head // group), (v, head // group))
            )
            scores = (query @ key.T) * video.head_dim**-0.5
            scores.masked_fill_(~visible(video, window, text_length), -math.inf)
            out[entry, :, head] = scores.softmax(-1) @ value
            lse[entry, head] = scores.logsumexp(-1)
    return out, lse


def check(video: Video, result: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    out, lse = result
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    exact, naive = oracle(video, q, k, v), oracle(video, q, k, v, q.dtype)
    assert_as_good_as_naive("out", out.cpu(), exact[0], naive[0])
    assert_as_good_as_naive("lse", lse.cpu(), exact[1], naive[1])


# Tiles that fill 64 slots or a multiple of them: in place. At 384 slots the KV tiles have 128 keys, at 192 they have 64.
IN_PLACE = [
    Video((8, 8, 12), (4, 4, 4), ((1, 1, 1), (1, 3, 3)), text=100, text_length=70),
    Video((12, 8, 8), (6, 8, 8), ((1, 1, 1), (3, 3, 1)), text=70, text_length=(0, 70), batch=2, head_dim=128),
    Video((6, 24, 8), (6, 8, 8), ((1, 1, 1), (1, 3, 1), (1, 2, 1)), head_dim=256),
    Video((6, 8, 16), (6, 8, 4), ((1, 1, 3), (1, 1, 1)), text=130, text_length=129, kv_heads=1),
]
# Tiles that do not, and canvases that the tile does not divide.
PADDED = [
    Video((6, 8, 10), (2, 2, 2), ((1, 3, 1), (3, 3, 5)), text=10, text_length=7),
    Video((5, 7, 9), (2, 3, 4), ((1, 3, 1), (3, 3, 2)), text=20, text_length=(20, 5), kv_heads=1, batch=2, head_dim=40),
    Video((5, 9, 9), (4, 4, 8), ((1, 1, 1), (1, 2, 1), (9, 9, 9)), text=70, text_length=(70, 0), batch=2, head_dim=128),
    Video((7, 10, 9), (6, 8, 8), ((1, 1, 1), (1, 1, 2)), text=30, text_length=30),
    Video((13, 9, 7), (6, 8, 8), ((1, 1, 1), (1, 3, 1)), head_dim=256),
    Video((4, 6, 6), (4, 6, 5), ((1, 1, 1),), text=5, text_length=0),
]
on_videos = pytest.mark.parametrize("video", IN_PLACE + PADDED, ids=str)
RAGGED = PADDED[1]


@on_videos
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_equals_the_dense_mask(video: Video, device: str, dtype: torch.dtype) -> None:
    q, k, v = video.make_qkv(device, dtype)
    with poisoned_memory(q.device):
        result = video.call(q, k, v)
    check(video, result, q, k, v)


axes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 8))


@given(axes, axes, axes, st.sampled_from((0, 3)), st.integers(0, 99))
def test_any_canvas_tile_and_window_equals_the_dense_mask(
    canvas: Size, tile: Size, window: Size, text: int, seed: int
) -> None:
    video = Video(canvas, tile, (window,), text, text_length=text // 2, head_dim=8)
    q, k, v = video.make_qkv("cpu", torch.float32, seed)
    check(video, video.call(q, k, v), q, k, v)


def seen_tiles(counts: Size, window: Size) -> Tensor:
    """bool ``[tiles, tiles]`` as the map of a canvas of 4x4x4 tiles says it, which fill a query tile and a KV tile."""
    time, height, width = counts
    sliding = sliding_tile_map(
        window, (4 * time, 4 * height, 4 * width), tile=(4, 4, 4), head_dim=64, dtype=torch.float32
    )
    assert tile_shape(64, torch.float32)[0] == sliding.tile_n == 64
    return unpack_keep_map(sliding.keep, math.prod(counts))[0, 0]


@given(axes, axes)
def test_every_query_of_an_exact_canvas_sees_as_many_tiles(counts: Size, window: Size) -> None:
    expected = math.prod(min(2 * (size // 2) + 1, count) for size, count in zip(window, counts, strict=True))
    assert seen_tiles(counts, window).sum(-1).tolist() == math.prod(counts) * [expected]


def test_border_windows_are_shifted() -> None:
    rows = ["".join(".#"[tile] for tile in row) for row in seen_tiles((1, 1, 6), (1, 1, 3)).tolist()]
    assert rows == ["###...", "###...", ".###..", "..###.", "...###", "...###"]


@pytest.mark.parametrize("even", [2, 4])
def test_an_even_window_counts_as_the_next_odd_one(even: int) -> None:
    assert torch.equal(seen_tiles((1, 1, 7), (1, 1, even)), seen_tiles((1, 1, 7), (1, 1, even + 1)))


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_windows_that_cover_the_canvas_are_dense_attention(device: str, dtype: torch.dtype) -> None:
    video = Video((8, 8, 12), (4, 4, 4), 2 * ((2, 3, 30),), text=100, text_length=100)
    q, k, v = video.make_qkv(device, dtype)
    dense, _ = attention(q, k, v)
    torch.testing.assert_close(video.attend(q, k, v), dense, atol=ROUNDING[dtype], rtol=0)


@pytest.mark.parametrize("video", [IN_PLACE[1], PADDED[2]], ids=str)
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_a_tensor_of_text_lengths_is_one_length_a_batch_entry(video: Video, device: str, dtype: torch.dtype) -> None:
    q, k, v = video.make_qkv(device, dtype)
    together = video.attend(q, k, v)
    for entry, length in enumerate(video.lengths()):
        alone = video.attend(*(x[entry : entry + 1] for x in (q, k, v)), text_length=length)
        torch.testing.assert_close(together[entry : entry + 1], alone, atol=ROUNDING[dtype], rtol=0)


def test_text_lengths_in_a_tensor_are_limited_to_the_text_there_is() -> None:
    video = RAGGED._replace(text_length=(0, 20))
    q, k, v = video.make_qkv("cpu", torch.float32)
    beyond = torch.tensor([-3, 99], dtype=torch.int32)
    assert torch.equal(video.attend(q, k, v, text_length=beyond), video.attend(q, k, v))


@pytest.mark.parametrize("video", [IN_PLACE[0], PADDED[0]], ids=str)
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_text_past_its_length_changes_nothing_but_its_own_rows(video: Video, device: str, dtype: torch.dtype) -> None:
    q, k, v = video.make_qkv(device, dtype)
    out = video.attend(q, k, v)
    used = math.prod(video.canvas) + video.text_length
    for x in (q, k, v):
        x[:, used:] = 100.0
    assert torch.equal(video.attend(q, k, v)[:, :used], out[:, :used])


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_nan_in_a_value_reaches_those_who_see_its_tile(device: str, dtype: torch.dtype) -> None:
    video = RAGGED._replace(windows=((1, 3, 1), (3, 1, 1)))
    q, k, v = video.make_qkv(device, dtype)
    last = math.prod(video.canvas) - 1  # slots without a token repeat it
    v[:, last] = math.nan
    bad = video.attend(q, k, v).isnan().all(-1)
    for head, window in enumerate(video.windows):
        expected = visible(video, window, 0)[:, last]
        assert 0 < expected.sum() < len(expected)
        assert torch.equal(bad[0, :, head].cpu(), expected)


def test_one_window_serves_all_heads() -> None:
    video = Video((5, 7, 9), (2, 3, 4), 3 * ((1, 3, 1),))
    q, k, v = video.make_qkv("cpu", torch.float32)
    out = video.attend(q, k, v)
    assert torch.equal(video.attend(q, k, v, window_size=(1, 3, 1)), out)
    assert torch.equal(video.attend(q, k, v, window_size=3 * [[1, 3, 1]]), out)


def test_the_scale_may_be_given() -> None:
    q, k, v = RAGGED.make_qkv("cpu", torch.float32)
    torch.testing.assert_close(RAGGED.attend(q, k, v, scale=0.5 * 40**-0.5), RAGGED.attend(0.5 * q, k, v))
    assert not torch.allclose(RAGGED.attend(q, k, v, scale=1.0), RAGGED.attend(q, k, v))


@pytest.mark.parametrize("video", IN_PLACE, ids=str)
def test_tiles_that_fill_their_slots_are_attended_in_place(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def recorded(*qkv: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        given.extend(qkv)
        assert arguments["kv_tile_lens"] is None
        assert arguments["tile_n"] == (64 if video.head_dim > 128 or math.prod(video.tile) % 128 else 128)
        return attention(*qkv, **arguments)

    monkeypatch.setattr(ops, "attention", recorded)
    q, k, v = video.make_qkv("cpu", torch.float32)
    video.attend(q, k, v)
    assert [x.data_ptr() for x in given] == [x.data_ptr() for x in (q, k, v)]
    assert [x.stride() for x in given] == [x.stride() for x in (q, k, v)]


def test_query_tiles_without_a_token_have_no_work() -> None:
    video = Video((7, 9, 9), (6, 8, 8), ((3, 3, 3),))
    sliding = video.make_map()
    works = unpack_keep_map(sliding.keep, len(sliding.kv_tile_lens))[0, 0].any(-1)
    tokens = [math.prod(size) for size in itertools.product((6, 1), (8, 1), (8, 1))]
    assert works.tolist() == [64 * part < count for count in tokens for part in range(6)]


@on_videos
def test_a_map_serves_any_batch_and_text_length(video: Video) -> None:
    windows = video.make_map()
    for batch in (1, 2):
        for length in {0, video.text // 2, video.text}:
            other = video._replace(batch=batch, text_length=length)
            q, k, v = other.make_qkv("cpu", torch.float32, seed=length)
            for one, same in zip(sliding_tile.attention(q, k, v, windows, length), other.call(q, k, v), strict=True):
                assert torch.equal(one, same)
    all_text = sliding_tile.attention(q, k, v, windows, video.text)
    for one, same in zip(sliding_tile.attention(q, k, v, windows), all_text, strict=True):
        assert torch.equal(one, same), "by default all text tokens"


@pytest.mark.parametrize("video", [IN_PLACE[0], RAGGED], ids=str)
def test_results_in_slots_become_those_of_tokens(video: Video) -> None:
    windows = video.make_map()
    q, k, v = video.make_qkv("cpu", torch.float32)
    out, lse = sliding_tile.attention_in_slots(q, k, v, windows)
    expected = sliding_tile.attention(q, k, v, windows)
    assert torch.equal(windows.into_tokens(out), expected[0])
    assert torch.equal(windows.into_tokens(lse, dim=2), expected[1])
    if windows.kv_tile_lens is None:
        assert windows.into_tokens(out) is out


def test_a_map_holds_its_tensors_alone() -> None:
    windows = RAGGED.make_map()
    tensors = [weakref.ref(x) for x in windows if isinstance(x, Tensor)]
    assert len(tensors) == 4
    del windows
    assert [tensor() for tensor in tensors] == 4 * [None]


def test_what_inference_mode_made_may_be_saved_for_a_backward() -> None:
    with torch.inference_mode():
        windows = RAGGED.make_map()
    assert not any(x.is_inference() for x in windows if isinstance(x, Tensor))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("video", [IN_PLACE[1], RAGGED], ids=str)
def test_one_graph_whatever_the_tensors_hold(video: Video) -> None:
    counter = CompileCounter()
    compiled = torch.compile(video.attend, fullgraph=True, backend=counter)
    for seed in range(3):
        q, k, v = video.make_qkv("cpu", torch.float32, seed)
        lengths = torch.tensor([seed, video.text - seed], dtype=torch.int32)
        out = compiled(q, k, v, text_length=lengths)
        torch.testing.assert_close(out, video.attend(q, k, v, text_length=lengths))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_gives_the_results_of_eager() -> None:
    q, k, v = RAGGED.make_qkv("cpu", torch.float32)
    torch.testing.assert_close(torch.compile(RAGGED.attend, fullgraph=True)(q, k, v), RAGGED.attend(q, k, v))


@pytest.mark.usefixtures("_fresh_compiler")
def test_one_graph_takes_any_map_of_a_shape() -> None:
    counter = CompileCounter()
    compiled = torch.compile(sliding_tile.attention, fullgraph=True, backend=counter)
    for windows in (((1, 3, 1), (3, 3, 2)), ((1, 1, 1), (1, 2, 1))):
        video = RAGGED._replace(windows=windows)
        q, k, v = video.make_qkv("cpu", torch.float32)
        lengths = torch.tensor(video.text_length, dtype=torch.int32)
        for one, same in zip(compiled(q, k, v, video.make_map(), lengths), video.call(q, k, v), strict=True):
            torch.testing.assert_close(one, same)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_text_lengths_that_are_numbers_cost_two_graphs_in_all() -> None:
    counter = CompileCounter()
    compiled = torch.compile(RAGGED.attend, fullgraph=True, backend=counter)
    q, k, v = RAGGED.make_qkv("cpu", torch.float32)
    for length in (3, 4, 7, 11, 20):
        torch.testing.assert_close(compiled(q, k, v, text_length=length), RAGGED.attend(q, k, v, text_length=length))
    assert counter.frame_count == 2


@pytest.mark.usefixtures("_fresh_compiler")
def test_dynamic_shapes_cost_one_graph() -> None:
    counter = CompileCounter()

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        windows = RAGGED.make_map(q.device, q.dtype, text_tokens=q.shape[1] - 315)
        return sliding_tile.attention(q, k, v, windows, lengths)[0]

    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    for batch, text in ((3, 25), (4, 41), (5, 90)):
        video = RAGGED._replace(batch=batch, text=text, text_length=tuple(range(batch)))
        q, k, v = video.make_qkv("cpu", torch.float32)
        lengths = torch.arange(batch, dtype=torch.int32)
        torch.testing.assert_close(compiled(q, k, v, lengths), video.attend(q, k, v))
    assert counter.frame_count == 1


def test_gradients_are_refused() -> None:
    for video in (IN_PLACE[0], RAGGED):
        q, k, v = video.make_qkv("cpu", torch.float32)
        with pytest.raises(NotImplementedError, match="forward-only"):
            video.attend(q.requires_grad_(), k, v).sum().backward()


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("video", [IN_PLACE[1], RAGGED], ids=str)
@pytest.mark.parametrize("with_map", [True, False])
def test_a_captured_graph_reads_todays_tensors_and_never_waits(video: Video, with_map: bool) -> None:
    q, k, v = video.make_qkv("cuda", torch.bfloat16)
    lengths = torch.tensor(video.text_length, dtype=torch.int32, device=GPU)
    windows = video.make_map("cuda", torch.bfloat16)

    def attend() -> tuple[Tensor, Tensor]:
        if with_map:
            return sliding_tile.attention(q, k, v, windows, lengths)
        return video.call(q, k, v, text_length=lengths)

    torch.cuda.set_sync_debug_mode("error")
    try:
        attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attend()
    for seed in range(3):
        for x, new in zip((q, k, v), video.make_qkv("cuda", torch.bfloat16, seed), strict=True):
            x.copy_(new)
        lengths.copy_(torch.tensor([seed, video.text - seed]))
        graph.replay()
        check(video._replace(text_length=(seed, video.text - seed)), result, q, k, v)


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh_compiler")
def test_inductors_graphs_give_the_bits_of_eager() -> None:
    q, k, v = RAGGED.make_qkv("cuda", torch.bfloat16)
    lengths = torch.tensor(RAGGED.text_length, dtype=torch.int32, device=GPU)
    compiled = torch.compile(RAGGED.attend, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        assert torch.equal(compiled(q, k, v, text_length=lengths), RAGGED.attend(q, k, v, text_length=lengths))


def test_errors_name_the_argument() -> None:
    q, k, v = RAGGED.make_qkv("cpu", torch.float32)
    windows = RAGGED.make_map()

    def attend(**changes: Any) -> Callable[[], object]:
        given = {"q": q, "k": k, "v": v, "windows": windows, "text_length": 3}
        return lambda: sliding_tile.attention(**given | changes)

    def make(**changes: Any) -> Callable[[], object]:
        return lambda: RAGGED.make_map(**changes)

    calls = {
        "a window of size 0": make(window_size=[(1, 3, 1), (3, 0, 1)]),
        "a window of two sizes": make(window_size=(3, 3)),
        "a float in a window": make(window_size=[(1, 3, 1), (3, 1.5, 1)]),
        "no window": make(window_size=[]),
        "a number for windows": make(window_size=3),
        "a canvas in other words": make(seq_shape="5*7*9"),
        "a canvas of two sizes": make(seq_shape="5x63"),
        "an empty canvas": make(seq_shape=(5, 0, 9)),
        "a tile of size 0": make(tile=(2, 3, 0)),
        "less text than none": make(text_tokens=-1),
        "head dim 260": make(head_dim=260),
        "three windows for two heads": attend(windows=RAGGED.make_map(window_size=3 * [(1, 3, 1)])),
        "a map of another canvas": attend(windows=RAGGED.make_map(seq_shape=(4, 4, 4), text_tokens=0)),
        "more text than there is": attend(text_length=21),
        "a negative length": attend(text_length=-1),
        "text lengths of another dtype": attend(text_length=torch.tensor([3, 4])),
        "one text length for two": attend(text_length=torch.tensor([3], dtype=torch.int32)),
        "a float for the text length": attend(text_length=3.0),
        "q of rank 3": attend(q=q[0]),
        "fewer keys": attend(k=k[:, 1:]),
        "v of another head dim": attend(v=v[..., :8]),
    }
    assert_expected_inline(
        report(calls),
        """\
a window of size 0 -> ValueError: sliding_tile_map: window_size[1] is (3, 0, 1), expected three integers of at least 1: (time, height, width)
a window of two sizes -> ValueError: sliding_tile_map: window_size is (3, 3), expected three integers of at least 1: (time, height, width)
a float in a window -> TypeError: sliding_tile_map: window_size[1] is (3, 1.5, 1), expected a tuple of integers: (time, height, width)
no window -> TypeError: sliding_tile_map: window_size is [], expected a window in tiles, or one a query head
a number for windows -> TypeError: sliding_tile_map: window_size is 3, expected a window in tiles, or one a query head
a canvas in other words -> ValueError: sliding_tile_map: seq_shape is '5*7*9', expected time x height x width in tokens, such as '30x48x80'
a canvas of two sizes -> ValueError: sliding_tile_map: seq_shape is '5x63', expected time x height x width in tokens, such as '30x48x80'
an empty canvas -> ValueError: sliding_tile_map: seq_shape is (5, 0, 9), expected three integers of at least 1: (time, height, width)
a tile of size 0 -> ValueError: sliding_tile_map: tile is (2, 3, 0), expected three integers of at least 1: (time, height, width)
less text than none -> ValueError: sliding_tile_map: text_tokens is -1, expected at least 0
head dim 260 -> ValueError: head_dim is 260, expected a multiple of 8 up to 256
three windows for two heads -> ValueError: sliding_tile.attention: windows has 3 windows, expected 2, one a query head, or one for all
a map of another canvas -> ValueError: sliding_tile.attention: q has shape [2, 335, 2, 40], expected [B, 64, H, D]: 64 tokens of the canvas and 0 of text
more text than there is -> ValueError: sliding_tile.attention: text_length is 21, expected 0 to 20, the tokens after the canvas
a negative length -> ValueError: sliding_tile.attention: text_length is -1, expected 0 to 20, the tokens after the canvas
text lengths of another dtype -> ValueError: sliding_tile.attention: text_length has dtype torch.int64 and shape [2], expected torch.int32 and [2], one length a batch entry
one text length for two -> ValueError: sliding_tile.attention: text_length has dtype torch.int32 and shape [1], expected torch.int32 and [2], one length a batch entry
a float for the text length -> TypeError: sliding_tile.attention: text_length has type float, expected int or Tensor
q of rank 3 -> ValueError: sliding_tile.attention: q has shape [335, 2, 40], expected [B, 335, H, D]: 315 tokens of the canvas and 20 of text
fewer keys -> ValueError: sliding_tile.attention: k has shape [2, 334, 1, 40], expected [B, 335, H, D]: 315 tokens of the canvas and 20 of text
v of another head dim -> RuntimeError: attention: v has shape [2, 1748, 1, 8], expected [2, 1748, 1, 40] (k's shape)""",
    )
