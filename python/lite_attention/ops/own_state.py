"""State that a module keeps to itself: derived in Python, written in place, and seen by nobody who walks a model.

Whatever is a part of a model is cast, moved, broadcast, averaged, materialised without values, saved and loaded with
it: by ``.to``, DDP, FSDP, averaged models, ``from_pretrained``. That is right for weights, and wrong for what a module
has derived for itself and reads as its own. So state is a module of its own, as torch.compile then takes its buffers
for what they are (fixed addresses, written in place), but hangs beside the tree of modules instead of in it. It is made
where it is first used; used on another device, it starts over there.

torch.export alone must see it, since a program carries the buffers of its model: :func:`exportable`.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lite_attention.ops.modes import make_buffers_ordinary, real_tensors

__all__ = ["Held", "OwnState", "StateHolder", "exportable", "held_states", "hold", "running_model", "state_buffers"]


class OwnState(nn.Module):
    """Buffers that belong to the one module that holds them, see :func:`hold`."""

    layout_version: int
    """Grows whenever a CUDA graph captured before is out of date: a buffer in use was replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layout_version = 0
        self.is_exportable = False
        self.was_exportable = False  # there may be programs that share the buffers, as they were then
        self._placed_on: torch.device | None = None  # by its own passes, not by a sister's

    @abstractmethod
    def fresh_buffers(self, device: torch.device) -> Mapping[str, Tensor | None]:
        """All buffers by their names, as they are at first, from what Python knows alone."""

    @property
    @abstractmethod
    def device(self) -> torch.device | None:
        """Where the buffers are; None where there are none yet."""

    @torch.compiler.disable
    def start_over(self, device: torch.device) -> None:
        """Fresh buffers on a device; where one of them cannot be allocated, nothing changes."""
        with real_tensors():
            fresh = self.fresh_buffers(device)
            if self._buffers:
                self.outdate_captured_graphs()
            for name, buffer in fresh.items():
                self.register_buffer(name, buffer, persistent=False)

    @torch.compiler.assume_constant_result
    def place(self, device: torch.device, caller: str, compiling: bool) -> None:
        """Start over if the state is not on this device. Called before any buffer is read, also where that is traced.

        The code that is traced for one layer has to fit its sisters, whose state is where this one's was: it moves too.

        Args:
            device: of the inputs.
            caller: begins the text of errors.
            compiling: whether the call is traced, which this function cannot see.

        Raises:
            RuntimeError: torch.export would lose the state.
        """
        self.check_export(caller)
        if self.device not in (None, device):
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    f"{caller}: the state is on {self.device}, expected {device}, where the inputs are; call the "
                    "model once on inputs of this shape and branch before torch.export"
                )
            for state in (self, *self._sisters_to_place()) if compiling else (self,):
                state.start_over(device)
        self._placed_on = device

    def _sisters_to_place(self) -> Iterator[OwnState]:
        """The states like this one in the model as it runs that were last placed where this one was, if anywhere."""
        model = running_model(self)
        if model is not None:
            for held in held_states(model):
                sister = held.state
                is_sister = type(sister) is type(self) and sister is not self and sister.device == self.device
                if is_sister and sister._placed_on in (None, self._placed_on):
                    yield sister

    def check_export(self, caller: str) -> None:
        """Refuse to be traced by torch.export where it does not see the state.

        Raises:
            RuntimeError: the text begins with ``caller``.
        """
        if torch.compiler.is_exporting() and not self.is_exportable:
            raise RuntimeError(
                f"{caller}: torch.export does not see the state, expected to be called inside "
                "lite_attention.exportable(model)"
            )

    def after_export(self) -> None:
        """Called where :func:`exportable` ends."""

    @property
    def layout(self) -> int:
        """What a CUDA graph was captured with: of another number it is out of date."""
        return self.layout_version

    def outdate_captured_graphs(self) -> None:
        """Let CUDA graphs captured before refuse to run: something they hold of this state has changed."""
        self.layout_version += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnState:
        return self  # neither cast nor moved with others, also while it is exportable

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnState:
        memo[id(self)] = copied = type(self).__new__(type(self))
        with real_tensors():
            copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.was_exportable = False
        self.is_exportable = False  # a copy made while the original was: its holder hangs it beside the tree again
        if any(is_fake(buffer) or buffer.is_meta for buffer in self.buffers()):  # loaded without values
            self.start_over(torch.device("cpu"))
        make_buffers_ordinary(self)


class StateHolder(nn.Module):
    """A module that holds states: copied or loaded, it has them out of reach, wherever those of the original were."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for attribute, part in list(self._modules.items()):
            if isinstance(part, OwnState):
                if part.is_exportable:  # not copied with its holder, and about to leave the tree that both share
                    raise RuntimeError(
                        f"{type(self).__name__}: copy.copy inside lite_attention.exportable, expected deepcopy, or "
                        "copy.copy outside of it"
                    )
                del self._modules[attribute]
                hold(self, attribute, part)


class Held(NamedTuple):
    """A state and who holds it."""

    owner_name: str
    owner: nn.Module
    attribute: str
    state: OwnState

    @property
    def name(self) -> str:
        """Of the state, as if it were a part of the model."""
        return f"{self.owner_name}.{self.attribute}" if self.owner_name else self.attribute


def hold(owner: StateHolder, attribute: str, state: OwnState) -> None:
    """Make the state an attribute of a module and no part of it."""
    object.__setattr__(owner, attribute, state)


def held_states(module: nn.Module, prefix: str = "") -> Iterator[Held]:
    """The states that a module and its parts hold, each once."""
    seen: set[OwnState] = set()
    for name, part in module.named_modules(prefix=prefix):
        for attribute, value in (*vars(part).items(), *part._modules.items()):  # there while it is exportable
            if isinstance(value, OwnState) and value not in seen:
                seen.add(value)
                yield Held(name, part, attribute, value)


def state_buffers(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The buffers of the states that a module and its parts hold, named as if they were parts of it."""
    return {
        name: buffer for held in held_states(module, prefix) for name, buffer in held.state.named_buffers(held.name)
    }


def running_model(part: OwnState) -> nn.Module | None:
    """The outermost module that is being called and holds ``part``; None if it is called by itself.

    Read off the call stack, from the ``self`` of the calls that led here: who is called is always there. A trace runs
    on top of the calls around it, so it sees the model whose block is compiled.
    """
    callers = []
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        first = frame.f_code.co_varnames[: min(frame.f_code.co_argcount, 1)]
        if first and isinstance(module := frame.f_locals.get(first[0]), nn.Module):
            callers.append(module)
    for module in reversed(callers):
        if any(held.state is part for held in held_states(module)):
            return module
    return None


@contextmanager
def exportable(model: nn.Module) -> Iterator[nn.Module]:
    """Let torch.export see the state of LiteAttention's layers and clocks in a model, as buffers that are not saved.

    The program carries the state along and steps as the model does. Call the model once before, on inputs of the shape
    and branch to export, so that there is room for its state, and reset it. The program's state is the model's: what
    ``program.module()`` writes, the model and other modules of the program find written. ``copy.deepcopy(program)`` has
    its own, and so has what is saved and loaded. A copy of the model that is made inside the block is not exportable.

    Args:
        model: to be exported inside the block.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"exportable: model has type {type(model).__name__}, expected a module")
    held = [each for each in held_states(model) if not each.state.is_exportable]
    for each in held:
        del vars(each.owner)[each.attribute]
        each.owner.add_module(each.attribute, each.state)
        each.state.is_exportable = each.state.was_exportable = True  # by export itself the latter would be undone
    try:
        yield model
    finally:
        for each in held:
            del each.owner._modules[each.attribute]
            object.__setattr__(each.owner, each.attribute, each.state)
            each.state.is_exportable = False
            each.state.after_export()
