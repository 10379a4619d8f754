"""Checks of single values, for specs and actions. Each error names the field, the value and the remedy."""

from __future__ import annotations

import math

from .errors import SpecError

__all__ = ["fail", "number", "whole"]


def fail(field: str, value: object, remedy: str) -> SpecError:
    """Make the error for a field. It shows at most 200 characters of the value: data from outside may be very long."""
    try:
        shown = repr(value)
    except ValueError:  # an int of more than 4300 digits has none
        shown = f"<{type(value).__name__}>"
    return SpecError(f"{field}={shown if len(shown) <= 200 else shown[:200] + '...'}: {remedy}")


def number(field: str, value: object) -> float:
    """Return `value` as a float if it is a finite number; a bool is none.

    Raises:
        SpecError: it is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail(field, value, "must be a number")
    try:
        found = float(value)
    except OverflowError:  # an int beyond the floats
        found = math.inf
    if not math.isfinite(found):
        raise fail(field, value, "must be finite; leave the limit out (None) for no limit")
    return found


def whole(field: str, value: object, low: int, high: int, unit: str = "") -> int:
    """Return `value` if it is a whole number from `low` to `high`; a bool is none.

    Raises:
        SpecError: it is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail(field, value, f"must be a whole number{' of' * unit.startswith(' ')}{unit}")
    if not low <= value <= high:
        raise fail(field, value, f"must be from {low} to {high}{unit}")
    return value
