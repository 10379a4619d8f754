"""Where a guest's output goes: a bounded buffer that tasks can follow."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from threading import Lock

import trio

__all__ = ["Console"]

KEPT = 64 * 1024


class Console:
    """What the guest wrote to its debug console and serial port.

    Bytes come from vCPU threads; the last 64 KiB are kept. `notify` is how a thread gets `_wake` run on the fleet's.
    """

    def __init__(self, notify: Callable[[Callable[[], None]], None]) -> None:
        self._notify = notify
        self._lock = Lock()
        self._kept = bytearray()
        self._total = 0
        self._announced = False
        self._closed = False
        self._changed = trio.Event()

    def write(self, data: bytes) -> None:
        """Any thread."""
        with self._lock:
            self._kept += data
            self._total += len(data)
            if len(self._kept) > 2 * KEPT:  # cut seldom, as cutting copies
                del self._kept[:-KEPT]
            announce = not self._announced
            self._announced = True
        if announce:  # one wake-up for however much is written until it is served
            self._notify(self._wake)

    def _wake(self) -> None:
        with self._lock:
            self._announced = False
        self._changed.set()
        self._changed = trio.Event()

    @property
    def output(self) -> bytes:
        """The last 64 KiB of output."""
        with self._lock:
            return bytes(self._kept[-KEPT:])

    @property
    def text(self) -> str:
        """`output` as text; bytes that are not UTF-8 are replaced."""
        return self.output.decode(errors="replace")

    @property
    def total(self) -> int:
        """How many bytes were ever written."""
        return self._total

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """All output from the kept beginning on, as it comes, until the VM has ended.

        A follower that falls behind by more than is kept loses the oldest output.
        """
        position = 0
        while True:
            changed = self._changed
            with self._lock:
                missing = self._total - position
                chunk = bytes(self._kept[-missing:]) if missing else b""
                position = self._total
                closed = self._closed
            if chunk:
                await trio.lowlevel.checkpoint()  # a guest that never stops talking must not keep the loop to itself
                yield chunk
            elif closed:
                return
            else:
                await changed.wait()

    def close(self) -> None:
        """No more output will come. Fleet's thread."""
        with self._lock:
            self._closed = True
        self._wake()
