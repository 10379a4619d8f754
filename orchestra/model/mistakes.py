"""What is wrong with data: each thing with its path, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import attrs

from .errors import SpecError

__all__ = ["At", "CodecError", "Wrong", "meant", "path_of", "shown", "suggested"]

At: TypeAlias = tuple[str | int, ...]
"""A path: keys, and numbers of items."""


@attrs.frozen
class Wrong:
    """One thing that is wrong: where, and what, which begins with the value if `valued`."""

    at: At
    said: str
    valued: bool = False

    def __str__(self) -> str:
        return f"{path_of(self.at)}{'=' if self.valued else ': '}{self.said}"


class CodecError(SpecError):
    """Your data are not what they should be: `mistakes` has all that is wrong."""

    def __init__(self, mistakes: Sequence[Wrong]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("; ".join(map(str, self.mistakes)))


def path_of(at: At) -> str:
    """As people write it: ``vms[2].limit.rate``."""
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in at).removeprefix(".") or "value"


def shown(value: Any) -> str:
    """A value as an error names it."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # an int of thousands of digits has none
        return "a number beyond 64 bits"
    return text if len(text) < 60 else text[:57] + "..."


def meant(name: object, known: Iterable[Any]) -> str:
    """What was probably meant, as the end of a sentence; nothing if nothing is near."""
    if not isinstance(name, str):
        return ""
    near = difflib.get_close_matches(name[:80], [str(one) for one in known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggested(said: str) -> str:
    """A constructor's complaint about a word, with the one that was probably meant."""
    found = re.match(r"'([^']*)': must be one of ([\w, -]+)$", said)
    return said + meant(found[1], found[2].split(", ")) if found else said
