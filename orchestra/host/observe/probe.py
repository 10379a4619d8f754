"""Measures how long locked operations and memory reads take for a thread that shares nothing with any guest.

A bus lock holds up every CPU of the host, also those whose guests lock nothing. So a small thread of the C core
(native/probe.c) times, twenty times in 100 ms, locked operations in a cache line that nobody else has, and reads that
miss the caches. It uses 0.2 to 0.4 % of a CPU, most of it for waking up.

The probe can't tell these apart: a bus lock, a CPU that runs slower, load on the other hyperthread, and a CPU that an
outer hypervisor took away. So policies compare a figure with what is usual, and the median of a tick ignores single
samples.
"""

from __future__ import annotations

import os
from collections import deque
from itertools import islice
from statistics import median
from typing import Any, Final

from ...model.errors import ResourceLimit
from ...native import ffi, lib

__all__ = ["Probe"]

PERIOD: Final = 20_000_000
"""Nanoseconds from one look to the next: five looks in 100 ms."""

EACH: Final = 4
"""Samples in each look. The wake-up costs most, so several samples share one."""

KEPT: Final = 4096
BATCH: Final = 256


class Probe:
    """A running probe. `close` it at the end.

    Parameters:
        period: nanoseconds from one look to the next.

    Raises:
        ResourceLimit: the host has no thread or memory left.
    """

    def __init__(self, period: int = PERIOD) -> None:
        self._handle: Any = lib.orc_probe_start(period, EACH)
        if self._handle == ffi.NULL:
            raise ResourceLimit(ffi.errno, f"host probe: {os.strerror(ffi.errno)}: see ulimit -u and cgroup pids.max")
        self._buffer = ffi.new("struct orc_probe_sample[]", BATCH)
        self._samples: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._count = 0

    def take(self) -> int:
        """Fetch what was measured; returns the number of samples so far."""
        while self._handle != ffi.NULL and (taken := lib.orc_probe_take(self._handle, self._buffer, BATCH)):
            self._samples.extend((sample.lock_ns, sample.memory_ns) for sample in self._buffer[0:taken])
            self._count += taken
        return self._count

    def medians(self, since: int, until: int) -> tuple[float, float] | None:
        """Nanoseconds of a locked operation and of a read: medians of the samples with these numbers, as far as they
        are kept; None if there are none."""
        first = self._count - len(self._samples)
        chosen = list(islice(self._samples, max(0, since - first), max(0, until - first)))
        if not chosen:
            return None
        return median(lock for lock, _ in chosen), median(memory for _, memory in chosen)

    def close(self) -> None:
        lib.orc_probe_stop(self._handle)
        self._handle = ffi.NULL
