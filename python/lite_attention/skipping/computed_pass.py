"""A pass that is computed and not remembered yet: what is left of the call may still fail, and then nothing was."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ComputedPass", "remember"]


class ComputedPass(NamedTuple):
    """What a pass has computed, and how its layer comes to remember it."""

    out: Tensor
    lse: Tensor
    make_room: Callable[[], None] | None
    """Allocates what ``write`` needs. None: nothing."""
    write: Callable[[], None] | None
    """Writes the state. None: the pass is not remembered."""


def remember(*passes: ComputedPass) -> None:
    """Let the layers remember the passes of one call: all of them or, where memory is wanting, none."""
    if not torch.compiler.is_compiling():  # the trace has made the room
        for each in passes:
            if each.make_room is not None:
                each.make_room()
    for each in passes:
        if each.write is not None:
            each.write()
