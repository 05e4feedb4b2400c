"""The table of backends on a machine with a Hopper GPU: unasked there, asked where a GPU is another one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lite_attention import attention
from lite_attention.ops import backends
from lite_attention.ops.backends import Backend, registered
from support.inputs import GPU

pytestmark = pytest.mark.gpu


def qkv() -> list[Tensor]:
    return [torch.randn(1, 200, 2, 64, device=GPU).bfloat16() for _ in range(3)]


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """This GPU, taken for an A100."""
    torch.cuda.init()
    monkeypatch.setattr(backends, "_gpu", lambda device: backends._Gpu("NVIDIA A100-SXM4-80GB", (8, 0)))
    backends._route("cuda")
    yield
    monkeypatch.undo()
    backends._route("cuda")
    assert "cuda" not in backends._routes


def test_a_hopper_is_served_by_its_kernels_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.cuda.init()
    monkeypatch.delattr(backends, "choose")
    assert "cuda" not in backends._routes
    assert attention(*qkv())[0].isfinite().all()


def test_another_gpu_is_told_each_backend_with_its_reason(ampere: None) -> None:
    expected = (
        "attention: no backend runs bfloat16, head_dim 64, on cuda:0\n"
        "  sm90: NVIDIA A100-SXM4-80GB is of compute capability 8.0, expected 9.0\n"
        "  cpu: runs on cpu tensors\n"
    )
    with pytest.raises(NotImplementedError) as caught:
        attention(*qkv())
    assert str(caught.value).startswith(expected)


def test_another_gpu_is_served_by_the_backend_that_can(ampere: None) -> None:
    inputs = qkv()

    def on_the_cpu(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        moved = [x.cpu() if isinstance(x, Tensor) else x for x in arguments]
        out, lse = torch.ops.lite_attention.attention(*moved, **named)
        return out.to(GPU), lse.to(GPU)

    with registered(Backend("elsewhere", "cuda", lambda _: None, {"attention": on_the_cpu})):
        out, lse = attention(*inputs)
    expected_out, expected_lse = attention(*(x.cpu() for x in inputs))
    assert torch.equal(out.cpu(), expected_out)
    assert torch.equal(lse.cpu(), expected_lse)


def test_a_backend_that_is_asked_first_takes_what_it_can_and_leaves_the_rest_to_the_kernels() -> None:
    inputs = qkv()
    expected = attention(*inputs)
    calls = []

    def note(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments[0].dtype)
        return expected

    def halves_only(problem: backends.Problem) -> str | None:
        return None if problem.dtype == torch.float16 else "is for fp16"

    with registered(Backend("halves", "cuda", halves_only, {"attention": note}), before="sm90"):
        out, lse = attention(*inputs)
        attention(*(x.half() for x in inputs))
    assert calls == [torch.float16]
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
