"""Which stream a model call of a ComfyUI sampling belongs to, told from what the call is for and from those before it.

A stream is what one skip state may follow: calls that come once in each step, for the same conditions and the same part
of the latent. ComfyUI says the conditions, and of context windows the frames; it says nothing of tiles, or of guidance
that asks for the same again. So the calls of a step for the same conditions are counted: the first of each step is one
stream, the second another. A step is what has one sigma. Samplers that call a sigma twice have two streams of the same
video, each of them right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Stream", "Streams", "sigma_of"]


class Stream(NamedTuple):
    """What the calls of one stream have in common."""

    conditions: tuple[int, ...]
    """Which side each entry of the batch is of: 0 the positive, 1 the negative."""
    uuids: tuple[Hashable, ...]
    """Of the conditions: the side alone does not tell two prompts of it apart, as in regional prompting."""
    window: tuple[int, ...] | None
    """Frames, where the model sees one window of them."""
    call: int
    """The how-many-th call for these in each step, from 0."""

    def __str__(self) -> str:
        window = "" if self.window is None else f" on frames {self.window[0]} to {self.window[-1]}"
        return f"call {self.call} of a step for conditions {list(self.conditions)}{window}"


class Streams:
    """The streams of one run of a sampler, numbered in the order in which they first ran.

    Args:
        room: so many have numbers.
    """

    numbers: dict[Stream, int]

    def __init__(self, room: int) -> None:
        self.room = room
        self.start()

    def start(self) -> None:
        """A run begins: nothing of the last one counts."""
        self.numbers = {}
        self._calls: Counter[Stream] = Counter()
        self._schedule: object = None
        self._sigma: float | None = None
        self._direction = 0.0

    def is_new_run(self, sigma: float, schedule: object) -> bool:
        """Whether a model call at ``sigma`` of ``schedule`` begins a run, as far as these tell.

        A schedule that was not there before, or a sigma against the direction of those before. That the schedule is the
        same object says nothing: nodes keep theirs from run to run.
        """
        if self._sigma is None:
            return False
        return schedule is not self._schedule or (sigma - self._sigma) * self._direction < 0

    def of_call(self, sigma: float, options: dict[str, Any]) -> Stream:
        """The stream of a model call at ``sigma`` with these options.

        Raises:
            TypeError, ValueError: an option is not what ComfyUI gives; the text names it.
        """
        first = Stream(_listed("cond_or_uncond", options), _listed("uuids", options), _window(options), 0)
        if sigma != self._sigma:
            self._calls.clear()
            if self._sigma is not None:
                self._direction = sigma - self._sigma
        self._sigma, self._schedule = sigma, options["sample_sigmas"]
        stream = first._replace(call=self._calls[first])
        self._calls[first] += 1
        return stream

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
