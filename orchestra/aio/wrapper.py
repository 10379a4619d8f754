"""The common part of the asyncio side's classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .bridge import Bridge

__all__ = ["Wrapper", "mirrors", "wrapped"]

T = TypeVar("T")
C = TypeVar("C", bound="type[Wrapper[Any]]")
W = TypeVar("W", bound="Wrapper[Any]")


def mirrors(original: type) -> Callable[[C], C]:
    """The class has the original's methods, and its documentation; the class's own sentence comes after that."""

    def document(cls: C) -> C:
        cls.__doc__ = f"{inspect.getdoc(original)}\n\n{inspect.cleandoc(cls.__doc__ or '')}".rstrip()
        for name, member in vars(cls).items():
            its = getattr(original, name, None)
            if not name.startswith("_") and its is not None:
                member.__doc__ = its.__doc__
        return cls

    return document


class Wrapper(Generic[T]):
    """An object of the trio side, and the bridge to it."""

    __slots__ = ("__weakref__", "_bridge", "_inner")

    def __init__(self, bridge: Bridge, inner: T) -> None:
        self._bridge = bridge
        self._inner = inner

    def __repr__(self) -> str:
        return self._bridge.sync(repr, self._inner)


def wrapped(cls: type[W], bridge: Bridge, inner: object) -> W:
    """The wrapper of an object. The same wrapper is returned for as long as it is referenced."""
    wrapper: W | None = bridge.wrappers.get(inner)
    if wrapper is None:
        wrapper = bridge.wrappers[inner] = cls(bridge, inner)
    return wrapper
