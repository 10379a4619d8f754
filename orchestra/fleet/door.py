"""One function for a spec and its fields: ``open_fleet(spec)``, ``open_fleet(limit=...)``, ``open_fleet(spec,
limit=...)``.

The spec's class alone has the list of fields. A type checker and `inspect.signature` see them on the function as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

import attrs

from ..model.errors import SpecError
from ..model.mistakes import meant, shown
from .spec import FleetSpec

__all__ = ["Door", "door"]

P = ParamSpec("P")
T = TypeVar("T", covariant=True)


class Door(Protocol, Generic[P, T]):
    """A function that opens a fleet, by a spec, by fields, or by both (fields replace what the spec says)."""

    @overload
    def __call__(self, spec: FleetSpec, /, *args: P.args, **kwargs: P.kwargs) -> AbstractAsyncContextManager[T]: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> AbstractAsyncContextManager[T]: ...


def door(
    fields: Callable[P, FleetSpec],
) -> Callable[[Callable[[Any], AbstractAsyncContextManager[T]]], Door[P, T]]:
    """Decorate a function that opens a fleet by its spec, so that it takes the spec's fields as well.

    Parameters:
        fields: the spec's class, or one that has more fields.
    """

    def decorate(opened: Callable[[Any], AbstractAsyncContextManager[T]]) -> Door[P, T]:
        # `enter` has no defaults of its own: all defaults are those of the class.
        def enter(*given: Any, **said: Any) -> AbstractAsyncContextManager[T]:
            for name in said:
                if name not in names:
                    raise TypeError(f"{opened.__name__}() takes no {name!r}; see FleetSpec{meant(name, names)}")
            if not given:
                return opened(cast(Any, fields)(**said))
            spec, *more = given
            if more:
                raise TypeError(f"{opened.__name__}() takes a spec, and its fields by name: {len(given)} were given")
            if not isinstance(spec, FleetSpec):
                raise SpecError(f"spec={shown(spec)}: must be a FleetSpec; or give its fields by name: limit=...")
            if said:
                there = {one.alias: getattr(spec, one.name) for one in attrs.fields(type(spec)) if one.init}
                return opened(cast(Any, fields)(**{**there, **said}))
            return opened(spec)

        known = list(inspect.signature(fields).parameters.values())
        names = [one.name for one in known]
        taken = inspect.signature(opened).parameters
        (first,) = taken.values()
        enter.__name__, enter.__qualname__ = opened.__name__, opened.__qualname__
        enter.__module__, enter.__doc__ = opened.__module__, opened.__doc__
        spec = inspect.Parameter(
            first.name, inspect.Parameter.POSITIONAL_ONLY, default=None, annotation="FleetSpec | None"
        )
        enter.__signature__ = inspect.Signature([spec, *known])  # type: ignore[attr-defined]  # functions may have one
        return cast(Door[P, T], enter)

    return decorate
