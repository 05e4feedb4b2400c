"""The CPU kernels against the oracle: values by the rule of docs/numerics.md, drop decisions bit by bit."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lite_attention import attention, full_keep_map, merge_attention, reference, skip_attention, unpack_keep_map
from support.inputs import (
    DTYPES,
    KINDS,
    TIE_SCALE,
    TIE_SCORES,
    TIES,
    Case,
    assert_as_good_as_naive,
    check_attention,
    check_skip_attention,
    correlated_passes,
    make_qkv,
    make_ties,
    random_map,
)

HEAD_DIMS = (8, 40, 64, 72, 96, 128, 136, 192, 256)
RAGGED = [
    Case(query_len=1, kv_len=1),
    Case(query_len=1, kv_len=129),
    Case(query_len=65, kv_len=127),
    Case(query_len=192, kv_len=256),
    Case(query_len=193, kv_len=257),
    Case(query_len=40, kv_len=4200),
    Case(query_len=700, kv_len=20),
    Case(batch=3, query_len=100, kv_len=333, heads=4, kv_heads=2),
    Case(query_len=130, kv_len=260, heads=5, kv_heads=1, head_dim=128),
    Case(query_len=130, kv_len=260, heads=2, head_dim=192),
]


def threshold_of(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dense_attention_at_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=300, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype)
    check_attention(*attention(q, k, v), q, k, v, None, None, case.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_skipping_at_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=600, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype)
    keep = random_map(case, 0.8)
    _, _, next_keep = check_skip_attention(q, k, v, keep, threshold_of(2.0), case.scale)
    assert torch.equal(next_keep & ~keep, torch.zeros_like(keep))
    assert not torch.equal(next_keep, keep), "the threshold is meant to drop something"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_sizes_groups_and_batches(case: Case, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(case, dtype)
    check_attention(*attention(q, k, v), q, k, v, None, None, case.scale)
    keep = random_map(case, 0.5)
    check_attention(*attention(q, k, v, keep=keep), q, k, v, keep, None, case.scale)
    check_skip_attention(q, k, v, keep, threshold_of(-0.5), case.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [-math.inf, -10.0, -1.0, 0.0, 1.0, 1e30, math.inf])
def test_thresholds_over_input_distributions(threshold: float, kind: str, dtype: torch.dtype) -> None:
    case = Case(query_len=260, kv_len=800)
    q, k, v = make_qkv(case, dtype, kind)
    keep = full_keep_map(1, 2, 260, 800, 64, dtype)
    _, _, next_keep = check_skip_attention(q, k, v, keep, threshold_of(threshold), case.scale)
    kept = unpack_keep_map(next_keep, 7).sum(-1)
    if threshold == -math.inf:
        assert bool((kept == 7).all())
    elif threshold >= 1e30:
        assert bool((kept == 1).all()), "only the first visited tile stays"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_several_passes_over_correlated_inputs(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=512, kv_len=512, head_dim=head_dim)
    keep = full_keep_map(1, 2, 512, 512, head_dim, dtype)
    counts = [int(unpack_keep_map(keep, case.tiles()[1]).sum())]
    for q, k, v in correlated_passes(case, dtype, passes=4):
        _, _, next_keep = check_skip_attention(q, k, v, keep, threshold_of(-4.0), case.scale)
        assert torch.equal(next_keep & ~keep, torch.zeros_like(keep)), "a tile came back by itself"
        keep = next_keep
        counts.append(int(unpack_keep_map(keep, case.tiles()[1]).sum()))
    assert counts[-1] < 0.9 * counts[0], "the inputs are meant to drop something"
    assert counts[-1] > 0.1 * counts[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 3), (1, 4))), ids=str)
def test_must_keep_broadcasts(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=250, kv_len=700, heads=3, kv_heads=3, head_dim=32)
    q, k, v = make_qkv(case, dtype)
    must_keep = random_map(case, 0.3, seed=3, sizes=sizes)
    keep = random_map(case, 0.4)
    _, _, next_keep = check_skip_attention(q, k, v, keep, threshold_of(0.0), case.scale, must_keep=must_keep)
    assert torch.equal(next_keep & must_keep, must_keep.expand_as(keep)), "must-keep tiles stay kept"


def test_must_keep_expanded_without_copy_is_read_by_its_strides() -> None:
    case = Case(batch=2, query_len=250, kv_len=700, heads=3, kv_heads=3, head_dim=32)
    q, k, v = make_qkv(case, torch.float32)
    must_keep = random_map(case, 0.3, sizes=(1, 1, 1)).expand(2, 3, 4, -1)
    keep = random_map(case, 0.4).transpose(0, 1).contiguous().transpose(0, 1)
    check_skip_attention(q, k, v, keep, threshold_of(0.0), case.scale, must_keep=must_keep)


@pytest.mark.parametrize("lens", [[700, 700], [300, 129], [1, 0], [0, 640], [0, 0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_at_and_past_kv_lens_do_not_exist(lens: list[int], dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=130, kv_len=700, heads=2, kv_heads=1)
    q, k, v = make_qkv(case, dtype)
    kv_lens = torch.tensor(lens, dtype=torch.int32)
    keep, must_keep = random_map(case, 0.7), random_map(case, 0.3, seed=1, sizes=(1, 1, 1))
    check_attention(*attention(q, k, v, kv_lens=kv_lens), q, k, v, None, kv_lens, case.scale)
    _, _, next_keep = check_skip_attention(
        q, k, v, keep, threshold_of(-1.0), case.scale, must_keep=must_keep, kv_lens=kv_lens
    )
    for b, length in enumerate(lens):
        beyond = slice(-(-length // 128), None)
        passed_on, given = (unpack_keep_map(x, 6)[b, :, :, beyond] for x in (next_keep, keep))
        assert torch.equal(passed_on, given), "bits of tiles that do not exist are passed on"
        # What lies there is not read: NaN would spread.
        k[b, length:], v[b, length:] = math.nan, math.nan
    out, lse, again = skip_attention(q, k, v, keep, -1.0, must_keep=must_keep, kv_lens=kv_lens)
    assert not out.isnan().any()
    assert not lse.isnan().any()
    assert torch.equal(again, next_keep)


def test_each_head_has_its_own_threshold() -> None:
    case = Case(batch=2, query_len=200, kv_len=900, heads=4, kv_heads=2)
    q, k, v = make_qkv(case, torch.bfloat16, "peaked")
    keep = full_keep_map(2, 4, 200, 900, 64, q.dtype)
    per_head = torch.tensor([-math.inf, -7.0, 0.0, math.inf])
    _, _, next_keep = check_skip_attention(q, k, v, keep, per_head, case.scale)
    kept = unpack_keep_map(next_keep, 8).sum((0, 2, 3)).tolist()
    assert kept[0] == 64
    assert kept[0] > kept[1] > kept[2] > kept[3] == 8
    every_other = torch.stack([per_head, per_head], 1)[:, 0]
    assert every_other.stride() == (2,)
    assert torch.equal(skip_attention(q, k, v, keep, every_other)[2], next_keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_tile_without_kept_tiles_is_empty(dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=300)
    q, k, v = make_qkv(case, dtype)
    keep = random_map(case, 0.9) | 1
    keep[0, 1, 2] = 0
    for out, lse in (attention(q, k, v, keep=keep), skip_attention(q, k, v, keep, -1.0)[:2]):
        assert bool((out[0, 128:192, 1] == 0).all())
        assert bool((lse[0, 1, 128:192] == -math.inf).all())
        assert bool(torch.isfinite(lse[0, 0]).all())
        assert bool(torch.isfinite(lse[0, 1, :128]).all())
    assert bool((skip_attention(q, k, v, keep, -1.0)[2][0, 1, 2] == 0).all())


def test_first_visited_tile_is_always_kept() -> None:
    case = Case(query_len=600, kv_len=600)
    q, k, v = make_qkv(case, torch.float32)
    keep = random_map(case, 0.4)
    _, _, next_keep = skip_attention(q, k, v, keep, math.inf)
    order = reference.visit_order(600, 600, 64, 128, 192)
    kept, stays = unpack_keep_map(keep, 5)[0], unpack_keep_map(next_keep, 5)[0]
    for head, tile in itertools.product(range(2), range(10)):
        walk = [j for j in order[tile].tolist() if kept[head, tile, j]]
        assert stays[head, tile].nonzero().flatten().tolist() == walk[:1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", TIES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_tile_exactly_at_the_threshold_is_dropped(head_dim: int, threshold: float, dtype: torch.dtype) -> None:
    case, q, k, v = make_ties(head_dim, dtype)
    keep = full_keep_map(1, 1, case.query_len, case.kv_len, head_dim, dtype)
    _, _, next_keep = skip_attention(q, k, v, keep, threshold_of(threshold), scale=TIE_SCALE)
    kept = unpack_keep_map(next_keep, len(TIE_SCORES))[0, 0, 0].nonzero().flatten()
    assert tuple(kept.tolist()) == TIES[threshold]


def test_bits_past_the_last_tile_are_ignored_and_cleared() -> None:
    case = Case(query_len=100, kv_len=300)
    q, k, v = make_qkv(case, torch.float32)
    full = full_keep_map(1, 2, 100, 300, 64, q.dtype)
    noisy = full | ~7
    expected = skip_attention(q, k, v, full, -1.0, must_keep=full)
    result = skip_attention(q, k, v, noisy, -1.0, must_keep=noisy)
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
    assert torch.equal(attention(q, k, v, keep=noisy)[0], attention(q, k, v)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_give_the_same_bits_as_copies(dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=150, kv_len=150, heads=2)
    q, k, v = make_qkv(case, dtype)
    keep = random_map(case, 0.7)
    expected = skip_attention(q, k, v, keep, -1.0)
    bhsd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.stack((q, k, v), 3).flatten(2, 3)
    wide = [torch.nn.functional.pad(x, (8, 24))[..., 8:-24] for x in (q, k, v)]
    flipped = [x.flip(0).as_strided(x.shape, (x.stride(0), *x.stride()[1:])).flip(0) for x in (q, k, v)]
    for views in (bhsd, [fused[:, :, i::3] for i in range(3)], wide, flipped):
        result = skip_attention(*views, keep, -1.0)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
        assert result[0].is_contiguous()


@pytest.mark.parametrize("gradients", [False, True])
def test_views_that_are_negated_when_they_are_read_give_the_bits_of_what_they_show(gradients: bool) -> None:
    """As the imaginary part of a conjugate is."""
    q, k, v = make_qkv(Case(), torch.float32)
    keep, lens, threshold = random_map(Case(), 0.5), torch.tensor([200], dtype=torch.int32), torch.tensor(-1.0)
    shown = (q, k, v, keep, lens, threshold)
    lazy = [torch._neg_view(-x) for x in shown]
    lazy[0] = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert all(x.is_neg() for x in lazy)

    def results(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, lens: Tensor, threshold: Tensor) -> list[Tensor]:
        out, lse = attention(q, k, v, keep=keep, kv_lens=lens)
        skipping = skip_attention(q, k, v, keep, threshold, must_keep=keep[:, :, :1], kv_lens=lens)
        return [out, lse, *skipping, *merge_attention([q, out], [lse, lse])]

    with torch.set_grad_enabled(gradients):
        for result, expected in zip(results(*lazy), results(*shown), strict=True):
            assert torch.equal(result, expected)


def test_a_key_and_value_shared_by_the_batch_need_no_copy() -> None:
    case = Case(batch=3, query_len=70, kv_len=200)
    q, k, v = make_qkv(case, torch.float32)
    shared = [x[:1].expand(3, -1, -1, -1) for x in (k, v)]
    result = attention(q, *shared)
    expected = attention(q, *(x.contiguous() for x in shared))
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0])
def test_scale_acts_on_values_and_decisions(scale: float) -> None:
    case = Case(query_len=100, kv_len=500)
    q, k, v = (x / 4 for x in make_qkv(case, torch.float32))
    keep = full_keep_map(1, 2, 100, 500, 64, q.dtype)
    check_skip_attention(q, k, v, keep, threshold_of(-1.0), scale)


def test_scale_is_one_over_root_d_by_default() -> None:
    case = Case(head_dim=40)
    q, k, v = make_qkv(case, torch.float32)
    assert torch.equal(attention(q, k, v)[0], attention(q, k, v, scale=1 / math.sqrt(40))[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    case = Case(query_len=64, kv_len=300)
    q, k, v = make_qkv(case, dtype)
    q, k = q * 100, k * 100
    out, lse = attention(q, k, v)
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(lse).all())
    exact_out, exact_lse = reference.attention(q, k, v, None, None, case.scale)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
    assert float((out - exact_out).abs().max()) < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_bits_in_every_run_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=333, kv_len=700, heads=4, kv_heads=2)
    q, k, v = make_qkv(case, dtype)
    keep = random_map(case, 0.6)
    threads = torch.get_num_threads()
    expected = skip_attention(q, k, v, keep, -1.0)
    parts = [expected[0], expected[0] * 2], [expected[1], expected[1] + 1]
    merged = merge_attention(*parts)
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            result = skip_attention(q, k, v, keep, -1.0)
            assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
            assert all(torch.equal(x, y) for x, y in zip(merge_attention(*parts), merged, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipping_with_a_full_map_computes_the_dense_bits(dtype: torch.dtype) -> None:
    case = Case(query_len=300, kv_len=650)
    q, k, v = make_qkv(case, dtype)
    keep = full_keep_map(1, 2, 300, 650, 64, dtype)
    dense = attention(q, k, v, keep=keep)
    skipping = skip_attention(q, k, v, keep, -10.0)
    assert torch.equal(dense[0], skipping[0])
    assert torch.equal(dense[1], skipping[1])
    without_map = attention(q, k, v)
    assert_as_good_as_naive("out", without_map[0], dense[0], dense[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merging_splits_equals_attention_over_all_keys(parts: int, dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=70, kv_len=500, heads=3, kv_heads=3, head_dim=40)
    q, k, v = make_qkv(case, dtype, "peaked")
    pieces = [attention(q, x, y) for x, y in zip(k.tensor_split(parts, 1), v.tensor_split(parts, 1), strict=True)]
    outs, lses = map(list, zip(*pieces, strict=True))
    out, lse = merge_attention(outs, lses)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact_out, exact_lse = reference.merge_attention(outs, lses)
    rounding = torch.finfo(dtype).eps * float(exact_out.abs().max())
    assert float((out - exact_out).abs().max()) <= rounding + 1e-6
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-6)
    whole_out, whole_lse = reference.attention(q, k, v, None, None, case.scale)
    assert float((out - whole_out).abs().max()) <= 4 * rounding + 1e-5
    torch.testing.assert_close(lse.double(), whole_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_rows_without_keys(dtype: torch.dtype) -> None:
    outs = [torch.randn(1, 5, 2, 8).to(dtype) for _ in range(2)]
    lses = [torch.randn(1, 2, 5) for _ in range(2)]
    lses[0][0, 0, 1] = lses[0][0, 1, 2] = lses[1][0, 1, 2] = -math.inf
    outs[0][0, 1, 0] = 0
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out[0, 1, 0], outs[1][0, 1, 0])
    assert bool((out[0, 2, 1] == 0).all())
    assert torch.equal(lse == -math.inf, torch.tensor([[[False] * 5, [False, False, True, False, False]]]))
    assert not out.isnan().any()


def test_merging_strided_parts_and_far_apart_weights() -> None:
    outs = [torch.randn(2, 3, 7, 16).transpose(1, 2) for _ in range(3)]
    lses = [torch.randn(7, 3, 2).permute(2, 1, 0) * 100 for _ in range(3)]
    out, lse = merge_attention(outs, lses)
    exact = reference.merge_attention(outs, lses)
    torch.testing.assert_close(out.double(), exact[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=0)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_the_rows_that_meet_it(dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=300)
    q, k, v = make_qkv(case, dtype)
    keep = full_keep_map(1, 2, 200, 300, 64, dtype)
    keep[:, :, 1:] &= ~2  # only the first query tile computes keys 128 to 255
    expected = attention(q, k, v, keep=keep)[0]
    q[0, 7, 0, 3] = math.nan
    k[0, 200, 1, 5] = math.nan
    bad = torch.zeros(1, 200, 2, dtype=torch.bool)
    bad[0, 7, 0] = True
    bad[0, :64, 1] = True
    for out in (attention(q, k, v, keep=keep)[0], skip_attention(q, k, v, keep, -1.0)[0]):
        assert bool(out[bad].isnan().all())
        assert torch.equal(out[~bad], expected[~bad])
