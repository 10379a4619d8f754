"""Ctrl-C as a cancellation, so that a fleet closes in order and what was seen can still be told."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

__all__ = ["until_interrupted"]


async def until_interrupted(function: Callable[[], Awaitable[None]]) -> int:
    """Await it; SIGINT or SIGTERM cancels it. The signal's number, or 0. A second signal does what it always does."""
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
