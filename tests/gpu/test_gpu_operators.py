"""The Hopper kernels against the oracle: values by the rule of docs/numerics.md, drop decisions bit by bit."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lite_attention import (
    attention,
    full_keep_map,
    merge_attention,
    reference,
    skip_attention,
    tile_shape,
    unpack_keep_map,
)
from lite_attention.maps.keep_map import ceil_div
from support.inputs import (
    GPU,
    GPU_DTYPES,
    KINDS,
    MAPS,
    TIE_SCALE,
    TIE_SCORES,
    TIES,
    Case,
    check_decisions,
    check_dense_or_mapped,
    check_skip_attention,
    correlated_passes,
    make_map,
    make_qkv,
    make_ties,
    poisoned_memory,
    random_map,
)

pytestmark = pytest.mark.gpu

# Around the grain of the map (64 rows; 64 or 128 keys) and the visit groups (128 or 192 rows), and a length beyond.
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 385, 1000)
INSTANTIATED_HEAD_DIMS = (64, 128, 256)
ALL_HEAD_DIMS = range(8, 257, 8)
GROUPS_AND_BATCHES = [
    Case(batch=3, query_len=100, kv_len=333, heads=4, kv_heads=2),
    Case(batch=2, query_len=130, kv_len=260, heads=5, kv_heads=1, head_dim=128),
    Case(batch=1, query_len=400, kv_len=700, heads=6, kv_heads=3, head_dim=256),
    Case(batch=5, query_len=65, kv_len=130, heads=3, kv_heads=3, head_dim=96),
    # More visit groups than a GPU has multiprocessors, for dense attention more pairs of them.
    Case(batch=2, query_len=1000, kv_len=700, heads=40, kv_heads=8),
    Case(batch=2, query_len=1000, kv_len=700, heads=40, kv_heads=8, head_dim=128),
    Case(batch=2, query_len=700, kv_len=500, heads=40, kv_heads=8, head_dim=256),
]

dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
instantiated_head_dims = pytest.mark.parametrize("head_dim", INSTANTIATED_HEAD_DIMS)


def threshold_of(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=GPU)


def lens_of(*lens: int) -> Tensor:
    return torch.tensor(lens, dtype=torch.int32, device=GPU)


def full_map(case: Case) -> Tensor:
    return make_map("every tile", case, device=GPU)


def same_bits(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@dtypes
@instantiated_head_dims
@pytest.mark.parametrize("kv_len", LENGTHS)
@pytest.mark.parametrize("query_len", LENGTHS)
def test_ragged_lengths(query_len: int, kv_len: int, head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=query_len, kv_len=kv_len, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    check_dense_or_mapped(q, k, v, case.scale)
    check_skip_attention(q, k, v, random_map(case, 0.7, device=GPU), threshold_of(-0.5), case.scale)


@dtypes
@pytest.mark.parametrize("head_dim", ALL_HEAD_DIMS)
def test_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=600, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = random_map(case, 0.8, device=GPU)
    check_dense_or_mapped(q, k, v, case.scale)
    check_dense_or_mapped(q, k, v, case.scale, keep=keep)
    _, _, next_keep = check_skip_attention(q, k, v, keep, threshold_of(2.0), case.scale)
    assert torch.equal(next_keep & ~keep, torch.zeros_like(keep))
    assert not torch.equal(next_keep, keep), "the threshold is meant to drop something"


@dtypes
@pytest.mark.parametrize("case", GROUPS_AND_BATCHES, ids=str)
def test_grouped_heads_and_batches(case: Case, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = make_map("unequal densities", case, device=GPU)
    check_dense_or_mapped(q, k, v, case.scale)
    check_dense_or_mapped(q, k, v, case.scale, keep=keep)
    check_skip_attention(q, k, v, keep, threshold_of(-0.5), case.scale)


@dtypes
@instantiated_head_dims
@pytest.mark.parametrize("kind", MAPS)
def test_maps_of_every_kind(kind: str, head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=1000, kv_len=5000, head_dim=head_dim)  # more KV tiles than a word has bits
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = make_map(kind, case, device=GPU)
    check_dense_or_mapped(q, k, v, case.scale, keep=keep)
    check_skip_attention(q, k, v, keep, threshold_of(-0.5), case.scale)


@dtypes
@instantiated_head_dims
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [-math.inf, -10.0, -1.0, 0.0, 1.0, 1e30, math.inf])
def test_thresholds_over_input_distributions(threshold: float, kind: str, head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=260, kv_len=800, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, kind, device=GPU)
    kv_tiles = case.tiles()[1]
    _, _, next_keep = check_skip_attention(q, k, v, full_map(case), threshold_of(threshold), case.scale)
    kept = unpack_keep_map(next_keep, kv_tiles).sum(-1)
    if threshold == -math.inf:
        assert bool((kept == kv_tiles).all())
    elif threshold >= 1e30:
        assert bool((kept == 1).all()), "only the first visited tile stays"


@dtypes
@instantiated_head_dims
def test_each_head_has_its_own_threshold(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=200, kv_len=900, heads=4, kv_heads=2, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, "peaked", device=GPU)
    limits = threshold_of([-math.inf, -6.0, 0.0, math.inf])
    _, _, next_keep = check_skip_attention(q, k, v, full_map(case), limits, case.scale)
    kept = unpack_keep_map(next_keep, case.tiles()[1]).float().mean((0, 2, 3)).tolist()
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 1.0
    spaced = limits.repeat_interleave(3)[::3]
    assert torch.equal(skip_attention(q, k, v, full_map(case), spaced)[2], next_keep)


@dtypes
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_maps_shrink_over_the_passes_of_correlated_inputs(head_dim: int, seed: int, dtype: torch.dtype) -> None:
    case = Case(query_len=1100, kv_len=1300, head_dim=head_dim)
    keep = full_map(case)
    counts = [int(unpack_keep_map(keep, case.tiles()[1]).sum())]
    for q, k, v in correlated_passes(case, dtype, passes=6, seed=seed, device=GPU):
        _, _, next_keep = check_skip_attention(q, k, v, keep, threshold_of(-4.0), case.scale)
        assert torch.equal(next_keep & ~keep, torch.zeros_like(keep)), "a tile came back by itself"
        keep = next_keep
        counts.append(int(unpack_keep_map(keep, case.tiles()[1]).sum()))
    assert counts[-1] < 0.9 * counts[0], "the inputs are meant to drop something"
    assert counts[-1] > 0.05 * counts[0]


@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_the_cpu_kernel_decides_the_same(head_dim: int, kind: str, dtype: torch.dtype) -> None:
    case = Case(query_len=500, kv_len=1500, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, kind)
    for threshold, keep in ((-3.0, random_map(case, 0.8)), (-0.5, make_map("shared by visit group", case))):
        limit = torch.tensor(threshold)
        on_cpu = skip_attention(q, k, v, keep, limit)[2]
        on_gpu = skip_attention(*(x.to(GPU) for x in (q, k, v, keep, limit)))[2].cpu()
        # Both equal the oracle's outside the rounding margin, so each other's.
        for next_keep in (on_cpu, on_gpu):
            visited = check_decisions(next_keep, q, k, keep, None, None, limit, case.scale)
        differ = unpack_keep_map(on_cpu ^ on_gpu, case.tiles()[1]).sum()
        assert differ <= max(1.0, 0.01 * float(visited.sum()))


@dtypes
@instantiated_head_dims
@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 3), (1, 0))), ids=str)
def test_must_keep_broadcasts(sizes: tuple[int, int, int], head_dim: int, dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=450, kv_len=700, heads=3, kv_heads=3, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    batch, heads, query_tiles = sizes
    must_keep = random_map(case, 0.3, 3, (batch, heads, query_tiles or case.tiles()[0]), GPU)
    keep = random_map(case, 0.4, device=GPU)
    _, _, next_keep = check_skip_attention(q, k, v, keep, threshold_of(0.0), case.scale, must_keep=must_keep)
    assert torch.equal(next_keep & must_keep, must_keep.expand_as(keep)), "must-keep tiles stay kept"


@dtypes
@instantiated_head_dims
@pytest.mark.parametrize("kind", MAPS)
def test_must_keep_joins_maps_of_every_kind(kind: str, head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=800, kv_len=1500, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    must_keep = make_map("some rows empty", case, seed=1, device=GPU)
    keep = make_map(kind, case, device=GPU)
    check_skip_attention(q, k, v, keep, threshold_of(0.0), case.scale, must_keep=must_keep)


def test_maps_are_read_by_their_strides() -> None:
    case = Case(batch=2, query_len=250, kv_len=700, heads=3, kv_heads=3, head_dim=32)
    q, k, v = make_qkv(case, torch.bfloat16, device=GPU)
    must_keep = random_map(case, 0.3, sizes=(1, 1, 1), device=GPU).expand(2, 3, 4, -1)
    keep = random_map(case, 0.4, device=GPU).transpose(0, 1).contiguous().transpose(0, 1)
    check_skip_attention(q, k, v, keep, threshold_of(0.0), case.scale, must_keep=must_keep)
    spaced = keep.repeat_interleave(2, -1)[..., ::2]
    assert same_bits(skip_attention(q, k, v, spaced, 0.0), skip_attention(q, k, v, keep, 0.0))


@dtypes
@instantiated_head_dims
@pytest.mark.parametrize("lens", [(700, 700), (300, 129), (1, 0), (0, 640), (64, 65), (0, 0)], ids=str)
def test_keys_at_and_past_kv_lens_do_not_exist(lens: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=330, kv_len=700, heads=2, kv_heads=1, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    kv_lens, keep = lens_of(*lens), random_map(case, 0.7, device=GPU)
    must_keep = random_map(case, 0.3, 1, (1, 1, 1), GPU)
    dense = check_dense_or_mapped(q, k, v, case.scale, kv_lens=kv_lens)
    mapped = check_dense_or_mapped(q, k, v, case.scale, keep=keep, kv_lens=kv_lens)
    skipped = check_skip_attention(q, k, v, keep, threshold_of(-1.0), case.scale, must_keep=must_keep, kv_lens=kv_lens)
    for b, length in enumerate(lens):
        beyond = slice(ceil_div(length, tile_shape(head_dim, dtype)[1]), None)
        passed_on, given = (unpack_keep_map(x, case.tiles()[1])[b, :, :, beyond] for x in (skipped[2], keep))
        assert torch.equal(passed_on, given), "bits of tiles that do not exist are passed on"
        # What lies there counts for nothing, whatever it is.
        k[b, length:], v[b, length:] = math.nan, math.nan
    assert same_bits(attention(q, k, v, kv_lens=kv_lens), dense)
    assert same_bits(attention(q, k, v, keep=keep, kv_lens=kv_lens), mapped)
    assert same_bits(skip_attention(q, k, v, keep, -1.0, must_keep=must_keep, kv_lens=kv_lens), skipped)


def test_kv_lens_beyond_the_keys_are_clamped() -> None:
    case = Case(batch=3, query_len=100, kv_len=300)
    q, k, v = make_qkv(case, torch.bfloat16, device=GPU)
    keep = random_map(case, 0.7, device=GPU)
    wild, clamped = lens_of(-5, 301, 2**31 - 1), lens_of(0, 300, 300)
    assert same_bits(attention(q, k, v, kv_lens=wild), attention(q, k, v, kv_lens=clamped))
    results = [skip_attention(q, k, v, keep, -1.0, kv_lens=lens) for lens in (wild, clamped)]
    assert same_bits(*results)


@dtypes
@instantiated_head_dims
def test_a_query_tile_without_kept_tiles_is_empty(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=300, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = random_map(case, 0.9, device=GPU) | 1
    keep[0, 1, 2] = 0
    with poisoned_memory(GPU):
        results = attention(q, k, v, keep=keep), skip_attention(q, k, v, keep, -1.0)
    for out, lse in (results[0], results[1][:2]):
        assert bool((out[0, 128:192, 1] == 0).all())
        assert bool((lse[0, 1, 128:192] == -math.inf).all())
        assert bool(torch.isfinite(lse[0, 0]).all())
        assert bool(torch.isfinite(lse[0, 1, :128]).all())
    assert bool((results[1][2][0, 1, 2] == 0).all())


@dtypes
@pytest.mark.parametrize("threshold", TIES)
@instantiated_head_dims
def test_a_tile_exactly_at_the_threshold_is_dropped(head_dim: int, threshold: float, dtype: torch.dtype) -> None:
    case, q, k, v = make_ties(head_dim, dtype, GPU)
    _, _, next_keep = skip_attention(q, k, v, full_map(case), threshold_of(threshold), scale=TIE_SCALE)
    kept = unpack_keep_map(next_keep, len(TIE_SCORES))[0, 0, 0].nonzero().flatten()
    assert tuple(kept.tolist()) == TIES[threshold]


@instantiated_head_dims
def test_first_visited_tile_is_always_kept(head_dim: int) -> None:
    case = Case(query_len=600, kv_len=600, head_dim=head_dim)
    q, k, v = make_qkv(case, torch.bfloat16, device=GPU)
    keep = random_map(case, 0.4, device=GPU)
    _, _, next_keep = skip_attention(q, k, v, keep, math.inf)
    _, margins = reference.decisions(q, k, keep, None, None, threshold_of(math.inf), case.scale)
    assert torch.equal(unpack_keep_map(next_keep, case.tiles()[1]), margins == math.inf)


def test_bits_past_the_last_tile_are_ignored_and_cleared() -> None:
    case = Case(query_len=100, kv_len=300)
    q, k, v = make_qkv(case, torch.bfloat16, device=GPU)
    full = full_map(case)
    noisy = full | ~7
    expected = skip_attention(q, k, v, full, -1.0, must_keep=full)
    assert same_bits(skip_attention(q, k, v, noisy, -1.0, must_keep=noisy), expected)
    assert same_bits(attention(q, k, v, keep=noisy), attention(q, k, v, keep=full))


@dtypes
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_strided_views_give_the_same_bits_as_copies(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=450, kv_len=450, heads=2, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = random_map(case, 0.7, device=GPU)
    bhsd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.stack((q, k, v), 3).flatten(2, 3)
    wide = [torch.nn.functional.pad(x, (8, 24))[..., 8:-24] for x in (q, k, v)]
    long = [torch.nn.functional.pad(x, (0, 0, 0, 0, 3, 5))[:, 3:-5] for x in (q, k, v)]
    for views in (bhsd, [fused[:, :, i::3] for i in range(3)], wide, long):
        assert same_bits(attention(*views), attention(q, k, v))
        assert same_bits(attention(*views, keep=keep), attention(q, k, v, keep=keep))
        result = skip_attention(*views, keep, -1.0)
        assert same_bits(result, skip_attention(q, k, v, keep, -1.0))
        assert result[0].is_contiguous()


def test_a_key_and_value_shared_by_the_batch_or_the_heads_need_no_copy() -> None:
    case = Case(batch=3, query_len=70, kv_len=200)
    q, k, v = make_qkv(case, torch.bfloat16, device=GPU)
    for shared in ([x[:1].expand(3, -1, -1, -1) for x in (k, v)], [x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v)]):
        assert same_bits(attention(q, *shared), attention(q, *(x.contiguous() for x in shared)))


@dtypes
@instantiated_head_dims
def test_keys_do_not_depend_on_the_batch_around_them(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(batch=3, query_len=400, kv_len=700, heads=4, kv_heads=2, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = make_map("unequal densities", case, device=GPU)
    dense, together = attention(q, k, v), skip_attention(q, k, v, keep, -1.0)
    for b in range(case.batch):
        entry = slice(b, b + 1)
        alone = skip_attention(q[entry], k[entry], v[entry], keep[entry], -1.0)
        assert same_bits(alone, tuple(x[entry] for x in together))
        assert same_bits(attention(q[entry], k[entry], v[entry]), tuple(x[entry] for x in dense))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0])
def test_scale_acts_on_values_and_decisions(scale: float) -> None:
    case = Case(query_len=100, kv_len=500)
    q, k, v = (x / 4 for x in make_qkv(case, torch.float16, device=GPU))
    check_dense_or_mapped(q, k, v, scale)
    check_skip_attention(q, k, v, full_map(case), threshold_of(-1.0), scale)


def test_scale_is_one_over_root_d_by_default() -> None:
    case = Case(head_dim=40)
    q, k, v = make_qkv(case, torch.bfloat16, device=GPU)
    assert same_bits(attention(q, k, v), attention(q, k, v, scale=1 / math.sqrt(40)))


@dtypes
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_a_map_and_its_complement_merge_to_dense_attention(kept: float, dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=300, kv_len=700, head_dim=128)
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = random_map(case, kept, device=GPU)
    parts = [attention(q, k, v, keep=part) for part in (keep, full_map(case) & ~keep)]
    out, lse = merge_attention(*map(list, zip(*parts, strict=True)))
    exact_out, exact_lse = reference.attention(q, k, v, None, None, case.scale)
    rounding = torch.finfo(dtype).eps * float(exact_out.abs().max())
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=4 * rounding + 1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)


def test_full_keep_map_on_the_gpu_keeps_every_tile() -> None:
    case = Case(query_len=300, kv_len=5000, head_dim=256)
    keep = full_keep_map(1, 2, 300, 5000, 256, torch.bfloat16, GPU)
    assert torch.equal(keep, full_map(case))
