"""Numbers as people type and read them."""

from __future__ import annotations

import math
import re
from typing import Final

__all__ = ["parse_rate", "parse_seconds", "parse_size", "shown", "tidy"]

SUFFIXES: Final = {"": 0, "K": 1, "M": 2, "G": 3}


def parse_size(text: str) -> int:
    """A whole number: 4096, 0x1000, 16M. K, M and G are powers of 1024.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(0x[0-9a-f]{1,16}|[0-9]{1,20})([KMG]?)", text.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise ValueError(f"{text!r} is not a whole number such as 4096, 0x1000 or 16M")
    return int(found[1], 16 if found[1][:2].lower() == "0x" else 10) << 10 * SUFFIXES[found[2].upper()]


def parse_rate(text: str) -> float:
    """Events per second: 500, 0.5, 20K. K, M and G are powers of 1000.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(
        r"([0-9]{1,15}(?:\.[0-9]{1,15})?|0x[0-9a-f]{1,12})([KMG]?)", text.strip(), re.IGNORECASE | re.ASCII
    )
    if not found:
        raise ValueError(f"{text!r} is not a rate such as 500, 0.5 or 20K events a second")
    number = float(int(found[1], 16)) if found[1][:2].lower() == "0x" else float(found[1])
    if number == 0:
        raise ValueError("must be more than 0 events a second")
    return number * 1000.0 ** SUFFIXES[found[2].upper()]


def parse_seconds(text: str) -> float:
    """A time in seconds, more than 0: 12, 0.5.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}", text.strip(), re.ASCII) or not float(text) > 0:
        raise ValueError(f"{text!r} is not a time such as 12 or 0.5 seconds, more than 0")
    return float(text)


def tidy(number: float) -> float:
    """The next number downwards with one digit and zeros behind it (4,321: 4,000); at least 1."""
    power = 10.0 ** math.floor(math.log10(number)) if number >= 1 else 1.0
    return max(number // power, 1.0) * power


def shown(number: float) -> str:
    """At most 6 characters: 0.4, 12, 51,234, 345K, 2.1M."""
    if number < 9.95:
        return f"{number:.1f}".removesuffix(".0")
    if number < 99_999.5:
        return f"{number:,.0f}"
    for unit, letter in ((1e3, "K"), (1e6, "M"), (1e9, "G")):
        if number < 999.5 * unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.1e}"
