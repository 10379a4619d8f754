"""Limits of this process, for tests of what happens where they are reached."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["so_many_left"]


@contextmanager
def so_many_left(number: int) -> Iterator[None]:
    """In the block this process can have so many descriptors more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    used: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + number, before[1]))
        with suppress(OSError):
            while True:
                used.append(os.dup(0))
        for _ in range(number):
            os.close(used.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in used:
            os.close(fd)
