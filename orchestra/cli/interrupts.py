"""Ctrl-C as a cancellation, so that a fleet closes in order and the command can still print its results."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import Final

import trio

__all__ = ["until_interrupted"]

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""All that end a program by a user's wish. Each would otherwise leave a raw terminal behind."""


async def until_interrupted(function: Callable[[], Awaitable[None]], ask: Callable[[], bool] = lambda: False) -> int:
    """Await it. A signal of `SIGNALS` cancels it, unless `ask` says that it ends by itself.

    Parameters:
        ask: called at each signal: asks for an end in order. False: cancel.

    Returns:
        The first signal's number, or 0.
    """
    number = 0
    # What nohup ignores stays ignored.
    wanted = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    with trio.open_signal_receiver(*wanted) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal number
                async for one in signals:
                    number = number or one
                    if not ask():
                        nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await function()
            nursery.cancel_scope.cancel()
    return number
