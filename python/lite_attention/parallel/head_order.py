"""The order in which ranks share the heads of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lite_attention.ops.checks import equals_any
from lite_attention.ops.modes import real_tensors
from lite_attention.ops.own_state import OwnState
from lite_attention.parallel.exchange import select_heads

__all__ = ["HeadOrder", "PlannedOrder"]


class PlannedOrder(NamedTuple):
    """An order that is not in force yet."""

    heads: tuple[int, ...]
    per_key: int
    head_at: Tensor


class HeadOrder(OwnState):
    """Which head stands at which position, where heads were assigned to ranks by their work; else the model's order.

    The first change needs compiled code to be compiled, and graphs to be captured, again; later ones are data.
    """

    _head_at: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self._heads: tuple[int, ...] | None = None
        self.meant_for: tuple[int, int] | None = None
        """How many heads it orders, and how many of them share a key head; None for any."""
        self.start_over(torch.device("cpu"))

    def fresh_buffers(self, device: torch.device) -> dict[str, Tensor | None]:
        order = None if self._heads is None else torch.tensor(self._heads, dtype=torch.int64, device=device)
        return {"_head_at": order}

    @property
    def device(self) -> torch.device | None:
        return None if self._head_at is None else self._head_at.device

    @property
    def changed(self) -> bool:
        """Whether it is another one than the model's."""
        return self._head_at is not None

    def heads(self, count: int) -> Sequence[int]:
        """The head at each of ``count`` positions."""
        return range(count) if self._heads is None else self._heads

    def check(self, name: str, heads: int, per_key: int) -> None:
        """That it is meant for so many heads, of which ``per_key`` share a key head.

        Raises:
            ValueError: it is not; the text begins with ``name``.
        """
        if not equals_any(self.meant_for, None, (heads, per_key)):
            raise ValueError(
                f"{name}: heads of query, and of those for each key head that is sent, are {(heads, per_key)}, "
                f"expected {self.meant_for} as when balance_heads() was called"
            )

    @property
    def may_be_in_program(self) -> bool:
        """Whether a program of torch.export may send the heads as they come, whatever the order will be."""
        return self.was_exportable and self._head_at is None

    def to_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of ``[B, S, heads of each, D]`` at their positions."""
        self.place(query.device, "DistributedLiteAttention", torch.compiler.is_compiling())
        if self._head_at is None:
            return query, key, value
        per_key = query.shape[2] // key.shape[2]
        key_head_at = self._head_at[::per_key] // per_key
        return select_heads(query, self._head_at), select_heads(key, key_head_at), select_heads(value, key_head_at)

    def to_model(self, x: Tensor) -> Tensor:
        """Heads of ``[B, S, H, any]`` from their positions back into the model's order."""
        return x if self._head_at is None else select_heads(x, self._head_at.argsort())

    def planned(self, positions: Sequence[int], per_key: int, device: torch.device) -> PlannedOrder:
        """The order that takes to each position what stands at ``positions[position]``, and all memory it needs.

        Args:
            positions: of the heads; ``per_key`` neighbours share a key head.
            per_key: query heads of each key head that is sent.
            device: of the heads.
        """
        order = self.heads(len(positions))
        heads = tuple(order[position] for position in positions)
        with real_tensors():
            return PlannedOrder(heads, per_key, torch.tensor(heads, dtype=torch.int64, device=device))

    def take(self, planned: PlannedOrder) -> bool:
        """Make it the order; nothing can be wanting any more.

        Returns:
            Whether this changed more than data, so that graphs captured before are out of date.
        """
        self._heads, self.meant_for = planned.heads, (len(planned.heads), planned.per_key)
        with real_tensors():
            if self._head_at is not None and self._head_at.device == planned.head_at.device:
                self._head_at.copy_(planned.head_at)
                return False
            self.outdate_captured_graphs()
            self.register_buffer("_head_at", planned.head_at, persistent=False)
            return True
