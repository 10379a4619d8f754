"""What the tests of orchestra.aio share: the two ways to open a fleet, and a check that nothing of either stays."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import pytest
import trio

import orchestra as orc
import orchestra.aio
from orchestra.backend.scripted import ScriptedExit, hlt

__all__ = ["LIMIT", "Door", "descriptors", "door", "idle", "nothing_stays", "reached", "run"]

T = TypeVar("T")
LIMIT = 30.0
"""Seconds after which a test that hangs fails; none waits for it."""


def run(main: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(LIMIT):
            return await main()

    return asyncio.run(bounded())


def spin(spec: orc.VmSpec, vcpu: int) -> Iterable[ScriptedExit]:
    return [hlt(after=1e9)]


class Door:
    """A way to open fleets: trio on the loop, or on a thread."""

    def __init__(self, thread: bool) -> None:
        self.thread = thread

    def open(self, script: object = spin, **options: object) -> AbstractAsyncContextManager[orc.aio.Fleet]:
        scripts = script if callable(script) or isinstance(script, dict) else lambda spec, vcpu: script
        options.setdefault("backend", orc.ScriptedBackend(scripts))  # type: ignore[arg-type]
        return orc.aio.open_fleet(thread=self.thread, **options)  # type: ignore[arg-type]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No trio run, thread, descriptor or signal handler. (`nothing_left` sees memory and vCPUs as well, in 0.2 s.)"""
    before = descriptors(), signal.getsignal(signal.SIGINT)
    yield
    assert not trio.lowlevel.in_trio_run()
    assert [thread.name for thread in threading.enumerate() if thread.name == "orchestra.aio"] == []
    assert (descriptors(), signal.getsignal(signal.SIGINT)) == before


@pytest.fixture(params=[False, True], ids=["guest", "thread"])
def door(request: pytest.FixtureRequest) -> Door:
    return Door(request.param)


async def reached(fleet: orc.aio.Fleet) -> None:
    """What other tasks have called by now is waiting on the trio side."""
    for _ in range(3):
        await asyncio.sleep(0)
        await fleet.set_limit(None)


async def idle(fleet: orc.aio.Fleet) -> bool:
    """No call is left but those that hold blocks open."""
    await reached(fleet)
    return len(fleet._bridge.calls) == 1
