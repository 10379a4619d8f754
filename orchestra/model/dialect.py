"""How data are written: in JSON, or in files that people write; and what classes are called there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

import attrs

from . import actions, exits, spec

__all__ = ["JSON", "KIND", "TAGGED", "Dialect", "is_open_set", "name_of"]

KIND: Final = "kind"


def _tagged() -> dict[str, type]:
    """The classes that carry their name."""
    exit_types = [kind for kind in vars(exits).values() if isinstance(kind, type) and issubclass(kind, exits.Exit)]
    unions = (actions.Action, actions.Outcome)
    found = [kind for union in unions for kind in get_args(union)]
    return {kind.__name__: kind for kind in [*found, *exit_types, spec.Memory]}


TAGGED: Final[Mapping[str, type]] = _tagged()


def name_of(kind: Any) -> str | None:
    """What a class of a union or of an open set is called in data: by its own word for it, or by its name; None: it is
    of none."""
    if not isinstance(kind, type):
        return None
    own = vars(kind).get(KIND)
    if isinstance(own, str):
        return own
    member = TAGGED.get(kind.__name__) is kind or any(is_open_set(base) for base in kind.__mro__[1:])
    return kind.__name__ if member else None


def is_open_set(kind: type) -> bool:
    """A base whose ``kinds()`` says which classes there are of it, by name: those that were imported."""
    return "kinds" in vars(kind)


@attrs.frozen
class Dialect:
    """How data are written.

    Attributes:
        none: a word that says None, where the format has no null and the value is no text.
        words: what a mapping and a sequence are called.
        bits: whole numbers beyond so many are refused; None: the format has no such bound.
        forms: short forms, by the annotation of the value: each makes the long form, and raises SpecError for what is
            neither.
        infinite: numbers without end are written as words.
        remedies: for a key that a class does not have, what to do in its place.
    """

    none: str | None = None
    words: tuple[str, str] = ("an object", "a list")
    bits: int | None = None
    infinite: bool = True
    forms: Mapping[Any, Callable[[Any], Any]] = attrs.field(factory=dict)
    remedies: Mapping[tuple[Any, str], str] = attrs.field(factory=dict)


JSON: Final = Dialect()
