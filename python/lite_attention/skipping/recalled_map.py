"""The map that a compiled pass starts from, by an operator of its own, so that no backward computes it again.

A compiler may let a backward compute again what a forward computed: in a checkpointed segment, or where its memory
budget says so. From buffers that the forward has written since, that is another map, and with it another gradient.
Which nodes are computed again is decided long after Python ran, so what looks is a node itself. A backward to which the
map was saved does not run it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.ops import backward_pass

__all__ = ["recalled_map"]

# Beside the namespace of the operators that have compiled kernels, whose schemas are part of a build.
NAMESPACE = "lite_attention_state"

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("recall_map(Tensor counts, Tensor words) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _recall_map(counts: Tensor, words: Tensor) -> Tensor:
    if backward_pass.running:
        backward_pass.refuse("LiteAttention")
    return torch.where(counts, words, -1)


def _fake(counts: Tensor, words: Tensor) -> Tensor:
    return words.new_empty(words.shape)


_library.impl("recall_map", _recall_map, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::recall_map", _fake, lib=_library)


@torch.compiler.assume_constant_result  # torch 2.10 takes torch's function for True in whatever it compiles
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def recalled_map(counts: Tensor, words: Tensor) -> Tensor:
    """``words`` where they count (bool, 0-d), else the full map."""
    # An exported program has no backward, and may run where there is no Python. Eager passes have looked themselves.
    if torch.compiler.is_compiling() and not _is_exporting():
        compiled: Tensor = torch.ops.lite_attention_state.recall_map(counts, words)
        return compiled
    return torch.where(counts, words, -1)
