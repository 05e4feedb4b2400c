"""What a layer is told about skipping: one object that constructors, doors and ranks hand on whole."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lite_attention.ops.checks import checked_bool, checked_int
from lite_attention.skipping.arguments import Threshold, checked_threshold

__all__ = ["SkipPolicy", "environment_flag", "verbose_by_environment"]


@dataclass(frozen=True, kw_only=True)
class SkipPolicy:
    """What a layer is told about skipping.

    A layer is given one by ``policy=``, or the loose arguments that stand for its fields, never both. Fields that are
    equal make policies equal.

    Args:
        threshold: in powers of two, at most 0. -10 drops what is below a thousandth of the row's best so far; lower
            drops less, -inf nothing, 0 keeps only what raises a row's maximum. One number, or one for each query head.
        dense_steps: so many passes from the start of a generation compute every tile; the first always does. A layer
            counts the passes of each branch since its last reset, unless a clock (``dense_steps.py``) tells it.
        enabled: False runs the dense operator and keeps no state.

    Raises:
        TypeError, ValueError: a field is not what it should be, or a threshold is above 0 without
            ``LITE_ATTENTION_DEBUG``.
    """

    threshold: float | tuple[float, ...] = -10.0
    dense_steps: int = 0
    enabled: bool = True

    def __post_init__(self) -> None:
        for field, check in _CHECKS.items():
            object.__setattr__(self, field, check(f"SkipPolicy: {field}", getattr(self, field)))

    @classmethod
    def resolve(cls, caller: str, policy: SkipPolicy | None, **loose: Any) -> SkipPolicy:
        """The policy that a caller was given, whole or by loose arguments.

        Args:
            caller: whose arguments these are; errors begin with it.
            policy: None where it was not given.
            loose: the arguments that stand for fields, by the name that the caller gives them; None where not given.

        Raises:
            TypeError, ValueError: both ways were used, or an argument is not what it should be.
        """
        given = {name: value for name, value in loose.items() if value is not None}
        if policy is None:
            fields = {_FIELDS.get(name, name): (name, value) for name, value in given.items()}
            return cls(**{field: _CHECKS[field](f"{caller}: {name}", value) for field, (name, value) in fields.items()})
        if not isinstance(policy, SkipPolicy):
            raise TypeError(f"{caller}: policy has type {type(policy).__name__}, expected a SkipPolicy")
        if given:
            raise ValueError(f"{caller}: policy and {' and '.join(given)} are given, expected one or the other")
        return policy

    def with_checked(self, **fields: Any) -> SkipPolicy:
        """With other values in some fields, which were checked before: what a layer was allowed stays allowed."""
        other = copy.copy(self)
        for field, value in fields.items():
            object.__setattr__(other, field, value)
        return other


# Loose arguments whose name is not that of the field they stand for.
_FIELDS = {"enable_skipping": "enabled"}


def environment_flag(name: str) -> bool:
    """Whether an environment variable is on: neither unset nor empty nor ``FALSE``."""
    return os.environ.get(name, "FALSE") not in ("", "FALSE")


def verbose_by_environment() -> bool:
    """Whether LITE_ATTENTION_VERBOSE is on; then info messages reach the terminal if the application shows none."""
    if not environment_flag("LITE_ATTENTION_VERBOSE"):
        return False
    logger = logging.getLogger("lite_attention")
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    return True


def _checked_threshold(what: str, value: Threshold) -> float | tuple[float, ...]:
    return checked_threshold(what, value, environment_flag("LITE_ATTENTION_DEBUG"))


def _checked_dense_steps(what: str, value: int) -> int:
    return checked_int(what, value, lowest=0)


# How each field is checked and brought into the form that is kept.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "threshold": _checked_threshold,
    "dense_steps": _checked_dense_steps,
    "enabled": checked_bool,
}
