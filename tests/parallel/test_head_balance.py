"""How heads are shared out between ranks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lite_attention.parallel.head_balance import assign_heads, imbalance


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_every_rank_gets_equally_many_heads_and_none_is_lost(ranks: int, each: int, data: st.DataObject) -> None:
    work = data.draw(st.lists(st.integers(0, 1000), min_size=ranks * each, max_size=ranks * each))
    assignment = assign_heads(work, ranks)
    assert [len(heads) for heads in assignment] == [each] * ranks
    assert sorted(itertools.chain.from_iterable(assignment)) == list(range(len(work)))
    assert assignment == assign_heads(work, ranks)
    # No swap of two heads between the busiest rank and another helps any more.
    loads = [sum(work[head] for head in heads) for heads in assignment]
    busiest = max(range(ranks), key=lambda rank: loads[rank])
    for rank, mine, theirs in itertools.product(range(ranks), assignment[busiest], range(each)):
        moved = work[mine] - work[assignment[rank][theirs]]
        assert rank == busiest or moved <= 0 or max(loads[busiest] - moved, loads[rank] + moved) >= loads[busiest]


def test_sorted_densities_are_balanced() -> None:
    work = [2 ** (head / 8) for head in range(40)]
    in_order = [list(range(rank * 10, rank * 10 + 10)) for rank in range(4)]
    assert imbalance(work, in_order) > 1.0
    assert imbalance(work, assign_heads(work, 4)) < 0.01


def test_one_heavy_head_is_what_it_is() -> None:
    assert imbalance([9, 1, 1, 1], assign_heads([9, 1, 1, 1], 2)) == pytest.approx(10 / 6 - 1)
    assert imbalance([0, 0], assign_heads([0, 0], 2)) == 0


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5 heads for 2 ranks, expected a multiple"):
        assign_heads([1] * 5, 2)
