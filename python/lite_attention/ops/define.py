"""Defines an operator in one call: schema, what it returns for tensors without data, gradient, what autocast casts.

The kernels are the compiled libraries' (load.py); importing them first means that schemas are defined only where there
are kernels for them. Every operator is functional: none writes its inputs.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from lite_attention.ops import backends
from lite_attention.ops.autocast import autocast

__all__ = ["check_fake_inputs", "define", "dense_flops", "fake_out_and_lse"]

_library = torch.library.Library(backends.NAMESPACE, "DEF")


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[Any]] | None = None,
    setup_context: Callable[..., None] | None = None,
    over_samples: Callable[..., tuple[Any, Any]] | None = None,
    autocasts: Sequence[str] = (),
    flops: Callable[..., int] | None = None,
) -> OpOverload:
    """Define the operator of this schema and return it.

    Args:
        schema: name, arguments and results, as torch writes them.
        fake: takes the operator's arguments, returns empty results of the right shapes, dtypes and devices.
        backward, setup_context: the gradient, as for :func:`torch.library.register_autograd`: what to remember of a
            call (``setup_context(ctx, inputs, output)``), and the gradients of all positional arguments in their order,
            a list for a list, None for what has none (``backward(ctx, *grads)``, None for a result that plays no part).
            Without them the operator runs on inputs that require a gradient and refuses when it is asked for.
        over_samples: the call for all samples of a torch.vmap, as for :func:`torch.library.register_vmap`. Without it
            torch runs the operator sample by sample, which it can where no argument is a list.
        autocasts: names of the positional arguments that autocast gives its dtype.
        flops: what ``torch.utils.flop_counter`` counts for a call: takes the arguments, shapes in place of tensors.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{backends.NAMESPACE}::{name}", fake, lib=_library)
    operator: OpOverload = getattr(getattr(torch.ops, backends.NAMESPACE), name).default
    backends.serve(name)
    _register_autograd(operator, _Gradient(name, backward, setup_context))
    if over_samples is not None:
        torch.library.register_vmap(operator, over_samples, lib=_library)
    if autocasts:
        _register_autocast(name, operator, autocasts)
    if flops is not None:
        register_flop_formula(operator.overloadpacket)(flops)
    return operator


class _Gradient(NamedTuple):
    """How an operator is differentiated, or that it is not."""

    name: str
    backward: Callable[..., Sequence[Any]] | None
    setup_context: Callable[..., None] | None

    def remember(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self.setup_context is not None:
            self.setup_context(ctx, inputs, output)

    def of_inputs(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> Sequence[Any]:
        if self.backward is None:
            raise NotImplementedError(
                f"{self.name}: has no gradient, it is forward-only; run it under torch.no_grad() or "
                "torch.inference_mode(), or detach its inputs"
            )
        return self.backward(ctx, *grads)


class _Differentiated(_SingleLevelFunction):
    """A call some of whose tensors require a gradient. Autograd sees them in ``flat``, where lists are unrolled.

    Of a single level: where it is applied, below the dispatcher, the transforms of torch.func have taken the call apart
    already, as they do for torch's own operators. A torch.autograd.Function would do so again, and refuse this form.
    """

    @staticmethod
    def forward(ctx: Any, gradient: _Gradient, run: Callable[[], Any], inputs: tuple[Any, ...], *flat: Any) -> Any:
        output = run()
        ctx.gradient = gradient
        ctx.list_sizes = [len(value) if isinstance(value, list) else None for value in inputs]
        ctx.keywords = len(flat) - len(_flatten(inputs))
        ctx.set_materialize_grads(False)
        gradient.remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        flat: list[Any] = []
        for size, gradient in zip(ctx.list_sizes, ctx.gradient.of_inputs(ctx, grads), strict=True):
            flat += [gradient] if size is None else size * [None] if gradient is None else gradient
        return None, None, None, *flat, *(ctx.keywords * [None])


def _flatten(values: Iterable[Any]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _refuse_tangents(name: str, flat: list[Any]) -> None:
    """Forward-mode differentiation would go on with tangents of zero."""
    if any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in flat):
        raise NotImplementedError(f"{name}: has no forward-mode gradient (torch.func.jvp); detach its inputs")


def _as_outside(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as it is outside of an autograd function, which records nothing: transforms further out still have to."""
    tangents = torch._C._is_fwd_grad_enabled()

    def run_recorded() -> Any:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(tangents):
            return run()

    return run_recorded


def _register_autograd(operator: OpOverload, gradient: _Gradient) -> None:
    """Every call passes here, therefore by hand: torch.library.register_autograd costs 15 us a call, this 8."""
    differentiated: Callable[..., Any] = _Differentiated.apply  # type: ignore[attr-defined]

    def run_below_autograd(keyset: torch._C.DispatchKeySet, *arguments: Any, **named: Any) -> Any:
        below = keyset & torch._C._after_autograd_keyset
        if forward_ad._current_level >= 0:
            _refuse_tangents(gradient.name, _flatten((*arguments, *named.values())))
        if torch.is_grad_enabled():
            flat = _flatten((*arguments, *named.values()))
            if any(isinstance(value, Tensor) and value.requires_grad for value in flat):
                run = partial(operator.redispatch, below, *arguments, **named)
                if not torch._C._are_functorch_transforms_active():
                    return differentiated(gradient, run, arguments, *flat)
                with enable_single_level_autograd_function():
                    return differentiated(gradient, _as_outside(run), arguments, *flat)
        return operator.redispatch(below, *arguments, **named)

    _library.impl(gradient.name, run_below_autograd, "Autograd", with_keyset=True)


def _register_autocast(name: str, operator: OpOverload, autocasts: Sequence[str]) -> None:
    """By hand: torch.library.register_autocast casts every floating argument, to a dtype fixed beforehand.

    Calls pass here only where autocast is on.
    """
    names = [argument.name for argument in operator._schema.arguments]
    places = [names.index(argument) for argument in autocasts]

    def cast_and_run(*arguments: Any, **named: Any) -> Any:
        inputs = list(arguments)
        for place in places:
            (inputs[place],) = autocast(inputs[place])
        with torch._C._ExcludeDispatchKeyGuard(backends.AUTOCAST):
            return operator(*inputs, **named)

    for key in backends.AUTOCAST_KEYS:
        _library.impl(name, cast_and_run, key)


def check_fake_inputs(name: str, **tensors: Tensor | None) -> None:
    """What must hold for the result's shape to be known; the kernels check the rest when they run."""
    device = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise RuntimeError(f"{name}: {argument} is on {tensor.device}, expected {device}, every argument's device")
        if argument in ("q", "k", "v", "keep", "must_keep", "outs[0]") and tensor.dim() != 4:
            raise RuntimeError(f"{name}: {argument} has {tensor.dim()} dimensions, expected 4")


def dense_flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Attention's products with every key: ``4 B Hq Sq Sk D``, for queries ``[B, Sq, Hq, D]``.

    What a map, lengths or a mask leave out is counted: they are data, which a formula of shapes does not see (and torch
    counts causal attention so). Multiply by the map's density for what was computed.
    """
    batch, query_len, heads, head_dim = q
    return 4 * batch * heads * query_len * k[1] * head_dim


def fake_out_and_lse(q: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's results for queries ``[B, Sq, H, D]``."""
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)
