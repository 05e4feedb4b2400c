"""LiteAttention over a sequence that is shared by the ranks of a DeviceMesh: Ulysses, ring attention, or both.

Along the mesh's dimension "ulysses" ranks exchange tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509): each sees
the keys of all of them for its share of the heads, so its decisions are those of one GPU, bit for bit. Along "ring" the
keys travel (Ring Attention, arXiv 2310.01889) while the queries stay; the partial results are merged by their softmax
denominators. With both (USP, arXiv 2405.07719) keys travel between groups that have exchanged heads.

Skip state belongs to a split of the keys, whichever step of the ring it arrives in. Each split starts with a running
maximum of its own, so that a decision depends on the split alone and not on the order of arrival.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lite_attention import ops
from lite_attention.ops import backward_pass
from lite_attention.ops.call import check_tensors
from lite_attention.ops.checks import checked_bool, checked_int
from lite_attention.ops.own_state import hold
from lite_attention.parallel.collectives import all_gather, all_reduce, check_sendable
from lite_attention.parallel.head_balance import HeadBalance, rebalanced
from lite_attention.parallel.head_order import HeadOrder
from lite_attention.parallel.mesh import sequence_mesh
from lite_attention.parallel.ring import blocks_of_ring, merged_parts
from lite_attention.parallel.sequence_arguments import SequenceArguments
from lite_attention.parallel.shards import block_of
from lite_attention.parallel.skipped_share import SkippedShare
from lite_attention.parallel.splits import StatesOfRank
from lite_attention.parallel.ulysses import HeadTurns, UlyssesPass
from lite_attention.skipping.arguments import (
    Ranges,
    Threshold,
    check_skip_fraction_out,
    checked_inputs,
    checked_threshold,
)
from lite_attention.skipping.branches import BranchHolder, resolved_branch
from lite_attention.skipping.computed_pass import ComputedPass, remember
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy

__all__ = ["DistributedLiteAttention"]

_NAME = "DistributedLiteAttention"


@dataclasses.dataclass
class _ToldThreshold:
    """What a layer and its ``copy.copy`` were told for all heads; each state has the values of its own heads."""

    threshold: float | tuple[float, ...]
    per_head: int | None = None
    """How many values, if one for each head: all that compiled code depends on."""


class DistributedLiteAttention(BranchHolder):
    """:class:`lite_attention.LiteAttention` whose tokens lie on several ranks.

    Every rank calls it with its shard of the tokens, at the same time and with the same other arguments, and gets the
    shard's result. Shards are equally long (:func:`lite_attention.parallel.shards.shard_sequence`).

    ``copy.copy`` shares the states, thresholds and order of heads with the original; ``copy.deepcopy`` has its own.

    Args:
        mesh: the ranks that share a sequence; its dimensions are named "ring" and "ulysses", or one of the two. The
            rank at (r, u) holds shard ``r * ulysses + u``.
        enable_skipping, threshold, max_batch_size, policy: as for LiteAttention; a threshold for each head names the
            heads of the whole model.
        head_chunks: in how many turns a rank computes its heads. With more than one, the exchange of one turn's heads
            overlaps the attention of another's.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    head_order: HeadOrder

    def __init__(
        self,
        mesh: DeviceMesh,
        enable_skipping: bool | None = None,
        threshold: Threshold | None = None,
        max_batch_size: int = 4,
        *,
        head_chunks: int = 1,
        policy: SkipPolicy | None = None,
    ) -> None:
        super().__init__()
        self.ranks = sequence_mesh(mesh, _NAME)
        self._device_type = mesh.device_type
        policy = SkipPolicy.resolve(_NAME, policy, enable_skipping=enable_skipping, threshold=threshold)
        self.head_chunks = checked_int(f"{_NAME}: head_chunks", head_chunks, lowest=1)
        self.max_batch_size = checked_int(f"{_NAME}: max_batch_size", max_batch_size, lowest=1)
        # One state for each split of the keys and each turn, in which a chunk of this rank's heads is computed.
        # Their thresholds are of their heads, which are known once those of the whole model are dealt out.
        self.states = StatesOfRank(
            self.ranks.ring.size * head_chunks,
            max_batch_size=max_batch_size,
            policy=dataclasses.replace(policy, threshold=SkipPolicy.threshold),
        )
        self._policy = policy
        hold(self, "head_order", HeadOrder())
        self._turns = HeadTurns(self.ranks.ulysses, head_chunks)
        self._told = _ToldThreshold(policy.threshold)
        self.set_threshold(policy.threshold)

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
        generation: Tensor | None = None,
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
            scale, return_softmax_lse, branch, start_full, generation: as for LiteAttention.
            skip_fraction_out: as for LiteAttention; receives the share of the tiles that this rank skips.

        Returns:
            out, of query's shape and dtype, 0 in the padding; with ``return_softmax_lse`` also lse, fp32
            ``[batch, heads, tokens / ranks]``, -inf in the padding.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it.
            RuntimeError: the operator refuses an argument; the text names it. With skipping enabled, inside a backward
                pass, as for LiteAttention.
            NotImplementedError: as for LiteAttention; on several ranks with skipping off too where a tensor has a
                forward-mode derivative or belongs to a transform of torch.func.
        """
        query, key, value = checked_inputs(_NAME, query, key, value, self.max_batch_size)
        if key.shape[1] != query.shape[1]:
            raise ValueError(f"{_NAME}: key has {key.shape[1]} tokens, expected {query.shape[1]} like query")
        checked_bool(f"{_NAME}: return_softmax_lse", return_softmax_lse)
        check_skip_fraction_out(_NAME, skip_fraction_out, query)
        sequence = SequenceArguments.checked(
            _NAME,
            query,
            query.shape[1] * self.ranks.shards,
            seq_len,
            scale,
            must_do_list,
            must_skip_list,
            must_do_queries,
            kv_lens,
            resolved_branch(branch, _NAME, self.chosen_branch),
            start_full,
            generation,
        )
        if self._state(0, 0).skipping and backward_pass.running:
            backward_pass.refuse(_NAME)  # before ranks wait for each other
        if self.ranks.shards > 1:
            check_sendable(_NAME, query=query, key=key, value=value)
        ulysses = UlyssesPass(self._turns, *self._for_ranks(query, key, value))
        skipped = None if skip_fraction_out is None else SkippedShare()
        passes: list[ComputedPass] = []
        notes: list[Callable[[], None]] = []
        for turn in range(self.head_chunks):
            q, k, v = ulysses.arrived(turn)
            parts = self._attend(turn, q, k, v, sequence, skipped, notes)
            passes += parts
            out, lse = merged_parts([(part.out, part.lse) for part in parts], q)
            ulysses.send_home(out, *([lse.transpose(1, 2).unsqueeze(-1)] if return_softmax_lse else []))
        if skipped is not None and skip_fraction_out is not None:
            skipped.write_to(skip_fraction_out)
        out, *lses = (self.head_order.to_model(x) for x in ulysses.returned())
        remember(*passes, notes=notes)  # last, so that no turn is ahead of another where one of them fails
        return (out, lses[0].squeeze(-1).transpose(1, 2)) if return_softmax_lse else out

    def _for_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads as they are sent: a share of the key heads for each rank and turn, all in the order of the ranks."""
        heads, kv_heads = query.shape[2], key.shape[2]
        self._turns.check(_NAME, "query", heads)
        if self._told.per_head is not None and self._told.per_head != heads:
            raise ValueError(
                f"{_NAME}: threshold has {self._told.per_head} values, expected {heads}, one per head of query"
            )
        if kv_heads % self._turns.shares != 0:
            key, value = (x.repeat_interleave(heads // kv_heads, 2) for x in (key, value))
        self.head_order.check(_NAME, heads, heads // key.shape[2])
        return self.head_order.to_ranks(query, key, value)

    def _attend(
        self,
        turn: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequence: SequenceArguments,
        skipped: SkippedShare | None,
        notes: list[Callable[[], None]],
    ) -> list[ComputedPass]:
        """Attention of this rank's block of queries to each block of keys; these come round one after the other."""
        rank, tokens = self.ranks.ring.rank, query.shape[1]
        rows = block_of(rank, tokens, sequence.seq_len)
        own = query[:, : rows.length]
        parts = []
        for split, block_key, block_value in blocks_of_ring(key, value, self.ranks.ring):
            keys = block_of(split, tokens, sequence.seq_len)
            state = self._state(split, turn)
            if rows.length > 0 and keys.length > 0:
                part = state.computed_pass(
                    own,
                    block_key[:, : keys.length],
                    block_value[:, : keys.length],
                    skip_fraction_out=None if skipped is None else skipped.of_call(own, keys.length),
                    **sequence.of_split(rows, keys),
                )
                parts.append(part)
                continue
            # Padding alone: nothing to compute, and a state that has to know of the pass all the same.
            notes.append(partial(state.state.note_pass_elsewhere, sequence.branch, query, *sequence.of_pass))
            if split == rank:  # no token of its own: refuse here, too, what the operator refuses on the others
                ops.attention(query[:, :1], key[:, :1], value[:, :1], scale=sequence.scale)
        return parts

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold: one number, or one for each query head of the whole model.

        As :meth:`lite_attention.LiteAttention.set_threshold`.
        """
        values = checked_threshold(f"{_NAME}: threshold", threshold, self._state(0, 0).allows_positive_threshold)
        per_head = len(values) if isinstance(values, tuple) else None
        if per_head is not None:
            self._turns.check(_NAME, "threshold", per_head)
            ordered = self.head_order.meant_for
            if ordered is not None and per_head != ordered[0]:
                raise ValueError(
                    f"{_NAME}: threshold has {per_head} values, expected {ordered[0]}, one per head as when "
                    "balance_heads() was called"
                )
        for turn in range(self.head_chunks):
            of_turn = values
            if isinstance(values, tuple):
                start, end = self._turns.spans(len(values))[turn][self.ranks.ulysses.rank]
                of_turn = tuple(values[head] for head in self.head_order.heads(len(values))[start:end])
            for split in range(self.ranks.ring.size):
                self._state(split, turn).state.set_threshold(of_turn)
        self._told.threshold, self._told.per_head = values, per_head

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """The threshold in powers of two: one number, or one for each query head of the whole model."""
        return self._told.threshold

    @property
    def policy(self) -> SkipPolicy:
        """What the layer is told about skipping, as it is now."""
        return self._policy.with_checked(threshold=self._told.threshold, enabled=self._state(0, 0).skipping)

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
        self._turns.check(_NAME, "the model", heads)
        return list(self.head_order.heads(heads)[self._turns.of_rank(heads)])

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

        Ends the branch's dense steps and fits any ``generation`` as that of :class:`lite_attention.LiteAttention` does.

        Raises:
            RuntimeError: the branch has not run yet.
            TypeError, ValueError: there is no such split, or ``keep_map`` is no tensor of bool or does not broadcast to
                its map.
        """
        check_tensors("set_keep_map", keep_map=keep_map)
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
        """Those of one split, a state for each turn."""
        checked_int(f"{_NAME}: split_idx", split, 0, self.ranks.ring.size - 1)
        return [self._state(split, turn) for turn in range(self.head_chunks)]

    def balance_heads(self) -> HeadBalance:
        """Assign heads to ranks so that all have about as many tiles to compute; a collective call between steps.

        Every rank keeps as many heads as before. Nothing changes where that would leave the busiest rank less than 5 %
        fewer tiles. Otherwise the maps travel with their heads and later passes send each head where it now belongs;
        only the first such change needs compiled code to be compiled, and graphs to be captured, again.
        Waits for the device. Where it raises, nothing has changed on any rank.

        Raises:
            RuntimeError: no skipping pass has run yet, or the sequence is so short that a rank has no token of it. Or
                the layer was in ``exportable`` before: a program would go on with the heads as they come.
            ValueError: the heads do not divide evenly between the ranks.
        """
        ring, ulysses = self.ranks.ring, self.ranks.ulysses
        # The ranks that exchange heads have made the same calls; in a ring some may have no token of a short sequence.
        with_map = [(split, branch) for split in range(ring.size) for branch in self._state(split, 0).used_branches()]
        maps = {key: self.keep_map(*key) for key in with_map}
        local_heads = self._agreed_local_heads(maps)
        # Query heads that share a head of keys stay together. Positions are counted in such groups.
        split, branch = with_map[0]
        per_key = self._state(split, 0).query_heads_per_key(branch)
        kept = torch.stack([keep.sum((0, 2, 3)) for keep in maps.values()]).sum(0)
        kept_tiles = all_reduce(all_gather(kept.view(-1, per_key).sum(1), ulysses, 0), ring)
        balance, better = rebalanced([int(tiles) for tiles in kept_tiles.tolist()], ulysses.size)
        if better is None:
            return balance
        units = itertools.chain.from_iterable(better)
        positions = [unit * per_key + member for unit in units for member in range(per_key)]
        order = self.head_order.planned(positions, per_key, kept.device)
        mine = positions[ulysses.rank * local_heads :][:local_heads]
        moved: list[tuple[Tensor, Tensor]] = []
        for split, branch in with_map:
            # As they lie in the slots, whether they count or not: resets and the count of dense steps stay as they are.
            words = [state.state.map_words(branch, "balance_heads") for state in self._states_of(split)]
            of_branch = all_gather(torch.cat(words, 1), ulysses, 1)[:, mine]
            moved += zip(words, of_branch.split([old.shape[1] for old in words], 1), strict=True)
        # Every rank has what it needs, memory too, before one of them changes anything: else heads of one order would
        # meet maps of another, on a rank that failed or between it and the others.
        if any(self._sum_of_ranks([float(self.head_order.may_be_in_program)])):
            raise RuntimeError(f"{_NAME}: balance_heads first called after torch.export, expected before: it reorders")
        if self.head_order.take(order):
            for state in self.states.splits:
                state.outdate_captured_graphs()  # type: ignore[operator]
        for words_of_turn, new in moved:
            words_of_turn.copy_(new)
        self.set_threshold(self._told.threshold)
        return balance

    def _agreed_local_heads(self, maps: dict[tuple[int, int], Tensor]) -> int:
        """How many heads each rank has, which all ranks can tell by their maps."""
        local_heads = next(iter(maps.values())).shape[1] if maps else 0
        ranks_with_maps, heads_of_all = self._sum_of_ranks([float(len(maps) > 0), float(local_heads)])
        if ranks_with_maps != self.ranks.shards:
            raise RuntimeError(f"{_NAME}: balance_heads without maps on every rank, expected a skipping pass before")
        heads = int(heads_of_all) // self.ranks.ring.size
        if heads % self._turns.shares != 0:
            raise ValueError(
                f"{_NAME}: balance_heads with {heads} heads, expected a multiple of {self._turns.shares}, so that "
                "every rank keeps as many"
            )
        return local_heads

    def _sum_of_ranks(self, numbers: list[float]) -> list[float]:
        """Of all ranks; comes when every one of them has come so far."""
        own = torch.tensor(numbers, dtype=torch.float32, device=self._device_type)
        return all_reduce(all_reduce(own, self.ranks.ulysses), self.ranks.ring).tolist()

    def _state(self, split: int, turn: int) -> LiteAttention:
        return self.states.splits[split * self.head_chunks + turn]  # type: ignore[return-value]
