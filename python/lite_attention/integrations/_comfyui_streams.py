"""Which stream a model call of a ComfyUI sampling belongs to, told from what the call is for and from those before it.

A stream is what one skip state may follow: calls that come once in each step, for the same conditions and the same part
of the latent. ComfyUI says the conditions, of context windows the frames, and which blocks are replaced, as guidance
that asks for the same conditions again does (skip-layer, perturbed attention). It says nothing of tiles, and which
conditions share a batch tells nothing: memory decides that anew each time. So conditions are counted, each by itself.
Where one comes a second time in a step, alone or in a batch, and nothing tells the two apart, it is mixed, and all
calls with it run dense from there on. Where the user says that calls come in one order, the first with a condition in
each step is of one stream, the second of another; a step with more or fewer of them than those before breaks that word,
and mixes it as well. Where ComfyUI tells of steps, calls outside of any have no stream.

A step is one evaluation of the model by the sampler, so those that evaluate a sigma twice (Heun's) go on with one
stream. Where a host tells neither of samplings nor of evaluations, the calls at one sigma are a step.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Hashable
from itertools import zip_longest
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["FOREIGN", "Stream", "Streams", "sigma_of"]

# Why calls are mixed.
REPEATED = (
    "several model calls of a step for the same conditions, as of tiles, which only their order tells apart "
    "(fixed_order says that it is always the same)"
)
FOREIGN = (
    "a model call outside of the sampler's evaluations, as by a node that was wired around this one and asks the model "
    "for more: it cannot be told what it is for"
)
CHANGED = "more or fewer model calls for the same conditions than in the steps before"

_logger = logging.getLogger("lite_attention")


class Stream(NamedTuple):
    """What the calls of one stream have in common."""

    conditions: tuple[int, ...]
    """Which side each entry of the batch is of: 0 the positive, 1 the negative."""
    uuids: tuple[Hashable, ...]
    """Of the conditions: the side alone does not tell two prompts of it apart, as in regional prompting."""
    window: tuple[int, ...] | None
    """Frames, where the model sees one window of them."""
    replaced: frozenset[Hashable]
    """Blocks and attentions that run something else, with what they run."""
    calls: tuple[int, ...]
    """Of each entry the how-many-th call with it in each step, from 0."""

    def __str__(self) -> str:
        calls = " and ".join(str(call) for call in sorted(set(self.calls)))
        what = f"call {calls} of a step" if self.calls else "a call"
        return f"{what} for conditions {list(self.conditions)}{_which(self.window, self.replaced)}"

    def parts(self) -> list[_Part]:
        """The entries of the batch, each of them once, with what else is said of the call."""
        entries = dict.fromkeys(zip_longest(self.conditions, self.uuids)) or {(None, None): None}
        return [_Part(condition, uuid, self.window, self.replaced) for condition, uuid in entries]


class _Part(NamedTuple):
    """What is told of one entry of a call's batch: see :class:`Stream`."""

    condition: int | None
    uuid: Hashable
    window: tuple[int, ...] | None
    replaced: frozenset[Hashable]

    def __str__(self) -> str:
        return f"calls for condition {self.condition}{_which(self.window, self.replaced)}"


def _which(window: tuple[int, ...] | None, replaced: frozenset[Hashable]) -> str:
    frames = "" if window is None else f" on frames {window[0]} to {window[-1]}"
    return f"{frames} with {len(replaced)} replacements" if replaced else frames


class Streams:
    """The streams of one run of a sampler, numbered in the order in which they first ran.

    Args:
        room: so many have numbers.
        fixed_order: calls of a step that nothing else tells apart come in the same order in each step.
    """

    numbers: dict[Stream, int]

    def __init__(self, room: int, fixed_order: bool = False) -> None:
        self.room = room
        self.fixed_order = fixed_order
        self.in_told_step = False
        self.tells_steps = False  # ComfyUI, as far as it has shown
        self.start()

    def start(self) -> None:
        """A run begins: nothing of the last one counts."""
        self.numbers = {}
        # Calls with a part in the step under way and in the steps before, and why it is not taken.
        self._calls: Counter[_Part] = Counter()
        self._usual: dict[_Part, int] = {}
        self._mixed: dict[_Part, str] = {}
        self._schedule: object = None
        self._sigma: float | None = None
        self._direction = 0.0

    def is_new_run(self, sigma: float, schedule: object) -> bool:
        """Whether a model call at ``sigma`` of ``schedule`` begins a run, as far as these tell.

        A schedule that was not there before, or a sigma against the direction of those before. That the schedule is the
        same object says nothing: nodes keep theirs from run to run.
        """
        if self._sigma is None or self._is_outside():
            return False
        return schedule is not self._schedule or (sigma - self._sigma) * self._direction < 0

    def _is_outside(self) -> bool:
        """Whether a call of now is in no step, where ComfyUI tells of steps."""
        return self.tells_steps and not self.in_told_step

    def of_call(self, sigma: float, options: dict[str, Any]) -> Stream:
        """The stream of a model call at ``sigma`` with these options; one of no calls if the call is in no step.

        Raises:
            TypeError, ValueError: an option is not what ComfyUI gives; the text names it.
        """
        conditions, uuids = _listed("cond_or_uncond", options), _listed("uuids", options)
        stream = Stream(conditions, uuids, _window(options), _replaced(options), ())
        if self._is_outside():
            return stream
        if sigma != self._sigma:
            if not self.in_told_step:
                self.end_step()
            if self._sigma is not None:
                self._direction = sigma - self._sigma
        self._sigma, self._schedule = sigma, options["sample_sigmas"]
        parts = stream.parts()
        stream = stream._replace(calls=tuple([self._calls[part] for part in parts]))
        self._calls.update(parts)
        if not self.fixed_order:
            self._mix(stream, [part for part in parts if self._calls[part] > 1], REPEATED)
        return stream

    def take_back(self, stream: Stream) -> None:
        """The call failed: the next one may be the same again."""
        if stream.calls:
            self._calls.subtract(stream.parts())

    def begin_step(self) -> None:
        """ComfyUI says that a step begins, in place of the sigma; :meth:`end_step` ends it."""
        self.end_step()
        self.in_told_step = self.tells_steps = True

    def end_step(self, failed: bool = False) -> None:
        """A step is over, with as many calls for each condition as those before. One that failed does not count."""
        for part, count in self._calls.items():
            # One that did not come at all took nobody's state.
            if not failed and count > 0 and self._usual.setdefault(part, count) != count:
                self._mix(part, [part], CHANGED)
        self._calls.clear()
        self.in_told_step = False

    def why_mixed(self, stream: Stream) -> str | None:
        """Why it cannot be told which state a call of the stream goes on with, None if it can."""
        if not stream.calls:
            return FOREIGN
        return next((self._mixed[part] for part in stream.parts() if part in self._mixed), None)

    def _mix(self, which: Stream | _Part, parts: list[_Part], reason: str) -> None:
        parts = [part for part in parts if part not in self._mixed]
        self._mixed.update(dict.fromkeys(parts, reason))
        if parts:
            _logger.warning("LiteAttention: %s and those like it run dense from now on: %s", which, reason)

    def number(self, stream: Stream) -> int | None:
        """The stream's number, None where all have been given to others."""
        if stream not in self.numbers and len(self.numbers) == self.room:
            return None
        return self.numbers.setdefault(stream, len(self.numbers))


def sigma_of(sigmas: Tensor) -> float:
    """Of several sigmas the largest, as :class:`lite_attention.skipping.dense_steps.GenerationClock` has it. Waits.

    Raises:
        TypeError, ValueError: there is none.
    """
    if not isinstance(sigmas, Tensor):
        raise TypeError(
            f"LiteAttention: sigmas of transformer_options has type {type(sigmas).__name__}, expected a tensor"
        )
    if sigmas.numel() == 0 or math.isnan(sigma := float(sigmas.max())):
        raise ValueError(f"LiteAttention: sigmas of transformer_options is {sigmas.tolist()}, expected numbers")
    return sigma


def _listed(name: str, options: dict[str, Any]) -> tuple[Any, ...]:
    value = options.get(name)
    if value is None:
        return ()
    try:
        listed = tuple(value)
        hash(listed)
    except TypeError:
        raise TypeError(
            f"LiteAttention: {name} of transformer_options is {value!r}, expected a list, an entry for each condition"
        ) from None
    return listed


def _replaced(options: dict[str, Any]) -> frozenset[Hashable]:
    kinds: dict[str, dict[Hashable, object]] = options.get("patches_replace") or {}
    return frozenset(
        (kind, block, patch if isinstance(patch, Hashable) else id(patch))
        for kind, blocks in kinds.items()
        for block, patch in blocks.items()
    )


def _window(options: dict[str, Any]) -> tuple[int, ...] | None:
    window = options.get("context_window")
    if window is None:
        return None
    try:
        return tuple(int(index) for index in window.index_list)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"LiteAttention: context_window of transformer_options is {window!r}, expected one with an index_list of "
            "frames; without it, parts of the video could not be told apart"
        ) from None
