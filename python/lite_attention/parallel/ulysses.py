"""One attention by Ulysses: all tokens of a rank's heads come in, are attended to, and go home (arXiv 2309.14509)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lite_attention.ops.checks import equals_any
from lite_attention.parallel.collectives import Flight
from lite_attention.parallel.exchange import HeadExchange, Spans
from lite_attention.parallel.mesh import RankGroup

__all__ = ["HeadTurns", "UlyssesPass"]


class HeadTurns(NamedTuple):
    """Which heads each rank attends to, and in which of its turns: shares as equal as can be, the larger ones first."""

    group: RankGroup
    turns: int = 1

    @property
    def shares(self) -> int:
        """In how many the heads are cut."""
        return self.group.size * self.turns

    def check(self, name: str, what: str, heads: int) -> None:
        """That every share has a head; ``what`` has so many heads, or a threshold's values. Errors begin with ``name``.

        Raises:
            ValueError: there are too few.
        """
        if heads < self.shares:
            raise ValueError(
                f"{name}: {what} has {heads} {'values' if what == 'threshold' else 'heads'}, expected at least "
                f"{self.shares}: {self.group.size} ranks along 'ulysses' times {self.turns} head_chunks"
            )

    def of_rank(self, heads: int) -> slice:
        """The heads of this rank."""
        return slice(*_shares(heads, self.group.size)[self.group.rank])

    def spans(self, heads: int) -> list[Spans]:
        """For each turn, which heads go to which rank."""
        of_ranks = _shares(heads, self.group.size)
        if self.turns == 1:
            return [of_ranks]
        shares = [_shares(end - start, self.turns, start) for start, end in of_ranks]
        return list(zip(*shares, strict=True))

    def exchanges(self, *heads: int) -> list[HeadExchange]:
        """For each turn, how tensors with so many heads travel, of which the first is the query.

        Raises:
            ValueError: query heads would come to other ranks than the heads of another tensor that they belong to.
        """
        for number, count in enumerate(heads[1:], 1):
            if count != heads[0] and (count == 0 or heads[0] % count != 0 or count % self.shares != 0):
                raise ValueError(
                    f"HeadTurns: tensor {number} has {count} heads, expected the query's {heads[0]}, or a divisor of "
                    f"them that the {self.shares} shares of heads divide ({self.group.size} ranks in {self.turns} "
                    "turns): repeat the heads of keys and values until they are (repeat_interleave)"
                )
        return [HeadExchange(self.group, spans) for spans in zip(*map(self.spans, heads), strict=True)]


class UlyssesPass:
    """The way of the tokens through one attention: out to the ranks that have their heads, and home.

    All transfers out begin at once, so that the heads of one turn travel while those of another are attended to.

    Args:
        turns: which heads go where.
        tensors: this rank's tokens, ``[B, S_local, heads of each, D]``, all of one dtype; the first is the query. The
            others have as many heads, or fewer of which each belongs to as many neighbours of the query's; then ranks
            times turns divide them.

    Raises:
        NotImplementedError: on several ranks, a tensor belongs to a transform of torch.func, or has a tangent.
        ValueError: the tensors do not fit each other; the text names which.
    """

    def __init__(self, turns: HeadTurns, *tensors: Tensor) -> None:
        _check_alike(tensors)
        self._exchanges = turns.exchanges(*(x.shape[2] for x in tensors))
        self._ranks, self._local = turns.group.size, tensors[0].shape[:2]
        self._out = [exchange.start_scatter(*tensors) for exchange in self._exchanges]
        self._home: list[list[Flight[list[Tensor]]]] = []

    def arrived(self, turn: int = 0) -> list[Tensor]:
        """All tokens of the turn's heads of this rank, ``[B, S, heads of each, D]``."""
        return self._out[turn].wait()

    def send_home(self, *results: Tensor) -> None:
        """Begin to send back the results of the next turn, ``[B, S, heads of its query, any]``, equally many in each.

        Raises:
            RuntimeError: every turn has been sent home.
            ValueError: a result has another shape, or there are other numbers of them than in the turn before.
        """
        turn = len(self._home)
        if turn == len(self._exchanges):
            raise RuntimeError(f"UlyssesPass: send_home of turn {turn}, expected one call for each of the {turn} turns")
        if turn > 0 and len(results) != len(self._home[0]):
            raise ValueError(
                f"UlyssesPass: send_home of {len(results)} results, expected {len(self._home[0])} as in turn 0"
            )
        exchange = self._exchanges[turn]
        expected = [self._local[0], self._local[1] * self._ranks, exchange.own_heads]
        for number, x in enumerate(results):
            if x.dim() != 4 or not equals_any(list(x.shape[:3]), expected):
                raise ValueError(
                    f"UlyssesPass: result {number} of turn {turn} has shape {list(x.shape)}, expected "
                    f"[{', '.join(map(str, expected))}, any]: all tokens, padding too, of this rank's heads"
                )
        self._home.append([exchange.start_gather(x) for x in results])

    def returned(self) -> list[Tensor]:
        """All heads of this rank's tokens, ``[B, S_local, heads of the query, any]``: each of the results.

        Raises:
            RuntimeError: not every turn has been sent home.
        """
        if len(self._home) != len(self._exchanges):
            raise RuntimeError(
                f"UlyssesPass: returned() after {len(self._home)} calls of send_home, expected {len(self._exchanges)}, "
                "one for each turn"
            )
        return [_joined([flight.wait() for flight in of_turns]) for of_turns in zip(*self._home, strict=True)]


def _check_alike(tensors: Sequence[Tensor]) -> None:
    """That they can travel as heads of one tensor."""
    query = tensors[0]
    for number, x in enumerate(tensors):
        if x.dim() != 4:
            raise ValueError(
                f"UlyssesPass: tensor {number} has {x.dim()} dimensions, expected 4, [B, S_local, heads, D]"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"UlyssesPass: tensor {number} has dtype {x.dtype} on {x.device}, expected {query.dtype} on "
                f"{query.device} like the query"
            )
        expected = [*query.shape[:2], x.shape[2], query.shape[3]]
        if not equals_any(list(x.shape), expected):
            raise ValueError(
                f"UlyssesPass: tensor {number} has shape {list(x.shape)}, expected {expected} like the query"
            )


def _joined(by_turn: Sequence[Sequence[Tensor]]) -> Tensor:
    """Heads of each turn and rank, in the order of the ranks and, of each rank, of its turns."""
    pieces = [piece for of_rank in zip(*by_turn, strict=True) for piece in of_rank]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _shares(count: int, parts: int, start: int = 0) -> Spans:
    """(start, end) of ``count`` things in ``parts`` shares as equal as can be, the larger ones first."""
    if parts == 1:
        return ((start, start + count),)
    base, larger = divmod(count, parts)
    ends = [start + part * base + min(part, larger) for part in range(parts + 1)]
    return tuple(itertools.pairwise(ends))
