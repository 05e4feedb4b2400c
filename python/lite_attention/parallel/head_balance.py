"""Which heads go to which rank, so that no rank waits for another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["HeadBalance", "assign_heads", "imbalance", "rebalanced"]

# Ranks that wait less than this share of the time for the slowest one keep their heads.
IMBALANCE_WORTH_MOVING = 0.05


class HeadBalance(NamedTuple):
    """Tiles that the busiest rank computes, over the mean of the ranks, minus 1."""

    before: float
    after: float


def rebalanced(work: Sequence[float], ranks: int) -> tuple[HeadBalance, list[list[int]] | None]:
    """What sharing out the heads anew would gain, and the heads of each rank, None where it is not worth moving them.

    Args:
        work: of each head; today each rank has as many neighbouring ones.
        ranks: how many; a divisor of the number of heads.
    """
    share = len(work) // ranks
    today = [list(range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    better = assign_heads(work, ranks)
    before, after = imbalance(work, today), imbalance(work, better)
    if (1 + before) / (1 + after) < 1 + IMBALANCE_WORTH_MOVING:
        return HeadBalance(before, before), None
    return HeadBalance(before, after), better


def imbalance(work: Sequence[float], assignment: Sequence[Sequence[int]]) -> float:
    """The busiest rank's work over the mean of the ranks, minus 1; 0 where there is no work."""
    loads = [sum(work[head] for head in heads) for heads in assignment]
    total = sum(loads)
    return max(loads) * len(loads) / total - 1.0 if total else 0.0


def assign_heads(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Share out heads so that the ranks' work is about equal, each rank getting equally many.

    The heaviest head left goes to the rank with the least work among those with room; then heads of the busiest rank
    are swapped with lighter ones as long as that makes it less busy.

    Args:
        work: of each head.
        ranks: how many; a divisor of the number of heads.

    Returns:
        The heads of each rank, ascending. The same on every rank that asks with the same work.

    Raises:
        ValueError: the heads do not divide evenly.
    """
    if ranks < 1 or len(work) % ranks != 0:
        raise ValueError(f"assign_heads: {len(work)} heads for {ranks} ranks, expected a multiple")
    room = len(work) // ranks
    assignment: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for head in sorted(range(len(work)), key=lambda head: (-work[head], head)):
        rank = min((rank for rank in range(ranks) if len(assignment[rank]) < room), key=lambda rank: loads[rank])
        assignment[rank].append(head)
        loads[rank] += work[head]
    while _swap(work, assignment, loads):
        pass
    return [sorted(heads) for heads in assignment]


def _swap(work: Sequence[float], assignment: list[list[int]], loads: list[float]) -> bool:
    """Make the one swap that leaves the busiest rank and its partner with the least maximum; False if none helps."""
    busiest = max(range(len(loads)), key=lambda rank: loads[rank])
    best: tuple[float, int, int, int] | None = None
    for rank in range(len(loads)):
        for mine, head in enumerate(assignment[busiest]):
            for theirs, other in enumerate(assignment[rank]):
                moved = work[head] - work[other]
                after = max(loads[busiest] - moved, loads[rank] + moved)
                if moved > 0 and after < loads[busiest] and (best is None or after < best[0]):
                    best = after, rank, mine, theirs
    if best is None:
        return False
    _, rank, mine, theirs = best
    moved = work[assignment[busiest][mine]] - work[assignment[rank][theirs]]
    assignment[busiest][mine], assignment[rank][theirs] = assignment[rank][theirs], assignment[busiest][mine]
    loads[busiest] -= moved
    loads[rank] += moved
    return True
