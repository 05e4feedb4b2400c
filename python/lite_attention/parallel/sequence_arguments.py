"""What holds for a whole sequence in one pass, and the part of it for a block of queries and a split of keys."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lite_attention.ops.checks import check_entries
from lite_attention.parallel.shards import Block, check_seq_len
from lite_attention.skipping.arguments import (
    CheckedRanges,
    Ranges,
    check_kv_lens,
    check_scalar,
    check_scale,
    checked_ranges,
)

__all__ = ["SequenceArguments"]


class SequenceArguments(NamedTuple):
    """Arguments of :meth:`lite_attention.LiteAttention.forward`, in tokens of the whole sequence."""

    seq_len: int
    scale: float | None
    must_do: CheckedRanges | None
    must_skip: CheckedRanges | None
    must_do_queries: CheckedRanges | None
    kv_lens: Tensor | None
    branch: int
    start_full: Tensor | None
    generation: Tensor | None

    @classmethod
    def checked(
        cls,
        name: str,
        query: Tensor,
        tokens: int,
        seq_len: int | None,
        scale: float | None,
        must_do_list: Ranges | None,
        must_skip_list: Ranges | None,
        must_do_queries: Ranges | None,
        kv_lens: Tensor | None,
        branch: int,
        start_full: Tensor | None,
        generation: Tensor | None,
    ) -> SequenceArguments:
        """Everything that one rank could find wrong alone, after others have begun to wait for it.

        Raises:
            TypeError, ValueError: an argument does not fit; the text begins with ``name``.
        """
        if seq_len is None:
            seq_len = tokens
        check_seq_len(f"{name}: seq_len", seq_len, tokens)
        seq_len = operator.index(seq_len)
        check_scale(name, scale)
        check_kv_lens(name, kv_lens, query)
        if kv_lens is not None:
            check_entries(f"{name}: kv_lens", kv_lens, 0, seq_len)  # of_split limits them
        check_scalar(name, "start_full", start_full, torch.bool, query)
        check_scalar(name, "generation", generation, torch.int64, query)
        return cls(
            seq_len,
            scale,
            checked_ranges(name, "must_do_list", must_do_list, query, seq_len, "keys"),
            checked_ranges(name, "must_skip_list", must_skip_list, query, seq_len, "keys"),
            checked_ranges(name, "must_do_queries", must_do_queries, query, seq_len, "queries"),
            kv_lens,
            branch,
            start_full,
            generation,
        )

    @property
    def of_pass(self) -> tuple[Tensor | None, Tensor | None]:
        """start_full and generation."""
        return self.start_full, self.generation

    def of_split(self, rows: Block, keys: Block) -> dict[str, Any]:
        """The same for one block of queries and one split of the keys, which count from their own start."""
        return {
            "scale": self.scale,
            "must_do_list": _within(self.must_do, keys),
            "must_skip_list": _within(self.must_skip, keys),
            "must_do_queries": _within(self.must_do_queries, rows),
            "kv_lens": None if self.kv_lens is None else _positions_within(self.kv_lens, keys),
            "branch": self.branch,
            "start_full": self.start_full,
            "generation": self.generation,
            "told_len": self.seq_len,
        }


def _within(ranges: CheckedRanges | None, block: Block) -> Ranges | None:
    """The part of the ranges that lies in the block, counted from its start."""
    if ranges is None:
        return None
    if isinstance(ranges, Tensor):
        return _positions_within(ranges, block)
    clipped = [(max(low - block.start, 0), min(high - block.start, block.length)) for low, high in ranges]
    return [position for low, high in clipped if low < high for position in (low, high)]


def _positions_within(positions: Tensor, block: Block) -> Tensor:
    """Limited before they are moved: the farthest that integers can hold would come round at the other end."""
    return positions.clamp(block.start, block.start + block.length) - block.start
