"""The keep map: its bits and its sizes."""

import pytest
import torch
from expecttest import assert_expected_inline

from lite_attention import full_keep_map, pack_keep_map, unpack_keep_map
from lite_attention.maps.keep_map import (
    density,
    keep_map_shape,
    kept_tiles,
    tile_counts,
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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
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


def error_text(kind: type[Exception], function: object, *arguments: object) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments)  # type: ignore[operator]
    return str(caught.value)


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
