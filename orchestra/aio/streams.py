"""What comes from a VM to asyncio programs: exits, requests, console output.

Checked against the originals as handles.py is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial
from types import TracebackType
from typing import Final, Self

import attrs
import trio

from ..fleet import channels as subscription, watch
from ..fleet.channels import ExitsStatistics
from ..machine.devices import console, consoleport, requests as queue
from ..machine.devices.console import LINES
from ..machine.devices.consoleport import KEPT
from ..model.exits import Exit
from ..native.channels import ExitBatch
from ..policy import Facts
from .bridge import Bridge
from .wrapper import Wrapper, mirrors

__all__ = ["Console", "ConsolePort", "Exits", "Request", "Requests", "Watch"]

BATCH: Final = 256
ITEMS_PER_SLEEP: Final = 64


@mirrors(subscription.Exits)
class Exits(Wrapper[subscription.Exits]):
    """In asyncio: exits cross over in batches (one by one: of up to 256), so that a hop is paid for each. Those that
    have crossed wait here: they count as `waiting`, are not dropped any more, and a cancelled `receive` loses none.
    """

    __slots__ = ("_ahead", "_batch", "_crossed", "_taken")

    def __init__(self, bridge: Bridge, inner: subscription.Exits) -> None:
        super().__init__(bridge, inner)
        self._crossed: deque[ExitBatch] = deque()
        self._batch = ExitBatch(b"", {})  # the one that is received from now, one by one
        self._ahead: list[Exit] = []  # what is left of it, the next one last
        self._taken = 0

    @property
    def kinds(self) -> tuple[type[Exit], ...]:
        return self._inner.kinds

    @property
    def vm(self) -> str | None:
        return self._inner.vm

    @property
    def missed(self) -> int:
        return self._inner.missed

    def _more(self) -> bool:
        """None is left: go on with the next batch. False: none has crossed."""
        if not self._crossed:
            return False
        self._batch = self._crossed.popleft()
        self._ahead = [*self._batch][::-1]
        return True

    async def receive(self) -> Exit:
        self._taken += 1
        if self._ahead or self._crossed:
            await asyncio.sleep(0)
        while not self._ahead and not self._more():  # again, if another task took what came
            await self._bridge.call(self._inner.next_batch, BATCH, keep=self._crossed.append)
        return self._ahead.pop()

    def receive_nowait(self) -> Exit:
        if not self._ahead and not self._more():
            self._crossed.append(self._bridge.sync(self._inner.next_batch_nowait, BATCH))
            self._more()
        return self._ahead.pop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Exit:
        # As receive(), and no more than this for most of 100,000 exits a second.
        if self._ahead and (self._taken + 1) % ITEMS_PER_SLEEP:
            self._taken += 1
            return self._ahead.pop()
        try:
            return await self.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise StopAsyncIteration from None

    async def batches(self, most: int = 4096) -> AsyncGenerator[ExitBatch, None]:
        subscription.check_batch(most)
        while True:
            if self._ahead:
                self._crossed.appendleft(self._batch[-len(self._ahead) :])
                self._ahead.clear()
            if self._crossed:
                await asyncio.sleep(0)
            try:
                while not self._crossed:
                    await self._bridge.call(self._inner.next_batch, most, keep=self._crossed.append)
            except (trio.EndOfChannel, trio.ClosedResourceError):
                return
            batch = self._crossed.popleft()
            if len(batch) > most:
                self._crossed.appendleft(batch[most:])
                batch = batch[:most]
            yield batch

    def statistics(self) -> ExitsStatistics:
        statistics = self._bridge.sync(self._inner.statistics)
        here = len(self._ahead) + sum(map(len, self._crossed))
        return attrs.evolve(statistics, waiting=statistics.waiting + here)

    def close(self) -> None:
        self._bridge.sync(self._inner.close)

    async def aclose(self) -> None:
        self.close()
        await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


@mirrors(queue.Request)
class Request(Wrapper[queue.Request]):
    """"""

    __slots__ = ()

    @property
    def vcpu(self) -> int:
        return self._inner.vcpu

    @property
    def address(self) -> int:
        return self._inner.address

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def write(self) -> bool:
        return self._inner.write

    @property
    def data(self) -> bytes:
        return self._inner.data

    @property
    def answered(self) -> bool:
        return self._inner.answered

    @property
    def returned(self) -> bool:
        return self._inner.returned

    def answer(self, data: bytes | None = None) -> None:
        self._bridge.sync(self._inner.answer, data)


@mirrors(queue.Requests)
class Requests(Wrapper[queue.Requests]):
    """In asyncio: cancelling loses no access here either; the next iteration gets it."""

    __slots__ = ("_crossed",)

    def __init__(self, bridge: Bridge, inner: queue.Requests) -> None:
        super().__init__(bridge, inner)
        self._crossed: deque[queue.Request] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Request:
        while True:
            while self._crossed:
                request = self._crossed.popleft()
                if not request.returned:  # the block was left meanwhile, or its VM ended
                    return Request(self._bridge, request)
            await self._bridge.call(self._inner.__anext__, keep=self._crossed.append)


@mirrors(watch.Watch)
class Watch(Wrapper[watch.Watch]):
    """In asyncio: cancelling loses nothing here either; the next iteration gets what had come."""

    __slots__ = ("_crossed",)

    def __init__(self, bridge: Bridge, inner: watch.Watch) -> None:
        super().__init__(bridge, inner)
        self._crossed: deque[Facts] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Facts:
        if not self._crossed:
            await self._bridge.call(self._inner.__anext__, keep=self._crossed.append)
        return self._crossed.popleft()


@mirrors(console.Console)
class Console(Wrapper[console.Console]):
    """In asyncio: its buffer has a lock of its own, so reading it is no hop in any mode."""

    __slots__ = ()

    def log(self) -> bytes:
        return self._inner.log()

    def last_lines(self, most: int = LINES) -> str:
        return self._inner.last_lines(most)

    async def wait_for(self, pattern: bytes | str, *, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 (its error has the last lines)
        return await self._bridge.call(partial(self._inner.wait_for, pattern, timeout=timeout))

    async def write(self, data: bytes | str) -> None:
        await self._bridge.call(self._inner.write, data)

    def resize(self, columns: int, rows: int) -> None:
        self._bridge.sync(self._inner.resize, columns, rows)

    @property
    def size(self) -> tuple[int, int] | None:
        return self._inner.size

    @property
    def text(self) -> str:
        return self._inner.text

    @property
    def total(self) -> int:
        return self._inner.total

    def follow(self) -> AsyncGenerator[bytes, None]:
        return self._bridge.iterate(self._inner.follow)


@mirrors(consoleport.ConsolePort)
class ConsolePort(Wrapper[consoleport.ConsolePort]):
    """In asyncio: cancelling a read loses nothing here either; the next one gets what had come."""

    __slots__ = ("_crossed",)

    def __init__(self, bridge: Bridge, inner: consoleport.ConsolePort) -> None:
        super().__init__(bridge, inner)
        self._crossed = b""

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def is_open(self) -> bool:
        return self._inner.is_open

    async def wait_open(self) -> None:
        await self._bridge.call(self._inner.wait_open)

    async def read(self, most: int = KEPT) -> bytes:
        if not self._crossed:
            await self._bridge.call(partial(self._inner.read, most), keep=self._keep)
        data, self._crossed = self._crossed[:most], self._crossed[most:]
        return data

    def _keep(self, data: bytes) -> None:
        self._crossed += data

    async def write(self, data: bytes | str) -> None:
        await self._bridge.call(self._inner.write, data)
