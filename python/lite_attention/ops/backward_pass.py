"""Whether a backward pass is running in this thread. What is called in one is a forward that runs again.

``running`` is read as a variable of this module and found out at every read (PEP 562). A function would not do:
torch.compile takes what a module holds for a value to guard on, so that code compiled in a forward is not run in a
backward; what a function of torch tells is a constant to it.
"""

from __future__ import annotations

import torch

__all__ = ["refuse"]


def __getattr__(name: str) -> bool:
    if name == "running":
        return torch._C._current_graph_task_id() != -1
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@torch.compiler.assume_constant_result  # the error is then raised by the trace, with its own words
def refuse(caller: str) -> None:
    """Refuse a pass that a backward runs again, as torch.utils.checkpoint does: its map is no longer the forward's.

    Raises:
        RuntimeError: always; the text begins with ``caller``.
    """
    raise RuntimeError(
        f"{caller}: called inside a backward pass, as torch.utils.checkpoint does to compute a segment again: it would "
        "skip by another map than in the forward, and so give another gradient. Expected the layer outside of "
        "checkpointed segments, or skipping off (enable_skip_optimization(False)) before the forward and until the "
        "backward is done, as off for the backward alone gives wrong gradients, or lite_attention.attention with a map "
        "of your own"
    )
