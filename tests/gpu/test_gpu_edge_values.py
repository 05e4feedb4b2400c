"""Values at the edge of what floats hold, on the GPU."""

import math

import pytest
import torch
from torch import Tensor

from lite_attention import attention, reference, skip_attention
from support.inputs import GPU, GPU_DTYPES, Case, check_attention, make_map, make_qkv, poisoned_memory, random_map

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
head_dims = pytest.mark.parametrize("head_dim", [8, 64, 128, 256])


def ones(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(size, dtype=dtype, device=GPU)


def normal(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, device=GPU).to(dtype)


@dtypes
@head_dims
def test_keys_scored_minus_infinity_count_for_nothing(head_dim: int, dtype: torch.dtype) -> None:
    q, k = ones(1, 3, 1, head_dim, dtype=dtype), ones(1, 300, 1, head_dim, dtype=dtype)
    k[:, :128] = -math.inf  # the whole first visited tile
    v = normal(1, 300, 1, head_dim, dtype=dtype)
    wanted = attention(q, k[:, 128:], v[:, 128:])
    full = make_map("every tile", Case(query_len=3, kv_len=300, heads=1, kv_heads=1, head_dim=head_dim), device=GPU)
    for out, lse in (attention(q, k, v), attention(q, k, v, keep=full), skip_attention(q, k, v, full, -1.0)[:2]):
        torch.testing.assert_close(out, wanted[0])
        torch.testing.assert_close(lse, wanted[1])


@dtypes
@head_dims
def test_rows_that_meet_only_minus_infinity_are_empty(head_dim: int, dtype: torch.dtype) -> None:
    q, v = ones(1, 3, 1, head_dim, dtype=dtype), ones(1, 300, 1, head_dim, dtype=dtype)
    with poisoned_memory(GPU):
        out, lse = attention(q, torch.full_like(v, -math.inf), v)
    assert torch.equal(out, torch.zeros_like(q))
    assert bool((lse == -math.inf).all())


@dtypes
@head_dims
def test_tiles_of_minus_infinity_are_decided_as_the_oracle_does(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=3, kv_len=600, heads=1, kv_heads=1, head_dim=head_dim)
    q, k = ones(1, 3, 1, head_dim, dtype=dtype), normal(1, 600, 1, head_dim, dtype=dtype)
    k[:, 128:256] = -math.inf
    k[:, 512:] = -math.inf
    keep, threshold = make_map("every tile", case, device=GPU), torch.tensor(-3.0, device=GPU)
    next_keep = skip_attention(q, k, k, keep, threshold)[2]
    assert torch.equal(next_keep, reference.decisions(q, k, keep, None, None, threshold, case.scale)[0])


@dtypes
@head_dims
def test_every_nan_in_a_key_reaches_the_output(head_dim: int, dtype: torch.dtype) -> None:
    """One batch entry for each of the dtype's NaNs."""
    bits = torch.arange(-(2**15), 2**15, device=GPU).to(torch.int16)
    nans = bits[bits.view(dtype).isnan()]
    k = ones(len(nans), 5, 1, head_dim, dtype=dtype)
    k.view(torch.int16)[:, 2, 0, 1] = nans
    out, lse = attention(ones(len(nans), 1, 1, head_dim, dtype=dtype), k, torch.ones_like(k))
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())


@dtypes
@head_dims
def test_nan_stays_in_the_rows_that_meet_it(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=300, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = make_map("every tile", case, device=GPU)
    tile = 200 * case.tiles()[1] // 320  # of key 200
    keep[:, :, 1:] &= ~(1 << tile)  # only the first query tile computes it
    expected = attention(q, k, v, keep=keep)[0], skip_attention(q, k, v, keep, -1.0)[0]
    q[0, 7, 0, 3] = math.nan
    k[0, 200, 1, 5] = math.nan
    bad = torch.zeros(1, 200, 2, dtype=torch.bool, device=GPU)
    bad[0, 7, 0] = True
    bad[0, :64, 1] = True
    results = attention(q, k, v, keep=keep)[0], skip_attention(q, k, v, keep, -1.0)[0]
    for out, wanted in zip(results, expected, strict=True):
        assert bool(out[bad].isnan().all())
        assert torch.equal(out[~bad], wanted[~bad])


@dtypes
@head_dims
def test_nan_and_infinity_in_values_stay_in_their_column(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=300, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    expected = attention(q, k, v)[0]
    v[0, 100, 0, 2], v[0, 299, 1, 5] = math.nan, math.inf
    out = attention(q, k, v)[0]
    assert bool(out[0, :, 0, 2].isnan().all())
    assert bool((out[0, :, 1, 5] == math.inf).all())
    out[0, :, 0, 2], out[0, :, 1, 5] = expected[0, :, 0, 2], expected[0, :, 1, 5]
    assert torch.equal(out, expected)


@dtypes
@head_dims
def test_what_was_not_visited_is_never_read(head_dim: int, dtype: torch.dtype) -> None:
    """Keys that the map leaves out may be NaN, also where another query tile of the visit group computes them."""
    case = Case(query_len=192, kv_len=640, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    keep = make_map("every tile", case, device=GPU)
    keep[:, :, 1] &= ~3
    expected = skip_attention(q, k, v, keep, -1.0)
    k[:, :64], v[:, :64] = math.nan, math.nan
    out, lse, next_keep = skip_attention(q, k, v, keep, -1.0)
    assert torch.equal(out[:, 64:128], expected[0][:, 64:128])
    assert torch.equal(lse[:, :, 64:128], expected[1][:, :, 64:128])
    assert torch.equal(next_keep[:, :, 1], expected[2][:, :, 1])
    assert bool(out[:, :64].isnan().all())
    assert bool(out[:, 128:].isnan().all())


@dtypes
@head_dims
def test_large_scores_do_not_overflow(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(query_len=200, kv_len=300, head_dim=head_dim)
    q, k, v = make_qkv(case, dtype, device=GPU)
    q, k = q * 100, k * 100
    keep = random_map(case, 0.6, device=GPU) | 1
    for given in (None, keep):
        out, lse = attention(q, k, v, keep=given)
        exact_out, exact_lse = reference.attention(q, k, v, given, None, case.scale)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
        assert float((out - exact_out).abs().max()) < 0.02


@dtypes
@pytest.mark.parametrize("step", [-300.0, 300.0])
def test_running_maxima_may_jump_far(step: float, dtype: torch.dtype) -> None:
    """Scores that fall or rise by more than fp32's exponents from one tile to the next."""
    case = Case(query_len=200, kv_len=1000, head_dim=64)
    q, k, v = make_qkv(case, dtype, device=GPU)
    q[..., 0] = 8.0
    k[..., 0] = step / 8 * (torch.arange(1000, device=GPU) // 128).to(dtype).unsqueeze(-1)
    keep = random_map(case, 0.7, device=GPU) | 1
    for given in (None, keep):
        out, lse = attention(q, k, v, keep=given, scale=1.0)
        check_attention(out, lse, q, k, v, given, None, 1.0)


@dtypes
def test_sums_of_many_small_weights_beside_a_large_one_are_not_lost(dtype: torch.dtype) -> None:
    count = 2**14
    q = ones(1, 1, 1, 8, dtype=dtype)
    k = torch.zeros(1, count + 1, 1, 8, dtype=dtype, device=GPU)
    k[:, 1:, :, 0] = -24 * math.log(2)
    v = torch.zeros_like(k)
    v[:, 1:] = 1.0
    out, lse = attention(q, k, v, scale=1.0)
    check_attention(out, lse, q, k, v, None, None, 1.0)
