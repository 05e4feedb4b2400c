"""One skip state for each split of the keys: what a rank of a ring remembers. It sends nothing."""

from __future__ import annotations

import operator
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn

from lite_attention.ops.checks import checked_int
from lite_attention.skipping.arguments import Ranges, Threshold
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy

__all__ = ["SeqParallelLiteAttention", "StatesOfRank"]

_NAME = "SeqParallelLiteAttention"


class SeqParallelLiteAttention(nn.Module):
    """LiteAttention for sequence parallelism: one skip state for each KV split that this rank meets.

    The low level of :class:`lite_attention.DistributedLiteAttention`: it sends nothing. Each call attends to one split
    of K and V; ask for the lse and merge the splits with :func:`lite_attention.merge_attention`.

    Args:
        num_nodes: number of KV splits.
        enable_skipping, threshold, max_batch_size, policy: as for :class:`LiteAttention`.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    split_class: ClassVar[type[LiteAttention]] = LiteAttention

    def __init__(
        self,
        num_nodes: int,
        enable_skipping: bool | None = None,
        threshold: Threshold | None = None,
        max_batch_size: int = 4,
        *,
        policy: SkipPolicy | None = None,
    ) -> None:
        super().__init__()
        checked_int(f"{_NAME}: num_nodes", num_nodes, lowest=1)
        checked_int(f"{_NAME}: max_batch_size", max_batch_size, lowest=1)
        policy = SkipPolicy.resolve(_NAME, policy, enable_skipping=enable_skipping, threshold=threshold)
        self.splits = nn.ModuleList(
            self.split_class(max_batch_size=max_batch_size, policy=policy) for _ in range(num_nodes)
        )
        for split in self._all():
            split.caller = _NAME

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        split_idx: int,
        scale: float | None = None,
        return_softmax_lse: bool = False,
        must_do_list: Ranges | None = None,
        must_skip_list: Ranges | None = None,
        *,
        kv_lens: Tensor | None = None,
        branch: int | None = None,
        must_do_queries: Ranges | None = None,
        start_full: Tensor | None = None,
        generation: Tensor | None = None,
        skip_fraction_out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One pass over one split of the keys.

        Args:
            split_idx: which split ``key`` and ``value`` are, 0 to ``num_nodes - 1``; not the rank of this process.

        The other arguments, results and errors are those of :meth:`LiteAttention.forward`; key positions in the lists
        and ``kv_lens`` count within the split. A split that a pass leaves out, as there are no keys in it, knows
        nothing of that pass and goes on from its own latest one: give every call its ``generation``, or reset where
        the length of the sequence changes.
        """
        result: Tensor | tuple[Tensor, Tensor] = self._split(split_idx)(
            query,
            key,
            value,
            scale,
            return_softmax_lse,
            must_do_list,
            must_skip_list,
            kv_lens=kv_lens,
            branch=branch,
            must_do_queries=must_do_queries,
            start_full=start_full,
            generation=generation,
            skip_fraction_out=skip_fraction_out,
        )
        return result

    def _split(self, split_idx: int) -> LiteAttention:
        checked_int(f"{_NAME}: split_idx", split_idx, 0, len(self.splits) - 1)
        return self.splits[operator.index(split_idx)]  # type: ignore[return-value]

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold of every split; see :meth:`LiteAttention.set_threshold`."""
        for split in self._all():
            split.set_threshold(threshold)

    def reset_skip_state(self, branch: int | None = None) -> None:
        """Forget what was dropped in every split, in one branch or in all of them."""
        for split in self._all():
            split.reset_skip_state(branch)

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """Switch every split between skipping and dense attention."""
        for split in self._all():
            split.enable_skip_optimization(enable)

    def skip_fraction(self, branch: int | None = None) -> Tensor:
        """Of all splits together; see :meth:`LiteAttention.skip_fraction`."""
        # A split that this rank has not met has no state where the others have theirs.
        met = [split for split in self._all() if split.state.owners()] or self._all()
        skipped, tiles_of_maps = torch.stack([split.skipped_tiles(branch) for split in met]).sum(0)
        fraction: Tensor = skipped / tiles_of_maps.clamp(min=1)
        return fraction

    def keep_map(self, split_idx: int, branch: int | None = None) -> Tensor:
        """The keep map of one split; see :meth:`LiteAttention.keep_map`."""
        return self._split(split_idx).keep_map(branch)

    def _all(self) -> list[LiteAttention]:
        return list(self.splits)  # type: ignore[arg-type]


class _PartOfRank(LiteAttention):
    """One state of a DistributedLiteAttention, found by who walks the model's modules."""

    def set_threshold(self, threshold: Threshold) -> NoReturn:
        """Refused: the layer around it would go on with its own, and tell that.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "set_threshold: this LiteAttention is a part of a DistributedLiteAttention, expected set_threshold of that "
            "layer, which knows whose heads are where"
        )


class StatesOfRank(SeqParallelLiteAttention):
    """Those of a DistributedLiteAttention: one for each split of the keys and each turn, told the threshold by it."""

    split_class = _PartOfRank
