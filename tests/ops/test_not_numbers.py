"""NaN and infinities: NaN never drops a tile, and V of a key that a row does not see does as little as it can."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lite_attention import (
    attention,
    full_keep_map,
    pack_keep_map,
    reference,
    skip_attention,
    tile_shape,
    unpack_keep_map,
)
from lite_attention.maps.tiles import FINE_TILE_N
from support.inputs import TIE_SCALE, Case, poisoned_memory, random_map

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEAD_DIMS = (8, 64, 72, 128, 136, 256)
# Rows 200 to 255 do not exist: some of them share a warp, or a vector, with rows that do.
CASE = Case(batch=2, query_len=200, kv_len=677, heads=2, kv_heads=1)
KV_LENS = (677, 530)
devices = pytest.mark.parametrize("device", DEVICES)
head_dims = pytest.mark.parametrize("head_dim", HEAD_DIMS)
tile_grains = pytest.mark.parametrize("tile_n", [None, FINE_TILE_N])


def dtypes_on(device: str) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16, torch.float16)


def whole_numbers(head_dim: int, dtype: torch.dtype, device: str, falling: bool = False) -> tuple[Tensor, Tensor]:
    """Queries and keys whose scores no backend rounds. The first column of q is 1.

    With ``falling`` the scores fall by so much from tile to tile that a threshold of 0 drops all but the first.
    """
    random = torch.Generator().manual_seed(0)
    q = torch.randint(-3, 4, (CASE.batch, CASE.query_len, CASE.heads, head_dim), generator=random)
    k = torch.randint(-3, 4, (CASE.batch, CASE.kv_len, CASE.kv_heads, head_dim), generator=random)
    q[..., 0] = 1
    if falling:
        tile_n = tile_shape(head_dim, dtype)[1]
        q[..., 1:], k[..., 0] = 0, -torch.arange(CASE.kv_len).div(tile_n, rounding_mode="floor").view(-1, 1)
    return q.to(dtype).to(device), k.to(dtype).to(device)


SPOILS = {
    "NaN in every query": lambda q, k: q.fill_(math.nan),
    "NaN in a row": lambda q, k: q[:, 70, :, 1].fill_(math.nan),
    "NaN in the last row": lambda q, k: q[:, -1, :, 1].fill_(math.nan),
    "NaN in a key": lambda q, k: k[:, 300, :, 1].fill_(math.nan),
    "NaN in every key": lambda q, k: k.fill_(math.nan),
    "NaN in a key of one batch entry": lambda q, k: k[1, 10, 0, 1].fill_(math.nan),
    "NaN in keys that do not exist": lambda q, k: k[1, KV_LENS[1] :].fill_(math.nan),
    "a key of infinity": lambda q, k: k[:, 300, :, 0].fill_(math.inf),
    "two keys of infinity": lambda q, k: k[:, 100:600:400, :, 0].fill_(math.inf),
    "a key of minus infinity": lambda q, k: k[:, 300, :, 0].fill_(-math.inf),
    "tiles of minus infinity": lambda q, k: k[:, 128:400, :, 0].fill_(-math.inf),
    "only minus infinity": lambda q, k: k[..., 0].fill_(-math.inf),
    "keys of both infinities": lambda q, k: k[:, 64:640, :, 0].fill_(math.inf)[:, ::2].neg_(),
    "a row of infinities": lambda q, k: q[:, 70, :, 1].fill_(math.inf),
}


@devices
@head_dims
@pytest.mark.parametrize("threshold", [0.0, -1.0])
@pytest.mark.parametrize("spoil", SPOILS)
def test_decisions_are_the_oracles(spoil: str, threshold: float, head_dim: int, device: str) -> None:
    case = CASE._replace(head_dim=head_dim)
    kv_lens = torch.tensor(KV_LENS, dtype=torch.int32, device=device)
    limit = torch.tensor(threshold, device=device)
    keep = random_map(case, 0.7, device=device)
    must_keep = random_map(case, 0.1, seed=1, device=device)
    for dtype in dtypes_on(device):
        q, k = whole_numbers(head_dim, dtype, device)
        SPOILS[spoil](q, k)
        with poisoned_memory(q.device):
            next_keep = skip_attention(
                q, k, k.nan_to_num(), keep, limit, must_keep=must_keep, kv_lens=kv_lens, scale=TIE_SCALE
            )[2]
        expected = reference.decisions(q, k, keep, must_keep, kv_lens, limit, TIE_SCALE)[0]
        assert torch.equal(next_keep, expected), dtype


@devices
@head_dims
@pytest.mark.parametrize("spoilt", ["q", "k", "both"])
def test_what_is_all_nan_drops_nothing(spoilt: str, head_dim: int, device: str) -> None:
    case = CASE._replace(head_dim=head_dim)
    keep = random_map(case, 0.7, device=device)
    for dtype in dtypes_on(device):
        q, k = whole_numbers(head_dim, dtype, device)
        for x in {"q": (q,), "k": (k,), "both": (q, k)}[spoilt]:
            x.fill_(math.nan)
        assert torch.equal(skip_attention(q, k, torch.ones_like(k), keep, 0.0)[2], keep)


@devices
@head_dims
def test_a_row_of_nan_keeps_what_its_query_tile_visits(head_dim: int, device: str) -> None:
    keep = full_keep_map(CASE.batch, CASE.heads, CASE.query_len, CASE.kv_len, head_dim, torch.bfloat16, device=device)
    for dtype in dtypes_on(device):
        q, k = whole_numbers(head_dim, dtype, device, falling=True)
        whole = skip_attention(q, k, k, keep, 0.0)[2]
        q[0, 70, 1, 5] = math.nan
        spoilt = skip_attention(q, k, k, keep, 0.0)[2]
        assert torch.equal(spoilt[0, 1, 1], keep[0, 1, 1])
        assert not torch.equal(whole[0, 1, 1], keep[0, 1, 1])
        spoilt[0, 1, 1] = whole[0, 1, 1]
        assert torch.equal(spoilt, whole)


@devices
@head_dims
def test_from_a_key_of_nan_on_every_tile_is_kept(head_dim: int, device: str) -> None:
    """Query tile 0 walks upwards from tile 0; the second last tile gets the key."""
    keep = full_keep_map(CASE.batch, CASE.heads, CASE.query_len, CASE.kv_len, head_dim, torch.bfloat16, device=device)
    for dtype in dtypes_on(device):
        q, k = whole_numbers(head_dim, dtype, device, falling=True)
        tile_n = tile_shape(head_dim, dtype)[1]
        tiles = -(-CASE.kv_len // tile_n)
        k[:, (tiles - 2) * tile_n + 3] = math.nan
        kept = unpack_keep_map(skip_attention(q, k, torch.ones_like(k), keep, 0.0)[2], tiles)[:, :, 0]
        assert bool(kept[..., [0, -2, -1]].all())
        assert not kept[..., 1:-2].any()


@pytest.mark.gpu
def test_a_threshold_of_nan_keeps_everything_on_the_gpu() -> None:
    """Which cannot refuse it without waiting; the CPU does."""
    keep = full_keep_map(1, 1, 200, 1000, 64, torch.bfloat16, device="cuda")
    q, k = (torch.randn(1, length, 1, 64, dtype=torch.bfloat16, device="cuda") for length in (200, 1000))
    assert torch.equal(skip_attention(q, k, k, keep, torch.tensor(math.nan, device="cuda"))[2], keep)


@devices
@head_dims
@tile_grains
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_see_no_key_give_zero_whatever_values_hold(
    value: float, tile_n: int | None, head_dim: int, device: str
) -> None:
    for dtype in dtypes_on(device):
        q = torch.randn(2, 200, 4, head_dim).to(dtype).to(device)
        k = torch.randn(2, 130, 2, head_dim).to(dtype).to(device)
        v = torch.full_like(k, value)
        windows = torch.tensor([[0, 0], [0, 2**31 - 1], [0, 0], [3, 5]], dtype=torch.int32, device=device)
        keys = torch.tensor([100, 0], dtype=torch.int32, device=device)
        no_keys = torch.zeros(-(-130 // (tile_n or tile_shape(head_dim, dtype)[1])), dtype=torch.int32, device=device)
        for arguments, no_key in (
            ({"causal": "bottom-right"}, lambda row, head, entry: row < 70),
            ({"causal": "bottom-right", "kv_lens": keys}, lambda row, head, entry: (row < 100) | (entry == 1)),
            ({"causal": "top-left", "head_windows": windows}, lambda row, head, entry: head % 2 == 0),
            ({"kv_lens": keys}, lambda row, head, entry: entry == 1),
            ({"kv_tile_lens": no_keys}, lambda row, head, entry: row >= 0),
        ):
            with poisoned_memory(q.device):
                out, lse = attention(q, k, v, tile_n=tile_n, **arguments)  # type: ignore[arg-type]
            row, head, entry = (torch.arange(size, device=device) for size in (200, 4, 2))
            empty = no_key(row, head[:, None], entry[:, None, None]).expand(2, 4, 200)
            assert torch.equal(lse == -math.inf, empty)
            assert bool((out.transpose(1, 2)[empty] == 0).all())
            assert not out.transpose(1, 2)[~empty].isfinite().any()


@devices
@head_dims
@tile_grains
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hidden_value_reaches_only_rows_whose_query_tile_computes_its_kv_tile(
    value: float, tile_n: int | None, head_dim: int, device: str
) -> None:
    """And of those the ones that see it, at least; a row that does not see it has the lse it had."""
    query_len, kv_len = 300, 500
    for dtype, key in itertools.product(dtypes_on(device), (0, 130, 257, 499)):
        tile_m, keys = tile_shape(head_dim, dtype)[0], tile_n or tile_shape(head_dim, dtype)[1]
        q = torch.randn(1, query_len, 2, head_dim).to(dtype).to(device)
        k, v = (torch.randn(1, kv_len, 2, head_dim).to(dtype).to(device) for _ in range(2))
        windows = torch.tensor([[0, 2**31 - 1], [3, 50]], dtype=torch.int32, device=device)
        spoilt = v.clone()
        spoilt[:, key] = value
        masks = {"tile_n": tile_n, "causal": "bottom-right", "head_windows": windows}
        out, lse = attention(q, k, v, **masks)  # type: ignore[arg-type]
        with poisoned_memory(q.device):
            result, result_lse = attention(q, k, spoilt, **masks)  # type: ignore[arg-type]
        assert torch.equal(lse, result_lse)
        for head in range(2):
            sees = reference.visible_keys(query_len, kv_len, kv_len, "bottom-right", windows[head], q.device)
            first = key // keys * keys
            some_row_sees = sees[:, first : first + keys].any(1)
            padded = torch.nn.functional.pad(some_row_sees, (0, -query_len % tile_m)).view(-1, tile_m)
            computes = padded.any(1).repeat_interleave(tile_m)[:query_len]
            assert not result[0, sees[:, key], head].isfinite().any()
            assert torch.equal(result[0, ~computes, head], out[0, ~computes, head])


@devices
@head_dims
def test_values_of_tiles_left_out_reach_nothing(head_dim: int, device: str) -> None:
    for dtype in dtypes_on(device):
        q = torch.randn(1, 64, 1, head_dim).to(dtype).to(device)
        k, v = (torch.randn(1, 700, 1, head_dim).to(dtype).to(device) for _ in range(2))
        tile_n = tile_shape(head_dim, dtype)[1]
        kept = torch.arange(-(-700 // tile_n), device=device) % 3 == 1
        keep = pack_keep_map(kept.view(1, 1, 1, -1))
        expected = skip_attention(q, k, v, keep, -1.0)
        v[:, ~kept.repeat_interleave(tile_n)[:700]] = math.nan
        with poisoned_memory(q.device):
            results = skip_attention(q, k, v, keep, -1.0)
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)


def test_to_the_oracle_a_key_that_a_row_does_not_see_is_nothing() -> None:
    q, k, v = (torch.randn(1, 200, 1, 64) for _ in range(3))
    out, lse = reference.attention(q, k, v, None, None, 0.125, causal="top-left")
    v[:, 100] = math.nan
    spoilt = reference.attention(q, k, v, None, None, 0.125, causal="top-left")
    assert torch.equal(spoilt[1], lse)
    torch.testing.assert_close(spoilt[0][:, :100], out[:, :100], rtol=0, atol=1e-14)
    assert bool(spoilt[0][:, 100:].isnan().all())
