"""Checks of values, for every room: numbers that users write, and the entries of tensors of lengths."""

from __future__ import annotations

import numbers
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lite_attention.ops.modes import real_tensors

__all__ = [
    "as_int",
    "check_entries",
    "checked_bool",
    "checked_int",
    "checked_int64",
    "checked_number",
    "equals_any",
    "limited_entries",
    "settled",
]


def as_int(value: object) -> int | None:
    """A whole number: an int, the symbolic one of a traced size, a scalar of numpy as an int. None for all else."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value  # type: ignore[return-value]
    return int(value) if isinstance(value, numbers.Integral) else None


def checked_bool(what: str, value: bool) -> bool:
    """``value``, if it is True or False: text and numbers have a truth of their own that nobody meant.

    Raises:
        TypeError: ``value`` is something else; the text begins with ``what``.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{what} has type {type(value).__name__}, expected a bool")
    return value


def checked_int(what: str, value: int, lowest: int | None = None, highest: int | None = None) -> int:
    """``value``, if it is a whole number from ``lowest`` to ``highest``.

    Args:
        what: the argument as errors name it, for instance "LiteAttention: max_batch_size".
        value: an int, or the symbolic one of a traced size; a scalar of numpy becomes an int. bool is none.
        lowest, highest: None for no limit.

    Raises:
        TypeError, ValueError: ``value`` is something else; the text begins with ``what``.
    """
    number = as_int(value)
    if number is None:
        raise TypeError(f"{what} has type {type(value).__name__}, expected an int")
    value = number
    too_small = lowest is not None and value < lowest
    if too_small or (highest is not None and value > highest):
        if highest is None:
            raise ValueError(f"{what} is {value}, expected at least {lowest}")
        expected = f"at most {highest}" if lowest is None else f"{lowest} to {highest}"
        raise ValueError(f"{what} is {value}, expected {expected}")
    return value


def checked_int64(what: str, value: int) -> int:
    """``value``, if it is a whole number that an operator's argument can hold.

    Raises:
        TypeError, ValueError: ``value`` is something else; the text begins with ``what``.
    """
    number = checked_int(what, value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{what} is beyond the integers of 64 bits, expected one of these")
    return number


def equals_any(value: Any, *choices: Any) -> bool:
    """Whether ``value`` is equal to one of ``choices``, sizes and shapes that are traced as symbols among them.

    While torch.compile traces, ``in`` says that a size of 1 is not among symbols of which one is 1.
    """
    return any(value == choice for choice in choices)


def settled(condition: bool) -> bool:
    """The condition as a plain bool, also where it compares sizes that are traced as symbols.

    For arguments of torch's functions, which take no symbolic bool; the trace is then guarded on the answer.
    """
    if condition:  # noqa: SIM103 - bool() of a symbolic condition stays symbolic
        return True
    return False


def checked_number(what: str, value: float, expected: str = "a number") -> float:
    """``value``, if it is a number: an int or float, or the symbolic one of a traced value; numpy's become floats.

    Args:
        what: the argument as errors name it.
        value: bool and tensors are none.
        expected: what errors say is.

    Raises:
        TypeError, ValueError: ``value`` is something else, or beyond what a float can hold; the text begins with
            ``what``.
    """
    given: object = value
    if isinstance(given, (float, int, torch.SymFloat, torch.SymInt)) and not isinstance(given, bool):
        if isinstance(given, int):
            _check_fits_float(what, given)
        return given  # type: ignore[return-value]
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(f"{what} has type {type(given).__name__}, expected {expected}")
    return float(given)


def _check_fits_float(what: str, number: int) -> None:
    try:
        float(number)
    except OverflowError:
        raise ValueError(f"{what} is beyond the numbers that a float can hold, expected one of these") from None


def check_entries(what: str, entries: Tensor, lowest: int, highest: int) -> bool:
    """Whether all entries were found to be from ``lowest`` to ``highest``.

    They are looked at on the CPU, through the transforms of torch.func too. What traces a call there (torch.compile,
    torch.export, make_fx) makes a program that looks, but for samples of a vmap that is traced with it. On a GPU
    looking would mean waiting; torch.jit.trace would drop it.

    Raises:
        ValueError: an entry is out of range; the text begins with ``what`` and says which it is.
        RuntimeError: the same, from a program.
    """
    if entries.device.type != "cpu" or torch._C._get_tracing_state() is not None:
        return False
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        if not torch._C._functorch.is_batchedtensor(entries):
            fits = ((entries >= lowest) & (entries <= highest)).all()
            # No size in the text, which would bind the trace to it.
            torch._assert_async(fits, f"{what} has an entry that is out of range")
        return False
    values = entries
    while torch._C._functorch.is_functorch_wrapped_tensor(values):
        values = torch._C._functorch.get_unwrapped(values)
    if is_fake(values) or values.is_meta:
        return False
    with real_tensors() if is_in_torch_dispatch_mode() else nullcontext():
        _check_values(what, values, lowest, highest, is_whole=values is entries)
    return True


def _check_values(what: str, values: Tensor, lowest: int, highest: int, is_whole: bool) -> None:
    wrong = (values < lowest) | (values > highest)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        where = f"[{', '.join(map(str, place))}] is" if is_whole else " holds"
        raise ValueError(f"{what}{where} {int(values[tuple(place)])}, expected {lowest} to {highest}")


def limited_entries(what: str, entries: Tensor, lowest: int, highest: int) -> Tensor:
    """``entries``, all of them from ``lowest`` to ``highest``: others are refused where they are looked at, or limited.

    Raises:
        ValueError: as :func:`check_entries`.
    """
    return entries if check_entries(what, entries, lowest, highest) else entries.clamp(lowest, highest)
