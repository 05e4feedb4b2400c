"""One attention by Ulysses: all tokens of a rank's heads come in, are attended to, and go home (arXiv 2309.14509)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
        """For each turn, how tensors with so many heads travel; all but the first count must divide evenly."""
        return [HeadExchange(self.group, spans) for spans in zip(*map(self.spans, heads), strict=True)]


class UlyssesPass:
    """The way of the tokens through one attention: out to the ranks that have their heads, and home.

    All transfers out begin at once, so that the heads of one turn travel while those of another are attended to.

    Args:
        turns: which heads go where.
        tensors: this rank's tokens, ``[B, S_local, heads of each, D]``, all of one dtype; the first is the query.
    """

    def __init__(self, turns: HeadTurns, *tensors: Tensor) -> None:
        self._exchanges = turns.exchanges(*(x.shape[2] for x in tensors))
        self._out = [exchange.start_scatter(*tensors) for exchange in self._exchanges]
        self._home: list[list[Flight[list[Tensor]]]] = []

    def arrived(self, turn: int = 0) -> list[Tensor]:
        """All tokens of the turn's heads of this rank, ``[B, S, heads of each, D]``."""
        return self._out[turn].wait()

    def send_home(self, *results: Tensor) -> None:
        """Begin to send back the results of the next turn, ``[B, S, heads of its query, any]``."""
        exchange = self._exchanges[len(self._home)]
        self._home.append([exchange.start_gather(x) for x in results])

    def returned(self) -> list[Tensor]:
        """All heads of this rank's tokens, ``[B, S_local, heads of the query, any]``: each of the results."""
        return [_joined([flight.wait() for flight in of_turns]) for of_turns in zip(*self._home, strict=True)]


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
