"""What LiteAttention and DistributedLiteAttention check in their arguments. Errors begin with the caller's name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lite_attention.maps import tiles
from lite_attention.maps.ranges import parse_ranges
from lite_attention.ops.autocast import autocast
from lite_attention.ops.call import in_fp32_range
from lite_attention.ops.checks import checked_number

__all__ = [
    "CheckedRanges",
    "Ranges",
    "Threshold",
    "check_kv_lens",
    "check_no_transform",
    "check_not_recorded",
    "check_scalar",
    "check_scale",
    "check_skip_fraction_out",
    "checked_inputs",
    "checked_ranges",
    "checked_threshold",
]

Ranges = Sequence[int] | Tensor
CheckedRanges = list[tuple[int, int]] | Tensor
Threshold = float | Sequence[float] | Tensor


def checked_threshold(what: str, threshold: Threshold, allow_positive: bool) -> float | tuple[float, ...]:
    """A threshold as plain numbers within fp32; errors begin with ``what``."""
    array: Any = threshold if hasattr(threshold, "tolist") else None  # a tensor, or an array or a number of numpy
    if array is not None:
        if array.ndim > 1:
            raise ValueError(f"{what} has shape {list(array.shape)}, expected [] or [heads]")
        threshold = array.tolist()
    many = isinstance(threshold, Sequence) and not isinstance(threshold, str)
    values: list[float] = []
    for index, entry in enumerate(threshold if many else [threshold]):  # type: ignore[arg-type]
        name = f"{what}[{index}]" if many else what
        # numpy's numbers are Real, too; its bool is not.
        if isinstance(entry, bool) or not isinstance(entry, numbers.Real):
            raise TypeError(f"{name} is {entry!r} of type {type(entry).__name__}, expected a number")
        try:
            entry = float(entry)
        except OverflowError:
            raise ValueError(f"{name} is beyond the numbers that a float can hold, expected one of these") from None
        if math.isnan(entry):
            raise ValueError(f"{name} is NaN, expected a number of at most 0")
        if entry > 0 and not allow_positive:
            raise ValueError(
                f"{name} is {entry}, expected at most 0 (powers of two; -10 is the default). For experiments above 0, "
                "set LITE_ATTENTION_DEBUG"
            )
        values.append(in_fp32_range(entry))
    if not values:
        raise ValueError(f"{what} is empty, expected one number, or one per query head")
    return tuple(values) if many else values[0]


def checked_inputs(
    caller: str, query: Tensor, key: Tensor, value: Tensor, max_batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The three, in autocast's dtype where it is on, if they are what a layer's state needs.

    They are checked before anything is launched; the operator checks the rest.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}: {name} has type {type(tensor).__name__}, expected a tensor")
    query, key, value = autocast(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{caller}: {name} has {tensor.dim()} dimensions, expected 4: [batch, length, heads, head_dim]"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{caller}: {name} has dtype {tensor.dtype}, expected {query.dtype}, query's")
        if tensor.device != query.device:
            raise ValueError(f"{caller}: {name} is on {tensor.device}, expected {query.device}, query's device")
        if tensor.numel() == 0:
            raise ValueError(f"{caller}: {name} has shape {list(tensor.shape)}, expected no size of 0")
    if query.dtype not in tiles.SUPPORTED_DTYPES:
        raise TypeError(f"{caller}: query has dtype {query.dtype}, expected float32, bfloat16 or float16")
    batch, _, heads, head_dim = query.shape
    if batch > max_batch_size:
        raise ValueError(f"{caller}: query has batch {batch}, expected at most max_batch_size={max_batch_size}")
    if head_dim % tiles.HEAD_DIM_MULTIPLE != 0 or head_dim > tiles.MAX_HEAD_DIM:
        raise ValueError(
            f"{caller}: query has head_dim {head_dim}, expected a multiple of {tiles.HEAD_DIM_MULTIPLE} up to "
            f"{tiles.MAX_HEAD_DIM}"
        )
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"{caller}: key has batch {key.shape[0]} and head_dim {key.shape[3]}, expected query's, {batch} and "
            f"{head_dim}"
        )
    if heads % key.shape[2] != 0:
        raise ValueError(f"{caller}: key has {key.shape[2]} heads, expected a divisor of query's {heads}")
    if value.shape != key.shape:
        raise ValueError(f"{caller}: value has shape {list(value.shape)}, expected key's shape, {list(key.shape)}")
    return query, key, value


def checked_ranges(
    caller: str, name: str, ranges: Ranges | None, query: Tensor, length: int, tokens: str
) -> CheckedRanges | None:
    """A list as ascending pairs, a tensor as it is; None for no ranges. Positions are below ``length``."""
    if ranges is None:
        return None
    if isinstance(ranges, Tensor):
        if ranges.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{caller}: {name} has dtype {ranges.dtype}, expected torch.int32 or torch.int64")
        if ranges.dim() != 2 or ranges.shape[1] != 2:
            raise ValueError(
                f"{caller}: {name} has shape {list(ranges.shape)}, expected [count, 2]: one [start, end] a row"
            )
        if ranges.device != query.device:
            raise ValueError(f"{caller}: {name} is on {ranges.device}, expected {query.device}, query's device")
        return ranges
    if not isinstance(ranges, (list, tuple)):
        raise TypeError(
            f"{caller}: {name} has type {type(ranges).__name__}, expected a list of ints or an integer tensor"
        )
    return parse_ranges(ranges, length, f"{caller}: {name}", tokens) or None


def check_scalar(caller: str, name: str, tensor: Tensor | None, dtype: torch.dtype, query: Tensor) -> None:
    """That an optional tensor is 0-d, of the dtype, on query's device."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{caller}: {name} has type {type(tensor).__name__}, expected a tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{caller}: {name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.dim() != 0:
        raise ValueError(f"{caller}: {name} has shape {list(tensor.shape)}, expected []")
    if tensor.device != query.device:
        raise ValueError(f"{caller}: {name} is on {tensor.device}, expected {query.device}, query's device")


def check_skip_fraction_out(caller: str, tensor: Tensor | None, query: Tensor) -> None:
    """That an optional tensor can receive the fraction, before a pass is remembered that would fail to write it."""
    check_scalar(caller, "skip_fraction_out", tensor, torch.float32, query)
    if tensor is None:
        return
    if tensor.requires_grad:
        raise ValueError(f"{caller}: skip_fraction_out requires a gradient, expected a tensor that can be written")
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{caller}: skip_fraction_out was made in torch.inference_mode, expected an ordinary tensor outside of it"
        )


def check_scale(caller: str, scale: float | None) -> None:
    """That the factor on q.k is a number, or None."""
    if scale is not None:
        checked_number(f"{caller}: scale", scale, "a float or None")


def check_no_transform(caller: str, **arguments: object) -> None:
    """That none is a tensor of a transform of torch.func: what is made of it cannot be remembered beyond it."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    for name, argument in arguments.items():
        if isinstance(argument, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(argument):
            raise NotImplementedError(
                f"{caller}: {name} is inside a transform of torch.func (vmap, grad, jvp), expected a tensor outside: "
                "a pass is remembered, and has no gradient"
            )


def check_not_recorded(caller: str) -> None:
    """That no tracer of torch records this pass: it would hold today's state, also once that was moved or given away.

    torch.compile and torch.export are told of the state; neither calls this.
    """
    recorder = (
        "torch.jit.trace" if torch._C._get_tracing_state() else "make_fx" if get_proxy_mode() is not None else None
    )
    if recorder is not None:
        raise NotImplementedError(
            f"{caller}: {recorder} does not see the skip state, expected torch.compile, torch.export inside "
            "lite_attention.exportable(model), or skipping off (enable_skip_optimization(False))"
        )


def check_kv_lens(caller: str, kv_lens: Tensor | None, query: Tensor) -> None:
    """That optional lengths are one int32 for each batch entry, on query's device."""
    if kv_lens is None:
        return
    if not isinstance(kv_lens, Tensor):
        raise TypeError(f"{caller}: kv_lens has type {type(kv_lens).__name__}, expected a tensor")
    if kv_lens.dtype != torch.int32:
        raise TypeError(f"{caller}: kv_lens has dtype {kv_lens.dtype}, expected torch.int32")
    if kv_lens.shape != query.shape[:1]:
        raise ValueError(f"{caller}: kv_lens has shape {list(kv_lens.shape)}, expected [{query.shape[0]}]")
    if kv_lens.device != query.device:
        raise ValueError(f"{caller}: kv_lens is on {kv_lens.device}, expected {query.device}, query's device")
