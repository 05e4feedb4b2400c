"""What belongs to each module that LiteSDPA takes over: its attention, and which map a call of it goes on with."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import torch
from torch import Tensor, nn

from lite_attention.integrations._sdpa_steps import Flag, Steps
from lite_attention.skipping.branches import MAX_BRANCHES
from lite_attention.skipping.module import LiteAttention

__all__ = ["FOREIGN_MODE", "MIXED", "SHARED", "Layer", "Streams"]

_logger = logging.getLogger("lite_attention")

# Why a call that could be taken is not.
MIXED = "a step had another number of calls than those before"
SHARED = (
    "another thread was inside of the model, in the same branch, or in a step which this call may be a part of (only "
    "the model itself, called in branches of its own, begins a step beside others)"
)
ALONE = (
    "outside of a call of the model, so that each such call is a step of its own; what runs several times in a step "
    "then shares a map. If another method or function runs the step, give LiteSDPA a module whose forward is that"
)
# The name of the mode follows.
FOREIGN_MODE = "a torch function mode is around it and may replace the call, "

# Numbers are given rarely: one lock will do, and none is copied with a door.
_numbering = threading.Lock()


class Streams:
    """Where the maps of the layers of one door lie: a number, which is a branch to a layer, for each (call, branch).

    Call is the how-many-th of a step, among all of a module's, and streams are the calls that have a map, in order. One
    table for all layers, so that one compiled code fits them all. What it says of a pair never changes.
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int], int] = {}
        self._said: set[str] = set()

    def say_once(self, reason: str) -> bool:
        """Whether this is the first layer that has to say so."""
        with _numbering:
            said = reason in self._said
            self._said.add(reason)
        return not said

    def of_branch(self, branch: int) -> list[int]:
        """The numbers of a branch's streams."""
        return [number for (_, of), number in sorted(self.numbers.items()) if of == branch]

    def number(self, call: int, branch: int) -> int | None:
        """A branch's first stream has the branch's own number, if it is free; others the highest that is, or None."""
        pair = (call, branch)
        with _numbering:
            if pair not in self.numbers:
                free = [number for number in range(MAX_BRANCHES) if number not in self.numbers.values()]
                if not free:
                    return None
                self.numbers[pair] = branch if branch in free and not self.of_branch(branch) else free[-1]
            return self.numbers[pair]


class Layer(nn.Module):
    """What belongs to one chosen module."""

    def __init__(self, name: str, attention: LiteAttention, streams: Streams, steps: Steps) -> None:
        super().__init__()
        self.name = name
        self.attention = attention
        self.streams = streams
        self.steps = steps
        # For each step by number, and branch, the calls made so far: one None each, as torch.compile makes a symbol of
        # an int that changes, and a constant of the length of a tuple.
        self.calls: list[list[tuple[None, ...]]] = [[()] * MAX_BRANCHES for _ in range(MAX_BRANCHES)]
        # Calls in the steps before, and in those that were traced, whose code outlives a reset.
        self.usual: dict[int, int] = {}
        self.traced: dict[int, int] = {}
        # By number of a map, whether the module has had it.
        self.has_map = [Flag() for _ in range(MAX_BRANCHES)]
        # The branches in which calls cannot be told apart any more.
        self.mixed = [False] * MAX_BRANCHES
        self.left_to_torch: Counter[str] = Counter()

    def maps(self, branch: int) -> list[int]:
        """Of the calls in a branch that were ever taken over, in order, the number of each one's map."""
        return [number for number in self.streams.of_branch(branch) if self.has_map[number].up]

    def maps_in_use(self, branch: int) -> list[int]:
        """As :meth:`maps`, of the calls since the latest reset; of all where none was since. Waits."""
        live = self.attention.state.live.tolist()
        return [number for number in self.maps(branch) if live[number] > 0] or self.maps(branch)

    def skip_fraction(self, stream: int, branch: int) -> Tensor:
        """Of the how-many-th call in the branch that was taken over since the latest reset: fp32, 0-d."""
        numbers = self.maps(branch)
        if not numbers or self.mixed[branch]:
            return torch.zeros_like(self.attention.skip_fraction(branch))
        fractions = torch.stack([self.attention.skip_fraction(number) for number in numbers])
        # On the device, where the passes of a CUDA graph note that they ran.
        in_use = torch.stack([self.attention.state.live[number] for number in numbers]) > 0
        return torch.where(in_use & (in_use.cumsum(0) == stream + 1), fractions, 0).sum()

    def start_over(self) -> None:
        """Forget what was dropped, and how many calls a step made."""
        self.usual.clear()
        if True in self.mixed:
            self.mixed[:] = [False] * MAX_BRANCHES
            self.attention.outdate_captured_graphs()
        self.attention.reset_skip_state()

    def end_step(self, count: int, branch: int) -> bool:
        """Whether this step was the first that made another number of calls in the branch than those before."""
        # A module that did not run took nobody's map.
        if count == 0 or self.mixed[branch]:
            return False
        self.mixed[branch] = count != self.usual.setdefault(branch, self.traced.get(branch, count))
        if self.mixed[branch]:
            self.attention.outdate_captured_graphs()
        return self.mixed[branch]

    @torch.compiler.assume_constant_result
    def end_traced_step(self, count: int, branch: int) -> None:
        """As :meth:`end_step` where a step is traced, which nothing counts when it runs."""
        if count == 0 or self.mixed[branch]:
            return
        usual = self.traced.get(branch, self.usual.get(branch, count))
        if count != usual:
            raise RuntimeError(
                f"LiteSDPA: {self.name or 'the model itself'} makes {count} attention calls in a compiled step of "
                f"branch {branch}, expected {usual} as in those before: it cannot be told which is which. Give each "
                "way that the model runs a LiteSDPA of its own, or compile its blocks instead"
            )
        self.traced[branch] = count

    @torch.compiler.assume_constant_result
    def note(self, reason: str) -> None:
        """Count a call that stays torch's. Where it is traced, the trace counts."""
        self.left_to_torch[reason] += 1
        if (reason == SHARED or reason.startswith(FOREIGN_MODE)) and self.streams.say_once(reason):
            _logger.warning("LiteSDPA: a call of %s is left to torch: %s", self.name or "the model itself", reason)

    @torch.compiler.assume_constant_result
    def say_alone(self) -> None:
        """Say, once, that a chosen module begins a step, which in a model with a forward is rarely meant."""
        if self.streams.say_once(ALONE):
            _logger.warning("LiteSDPA: %s was called %s", self.name, ALONE)

    @torch.compiler.assume_constant_result
    def branch_of(self, call: int, branch: int) -> int:
        """Where the map of this call lies among the branches of the layer's attention."""
        number = self.streams.number(call, branch)
        if number is None:
            raise RuntimeError(
                f"LiteSDPA: {self.name or 'the model itself'} makes attention call {call} of one call of the "
                f"model in branch {branch}, and all {MAX_BRANCHES} maps that a layer has are taken, expected no more "
                "pairs of call and branch than that. If the model given to LiteSDPA runs several steps in one call, "
                "give it the part that one step calls"
            )
        return number

    def summary(self) -> str:
        """What the module's streams skip, and what of it stayed torch's. Waits."""
        maps = [
            f"call {stream} of a step in branch {branch} skips {float(self.attention.skip_fraction(number)):.0%}"
            for stream, branch, number in sorted(
                (stream, branch, number)
                for branch in range(MAX_BRANCHES)
                for stream, number in enumerate(self.maps_in_use(branch))
            )
            if number in self.attention.used_branches() and not self.mixed[branch]
        ]
        left = [f"{count} x {reason}" for reason, count in self.left_to_torch.items()]
        off = "nothing skipped, as skipping is off"
        taken = ", ".join(maps) or ("nothing taken over" if self.attention.skipping else off)
        return f"{taken}; left to torch: {', '.join(left)}" if left else taken
