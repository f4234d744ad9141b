"""Checks of numbers that users pass; Python's and NumPy's numbers are converted."""

import math
import numbers
import operator


def as_whole(value) -> int | None:
    """`value` as an int; None for True, 2.0 and everything else that is not a whole number."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_real(value) -> float | None:
    """`value` as a float; None for True, infinity, NaN and everything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def whole(owner: str, name: str, value, least: int = 0) -> int:
    """`value` as an int; raises ValueError unless it is a whole number of at least `least`."""
    number = as_whole(value)
    if number is None or number < least:
        raise ValueError(f"{owner}: {name} must be a whole number from {least} on, got {value!r}")
    return number
