"""Makes values of data by the annotations of their classes. Each mistake is noted with its path; reading goes on."""

from __future__ import annotations

import base64
import binascii
import math
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Any, Final, Literal, Union, get_args, get_origin

import attrs

from .construction import BAD, Parameter, call, parameters
from .dialect import JSON, KIND, Dialect, is_open_set, name_of
from .errors import SpecError
from .mistakes import At, CodecError, Wrong, meant, shown, suggested

__all__ = ["BAD", "DEPTH", "Reading"]

DEPTH: Final = 32
"""How deep values may be nested. Specs need 6; data from outside must not exhaust the stack."""

MOST: Final = 100
"""Mistakes that are reported. Nobody mends more at once, and data from outside must not make work without end."""


class Reading:
    """One decoding. Its methods return a value, or `BAD` and have noted why in `wrong`.

    A class with a form of its own has ``from_data(data, reading, at)``, which uses these methods, and ``to_data()``.
    The base of an open set has ``kinds()``, its classes by name.
    """

    def __init__(self, dialect: Dialect = JSON) -> None:
        self.dialect = dialect
        self.wrong: list[Wrong] = []

    def no(self, at: At, said: str, value: Any = BAD) -> Any:
        """Note a mistake. `value` is the value that is there, which the message shows."""
        if value is BAD:
            self.wrong.append(Wrong(at, said))
        elif isinstance(value, Mapping | list | tuple):
            called = self.dialect.words[0 if isinstance(value, Mapping) else 1]
            self.wrong.append(Wrong(at, f"{called}: {said}"))
        else:
            self.wrong.append(Wrong(at, f"{shown(value)}: {said}", valued=True))
        return BAD

    def value(self, kind: Any, data: object, at: At) -> Any:
        """Read data as a value of type `kind`. Returns `BAD` if a mistake was noted."""
        if len(self.wrong) >= MOST:
            return BAD
        if len(at) > DEPTH:
            return self.no(at[:4], f"nested deeper than {DEPTH}")
        if self.dialect.forms:
            form = self.dialect.forms.get(kind)
            if form is not None:
                try:
                    data = form(data)
                except SpecError as error:
                    return self.no(at, str(error), data)
        return _reader(kind)(self, data, at)

    # ---- what a type is made of

    def _union(self, arguments: tuple[Any, ...], data: object, at: At) -> Any:
        some, tagged = _alternatives(arguments)
        said = isinstance(data, str) and data == self.dialect.none and str not in arguments
        if (data is None or said) and types.NoneType in arguments:
            return None
        if tagged and len(tagged) == len(some) and isinstance(data, str):
            data = {KIND: data}  # the short form of a class that needs no other key
        if isinstance(data, Mapping) and tagged and KIND in data:
            name = data[KIND]
            if not isinstance(name, str) or name not in tagged:
                return self.no((*at, KIND), f"must be one of {', '.join(sorted(tagged))}{meant(name, tagged)}", name)
            return self._object(tagged[name], data, at)
        if len(tagged) == len(some) > 1:
            known = ", ".join(sorted(tagged))
            return self.no(at, f"must be {self.dialect.words[0]} whose {KIND!r} is one of {known}", data)
        if not some:
            return self.no(at, "must be null: it lives in one process only", data)
        before, tried = len(self.wrong), []
        for one in some:
            value = self.value(one, data, at)
            noted = self.wrong[before:]
            if not noted:
                return value
            del self.wrong[before:]
            tried.append((max(len(wrong.at) for wrong in noted), _has_like(one, data), noted))
        # What was meant is the alternative whose shape fits: there the mistakes are further in. Or it is a word.
        self.wrong += max(tried, key=lambda one: one[:2])[2]
        return BAD

    def _literal(self, arguments: tuple[Any, ...], data: object, at: At) -> Any:
        for one in arguments:
            if type(one) is type(data) and one == data:
                return one
        return self.no(at, f"must be one of {', '.join(map(repr, arguments))}{meant(data, arguments)}", data)

    def _tuple(self, arguments: tuple[Any, ...], data: object, at: At) -> Any:
        if not isinstance(data, list | tuple):
            return self.no(at, f"must be {self.dialect.words[1]}", data)
        if arguments and arguments[-1] is Ellipsis:
            kinds = [arguments[0]] * len(data)
        elif len(arguments) == len(data):
            kinds = list(arguments)
        else:
            return self.no(at, f"must be {self.dialect.words[1]} of {len(arguments)}", data)
        values = tuple(self.value(kind, one, (*at, i)) for i, (kind, one) in enumerate(zip(kinds, data, strict=True)))
        return BAD if BAD in values else values

    def _several(self, origin: type, kind: Any, data: object, at: At) -> Any:
        """A list, or a tuple for any other iterable type."""
        items = self._tuple((kind, ...), data, at)
        return list(items) if origin is list and items is not BAD else items

    def _mapping(self, values: Any, data: object, at: At) -> Any:
        given = self.table(data, at)
        if given is BAD:
            return BAD
        named = isinstance(values, type) and attrs.has(values) and hasattr(attrs.fields(values), "name")
        made = {}
        for key, one in given.items():
            if named and isinstance(one, Mapping) and one.get("name", key) == key:
                one = {"name": key, **one}  # in a table by names, an entry need not repeat its name
            made[key] = self.value(values, one, (*at, key))
        return BAD if BAD in made.values() else made

    def _member(self, kind: Any, data: object, at: At) -> Any:
        """An object of an open set. If it needs no other key, the kind alone is enough."""
        kinds = kind.kinds()
        given = self.table({KIND: data} if isinstance(data, str) else data, at)
        if given is BAD:
            return BAD
        name = given.get(KIND)
        if not isinstance(name, str) or name not in kinds:
            known = f"{', '.join(sorted(kinds))}, or of a module that is imported before"
            return self.no((*at, KIND), f"must be one of {known}{meant(name, kinds)}", name)
        return self._object(kinds[name], given, at)

    def table(self, data: object, at: At) -> Any:
        """Check that data are a mapping with text keys."""
        if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
            return self.no(at, f"must be {self.dialect.words[0]}", data)
        return data

    def _object(self, kind: type, data: object, at: At) -> Any:
        given = self.table(data, at)
        if given is BAD:
            return BAD
        called = name_of(kind)
        if called is not None and KIND in given:
            given = dict(given)
            if (name := given.pop(KIND)) != called:
                return self.no((*at, KIND), f"must be {called!r}", name)
        return self.build(kind, given, at)

    def choice(self, data: object, at: At, kinds: Mapping[str, Any], what: str) -> tuple[Any, Mapping[str, Any]]:
        """Data that say by their "kind" which of several things they are; just the kind will do.

        Parameters:
            what: the things, for the message.

        Returns:
            Its kind, or BAD, and the other keys.
        """
        if isinstance(data, str):
            data = {KIND: data}
        given = self.table(data, at)
        if given is BAD:
            return BAD, {}
        rest = {key: one for key, one in given.items() if key != KIND}
        name = given.get(KIND)
        known = ", ".join(kinds)
        if name is None:
            return self.no((*at, KIND), f"is missing: which {what}; there are: {known}"), rest
        if not isinstance(name, str):
            return self.no((*at, KIND), "must be a text", name), rest
        if name not in kinds:
            return self.no((*at, KIND), f"no such {what}; there are: {known}{meant(name, kinds)}", name), rest
        return name, rest

    def build(self, kind: Callable[..., Any], given: Mapping[str, Any], at: At) -> Any:
        """Call `kind` with a mapping's values, each as its parameter has it; a class is called the same."""
        arguments = self.read(kind, given, at)
        if arguments is not BAD:
            try:
                return kind(**arguments)
            except (SpecError, TypeError, ValueError, OverflowError):
                self._note_refusals(kind, arguments, at, len(self.wrong))
        return BAD

    def arguments(self, kind: Callable[..., Any], given: Mapping[str, Any], at: At) -> Any:
        """The arguments that `build` would call it with, which it takes."""
        arguments = self.read(kind, given, at)
        if arguments is not BAD:
            before = len(self.wrong)
            self._note_refusals(kind, arguments, at, before)
            return BAD if len(self.wrong) > before else arguments
        return BAD

    def read(self, kind: Callable[..., Any], given: Mapping[str, Any], at: At) -> Any:
        """A mapping's values as its parameters have them. If one is wrong, what `kind` says to the others is noted."""
        known = parameters(kind)
        arguments: dict[str, Any] = {}
        before = len(self.wrong)
        for key, one in given.items():
            parameter = known.get(key)
            if len(self.wrong) >= MOST:
                return BAD
            if parameter is None:
                self.no((*at, key), self._no_such(kind, key, known))
            else:
                arguments[key] = self.value(parameter.kind, one, (*at, key))
        for name, parameter in known.items():
            if parameter.required and name not in given:
                self.no((*at, name), "is missing")
        if len(self.wrong) == before:
            return arguments
        self._note_refusals(kind, arguments, at, before)
        return BAD

    def _note_refusals(self, kind: Callable[..., Any], arguments: Mapping[str, Any], at: At, before: int) -> None:
        """Note what it says against these arguments. `before`: how much was noted before they were read."""
        noted = len(self.wrong)
        for complaint in call(kind, arguments, parameters(kind)):
            if isinstance(complaint.error, CodecError):
                self.wrong += [attrs.evolve(one, at=(*at, *one.at)) for one in complaint.error.mistakes]
            elif complaint.at or len(self.wrong) == noted == before:  # about the whole only if its parts are right
                valued = bool(complaint.at) and isinstance(complaint.at[-1], str)
                self.wrong.append(Wrong((*at, *complaint.at), suggested(complaint.said), valued))

    def _no_such(self, kind: Any, key: str, known: Mapping[str, Parameter]) -> str:
        remedy = self.dialect.remedies.get((kind, key))
        return f"no such key; {remedy}" if remedy else f"no such key; there are: {', '.join(known)}{meant(key, known)}"

    def _enum(self, kind: type[Enum], data: object, at: At) -> Any:
        values = [one.value for one in kind]
        if isinstance(data, bool) or not isinstance(data, str | int) or data not in values:
            return self.no(at, f"must be one of {', '.join(map(str, values))}{meant(data, values)}", data)
        return kind(data)

    # ---- plain values

    def _whole(self, data: object, at: At) -> Any:
        if isinstance(data, bool) or not isinstance(data, int):
            return self.no(at, "must be a whole number", data)
        return data if self._fits(data) else self.no(at, "a number beyond 64 bits")

    def _fits(self, number: int) -> bool:
        bits = self.dialect.bits
        return bits is None or -(1 << (bits - 1)) <= number < 1 << (bits - 1)

    def _float(self, data: object, at: At) -> Any:
        if self.dialect.infinite and isinstance(data, str) and data in _WORDS:
            return _WORDS[data]
        if isinstance(data, bool) or not isinstance(data, int | float):
            return self.no(at, "must be a number", data)
        if isinstance(data, int) and not self._fits(data):
            return self.no(at, "a number beyond 64 bits")
        try:
            return float(data)
        except OverflowError:
            return self.no(at, "is too large a number")

    def _bool(self, data: object, at: At) -> Any:
        return data if isinstance(data, bool) else self.no(at, "must be true or false", data)

    def _text(self, data: object, at: At) -> Any:
        return data if isinstance(data, str) else self.no(at, "must be a text", data)

    def _bytes(self, data: object, at: At) -> Any:
        if not isinstance(data, str):
            return self.no(at, "must be bytes in base64", data)
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            return self.no(at, "must be bytes in base64", data)

    def _range(self, data: object, at: At) -> Any:
        ends = self._tuple((int, int), data, at)
        return BAD if ends is BAD else range(*ends)

    def _none(self, data: object, at: At) -> Any:
        return None if data is None else self.no(at, "must be null", data)


_WORDS: Final = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_PLAIN: Final[Mapping[type, Callable[[Reading, object, At], Any]]] = {
    int: Reading._whole,
    float: Reading._float,
    bool: Reading._bool,
    str: Reading._text,
    bytes: Reading._bytes,
    range: Reading._range,
    types.NoneType: Reading._none,
}


@cache
def _reader(kind: Any) -> Callable[[Reading, object, At], Any]:
    """The function that reads values of a type. It is found once for each type, as `typing` is slow."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return lambda reading, data, at: data
    if origin in (Union, types.UnionType):
        return lambda reading, data, at: reading._union(arguments, data, at)
    if origin is Literal:
        return lambda reading, data, at: reading._literal(arguments, data, at)
    if origin is tuple:
        return lambda reading, data, at: reading._tuple(arguments, data, at)
    if origin is not None and issubclass(origin, Mapping):
        return lambda reading, data, at: reading._mapping(arguments[1], data, at)
    if origin is not None and issubclass(origin, Iterable):
        return lambda reading, data, at: reading._several(origin, arguments[0], data, at)
    if isinstance(kind, type):
        own: Callable[[object, Reading, At], Any] | None = getattr(kind, "from_data", None)
        if own is not None:
            return lambda reading, data, at: own(data, reading, at)
        if is_open_set(kind):
            return lambda reading, data, at: reading._member(kind, data, at)
        if attrs.has(kind):
            return lambda reading, data, at: reading._object(kind, data, at)
        if issubclass(kind, Enum):
            return lambda reading, data, at: reading._enum(kind, data, at)
        if kind in _PLAIN:
            return _PLAIN[kind]
    raise TypeError(f"the codec knows no values of type {kind!r}")


@cache
def _alternatives(arguments: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
    """The types of a union that data can make, and those among them whose data carry their name."""
    some = [one for one in arguments if one is not types.NoneType and not _is_live(one)]
    return some, {name: one for one in some if (name := name_of(one)) is not None}


def _has_like(kind: Any, data: object) -> bool:
    """A choice of values such as these data."""
    return get_origin(kind) is Literal and type(data) in map(type, get_args(kind))


def _is_live(kind: Any) -> bool:
    """A type of live objects, which no data make: a function, a protocol, or a class that is none of the words."""
    if get_origin(kind) is not None or not isinstance(kind, type):
        return get_origin(kind) is Callable
    made = hasattr(kind, "from_data") or is_open_set(kind) or attrs.has(kind) or issubclass(kind, Enum | Iterable)
    return bool(getattr(kind, "_is_protocol", False)) or not (made or kind in _PLAIN)
