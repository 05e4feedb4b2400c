"""torch.library.opcheck on every operator: schema, fake, autograd registration, tracing with dynamic and static shapes."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lite_attention import attention, full_keep_map
from support.inputs import DTYPES, Case, make_qkv, random_map
from support.opchecks import CHECKS, check, strided

CASE = Case(batch=2, query_len=100, kv_len=300, heads=4, kv_heads=2, head_dim=40)
OPS = torch.ops.lite_attention


def lens() -> Tensor:
    return torch.tensor([300, 77], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_keep", [False, True])
@pytest.mark.parametrize("with_lens", [False, True])
def test_attention(dtype: torch.dtype, with_keep: bool, with_lens: bool) -> None:
    qkv = make_qkv(CASE, dtype)
    keep = random_map(CASE, 0.5) if with_keep else None
    check(OPS.attention.default, *qkv, keep, lens() if with_lens else None, CASE.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_strided(dtype: torch.dtype) -> None:
    check(OPS.attention.default, *strided(make_qkv(CASE, dtype)), random_map(CASE, 0.5), lens(), CASE.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [None, "top-left", "bottom-right"])
@pytest.mark.parametrize("tile_n", [None, 64])
def test_attention_with_masks(dtype: torch.dtype, causal: str | None, tile_n: int | None) -> None:
    keep = random_map(CASE, 0.5, tile_n=tile_n)
    tile_lens = torch.tensor([64, 0, 64, 17, 44] if tile_n else [128, 77, 44], dtype=torch.int32)
    windows = torch.tensor(4 * [[3, 70]], dtype=torch.int32) if causal else None
    masks = {"tile_n": tile_n, "kv_tile_lens": tile_lens, "causal": causal, "head_windows": windows}
    arguments = (*make_qkv(CASE, dtype), keep, lens(), CASE.scale)
    results = opcheck(OPS.attention.default, arguments, masks, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5, 70)], ids=str)
def test_top_k_map(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(OPS.top_k_map.default, torch.randn(shape).to(dtype), 3)
    check(OPS.top_k_map.default, torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]], 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("must_sizes", [None, (1, 1, 1), (2, 4, 2)], ids=str)
@pytest.mark.parametrize("with_lens", [False, True])
def test_skip_attention(dtype: torch.dtype, must_sizes: tuple[int, int, int] | None, with_lens: bool) -> None:
    must_keep = None if must_sizes is None else random_map(CASE, 0.3, seed=1, sizes=must_sizes)
    keep, kv_lens = random_map(CASE, 0.5), lens() if with_lens else None
    check(OPS.skip_attention.default, *make_qkv(CASE, dtype), keep, must_keep, kv_lens, torch.tensor(-1.0), CASE.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skip_attention_strided_with_a_threshold_per_head(dtype: torch.dtype) -> None:
    keep = random_map(CASE, 0.5).transpose(1, 2).contiguous().transpose(1, 2)
    threshold = torch.linspace(-3, 0, 8)[::2]
    check(OPS.skip_attention.default, *strided(make_qkv(CASE, dtype)), keep, None, lens(), threshold, CASE.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_merge_attention(dtype: torch.dtype, parts: int) -> None:
    q, k, v = make_qkv(CASE, dtype)
    outs, lses = map(list, zip(*[attention(q, k, v) for _ in range(parts)], strict=True))
    check(OPS.merge_attention.default, outs, lses)


def test_merge_attention_strided() -> None:
    outs = [torch.randn(2, 4, 100, 40).transpose(1, 2) for _ in range(2)]
    lses = [torch.randn(2, 100, 4).transpose(1, 2) for _ in range(2)]
    check(OPS.merge_attention.default, outs, lses)


def test_inputs_that_require_grad() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(CASE, torch.float32))
    # Not test_aot_dispatch: it asks for the backward, which is an error by design.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    full = full_keep_map(2, 4, 100, 300, 40, q.dtype)
    assert set(opcheck(OPS.attention.default, (q, k, v, None, None, 1.0), test_utils=checks).values()) == {"SUCCESS"}
    arguments = (q, k, v, full, None, None, torch.tensor(-1.0), 1.0)
    assert set(opcheck(OPS.skip_attention.default, arguments, test_utils=checks).values()) == {"SUCCESS"}
