"""What torch's FlopCounterMode counts: the dense products, as for torch's own attention."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from lite_attention import LiteAttention, attention, merge_attention, skip_attention
from support.inputs import Case, make_qkv, random_map

CASE = Case(batch=2, query_len=130, kv_len=300, heads=4, kv_heads=2, head_dim=40)
DENSE = 4 * 2 * 4 * 130 * 300 * 40
devices = pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])


@devices
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_attention_counts_every_key_whatever_the_map(device: str, mode: type) -> None:
    qkv = [x.to(device) for x in make_qkv(CASE, torch.bfloat16)]
    keep = random_map(CASE, 0.5).to(device)
    calls = {
        "attention": lambda: attention(*qkv),
        "attention with a map": lambda: attention(*qkv, keep=keep, tile_n=None, causal="top-left"),
        "skip_attention": lambda: skip_attention(*qkv, keep, torch.tensor(-1.0, device=device)),
    }
    for name, call in calls.items():
        with mode(), FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == DENSE, name


def test_as_many_as_torch_counts_for_its_own_attention() -> None:
    q, k, v = make_qkv(CASE._replace(kv_heads=CASE.heads), torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert counter.get_total_flops() == DENSE


def test_a_layer_is_named_with_what_it_computes() -> None:
    q, k, v = make_qkv(CASE, torch.float32)
    layer = LiteAttention()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(q, k, v)
    assert counter.get_flop_counts()["LiteAttention"] == {torch.ops.lite_attention.skip_attention: DENSE}


def test_merging_counts_nothing() -> None:
    out, lse = attention(*make_qkv(CASE, torch.float32))
    with FlopCounterMode(display=False) as counter:
        merge_attention([out, out], [lse, lse])
    assert counter.get_total_flops() == 0
