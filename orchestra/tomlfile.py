"""TOML files into attrs classes, strictly: what is wrong is told all at once, each mistake with its line and key.

The only module that imports cattrs.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import attrs

from .errors import OrchestraError, SpecError

try:
    # mypy may well be run where this extra is not installed.
    from cattrs import (  # type: ignore[import-not-found,unused-ignore]
        AttributeValidationNote,
        ClassValidationError,
        Converter,
        ForbiddenExtraKeysError,
        IterableValidationError,
        IterableValidationNote,
    )
except ImportError as error:
    raise OrchestraError(f"TOML files need cattrs ({error}): pip install 'orchestra[simulate]'") from None

__all__ = ["Mistake", "Mistaken", "TomlError", "converter", "read", "structure"]

T = TypeVar("T")
Path_: TypeAlias = tuple[str | int, ...]


@attrs.frozen
class Mistake:
    """One thing that is wrong. `key` as in ``vms[2].count``; `line` counts from 1, None where there is no one line."""

    key: str
    line: int | None
    text: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.key}: {self.text}" if self.key else f"{where}{self.text}"


class TomlError(SpecError):
    """Your file says what can't be: `mistakes` has all of it."""

    def __init__(self, file: str, mistakes: Sequence[Mistake]) -> None:
        self.file = file
        self.mistakes = tuple(mistakes)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__(f"{file}: {count}\n" + "\n".join(f"  {mistake}" for mistake in mistakes))


def converter() -> Converter:
    """A converter that takes a file at its word: no unknown keys, no text for numbers, no fractions for whole ones."""
    made = Converter(forbid_extra_keys=True, detailed_validation=True)
    made.register_structure_hook(float, lambda value, _: float(_typed(value, int | float, "a number")))
    made.register_structure_hook(int, lambda value, _: _typed(value, int, "a whole number"))
    made.register_structure_hook(bool, lambda value, _: _typed(value, bool, "true or false", boolean=True))
    made.register_structure_hook(str, _text)
    return made


def read(path: Path, kind: type[T], with_: Converter | None = None) -> T:
    """What a file says, as a `kind`.

    Raises:
        TomlError: it says what can't be.
        OSError: it can't be read.
    """
    return structure(path.read_bytes(), kind, str(path), with_)


def structure(text: str | bytes, kind: type[T], file: str, with_: Converter | None = None) -> T:
    """The same for text that is there already; `file` is what it is called in errors."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise TomlError(file, [Mistake("", None, f"is not UTF-8: {error}")]) from None
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        line = int(found[1]) if found else None
        raise TomlError(file, [Mistake("", line, str(error)[: found.start()] if found else str(error))]) from None
    try:
        return (with_ or converter()).structure(table, kind)
    except Exception as error:
        lines = _lines(text)
        mistakes = [Mistake(_key(at), _line(lines, at), said) for at, said in _walk(error, ())]
        raise TomlError(file, sorted(mistakes, key=lambda m: m.line or 0)) from None


def _typed(value: Any, kind: Any, what: str, boolean: bool = False) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) is not boolean:
        raise SpecError(f"{_shown(value)}: must be {what}")
    return value


def _text(value: Any, kind: type[str]) -> str:
    """Also of enumerations whose members are text."""
    text = _typed(value, str, "a text")
    try:
        return kind(text)
    except ValueError:
        names = ", ".join(kind) if issubclass(kind, Enum) else ""
        raise SpecError(f"{_shown(value)}: must be one of {names}") from None


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _walk(error: BaseException, at: Path_) -> Iterator[tuple[Path_, str]]:
    """Every mistake in what cattrs raised, with where it is."""
    if isinstance(error, ClassValidationError | IterableValidationError):
        for inner in error.exceptions:
            place = at
            for note in getattr(inner, "__notes__", ()):
                if isinstance(note, AttributeValidationNote):
                    place = (*at, note.name)
                elif isinstance(note, IterableValidationNote):
                    place = (*at, note.index)
            yield from _walk(inner, place)
    elif isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _walk(each, at)
    elif isinstance(error, ForbiddenExtraKeysError):
        names = ", ".join(field.name for field in attrs.fields(error.cl)) if attrs.has(error.cl) else ""
        for name in sorted(error.extra_fields):
            yield (*at, name), "no such key" + (f"; there are: {names}" if names else "")
    elif isinstance(error, Mistaken):
        yield (*at, *error.at), str(error)
    elif isinstance(error, KeyError) and at:
        yield (*at, str(error.args[0])), "is missing"
    elif isinstance(error, KeyError):
        yield (str(error.args[0]),), "is missing"
    elif isinstance(error, SpecError):
        # Specs name their field first; the key does already.
        text = str(error)
        last = next((str(part) for part in reversed(at) if isinstance(part, str)), "")
        yield at, text.removeprefix(f"{last}=") if last else text
    elif isinstance(error, TypeError | AttributeError | ValueError):
        text = str(error)
        if "object is not iterable" in text:
            text = "must be an array"
        elif (
            "not iterable" in text
            or "subscriptable" in text
            or "mapping" in text
            or "has no attribute 'keys'" in text
            or "indices" in text
        ):
            text = "must be a table"
        yield at, text
    else:
        raise error


class Mistaken(SpecError):
    """What hooks of a converter raise for a mistake further in: `at` is where, seen from what they were given."""

    def __init__(self, text: str, *at: str | int) -> None:
        super().__init__(text)
        self.at = at


def _key(at: Path_) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")


_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]#]+?)\s*\]\]?\s*(?:#.*)?$")
_ENTRY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


def _lines(text: str) -> dict[Path_, int]:
    """Where each table and key stands, as far as one line at a time tells: good enough to point a finger at."""
    places: dict[Path_, int] = {}
    counts: dict[Path_, int] = {}
    table: Path_ = ()

    def resolve(names: Sequence[str]) -> Path_:
        path: Path_ = ()
        for name in names:
            path = (*path, name)
            if path in counts:  # an array of tables: its last one is meant
                path = (*path, counts[path] - 1)
        return path

    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            names = [part.strip("\"'") for part in _PART.findall(header[2])]
            if header[1] == "[[":
                array = (*resolve(names[:-1]), names[-1])
                counts[array] = counts.get(array, 0) + 1
                places.setdefault(array, number)
            table = resolve(names)
            places.setdefault(table, number)
        elif entry := _ENTRY.match(line):
            names = [part.strip("\"'") for part in _PART.findall(entry[1])]
            places.setdefault((*table, *names), number)
    return places


def _line(lines: dict[Path_, int], at: Path_) -> int | None:
    """The line of a key, or of the nearest table around it."""
    while at and at not in lines:
        at = at[:-1]
    return lines.get(at)
