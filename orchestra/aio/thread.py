"""A trio run in a thread of its own, for loops that can't have trio as a guest."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar

import trio

from .bridge import Bridge, Call, Flag

__all__ = ["ThreadBridge"]

T = TypeVar("T")
P = ParamSpec("P")


class ThreadBridge(Bridge):
    """The whole fleet lives on that thread. Calls that do not wait go there as well, and cost a hop each."""

    def __init__(self) -> None:
        super().__init__()
        self._token: trio.lowlevel.TrioToken
        self._ready = Flag()
        # A daemon, so that a program that leaves without closing its fleets can still end.
        self._thread = threading.Thread(target=self._run, name="orchestra.aio", daemon=True)

    @classmethod
    async def open(cls) -> Self:
        """Start a run, and acquire it for the caller."""
        bridge = cls()
        bridge.acquire()
        bridge._thread.start()
        cancelled = await bridge._ready.outlast()
        if cancelled is not None or bridge.ended.is_set:
            await bridge.release()  # raises what the run failed with, if it did
            raise cancelled or RuntimeError("trio ended before it began")
        return bridge

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            trio.run(self._main)
        except BaseException as error:
            failure = error
        self.notify(self._done, failure)

    def _done(self, failure: BaseException | None) -> None:
        self._ready.set()
        self.over(failure)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.notify(self._ready.set)
        await self._stop.wait()

    async def release(self) -> None:
        try:
            await super().release()
        finally:
            if self.ended.is_set:
                self._thread.join()  # short: the thread reported its end as its last act

    def start(self, call: Call[Any]) -> None:
        try:
            self._token.run_sync_soon(self._spawn, call, contextvars.copy_context())
        except trio.RunFinishedError:
            pass  # `over` finishes it

    def _spawn(self, call: Call[Any], context: contextvars.Context) -> None:
        trio.lowlevel.spawn_system_task(call.run, context=context)

    def post(self, function: Callable[[], object]) -> None:
        if not self.ended.is_set:
            try:
                self._token.run_sync_soon(function)
            except trio.RunFinishedError:
                pass

    def notify(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            self.loop.call_soon_threadsafe(partial(function, *args, **kwargs))
        except RuntimeError:
            if not self.loop.is_closed():
                raise
            self._stop.set()  # nobody is left to hear anything

    def sync(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if not self.ended.is_set:
            try:
                return trio.from_thread.run_sync(partial(function, *args, **kwargs), trio_token=self._token)
            except trio.RunFinishedError:
                pass
        return function(*args, **kwargs)  # nothing runs any more that it could collide with
