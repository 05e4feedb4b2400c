"""The gradient of merge_attention against torch's autograd of the oracle."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import merge_attention, reference
from support.inputs import DTYPES, Case, make_qkv
from support.opchecks import CHECKS

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SHAPE = (2, 70, 3, 40)


def make_parts(
    count: int, dtype: torch.dtype = torch.float32, device: str = "cpu", spread: float = 2.0
) -> tuple[list[Tensor], list[Tensor]]:
    batch, length, heads, _ = SHAPE
    outs = [torch.randn(SHAPE, device=device).to(dtype).requires_grad_() for _ in range(count)]
    lses = [(spread * torch.randn(batch, heads, length, device=device)).requires_grad_() for _ in range(count)]
    return outs, lses


def make_dresults(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = SHAPE
    return torch.randn(SHAPE, device=device).to(dtype), torch.randn(batch, heads, length, device=device)


def gradients(
    merge: Callable[..., tuple[Tensor, Tensor]],
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
) -> list[Tensor]:
    """Of every out, then of every lse."""
    asked = [(y, grad.to(y.dtype)) for y, grad in zip(merge(outs, lses), (dout, dlse), strict=True) if grad is not None]
    inputs = [*outs, *lses]
    grads = torch.autograd.grad([y for y, _ in asked], inputs, [grad for _, grad in asked], allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]


def check(outs: list[Tensor], lses: list[Tensor], dout: Tensor | None, dlse: Tensor | None) -> list[Tensor]:
    """The operator's gradients, found to be the oracle's: computed in fp32, rounded once."""
    got = gradients(merge_attention, outs, lses, dout, dlse)
    expected = gradients(reference.merge_attention, outs, lses, dout, dlse)
    for grad, exact, given in zip(got, expected, [*outs, *lses], strict=True):
        assert (grad.dtype, grad.shape) == (given.dtype, given.shape)
        largest = float(exact.abs().max())
        allowed = (torch.finfo(grad.dtype).eps + 1e-5) * largest + 1e-6
        torch.testing.assert_close(grad.double(), exact.double(), rtol=0, atol=allowed)
    return got


@devices
@dtypes
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_equals_autograd_of_the_oracle(device: str, dtype: torch.dtype, parts: int, through: str) -> None:
    dout, dlse = make_dresults(dtype, device)
    outs, lses = make_parts(parts, dtype, device)
    grads = check(outs, lses, None if through == "lse" else dout, None if through == "out" else dlse)
    assert all(bool((grad != 0).any()) for grad in grads[: parts if through != "lse" else 0])


@devices
def test_parts_of_any_strides_and_far_apart_weights(device: str) -> None:
    outs, lses = make_parts(3, device=device, spread=100.0)
    outs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in outs]
    lses = [x.detach().mT.contiguous().mT.requires_grad_() for x in lses]
    dout = torch.randn(SHAPE[0], 1, SHAPE[2], 1, device=device).expand(SHAPE)
    check(outs, lses, dout, torch.ones((), device=device).expand(lses[0].shape))


@devices
@dtypes
def test_rows_without_keys_give_no_gradient(device: str, dtype: torch.dtype) -> None:
    outs, lses = make_parts(3, dtype, device)
    with torch.no_grad():
        for lse in lses:
            lse[0, 1, 5:9] = -math.inf  # rows that saw no key in any part
        lses[1][1, :, :30] = -math.inf  # and rows that saw none in one of them
    grads = check(outs, lses, *make_dresults(dtype, device))
    for part in range(3):
        assert not grads[part][0, 5:9, 1].any()
        assert not grads[3 + part][0, 1, 5:9].any()
    assert not grads[1][1, :30].any()
    assert not grads[4][1, :, :30].any()
    # Whatever the rows of an empty part hold, they are not looked at.
    with torch.no_grad():
        outs[1][1, :30] = math.nan
    again = gradients(merge_attention, outs, lses, *make_dresults(dtype, device))
    assert not any(bool(grad.isnan().any()) for grad in again)


def test_an_empty_part_changes_no_gradient_of_the_others() -> None:
    outs, lses = make_parts(2)
    dresults = make_dresults()
    alone = gradients(merge_attention, outs, lses, *dresults)
    empty = torch.full(SHAPE, math.nan), torch.full_like(lses[0], -math.inf)
    dout, dlse = dresults
    results = merge_attention([*outs, empty[0]], [*lses, empty[1]])
    beside = torch.autograd.grad(results, [*outs, *lses], [dout, dlse])
    torch.testing.assert_close(list(beside), alone, rtol=1e-6, atol=1e-6)


def test_a_part_used_twice_and_parts_that_need_no_gradient() -> None:
    outs, lses = make_parts(2)
    dout, dlse = make_dresults()
    outs[1].requires_grad_(False)
    arguments = [outs[0], outs[1], outs[0]], [lses[0], lses[1], lses[0]]
    got = torch.autograd.grad(merge_attention(*arguments), [outs[0], *lses], [dout, dlse])
    exact = torch.autograd.grad(reference.merge_attention(*arguments), [outs[0], *lses], [dout.double(), dlse.double()])
    for grad, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_can_be_differentiated() -> None:
    outs, lses = make_parts(3)
    with torch.no_grad():
        for lse in lses:
            lse[1, 2, 7] = -math.inf  # a row without keys: no NaN in what autograd makes of the gradient either
    dout, dlse = make_dresults()

    def second(merge: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        results = merge(outs, lses)
        first = torch.autograd.grad(
            results, [*outs, *lses], [dout.to(results[0].dtype), dlse.to(results[1].dtype)], create_graph=True
        )
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [*outs, *lses])  # type: ignore[arg-type]

    for grad, exact in zip(second(merge_attention), second(reference.merge_attention), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-4)


def test_attention_by_splits_has_the_gradient_of_attention_over_all_keys() -> None:
    case = Case(query_len=70, kv_len=300, heads=2, kv_heads=2, head_dim=40)
    qkv = [x.requires_grad_() for x in make_qkv(case, torch.float32, "peaked")]
    q, k, v = qkv
    splits = zip(k.tensor_split(3, 1), v.tensor_split(3, 1), strict=True)
    outs, lses = zip(*[reference.attention(q, *split, None, None, case.scale) for split in splits], strict=True)
    out, _ = merge_attention([x.float() for x in outs], [x.float() for x in lses])
    whole = scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in qkv)).transpose(1, 2)
    dout = torch.randn_like(out)
    exact = torch.autograd.grad(whole, qkv, dout.double())
    for grad, expected in zip(torch.autograd.grad(out, qkv, dout), exact, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@devices
def test_one_graph_forward_and_backward_and_the_eager_gradient(device: str) -> None:
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def merged(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        return merge_attention(outs, lses)

    for _ in range(3):
        outs, lses = make_parts(3, device=device)
        dresults = make_dresults(device=device)
        compiled = gradients(merged, outs, lses, *dresults)
        eager = gradients(merge_attention, outs, lses, *dresults)
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@devices
@dtypes
def test_opcheck_with_inputs_that_require_a_gradient(device: str, dtype: torch.dtype) -> None:
    outs, lses = make_parts(2, dtype, device)
    arguments = outs, [lses[0], lses[1].detach()]
    results = opcheck(torch.ops.lite_attention.merge_attention.default, arguments, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")
