"""Where one keep map of a layer lies, and whose it is."""

from __future__ import annotations

import functools
import hashlib
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

from lite_attention.maps.keep_map import keep_map_shape, tile_counts

__all__ = ["MapSlot", "Owner", "PassShape", "Room", "slots_of_this_graph", "stamp_of"]


class PassShape(NamedTuple):
    """What a keep map depends on. A map of one shape says nothing about another."""

    batch: int
    query_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    told_len: int | None = None
    """A length that the tensors do not show: the whole sequence's, where they are blocks of it, or the video's, where
    they are video and text. None where they are all that there is."""

    def map_shape(self) -> tuple[int, int, int, int]:
        """Of the packed map."""
        return keep_map_shape(self.batch, self.heads, self.query_len, self.kv_len, self.head_dim, self.dtype)

    def kv_tiles(self) -> int:
        return tile_counts(self.query_len, self.kv_len, self.head_dim, self.dtype)[1]

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.query_len} queries, {self.kv_len} keys, {self.heads}/{self.kv_heads} heads, "
            f"head_dim {self.head_dim}, {self.dtype}, {self.device}"
            f"{'' if self.told_len is None else f', told a length of {self.told_len}'}"
        )


Owner = tuple[int, PassShape]
"""Branch and shape."""

Room = tuple[int, int]
"""Slot and stamp of an owner."""


@functools.cache
def stamp_of(owner: Owner, slot: int) -> int:
    """A positive number that stands for (branch, shape) in a slot: the same in every layer, process and run.

    Each slot has its own: a pass compiled with a slot that its pair no longer owns must not take what another pass
    of that pair wrote elsewhere for what lies in its slot.
    """
    branch, shape = owner
    text = f"{slot}|{branch}|{tuple(str(part) for part in shape if part is not None)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1 | 1


class MapSlot(nn.Module):
    """Room for one packed keep map. A module of its own so that torch.compile meets it only once it is filled."""

    words: Tensor
    stamp: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        for name, buffer in self.fresh_buffers(device).items():
            self.register_buffer(name, buffer, persistent=False)

    @staticmethod
    def fresh_buffers(device: torch.device) -> dict[str, Tensor]:
        """Of a slot that holds nothing."""
        return {
            "words": torch.empty(0, dtype=torch.int32, device=device),
            "stamp": torch.zeros((), dtype=torch.int64, device=device),
        }

    def memory_for(self, shape: PassShape) -> Tensor:
        """For a map of this shape: the slot's own where it fits, else new."""
        if self.words.shape == shape.map_shape() and self.words.device == shape.device:
            return self.words
        return torch.empty(shape.map_shape(), dtype=torch.int32, device=shape.device)

    def hold(self, words: Tensor) -> None:
        """Take this memory, on the slot's device, for a map that counts as never written."""
        self.words = words
        self.stamp.zero_()


_of_graphs: weakref.WeakKeyDictionary[TracingContext, weakref.WeakSet[MapSlot]] = weakref.WeakKeyDictionary()


def slots_of_this_graph() -> weakref.WeakSet[MapSlot]:
    """Those that the graph that is being traced uses: it is guarded on their sizes. Empty where none is traced."""
    graph = TracingContext.try_get()
    return weakref.WeakSet() if graph is None else _of_graphs.setdefault(graph, weakref.WeakSet())
