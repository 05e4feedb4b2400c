"""torch's functional collectives between the ranks of a group, and transfers that attention can overlap.

They are torch's own ``_c10d_functional`` operators (NCCL on GPUs, gloo on CPUs): a compiled forward traces them, a CUDA
graph captures them, gradients flow through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lite_attention.parallel.mesh import RankGroup

__all__ = ["Flight", "all_gather", "all_reduce", "start_all_to_all", "start_shift"]

_COLLECTIVES = torch.ops._c10d_functional

Landed = TypeVar("Landed")


class Flight(Generic[Landed]):
    """A transfer that was begun and knows what it brings. Work between its start and :meth:`wait` overlaps it."""

    def __init__(self, land: Callable[[], Landed]) -> None:
        self._land = land

    def wait(self) -> Landed:
        """What it brings, once that is there: the current stream waits, not the host. Called once."""
        return self._land()


def all_gather(x: Tensor, group: RankGroup, dim: int) -> Tensor:
    """The ranks' tensors, concatenated along ``dim`` in the order of the ranks. All have the same shape."""
    if group.size == 1:
        return x
    gathered = _arrived(_COLLECTIVES.all_gather_into_tensor(x.contiguous(), group.size, group.name))
    return gathered if dim == 0 else torch.cat(gathered.chunk(group.size), dim)


def all_reduce(x: Tensor, group: RankGroup) -> Tensor:
    """The sum of the ranks' tensors."""
    return x if group.size == 1 else _arrived(_COLLECTIVES.all_reduce(x, "sum", group.name))


def start_all_to_all(
    packed: Tensor, received: Sequence[int], sent: Sequence[int], group: RankGroup, unpack: Callable[[Tensor], Landed]
) -> Flight[Landed]:
    """Begin to exchange pieces of a flat tensor with each rank; sizes in elements. ``unpack`` reads what arrives."""
    flying = _COLLECTIVES.all_to_all_single(packed, list(received), list(sent), group.name)
    return Flight(lambda: unpack(_arrived(flying)))


def start_shift(x: Tensor, group: RankGroup) -> Flight[Tensor]:
    """Begin to send ``x`` to the next rank of a ring and to receive what the previous one sends, of the same shape."""
    before, after = (group.rank - 1) % group.size, (group.rank + 1) % group.size
    shape, elements = x.shape, x.numel()
    received = [elements if rank == before else 0 for rank in range(group.size)]
    sent = [elements if rank == after else 0 for rank in range(group.size)]
    return start_all_to_all(x.contiguous().view(-1), received, sent, group, lambda arrived: arrived.view(shape))


def _arrived(flying: Tensor) -> Tensor:
    arrived: Tensor = _COLLECTIVES.wait_tensor(flying)
    return arrived
