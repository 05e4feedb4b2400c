"""Light-DuoAttention's calls: its mask, its README's words, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention import reorder_weights_for_duo_attn, streaming_attention, streaming_sparse_attn_func
from lite_attention.families import duo
from support.inputs import Case, make_qkv, report
from support.language_models import HEADS, KV_HEADS, MIXED, WIDTH, make_model
from support.streaming import check, seen

on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.parametrize("window_left", [None, 0, 31, 500])
@pytest.mark.parametrize("sink_size", [None, 0, 4])
@pytest.mark.parametrize("lengths", [(300, 300), (70, 300), (300, 100)], ids=str)
@on_every_device
def test_light_duo_attentions_call_has_its_mask(
    device: str, lengths: tuple[int, int], sink_size: int | None, window_left: int | None
) -> None:
    queries, keys = lengths
    q, k, v = make_qkv(Case(2, queries, keys, 4, 2, 64), torch.bfloat16, "peaked", device=device)
    row, key = torch.arange(queries)[:, None], torch.arange(keys)
    mask = (key <= row) & ((key < (sink_size or 0)) | (key >= row - (keys if window_left is None else window_left)))
    if window_left is None:
        mask = key <= row
    result = streaming_sparse_attn_func(
        q,
        k,
        v,
        softmax_scale=1.0 / math.sqrt(64),
        causal=True,
        window_size=(window_left, 0),
        sink_size=sink_size,
        enable_streaming=True,
    )
    check(result, q, k, v, mask)


@on_every_device
def test_the_seeds_quick_start_runs_as_documented(device: str) -> None:
    batch_size, seqlen, num_heads, head_dim = 1, 2048, 32, 128
    q, k, v = (torch.randn(batch_size, seqlen, num_heads, head_dim).to(device, torch.bfloat16) for _ in range(3))
    output, lse = streaming_sparse_attn_func(
        q,
        k,
        v,
        softmax_scale=1.0 / math.sqrt(head_dim),
        causal=True,
        window_size=(31, 0),
        sink_size=4,
        enable_streaming=True,
    )
    assert output.shape == (1, 2048, 32, 128)
    assert lse.shape == (1, 32, 2048)
    expected = streaming_attention(q, k, v, sink_size=4, recent_size=32)
    assert torch.equal(output, expected[0])
    assert torch.equal(lse, expected[1])


def test_seqused_k_ends_the_keys_and_moves_no_row() -> None:
    q, k, v = make_qkv(Case(2, 200, 200, 2, 2, 64), torch.float32)
    used = torch.tensor([200, 90], dtype=torch.int32)
    mask = torch.stack([seen(200, 200, 0, 4, 32)[None]] * 2)
    mask[1, ..., 90:] = False
    check(streaming_sparse_attn_func(q, k, v, window_size=(31, 0), sink_size=4, seqused_k=used), q, k, v, mask)


def test_the_originals_other_keywords_may_be_given_at_the_values_that_ask_for_nothing() -> None:
    q, k, v = make_qkv(Case(1, 100, 100, 2, 2, 64), torch.float32)
    out, _ = streaming_sparse_attn_func(
        q, k, v, window_size=(31, 0), cu_seqlens_q=None, page_table=None, softcap=0.0, pack_gqa=None, groupwise=False
    )
    assert torch.equal(out, streaming_attention(q, k, v, 0, 32)[0])


@on_every_device
def test_the_call_compiles_into_one_graph(device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    q, k, v = make_qkv(Case(2, 200, 300, 4, 2, 64), torch.bfloat16, device=device)

    def run(q: Tensor) -> tuple[Tensor, Tensor]:
        return streaming_sparse_attn_func(q, k, v, window_size=(31, 0), sink_size=4)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for factor in (1, 2):
        for one, other in zip(compiled(factor * q), run(factor * q), strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1


def test_reordering_is_the_native_one_and_tells_which_heads_are_which() -> None:
    model, twin = make_model(), make_model()
    heads = [[0, 1, 0, 1], [0, 0, 0, 0]]
    assert reorder_weights_for_duo_attn(
        model=model,
        full_attention_heads=heads,
        sink_size=128,
        recent_size=256,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        hidden_size=WIDTH,
    ) == {
        "retrieval_idx": [slice(0, 4), slice(0, 0)],
        "streaming_idx": [slice(4, 8), slice(0, 8)],
        "sink_size": 128,
        "recent_size": 256,
        "enable_duo_attention": True,
    }
    duo.reorder_weights(twin, heads, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, hidden_size=WIDTH)
    for (name, weight), same in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(weight, same), name


def test_arguments_go_by_place_too() -> None:
    assert reorder_weights_for_duo_attn(make_model(), MIXED, 4, 31, HEADS, KV_HEADS, WIDTH, "cpu")["sink_size"] == 4


def test_errors_name_the_argument() -> None:
    q, k, v = make_qkv(Case(1, 20, 20, 4, 2, 16), torch.float32)
    sizes = torch.ones(4, dtype=torch.int32)

    def seed(**given: Any) -> Callable[[], object]:
        return lambda: streaming_sparse_attn_func(q, k, v, **given)

    calls: dict[str, Callable[[], object]] = {
        "negative window": seed(window_size=(-1, 0)),
        "position_ids": seed(position_ids=torch.arange(20)[None]),
        "page_table": seed(page_table=torch.zeros(1, 1, dtype=torch.int32)),
        "lengths as an array": seed(cu_seqlens_q=np.array([0, 20])),
        "softcap": seed(softcap=30.0),
        "tile": seed(n_block_size=64),
        "no keyword of it": seed(windows=(3, 0)),
        "lengths in place of a scale": lambda: streaming_sparse_attn_func(q, k, v, sizes),  # type: ignore[arg-type]
        "not causal": seed(causal=False),
        "not streaming": seed(enable_streaming=False),
        "keys to the right": seed(window_size=(31, 7)),
        "all keys to the right": seed(window_size=(31, -1)),
        "table of one layer": lambda: reorder_weights_for_duo_attn(
            make_model(), MIXED[:1], 4, 31, HEADS, KV_HEADS, WIDTH
        ),
    }
    assert_expected_inline(
        report(calls),
        """\
negative window -> ValueError: streaming_sparse_attn_func: window_size[0] is -1, expected 0 or more keys, or None
position_ids -> ValueError: streaming_sparse_attn_func: position_ids is given, expected None: it is not supported here. streaming_attention places the queries at the last keys
page_table -> ValueError: streaming_sparse_attn_func: page_table is given, expected None: it is not supported here
lengths as an array -> ValueError: streaming_sparse_attn_func: cu_seqlens_q is given, expected None: it is not supported here
softcap -> ValueError: streaming_sparse_attn_func: softcap is given, expected 0.0: it is not supported here
tile -> ValueError: streaming_sparse_attn_func: n_block_size is given, expected 128: it is not supported here
no keyword of it -> TypeError: streaming_sparse_attn_func: windows is not one of its keywords
lengths in place of a scale -> TypeError: streaming_sparse_attn_func: softmax_scale has type Tensor, expected a number or None
not causal -> ValueError: streaming_sparse_attn_func: causal is False, expected True: no row sees keys after its own
not streaming -> ValueError: streaming_sparse_attn_func: enable_streaming is False, expected True: heads that see everything have window_size (None, None)
keys to the right -> ValueError: streaming_sparse_attn_func: window_size[1] is 7, expected 0 or None: no row sees keys after its own
all keys to the right -> ValueError: streaming_sparse_attn_func: window_size[1] is -1, expected 0 or None: no row sees keys after its own
table of one layer -> ValueError: duo.reorder_weights: full_attention_heads has 1 rows, expected 2, one a layer""",
    )
