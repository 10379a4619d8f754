"""Constructors: their parameters, and all complaints that they have about some arguments.

A constructor raises at its first complaint, and the author of a file wants to see all of them. So this module finds the
argument that a complaint is about, leaves that argument out, and calls the constructor again, until it complains no
more.
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
    """Stands for a value that could not be made. None can't, as None is a value."""

    def __repr__(self) -> str:
        return "BAD"


BAD: Final = _Bad()

_BLAMED: Final = re.compile(r"(?:[\w-]+:? )?([a-z_]+)((?:\[[^\]]*\])?)=")  # also "region address="
_ITEM: Final = re.compile(r"([\w-]+): ")

_STAND_INS: Final = (1e9, 0.05)
"""Numbers that stand in for a required argument that is missing or wrong, so that the constructor can look at the rest.
A large one fits parameters such as a rate, a small one those that are a part of something."""

_MOST: Final = 100
"""Calls beyond the number of arguments. Each call takes an argument out or puts a stand-in, so the loop ends before;
the bound is for a constructor that behaves in another way."""


@attrs.frozen
class Parameter:
    kind: Any
    required: bool


@attrs.frozen
class Complaint:
    """What a constructor said about its arguments.

    Attributes:
        error: the constructor's error.
        at: the argument that it is about, and what inside that argument. Empty: not known.
        said: the rest of the message.
    """

    error: Exception
    at: tuple[str | int, ...]
    said: str


@cache
def parameters(kind: Callable[..., Any]) -> Mapping[str, Parameter]:
    """The parameters of a constructor, by name, in their order."""
    if isinstance(kind, type) and attrs.has(kind):
        hints = typing.get_type_hints(kind)
        fields = {one.alias: one for one in attrs.fields(kind) if one.init}
        ordered = [fields[name] for name in inspect.signature(kind).parameters]  # keyword-only ones come last there
        return {one.alias: Parameter(hints[one.name], one.default is attrs.NOTHING) for one in ordered}
    hints = typing.get_type_hints(kind.__init__ if isinstance(kind, type) else kind)  # type: ignore[misc]  # a class
    found = inspect.signature(kind).parameters
    return {name: Parameter(hints[name], one.default is one.empty) for name, one in found.items()}


def call(kind: Callable[..., Any], given: Mapping[str, Any], known: Mapping[str, Parameter]) -> Iterator[Complaint]:
    """All complaints of a constructor about these arguments. Arguments that are `BAD` were reported already.

    Parameters:
        kind: the constructor.
        given: the arguments, by name.
        known: the constructor's parameters.
    """
    arguments = {name: one for name, one in given.items() if one is not BAD}
    absent = [name for name, one in known.items() if one.required and name not in arguments]
    if not all(known[name].kind is float for name in absent):
        return
    arguments |= dict.fromkeys(absent, _STAND_INS[0])
    spare = {name: list(_STAND_INS[1:]) for name in absent}  # a complaint about a stand-in is none about the data
    for _ in range(len(arguments) + _MOST):
        try:
            kind(**arguments)
            return
        except (SpecError, ValueError, TypeError, OverflowError) as error:
            if isinstance(getattr(error, "mistakes", None), tuple):  # the error has all mistakes, each with its path
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
            # The complaint is about several arguments together, or about a part of one that can't be left out: the next
            # complaint might only follow from this one.
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
    """The argument that an error is about, found in its text, and the rest of the text. It may be one that was not
    given."""
    if "Exceeds the limit" in text:  # Python's bound on the digits of an int
        return (), "a number beyond 64 bits"
    found = _BLAMED.match(text)
    if found is not None:
        name, rest = found[1], text[found.end() :]
        if name in arguments:
            key = _key_of(arguments[name], found[2][1:-1])
            return ((name,) if key is None else (name, key)), rest
        if name in known:
            return (name,), rest
        # The constructor checked the value under another name: a floor as a rate, a key as a signal. So look for the
        # argument by the value.
        value = rest.partition(": ")[0]
        for argument, one in arguments.items():
            if (key := _key_of(one, value)) is not None:
                return (argument, key), rest
        plain = {argument: one for argument, one in arguments.items() if not isinstance(one, Mapping | tuple)}
        named = [argument for argument, one in plain.items() if repr(one) == value]
        if len(named) == 1:
            return (named[0],), rest
    item = _ITEM.match(text)
    if item is not None:  # an item of a tuple, which the message names by one of its fields
        for argument, one in arguments.items():
            for i, part in enumerate(one if isinstance(one, tuple) else ()):
                fields = attrs.fields(type(part)) if attrs.has(type(part)) else ()
                if item[1] in [str(getattr(part, field.name)) for field in fields]:
                    return (argument, i), text
    return (), text


def _key_of(mapping: object, written: str) -> str | None:
    """The key of a mapping whose repr is `written`. None: there is none, or `mapping` is no mapping."""
    if not isinstance(mapping, Mapping) or not written:
        return None
    return next((key for key in mapping if repr(key) == written), None)
