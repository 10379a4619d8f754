"""TOML files into attrs classes, strictly: what is wrong is told all at once, each mistake with its line and key.

The only module that imports cattrs.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import attrs

from ..model.errors import FileError, OrchestraError, SpecError
from ..model.extras import install

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
    raise OrchestraError(f"TOML files need cattrs ({error}): {install('rules')}") from None

__all__ = ["Inside", "Mistake", "Mistaken", "TomlError", "converter", "meant", "read", "shown", "structure"]

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
        return f"{where}{self._said}"

    def at(self, file: str) -> str:
        """As compilers write it, so that editors find the place: FILE:LINE: KEY: what."""
        return f"{file}:{self.line}: {self._said}" if self.line is not None else f"{file}: {self._said}"

    @property
    def _said(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class TomlError(FileError, SpecError):
    """Your file says what can't be: `mistakes` has all of it, and `lines` as compilers write it."""

    def __init__(self, file: str, mistakes: Sequence[Mistake]) -> None:
        self.file = file
        self.mistakes = tuple(mistakes)
        self.lines = tuple(mistake.at(file) for mistake in mistakes)
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
    text, table = _parsed(text, file)
    try:
        return (with_ or converter()).structure(table, kind)
    except Exception as error:
        lines = _lines(text)
        mistakes = [Mistake(_key(at), _line(lines, at), said) for at, said in _walk(error, ())]
        raise TomlError(file, sorted(mistakes, key=lambda m: m.line or 0)) from None


def _parsed(text: str | bytes, file: str) -> tuple[str, dict[str, Any]]:
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        line, said = error.object.count(b"\n", 0, error.start) + 1, f"is not UTF-8: {error.reason}"
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        line = int(found[1]) if found and found[1] else len(str(text).rstrip().split("\n"))
        said = str(error)[: found.start()] if found else str(error)
    except ValueError:  # of int(), for a number of thousands of digits
        line, said = _line_of(re.search(r"[\d_]{4000,}", str(text)), str(text)), "a number beyond 64 bits"
    except RecursionError:
        line, said = _line_of(re.search(r"(?:[\[{][^\[{\]}]*){40}", str(text)), str(text)), "nested too deeply"
    raise TomlError(file, [Mistake("", line, said)]) from None


def _line_of(found: re.Match[str] | None, text: str) -> int:
    return text.count("\n", 0, found.start() if found else 0) + 1


def _typed(value: Any, kind: Any, what: str, boolean: bool = False) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) is not boolean:
        raise SpecError(f"{shown(value)}: must be {what}")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise SpecError("a number beyond 64 bits")
    return value


def _text(value: Any, kind: type[str]) -> str:
    """Also of enumerations whose members are text."""
    text = _typed(value, str, "a text")
    try:
        return kind(text)
    except ValueError:
        names = list(kind) if issubclass(kind, Enum) else []
        raise SpecError(f"{shown(value)}: must be one of {', '.join(names)}{meant(text, names)}") from None


def shown(value: Any) -> str:
    """A value as an error names it."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # an int of thousands of digits has none
        return "a number beyond 64 bits"
    return text if len(text) < 60 else text[:57] + "..."


def meant(name: str, known: Iterable[Any]) -> str:
    """What was probably meant, as the end of a sentence; nothing if nothing is near."""
    near = difflib.get_close_matches(name[:80], [str(one) for one in known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


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
        names = [field.name for field in attrs.fields(error.cl)] if attrs.has(error.cl) else []
        for name in sorted(error.extra_fields):
            yield (*at, name), "no such key" + (f"; there are: {', '.join(names)}{meant(name, names)}" if names else "")
    elif isinstance(error, Inside):
        yield from _walk(error.error, (*at, *error.at))
    elif isinstance(error, Mistaken):
        yield (*at, *error.at), str(error)
    elif isinstance(error, KeyError):
        key = str(error.args[0])
        yield (at if at[-1:] == (key,) else (*at, key)), "is missing"  # cattrs notes the key of some as well
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


class Inside(Exception):
    """Likewise for any error that a converter raised further in."""

    def __init__(self, error: Exception, *at: str | int) -> None:
        super().__init__(str(error))
        self.error = error
        self.at = at


class Mistaken(SpecError):
    """What hooks of a converter raise for a mistake further in: `at` is where, seen from what they were given."""

    def __init__(self, text: str, *at: str | int) -> None:
        super().__init__(text)
        self.at = at


def _key(at: Path_) -> str:
    parts = []
    for part in at:
        named = str(part) if _BARE.fullmatch(str(part)) else json.dumps(part)
        parts.append(f"[{part}]" if isinstance(part, int) else f".{named}")
    return "".join(parts).removeprefix(".")


_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_TEXT = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}(?!")'''
    r"""|'{3}[\s\S]*?'{3,5}(?!')|"(?:\\.|[^"\\])*"|'[^']*'""",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def _lines(text: str) -> dict[Path_, int]:
    """Where each table, key and item stands."""
    places: dict[Path_, int] = {}
    try:
        _Places(text, places).document()
    except RecursionError:
        pass  # it was parsed with less; where it is, is told as far as we came
    return places


class _Places:
    """Reads text that is TOML for sure (it has been parsed), and notes lines instead of values."""

    def __init__(self, text: str, places: dict[Path_, int]) -> None:
        self._text = text
        self._at = 0
        self._ends = [found.start() for found in re.finditer("\n", text)]
        self._places = places
        self._counts: dict[Path_, int] = {}  # tables in each array of them

    def document(self) -> None:
        table: Path_ = ()
        while self._blank():
            if self._text.startswith("[[", self._at):
                begun = self._at
                self._at += 2
                *around, last = self._names()
                array = (*self._resolved(around), last)
                count = self._counts[array] = self._counts.get(array, 0) + 1
                table = (*array, count - 1)
                self._note(array, begun)
                self._note(table, begun)
                self._at += 2
            elif self._text[self._at] == "[":
                begun = self._at
                self._at += 1
                table = self._resolved(self._names())
                self._note(table, begun)
                self._at += 1
            else:
                self._entry(table)

    def _resolved(self, names: Sequence[str]) -> Path_:
        """Of an array of tables its last one is meant."""
        path: Path_ = ()
        for name in names:
            path = (*path, name)
            if path in self._counts:
                path = (*path, self._counts[path] - 1)
        return path

    def _note(self, path: Path_, at: int) -> None:
        line = bisect_right(self._ends, at - 1) + 1
        for end in range(1, len(path) + 1):  # tables that have no line of their own stand where their first key does
            self._places.setdefault(path[:end], line)

    def _blank(self) -> bool:
        """Go to what comes next, if anything does."""
        found = _BLANK.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at < len(self._text)

    def _names(self) -> list[str]:
        names = []
        while True:
            self._blank()
            found = _TEXT.match(self._text, self._at) or _BARE.match(self._text, self._at)
            assert found is not None
            name = found[0]
            # As tomllib reads it: escapes and all.
            names.append(next(iter(tomllib.loads(f"{name}=0"))) if name[0] in "\"'" else name)
            self._at = found.end()
            self._blank()
            if self._text[self._at] != ".":
                return names
            self._at += 1

    def _entry(self, table: Path_) -> None:
        begun = self._at
        path = (*table, *self._names())
        self._note(path, begun)
        self._at += 1  # =
        self._value(path)

    def _value(self, path: Path_) -> None:
        self._blank()
        match self._text[self._at]:
            case "[":
                self._several(path, "]")
            case "{":
                self._several(path, "}")
            case _:
                found = _TEXT.match(self._text, self._at) or _SCALAR.match(self._text, self._at)
                assert found is not None
                self._at = found.end()

    def _several(self, path: Path_, end: str) -> None:
        """An array or an inline table."""
        self._at += 1
        count = 0
        while self._blank() and self._text[self._at] != end:
            if end == "}":
                self._entry(path)
            else:
                self._note((*path, count), self._at)
                self._value((*path, count))
            count += 1
            self._blank()
            if self._text[self._at] == ",":
                self._at += 1
        self._at += 1


def _line(lines: dict[Path_, int], at: Path_) -> int | None:
    """The line of a key, or of the nearest table around it."""
    while at and at not in lines:
        at = at[:-1]
    return lines.get(at)
