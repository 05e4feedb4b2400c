"""Bad input of every kind gives an error that names the argument, what was got and what was expected; never a crash.

The texts are pinned. To accept new ones after a deliberate change: EXPECTTEST_ACCEPT=1 pytest tests/ops/test_errors.py
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lite_attention import (
    LiteAttention,
    SeqParallelLiteAttention,
    attention,
    full_keep_map,
    merge_attention,
    skip_attention,
    skip_branch,
    tile_shape,
    top_k_map,
    visit_rows,
)
from lite_attention.ops.load import WHY_NO_CUDA_KERNELS
from support.inputs import report

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, HEAD_DIM = 2, 100, 2400, 4, 2, 16
Q = torch.randn(BATCH, QUERIES, HEADS, HEAD_DIM)
K, V = torch.randn(2, BATCH, KEYS, KV_HEADS, HEAD_DIM)
KEEP = full_keep_map(BATCH, HEADS, QUERIES, KEYS, HEAD_DIM, Q.dtype)
LENS = torch.full((BATCH,), KEYS, dtype=torch.int32)
OUT, LSE = torch.randn(2, 5, 3, 8), torch.randn(2, 3, 5)


def bad_attention(**changes: Any) -> Callable[[], object]:
    given = {"q": Q, "k": K, "v": V, "keep": KEEP, "kv_lens": LENS, "scale": 1.0} | changes
    return lambda: attention(**given)


def bad_skip(**changes: Any) -> Callable[[], object]:
    given = {"q": Q, "k": K, "v": V, "keep": KEEP, "threshold": torch.tensor(-1.0), "scale": 1.0} | changes
    return lambda: skip_attention(**given)


def bad_module(layer: LiteAttention | None = None, **changes: Any) -> Callable[[], object]:
    given = {"query": Q, "key": K, "value": V} | changes
    return lambda: (layer or LiteAttention())(**given)


def lens(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def test_queries_keys_and_values() -> None:
    wide = torch.randn(BATCH, QUERIES, HEADS, 264)
    calls = {
        "q of rank 3": bad_attention(q=Q[0]),
        "k of rank 5": bad_attention(k=K[None]),
        "v of rank 0": bad_attention(v=torch.tensor(1.0)),
        "q of rank 0, no scale": bad_attention(q=torch.tensor(1.0), scale=None),
        "q in float64": bad_attention(q=Q.double(), k=K.double(), v=V.double()),
        "q in int32": bad_attention(q=Q.int()),
        "k in bfloat16": bad_attention(k=K.bfloat16()),
        "v in float16": bad_attention(v=V.half()),
        "complex q": bad_attention(q=Q.to(torch.complex64)),
        "no batch": bad_attention(q=Q[:0], k=K[:0], v=V[:0]),
        "no queries": bad_attention(q=Q[:, :0]),
        "no keys": bad_attention(k=K[:, :0], v=V[:, :0]),
        "no heads": bad_attention(q=Q[:, :, :0]),
        "no key heads": bad_attention(k=K[:, :, :0], v=V[:, :, :0]),
        "head_dim 0": bad_attention(q=Q[..., :0], k=K[..., :0], v=V[..., :0], scale=None),
        "head_dim 12": bad_attention(q=Q[..., :12], k=K[..., :12], v=V[..., :12]),
        "head_dim 264": bad_attention(q=wide, k=wide, v=wide),
        "head dims differ": bad_attention(k=K[..., :8], v=V[..., :8]),
        "batches differ": bad_attention(k=K[:1], v=V[:1]),
        "3 key heads for 4 query heads": bad_attention(k=K[:, :, [0, 0, 0]], v=V[:, :, [0, 0, 0]]),
        "v shorter than k": bad_attention(v=V[:, :7]),
        "last stride of q is 2": bad_attention(q=torch.randn(*Q.shape[:-1], 32)[..., ::2]),
        "last stride of v is not 1": bad_attention(v=torch.randn(BATCH, KEYS, HEAD_DIM, KV_HEADS).transpose(2, 3)),
        "scale 0": bad_attention(scale=0.0),
        "scale -1": bad_attention(scale=-1.0),
        "scale NaN": bad_attention(scale=math.nan),
        "scale beyond floats": bad_attention(scale=10**400),
        "scale inf": bad_attention(scale=math.inf),
        "q is a list": bad_attention(q=[1.0]),
        "v is None": bad_attention(v=None),
        "sparse q": bad_attention(q=Q.to_sparse()),
        "nested q": bad_attention(q=torch.nested.nested_tensor([*Q])),
    }
    assert_expected_inline(
        report(calls),
        """\
q of rank 3 -> RuntimeError: attention: q has 3 dimensions, expected 4: [batch, length, heads, head_dim]
k of rank 5 -> RuntimeError: attention: k has 5 dimensions, expected 4: [batch, length, heads, head_dim]
v of rank 0 -> RuntimeError: attention: v has 0 dimensions, expected 4: [batch, length, heads, head_dim]
q of rank 0, no scale -> RuntimeError: attention: q has 0 dimensions, expected 4: [batch, length, heads, head_dim]
q in float64 -> RuntimeError: attention: q has dtype float64, expected float32, bfloat16 or float16
q in int32 -> RuntimeError: attention: q has dtype int32, expected float32, bfloat16 or float16
k in bfloat16 -> RuntimeError: attention: k has dtype bfloat16, expected float32
v in float16 -> RuntimeError: attention: v has dtype float16, expected float32
complex q -> RuntimeError: attention: q has dtype another dtype, expected float32, bfloat16 or float16
no batch -> RuntimeError: attention: q has batch 0, expected at least 1
no queries -> RuntimeError: attention: q has length 0, expected at least 1
no keys -> RuntimeError: attention: k has length 0, expected at least 1
no heads -> RuntimeError: attention: q has heads 0, expected at least 1
no key heads -> RuntimeError: attention: k has heads 0, expected at least 1
head_dim 0 -> RuntimeError: attention: q has head_dim 0, expected at least 1
head_dim 12 -> RuntimeError: attention: q has head_dim 12, expected a multiple of 8 up to 256
head_dim 264 -> RuntimeError: attention: q has head_dim 264, expected a multiple of 8 up to 256
head dims differ -> RuntimeError: attention: k has head_dim 8, expected 16 as q
batches differ -> RuntimeError: attention: k has batch 1, expected 2 as q
3 key heads for 4 query heads -> RuntimeError: attention: k has 3 heads, expected a divisor of q's 4
v shorter than k -> RuntimeError: attention: v has shape [2, 7, 2, 16], expected [2, 2400, 2, 16] (k's shape)
last stride of q is 2 -> RuntimeError: attention: q has stride 2 in its last dimension, expected 1
last stride of v is not 1 -> RuntimeError: attention: v has stride 2 in its last dimension, expected 1
scale 0 -> RuntimeError: attention: scale is 0, expected a number above 0 that is finite in fp32
scale -1 -> RuntimeError: attention: scale is -1, expected a number above 0 that is finite in fp32
scale NaN -> RuntimeError: attention: scale is nan, expected a number above 0 that is finite in fp32
scale beyond floats -> ValueError: attention: scale is beyond the numbers that a float can hold, expected one of these
scale inf -> RuntimeError: attention: scale is inf, expected a number above 0 that is finite in fp32
q is a list -> TypeError: attention: q has type list, expected a tensor
v is None -> TypeError: attention: v has type NoneType, expected a tensor
sparse q -> TypeError: attention: q has layout torch.sparse_coo, expected torch.strided
nested q -> TypeError: attention: q has layout nested, expected torch.strided""",
    )


def test_maps_and_lengths() -> None:
    calls = {
        "keep of rank 3": bad_attention(keep=KEEP[0]),
        "keep in bool": bad_attention(keep=KEEP.bool()),
        "keep in int64": bad_attention(keep=KEEP.long()),
        "keep too wide": bad_attention(keep=KEEP.repeat(1, 1, 1, 3)),
        "keep of another head count": bad_attention(keep=KEEP[:, :1]),
        "keep of another batch": bad_attention(keep=KEEP[:1]),
        "keep for other queries": bad_attention(keep=KEEP[:, :, :1]),
        "must_keep too narrow": bad_skip(must_keep=KEEP[..., :0]),
        "must_keep of 3 heads": bad_skip(must_keep=KEEP[:, :3]),
        "must_keep of rank 1": bad_skip(must_keep=KEEP[0, 0, 0]),
        "must_keep in uint8": bad_skip(must_keep=KEEP.to(torch.uint8)),
        "keep is None": bad_skip(keep=None),
        "kv_lens in int64": bad_attention(kv_lens=LENS.long()),
        "kv_lens of the wrong length": bad_attention(kv_lens=lens(1)),
        "kv_lens of rank 2": bad_attention(kv_lens=lens(1, 2)[None]),
        "kv_lens below 0": bad_attention(kv_lens=lens(5, -1)),
        "kv_lens past the keys": bad_attention(kv_lens=lens(2401, 5)),
    }
    assert_expected_inline(
        report(calls),
        """\
keep of rank 3 -> RuntimeError: attention: keep has 3 dimensions, expected 4: [batch, query heads, query tiles, words]
keep in bool -> RuntimeError: attention: keep has dtype bool, expected int32
keep in int64 -> RuntimeError: attention: keep has dtype int64, expected int32
keep too wide -> RuntimeError: attention: keep has 3 words per row, expected 1 for Sk=2400 and tile_n=128
keep of another head count -> RuntimeError: attention: keep has heads 1, expected 4
keep of another batch -> RuntimeError: attention: keep has batch 1, expected 2
keep for other queries -> RuntimeError: attention: keep has query tiles 1, expected 2 for Sq=100 and tile_m=64
must_keep too narrow -> RuntimeError: skip_attention: must_keep has 0 words per row, expected 1 for Sk=2400 and tile_n=128
must_keep of 3 heads -> RuntimeError: skip_attention: must_keep has heads 3, expected 1 or 4
must_keep of rank 1 -> RuntimeError: skip_attention: must_keep has 1 dimensions, expected 4: [batch, query heads, query tiles, words]
must_keep in uint8 -> RuntimeError: skip_attention: must_keep has dtype another dtype, expected int32
keep is None -> TypeError: skip_attention: keep has type NoneType, expected a tensor
kv_lens in int64 -> RuntimeError: attention: kv_lens has dtype int64, expected int32
kv_lens of the wrong length -> RuntimeError: attention: kv_lens has shape [1], expected [2] (one length a batch entry)
kv_lens of rank 2 -> RuntimeError: attention: kv_lens has shape [1, 2], expected [2] (one length a batch entry)
kv_lens below 0 -> RuntimeError: attention: kv_lens[1] is -1, expected 0 to 2400, k's length
kv_lens past the keys -> RuntimeError: attention: kv_lens[0] is 2401, expected 0 to 2400, k's length""",
    )


def test_masks() -> None:
    windows = torch.ones(HEADS, 2, dtype=torch.int32)
    tile_lens = torch.full((19,), 64, dtype=torch.int32)  # 2400 keys in tiles of 128
    calls = {
        "tile_n of 96": bad_attention(tile_n=96),
        "tile_n beyond the operator's": bad_attention(tile_n=2**70),
        "map of the other grain": bad_attention(tile_n=64, keep=KEEP),
        "tile lengths of the other grain": bad_attention(tile_n=64, kv_tile_lens=tile_lens),
        "tile lengths in int64": bad_attention(kv_tile_lens=tile_lens.long()),
        "tile lengths of another batch": bad_attention(kv_tile_lens=tile_lens.repeat(3, 1)),
        "a tile of -1 keys": bad_attention(kv_tile_lens=tile_lens.index_fill(0, torch.tensor(4), -1)),
        "a tile of 129 keys": bad_attention(kv_tile_lens=tile_lens.repeat(2, 1).index_fill(1, torch.tensor(4), 129)),
        "tile lengths as a list": bad_attention(kv_tile_lens=[64]),
        "causal of no known kind": bad_attention(causal="upper-left"),
        "causal as a bool": bad_attention(causal=True),
        "windows that are not causal": bad_attention(head_windows=windows),
        "windows of KV heads": bad_attention(causal="top-left", head_windows=windows[:KV_HEADS]),
        "windows in int64": bad_attention(causal="top-left", head_windows=windows.long()),
        "a negative sink": bad_attention(causal="top-left", head_windows=windows.index_fill(1, torch.tensor(0), -2)),
        "a negative window": bad_attention(causal="top-left", head_windows=windows.index_fill(1, torch.tensor(1), -3)),
    }
    assert_expected_inline(
        report(calls),
        """\
tile_n of 96 -> RuntimeError: attention: tile_n is 96, expected 128 or 64 for head_dim 16
tile_n beyond the operator's -> ValueError: attention: tile_n is beyond the integers of 64 bits, expected one of these
map of the other grain -> RuntimeError: attention: keep has 1 words per row, expected 2 for Sk=2400 and tile_n=64
tile lengths of the other grain -> RuntimeError: attention: kv_tile_lens has shape [19], expected [38] or [2, 38], one length a KV tile, for Sk=2400 and tile_n=64
tile lengths in int64 -> RuntimeError: attention: kv_tile_lens has dtype int64, expected int32
tile lengths of another batch -> RuntimeError: attention: kv_tile_lens has shape [3, 19], expected [19] or [2, 19], one length a KV tile, for Sk=2400 and tile_n=128
a tile of -1 keys -> RuntimeError: attention: kv_tile_lens[4] is -1, expected 0 to 128, tile_n
a tile of 129 keys -> RuntimeError: attention: kv_tile_lens[0, 4] is 129, expected 0 to 128, tile_n
tile lengths as a list -> TypeError: attention: kv_tile_lens has type list, expected a tensor
causal of no known kind -> RuntimeError: attention: causal is 'upper-left', expected 'top-left' or 'bottom-right'
causal as a bool -> TypeError: attention: causal has type bool, expected 'top-left', 'bottom-right' or None
windows that are not causal -> RuntimeError: attention: head_windows is given and causal is not, expected causal to be 'top-left' or 'bottom-right'
windows of KV heads -> RuntimeError: attention: head_windows has shape [2, 2], expected [4, 2] (sink_size and recent_size of each head)
windows in int64 -> RuntimeError: attention: head_windows has dtype int64, expected int32
a negative sink -> RuntimeError: attention: head_windows[0, 0] is -2, expected 0 or more keys
a negative window -> RuntimeError: attention: head_windows[0, 1] is -3, expected 0 or more keys""",
    )


def test_scores_of_a_top_k_map() -> None:
    scores = torch.zeros(2, 5)
    calls = {
        "scores in int32": lambda: top_k_map(scores.int(), 2),
        "scores of rank 0": lambda: top_k_map(torch.tensor(1.0), 2),
        "scores of rank 5": lambda: top_k_map(scores[None, None, None], 2),
        "no columns": lambda: top_k_map(scores[:, :0], 2),
        "columns apart": lambda: top_k_map(scores.T, 2),
        "count 0": lambda: top_k_map(scores, 0),
        "scores as a list": lambda: top_k_map([1.0], 2),
    }
    assert_expected_inline(
        report(calls),
        """\
scores in int32 -> RuntimeError: top_k_map: scores has dtype int32, expected float32, bfloat16 or float16
scores of rank 0 -> RuntimeError: top_k_map: scores has 0 dimensions, expected 1 to 4
scores of rank 5 -> RuntimeError: top_k_map: scores has 5 dimensions, expected 1 to 4
no columns -> RuntimeError: top_k_map: scores has 0 columns, expected 1 to 1073741824
columns apart -> RuntimeError: top_k_map: scores has stride 5 in its last dimension, expected 1
count 0 -> RuntimeError: top_k_map: count is 0, expected at least 1
scores as a list -> TypeError: top_k_map: scores has type list, expected a tensor""",
    )


def test_thresholds() -> None:
    calls = {
        "NaN": bad_skip(threshold=torch.tensor(math.nan)),
        "NaN, as a float": bad_skip(threshold=math.nan),
        "NaN for one head": bad_skip(threshold=torch.tensor([0.0, -1.0, math.nan, 0.0])),
        "in float64": bad_skip(threshold=torch.tensor(-1.0, dtype=torch.float64)),
        "for 2 of 4 heads": bad_skip(threshold=torch.zeros(2)),
        "of rank 2": bad_skip(threshold=torch.zeros(1, 1)),
        "as text": bad_skip(threshold="low"),
    }
    assert_expected_inline(
        report(calls),
        """\
NaN -> RuntimeError: skip_attention: threshold is NaN, expected a number in log2 units
NaN, as a float -> RuntimeError: skip_attention: threshold is NaN, expected a number in log2 units
NaN for one head -> RuntimeError: skip_attention: threshold is NaN for head 2, expected a number in log2 units
in float64 -> RuntimeError: skip_attention: threshold has dtype float64, expected float32
for 2 of 4 heads -> RuntimeError: skip_attention: threshold has shape [2], expected [] or [4], one a query head
of rank 2 -> RuntimeError: skip_attention: threshold has shape [1, 1], expected [] or [4], one a query head
as text -> TypeError: skip_attention: threshold has type str, expected a number or tensor""",
    )


def test_devices() -> None:
    meta = {"device": "meta"}
    calls = {
        "k elsewhere": bad_attention(k=K.to(**meta)),
        "q elsewhere": bad_attention(q=Q.to(**meta)),
        "keep elsewhere": bad_skip(keep=KEEP.to(**meta)),
        "threshold elsewhere": bad_skip(threshold=torch.zeros((), **meta)),
        "one of lses elsewhere": lambda: merge_attention([OUT, OUT], [LSE, LSE.to(**meta)]),
        "module, key elsewhere": bad_module(key=K.to(**meta)),
        "module, ranges elsewhere": bad_module(must_do_list=torch.zeros(1, 2, dtype=torch.int64, **meta)),
        "module, lengths elsewhere": bad_module(kv_lens=LENS.to(**meta)),
    }
    assert_expected_inline(
        report(calls),
        """\
k elsewhere -> RuntimeError: attention: k is on meta, expected cpu, every argument's device
q elsewhere -> RuntimeError: attention: k is on cpu, expected meta, every argument's device
keep elsewhere -> RuntimeError: skip_attention: keep is on meta, expected cpu, every argument's device
threshold elsewhere -> RuntimeError: skip_attention: threshold is on meta, expected cpu, every argument's device
one of lses elsewhere -> RuntimeError: merge_attention: lses[1] is on meta, expected cpu, every argument's device
module, key elsewhere -> ValueError: LiteAttention: key is on meta, expected cpu, query's device
module, ranges elsewhere -> ValueError: LiteAttention: must_do_list is on meta, expected cpu, query's device
module, lengths elsewhere -> ValueError: LiteAttention: kv_lens is on meta, expected cpu, query's device""",
    )


@pytest.mark.parametrize("operator", ["attention", "skip_attention", "merge_attention"])
def test_a_device_without_a_kernel_is_named(operator: str) -> None:
    arguments = {
        "attention": (Q, K, V, None, None, 1.0),
        "skip_attention": (Q, K, V, KEEP, None, None, torch.tensor(0.0), 1.0),
        "merge_attention": ([OUT], [LSE]),
    }[operator]
    for key in ("XPU", *(["CUDA"] if WHY_NO_CUDA_KERNELS else [])):
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        with pytest.raises(NotImplementedError) as caught:
            getattr(torch.ops.lite_attention, operator).default.redispatch(keyset, *arguments)
        head_dim = "" if operator == "merge_attention" else f", head_dim {arguments[0].shape[-1]},"
        sm90 = WHY_NO_CUDA_KERNELS if key == "CUDA" else "runs on cuda tensors"
        assert str(caught.value) == (
            f"{operator}: no backend runs float32{head_dim} on {key.lower()}\n"
            f"  sm90: {sm90}\n"
            "  cpu: runs on cpu tensors\n"
            "`python -m lite_attention.info` tells what can run here"
        )


def test_merging() -> None:
    calls = {
        "nothing": lambda: merge_attention([], []),
        "one lse too few": lambda: merge_attention([OUT, OUT], [LSE]),
        "outs of two dtypes": lambda: merge_attention([OUT, OUT.half()], [LSE, LSE]),
        "outs of two shapes": lambda: merge_attention([OUT, OUT[:1]], [LSE, LSE]),
        "out of rank 3": lambda: merge_attention([OUT[0]], [LSE]),
        "out in float64": lambda: merge_attention([OUT.double()], [LSE]),
        "out without rows": lambda: merge_attention([OUT[:, :0]], [LSE[..., :0]]),
        "out with a strided last dimension": lambda: merge_attention([torch.randn(2, 5, 8, 3).mT], [LSE]),
        "lse in bfloat16": lambda: merge_attention([OUT], [LSE.bfloat16()]),
        "lse as [B, S, H]": lambda: merge_attention([OUT], [LSE.mT]),
    }
    assert_expected_inline(
        report(calls),
        """\
nothing -> ValueError: merge_attention: outs is empty, expected at least one partial result
one lse too few -> RuntimeError: merge_attention: lses has 1 tensors, expected 2, one for each of outs
outs of two dtypes -> RuntimeError: merge_attention: outs[1] has dtype float16, expected float32
outs of two shapes -> RuntimeError: merge_attention: outs[1] has shape [1, 5, 3, 8], expected [2, 5, 3, 8] (outs[0]'s shape)
out of rank 3 -> RuntimeError: merge_attention: outs[0] has 3 dimensions, expected 4: [batch, length, heads, head_dim]
out in float64 -> RuntimeError: merge_attention: outs[0] has dtype float64, expected float32, bfloat16 or float16
out without rows -> RuntimeError: merge_attention: outs[0] has length 0, expected at least 1
out with a strided last dimension -> RuntimeError: merge_attention: outs[0] has stride 3 in its last dimension, expected 1
lse in bfloat16 -> RuntimeError: merge_attention: lses[0] has dtype bfloat16, expected float32
lse as [B, S, H] -> RuntimeError: merge_attention: lses[0] has shape [2, 5, 3], expected [2, 3, 5] (batch, heads and length of outs)""",
    )


def test_module_inputs() -> None:
    per_head = LiteAttention(threshold=[-1.0, -2.0])
    calls = {
        "batch over max_batch_size": bad_module(LiteAttention(max_batch_size=1)),
        "query of rank 3": bad_module(query=Q[0]),
        "value of rank 3": bad_module(value=V[0]),
        "key is a list": bad_module(key=[1, 2]),
        "query in float64": bad_module(query=Q.double(), key=K.double(), value=V.double()),
        "key in bfloat16": bad_module(key=K.bfloat16()),
        "no keys": bad_module(key=K[:, :0], value=V[:, :0]),
        "head_dim 12": bad_module(query=Q[..., :12], key=K[..., :12], value=V[..., :12]),
        "batches differ": bad_module(key=K[:1], value=V[:1]),
        "3 key heads for 4 query heads": bad_module(key=K[:, :, [0, 0, 0]], value=V[:, :, [0, 0, 0]]),
        "value shorter than key": bad_module(value=V[:, :5]),
        "strided query": bad_module(query=torch.randn(*Q.shape[:-1], 32)[..., ::2]),
        "scale as text": bad_module(scale="1"),
        "scale True": bad_module(scale=True),
        "scale as a tensor": bad_module(scale=torch.tensor(1.0)),
        "scale 0": bad_module(scale=0),
        "branch 8": bad_module(branch=8),
        "branch -1": bad_module(branch=-1),
        "branch as text": bad_module(branch="cond"),
        "skip_branch(8)": lambda: skip_branch(8),
        "2 thresholds for 4 heads": bad_module(per_head),
        "kv_lens past the keys": bad_module(kv_lens=lens(1, 2401)),
    }
    assert_expected_inline(
        report(calls),
        """\
batch over max_batch_size -> ValueError: LiteAttention: query has batch 2, expected at most max_batch_size=1
query of rank 3 -> ValueError: LiteAttention: query has 3 dimensions, expected 4: [batch, length, heads, head_dim]
value of rank 3 -> ValueError: LiteAttention: value has 3 dimensions, expected 4: [batch, length, heads, head_dim]
key is a list -> TypeError: LiteAttention: key has type list, expected a tensor
query in float64 -> TypeError: LiteAttention: query has dtype torch.float64, expected float32, bfloat16 or float16
key in bfloat16 -> TypeError: LiteAttention: key has dtype torch.bfloat16, expected torch.float32, query's
no keys -> ValueError: LiteAttention: key has shape [2, 0, 2, 16], expected no size of 0
head_dim 12 -> ValueError: LiteAttention: query has head_dim 12, expected a multiple of 8 up to 256
batches differ -> ValueError: LiteAttention: key has batch 1 and head_dim 16, expected query's, 2 and 16
3 key heads for 4 query heads -> ValueError: LiteAttention: key has 3 heads, expected a divisor of query's 4
value shorter than key -> ValueError: LiteAttention: value has shape [2, 5, 2, 16], expected key's shape, [2, 2400, 2, 16]
strided query -> RuntimeError: skip_attention: q has stride 2 in its last dimension, expected 1
scale as text -> TypeError: LiteAttention: scale has type str, expected a float or None
scale True -> TypeError: LiteAttention: scale has type bool, expected a float or None
scale as a tensor -> TypeError: LiteAttention: scale has type Tensor, expected a float or None
scale 0 -> RuntimeError: skip_attention: scale is 0, expected a number above 0 that is finite in fp32
branch 8 -> ValueError: LiteAttention: branch is 8, expected 0 to 7
branch -1 -> ValueError: LiteAttention: branch is -1, expected 0 to 7
branch as text -> TypeError: LiteAttention: branch has type str, expected an int
skip_branch(8) -> ValueError: skip_branch: branch is 8, expected 0 to 7
2 thresholds for 4 heads -> ValueError: LiteAttention: threshold has 2 values, expected 4, one per head
kv_lens past the keys -> RuntimeError: skip_attention: kv_lens[1] is 2401, expected 0 to 2400, k's length""",
    )


def test_module_ranges() -> None:
    calls = {
        "odd length": bad_module(must_do_list=[0, 5, 9]),
        "odd length of the other list": bad_module(must_skip_list=[9]),
        "past the end": bad_module(must_do_list=[0, 5, 2401, 9]),
        "negative": bad_module(must_skip_list=[5, -1]),
        "empty range": bad_module(must_do_list=[0, 5, 9, 9]),
        "a bool of numpy": bad_module(must_do_list=[0, np.bool_(True)]),
        "a float": bad_module(must_do_list=[0, 5.0]),
        "a text": bad_module(must_do_list="0-5"),
        "a flat tensor": bad_module(must_do_list=torch.tensor([0, 5])),
        "a float tensor": bad_module(must_do_list=torch.tensor([[0.0, 5.0]])),
        "also without skipping": bad_module(LiteAttention(enable_skipping=False), must_do_list=[0, 5, 9]),
        "queries past the end": bad_module(must_do_queries=[0, 2**20]),
    }
    assert_expected_inline(
        report(calls),
        """\
odd length -> ValueError: LiteAttention: must_do_list has 3 entries, expected an even number: [start, end, start, end, ...] (entry 2, 9, has no partner)
odd length of the other list -> ValueError: LiteAttention: must_skip_list has 1 entries, expected an even number: [start, end, start, end, ...] (entry 0, 9, has no partner)
past the end -> ValueError: LiteAttention: must_do_list[2] is 2401, expected at most the number of keys, 2400
negative -> ValueError: LiteAttention: must_skip_list[1] is -1, expected a position of at least 0
empty range -> ValueError: LiteAttention: must_do_list[2:4] is [9, 9], an empty range
a bool of numpy -> TypeError: LiteAttention: must_do_list[1] is np.True_ of type bool, expected an int
a float -> TypeError: LiteAttention: must_do_list[1] is 5.0 of type float, expected an int
a text -> TypeError: LiteAttention: must_do_list has type str, expected a list of ints or an integer tensor
a flat tensor -> ValueError: LiteAttention: must_do_list has shape [2], expected [count, 2]: one [start, end] a row
a float tensor -> TypeError: LiteAttention: must_do_list has dtype torch.float32, expected torch.int32 or torch.int64
also without skipping -> ValueError: LiteAttention: must_do_list has 3 entries, expected an even number: [start, end, start, end, ...] (entry 2, 9, has no partner)
queries past the end -> ValueError: LiteAttention: must_do_queries[1] is 1048576, expected at most the number of queries, 100""",
    )


def test_module_scalars_and_maps() -> None:
    layer = LiteAttention()
    layer(Q, K, V)
    calls: dict[str, Callable[[], object]] = {
        "start_full True": bad_module(start_full=True),
        "start_full of int": bad_module(start_full=torch.tensor(1)),
        "start_full of rank 1": bad_module(start_full=torch.tensor([True])),
        "start_full elsewhere": bad_module(start_full=torch.tensor(True, device="meta")),
        "generation 3": bad_module(generation=3),
        "generation of float": bad_module(generation=torch.tensor(3.0)),
        "generation of rank 1": bad_module(generation=torch.tensor([3])),
        "generation elsewhere": bad_module(generation=torch.tensor(3, device="meta")),
        "skip_fraction_out of int": bad_module(skip_fraction_out=torch.tensor(1)),
        "a map of int": lambda: layer.set_keep_map(layer.keep_map().int()),
        "a map of rank 3": lambda: layer.set_keep_map(layer.keep_map()[0]),
        "a map of another size": lambda: layer.set_keep_map(layer.keep_map()[..., :2]),
        "a map before a pass": lambda: LiteAttention().set_keep_map(torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    }
    assert_expected_inline(
        report(calls),
        """\
start_full True -> TypeError: LiteAttention: start_full has type bool, expected a tensor
start_full of int -> TypeError: LiteAttention: start_full has dtype torch.int64, expected torch.bool
start_full of rank 1 -> ValueError: LiteAttention: start_full has shape [1], expected []
start_full elsewhere -> ValueError: LiteAttention: start_full is on meta, expected cpu, query's device
generation 3 -> TypeError: LiteAttention: generation has type int, expected a tensor
generation of float -> TypeError: LiteAttention: generation has dtype torch.float32, expected torch.int64
generation of rank 1 -> ValueError: LiteAttention: generation has shape [1], expected []
generation elsewhere -> ValueError: LiteAttention: generation is on meta, expected cpu, query's device
skip_fraction_out of int -> TypeError: LiteAttention: skip_fraction_out has dtype torch.int64, expected torch.float32
a map of int -> TypeError: set_keep_map: keep_map has dtype torch.int32, expected torch.bool
a map of rank 3 -> ValueError: set_keep_map: keep_map has shape [4, 2, 19], expected [2, 4, 2, 19] or sizes of 1
a map of another size -> ValueError: set_keep_map: keep_map has shape [2, 4, 2, 2], expected [2, 4, 2, 19] or sizes of 1
a map before a pass -> RuntimeError: set_keep_map: branch 0 has no keep map yet, expected a skipping pass before""",
    )


def test_module_construction_and_settings() -> None:
    layer, split = LiteAttention(), SeqParallelLiteAttention(2)
    calls: dict[str, Callable[[], object]] = {
        "threshold above 0": lambda: LiteAttention(threshold=0.5),
        "threshold NaN": lambda: LiteAttention(threshold=math.nan),
        "threshold as text": lambda: LiteAttention(threshold="low"),  # type: ignore[arg-type]
        "no thresholds": lambda: LiteAttention(threshold=[]),
        "one threshold above 0": lambda: layer.set_threshold([-1.0, 2.0]),
        "one threshold NaN": lambda: layer.set_threshold(torch.tensor([-1.0, math.nan])),
        "thresholds of rank 2": lambda: layer.set_threshold(torch.zeros(2, 2)),
        "threshold None": lambda: layer.set_threshold(None),  # type: ignore[arg-type]
        "threshold True": lambda: layer.set_threshold(True),
        "threshold True of numpy": lambda: layer.set_threshold(np.bool_(True)),
        "threshold NaN of numpy": lambda: layer.set_threshold([-1.0, np.float32("nan")]),
        "threshold too large for a float": lambda: layer.set_threshold(-(10**400)),
        "thresholds as an array of rank 2": lambda: layer.set_threshold(np.zeros((2, 2))),
        "thresholds of complex numbers": lambda: layer.set_threshold(np.zeros(2, complex)),
        "skipping as text": lambda: layer.enable_skip_optimization("no"),  # type: ignore[arg-type]
        "max_batch_size 0": lambda: LiteAttention(max_batch_size=0),
        "max_batch_size 1.5": lambda: LiteAttention(max_batch_size=1.5),  # type: ignore[arg-type]
        "num_nodes 0": lambda: SeqParallelLiteAttention(0),
        "num_nodes as text": lambda: SeqParallelLiteAttention("2"),  # type: ignore[arg-type]
        "split_idx 2 of 2": lambda: split(Q, K, V, 2),
        "split_idx -1": lambda: split(Q, K, V, -1),
        "split_idx is the scale": lambda: split(Q, K, V, 0.125),
        "keep_map before a pass": lambda: layer.keep_map(),
        "tile_shape before a pass": lambda: layer.tile_shape(),
        "reset of branch 8": lambda: layer.reset_skip_state(8),
        "keep map of a bad dtype": lambda: full_keep_map(1, 1, 5, 5, 64, torch.float64),
        "tile shape of a bad head dim": lambda: tile_shape(20, torch.bfloat16),
        "visit rows of a bad head dim": lambda: visit_rows(512, torch.bfloat16),
    }
    assert_expected_inline(
        report(calls),
        """\
threshold above 0 -> ValueError: LiteAttention: threshold is 0.5, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
threshold NaN -> ValueError: LiteAttention: threshold is NaN, expected a number of at most 0
threshold as text -> TypeError: LiteAttention: threshold is 'low' of type str, expected a number
no thresholds -> ValueError: LiteAttention: threshold is empty, expected one number, or one per query head
one threshold above 0 -> ValueError: set_threshold[1] is 2.0, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
one threshold NaN -> ValueError: set_threshold[1] is NaN, expected a number of at most 0
thresholds of rank 2 -> ValueError: set_threshold has shape [2, 2], expected [] or [heads]
threshold None -> TypeError: set_threshold is None of type NoneType, expected a number
threshold True -> TypeError: set_threshold is True of type bool, expected a number
threshold True of numpy -> TypeError: set_threshold is True of type bool, expected a number
threshold NaN of numpy -> ValueError: set_threshold[1] is NaN, expected a number of at most 0
threshold too large for a float -> ValueError: set_threshold is beyond the numbers that a float can hold, expected one of these
thresholds as an array of rank 2 -> ValueError: set_threshold has shape [2, 2], expected [] or [heads]
thresholds of complex numbers -> TypeError: set_threshold[0] is 0j of type complex, expected a number
skipping as text -> TypeError: enable_skip_optimization: enable has type str, expected a bool
max_batch_size 0 -> ValueError: LiteAttention: max_batch_size is 0, expected at least 1
max_batch_size 1.5 -> TypeError: LiteAttention: max_batch_size has type float, expected an int
num_nodes 0 -> ValueError: SeqParallelLiteAttention: num_nodes is 0, expected at least 1
num_nodes as text -> TypeError: SeqParallelLiteAttention: num_nodes has type str, expected an int
split_idx 2 of 2 -> ValueError: SeqParallelLiteAttention: split_idx is 2, expected 0 to 1
split_idx -1 -> ValueError: SeqParallelLiteAttention: split_idx is -1, expected 0 to 1
split_idx is the scale -> TypeError: SeqParallelLiteAttention: split_idx has type float, expected an int
keep_map before a pass -> RuntimeError: keep_map: branch 0 has no keep map yet, expected a skipping pass before
tile_shape before a pass -> RuntimeError: tile_shape: branch 0 has no keep map yet, expected a skipping pass before
reset of branch 8 -> ValueError: reset_skip_state: branch is 8, expected 0 to 7
keep map of a bad dtype -> ValueError: dtype is torch.float64, expected one of torch.float32, torch.bfloat16, torch.float16
tile shape of a bad head dim -> ValueError: head_dim is 20, expected a multiple of 8 up to 256
visit rows of a bad head dim -> ValueError: head_dim is 512, expected a multiple of 8 up to 256""",
    )


def test_a_refused_call_leaves_the_state_as_it_was() -> None:
    layer = LiteAttention(threshold=0.0)
    layer(Q, K, V)
    before = layer.keep_map()
    assert not before.all()
    for call in (
        bad_module(layer, value=V[:, :5]),
        bad_module(layer, must_do_list=[1]),
        bad_module(layer, kv_lens=lens(1, 2401)),
        bad_module(layer, scale=-1.0),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()
    assert torch.equal(layer.keep_map(), before)


def test_asking_for_a_gradient_is_a_clear_error() -> None:
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    calls = {
        "attention": lambda: attention(q, k, v)[0].sum().backward(),
        "skip_attention": lambda: skip_attention(q, k, v, KEEP, -1.0)[0].sum().backward(),
        "attention, merged": lambda: merge_attention(*zip(attention(q, k, v), strict=True))[0].sum().backward(),
        "LiteAttention": lambda: LiteAttention()(q, k, v).sum().backward(),
        "through the lse": lambda: attention(q, k, v)[1].sum().backward(),
    }
    assert_expected_inline(
        report(calls),
        """\
attention -> NotImplementedError: attention: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), or detach its inputs
skip_attention -> NotImplementedError: skip_attention: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), or detach its inputs
attention, merged -> NotImplementedError: attention: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), or detach its inputs
LiteAttention -> NotImplementedError: skip_attention: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), or detach its inputs
through the lse -> NotImplementedError: attention: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), or detach its inputs""",
    )
    assert q.grad is None


def test_schemas_are_as_promised() -> None:
    names = ("attention", "skip_attention", "merge_attention", "top_k_map")
    schemas = [str(getattr(torch.ops.lite_attention, name).default._schema) for name in names]
    assert_expected_inline(
        "\n".join(schemas),
        """\
lite_attention::attention(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? kv_lens, float scale, *, int? tile_n=None, Tensor? kv_tile_lens=None, str? causal=None, Tensor? head_windows=None) -> (Tensor out, Tensor lse)
lite_attention::skip_attention(Tensor q, Tensor k, Tensor v, Tensor keep, Tensor? must_keep, Tensor? kv_lens, Tensor threshold, float scale) -> (Tensor out, Tensor lse, Tensor next_keep)
lite_attention::merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)
lite_attention::top_k_map(Tensor scores, int count) -> Tensor""",
    )


def test_errors_come_before_tracing_a_launch() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(query: Tensor) -> Tensor:
        result: Tensor = layer(query, K, V)
        return result

    layer = LiteAttention(max_batch_size=1)
    with pytest.raises(Exception, match="query has batch 2, expected at most max_batch_size=1"):
        step(Q)
