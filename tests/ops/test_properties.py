"""Claims that must hold for every shape and map, searched by hypothesis (the profile is in conftest.py)."""

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lite_attention import (
    attention,
    full_keep_map,
    merge_attention,
    pack_keep_map,
    reference,
    skip_attention,
    unpack_keep_map,
)
from lite_attention.maps.ranges import tiles_inside, tiles_touched
from lite_attention.maps.tiles import FINE_TILE_N, UNLIMITED
from support.inputs import DTYPES, Case, check_attention, check_decisions, make_qkv, random_map
from support.masks import ALIGNMENTS, tile_lens

seeds = st.integers(0, 2**16)
densities = st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0))
thresholds = st.one_of(st.sampled_from((-math.inf, 0.0, math.inf)), st.floats(-12, 3, width=32))
dtypes = st.sampled_from(DTYPES)
window_sizes = st.one_of(st.sampled_from((0, 1, UNLIMITED)), st.integers(0, 700))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, group = draw(st.sampled_from(((1, 1), (1, 3), (2, 1), (2, 2))))
    return Case(
        batch=draw(st.integers(1, 3)),
        query_len=draw(st.integers(1, 300)),
        kv_len=draw(st.integers(1, 700)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=8 * draw(st.one_of(st.integers(1, 8), st.sampled_from((12, 16, 17, 32)))),
    )


@st.composite
def masked_cases(draw: st.DrawFn) -> tuple[Case, dict[str, Any]]:
    """A case and the masks of a call of attention: any of those there are, also all at once."""
    case, tile_n, seed = draw(cases()), draw(st.sampled_from((None, FINE_TILE_N))), draw(seeds)
    masks: dict[str, Any] = {"tile_n": tile_n, "causal": draw(st.sampled_from((None, *ALIGNMENTS)))}
    if draw(st.booleans()):
        masks["kv_tile_lens"] = tile_lens(case, tile_n, "cpu", draw(st.sampled_from((None, case.batch))), seed)
    if masks["causal"] is not None and draw(st.booleans()):
        windows = st.lists(st.tuples(window_sizes, window_sizes), min_size=case.heads, max_size=case.heads)
        masks["head_windows"] = torch.tensor(draw(windows), dtype=torch.int32)
    return case, masks


def lens_for(case: Case, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, case.kv_len + 1, (case.batch,), generator=random, dtype=torch.int32)


@given(cases(), dtypes, densities, densities, thresholds, st.booleans(), seeds)
def test_skip_attention_equals_the_oracle(
    case: Case, dtype: torch.dtype, kept: float, must: float, threshold: float, with_lens: bool, seed: int
) -> None:
    q, k, v = make_qkv(case, dtype, seed=seed)
    keep = random_map(case, kept, seed)
    must_keep = random_map(case, must, seed + 1, (1, case.heads, 1)) if must else None
    kv_lens = lens_for(case, seed) if with_lens else None
    limit = torch.tensor(threshold)
    out, lse, next_keep = skip_attention(q, k, v, keep, limit, must_keep=must_keep, kv_lens=kv_lens)
    visited = check_decisions(next_keep, q, k, keep, must_keep, kv_lens, limit, case.scale)
    check_attention(out, lse, q, k, v, pack_keep_map(visited), kv_lens, case.scale)


@given(cases(), dtypes, densities, st.booleans(), seeds)
def test_attention_equals_the_oracle(case: Case, dtype: torch.dtype, kept: float, with_lens: bool, seed: int) -> None:
    q, k, v = make_qkv(case, dtype, seed=seed)
    keep = random_map(case, kept, seed) if kept < 1 else None
    kv_lens = lens_for(case, seed) if with_lens else None
    out, lse = attention(q, k, v, keep=keep, kv_lens=kv_lens)
    check_attention(out, lse, q, k, v, keep, kv_lens, case.scale)


@given(masked_cases(), dtypes, densities, st.booleans(), seeds)
def test_masked_attention_equals_the_oracle(
    masked: tuple[Case, dict[str, Any]], dtype: torch.dtype, kept: float, with_lens: bool, seed: int
) -> None:
    case, masks = masked
    q, k, v = make_qkv(case, dtype, seed=seed)
    keep = random_map(case, kept, seed, tile_n=masks["tile_n"]) if kept < 1 else None
    kv_lens = lens_for(case, seed) if with_lens else None
    out, lse = attention(q, k, v, keep=keep, kv_lens=kv_lens, **masks)
    check_attention(out, lse, q, k, v, keep, kv_lens, case.scale, **masks)


@given(cases(), densities, thresholds, seeds)
def test_a_map_only_shrinks_and_never_empties(case: Case, kept: float, threshold: float, seed: int) -> None:
    keep = random_map(case, kept, seed)
    kv_tiles = case.tiles()[1]
    for step in range(3):
        q, k, v = make_qkv(case, torch.float32, seed=seed + step)
        _, _, following = skip_attention(q, k, v, keep, threshold)
        before, after = unpack_keep_map(keep, kv_tiles), unpack_keep_map(following, kv_tiles)
        assert not (after & ~before).any()
        assert torch.equal(before.any(-1), after.any(-1))
        if threshold == -math.inf:
            assert torch.equal(following, keep)
        keep = following


@given(cases(), st.floats(-8, 0, width=32), seeds)
def test_a_lower_threshold_keeps_more(case: Case, threshold: float, seed: int) -> None:
    q, k, v = make_qkv(case, torch.float32, seed=seed)
    keep = full_keep_map(case.batch, case.heads, case.query_len, case.kv_len, case.head_dim, q.dtype)
    stricter, looser = (skip_attention(q, k, v, keep, limit)[2] for limit in (threshold, threshold - 1))
    assert torch.equal(stricter & looser, stricter)


@given(cases(), densities, seeds)
def test_dropping_what_is_kept_elsewhere_merges_back(case: Case, kept: float, seed: int) -> None:
    """A map and its complement split the keys: the parts merge into dense attention."""
    q, k, v = make_qkv(case, torch.float32, seed=seed)
    keep = random_map(case, kept, seed)
    full = full_keep_map(case.batch, case.heads, case.query_len, case.kv_len, case.head_dim, q.dtype)
    parts = [attention(q, k, v, keep=part) for part in (keep, full & ~keep)]
    out, lse = merge_attention(*map(list, zip(*parts, strict=True)))
    exact_out, exact_lse = reference.attention(q, k, v, None, None, case.scale)
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


@given(cases(), seeds)
def test_keys_do_not_depend_on_the_batch_around_them(case: Case, seed: int) -> None:
    q, k, v = make_qkv(case, torch.float32, seed=seed)
    keep = random_map(case, 0.5, seed)
    together = skip_attention(q, k, v, keep, -1.0)
    for b in range(case.batch):
        alone = skip_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], keep[b : b + 1], -1.0)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_packing_keeps_every_bit(bits: list[bool]) -> None:
    packed = pack_keep_map(torch.tensor(bits))
    assert unpack_keep_map(packed, len(bits)).tolist() == bits
    total = sum(word.bit_count() for word in (w & 0xFFFFFFFF for w in packed.tolist()))
    assert total == sum(bits)


@given(st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=4), seeds)
def test_ranges_of_keys_become_tiles(kv_len: int, pairs: list[tuple[int, int]], seed: int) -> None:
    tile_n = (64, 128)[seed % 2]
    covered = {key for a, b in pairs for key in range(min(a, b), max(a, b)) if key < kv_len}
    tiles = [range(first, min(first + tile_n, kv_len)) for first in range(0, kv_len, tile_n)]
    ranges = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
    assert tiles_touched(ranges, kv_len, tile_n).tolist() == [any(key in covered for key in tile) for tile in tiles]
    assert tiles_inside(ranges, kv_len, tile_n).tolist() == [all(key in covered for key in tile) for tile in tiles]
