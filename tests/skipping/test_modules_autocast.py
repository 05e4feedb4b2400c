"""Layers under autocast: fp32 queries from a rotary embedding, bf16 values from a linear layer, as models have them."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention import LiteAttention, SeqParallelLiteAttention
from support.inputs import Case, correlated_passes

CASE = Case(batch=2, query_len=300, kv_len=300, heads=4, kv_heads=2)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def passes(device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of three steps; values in bf16, the others in fp32."""
    return [(q, k, v.bfloat16()) for q, k, v in correlated_passes(CASE, torch.float32, 3, device=device)]


@devices
@pytest.mark.parametrize("skipping", [True, False])
def test_a_layer_computes_and_remembers_as_in_autocast_s_dtype(device: str, skipping: bool) -> None:
    layer, expected = (LiteAttention(skipping, threshold=-1.0) for _ in range(2))
    for q, k, v in passes(device):
        with torch.autocast(device, torch.bfloat16):
            result = layer(q, k, v, return_softmax_lse=True)
        for x, y in zip(result, expected(q.bfloat16(), k.bfloat16(), v, return_softmax_lse=True), strict=True):
            assert torch.equal(x, y)
            assert x.dtype == y.dtype
    if skipping:
        assert torch.equal(layer.keep_map(), expected.keep_map())
        assert not layer.keep_map().all()


@devices
def test_a_layer_of_splits_does_so_too(device: str) -> None:
    q, k, v = passes(device)[0]
    layer = SeqParallelLiteAttention(2)
    with torch.autocast(device, torch.bfloat16):
        assert layer(q, k, v, 1).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"LiteAttention: value has dtype torch\.bfloat16, expected torch\.float32"):
        layer(q, k, v, 1)


@devices
def test_a_compiled_layer_is_one_graph(device: str) -> None:
    counter = CompileCounter()
    layer, expected = (LiteAttention(threshold=-1.0) for _ in range(2))
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for q, k, v in passes(device):
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(compiled(q, k, v), expected(q.bfloat16(), k.bfloat16(), v))
    assert torch.equal(layer.keep_map(), expected.keep_map())
    assert counter.frame_count == 1
