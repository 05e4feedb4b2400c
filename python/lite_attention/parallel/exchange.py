"""Heads for tokens: what Ulysses ranks send each other (DeepSpeed-Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lite_attention.parallel.collectives import Flight, check_sendable, start_all_to_all
from lite_attention.parallel.mesh import RankGroup

__all__ = ["HeadExchange", "Spans", "even_spans", "gather_heads", "scatter_heads", "select_heads"]

Spans = tuple[tuple[int, int], ...]
"""(start, end) of the heads that each rank gets."""


def even_spans(heads: int, ranks: int) -> Spans:
    """Equal shares of the heads, which the ranks divide."""
    share = heads // ranks
    return tuple((rank * share, (rank + 1) * share) for rank in range(ranks))


class HeadExchange(NamedTuple):
    """From a shard of the tokens with all heads to all tokens with some of the heads, and back.

    Tensors of one dtype that are sent together travel as heads of one tensor, in one transfer: a second one could not
    begin while attention has all multiprocessors.
    """

    group: RankGroup
    spans: tuple[Spans, ...]
    """For each of the tensors. What goes back has the heads of the first."""

    @property
    def own_heads(self) -> int:
        """How many heads of the first tensor this rank gets."""
        start, end = self.spans[0][self.group.rank]
        return end - start

    def start_scatter(self, *tensors: Tensor) -> Flight[list[Tensor]]:
        """Begin to send each rank its heads of the tensors, ``[B, S_local, H of each, D]``.

        The flight brings ``[B, ranks * S_local, this rank's heads of each, D]``.
        """
        rank, ranks = self.group.rank, self.group.size
        if ranks == 1:  # nothing travels
            own = [_heads(x, *spans[0]) for x, spans in zip(tensors, self.spans, strict=True)]
            return Flight(lambda: own)
        check_sendable("HeadExchange", **{f"tensor {number}": x for number, x in enumerate(tensors)})
        batch, local, _, _ = tensors[0].shape
        dtype = tensors[0].dtype
        counts = [end - start for start, end in (spans[rank] for spans in self.spans)]

        def unpack(arrived: Tensor) -> list[Tensor]:
            shards = arrived.view(ranks, batch, local, sum(counts), -1)
            heads = shards.transpose(0, 1).flatten(1, 2)  # copied only for more than one batch entry
            return list(_narrow(heads, dtype).split(counts, 2))

        packed, sent = self._packed(_wide(*tensors))
        return start_all_to_all(packed, [sent[rank]] * ranks, sent, self.group, unpack)

    def start_gather(self, x: Tensor) -> Flight[list[Tensor]]:
        """Begin to send each rank its tokens of ``x``, ``[B, ranks * S_local, heads of the first tensor, D]``.

        The flight brings the heads of each rank, ``[B, S_local, heads of that rank, D]``.
        """
        rank, ranks = self.group.rank, self.group.size
        if ranks == 1:
            return Flight(lambda: [x])
        check_sendable("HeadExchange", result=x)
        batch, local, dtype = x.shape[0], x.shape[1] // ranks, x.dtype
        counts = [end - start for start, end in self.spans[0]]

        elements = [count * batch * local * x.shape[3] for count in counts]

        def unpack(arrived: Tensor) -> list[Tensor]:
            pieces = _narrow(arrived, dtype).split(elements)
            return [piece.view(batch, local, count, -1) for piece, count in zip(pieces, counts, strict=True)]

        (wide,) = _wide(x)
        received = [count * batch * local * wide.shape[3] for count in counts]
        packed = wide.unflatten(1, (ranks, local)).transpose(0, 1).contiguous().view(-1)
        return start_all_to_all(packed, received, [received[rank]] * ranks, self.group, unpack)

    def _packed(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, list[int]]:
        """The heads of rank after rank, flat, and how many elements each rank is sent."""
        ranks = self.group.size
        parts = list(zip(tensors, self.spans, strict=True))
        per_head = [x.shape[0] * x.shape[1] * x.shape[3] for x in tensors]
        sent = [
            sum(size * (spans[rank][1] - spans[rank][0]) for size, spans in zip(per_head, self.spans, strict=True))
            for rank in range(ranks)
        ]
        if all(_evenly_spaced(spans, x.shape[2]) for x, spans in parts):
            views = [
                x.unflatten(2, (ranks, -1))[:, :, :, slice(*spans[0])].permute(2, 0, 1, 3, 4) for x, spans in parts
            ]
            packed = torch.cat(views, 3) if len(views) > 1 else views[0].contiguous()
        else:
            packed = torch.cat(
                [torch.cat([x[:, :, slice(*spans[rank])] for x, spans in parts], 2).flatten() for rank in range(ranks)]
            )
        return packed.view(-1), sent


def _heads(x: Tensor, start: int, end: int) -> Tensor:
    """A span of the heads; all of them without a view, which takes as long as a small operator."""
    return x if end - start == x.shape[2] else x[:, :, start:end]


def _evenly_spaced(spans: Spans, heads: int) -> bool:
    """Whether each rank gets the same heads of its share, all shares being equal."""
    share, start, end = heads // len(spans), *spans[0]
    return (
        heads % len(spans) == 0
        and end <= share
        and spans == tuple((rank * share + start, rank * share + end) for rank in range(len(spans)))
    )


def scatter_heads(x: Tensor, group: RankGroup) -> Tensor:
    """All tokens of this rank's share of the heads, from this rank's tokens of all heads.

    Args:
        x: ``[B, S_local, H, D]``, on every rank of the same shape; H is a multiple of the ranks.
        group: the ranks.

    Returns:
        ``[B, ranks * S_local, H / ranks, D]``.

    Raises:
        ValueError: H does not divide evenly.
    """
    return _even_exchange(x.shape[2], group, "scatter_heads").start_scatter(x).wait()[0]


def gather_heads(x: Tensor, group: RankGroup) -> Tensor:
    """All heads of this rank's tokens, from all tokens of its share of the heads: the inverse of scatter_heads.

    Args:
        x: ``[B, ranks * S_local, H / ranks, D]``, on every rank of the same shape.
        group: the ranks.

    Returns:
        ``[B, S_local, H, D]``.

    Raises:
        ValueError: the tokens do not divide evenly.
    """
    if x.shape[1] % group.size != 0:
        raise ValueError(f"gather_heads: x has {x.shape[1]} tokens, expected a multiple of the {group.size} ranks")
    if group.size == 1:
        return x
    return torch.cat(_even_exchange(x.shape[2] * group.size, group, "gather_heads").start_gather(x).wait(), 2)


def _even_exchange(heads: int, group: RankGroup, name: str) -> HeadExchange:
    if heads % group.size != 0:
        raise ValueError(f"{name}: x has {heads} heads, expected a multiple of the {group.size} ranks of the group")
    return HeadExchange(group, (even_spans(heads, group.size),))


def select_heads(x: Tensor, order: Tensor) -> Tensor:
    """The heads of ``x``, ``[B, S, H, D]``, in another order."""
    (wide,) = _wide(x)
    return _narrow(wide.index_select(2, order), x.dtype)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same bytes in elements of 8, if all the tensors can: eager copies of 2-byte ones take twice as long."""
    if torch.compiler.is_compiling() or not all(map(_fits_wide_elements, tensors)):
        return tensors
    return tuple(x.view(torch.int64) for x in tensors)


def _fits_wide_elements(x: Tensor) -> bool:
    width = 8 // x.element_size()
    offsets = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return not x.requires_grad and x.stride(-1) == 1 and all(offset % width == 0 for offset in offsets)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.view(dtype)
