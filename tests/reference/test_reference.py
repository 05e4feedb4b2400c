"""The oracle against what needs no oracle: torch's attention, and the drop rule written as plain loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import full_keep_map, pack_keep_map, reference, tile_shape, unpack_keep_map, visit_rows
from support.inputs import TIE_SCALE, TIE_SCORES, TIES, Case, make_qkv, make_ties, random_map

CASES = [
    Case(query_len=200, kv_len=500, heads=2, kv_heads=1),
    Case(batch=2, query_len=70, kv_len=4300, heads=2, head_dim=40),
    Case(query_len=270, kv_len=150, head_dim=256),
    Case(query_len=1, kv_len=1, head_dim=8),
]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def by_loops(
    q: Tensor, k: Tensor, keep: Tensor, must: Tensor, kv_lens: list[int], threshold: list[float], scale: float
) -> tuple[Tensor, Tensor]:
    """The drop rule as design prose reads: (visited, next map), bool [B, H, query tiles, KV tiles]."""
    batch, query_len, heads, head_dim = q.shape
    tile_m, tile_n = tile_shape(head_dim, q.dtype)
    group = visit_rows(head_dim, q.dtype)
    visited, following = torch.zeros_like(keep), torch.zeros_like(keep)
    for b in range(batch):
        for h in range(heads):
            key = k[b, : kv_lens[b], h // (heads // k.shape[2])].double()
            for i in range(keep.shape[2]):
                rows = q[b, i * tile_m : (i + 1) * tile_m, h].double()
                best = [-math.inf] * len(rows)
                start = (i * tile_m // group * group) * k.shape[1] // query_len // tile_n
                tiles = keep.shape[3]
                first = True
                for j in [*range(start, tiles), *range(start)]:
                    if j * tile_n >= kv_lens[b]:
                        following[b, h, i, j] = keep[b, h, i, j]
                        continue
                    if not (keep[b, h, i, j] or must[b, h, i, j]):
                        continue
                    tile_best = (rows @ key[j * tile_n : (j + 1) * tile_n].T).amax(1).tolist()
                    raised = max(
                        (new - old) * scale * math.log2(math.e) for new, old in zip(tile_best, best, strict=True)
                    )
                    visited[b, h, i, j] = True
                    following[b, h, i, j] = bool(must[b, h, i, j]) or first or raised > threshold[h]
                    best = [max(pair) for pair in zip(tile_best, best, strict=True)]
                    first = False
    return visited, following


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_attention_equals_torch(case: Case) -> None:
    q, k, v = make_qkv(case, torch.float32)
    out, lse = reference.attention(q, k, v, None, None, case.scale)
    torch.testing.assert_close(out, sdpa(q, k, v), atol=1e-12, rtol=0)
    group = case.heads // case.kv_heads
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(group, 2)) * case.scale
    torch.testing.assert_close(lse, scores.exp().sum(-1).log(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_map_and_lengths_act_as_a_mask(case: Case) -> None:
    q, k, v = make_qkv(case, torch.float32)
    keep = random_map(case, 0.6) | 1  # tile 0 stays, so that every row has a key
    kv_lens = torch.tensor([max(1, case.kv_len // (b + 2)) for b in range(case.batch)], dtype=torch.int32)
    tile_m, tile_n = tile_shape(case.head_dim, q.dtype)
    mask = unpack_keep_map(keep, case.tiles()[1]).repeat_interleave(tile_m, 2).repeat_interleave(tile_n, 3)
    mask = mask[:, :, : case.query_len, : case.kv_len] & (torch.arange(case.kv_len) < kv_lens[:, None, None, None])
    out, _ = reference.attention(q, k, v, keep, kv_lens, case.scale)
    torch.testing.assert_close(out, sdpa(q, k, v, mask), atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threshold", ["one", "per head", "keep all", "drop all"])
def test_drop_rule_equals_the_loops(case: Case, threshold: str) -> None:
    q, k, v = make_qkv(case, torch.float32)
    keep, must = random_map(case, 0.7), random_map(case, 0.2, seed=1, sizes=(1, case.heads, 1))
    limit = {
        "one": torch.tensor(-1.0),
        "per head": torch.linspace(-3, 0, case.heads),
        "keep all": torch.tensor(-math.inf),
        "drop all": torch.tensor(math.inf),
    }[threshold]
    for kv_lens in (None, torch.tensor([case.kv_len // 2, 0][: case.batch], dtype=torch.int32)):
        out, lse, next_keep = reference.skip_attention(q, k, v, keep, must, kv_lens, limit, case.scale)
        kept = unpack_keep_map(keep, case.tiles()[1])
        visited, following = by_loops(
            q,
            k,
            kept,
            unpack_keep_map(must, case.tiles()[1]).expand_as(kept),
            [case.kv_len] * case.batch if kv_lens is None else kv_lens.tolist(),
            limit.expand(case.heads).tolist(),
            case.scale,
        )
        assert torch.equal(unpack_keep_map(next_keep, case.tiles()[1]), following)
        _, margins = reference.decisions(q, k, keep, must, kv_lens, limit, case.scale)
        assert torch.equal(margins > -math.inf, visited)
        dense_out, dense_lse = reference.attention(q, k, v, pack_keep_map(visited), kv_lens, case.scale)
        assert torch.equal(out, dense_out)
        assert torch.equal(lse, dense_lse)


@pytest.mark.parametrize("threshold", TIES)
def test_a_tile_exactly_at_the_threshold_is_dropped(threshold: float) -> None:
    case, q, k, _ = make_ties(64, torch.float32)
    keep = full_keep_map(1, 1, case.query_len, case.kv_len, 64, torch.float32)
    next_keep, _ = reference.decisions(q, k, keep, None, None, torch.tensor(threshold), TIE_SCALE)
    kept = unpack_keep_map(next_keep, len(TIE_SCORES))[0, 0, 0].nonzero().flatten()
    assert tuple(kept.tolist()) == TIES[threshold]


def test_a_row_without_keys_gives_zero_and_minus_infinity() -> None:
    case = Case(batch=2, query_len=130)
    q, k, v = make_qkv(case, torch.float32)
    keep = full_keep_map(2, 2, 130, 300, 64, q.dtype)
    keep[0, 1, 1] = 0
    out, lse = reference.attention(q, k, v, keep, torch.tensor([300, 0], dtype=torch.int32), case.scale)
    empty = torch.zeros(2, 2, 130, dtype=torch.bool)
    empty[0, 1, 64:128] = True
    empty[1] = True
    assert torch.equal(lse == -math.inf, empty)
    assert torch.equal((out == 0).all(-1).transpose(1, 2), empty)
    assert not out.isnan().any()


def test_walk_starts_on_the_diagonal_of_the_visit_group() -> None:
    order = reference.visit_order(query_len=400, kv_len=800, tile_m=64, tile_n=128, group_rows=192)
    assert order.tolist() == [
        *[[0, 1, 2, 3, 4, 5, 6]] * 3,  # rows 0..191
        *[[3, 4, 5, 6, 0, 1, 2]] * 3,  # row 192 lies at key 384
        [6, 0, 1, 2, 3, 4, 5],  # row 384 lies at key 768
    ]


def test_computing_in_low_precision_rounds_but_agrees() -> None:
    case = Case()
    q, k, v = make_qkv(case, torch.bfloat16)
    exact, _ = reference.attention(q, k, v, None, None, case.scale)
    rough, _ = reference.attention(q, k, v, None, None, case.scale, compute_dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert 1e-4 < float((rough - exact).abs().max()) < 0.05


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merging_splits_equals_attention_over_all_keys(parts: int) -> None:
    case = Case(batch=2, query_len=50, heads=4)
    q, k, v = make_qkv(case, torch.float32)
    whole = reference.attention(q, k, v, None, None, case.scale)
    pieces = [
        reference.attention(q, key, value, None, None, case.scale)
        for key, value in zip(k.tensor_split(parts, 1), v.tensor_split(parts, 1), strict=True)
    ]
    merged = reference.merge_attention(*zip(*pieces, strict=True))
    torch.testing.assert_close(merged, whole, atol=1e-12, rtol=0)


def test_merging_parts_without_keys() -> None:
    out = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    lse = torch.tensor([[[0.0, 1.0, -math.inf], [0.0, 1.0, 2.0]]], dtype=torch.float64)
    nothing = torch.full_like(lse, -math.inf)
    merged_out, merged_lse = reference.merge_attention([out, torch.zeros_like(out)], [lse, nothing])
    expected = out.clone()
    expected[0, 2, 0] = 0.0
    assert torch.equal(merged_lse, lse)
    assert torch.equal(merged_out, expected)
