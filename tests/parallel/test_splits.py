"""SeqParallelLiteAttention: a state for each split of the keys."""

import itertools
import math

import torch
from expecttest import assert_expected_inline

from lite_attention import SeqParallelLiteAttention, attention, merge_attention, pack_keep_map
from support.inputs import Case, check_attention, report
from support.passes import CASE, by_hand, passes


def test_splits_have_their_own_state_and_merge_to_the_whole() -> None:
    case = Case(query_len=256, kv_len=1024, heads=2)
    inputs = passes(case)
    ring = SeqParallelLiteAttention(num_nodes=4, threshold=-math.inf)
    q, k, v = inputs[0]
    parts = [
        ring(q, key, value, split, return_softmax_lse=True)
        for split, (key, value) in enumerate(zip(k.chunk(4, 1), v.chunk(4, 1), strict=True))
    ]
    out, lse = merge_attention(*zip(*parts, strict=True))
    whole = attention(q, k, v)
    torch.testing.assert_close((out, lse), whole, atol=1e-5, rtol=0)

    ring.set_threshold(-1.0)
    for split, (q, k, v) in itertools.product((3, 1), inputs):
        ring(q, k.chunk(4, 1)[split], v.chunk(4, 1)[split], split, case.scale)
    for split in range(4):
        expected = by_hand([(q, k.chunk(4, 1)[split], v.chunk(4, 1)[split]) for q, k, v in inputs], -1.0)[-1][2]
        if split in (1, 3):
            assert torch.equal(pack_keep_map(ring.keep_map(split)), expected)
        elif split == 0:
            assert ring.keep_map(split).all()
    assert float(ring.skip_fraction()) > 0
    ring.reset_skip_state()
    assert float(ring.skip_fraction()) == 0
    ring.enable_skip_optimization(False)
    assert torch.equal(ring(q, k, v, 2), attention(q, k, v)[0])


def test_sequence_parallel_takes_ranges_by_keyword() -> None:
    q, k, v = passes(count=1)[0]
    ring = SeqParallelLiteAttention(2)
    out, lse = ring(q, k, v, 1, CASE.scale, return_softmax_lse=True, must_do_list=[128, 0], must_skip_list=[0, 700])
    only = torch.zeros(2, 4, 7, 6, dtype=torch.bool)
    only[..., 0] = True
    check_attention(out, lse, q, k, v, pack_keep_map(only), None, CASE.scale)


def test_errors_begin_with_the_class_that_was_called() -> None:
    ring = SeqParallelLiteAttention(2, max_batch_size=1)
    heads = SeqParallelLiteAttention(2, threshold=[-1.0] * 3)
    x = torch.zeros(1, 8, 2, 8)
    calls = {
        "num_nodes": lambda: SeqParallelLiteAttention(0),
        "max_batch_size": lambda: SeqParallelLiteAttention(2, max_batch_size=0),
        "threshold": lambda: SeqParallelLiteAttention(2, threshold=1.0),
        "split_idx": lambda: ring(x, x, x, 2),
        "batch": lambda: ring(*[x.expand(2, -1, -1, -1)] * 3, 0),
        "branch": lambda: ring(x, x, x, 0, branch=8),
        "scale": lambda: ring(x, x, x, 0, "1"),
        "must_do_list": lambda: ring(x, x, x, 0, must_do_list=[0, 9]),
        "must_skip_list": lambda: ring(x, x, x, 0, must_skip_list=[0]),
        "must_do_queries": lambda: ring(x, x, x, 0, must_do_queries=[0, 9]),
        "start_full": lambda: ring(x, x, x, 0, start_full=True),
        "skip_fraction_out": lambda: ring(x, x, x, 0, skip_fraction_out=0.0),
        "thresholds": lambda: heads(x, x, x, 0),
    }
    assert_expected_inline(
        report(calls),
        """\
num_nodes -> ValueError: SeqParallelLiteAttention: num_nodes is 0, expected at least 1
max_batch_size -> ValueError: SeqParallelLiteAttention: max_batch_size is 0, expected at least 1
threshold -> ValueError: SeqParallelLiteAttention: threshold is 1.0, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
split_idx -> ValueError: SeqParallelLiteAttention: split_idx is 2, expected 0 to 1
batch -> ValueError: SeqParallelLiteAttention: query has batch 2, expected at most max_batch_size=1
branch -> ValueError: SeqParallelLiteAttention: branch is 8, expected 0 to 7
scale -> TypeError: SeqParallelLiteAttention: scale has type str, expected a float or None
must_do_list -> ValueError: SeqParallelLiteAttention: must_do_list[1] is 9, expected at most the number of keys, 8
must_skip_list -> ValueError: SeqParallelLiteAttention: must_skip_list has 1 entries, expected an even number: [start, end, start, end, ...] (entry 0, 0, has no partner)
must_do_queries -> ValueError: SeqParallelLiteAttention: must_do_queries[1] is 9, expected at most the number of queries, 8
start_full -> TypeError: SeqParallelLiteAttention: start_full has type bool, expected a tensor
skip_fraction_out -> TypeError: SeqParallelLiteAttention: skip_fraction_out has type float, expected a tensor
thresholds -> ValueError: SeqParallelLiteAttention: threshold has 3 values, expected 2, one per head""",
    )
