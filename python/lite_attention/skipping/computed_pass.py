"""A pass that is computed and not remembered yet: what is left of the call may still fail, and then nothing was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def remember(*passes: ComputedPass, notes: Sequence[Callable[[], None]] = ()) -> None:
    """Let the layers remember the passes of one call: all of them or, where memory is wanting, none.

    ``notes`` are written with them: what states of the call that computed nothing are to note.
    """
    if not torch.compiler.is_compiling():  # the trace has made the room
        for each in passes:
            if each.make_room is not None:
                each.make_room()
    for each in passes:
        if each.write is not None:
            each.write()
    for note in notes:
        note()
