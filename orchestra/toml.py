"""Reads TOML files into values, strictly. The error has all mistakes at once, each with its line and key."""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import attrs

from .model.codec import CodecError, Dialect, decode
from .model.errors import FileError, SpecError

__all__ = ["TOML", "Mistake", "TomlError", "read", "structure"]

T = TypeVar("T")
Path_: TypeAlias = tuple[str | int, ...]


@attrs.frozen
class Mistake:
    """One mistake in a file.

    Attributes:
        key: the path, as in ``vms[2].count``.
        line: the line, from 1 on. None: the mistake has no line.
        text: what is wrong.
    """

    key: str
    line: int | None
    text: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self._said}"

    def at(self, file: str) -> str:
        """The mistake in the form of a compiler, so that editors find the place: FILE:LINE: KEY: what."""
        return f"{file}:{self.line}: {self._said}" if self.line is not None else f"{file}: {self._said}"

    @property
    def _said(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class TomlError(FileError, SpecError):
    """The content of your file is not valid. `mistakes` has all mistakes, `lines` the same in a compiler's form."""

    def __init__(self, file: str, mistakes: Sequence[Mistake]) -> None:
        self.file = file
        self.mistakes = tuple(mistakes)
        self.lines = tuple(mistake.at(file) for mistake in mistakes)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__(f"{file}: {count}\n" + "\n".join(f"  {mistake}" for mistake in mistakes))


TOML: Final = Dialect(words=("a table", "an array"), bits=64, infinite=False)


def read(path: Path, kind: type[T], dialect: Dialect = TOML) -> T:
    """Read a file as a value of type `kind`.

    Raises:
        TomlError: the content is not valid.
        OSError: the file can't be read.
    """
    return structure(path.read_bytes(), kind, str(path), dialect)


def structure(text: str | bytes, kind: type[T], file: str, dialect: Dialect = TOML) -> T:
    """Read text as a value of type `kind`. `file` is the name that errors give the text.

    Raises:
        TomlError: the content is not valid.
    """
    text, table = _parsed(text, file)
    try:
        return decode(kind, table, dialect)
    except CodecError as error:
        lines = _lines(text)
        mistakes = [Mistake(_key(one.at), _line(lines, one.at), one.said) for one in error.mistakes]
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
    except ValueError:  # int() raises it for a number of thousands of digits
        line, said = _line_of(re.search(r"[\d_]{4000,}", str(text)), str(text)), "a number beyond 64 bits"
    except RecursionError:
        line, said = _line_of(re.search(r"(?:[\[{][^\[{\]}]*){40}", str(text)), str(text)), "nested too deeply"
    raise TomlError(file, [Mistake("", line, said)]) from None


def _line_of(found: re.Match[str] | None, text: str) -> int:
    return text.count("\n", 0, found.start() if found else 0) + 1


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
    """The line of each table, key and item. `tomllib` gives no lines, so the text is read once more for them."""
    places: dict[Path_, int] = {}
    try:
        _Places(text, places).document()
    except RecursionError:
        pass  # tomllib needs less stack: the lines found so far will do
    return places


class _Places:
    """Reads text that `tomllib` has accepted, so it checks nothing, and notes lines instead of values."""

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
        """The path of a table header. A name of an array of tables means the last table of the array."""
        path: Path_ = ()
        for name in names:
            path = (*path, name)
            if path in self._counts:
                path = (*path, self._counts[path] - 1)
        return path

    def _note(self, path: Path_, at: int) -> None:
        line = bisect_right(self._ends, at - 1) + 1
        for end in range(1, len(path) + 1):  # a table without a header has the line of its first key
            self._places.setdefault(path[:end], line)

    def _blank(self) -> bool:
        """Skip blanks and comments. Returns whether anything follows."""
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
            # tomllib reads a quoted name, as names may have escapes.
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
        """Read an array or an inline table, which end with `end`."""
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
    """The line of a key, or of the nearest table around it. None: there is none."""
    while at and at not in lines:
        at = at[:-1]
    return lines.get(at)
