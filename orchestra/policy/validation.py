"""Checks of policies' parameters. Each error names the field, the value and the remedy."""

from __future__ import annotations

import math

from ..model.errors import SpecError

__all__ = ["above", "within"]


def within(field: str, value: float, low: float, high: float, unit: str) -> float:
    """Return `value` as a float if it is a number from `low` to `high`; a bool is none.

    Raises:
        SpecError: it is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SpecError(f"{field}={value!r}: must be from {low:g} to {high:g} {unit}")
    return float(value)


def above(field: str, value: float, low: float, unit: str) -> float:
    """Return `value` as a float if it is a finite number of more than `low`; a bool is none.

    Raises:
        SpecError: it is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
        raise SpecError(f"{field}={value!r}: must be more than {low:g} {unit}")
    return float(value)
