"""LiteAttention over a sequence that is shared by the ranks of a DeviceMesh: Ulysses, ring attention, or both.

Along the mesh's dimension "ulysses" ranks exchange tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509): each sees
the keys of all of them for its share of the heads, so its decisions are those of one GPU, bit for bit. Along "ring" the
keys travel (Ring Attention, arXiv 2310.01889) while the queries stay; the partial results are merged by their softmax
denominators. With both (USP, arXiv 2405.07719) keys travel between groups that have exchanged heads.

Skip state belongs to a split of the keys, whichever step of the ring it arrives in. Each split starts with a running
maximum of its own, so that a decision depends on the split alone and not on the order of arrival.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lite_attention.maps.keep_map import tile_counts
from lite_attention.ops.functional import merge_attention
from lite_attention.parallel.collectives import (
    HeadExchange,
    Spans,
    all_gather,
    all_reduce,
    even_spans,
    finish_shift,
    select_heads,
    sequence_mesh,
    start_shift,
)
from lite_attention.parallel.head_balance import assign_heads, imbalance
from lite_attention.parallel.splits import SeqParallelLiteAttention
from lite_attention.skipping.arguments import (
    CheckedRanges,
    Ranges,
    Threshold,
    check_inputs,
    check_kv_lens,
    check_scalar,
    check_scale,
    checked_ranges,
    checked_threshold,
)
from lite_attention.skipping.branches import resolved_branch
from lite_attention.skipping.module import LiteAttention

__all__ = ["DistributedLiteAttention", "HeadBalance"]

_NAME = "DistributedLiteAttention"

# Ranks that wait less than this share of the time for the slowest one keep their heads.
IMBALANCE_WORTH_MOVING = 0.05


class HeadBalance(NamedTuple):
    """Tiles that the busiest rank computes, over the mean of the ranks, minus 1."""

    before: float
    after: float


class DistributedLiteAttention(nn.Module):
    """:class:`lite_attention.LiteAttention` whose tokens lie on several ranks.

    Every rank calls it with its shard of the tokens, at the same time and with the same other arguments, and gets the
    shard's result. Shards are equally long (:func:`lite_attention.parallel.collectives.shard_sequence`).

    Args:
        mesh: the ranks that share a sequence; its dimensions are named "ring" and "ulysses", or one of the two. The
            rank at (r, u) holds shard ``r * ulysses + u``.
        enable_skipping, threshold, max_batch_size: as for LiteAttention; a threshold for each head names the heads of
            the whole model.
        head_chunks: in how many turns a rank computes its heads. With more than one, the exchange of one turn's heads
            overlaps the attention of another's.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    _head_order: Tensor | None

    def __init__(
        self,
        mesh: DeviceMesh,
        enable_skipping: bool = True,
        threshold: Threshold = -10.0,
        max_batch_size: int = 4,
        *,
        head_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.ranks = sequence_mesh(mesh, _NAME)
        self._device_type = mesh.device_type
        if isinstance(head_chunks, bool) or not isinstance(head_chunks, int):
            raise TypeError(f"{_NAME}: head_chunks has type {type(head_chunks).__name__}, expected an int")
        if head_chunks < 1:
            raise ValueError(f"{_NAME}: head_chunks is {head_chunks}, expected at least 1")
        self.head_chunks = head_chunks
        self.max_batch_size = max_batch_size
        # One state for each split of the keys and each chunk of this rank's heads.
        self.states = SeqParallelLiteAttention(
            self.ranks.ring.size * head_chunks, enable_skipping, max_batch_size=max_batch_size
        )
        # Position -> head, where heads were assigned to ranks by their work.
        self.register_buffer("_head_order", None, persistent=False)
        # The same for Python, and the numbers of heads and of heads for each key head that it is meant for.
        self._order_of_ranks: tuple[int, ...] | None = None
        self._ordered: tuple[int, int] | None = None
        self.set_threshold(threshold)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        return_softmax_lse: bool = False,
        must_do_list: Ranges | None = None,
        must_skip_list: Ranges | None = None,
        *,
        seq_len: int | None = None,
        kv_lens: Tensor | None = None,
        branch: int | None = None,
        must_do_queries: Ranges | None = None,
        start_full: Tensor | None = None,
        skip_fraction_out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One attention pass; a collective call.

        Args:
            query: this rank's shard, ``[batch, tokens / ranks, heads, head_dim]``.
            key, value: its shard of the keys, equally long; heads is a multiple of their kv_heads. Where the ranks
                along "ulysses" (times ``head_chunks``) do not divide kv_heads, keys are sent once for each query head.
            seq_len: tokens of the whole sequence; those at and past it pad the last shards. None: no padding.
            must_do_list, must_skip_list, must_do_queries, kv_lens: as for LiteAttention, in tokens of the whole
                sequence and the same on every rank.
            scale, return_softmax_lse, branch, start_full: as for LiteAttention.
            skip_fraction_out: as for LiteAttention; receives the share of the tiles that this rank skips.

        Returns:
            out, of query's shape and dtype, 0 in the padding; with ``return_softmax_lse`` also lse, fp32
            ``[batch, heads, tokens / ranks]``, -inf in the padding.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it.
            RuntimeError: the operator refuses an argument; the text names it.
        """
        # Everything that one rank could find wrong alone, after others have begun to wait for it.
        check_inputs(_NAME, query, key, value, self.max_batch_size)
        if key.shape[1] != query.shape[1]:
            raise ValueError(f"{_NAME}: key has {key.shape[1]} tokens, expected {query.shape[1]} like query")
        check_scale(_NAME, scale)
        check_kv_lens(_NAME, kv_lens, query)
        check_scalar(_NAME, "start_full", start_full, torch.bool, query)
        check_scalar(_NAME, "skip_fraction_out", skip_fraction_out, torch.float32, query)
        seq_len = _checked_seq_len(seq_len, query.shape[1] * self.ranks.shards)
        arguments = _PassArguments(
            scale,
            checked_ranges(_NAME, "must_do_list", must_do_list, query, seq_len, "keys"),
            checked_ranges(_NAME, "must_skip_list", must_skip_list, query, seq_len, "keys"),
            checked_ranges(_NAME, "must_do_queries", must_do_queries, query, seq_len, "queries"),
            kv_lens,
            resolved_branch(branch, _NAME),
            start_full,
            seq_len,
        )
        heads, kv_heads = query.shape[2], key.shape[2]
        self._check_heads("query", heads)
        if self._thresholds is not None and self._thresholds != heads:
            raise ValueError(
                f"{_NAME}: threshold has {self._thresholds} values, expected {heads}, one per head of query"
            )
        if kv_heads % (self.ranks.ulysses.size * self.head_chunks) != 0:
            key, value = (x.repeat_interleave(heads // kv_heads, 2) for x in (key, value))
        group = heads // key.shape[2]
        if self._head_order is not None:
            if self._ordered != (heads, group):
                raise ValueError(
                    f"{_NAME}: heads of query, and of those for each key head that is sent, are {(heads, group)}, "
                    f"expected {self._ordered} as when balance_heads() was called"
                )
            query = select_heads(query, self._head_order)
            key, value = (select_heads(x, self._head_order[::group] // group) for x in (key, value))

        # All exchanges begin at once; each chunk of heads is computed when its own has arrived.
        chunks = self._exchanges(heads, group)
        flights = [chunk.start_scatter(query, key, value) for chunk in chunks]
        outs, lses, skipped = _Returned(), _Returned(), []
        for index, (chunk, flight) in enumerate(zip(chunks, flights, strict=True)):
            arrived = chunk.finish_scatter(flight, query, key, value)
            out, lse, fractions = self._ring(index, arrived, arguments, skip_fraction_out is not None)
            outs.send(chunk, out)
            if return_softmax_lse:
                lses.send(chunk, lse.transpose(1, 2).unsqueeze(-1))
            skipped += fractions
        if skip_fraction_out is not None:
            skip_fraction_out.zero_()
            all_tiles = sum(tiles for _, tiles in skipped)
            for fraction, tiles in skipped:
                skip_fraction_out.add_(fraction, alpha=tiles / all_tiles)
        whole_out = self._in_order(outs.arrived())
        if not return_softmax_lse:
            return whole_out
        return whole_out, self._in_order(lses.arrived()).squeeze(-1).transpose(1, 2)

    def _check_heads(self, what: str, heads: int) -> None:
        least = self.ranks.ulysses.size * self.head_chunks
        if heads < least:
            raise ValueError(
                f"{_NAME}: {what} has {heads} {'values' if what == 'threshold' else 'heads'}, expected at least "
                f"{least}: {self.ranks.ulysses.size} ranks along 'ulysses' times {self.head_chunks} head_chunks"
            )

    def _spans(self, heads: int) -> list[Spans]:
        """For each chunk, which heads (positions, where they are reordered) go to which rank."""
        # The remainder goes to the first ranks, and in each rank to the first chunks.
        shares = [
            _shares(end - start, self.head_chunks, start) for start, end in _shares(heads, self.ranks.ulysses.size)
        ]
        return [tuple(share[chunk] for share in shares) for chunk in range(self.head_chunks)]

    def _exchanges(self, heads: int, group: int) -> list[HeadExchange]:
        """For each chunk, how query, key and value travel; ``group`` query heads share a key head."""
        exchanges = []
        for spans in self._spans(heads):
            of_keys = tuple((start // group, end // group) for start, end in spans)
            exchanges.append(HeadExchange(self.ranks.ulysses, (spans, of_keys, of_keys)))
        return exchanges

    def _ring(
        self, chunk: int, block_of: Sequence[Tensor], arguments: _PassArguments, want_fractions: bool
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, int]]]:
        """Attention of this rank's block of queries to all blocks of keys, which come round one after the other."""
        query, key, value = block_of
        ring, block, kv_heads = self.ranks.ring, query.shape[1], key.shape[2]
        # Keys and values travel together: a second transfer could not begin while attention has all multiprocessors.
        kv = torch.cat([key, value], 2) if ring.size > 1 else key
        rows = min(max(arguments.seq_len - ring.rank * block, 0), block)
        query = query[:, :rows]
        outs, lses, fractions = [], [], []
        for step in range(ring.size):
            split = (ring.rank - step) % ring.size
            flight = start_shift(kv, ring) if step + 1 < ring.size else None
            keys = min(max(arguments.seq_len - split * block, 0), block)
            if rows > 0 and keys > 0:
                fraction = torch.zeros((), device=query.device) if want_fractions else None
                out, lse = self.states(
                    query,
                    key[:, :keys],
                    value[:, :keys],
                    split * self.head_chunks + chunk,
                    return_softmax_lse=True,
                    skip_fraction_out=fraction,
                    **arguments.of_split(ring.rank * block, rows, split * block, keys),
                )
                outs.append(out)
                lses.append(lse)
                if fraction is not None:
                    tiles = math.prod(tile_counts(rows, keys, query.shape[3], query.dtype))
                    fractions.append((fraction, query.shape[2] * tiles))
            if flight is not None:
                kv = finish_shift(flight, kv)
                key, value = kv[:, :, :kv_heads], kv[:, :, kv_heads:]
        if rows == 0:
            batch, _, heads, head_dim = query.shape
            no_key = query.new_full((batch, heads, block), -torch.inf, dtype=torch.float32)
            return query.new_zeros(batch, block, heads, head_dim), no_key, fractions
        out, lse = (outs[0], lses[0]) if len(outs) == 1 else merge_attention(outs, lses)
        if rows < block:
            out, lse = F.pad(out, (0, 0, 0, 0, 0, block - rows)), F.pad(lse, (0, block - rows), value=-torch.inf)
        return out, lse, fractions

    def _in_order(self, x: Tensor) -> Tensor:
        """Heads from the order of the ranks in that of the model."""
        return x if self._head_order is None else select_heads(x, self._head_order.argsort())

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold: one number, or one for each query head of the whole model.

        As :meth:`lite_attention.LiteAttention.set_threshold`.
        """
        values = checked_threshold(f"{_NAME}: threshold", threshold, self._state(0, 0).allows_positive_threshold)
        if isinstance(values, tuple):
            self._check_heads("threshold", len(values))
            if self._ordered is not None and len(values) != self._ordered[0]:
                raise ValueError(
                    f"{_NAME}: threshold has {len(values)} values, expected {self._ordered[0]}, one per head as when "
                    "balance_heads() was called"
                )
        for chunk in range(self.head_chunks):
            of_chunk = values
            if isinstance(values, tuple):
                start, end = self._spans(len(values))[chunk][self.ranks.ulysses.rank]
                of_chunk = tuple(values[head] for head in self._order(len(values))[start:end])
            for split in range(self.ranks.ring.size):
                self._state(split, chunk).set_threshold(of_chunk)
        self._threshold = values
        # A count alone, so that compiled code does not depend on the values.
        self._thresholds = len(values) if isinstance(values, tuple) else None

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """The threshold in powers of two: one number, or one for each query head of the whole model."""
        return self._threshold

    def reset_skip_state(self, branch: int | None = None) -> None:
        """Forget what was dropped, in one branch or in all of them."""
        self.states.reset_skip_state(branch)

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """Switch between skipping and dense attention."""
        self.states.enable_skip_optimization(enable)

    def skip_fraction(self, branch: int | None = None) -> Tensor:
        """Share of this rank's tiles that the branch's next pass will skip; fp32, 0-d, without a sync."""
        return self.states.skip_fraction(branch)

    def local_heads(self, heads: int) -> list[int]:
        """Which of the model's so many query heads this rank computes, in the order of its keep maps."""
        rank = self.ranks.ulysses.rank
        self._check_heads("the model", heads)
        spans = [chunk[rank] for chunk in self._spans(heads)]
        return list(self._order(heads)[spans[0][0] : spans[-1][1]])

    def keep_map(self, split_idx: int = 0, branch: int | None = None) -> Tensor:
        """The map of this rank's heads and one split of the keys: bool ``[batch, local heads, query_tiles, kv_tiles]``.

        The query tiles are those of this rank's block of the ring; see :meth:`lite_attention.LiteAttention.keep_map`.

        Raises:
            RuntimeError: the branch has not run yet.
            ValueError: there is no such split.
        """
        return torch.cat([state.keep_map(branch) for state in self._states_of(split_idx)], 1)

    def set_keep_map(self, keep_map: Tensor, split_idx: int = 0, branch: int | None = None) -> None:
        """Choose the map of the branch's next pass, of this rank's heads and one split; the inverse of keep_map.

        Raises:
            RuntimeError: the branch has not run yet.
            TypeError, ValueError: there is no such split, or ``keep_map`` is not bool or does not broadcast to its map.
        """
        states = self._states_of(split_idx)
        counts = [state.keep_map(branch).shape[1] for state in states]
        if keep_map.dim() != 4 or keep_map.shape[1] not in (1, sum(counts)):
            raise ValueError(
                f"set_keep_map: keep_map has shape {list(keep_map.shape)}, expected [batch, {sum(counts)}, "
                "query_tiles, kv_tiles] or sizes of 1"
            )
        whole = keep_map.expand(-1, sum(counts), -1, -1)
        for state, of_chunk in zip(states, whole.split(counts, 1), strict=True):
            state.set_keep_map(of_chunk, branch)

    def _states_of(self, split: int) -> list[LiteAttention]:
        """Those of one split, a state for each chunk of heads."""
        if not 0 <= split < self.ranks.ring.size:
            raise ValueError(f"{_NAME}: split_idx is {split}, expected 0 to {self.ranks.ring.size - 1}")
        return [self._state(split, chunk) for chunk in range(self.head_chunks)]

    @torch.inference_mode(False)  # an inference tensor could not be written outside that mode
    def balance_heads(self) -> HeadBalance:
        """Assign heads to ranks so that all have about as many tiles to compute; a collective call between steps.

        Every rank keeps as many heads as before. Nothing changes where that would leave the busiest rank less than 5 %
        fewer tiles. Otherwise the maps travel with their heads and later passes send each head where it now belongs;
        only the first such change needs compiled code to be compiled, and graphs to be captured, again.
        Waits for the device.

        Raises:
            RuntimeError: no skipping pass has run yet, or the sequence is so short that a rank has no token of it.
            ValueError: the heads do not divide evenly between the ranks.
        """
        ring, ulysses = self.ranks.ring, self.ranks.ulysses
        # The ranks that exchange heads have made the same calls; in a ring some may have no token of a short sequence.
        with_map = [(split, branch) for split in range(ring.size) for branch in self._state(split, 0).used_branches()]
        maps = {key: self.keep_map(*key) for key in with_map}
        local_heads = next(iter(maps.values())).shape[1] if maps else 0
        facts = torch.tensor([float(len(maps) > 0), float(local_heads)], device=self._device_type)
        ranks_with_maps, heads_of_all = all_reduce(all_reduce(facts, ulysses), ring).tolist()
        if ranks_with_maps != self.ranks.shards:
            raise RuntimeError(f"{_NAME}: balance_heads without maps on every rank, expected a skipping pass before")
        heads = int(heads_of_all) // ring.size
        if heads % (ulysses.size * self.head_chunks) != 0:
            raise ValueError(
                f"{_NAME}: balance_heads with {heads} heads, expected a multiple of {ulysses.size * self.head_chunks}, "
                "so that every rank keeps as many"
            )
        # Query heads that share a head of keys stay together. Positions are counted in such groups.
        split, branch = with_map[0]
        group = self._state(split, 0).query_heads_per_key(branch)
        kept = torch.stack([keep.sum((0, 2, 3)) for keep in maps.values()]).sum(0)
        kept_tiles = all_reduce(all_gather(kept.view(-1, group).sum(1), ulysses, 0), ring)
        work = [int(tiles) for tiles in kept_tiles.tolist()]
        today = [list(range(*span)) for span in even_spans(len(work), ulysses.size)]
        better = assign_heads(work, ulysses.size)
        before, after = imbalance(work, today), imbalance(work, better)
        if (1 + before) / (1 + after) < 1 + IMBALANCE_WORTH_MOVING:
            return HeadBalance(before, before)
        positions = [unit * group + member for unit in itertools.chain.from_iterable(better) for member in range(group)]
        order = self._order(heads)
        self._set_order(tuple(order[position] for position in positions), group)
        mine = positions[ulysses.rank * local_heads :][:local_heads]
        for key, keep in maps.items():
            self.set_keep_map(all_gather(keep, ulysses, 1)[:, mine], *key)
        self.set_threshold(self._threshold)
        return HeadBalance(before, after)

    def _order(self, heads: int) -> Sequence[int]:
        """The model's heads in the order of the ranks."""
        return range(heads) if self._order_of_ranks is None else self._order_of_ranks

    def _set_order(self, order: tuple[int, ...], group: int) -> None:
        new = torch.tensor(order, device=self._device_type)
        self._order_of_ranks, self._ordered = order, (len(order), group)
        if self._head_order is not None and not self._head_order.is_inference():
            self._head_order.copy_(new)
            return
        self._head_order = new
        for split in self.states.splits:
            split.outdate_captured_graphs()  # type: ignore[operator]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistributedLiteAttention:
        """As nn.Module's, but the order of the heads survives a move to memory that holds nothing (``to_empty``)."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._head_order is not None:
            self._head_order = torch.tensor(self._order_of_ranks, device=self._head_order.device)
        return self

    def _state(self, split: int, chunk: int) -> LiteAttention:
        return self.states.splits[split * self.head_chunks + chunk]  # type: ignore[return-value]


class _PassArguments(NamedTuple):
    """What holds for the whole sequence in one pass."""

    scale: float | None
    must_do: CheckedRanges | None
    must_skip: CheckedRanges | None
    must_do_queries: CheckedRanges | None
    kv_lens: Tensor | None
    branch: int | None
    start_full: Tensor | None
    seq_len: int

    def of_split(self, first_row: int, rows: int, first_key: int, keys: int) -> dict[str, Any]:
        """The same for one block of queries and one split of the keys, which count from their own start."""
        return {
            "scale": self.scale,
            "must_do_list": _within(self.must_do, first_key, keys),
            "must_skip_list": _within(self.must_skip, first_key, keys),
            "must_do_queries": _within(self.must_do_queries, first_row, rows),
            "kv_lens": None if self.kv_lens is None else (self.kv_lens - first_key).clamp(0, keys),
            "branch": self.branch,
            "start_full": self.start_full,
        }


class _Returned:
    """Chunks of heads on their way back to the ranks whose tokens they are of."""

    def __init__(self) -> None:
        self._flights: list[tuple[HeadExchange, Tensor, Tensor]] = []

    def send(self, exchange: HeadExchange, x: Tensor) -> None:
        self._flights.append((exchange, exchange.start_gather(x), x))

    def arrived(self) -> Tensor:
        """All heads, in the order of the ranks."""
        by_chunk = [exchange.finish_gather(flight, x) for exchange, flight, x in self._flights]
        pieces = [piece for of_rank in zip(*by_chunk, strict=True) for piece in of_rank]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _shares(count: int, parts: int, start: int = 0) -> list[tuple[int, int]]:
    """(start, end) of ``count`` things in ``parts`` shares as equal as can be, the larger ones first."""
    base, larger = divmod(count, parts)
    ends = list(itertools.accumulate((base + (part < larger) for part in range(parts)), initial=start))
    return list(itertools.pairwise(ends))


def _checked_seq_len(seq_len: int | None, tokens: int) -> int:
    if seq_len is None:
        return tokens
    if isinstance(seq_len, bool) or not isinstance(seq_len, (int, torch.SymInt)):
        raise TypeError(f"{_NAME}: seq_len has type {type(seq_len).__name__}, expected an int")
    if not 0 < seq_len <= tokens:
        raise ValueError(f"{_NAME}: seq_len is {seq_len}, expected 1 to {tokens}, the tokens of all shards")
    return operator.index(seq_len)


def _within(ranges: CheckedRanges | None, start: int, length: int) -> Ranges | None:
    """The part of the ranges from ``start`` on, counted from there."""
    if ranges is None:
        return None
    if isinstance(ranges, Tensor):
        return (ranges - start).clamp(0, length)
    clipped = [(max(low - start, 0), min(high - start, length)) for low, high in ranges]
    return [position for low, high in clipped if low < high for position in (low, high)]
