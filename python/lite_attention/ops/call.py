"""What the operators' Python calls share: defaults, and refusals of what is no dense tensor at all.

Nothing here keeps state or knows a policy. Argument errors are the operators' own, RuntimeError with a text that names
the operator, the argument, what was got and what was expected; TypeError for what the dispatcher would refuse in words
of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lite_attention.ops.checks import checked_number

__all__ = ["call", "check_optional_tensors", "check_tensors", "in_fp32_range", "softmax_scale"]


def softmax_scale(operator: str, q: Tensor, scale: float | None) -> float:
    """The given scale, or 1/sqrt(D). For a D of 0 any number will do: the operator refuses such a q by name."""
    if scale is not None:
        return checked_number(f"{operator}: scale", scale)
    head_dim = q.shape[-1] if q.dim() > 0 else 0
    return 1.0 / math.sqrt(max(head_dim, 1))


def check_tensors(operator: str, **tensors: Tensor) -> None:
    """Refuse what is no dense tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} has type {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{operator}: {name} has layout {layout}, expected torch.strided")


def check_optional_tensors(operator: str, **tensors: Tensor | None) -> None:
    """As :func:`check_tensors`, but None will do."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensors(operator, **{name: tensor})


def call(operator: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The operator's result; where no gradient can be asked for, without the way through its autograd in Python."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or forward_ad._current_level >= 0
    ):
        return operator(*arguments, **named)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments, **named)


def in_fp32_range(threshold: float) -> float:
    """The threshold as an fp32 tensor can hold it: what lies beyond fp32's range becomes infinite."""
    return math.copysign(math.inf, threshold) if abs(threshold) > torch.finfo(torch.float32).max else threshold
