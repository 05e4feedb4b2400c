"""Tensors that an object makes once and keeps while it lives: index tensors, say, that many calls read."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lite_attention.ops.modes import ordinary_tensors

__all__ = ["KeptTensors", "current_place"]


def current_place(device: torch.device) -> Hashable:
    """Where work on a device is queued now: its current CUDA stream, or the device itself where there are none."""
    # Streams are equal, and of equal hash, where they are the same one of the same device.
    return torch.cuda.current_stream(device) if device.type == "cuda" else device


class KeptTensors:
    """Tensors made on first use, one for each device and CUDA stream, and freed with whoever holds this.

    A stream never meets a tensor of another one: it might read it before it is written, and its memory could be given
    away while it is still read.
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._tensors: dict[tuple[Hashable, Hashable], Tensor] = {}

    def get(self, name: Hashable, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        """What ``build`` returns, a tensor on ``device``: made once under this name for all eager calls of a stream.

        It is shared, so not to be written to. It is neither kept nor looked up while a compiler traces, as what is made
        there is no real tensor, nor while a CUDA graph is captured: what is made there is filled by replays only, and
        what is kept may be gone before them.
        """
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return build()
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return build()
        key = name, current_place(device)
        kept = self._tensors.get(key)
        if kept is None:
            with ordinary_tensors():
                kept = self._tensors[key] = build()
        return kept
