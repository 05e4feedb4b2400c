"""KV tiles of 64 keys, lengths of KV tiles, causal masks and sink-and-window heads: both backends against the oracle."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lite_attention import attention, pack_keep_map, reference, tile_shape
from lite_attention.maps.tiles import FINE_TILE_N, UNLIMITED
from lite_attention.ops import CausalAlignment
from support.inputs import KINDS, Case, check_attention, check_dense_or_mapped, make_qkv, random_map
from support.masks import ALIGNMENTS, tile_lens, windows_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEAD_DIMS = (64, 72, 128, 136, 256)
CASES = [
    Case(query_len=1, kv_len=1),
    Case(query_len=1, kv_len=700),
    Case(query_len=65, kv_len=127, head_dim=128),
    Case(query_len=192, kv_len=256, head_dim=128),
    Case(query_len=193, kv_len=257, head_dim=40),
    Case(query_len=600, kv_len=600, head_dim=128),
    Case(query_len=300, kv_len=1000, head_dim=64),
    Case(query_len=1000, kv_len=130, head_dim=64),
    Case(batch=3, query_len=333, kv_len=500, heads=4, kv_heads=2),
    Case(batch=2, query_len=260, kv_len=260, heads=5, kv_heads=1, head_dim=128),
    Case(query_len=260, kv_len=500, heads=4, kv_heads=2, head_dim=192),
]
devices = pytest.mark.parametrize("device", DEVICES)
tile_grains = pytest.mark.parametrize("tile_n", [None, FINE_TILE_N])


def dtypes_on(device: str) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16, torch.float16)


def test_the_oracle_sees_what_the_rule_says() -> None:
    for query_len, kv_len, keys, alignment, (sink, recent) in itertools.product(
        (1, 7, 12), (9, 12), (0, 5, 9), ALIGNMENTS, ((0, UNLIMITED), (2, 3), (0, 0), (3, 1), (20, 0))
    ):
        window = torch.tensor([sink, recent], dtype=torch.int32)
        seen = reference.visible_keys(query_len, kv_len, keys, alignment, window, torch.device("cpu"))
        for row, key in itertools.product(range(query_len), range(kv_len)):
            position = row if alignment == "top-left" else row + keys - query_len
            distance = position - key  # 0: the row's own key
            assert bool(seen[row, key]) == (distance >= 0 and (key < sink or distance < recent))


def test_the_oracle_leaves_out_keys_that_tiles_do_not_have() -> None:
    q, k, v = make_qkv(Case(query_len=3, kv_len=300, heads=1, kv_heads=1), torch.float32)
    lens = torch.tensor([64, 0, 5, 64, 44], dtype=torch.int32)
    exists = torch.cat([torch.arange(64), torch.arange(128, 133), torch.arange(192, 256), torch.arange(256, 300)])
    expected = reference.attention(q, k[:, exists], v[:, exists], None, None, 0.125)
    result = reference.attention(q, k, v, None, None, 0.125, tile_n=64, kv_tile_lens=lens)
    torch.testing.assert_close(result, expected)


@devices
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("density", [0.1, 0.7])
def test_maps_of_64_keys(head_dim: int, density: float, device: str) -> None:
    case = Case(query_len=300, kv_len=1100, heads=2, kv_heads=1, head_dim=head_dim)
    for dtype in dtypes_on(device):
        q, k, v = make_qkv(case, dtype, device=device)
        keep = random_map(case, density, device=device, tile_n=FINE_TILE_N)
        check_dense_or_mapped(q, k, v, case.scale, keep=keep, tile_n=FINE_TILE_N)


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps_of_64_keys_over_ragged_sizes(case: Case, device: str) -> None:
    q, k, v = make_qkv(case, torch.bfloat16, "peaked", device=device)
    check_dense_or_mapped(q, k, v, case.scale, tile_n=FINE_TILE_N)
    keep = random_map(case, 0.4, device=device, tile_n=FINE_TILE_N)
    kv_lens = torch.arange(case.batch, device=device, dtype=torch.int32) * 77 + case.kv_len // 2
    kv_lens = kv_lens.clamp(max=case.kv_len)
    check_dense_or_mapped(q, k, v, case.scale, keep=keep, kv_lens=kv_lens, tile_n=FINE_TILE_N)


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
@tile_grains
def test_lengths_of_kv_tiles(tile_n: int | None, case: Case, device: str) -> None:
    q, k, v = make_qkv(case, torch.bfloat16, device=device)
    for seed, batch in enumerate((None, case.batch)):
        lens = tile_lens(case, tile_n, device, batch, seed)
        check_dense_or_mapped(q, k, v, case.scale, tile_n=tile_n, kv_tile_lens=lens)
        keep = random_map(case, 0.5, device=device, tile_n=tile_n)
        kv_lens = torch.full((case.batch,), case.kv_len * 2 // 3, device=device, dtype=torch.int32)
        check_dense_or_mapped(q, k, v, case.scale, keep=keep, kv_lens=kv_lens, tile_n=tile_n, kv_tile_lens=lens)


@devices
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@tile_grains
def test_keys_that_tiles_do_not_have_may_hold_anything(tile_n: int | None, head_dim: int, device: str) -> None:
    case = Case(query_len=400, kv_len=900, head_dim=head_dim)
    q, k, v = make_qkv(case, torch.bfloat16, device=device)
    lens = tile_lens(case, tile_n, device)
    keys = tile_n or tile_shape(head_dim, torch.bfloat16)[1]
    missing = torch.arange(900, device=device) % keys >= lens.repeat_interleave(keys)[:900]
    assert missing.any()
    spoilt = [x.masked_fill(missing[:, None, None], float("nan")) for x in (k, v)]
    zeroed = [x.masked_fill(missing[:, None, None], 0.0) for x in (k, v)]
    out, lse = attention(q, *spoilt, tile_n=tile_n, kv_tile_lens=lens)
    check_attention(out, lse, q, *zeroed, None, None, case.scale, tile_n=tile_n, kv_tile_lens=lens)


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("causal", ALIGNMENTS)
@tile_grains
def test_causal(tile_n: int | None, causal: CausalAlignment, case: Case, device: str) -> None:
    for dtype in dtypes_on(device)[-2:]:
        q, k, v = make_qkv(case, dtype, device=device)
        check_dense_or_mapped(q, k, v, case.scale, tile_n=tile_n, causal=causal)


@devices
@pytest.mark.parametrize("causal", ALIGNMENTS)
def test_causal_positions_follow_the_existing_keys(causal: CausalAlignment, device: str) -> None:
    case = Case(batch=4, query_len=200, kv_len=500, heads=2, kv_heads=1, head_dim=128)
    q, k, v = make_qkv(case, torch.bfloat16, device=device)
    kv_lens = torch.tensor([500, 321, 100, 0], dtype=torch.int32, device=device)
    _, lse = check_dense_or_mapped(q, k, v, case.scale, kv_lens=kv_lens, causal=causal)
    if causal == "bottom-right":  # row 100 of 200 is at the first of 100 keys
        assert bool((lse[2, :, :100] == -torch.inf).all())
        assert bool(lse[2, :, 100:].isfinite().all())


@devices
@pytest.mark.parametrize("case", CASES[3:10:2], ids=str)
@pytest.mark.parametrize("causal", ALIGNMENTS)
@pytest.mark.parametrize("window", [(4, 32), (0, 1), (128, 256), (130, 0), (0, 0), (2000, 3)], ids=str)
@tile_grains
def test_sink_and_window(
    tile_n: int | None, window: tuple[int, int], causal: CausalAlignment, case: Case, device: str
) -> None:
    q, k, v = make_qkv(case, torch.bfloat16, device=device)
    windows = windows_of(case.heads, device, window)
    check_dense_or_mapped(q, k, v, case.scale, tile_n=tile_n, causal=causal, head_windows=windows)


@devices
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_different_windows_in_one_launch(kind: str, head_dim: int, device: str) -> None:
    case = Case(batch=2, query_len=450, kv_len=600, heads=6, kv_heads=3, head_dim=head_dim)
    q, k, v = make_qkv(case, torch.bfloat16, kind, device=device)
    windows = windows_of(6, device, (4, 100), (0, UNLIMITED), (300, 17))
    out, lse = check_dense_or_mapped(q, k, v, case.scale, causal="bottom-right", head_windows=windows)
    for head in range(6):
        alone = attention(
            q[:, :, head : head + 1],
            k[:, :, head // 2 : head // 2 + 1],
            v[:, :, head // 2 : head // 2 + 1],
            causal="bottom-right",
            head_windows=windows[head : head + 1],
        )
        assert torch.equal(out[:, :, head], alone[0][:, :, 0])
        assert torch.equal(lse[:, head], alone[1][:, 0])


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
@tile_grains
def test_everything_at_once(tile_n: int | None, case: Case, device: str) -> None:
    q, k, v = make_qkv(case, torch.bfloat16, device=device)
    masks: dict[str, Any] = {
        "keep": random_map(case, 0.7, device=device, tile_n=tile_n),
        "kv_lens": torch.full((case.batch,), case.kv_len - case.kv_len // 5, device=device, dtype=torch.int32),
        "kv_tile_lens": tile_lens(case, tile_n, device, case.batch),
        "head_windows": windows_of(case.heads, device, (40, 200), (0, UNLIMITED)),
    }
    for causal in ALIGNMENTS:
        check_dense_or_mapped(q, k, v, case.scale, tile_n=tile_n, causal=causal, **masks)


@devices
def test_tables_of_any_strides(device: str) -> None:
    case = Case(batch=2, query_len=300, kv_len=700, heads=4, kv_heads=2, head_dim=128)
    q, k, v = make_qkv(case, torch.bfloat16, device=device)
    lens, windows = tile_lens(case, None, device, 2), windows_of(4, device, (4, 100), (0, 77))
    keep = random_map(case, 0.6, sizes=(1, 1, 5), device=device)
    expected = attention(
        q,
        k,
        v,
        keep=keep.expand(2, 4, -1, -1).contiguous(),
        kv_tile_lens=lens,
        causal="top-left",
        head_windows=windows,
    )
    result = attention(
        q,
        k,
        v,
        keep=keep.expand(2, 4, -1, -1),
        kv_tile_lens=lens.repeat_interleave(3, 1)[:, ::3],
        causal="top-left",
        head_windows=windows.T.contiguous().T,
    )
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


@devices
def test_a_tile_wholly_seen_and_the_same_tile_masked_give_the_same_bits(device: str) -> None:
    """A window that hides nothing takes the masked way through tiles; the result must not depend on the way."""
    case = Case(query_len=640, kv_len=640, heads=2, kv_heads=2, head_dim=128)
    q, k, v = make_qkv(case, torch.bfloat16, device=device)
    causal = attention(q, k, v, causal="top-left")
    # Row 639 sees 639 + 1 keys: recent sizes from 640 on hide nothing.
    windows = windows_of(2, device, (0, 640))
    for x, y in zip(attention(q, k, v, causal="top-left", head_windows=windows), causal, strict=True):
        assert torch.equal(x, y)


def map_of_visible_tiles(case: Case, causal: CausalAlignment, tile_n: int) -> Tensor:
    seen = reference.visible_keys(case.query_len, case.kv_len, case.kv_len, causal, None, torch.device("cpu"))
    query_tiles, kv_tiles = case.tiles(tile_n=tile_n)
    padded = torch.nn.functional.pad(seen, (0, kv_tiles * tile_n - case.kv_len, 0, query_tiles * 64 - case.query_len))
    return pack_keep_map(padded.view(query_tiles, 64, kv_tiles, tile_n).any(3).any(1).expand(1, case.heads, -1, -1))


@devices
@pytest.mark.parametrize("tile_n", [64, 128])
@pytest.mark.parametrize("causal", ALIGNMENTS)
def test_a_map_of_the_visible_tiles_changes_nothing(causal: CausalAlignment, tile_n: int, device: str) -> None:
    case = Case(query_len=500, kv_len=700, head_dim=128)
    q, k, v = make_qkv(case, torch.bfloat16, device=device)
    keep = map_of_visible_tiles(case, causal, tile_n).to(device)
    with_map = attention(q, k, v, keep=keep, tile_n=tile_n, causal=causal)
    without = attention(q, k, v, tile_n=tile_n, causal=causal)
    assert all(torch.equal(x, y) for x, y in zip(with_map, without, strict=True))
