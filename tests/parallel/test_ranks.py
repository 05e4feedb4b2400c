"""The pool of rank processes itself: failures and hangs are reported, and end in bounded time."""

import time

import pytest
import torch.distributed as dist

from support.ranks import RankError, RankPool

pytestmark = pytest.mark.slow


def _fail(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError("as planned")
    dist.barrier()
    return dist.get_rank()


def _hang_in_a_named_function() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_a_rank_that_raises_is_reported_and_does_not_hold_up_the_test() -> None:
    pool = RankPool(2, "cpu")
    assert pool.run(_fail, (2,)) == [0, 1]
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1:.*ValueError: as planned.*still waiting then: ranks \[0\]"):
        pool.run(_fail, (1,))
    assert time.monotonic() - start < 30
    assert not pool.alive


def test_a_rank_that_hangs_is_killed_and_reported_with_its_stack() -> None:
    pool = RankPool(2, "cpu")
    pool.run(_fail, (2,))  # when the processes have started, two seconds are plenty
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[1\] hung for more than 2.0 s.*_hang_in_a_named_function"):
        pool.run(_hang_in_a_named_function, timeout=2.0)
    assert not pool.alive
