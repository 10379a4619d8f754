"""Keys of a terminal, as people write them."""

from __future__ import annotations

__all__ = ["key_name", "parse_key"]


def parse_key(text: str) -> bytes:
    """A key: ``^]`` for Ctrl-], one character for itself, ``none`` for no key.

    Raises:
        ValueError: it is no such key.
    """
    if text == "none":
        return b""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) & 0x1F])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise ValueError(f"{text!r} is no key such as ^] (Ctrl-]), ~ or none")


def key_name(key: bytes) -> str:
    """How a person calls a key of `parse_key`."""
    return f"Ctrl-{chr(key[0] | 0x40)}" if key < b" " else key.decode()
