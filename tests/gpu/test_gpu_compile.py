"""torch.compile and opcheck on CUDA tensors."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from lite_attention import LiteAttention, attention, skip_branch
from support.inputs import GPU, Case, make_qkv, random_map
from support.opchecks import check, strided

pytestmark = pytest.mark.gpu
OPS = torch.ops.lite_attention
HEADS, HEAD_DIM, STEPS = 4, 64, 12
CASE = Case(batch=2, query_len=100, kv_len=300, heads=4, kv_heads=2, head_dim=40)


class Stack(nn.Module):
    """Attention alone, with arithmetic that fusing cannot change: sums rounded once, and a power of two."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LiteAttention(threshold=-3.0) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(2 * x, x, x)
        return x


def noise(step: int, length: int = 1000) -> Tensor:
    random = torch.Generator().manual_seed(step)
    return torch.randn(1, length, HEADS, HEAD_DIM, generator=random).to(GPU, torch.bfloat16)


def run_beside_eager(model: Stack, compiled: nn.Module, branches: int) -> None:
    """A threshold change, a reset and branch switches in between; every step equals eager, state included."""
    eager = copy.deepcopy(model)
    skipped = 0.0
    for step in range(STEPS):
        for layer in (*model.layers, *eager.layers):
            if step == 5:
                layer.set_threshold(-1.0)
            if step == 8:
                layer.reset_skip_state()
        for branch in range(branches):
            with skip_branch(branch):
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(compiled(noise(step)), eager(noise(step)))
            for one, other in zip(model.layers, eager.layers, strict=True):
                assert torch.equal(one.keep_map(branch), other.keep_map(branch))
                skipped = max(skipped, float(one.skip_fraction(branch)))
    assert skipped > 0.02, "the model is meant to skip something"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("branches", [1, 2])
def test_one_compile_for_all_layers_and_steps(branches: int) -> None:
    counter = CompileCounter()
    model = Stack().to(GPU)
    run_beside_eager(model, torch.compile(model, fullgraph=True, backend=counter), branches)
    assert counter.frame_count == branches, "one compile, one more for the second branch"


@pytest.mark.parametrize("how", [{"backend": "aot_eager"}, {"mode": "default"}, {"mode": "reduce-overhead"}], ids=str)
def test_compiled_steps_equal_eager_bit_for_bit(how: dict[str, str]) -> None:
    model = Stack().to(GPU)
    run_beside_eager(model, torch.compile(model, fullgraph=True, **how), branches=2)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"], "the graphs are meant to be captured"


def test_one_compile_covers_all_layers_compiled_one_by_one() -> None:
    counter = CompileCounter()
    model = Stack(8).to(GPU)
    eager = copy.deepcopy(model)
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=counter)
    for step in range(3):
        assert torch.equal(model(noise(step)), eager(noise(step)))
    assert counter.frame_count == 1
    model(noise(3, length=700))
    assert counter.frame_count == 2, "another shape: one more compile for all the layers"


def lens() -> Tensor:
    return torch.tensor([300, 77], dtype=torch.int32, device=GPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_keep", [False, True])
@pytest.mark.parametrize("with_lens", [False, True])
def test_opcheck_of_attention(with_lens: bool, with_keep: bool, dtype: torch.dtype) -> None:
    q, k, v = strided(make_qkv(CASE, dtype, device=GPU))
    keep = random_map(CASE, 0.5, device=GPU) if with_keep else None
    check(OPS.attention.default, q, k, v, keep, lens() if with_lens else None, CASE.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("must_sizes", [None, (1, 1, 1), (2, 4, 2)], ids=str)
@pytest.mark.parametrize("with_lens", [False, True])
def test_opcheck_of_skip_attention(
    with_lens: bool, must_sizes: tuple[int, int, int] | None, dtype: torch.dtype
) -> None:
    q, k, v = make_qkv(CASE, dtype, device=GPU)
    must_keep = None if must_sizes is None else random_map(CASE, 0.3, 1, must_sizes, GPU)
    keep, kv_lens = random_map(CASE, 0.5, device=GPU), lens() if with_lens else None
    threshold = torch.linspace(-3, 0, 8, device=GPU)[::2]
    check(OPS.skip_attention.default, q, k, v, keep, must_keep, kv_lens, threshold, CASE.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_opcheck_of_merge_attention(parts: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(CASE, dtype, device=GPU)
    outs, lses = map(list, zip(*[attention(q, k, v) for _ in range(parts)], strict=True))
    check(OPS.merge_attention.default, strided(outs), lses)
