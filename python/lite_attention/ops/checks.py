"""Checks of arguments that are no tensors, for every room."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["checked_int", "equals_any", "settled"]


def checked_int(what: str, value: int, lowest: int | None = None, highest: int | None = None) -> int:
    """``value``, if it is a whole number from ``lowest`` to ``highest``.

    Args:
        what: the argument as errors name it, for instance "LiteAttention: max_batch_size".
        value: an int, or the symbolic one of a traced size. bool is none.
        lowest, highest: None for no limit.

    Raises:
        TypeError, ValueError: ``value`` is something else; the text begins with ``what``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{what} has type {type(value).__name__}, expected an int")
    too_small = lowest is not None and value < lowest
    if too_small or (highest is not None and value > highest):
        if highest is None:
            raise ValueError(f"{what} is {value}, expected at least {lowest}")
        expected = f"at most {highest}" if lowest is None else f"{lowest} to {highest}"
        raise ValueError(f"{what} is {value}, expected {expected}")
    return value


def equals_any(value: Any, *choices: Any) -> bool:
    """Whether ``value`` is equal to one of ``choices``, sizes and shapes that are traced as symbols among them.

    ``in`` compares a size of 1 and a symbol that is 1 by identity while torch.compile traces, and says no.
    """
    return any(value == choice for choice in choices)


def settled(condition: bool) -> bool:
    """The condition as a plain bool, also where it compares sizes that are traced as symbols.

    For arguments of torch's functions, which take no symbolic bool; the trace is then guarded on the answer.
    """
    if condition:  # noqa: SIM103 - bool() of a symbolic condition stays symbolic
        return True
    return False
