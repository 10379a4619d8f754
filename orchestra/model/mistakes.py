"""Mistakes in data: each with its path, and with the word that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import attrs

from .errors import SpecError

__all__ = ["At", "CodecError", "Wrong", "meant", "path_of", "shown", "suggested"]

At: TypeAlias = tuple[str | int, ...]
"""A path to a value: keys of objects, and numbers of items in lists."""


@attrs.frozen
class Wrong:
    """One mistake: the path `at`, and the text `said`, which begins with the value if `valued`."""

    at: At
    said: str
    valued: bool = False

    def __str__(self) -> str:
        return f"{path_of(self.at)}{'=' if self.valued else ': '}{self.said}"


class CodecError(SpecError):
    """Your data are not valid. `mistakes` has all mistakes."""

    def __init__(self, mistakes: Sequence[Wrong]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("; ".join(map(str, self.mistakes)))


def path_of(at: At) -> str:
    """A path as people write it: ``vms[2].limit.rate``."""
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in at).removeprefix(".") or "value"


def shown(value: Any) -> str:
    """A value as an error shows it, in less than 60 characters, so that the path and the remedy stay in sight."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python refuses to write an int of thousands of digits
        return "a number beyond 64 bits"
    return text if len(text) < 60 else text[:57] + "..."


def meant(name: object, known: Iterable[Any]) -> str:
    """The known name that was probably meant, as the end of a sentence. Empty if no name is near."""
    if not isinstance(name, str):
        return ""
    near = difflib.get_close_matches(name[:80], [str(one) for one in known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggested(said: str) -> str:
    """A constructor's complaint about a word, with the word that was probably meant."""
    found = re.match(r"'([^']*)': must be one of ([\w, -]+)$", said)
    return said + meant(found[1], found[2].split(", ")) if found else said
