"""What autocast does to queries, keys and values: what it does to those of torch's own attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lite_attention.ops.backends import DEVICE_TYPES

__all__ = ["autocast", "autocast_dtype", "without_autocast"]


def _is_on(device: torch.device) -> bool:
    kind = device.type
    return kind in DEVICE_TYPES and torch.is_autocast_enabled(kind)


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that autocast, where it is on, gives a tensor of this one: its own, unless for integers and fp64."""
    if not dtype.is_floating_point or dtype == torch.float64 or not _is_on(device):
        return dtype
    return torch.get_autocast_dtype(device.type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, all of one device, as the operators will take them.

    The operators call it themselves. Whoever must know the dtype before, since state or a transfer depends on it, calls
    it first; what is cast already stays as it is.
    """
    if not _is_on(tensors[0].device):
        return tensors
    return tuple(x.to(autocast_dtype(x.dtype, x.device)) for x in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which torch's operators on this device keep the dtypes they are given: for what is only decided by."""
    return torch.autocast(device.type, enabled=False) if _is_on(device) else nullcontext()
