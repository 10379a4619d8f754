"""Functions that run on a vCPU's own thread, between two entries of the guest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any

import trio

__all__ = ["Calls"]

Call = Callable[[], None]


class Calls:
    """The calls of one run of a VM. Exactly one of three makes a call: the runner between two entries (`take`), the
    runner at its end (`take` again), or the fleet's thread once that runner is gone (`serve_late`). So no call is lost.

    Parameters:
        knock: makes that vCPU's runner look for calls. Any thread.
        post: makes the fleet's thread run a function soon. Any thread.
        hurried: within this block nothing delays the vCPUs' threads.
    """

    def __init__(
        self,
        knock: Callable[[int], object],
        post: Callable[..., object],
        hurried: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._knock = knock
        self._post = post
        self._hurried = hurried
        # Order: `ask` puts a call into the list and then commands the runner; the runner clears the command and then
        # looks at the list. In any other order a call could stay in the list with no command set.
        self._lock = Lock()
        self._waiting: dict[int, list[Call]] = {}

    def ask(self, index: int, function: Call) -> None:
        """Make a vCPU's runner run a function soon. Any thread."""
        with self._lock:
            self._waiting.setdefault(index, []).append(function)
        self._knock(index)

    async def call(self, index: int, function: Callable[[], Any]) -> Any:
        """Run a function on the vCPU's thread, and return its result, or raise its exception.

        Cancelling abandons the result; the function may still run.
        """
        done = trio.Event()
        result: list[Any] = []

        def run() -> None:
            try:
                result.append(function())
            except Exception as error:
                result.append(error)
            self._post(done.set)

        with self._hurried():
            self.ask(index, run)
            await done.wait()
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def take(self, index: int, clear: Callable[[], object] | None = None) -> list[Call]:
        """Remove and return the calls that wait for this vCPU. Runner's thread.

        Parameters:
            clear: clears the command to look for calls. It is called while the lock is held.
        """
        with self._lock:
            if clear is not None:
                clear()
            return self._waiting.pop(index, [])

    def serve_late(self, index: int) -> None:
        """Make the calls that came after the runner had looked for the last time. Fleet's thread."""
        for call in self.take(index):
            call()
