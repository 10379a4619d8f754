"""Specs, actions, limits, outcomes, statistics and exits as JSON-able data, and back: the one codec.

By the classes themselves: a field of a class is a key, with the type that its annotation says; whatever a constructor
refuses is refused here, with the path to it. A class of a closed union (an action, an outcome, a device, an exit)
carries its name as "kind". So adding a field or a class to the words adds it here.

    bytes       base64 text                    range            [start, stop]
    enum        its value                      tuple, list      a list
    inf, nan    "inf", "-inf", "nan"           mapping          an object with text keys

Decoding is strict: an unknown key, a missing one, a number for a truth value, or text that is not base64 is an error.
`to_document` adds the version, for what is kept in files or sent to others.
"""

from __future__ import annotations

import base64
import binascii
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from functools import cache
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin

import attrs

from . import actions, exits, spec
from .errors import SpecError

__all__ = ["KIND", "TAGGED", "VERSION", "decode", "encode", "from_document", "to_document"]

T = TypeVar("T")

VERSION: Final = 1
"""Of documents. A newer one is refused; an older one is read as long as this table says how."""

VERSION_KEY: Final = "orchestra"
KIND: Final = "kind"
DEPTH: Final = 32
"""How deep values may be nested: specs need 4, and what comes from outside must not exhaust the stack."""

_WORDS: Final = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _tagged() -> dict[str, type]:
    """The classes that carry their name."""
    exit_types = [kind for kind in vars(exits).values() if isinstance(kind, type) and issubclass(kind, exits.Exit)]
    unions = (actions.Action, actions.Outcome, spec.DeviceSpec)
    found = [kind for union in unions for kind in get_args(union)]
    return {kind.__name__: kind for kind in [*found, *exit_types, spec.FlatImage]}


TAGGED: Final[Mapping[str, type]] = _tagged()


# ---- to data --------------------------------------------------------------------------------------------------------


def to_document(value: Any) -> dict[str, Any]:
    """An object of a class as a versioned document.

    Raises:
        SpecError: it has something in it that JSON has no form for.
    """
    return {VERSION_KEY: VERSION, **{KIND: type(value).__name__}, **_encode(value, "", 0)}


def encode(value: Any) -> Any:
    """A value as JSON-able data.

    Raises:
        SpecError: it has something in it that JSON has no form for.
    """
    return _encode(value, "", 0)


def _encode(value: Any, path: str, depth: int) -> Any:
    if value is None or (isinstance(value, bool | str) and not isinstance(value, Enum)):
        return value
    if depth > DEPTH:
        raise SpecError(f"{path or 'value'}: nested deeper than {DEPTH}")
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(bytes(value)).decode()
    if isinstance(value, range):
        return [value.start, value.stop]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SpecError(f"{path or 'value'}: the key {key!r} is no text")
        return {str(key): _encode(one, _at(path, key), depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_encode(one, f"{path}[{i}]", depth + 1) for i, one in enumerate(value)]
    if attrs.has(type(value)):
        data = {KIND: type(value).__name__} if type(value).__name__ in TAGGED else {}
        for field in attrs.fields(type(value)):
            if field.init:
                data[field.alias] = _encode(getattr(value, field.name), _at(path, field.alias), depth + 1)
        return data
    raise SpecError(f"{path or 'value'}: {type(value).__name__} has no form in JSON")


# ---- from data ------------------------------------------------------------------------------------------------------


def from_document(kind: type[T], data: object) -> T:
    """What `to_document` wrote.

    Raises:
        SpecError: not such a document, or of a version that this orchestra does not know; the message names the path.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"document: must be an object with {VERSION_KEY!r} and {KIND!r}, not {_short(data)}")
    rest = dict(data)
    version = rest.pop(VERSION_KEY, None)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise SpecError(f"{VERSION_KEY}={_short(version)}: must be the version of the format, from 1 to {VERSION}")
    name = rest.get(KIND) if kind.__name__ in TAGGED else rest.pop(KIND, None)
    if name != kind.__name__:
        raise SpecError(f"{KIND}={_short(name)}: must be {kind.__name__!r}")
    return decode(kind, rest)


def decode(kind: type[T] | Any, data: object) -> T:
    """A value of that type, from what `encode` made of it.

    Parameters:
        kind: a class, or a union such as `orchestra.Action`.

    Raises:
        SpecError: it is none; the message names the path to what is wrong.
    """
    return cast(T, _decode(kind, data, "", 0))


def _decode(kind: Any, data: object, path: str, depth: int) -> Any:
    if depth > DEPTH:
        raise SpecError(f"{path}: nested deeper than {DEPTH}")
    if kind is Any or kind is object:
        return data
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, data, path, depth)
    if origin is Literal:
        for one in arguments:
            if type(one) is type(data) and one == data:
                return one
        raise _wrong(path, data, "must be one of " + ", ".join(map(repr, arguments)))
    if origin is tuple:
        return _decode_tuple(arguments, data, path, depth)
    if origin is not None and issubclass(origin, Mapping):
        return _decode_mapping(arguments, data, path, depth)
    if origin is not None and issubclass(origin, Collection):
        return [_decode(arguments[0], one, f"{path}[{i}]", depth + 1) for i, one in enumerate(_list(data, path))]
    if isinstance(kind, type):
        if attrs.has(kind):
            return _decode_class(kind, data, path, depth)
        if issubclass(kind, Enum):
            return _construct(kind, path, data)
        if kind in _PLAIN:
            return _PLAIN[kind](data, path)
    raise TypeError(f"the codec knows no values of type {kind!r}")


def _decode_union(arguments: tuple[Any, ...], data: object, path: str, depth: int) -> Any:
    if data is None and types.NoneType in arguments:
        return None
    some = [one for one in arguments if one is not types.NoneType]
    tagged = {one.__name__: one for one in some if isinstance(one, type) and TAGGED.get(one.__name__) is one}
    if isinstance(data, Mapping) and tagged and KIND in data:
        name = data[KIND]
        if not isinstance(name, str) or name not in tagged:
            raise _wrong(_at(path, KIND), name, "must be one of " + ", ".join(sorted(tagged)))
        return _decode_class(tagged[name], data, path, depth)
    if len(tagged) == len(some) > 1:
        raise _wrong(path, data, f"must be an object whose {KIND!r} is one of " + ", ".join(sorted(tagged)))
    errors = []
    for one in some:
        try:
            return _decode(one, data, path, depth)
        except SpecError as error:
            errors.append(error)
    raise errors[0] if errors else _wrong(path, data, "must be null")


def _decode_tuple(arguments: tuple[Any, ...], data: object, path: str, depth: int) -> tuple[Any, ...]:
    values = _list(data, path)
    if arguments and arguments[-1] is Ellipsis:
        kinds = [arguments[0]] * len(values)
    elif len(arguments) == len(values):
        kinds = list(arguments)
    else:
        raise _wrong(path, data, f"must be a list of {len(arguments)}")
    pairs = zip(kinds, values, strict=True)
    return tuple(_decode(kind, one, f"{path}[{i}]", depth + 1) for i, (kind, one) in enumerate(pairs))


def _decode_mapping(arguments: tuple[Any, ...], data: object, path: str, depth: int) -> dict[str, Any]:
    values = arguments[1] if len(arguments) == 2 else Any
    return {key: _decode(values, one, _at(path, key), depth + 1) for key, one in _object(data, path).items()}


def _decode_class(kind: type, data: object, path: str, depth: int) -> Any:
    given = dict(_object(data, path))
    if kind.__name__ in TAGGED and (name := given.pop(KIND, kind.__name__)) != kind.__name__:
        raise _wrong(_at(path, KIND), name, f"must be {kind.__name__!r}")
    fields = {field.alias: field for field in attrs.fields(kind) if field.init}
    for key in given:
        if key not in fields:
            raise SpecError(f"{_at(path, key)}: {kind.__name__} has no such key; it has {', '.join(sorted(fields))}")
    hints = _hints(kind)
    values = {}
    for alias, field in fields.items():
        if alias in given:
            values[alias] = _decode(hints[field.name], given[alias], _at(path, alias), depth + 1)
        elif field.default is attrs.NOTHING:
            raise SpecError(f"{_at(path, alias)}: {kind.__name__} needs this key")
    return _construct(kind, path, **values)


def _construct(kind: Callable[..., Any], path: str, *arguments: Any, **values: Any) -> Any:
    """The constructor has its own checks, and says which field they are about."""
    try:
        return kind(*arguments, **values)
    except SpecError as error:
        raise SpecError(f"{path}: {error}" if path else str(error)) from None
    except (TypeError, ValueError) as error:
        raise SpecError(f"{path or 'value'}: {error}") from None


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _integer(data: object, path: str) -> int:
    if isinstance(data, bool) or not isinstance(data, int):
        raise _wrong(path, data, "must be a whole number")
    return data


def _float(data: object, path: str) -> float:
    if isinstance(data, str) and data in _WORDS:
        return _WORDS[data]
    if isinstance(data, bool) or not isinstance(data, int | float):
        raise _wrong(path, data, "must be a number")
    try:
        return float(data)
    except OverflowError:
        raise _wrong(path, data, "is too large a number") from None


def _bool(data: object, path: str) -> bool:
    if not isinstance(data, bool):
        raise _wrong(path, data, "must be true or false")
    return data


def _text(data: object, path: str) -> str:
    if not isinstance(data, str):
        raise _wrong(path, data, "must be a text")
    return data


def _bytes(data: object, path: str) -> bytes:
    try:
        return base64.b64decode(_text(data, path), validate=True)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise _wrong(path, data, "must be bytes in base64") from None


def _range(data: object, path: str) -> range:
    start, stop = _decode_tuple((int, int), data, path, 0)
    return range(start, stop)


def _none(data: object, path: str) -> None:
    if data is not None:
        raise _wrong(path, data, "must be null")


_PLAIN: Final[Mapping[type, Callable[[object, str], Any]]] = {
    int: _integer,
    float: _float,
    bool: _bool,
    str: _text,
    bytes: _bytes,
    range: _range,
    types.NoneType: _none,
}


def _list(data: object, path: str) -> list[Any]:
    if not isinstance(data, list | tuple):
        raise _wrong(path, data, "must be a list")
    return list(data)


def _object(data: object, path: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise _wrong(path, data, "must be an object")
    return data


def _at(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _short(value: object) -> str:
    return f"{value!r:.60}"


def _wrong(path: str, value: object, what: str) -> SpecError:
    return SpecError(f"{path or 'value'}={_short(value)}: {what}")
