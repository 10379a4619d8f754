"""Ctrl-C as a cancellation, so that a fleet closes in order and the command can still print its results."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

__all__ = ["until_interrupted"]


async def until_interrupted(function: Callable[[], Awaitable[None]]) -> int:
    """Await the function. SIGINT or SIGTERM cancels it. Returns the signal's number, or 0.

    trio delivers a second signal again when the receiver is closed, so that signal has its usual effect then.
    """
    number = 0
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal number
                number = await anext(aiter(signals))
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await function()
            nursery.cancel_scope.cancel()
    return number
