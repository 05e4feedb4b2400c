"""Modes of torch that state must not depend on."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["make_buffers_ordinary", "ordinary_tensors"]


def ordinary_tensors() -> torch.inference_mode:
    """Block (or decorator) whose tensors can be written and saved in every mode later.

    An inference tensor can be written inside ``torch.inference_mode()`` alone, and is refused where gradients are
    recorded. What is kept from call to call is made in here.
    """
    return torch.inference_mode(False)


def make_buffers_ordinary(module: nn.Module) -> None:
    """Replace a module's buffers that are inference tensors, as in a copy made or loaded in inference mode."""
    with ordinary_tensors():
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_inference():
                    setattr(part, name, buffer.clone())
