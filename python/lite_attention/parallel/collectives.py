"""torch's functional collectives between the ranks of a group, and transfers that attention can overlap.

They are torch's own ``_c10d_functional`` operators (NCCL on GPUs, gloo on CPUs): a compiled forward traces them, a CUDA
graph captures them, gradients of a backward flow through them. In the transforms of torch.func and of forward-mode
derivatives torch would give wrong results without a word, so they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lite_attention.parallel.mesh import RankGroup, check_present

__all__ = ["Flight", "all_gather", "all_reduce", "check_sendable", "start_all_to_all", "start_shift"]

_COLLECTIVES = torch.ops._c10d_functional

Landed = TypeVar("Landed")


class Flight(Generic[Landed]):
    """A transfer that was begun and knows what it brings. Work between its start and :meth:`wait` overlaps it."""

    def __init__(self, land: Callable[[], Landed]) -> None:
        self._land = land

    def wait(self) -> Landed:
        """What it brings, once that is there: the current stream waits, not the host. Called once."""
        return self._land()


def check_sendable(caller: str, **tensors: Tensor | None) -> None:
    """That nothing of a tensor is lost where it is sent: torch would not say so.

    Raises:
        NotImplementedError: one has a tangent (torch.func.jvp, torch.autograd.forward_ad), a gradient of a transform of
            torch.func, or samples of torch.func.vmap. Compiled code cannot look: it is refused wherever they may be.
    """
    may_have_tangents = forward_ad._current_level >= 0  # read here, so that compiled code is guarded on it
    if torch.compiler.is_compiling():
        _refuse_traced(caller, may_have_tangents)
    elif may_have_tangents or torch._C._are_functorch_transforms_active():
        for name, x in tensors.items():
            if x is not None and (burden := _what_is_lost(x)) is not None:
                _refuse(f"{caller}: {name} has {burden}")


def _what_is_lost(x: Tensor) -> str | None:
    """What the transforms around this call want of a tensor. Each of them has wrapped it, the innermost last."""
    of_transforms = torch._C._functorch
    while True:
        if of_transforms.is_batchedtensor(x):
            return "samples of torch.func.vmap"  # which would stack what has not arrived yet
        wrapped = of_transforms.is_functorch_wrapped_tensor(x)
        if wrapped and x.requires_grad:
            return "a gradient of a transform of torch.func"
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            return "a tangent (torch.func.jvp, torch.autograd.forward_ad)"
        if not wrapped:
            return None
        x = of_transforms.get_unwrapped(x)


@torch.compiler.assume_constant_result  # dynamo guards on the transforms around, and an error keeps its own words
def _refuse_traced(caller: str, may_have_tangents: bool) -> None:
    if may_have_tangents or torch._C._are_functorch_transforms_active():
        _refuse(f"{caller}: compiled code is called, or calls it, inside a transform of torch.func or a dual level")


def _refuse(what: str) -> None:
    raise NotImplementedError(
        f"{what}, expected none: it would be lost where ranks exchange tensors. Detach what needs no derivative; "
        "gradients of backward() and torch.autograd.grad pass"
    )


def all_gather(x: Tensor, group: RankGroup, dim: int) -> Tensor:
    """The ranks' tensors, concatenated along ``dim`` in the order of the ranks. All have the same shape."""
    if group.size == 1:
        return x
    check_present(group)
    check_sendable("all_gather", x=x)
    gathered = _arrived(_COLLECTIVES.all_gather_into_tensor(x.contiguous(), group.size, group.name))
    return gathered if dim == 0 else torch.cat(gathered.chunk(group.size), dim)


def all_reduce(x: Tensor, group: RankGroup) -> Tensor:
    """The sum of the ranks' tensors."""
    if group.size == 1:
        return x
    check_present(group)
    check_sendable("all_reduce", x=x)
    return _arrived(_COLLECTIVES.all_reduce(x, "sum", group.name))


def start_all_to_all(
    packed: Tensor, received: Sequence[int], sent: Sequence[int], group: RankGroup, unpack: Callable[[Tensor], Landed]
) -> Flight[Landed]:
    """Begin to exchange pieces of a flat tensor with each rank; sizes in elements. ``unpack`` reads what arrives."""
    check_present(group)
    check_sendable("start_all_to_all", packed=packed)
    flying = _COLLECTIVES.all_to_all_single(packed, list(received), list(sent), group.name)
    return Flight(lambda: unpack(_arrived(flying)))


def start_shift(x: Tensor, group: RankGroup) -> Flight[Tensor]:
    """Begin to send ``x`` to the next rank of a ring and to receive what the previous one sends, of the same shape."""
    before, after = (group.rank - 1) % group.size, (group.rank + 1) % group.size
    shape, elements = x.shape, x.numel()
    received = [elements if rank == before else 0 for rank in range(group.size)]
    sent = [elements if rank == after else 0 for rank in range(group.size)]
    return start_all_to_all(x.contiguous().view(-1), received, sent, group, lambda arrived: arrived.view(shape))


def _arrived(flying: Tensor) -> Tensor:
    arrived: Tensor = _COLLECTIVES.wait_tensor(flying)
    if arrived.requires_grad and not torch.compiler.is_compiling():
        arrived.register_hook(_check_gradient)
    return arrived


def _check_gradient(gradient: Tensor) -> None:
    """Gradients go the same way back. Those of torch.autograd.grad(is_grads_batched=True) are in a vmap of its own."""
    if torch._C._dispatch_keys(gradient).has("Batched"):
        _refuse("backward of an exchange between ranks: gradients are batched (is_grads_batched, vectorize)")
    check_sendable("backward of an exchange between ranks", gradient=gradient)
