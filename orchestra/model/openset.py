"""Open sets of specs: whoever derives a class from the base has added to the set, and no list names the members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from .errors import SpecError

__all__ = ["members"]

T = TypeVar("T")


def members(base: type[T], what: str) -> Mapping[str, type[T]]:
    """All classes below `base` that this process has imported, by the name that data call them.

    Parameters:
        what: what one of them is, for the message.

    Raises:
        SpecError: two classes have the same name.
    """
    found: dict[str, type[T]] = {}
    for kind in _below(base):
        other = found.setdefault(kind.__name__, kind)
        if other is not kind:
            raise SpecError(
                f"{what} {kind.__name__!r}: {other.__module__} and {kind.__module__} have one of that name: rename one "
                "of the classes"
            )
    return found


def _below(base: type[T]) -> Iterator[type[T]]:
    for kind in base.__subclasses__():
        # attrs makes a class with slots twice. The first one lives without this attribute until the collector runs.
        if "__attrs_attrs__" in vars(kind):
            yield kind
            yield from _below(kind)
