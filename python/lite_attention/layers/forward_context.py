"""What all attention layers of a forward share: the step, and what a backend prepared for it.

Threads and asyncio tasks that run models at the same time each see their own. A new thread starts without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lite_attention.layers.abstract import AttentionMetadata
from lite_attention.ops.context import Scoped

__all__ = ["ForwardContext", "check_not_recorded", "current_metadata", "get_forward_context", "set_forward_context"]


@dataclass
class ForwardContext:
    """What :func:`set_forward_context` was given."""

    current_timestep: Any
    attn_metadata: AttentionMetadata | None
    forward_batch: Any = None


_context: Scoped[ForwardContext] = Scoped("lite_attention.forward_context")


@contextmanager
def set_forward_context(
    current_timestep: Any, attn_metadata: AttentionMetadata | None, forward_batch: Any = None
) -> Iterator[None]:
    """Attention layers called inside, in this thread or asyncio task, get ``attn_metadata``.

    Enter it around the call of a compiled model, not inside of it. A metadata object for each step does not recompile,
    as long as its tensors keep their shapes, and the constants that a backend reads their values.

    Args:
        current_timestep: the step; layers do not read it: what they do is what ``attn_metadata`` was built for.
        attn_metadata: made by the builder of the layers' backend; None where that needs none.
        forward_batch: anything else that belongs to the step; layers do not read it.

    Raises:
        TypeError: ``attn_metadata`` is something else.
    """
    if attn_metadata is not None and not isinstance(attn_metadata, AttentionMetadata):
        raise TypeError(
            f"set_forward_context: attn_metadata is of type {type(attn_metadata).__name__}, expected AttentionMetadata "
            "or None"
        )
    with _context.having(ForwardContext(current_timestep, attn_metadata, forward_batch)):
        yield


def get_forward_context() -> ForwardContext:
    """The innermost :func:`set_forward_context` of this thread or asyncio task. Compiled code may call it.

    Raises:
        RuntimeError: there is none.
        NotImplementedError: a program that torch.export, torch.jit.trace or make_fx makes would keep this one.
    """
    check_not_recorded("get_forward_context")
    context = _context.current
    if context is None:
        raise RuntimeError("get_forward_context: no forward context is set, expected a call inside set_forward_context")
    return context


def current_metadata() -> AttentionMetadata | None:
    """The metadata of the forward context, None where there is neither."""
    context = _context.current
    return None if context is None else context.attn_metadata


@torch.compiler.assume_constant_result  # the error is then raised by the trace, with its own words
def check_not_recorded(caller: str) -> None:
    """That nobody makes a program of this call, which would hold the metadata of this step for every other one.

    Raises:
        NotImplementedError: someone does; the text begins with ``caller``.
    """
    recorder = (
        "torch.export"
        if torch.compiler.is_exporting()
        else "torch.jit.trace"
        if torch._C._get_tracing_state()
        else "make_fx"
        if get_proxy_mode() is not None
        else None
    )
    if recorder is not None:
        raise NotImplementedError(
            f"{caller}: {recorder} would keep the metadata of this forward context for all steps, expected "
            "torch.compile, which reads those of each call"
        )
