"""A trio run as a guest of an asyncio loop, on its thread; all fleets of the loop share one.

Sources: trio's reference, "Using guest mode to run Trio on top of other event loops"; asyncio/runners.py for Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Final, ParamSpec, Self, TypeVar

import trio

from ..model.errors import StateError
from .bridge import Bridge, Call

__all__ = ["LoopBridge"]

AWAKE: Final = 8
"""Ticks for which trio stays awake after each call. When trio has nothing to do, it waits in a thread, and to wake it
takes two switches of threads, about 100 microseconds. So the caller's next call had better find trio awake."""

T = TypeVar("T")
P = ParamSpec("P")


class LoopBridge(Bridge):
    """trio's tasks run in callbacks of the loop, so whatever does not wait is simply called."""

    def __init__(self) -> None:
        super().__init__()
        self._awake = 0
        self._interrupts = _Interrupts(self.loop)

    @classmethod
    async def open(cls) -> Self:
        """The bridge of the running loop, started if there is none, and acquired for the caller.

        Raises:
            StateError: another trio run has this thread.
        """
        bridge: Self | None = None
        while trio.lowlevel.in_trio_run():
            found = _BRIDGE.get(None)
            bridge = found if isinstance(found, cls) else None
            if bridge is None or bridge.loop is not asyncio.get_running_loop():
                raise StateError(
                    "this thread runs trio for somebody else, or for an event loop that was left without closing its "
                    "fleets; open the fleet with thread=True to give it a thread of its own"
                )
            if not bridge.ending:
                break
            cancelled = await bridge.ended.outlast()
            bridge = None
            if cancelled is not None:
                raise cancelled
        if bridge is None:
            bridge = cls()
            bridge._start()
        bridge.acquire()
        return bridge

    def _start(self) -> None:
        try:
            self._interrupts.install()
            trio.lowlevel.start_guest_run(
                self._stop.wait,
                run_sync_soon_threadsafe=self.loop.call_soon_threadsafe,
                run_sync_soon_not_threadsafe=self.loop.call_soon,
                done_callback=self._done,
                host_uses_signal_set_wakeup_fd=True,
            )
        except BaseException:
            self._interrupts.restore()
            raise
        _BRIDGE.set(self)

    def _done(self, outcome: Any) -> None:
        self._interrupts.restore()
        failure: BaseException | None = None
        try:
            outcome.unwrap()
        except BaseException as error:
            failure = error
        self.over(failure)

    def start(self, call: Call[Any]) -> None:
        trio.lowlevel.spawn_system_task(call.run, context=contextvars.copy_context())

    def _stay_awake(self) -> None:
        if not self._awake:
            trio.lowlevel.spawn_system_task(self._tick)
        self._awake = AWAKE

    async def _tick(self) -> None:
        while self._awake:
            self._awake -= 1
            await trio.lowlevel.checkpoint()

    def post(self, function: Callable[[], object]) -> None:
        if not self.ended.is_set:
            function()

    def notify(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        function(*args, **kwargs)
        self._stay_awake()

    def sync(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)


_BRIDGE: Final[trio.lowlevel.RunVar[LoopBridge | None]] = trio.lowlevel.RunVar("orchestra.aio")


def _give_back(descriptor: int) -> None:
    """Let signals wake whoever had them before.

    Whether that one wanted a warning when its descriptor is full can't be asked (`signal.set_wakeup_fd` returns the
    descriptor alone). Without it nothing is lost, as a full descriptor wakes its reader; with it, a host that has
    switched it off (uvloop does) would get tracebacks on stderr.
    """
    signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)


class _Interrupts:
    """Ctrl-C while trio is a guest.

    A handler runs between any two instructions of the main thread, and one that raises KeyboardInterrupt there (as
    asyncio's does at the second Ctrl-C) would lose a tick of the guest: trio would stand still, and whoever waits for a
    fleet to close would wait for ever. So the handler that was there is called from a callback of its own; at once only
    if the one before still waits for that, as then the loop is stuck.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._previous: Any = None
        self._waiting: asyncio.Handle | None = None
        self._raised = False
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Install the handler, if this is the main thread, where signals are handled, and the old handler may raise."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if callable(self._previous):
                signal.signal(signal.SIGINT, self._handle)
                self._watch()

    def _watch(self) -> None:
        reader, writer = self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._loop.add_reader(reader, self._drain, reader)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if before != -1:
            _give_back(before)
            self._unwatch()

    @staticmethod
    def _drain(reader: int) -> None:
        """Nothing is to be learned from the bytes: handlers run because the loop does."""
        with suppress(BlockingIOError):
            os.read(reader, 4096)

    def _unwatch(self) -> None:
        if self._pipe is None:
            return
        (reader, writer), self._pipe = self._pipe, None
        now = signal.set_wakeup_fd(-1)
        if now != writer:  # other code has set its own since
            _give_back(now)
        if not self._loop.is_closed():
            self._loop.remove_reader(reader)
        os.close(reader)
        os.close(writer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is None and not self._loop.is_closed():
            self._waiting = self._loop.call_soon_threadsafe(self._pass_on, number, None)
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        waiting, self._waiting = self._waiting, None
        try:
            self._previous(number, frame)
        except BaseException:
            self._raised = True
            if waiting is not None:
                waiting.cancel()
            raise

    def restore(self) -> None:
        """Put the old handler back, unless other code has installed another one since."""
        self._unwatch()
        if callable(self._previous) and signal.getsignal(signal.SIGINT) == self._handle:
            # asyncio.run takes its handler back when the main task is done, or when it raises. If trio outlasts that,
            # it found ours and does not come again.
            main = getattr(self._previous, "keywords", {}).get("main_task")
            left = isinstance(main, asyncio.Task) and (main.done() or self._raised)
            signal.signal(signal.SIGINT, signal.default_int_handler if left else self._previous)
