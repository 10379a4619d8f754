"""A stream of bytes between a guest and tasks here: what the VM's console and ports have in common.

guest ── output ──→ the core's buffer ──→ tasks       a task that waits is woken once, until it looks again
guest ←── input ─── the core's buffer ←── tasks       4 KiB wait; a writer of more waits for room
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ...model.errors import StateError
from ...native import ffi, lib

__all__ = ["Notify", "Stream"]

Notify = Callable[[Callable[[], None]], None]
"""Runs a function soon on the fleet's thread. Any thread."""


class Stream:
    """The base. The fleet's drain task calls `wake` for what vCPUs and I/O threads did; `changed` is for all others.

    Parameters:
        made: the core's ``orc_console *``; NULL: there is no memory.
        notify: runs a function soon on the fleet's thread. Any thread.
        vm: the VM's name, for messages.
    """

    def __init__(self, made: Any, notify: Notify, vm: str) -> None:
        self.handle: Any = ffi.gc(made, lib.orc_console_free)
        if self.handle == ffi.NULL:
            raise MemoryError("orc_console_new")
        self._notify = notify
        self._vm = vm
        self._closed = False
        self._changed = trio.Event()

    def wake(self) -> None:
        """Wake the tasks that wait: there is output, or room for input. Fleet's thread."""
        self._changed.set()
        self._changed = trio.Event()

    def changed(self) -> None:
        """The same, from any thread."""
        self._notify(self.wake)

    def close(self) -> None:
        """No more output will come. Fleet's thread."""
        self._closed = True
        self.wake()

    async def _type(self, data: bytes | str, refused: Callable[[], str | None]) -> None:
        """Put all of it among the input. `refused`: why the guest does not take any; None: it does."""
        left = memoryview(data.encode() if isinstance(data, str) else data).cast("B")
        while True:
            changed, problem = self._changed, refused()
            if problem is not None:
                await trio.lowlevel.checkpoint()
                raise StateError(problem)
            left = left[lib.orc_console_type(self.handle, ffi.from_buffer(left), len(left)) :]
            if not left:
                await trio.lowlevel.checkpoint()
                return
            await changed.wait()
