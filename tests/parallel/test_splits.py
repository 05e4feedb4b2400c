"""SeqParallelLiteAttention: a state for each split of the keys."""

import itertools
import math

import torch

from lite_attention import SeqParallelLiteAttention, attention, merge_attention, pack_keep_map
from support.inputs import Case, check_attention
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
