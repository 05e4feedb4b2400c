"""Autocast gives the operators its dtype where it gives it to torch's own attention, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import attention, full_keep_map, merge_attention, skip_attention
from support.inputs import Case, make_qkv, random_map, report

CASE = Case(batch=2, query_len=130, kv_len=300, heads=4, kv_heads=2)
DTYPES = (torch.bfloat16, torch.float16)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_calls(device: str) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Each operator that autocast casts for, its other arguments given: kv_lens, maps and a threshold stay as they are."""
    keep, must_keep = random_map(CASE, 0.5, device=device), random_map(CASE, 0.1, seed=1, device=device)
    lens = torch.tensor([300, 77], dtype=torch.int32, device=device)
    threshold = torch.tensor(-1.0, device=device)
    return {
        "attention": lambda q, k, v: attention(q, k, v, keep=keep, kv_lens=lens),
        "skip_attention": lambda q, k, v: skip_attention(q, k, v, keep, threshold, must_keep=must_keep, kv_lens=lens),
        "the raw operator": lambda q, k, v: torch.ops.lite_attention.attention(q, k, v, keep, lens, 0.125),
    }


def assert_equal(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], name: str) -> None:
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(results, expected, strict=True)), name


@devices
@dtypes
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_queries_keys_and_values_are_cast(device: str, dtype: torch.dtype, mode: Callable[[], object]) -> None:
    q, k, v = make_qkv(CASE, torch.float32, device=device)
    with mode():  # type: ignore[attr-defined]
        for name, call in make_calls(device).items():
            expected = call(q.to(dtype), k.to(dtype), v.to(dtype))
            assert [x.dtype for x in expected[:2]] == [dtype, torch.float32]
            with torch.autocast(device, dtype):
                assert_equal(call(q, k, v), expected, name)
                assert_equal(call(q, k.to(dtype), v.to(dtype)), expected, name)
            if device == "cpu":
                assert call(q, k, v)[0].dtype == torch.float32


@devices
def test_every_dtype_becomes_what_it_becomes_in_torch_s_attention(device: str) -> None:
    qkv = make_qkv(CASE, torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            given = [x.to(dtype) for x in qkv]
            own = scaled_dot_product_attention(*(x.transpose(1, 2) for x in given), enable_gqa=True)
            assert attention(*given)[0].dtype == own.dtype == torch.bfloat16
        doubles = [x.double() for x in qkv]
        assert (
            scaled_dot_product_attention(*(x.transpose(1, 2) for x in doubles), enable_gqa=True).dtype == torch.float64
        )
        with pytest.raises((RuntimeError, NotImplementedError), match="float64"):
            attention(*doubles)


def test_autocast_of_another_device_changes_nothing() -> None:
    q, k, v = make_qkv(CASE, torch.float32)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast does not without a GPU
    try:
        assert attention(q, k, v)[0].dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_merging_is_left_alone() -> None:
    q = make_qkv(CASE, torch.float32)[0]
    lse = torch.zeros(2, 4, 130)
    expected = merge_attention([q], [lse])
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(merge_attention([q], [lse]), expected, "merge_attention")
        text = report({"merge_attention": lambda: merge_attention([q, q.bfloat16()], [lse, lse])})
    assert_expected_inline(
        text,
        """merge_attention -> RuntimeError: merge_attention: outs[1] has dtype bfloat16, expected float32""",
    )


@devices
def test_a_compiled_call_is_one_graph_and_casts_too(device: str) -> None:
    counter = CompileCounter()
    keep = full_keep_map(
        CASE.batch, CASE.heads, CASE.query_len, CASE.kv_len, CASE.head_dim, torch.bfloat16, device=device
    )

    @torch.compile(backend=counter, fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        return skip_attention(q, k, v, keep, threshold)

    q, k, v = make_qkv(CASE, torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        for value in (-3.0, -1.0):
            threshold = torch.tensor(value, device=device)
            expected = skip_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), keep, threshold)
            assert_equal(step(q, k, v, threshold), expected, "compiled")
    assert counter.frame_count == 1


@devices
def test_a_traced_graph_holds_the_casts(device: str) -> None:
    q, k, v = make_qkv(CASE, torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        compiled = torch.compile(lambda *qkv: attention(*qkv), backend="aot_eager", fullgraph=True)
        assert_equal(compiled(q, k, v), attention(q.bfloat16(), k.bfloat16(), v.bfloat16()), "aot_eager")
