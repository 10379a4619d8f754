"""Text that others have chosen (names, reasons, contents of a file) goes to a terminal as plain text only."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """One line without control characters, which could move the cursor, set colours or feign another line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
