"""Lets the trio run await an asyncio function: for callbacks of a fleet, such as `on_evict`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from ..model.errors import StateError
from .bridge import Bridge

__all__ = ["ask"]

T = TypeVar("T")


async def ask(bridge: Bridge, function: Callable[..., Awaitable[T]], *args: object) -> T:
    """Call a function on the loop's thread, in a task of its own, and return its result.

    If this call is cancelled in the trio run, that task is cancelled and waited for.

    Raises:
        StateError: something else cancelled that task.
    """
    done = trio.Event()
    tasks: list[asyncio.Task[T]] = []

    async def run() -> T:
        return await function(*args)

    def start() -> None:
        task = bridge.loop.create_task(run())
        tasks.append(task)
        task.add_done_callback(lambda _: bridge.post(done.set))

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    bridge.notify(start)
    try:
        await done.wait()
    except trio.Cancelled:
        bridge.notify(cancel)
        with trio.CancelScope(shield=True):
            await done.wait()
        raise
    (task,) = tasks
    if task.cancelled():
        raise StateError("the asyncio task that was asked has been cancelled")
    return task.result()
