"""What others have chosen (names, reasons, what a file says) goes to a terminal as text, and as nothing else."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """One line without control characters, which could move the cursor, set colours or feign another line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
