"""How data are written, in JSON or in files that people write, and the names that classes have in data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

import attrs

from . import actions, exits, spec

__all__ = ["JSON", "KIND", "TAGGED", "Dialect", "is_open_set", "name_of"]

KIND: Final = "kind"


def _tagged() -> dict[str, type]:
    """The classes of closed unions, whose data carry the name of the class."""
    exit_types = [kind for kind in vars(exits).values() if isinstance(kind, type) and issubclass(kind, exits.Exit)]
    unions = (actions.Action, actions.Outcome)
    found = [kind for union in unions for kind in get_args(union)]
    return {kind.__name__: kind for kind in [*found, *exit_types, spec.Memory]}


TAGGED: Final[Mapping[str, type]] = _tagged()


def name_of(kind: Any) -> str | None:
    """The name in data of a class of a union or of an open set: the class's own word (`KIND`), or its name.

    None: the class is of no union and no open set.
    """
    if not isinstance(kind, type):
        return None
    own = vars(kind).get(KIND)
    if isinstance(own, str):
        return own
    member = TAGGED.get(kind.__name__) is kind or any(is_open_set(base) for base in kind.__mro__[1:])
    return kind.__name__ if member else None


def is_open_set(kind: type) -> bool:
    """Whether a class is the base of an open set: its ``kinds()`` gives the classes that were imported, by name."""
    return "kinds" in vars(kind)


@attrs.frozen
class Dialect:
    """How data are written.

    Attributes:
        none: the word for None, if the format has no null. It counts only where the value may not be a text.
        words: what a mapping and a sequence are called in messages.
        bits: whole numbers that need more bits are refused. None: the format has no such bound.
        forms: short forms, by the annotation of the value. Each makes the long form, and raises SpecError for data that
            are neither.
        infinite: infinite numbers are written as words.
        remedies: for a key that a class does not have, what to use in its place.
    """

    none: str | None = None
    words: tuple[str, str] = ("an object", "a list")
    bits: int | None = None
    infinite: bool = True
    forms: Mapping[Any, Callable[[Any], Any]] = attrs.field(factory=dict)
    remedies: Mapping[tuple[Any, str], str] = attrs.field(factory=dict)


JSON: Final = Dialect()
