"""Checks of arguments that are no tensors, for every room."""

from __future__ import annotations

import torch

__all__ = ["checked_int"]


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
