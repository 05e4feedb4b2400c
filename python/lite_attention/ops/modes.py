"""Modes of torch that state must not depend on."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

import torch
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["make_buffers_ordinary", "ordinary_tensors", "real_tensors"]


def ordinary_tensors() -> AbstractContextManager[object]:
    """Block whose tensors can be written and saved in every mode later; it can be traced.

    An inference tensor can be written inside ``torch.inference_mode()`` alone, and is refused where gradients are
    recorded; a FakeTensor holds nothing. What is kept from call to call is made in here.
    """
    return torch.inference_mode(False) if torch.compiler.is_compiling() else real_tensors()


class real_tensors:  # noqa: N801 - read as a function, like torch.no_grad
    """As :func:`ordinary_tensors`, for what runs as it is while something else is traced.

    The transforms of torch.func are left, too: a tensor made inside of one is its wrapper, and does not outlive it.
    """

    @torch.compiler.disable
    def __enter__(self) -> None:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(_disable_current_modes())
            if torch._C._are_functorch_transforms_active():
                modes.enter_context(temporarily_clear_interpreter_stack())
            self._modes = modes.pop_all()

    @torch.compiler.disable
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.__exit__(kind, error, trace)


def make_buffers_ordinary(module: nn.Module) -> None:
    """Replace a module's buffers that cannot be written freely or that others write too.

    The first are inference tensors, as in a copy made or loaded in inference mode; the second lie in memory shared with
    the process that sent the module, as torch.multiprocessing does.
    """
    with ordinary_tensors():
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_inference() or buffer.is_shared():
                    setattr(part, name, buffer.clone())
