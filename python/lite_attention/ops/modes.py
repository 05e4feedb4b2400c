"""Modes of torch that state must not depend on."""

from __future__ import annotations

import torch

__all__ = ["ordinary_tensors"]


def ordinary_tensors() -> torch.inference_mode:
    """Block (or decorator) whose tensors can be written and saved in every mode later.

    An inference tensor can be written inside ``torch.inference_mode()`` alone, and is refused where gradients are
    recorded. What is kept from call to call is made in here.
    """
    return torch.inference_mode(False)
