"""trio's `async with` as one of asyncio's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

import trio

from ..model.errors import StateError
from .bridge import Bridge, Call, Closed, Flag, chained

__all__ = ["Block"]

T = TypeVar("T")
U = TypeVar("U")


class Block(AbstractAsyncContextManager[U], Generic[T, U]):
    """A trio task that stays inside an `async with` for as long as the asyncio block lasts.

    Leaving waits until the trio side is closed, however often the task is cancelled meanwhile. If the trio side fails
    while the block runs (a policy that raises in a strict fleet), the task in the block is cancelled, as
    `asyncio.TaskGroup` does it, and the error comes out of the block.

    Parameters:
        manager: makes the trio context manager.
        wrap: makes the value of the asyncio block from what trio's `async with` gave.
    """

    def __init__(
        self, bridge: Bridge, manager: Callable[[], AbstractAsyncContextManager[T]], wrap: Callable[[T], U]
    ) -> None:
        self._bridge = bridge
        self._manager = manager
        self._wrap = wrap
        self._call: Call[None] = Call(bridge, self._hold, on_finish=self._on_finish)
        self._entered: list[T] = []
        self._settled = Flag()  # set when the trio side was entered, or failed to be
        self._leave = trio.Event()
        self._inside: asyncio.Task[Any] | None = None  # the task in the block
        self._interrupted = False
        self._cancelling = 0  # how often that task had been cancelled before

    async def _hold(self) -> None:
        async with self._manager() as inner:
            self._bridge.notify(self._enter, inner)
            await self._leave.wait()

    def _enter(self, inner: T) -> None:
        self._entered.append(inner)
        self._settled.set()

    def _on_finish(self) -> None:
        self._settled.set()
        if self._inside is not None and self._failure() is not None:
            self._interrupted = True
            self._inside.cancel("the fleet failed; the error comes out of its block")

    def _failure(self) -> BaseException | None:
        error = self._call.error
        return None if isinstance(error, Closed) else error

    async def __aenter__(self) -> U:
        if self._bridge.ending:
            raise StateError("the fleet is closed")
        self._bridge.begin(self._call)
        cancelled = await self._settled.outlast(self._call.cancel)
        if cancelled is not None:
            await self._call.finished.outlast()
            raise chained(cancelled, self._failure())
        if self._call.finished.is_set:
            raise self._call.error or StateError("the fleet is closed")
        self._inside = asyncio.current_task()
        self._cancelling = self._inside.cancelling() if self._inside is not None else 0
        return self._wrap(self._entered[0])

    async def __aexit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> None:
        inside, self._inside = self._inside, None
        self._bridge.post(self._leave.set)
        cancelled = await self._call.finished.outlast()
        if self._interrupted and inside is not None:
            alone = inside.uncancel() <= self._cancelling
            if alone and isinstance(raised, asyncio.CancelledError):
                raised = None  # this class cancelled the task; `failure` says why
        failure = self._failure()
        if isinstance(raised, asyncio.CancelledError):
            raise chained(raised, failure)
        if cancelled is not None and (raised is None or isinstance(raised, Exception)):
            raise chained(cancelled, failure)
        if failure is not None and failure is not raised:
            if raised is None:
                raise failure
            if isinstance(raised, Exception):
                raise _together(failure, raised)


def _together(failure: BaseException, raised: Exception) -> BaseException:
    """As a fleet's block under trio puts them together."""
    failures = failure.exceptions if isinstance(failure, BaseExceptionGroup) else (failure,)
    return BaseExceptionGroup("errors in a fleet", [*failures, raised])
