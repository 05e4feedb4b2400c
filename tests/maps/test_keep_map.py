"""The keep map: its bits, its sizes, and maps made from ranges of keys."""

import pytest
import torch
from expecttest import assert_expected_inline

from lite_attention import full_keep_map, pack_keep_map, unpack_keep_map
from lite_attention.maps.keep_map import (
    density,
    keep_map_shape,
    kept_tiles,
    parse_ranges,
    tile_counts,
    tiles_inside,
    tiles_touched,
)


def test_tile_j_is_bit_j_mod_32_of_word_j_div_32() -> None:
    for tile in (0, 1, 31, 32, 63, 64):
        keep = torch.zeros(65, dtype=torch.bool)
        keep[tile] = True
        words = pack_keep_map(keep).tolist()
        assert [word & 0xFFFFFFFF for word in words] == [1 << tile % 32 if tile // 32 == w else 0 for w in range(3)]


@pytest.mark.parametrize("kv_tiles", [1, 31, 32, 33, 591])
def test_unpacking_undoes_packing(kv_tiles: int) -> None:
    keep = torch.rand(2, 3, 5, kv_tiles) < 0.5
    packed = pack_keep_map(keep)
    assert packed.dtype == torch.int32
    assert packed.shape == (2, 3, 5, -(-kv_tiles // 32))
    assert torch.equal(unpack_keep_map(packed, kv_tiles), keep)
    assert kept_tiles(packed, kv_tiles) == keep.sum()
    assert kept_tiles(torch.full_like(packed, -1), kv_tiles) == keep.numel(), "bits past the last tile do not count"
    assert float(density(packed, kv_tiles)) == pytest.approx(float(keep.float().mean()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_counts_are_right_in_compiled_code_of_any_size(backend: str) -> None:
    compiled = torch.compile(density, fullgraph=True, dynamic=True, backend=backend)
    for kv_tiles in (31, 63, 64, 95, 96):
        keep = torch.rand(2, 1, 3, kv_tiles) < 0.5
        assert float(compiled(pack_keep_map(keep), kv_tiles)) == pytest.approx(float(keep.float().mean()))


def test_bits_past_the_last_tile_are_zero() -> None:
    full = full_keep_map(1, 1, 64, 33 * 128, 64, torch.bfloat16)
    assert [word & 0xFFFFFFFF for word in full.flatten().tolist()] == [0xFFFFFFFF, 1]


@pytest.mark.parametrize(("head_dim", "tiles"), [(64, (10, 5)), (128, (10, 5)), (136, (10, 10)), (256, (10, 10))])
def test_sizes_follow_the_tile_table(head_dim: int, tiles: tuple[int, int]) -> None:
    assert tile_counts(600, 600, head_dim, torch.bfloat16) == tiles
    shape = keep_map_shape(2, 3, 600, 600, head_dim, torch.bfloat16)
    assert shape == (2, 3, 10, 1)
    full = full_keep_map(2, 3, 600, 600, head_dim, torch.bfloat16)
    assert full.shape == shape
    assert unpack_keep_map(full, tiles[1]).all()
    assert density(full, tiles[1]) == 1


def test_maps_can_be_traced() -> None:
    def round_trip(keep: torch.Tensor) -> torch.Tensor:
        return unpack_keep_map(pack_keep_map(keep), keep.shape[-1])

    keep = torch.rand(2, 70) < 0.5
    assert torch.equal(torch.compile(round_trip, fullgraph=True, backend="aot_eager")(keep), keep)


def test_ranges_are_read_ascending_and_descending() -> None:
    assert parse_ranges([80, 60, 45, 40, 12, 2], 100) == [(60, 80), (40, 45), (2, 12)]
    assert parse_ranges([2, 12, 40, 45, 60, 100], 100) == [(2, 12), (40, 45), (60, 100)]
    assert parse_ranges((), 100) == []


@pytest.mark.parametrize(
    ("ranges", "touched", "inside"),
    [
        ([(0, 1)], [0], []),
        ([(0, 128)], [0], [0]),
        ([(127, 129)], [0, 1], []),
        ([(1, 256)], [0, 1], [1]),
        ([(0, 100), (100, 128)], [0], [0]),  # together they cover the tile
        ([(384, 500)], [3], [3]),  # all the keys of a ragged last tile
        ([(384, 499)], [3], []),
        ([(0, 500)], [0, 1, 2, 3], [0, 1, 2, 3]),
        ([], [], []),
    ],
)
def test_must_do_rounds_outward_and_must_skip_inward(
    ranges: list[tuple[int, int]], touched: list[int], inside: list[int]
) -> None:
    assert tiles_touched(ranges, 500, 128).nonzero().flatten().tolist() == touched
    assert tiles_inside(ranges, 500, 128).nonzero().flatten().tolist() == inside
    as_tensor = torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2)
    assert tiles_touched(as_tensor, 500, 128).nonzero().flatten().tolist() == touched
    assert tiles_inside(as_tensor.flip(-1), 500, 128).nonzero().flatten().tolist() == inside


def test_a_tensor_of_ranges_may_be_padded_and_reach_past_the_end() -> None:
    ranges = torch.tensor([[300, 9999], [0, 0], [77, 77]])
    assert tiles_touched(ranges, 500, 128).tolist() == [False, False, True, True]
    assert tiles_inside(ranges, 500, 128).tolist() == [False, False, False, True]


def error_text(kind: type[Exception], function: object, *arguments: object) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments)  # type: ignore[operator]
    return str(caught.value)


def test_bad_ranges_are_named() -> None:
    texts = [
        error_text(ValueError, parse_ranges, [0, 5, 7], 100),
        error_text(ValueError, parse_ranges, [0, 5, 7, 7], 100),
        error_text(ValueError, parse_ranges, [5, -1], 100),
        error_text(ValueError, parse_ranges, [0, 101], 100, "must_do_list"),
        error_text(TypeError, parse_ranges, [0, 5.0], 100),
        error_text(TypeError, parse_ranges, [True, 5], 100),
        error_text(ValueError, tiles_touched, torch.zeros(4), 100, 64),
    ]
    assert_expected_inline(
        "\n".join(texts),
        """\
ranges has 3 entries, expected an even number: [start, end, start, end, ...] (entry 2, 7, has no partner)
ranges[2:4] is [7, 7], an empty range
ranges[1] is -1, expected a position of at least 0
must_do_list[1] is 101, expected at most the number of keys, 100
ranges[1] is 5.0 of type float, expected an int
ranges[0] is True of type bool, expected an int
ranges has shape [4], expected [count, 2]""",
    )


def test_bad_maps_are_named() -> None:
    texts = [
        error_text(TypeError, pack_keep_map, torch.zeros(1, 5)),
        error_text(TypeError, unpack_keep_map, torch.zeros(1, 5), 130),
        error_text(ValueError, unpack_keep_map, torch.zeros(1, 5, dtype=torch.int32), 100),
    ]
    assert_expected_inline(
        "\n".join(texts),
        """\
pack_keep_map: keep has dtype torch.float32, expected torch.bool
unpack_keep_map: packed has dtype torch.float32, expected torch.int32
unpack_keep_map: packed has 5 words per row, expected 4 for 100 KV tiles""",
    )
