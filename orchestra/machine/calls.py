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
    """Of one run of a VM. A call is made by exactly one of three: the runner between two entries (`take`), the runner
    at its end (`take` again), or the fleet's thread once that runner is gone (`serve_late`). So none is lost.

    Parameters:
        knock: have that vCPU's runner look for calls. Any thread.
        post: have the fleet's thread run a function soon. Any thread.
        hurried: whatever may make its threads late is out of the way within this block.
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
        # A call is put there before the runner is told; the runner takes back the command before it looks.
        self._lock = Lock()
        self._waiting: dict[int, list[Call]] = {}

    def ask(self, index: int, function: Call) -> None:
        """Have a vCPU's runner run a function soon."""
        with self._lock:
            self._waiting.setdefault(index, []).append(function)
        self._knock(index)

    async def call(self, index: int, function: Callable[[], Any]) -> Any:
        """Run a function there, and return what it does.

        Cancelling abandons the result; the function may run all the same.
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

    def take(self, index: int, heard: Callable[[], object] | None = None) -> list[Call]:
        """Those that wait. `heard`: takes back the command to look for them, with the lock held. Runner's thread."""
        with self._lock:
            if heard is not None:
                heard()
            return self._waiting.pop(index, [])

    def serve_late(self, index: int) -> None:
        """Those that came when the runner had looked for the last time. Fleet's thread."""
        for call in self.take(index):
            call()
