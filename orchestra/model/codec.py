"""The codec: turns specs, actions, limits, outcomes, statistics and exits into JSON-able data, and back.

The classes themselves define the form: a field of a class is a key, and its annotation is the type. What the
constructor refuses, the codec refuses, with the path to the value. The data of a class of a union (an action, an
outcome, a device, an exit) carry the name of the class as "kind". So a new field or class needs no change here.

    bytes       base64 text                    range            [start, stop]
    enum        its value                      tuple, list      a list
    inf, nan    "inf", "-inf", "nan"           mapping          an object with text keys
    live object refused: it has a meaning only in its own process

Decoding is strict: an unknown key, a missing one, a number for a truth value, or text that is not base64 is an error.
The error has all mistakes at once, each with its path. `to_document` adds the version, for data that are kept in files
or sent to others. Files that people write have some short forms as well (`Dialect`).
"""

from __future__ import annotations

import base64
import math
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Any, Final, TypeVar, cast

import attrs

from .decoding import DEPTH, Reading
from .dialect import JSON, KIND, TAGGED, Dialect, name_of
from .errors import SpecError
from .mistakes import At, CodecError, Wrong, path_of, shown

__all__ = [
    "DEPTH",
    "JSON",
    "KIND",
    "LIVE",
    "TAGGED",
    "VERSION",
    "At",
    "CodecError",
    "Dialect",
    "Reading",
    "Wrong",
    "decode",
    "encode",
    "encode_parts",
    "from_document",
    "to_document",
]

T = TypeVar("T")

VERSION: Final = 1
"""The version of documents. A newer document is refused. An older one is read as long as this module knows how."""

VERSION_KEY: Final = "orchestra"

LIVE: Final = "live"
"""Key of the metadata of a field that may hold a live object. Its value says what to give in the object's place."""


# ---- to data --------------------------------------------------------------------------------------------------------


def to_document(value: Any) -> dict[str, Any]:
    """An object of a class as a versioned document.

    Raises:
        SpecError: a value in the object has no form in JSON.
    """
    return {VERSION_KEY: VERSION, **{KIND: type(value).__name__}, **encode(value)}


def encode(value: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """A value as JSON-able data.

    Parameters:
        other: makes data of values that have no form in JSON. Evidence needs it, as a policy may put any value there.
            None: such a value is an error.

    Raises:
        SpecError: a value has no form in JSON, or values are nested deeper than `DEPTH`.
    """
    return _encode(value, (), other)


def encode_parts(value: Any, other: Callable[[Any], Any] | None = None) -> tuple[str, dict[str, Any]]:
    """An object of a class as its kind and its fields, for callers that write the fields into columns."""
    fields = encode(value, other)
    return fields.pop(KIND, type(value).__name__), fields


def _encode(value: Any, at: At, other: Callable[[Any], Any] | None) -> Any:
    kind = type(value)
    if value is None or kind is str or kind is bool or kind is int:
        return value
    if len(at) > DEPTH:
        raise SpecError(f"{path_of(at[:4])}...: nested deeper than {DEPTH}")
    if attrs.has(kind):
        return _encode_object(value, at, other)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(bytes(value)).decode()
    if isinstance(value, range):
        return [value.start, value.stop]
    if isinstance(value, Mapping):
        return {_key(key, at, other): _encode(one, (*at, str(key)), other) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)  # so that equal sets give equal data
    if isinstance(value, list | tuple):
        return [_encode(one, (*at, i), other) for i, one in enumerate(value)]
    if other is not None:
        return other(value)
    raise SpecError(f"{path_of(at)}: {kind.__name__} has no form in JSON")


def _key(key: object, at: At, other: Callable[[Any], Any] | None) -> str:
    if isinstance(key, str):
        return str(key)
    if other is None:
        raise SpecError(f"{path_of(at)}: the key {shown(key)} is no text")
    return str(key)


def _encode_object(value: Any, at: At, other: Callable[[Any], Any] | None) -> dict[str, Any]:
    kind = type(value)
    own = getattr(value, "to_data", None)
    if own is not None:
        return cast(dict[str, Any], _encode(own(), at, other))
    name = name_of(kind)
    data: dict[str, Any] = {} if name is None else {KIND: name}
    for field, key, remedy in _fields(cast(Any, kind)):
        one = getattr(value, field)
        try:
            if remedy:
                _refuse_live(kind, field, one)
            data[key] = _encode(one, (*at, key), other)
        except SpecError as error:
            if not remedy or isinstance(error, _Live):
                raise
            raise _Live(
                f"{path_of((*at, key))}: {shown(one)} is an object of this process only, and can't be kept or sent: "
                f"{remedy}"
            ) from None
    return data


def _refuse_live(kind: type, field: str, value: object) -> None:
    """Raise for a live object: an object of no class in the field's annotation that data can make."""
    data = _data_types(typing.get_type_hints(kind)[field])
    for one in value if isinstance(value, tuple) else (value,):
        if attrs.has(type(one)) and not isinstance(one, data):
            raise SpecError(f"{shown(one)} is of this process only")


def _data_types(kind: Any) -> tuple[type, ...]:
    """The classes in an annotation whose objects data can make."""
    inner = [one for part in typing.get_args(kind) for one in _data_types(part)]
    own = isinstance(kind, type) and attrs.has(kind) and not getattr(kind, "_is_protocol", False)
    return (*inner, kind) if own else tuple(inner)


class _Live(SpecError):
    """The error for a live object, which already says what to give in its place."""


@cache
def _fields(kind: type) -> tuple[tuple[str, str, str], ...]:
    """For each parameter of the constructor: the field, the key, and what to give in the place of a live object."""
    return tuple((one.name, one.alias, one.metadata.get(LIVE, "")) for one in attrs.fields(kind) if one.init)


# ---- from data ------------------------------------------------------------------------------------------------------


def from_document(kind: type[T], data: object) -> T:
    """Read a document that `to_document` made.

    Raises:
        SpecError: the data are no such document, or of a version that this orchestra does not know.
        CodecError: a value is wrong. `mistakes` has all of them, each with its path.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"document: must be an object with {VERSION_KEY!r} and {KIND!r}, not {shown(data)}")
    rest = dict(data)
    if VERSION_KEY not in rest:
        raise SpecError(f"{VERSION_KEY}: is missing: the version of the format; `to_document` writes {VERSION}")
    version = rest.pop(VERSION_KEY)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise SpecError(f"{VERSION_KEY}={shown(version)}: must be the version of the format, from 1 to {VERSION}")
    name = rest.get(KIND) if name_of(kind) is not None else rest.pop(KIND, None)
    if name != kind.__name__:
        raise SpecError(f"{KIND}={shown(name)}: must be {kind.__name__!r}")
    return decode(kind, rest)


def decode(kind: type[T] | Any, data: object, dialect: Dialect = JSON) -> T:
    """Make a value of a type from the data that `encode` made of it.

    Parameters:
        kind: a class, or a union such as `orchestra.Action`.
        data: JSON-able data.
        dialect: how the data are written.

    Raises:
        CodecError: the data are no such value. The message names the paths, and `mistakes` has all mistakes.
    """
    reading = Reading(dialect)
    value = reading.value(kind, data, ())
    if reading.wrong:
        raise CodecError(reading.wrong)
    return cast(T, value)
