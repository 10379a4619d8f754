"""Constructors: what each takes, and all that it has to say against some arguments.

A constructor raises at its first complaint. Whoever reads a file wants to hear all of them: the complaint is put to an
argument, that one is left out, and the constructor is called again, until it has said it all.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Final

import attrs

from .errors import SpecError

__all__ = ["BAD", "Complaint", "Parameter", "call", "parameters"]


class _Bad:
    """In the place of a value that could not be made."""

    def __repr__(self) -> str:
        return "BAD"


BAD: Final = _Bad()

_BLAMED: Final = re.compile(r"(?:[\w-]+:? )?([a-z_]+)((?:\[[^\]]*\])?)=")  # also "region address="
_ITEM: Final = re.compile(r"([\w-]+): ")

_STAND_INS: Final = (1e9, 0.05)
"""Numbers for what must be given and is wrong, so that the rest can be looked at: one of them will do."""

_MOST: Final = 100
"""Complaints beyond the number of arguments: each call takes one argument out or puts a stand-in, so it ends before."""


@attrs.frozen
class Parameter:
    kind: Any
    required: bool


@attrs.frozen
class Complaint:
    """`at`: which argument, and what inside it; `said`: the rest of the message."""

    error: Exception
    at: tuple[str | int, ...]
    said: str


@cache
def parameters(kind: Callable[..., Any]) -> Mapping[str, Parameter]:
    """What it takes, by name, in its order."""
    if isinstance(kind, type) and attrs.has(kind):
        hints = typing.get_type_hints(kind)
        fields = {one.alias: one for one in attrs.fields(kind) if one.init}
        ordered = [fields[name] for name in inspect.signature(kind).parameters]  # what is inherited comes last, by name
        return {one.alias: Parameter(hints[one.name], one.default is attrs.NOTHING) for one in ordered}
    hints = typing.get_type_hints(kind.__init__ if isinstance(kind, type) else kind)  # type: ignore[misc]  # a class
    found = inspect.signature(kind).parameters
    return {name: Parameter(hints[name], one.default is one.empty) for name, one in found.items()}


def call(kind: Callable[..., Any], given: Mapping[str, Any], known: Mapping[str, Parameter]) -> Iterator[Complaint]:
    """All that it says against these arguments. Those that are `BAD` were told of already."""
    arguments = {name: one for name, one in given.items() if one is not BAD}
    absent = [name for name, one in known.items() if one.required and name not in arguments]
    if not all(known[name].kind is float for name in absent):
        return
    arguments |= dict.fromkeys(absent, _STAND_INS[0])
    spare = {name: list(_STAND_INS[1:]) for name in absent}  # what is said about stand-ins is no news
    for _ in range(len(arguments) + _MOST):
        try:
            kind(**arguments)
            return
        except (SpecError, ValueError, TypeError, OverflowError) as error:
            if isinstance(getattr(error, "mistakes", None), tuple):  # it has said it all, each with its place
                yield Complaint(error, (), str(error))
                return
            at, text = _blame(str(error), arguments, known)
            name = str(at[0]) if at else ""
            if name and name not in arguments:  # it is about what is missing
                if name not in given:  # else that was wrong, was left out, and has been told
                    yield Complaint(error, at, text)
                return
            if name not in spare:
                yield Complaint(error, at, text)
            # Of several things together: what would be said next may be due to this.
            if not at or isinstance(arguments[name], tuple):
                return
            if len(at) > 1 and len(arguments[name]) > 1:
                arguments[name] = {key: one for key, one in arguments[name].items() if key != at[1]}
            elif not known[name].required:
                del arguments[name]
            elif isinstance(arguments[name], float):
                left = spare.setdefault(name, list(_STAND_INS))
                if not left:
                    return
                arguments[name] = left.pop(0)
            else:
                return


def _blame(
    text: str, arguments: Mapping[str, Any], known: Mapping[str, Parameter]
) -> tuple[tuple[str | int, ...], str]:
    """Which argument an error is about, by what it says, and what is left to be said. It may be one that is not there,
    but could be."""
    if "Exceeds the limit" in text:  # int's digits, in the middle of another message
        return (), "a number beyond 64 bits"
    found = _BLAMED.match(text)
    if found is not None:
        name, rest = found[1], text[found.end() :]
        if name in arguments:
            key = _key_of(arguments[name], found[2][1:-1])
            return ((name,) if key is None else (name, key)), rest
        if name in known:
            return (name,), rest
        # It was checked under another name: a floor as a rate, a key as a signal.
        value = rest.partition(": ")[0]
        for argument, one in arguments.items():
            if (key := _key_of(one, value)) is not None:
                return (argument, key), rest
        plain = {argument: one for argument, one in arguments.items() if not isinstance(one, Mapping | tuple)}
        named = [argument for argument, one in plain.items() if repr(one) == value]
        if len(named) == 1:
            return (named[0],), rest
    item = _ITEM.match(text)
    if item is not None:  # one of several, which is called by one of its fields
        for argument, one in arguments.items():
            for i, part in enumerate(one if isinstance(one, tuple) else ()):
                fields = attrs.fields(type(part)) if attrs.has(type(part)) else ()
                if item[1] in [str(getattr(part, field.name)) for field in fields]:
                    return (argument, i), text
    return (), text


def _key_of(mapping: object, written: str) -> str | None:
    """The key of a mapping that is written so."""
    if not isinstance(mapping, Mapping) or not written:
        return None
    return next((key for key in mapping if repr(key) == written), None)
