"""Defines an operator: its schema, what it returns for tensors without data, and its gradient, in one call.

The kernels are the compiled libraries' (load.py); importing them first means that schemas are defined only where there
are kernels for them. Every operator is functional: none writes its inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lite_attention.ops import backends

__all__ = ["check_fake_inputs", "define", "fake_out_and_lse"]

_library = torch.library.Library(backends.NAMESPACE, "DEF")


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[Any]] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> OpOverload:
    """Define the operator of this schema and return it.

    Args:
        schema: name, arguments and results, as torch writes them.
        fake: takes the operator's arguments, returns empty results of the right shapes, dtypes and devices.
        backward, setup_context: the gradient, as for :func:`torch.library.register_autograd`: what to remember of a
            call (``setup_context(ctx, inputs, output)``), and the gradients of all arguments in their order, a list
            for a list, None for what has none (``backward(ctx, *grads)``, where a result that plays no part has None).
            Without them the operator runs on inputs that require a gradient and refuses when it is asked for.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{backends.NAMESPACE}::{name}", fake, lib=_library)
    operator: OpOverload = getattr(getattr(torch.ops, backends.NAMESPACE), name).default
    backends.serve(name)
    _register_autograd(operator, _Gradient(name, backward, setup_context))
    return operator


@dataclass(frozen=True)
class _Gradient:
    """How an operator is differentiated, or that it is not."""

    name: str
    backward: Callable[..., Sequence[Any]] | None
    setup_context: Callable[..., None] | None

    def prepare(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self.setup_context is not None:
            self.setup_context(ctx, inputs, output)

    def of_inputs(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> Sequence[Any]:
        if self.backward is None:
            raise NotImplementedError(
                f"{self.name}: has no gradient, it is forward-only; run it under torch.no_grad() or "
                "torch.inference_mode(), or detach its inputs"
            )
        return self.backward(ctx, *grads)


@dataclass(frozen=True)
class _Layout:
    """Where each of a call's values stands: torch.autograd.Function sees only tensors that are given to it singly."""

    list_sizes: tuple[int | None, ...]  # of each positional argument, None for what is no list
    names: tuple[str, ...]

    def unflatten(self, flat: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = iter(flat)
        arguments = [next(values) if size is None else list(islice(values, size)) for size in self.list_sizes]
        return tuple(arguments), dict(zip(self.names, values, strict=True))

    def flatten_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        flat: list[Any] = []
        for size, gradient in zip(self.list_sizes, gradients, strict=True):
            flat += [gradient] if size is None else size * [None] if gradient is None else gradient
        return flat + len(self.names) * [None]


def _flatten(arguments: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
    flat: list[Any] = []
    for argument in arguments:
        flat += argument if isinstance(argument, list) else [argument]
    return flat + [*named.values()]


class _Differentiated(torch.autograd.Function):
    """A call some of whose tensors require a gradient."""

    @staticmethod
    def forward(run: Callable[..., Any], gradient: _Gradient, layout: _Layout, *flat: Any) -> Any:
        arguments, named = layout.unflatten(flat)
        return run(*arguments, **named)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.gradient, ctx.layout, *flat = inputs
        ctx.set_materialize_grads(False)
        ctx.gradient.prepare(ctx, ctx.layout.unflatten(flat)[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, *ctx.layout.flatten_gradients(ctx.gradient.of_inputs(ctx, grads))


def _register_autograd(operator: OpOverload, gradient: _Gradient) -> None:
    """Every call passes here, therefore by hand: torch.library.register_autograd costs 15 us a call, this 8."""

    def run_below_autograd(keyset: torch._C.DispatchKeySet, *arguments: Any, **named: Any) -> Any:
        below = keyset & torch._C._after_autograd_keyset
        if torch.is_grad_enabled():
            flat = _flatten(arguments, named)
            if any(isinstance(value, Tensor) and value.requires_grad for value in flat):
                sizes = tuple(len(argument) if isinstance(argument, list) else None for argument in arguments)
                run = partial(operator.redispatch, below)
                return _Differentiated.apply(  # type: ignore[no-untyped-call]
                    run, gradient, _Layout(sizes, tuple(named)), *flat
                )
        return operator.redispatch(below, *arguments, **named)

    _library.impl(gradient.name, run_below_autograd, "Autograd", with_keyset=True)


def check_fake_inputs(name: str, **tensors: Tensor | None) -> None:
    """What must hold for the result's shape to be known; the kernels check the rest when they run."""
    device = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise RuntimeError(f"{name}: {argument} is on {tensor.device}, expected {device}, every argument's device")
        if argument in ("q", "k", "v", "keep", "must_keep") and tensor.dim() != 4:
            raise RuntimeError(f"{name}: {argument} has {tensor.dim()} dimensions, expected 4")


def fake_out_and_lse(q: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's results for queries ``[B, Sq, H, D]``."""
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)
