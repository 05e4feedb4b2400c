"""Values at the edge of what floats hold, and sizes at the edge of what memory holds."""

import math

import pytest
import torch

from lite_attention import attention, full_keep_map, reference, skip_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_scored_minus_infinity_count_for_nothing(dtype: torch.dtype) -> None:
    q = torch.ones(1, 3, 1, 8, dtype=dtype)
    k = torch.ones(1, 300, 1, 8, dtype=dtype)
    k[:, :128] = -math.inf  # the whole first visited tile
    v = torch.randn(1, 300, 1, 8).to(dtype)
    out, lse = attention(q, k, v)
    wanted = attention(q, k[:, 128:].contiguous(), v[:, 128:].contiguous())
    torch.testing.assert_close(out, wanted[0])
    torch.testing.assert_close(lse, wanted[1])


def test_a_score_of_infinity_makes_its_row_nan() -> None:
    """As docs/numerics.md has it; in the lse the reference is infinite where the kernels are NaN."""
    q, k, v = torch.ones(1, 2, 1, 8), torch.ones(1, 300, 1, 8), torch.randn(1, 300, 1, 8)
    q[:, 1] = 0.0
    q[:, 1, :, 0] = -1.0
    k[:, 200, :, 0] = math.inf  # +inf to the first row, -inf to the second
    out, lse = attention(q, k, v)
    exact, exact_lse = reference.attention(q, k, v, None, None, scale=8**-0.5)
    assert bool(torch.cat([out[:, 0], exact[:, 0]]).isnan().all())
    assert math.isnan(float(lse[0, 0, 0]))
    assert float(exact_lse[0, 0, 0]) == math.inf
    torch.testing.assert_close(lse[0, 0, 1].double(), exact_lse[0, 0, 1].double())  # the other row is as ever


def test_rows_that_meet_only_minus_infinity_are_empty() -> None:
    q, v = torch.ones(1, 3, 1, 8), torch.ones(1, 300, 1, 8)
    out, lse = attention(q, torch.full((1, 300, 1, 8), -math.inf), v)
    assert torch.equal(out, torch.zeros_like(q))
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_minus_infinity_are_decided_as_the_oracle_does(dtype: torch.dtype) -> None:
    q = torch.ones(1, 3, 1, 8, dtype=dtype)
    k = torch.randn(1, 600, 1, 8).to(dtype)
    k[:, 128:256] = -math.inf
    k[:, 512:] = -math.inf
    keep = full_keep_map(1, 1, 3, 600, 8, dtype)
    threshold = torch.tensor(-3.0)
    next_keep = skip_attention(q, k, k, keep, threshold)[2]
    assert torch.equal(next_keep, reference.skip_attention(q, k, k, keep, None, None, threshold, 8**-0.5)[2])


def test_every_nan_in_a_key_reaches_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    payloads = torch.randint(1, 0x7FFFFF, (200,), generator=generator, dtype=torch.int32) | 0x7F800000
    for bits in torch.cat((payloads, payloads | -0x80000000)):
        k = torch.ones(1, 5, 1, 8)
        k.view(torch.int32)[0, 2, 0, 1] = bits
        out, lse = attention(torch.ones(1, 1, 1, 8), k, torch.ones(1, 5, 1, 8))
        assert bool(out.isnan().all()), hex(int(bits))
        assert bool(lse.isnan().all()), hex(int(bits))


@pytest.mark.parametrize("scale", [1e39, 1e-60, 1e-45])
def test_scale_that_fp32_cannot_hold_is_refused(scale: float) -> None:
    q = torch.ones(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match=r"attention: scale is .*, expected a number above 0 that is finite in fp32"):
        attention(q, q, q, scale=scale)


@pytest.mark.parametrize("exponent", [33, 48, 59])
def test_more_keys_than_any_machine_holds_are_refused(exponent: int) -> None:
    q = torch.ones(1, 1, 1, 8)
    k = q.expand(1, 2**exponent, 1, 8)
    with pytest.raises(RuntimeError, match=f"attention: k has length {2**exponent}, expected at most 2147483648"):
        attention(q, k, k)


def test_kv_lens_may_be_expanded() -> None:
    q, k = torch.randn(3, 5, 1, 8), torch.randn(3, 200, 1, 8)
    one = torch.tensor([130], dtype=torch.int32)
    expanded = attention(q, k, k, kv_lens=one.expand(3))
    repeated = attention(q, k, k, kv_lens=one.repeat(3))
    assert torch.equal(expanded[0], repeated[0])


def test_what_lies_past_kv_lens_is_never_read() -> None:
    q, k = torch.randn(1, 5, 1, 8), torch.randn(1, 200, 1, 8)
    lens = torch.tensor([130], dtype=torch.int32)
    out = attention(q, k, k, kv_lens=lens)[0]
    k[:, 130:] = math.nan
    assert torch.equal(attention(q, k, k, kv_lens=lens)[0], out)


def test_sums_of_many_small_weights_beside_a_large_one_are_not_lost() -> None:
    """One key of weight 1 and 2**14 of weight 2**-24: added one by one in fp32, the small ones would all vanish."""
    count, small = 2**14, 2.0**-24
    q = torch.ones(1, 1, 1, 8)
    k = torch.zeros(1, count + 1, 1, 8)
    k[:, 1:, :, 0] = math.log(small)
    v = torch.zeros_like(k)
    v[:, 1:] = 1.0
    out, lse = attention(q, k, v, scale=1.0)
    total = 1 + count * small
    assert abs(float(lse) - math.log(total)) < 2e-5
    assert abs(float(out[0, 0, 0, 0]) - count * small / total) < 2e-5
