"""merge_attention on the GPU against the oracle."""

import math

import pytest
import torch
from torch import Tensor

from lite_attention import merge_attention, reference
from support.inputs import DTYPES, GPU, Case, make_qkv, poisoned_memory

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Run the operator into poisoned memory and compare it with the oracle: one rounding, that of the output."""
    with poisoned_memory(GPU):
        out, lse = merge_attention(outs, lses)
    assert out.dtype == outs[0].dtype
    assert out.shape == outs[0].shape
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    exact_out, exact_lse = reference.merge_attention(outs, lses)
    rounding = torch.finfo(out.dtype).eps * float(exact_out.abs().max())
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=rounding + 1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    return out, lse


def parts_of(case: Case, dtype: torch.dtype, count: int) -> tuple[list[Tensor], list[Tensor]]:
    outs = [make_qkv(case, dtype, seed=part, device=GPU)[0] for part in range(count)]
    lses = [3 * torch.randn(case.batch, case.heads, case.query_len, device=GPU) for _ in range(count)]
    return outs, lses


@dtypes
@pytest.mark.parametrize("parts", [1, 2, 5, 40])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 128, 256])
def test_merging_parts(head_dim: int, parts: int, dtype: torch.dtype) -> None:
    check_merge(*parts_of(Case(batch=2, query_len=333, heads=3, kv_heads=3, head_dim=head_dim), dtype, parts))


@dtypes
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merging_splits_equals_attention_over_all_keys(parts: int, dtype: torch.dtype) -> None:
    case = Case(batch=2, query_len=70, kv_len=500, heads=3, kv_heads=3, head_dim=40)
    q, k, v = make_qkv(case, dtype, "peaked", device=GPU)
    splits = zip(k.tensor_split(parts, 1), v.tensor_split(parts, 1), strict=True)
    pieces = [reference.attention(q, *split, None, None, case.scale) for split in splits]
    out, lse = check_merge([x.to(dtype) for x, _ in pieces], [y.float() for _, y in pieces])
    whole_out, whole_lse = reference.attention(q, k, v, None, None, case.scale)
    rounding = torch.finfo(dtype).eps * float(whole_out.abs().max())
    torch.testing.assert_close(out.double(), whole_out, rtol=0, atol=2 * rounding + 1e-5)
    torch.testing.assert_close(lse.double(), whole_lse, rtol=0, atol=1e-4)


@dtypes
def test_merging_rows_without_keys(dtype: torch.dtype) -> None:
    outs, lses = parts_of(Case(query_len=5, head_dim=8), dtype, 2)
    lses[0][0, 0, 1] = lses[0][0, 1, 2] = lses[1][0, 1, 2] = -math.inf
    outs[0][0, 1, 0] = 0
    out, lse = check_merge(outs, lses)
    assert torch.equal(out[0, 1, 0], outs[1][0, 1, 0])
    assert bool((out[0, 2, 1] == 0).all())
    assert torch.equal(lse == -math.inf, torch.tensor([[[False] * 5, [False, False, True, False, False]]], device=GPU))


@dtypes
def test_strided_parts_and_far_apart_weights(dtype: torch.dtype) -> None:
    outs = [torch.randn(2, 3, 7, 16, device=GPU).to(dtype).transpose(1, 2) for _ in range(3)]
    # Rows that no copy engine could address.
    odd_rows = torch.randn(2, 7, 3, 19, device=GPU).to(dtype)[..., 1:17]
    lses = [torch.randn(7, 3, 2, device=GPU).permute(2, 1, 0) * 100 for _ in range(4)]
    check_merge([*outs, odd_rows], lses)
