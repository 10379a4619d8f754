"""A host's buckets in a file that processes share: `orc_budget` of the C core (native/budget.h has the layout)."""

from __future__ import annotations

import os
from typing import Any, Final

from ..model.errors import ResourceLimit, SpecError, StateError
from ..model.spec import Limit, Meter
from . import ffi, lib
from .core import METER_NUMBERS, Charged, monotonic_ns, put_limit

__all__ = ["SharedBucket", "SharedBuckets"]

DIGITS: Final = 12
"""Significant digits of a rate that is read back: the file keeps rates per nanosecond, which loses the last bits."""


class SharedBucket(Charged):
    """One shared bucket, which is charged like a `Bucket`."""

    __slots__ = ()


class SharedBuckets:
    """A view of the file, which stays mapped until `close`.

    Attributes:
        buckets: the buckets, by meter.
        users: the number of fleets of this process whose vCPUs charge the buckets.
    """

    def __init__(self, fd: int) -> None:
        """Map the file `fd`, which stays the caller's.

        Raises:
            SpecError: the file is no budget, or of another version.
            ResourceLimit: the host has no descriptor or memory left.
        """
        problem = ffi.new("char const **")
        self._handle: Any = lib.orc_budget_attach(fd, problem)
        if self._handle == ffi.NULL:
            error, why = ffi.errno, ffi.string(problem[0]).decode()
            text = f"host budget, fd={fd}: {why}"
            if error:
                raise ResourceLimit(error, f"{text}: {os.strerror(error)}")
            raise SpecError(
                f"{text}; pass the descriptor (`HostBudget.fd`) of a budget that `HostBudget.create` of this version "
                "of orchestra has made on this host, opened for reading and writing"
            )
        self.fd = int(lib.orc_budget_fd(self._handle))
        self.buckets = {
            meter: SharedBucket(lib.orc_budget_bucket(self._handle, number)) for meter, number in METER_NUMBERS.items()
        }
        self.users = 0

    @classmethod
    def create(cls) -> SharedBuckets:
        """Make new buckets, without limits.

        Raises:
            ResourceLimit: the host has no descriptor or memory left, or has no memfd.
        """
        fd = lib.orc_budget_create()
        if fd < 0:
            raise ResourceLimit(
                -fd, f"host budget: memfd: {os.strerror(-fd)}: raise the limit on open files (ulimit -n), or on memory"
            )
        try:
            return cls(fd)
        finally:
            os.close(fd)

    def check_open(self) -> Any:
        """The core's handle.

        Raises:
            StateError: closed.
        """
        if self._handle == ffi.NULL:
            raise StateError("this HostBudget is closed: attach to the file once more, by a descriptor that is open")
        return self._handle

    def set(self, meter: Meter, limit: Limit | None) -> None:
        """Put a limit into force for all processes, at once.

        Raises:
            StateError: this is closed, or other processes change the limit endlessly.
        """
        handle = self.check_open()
        # On CLOCK_MONOTONIC and on no fleet's clock: all processes of the host have to agree on the time.
        if not put_limit(self.buckets[meter].handle, limit, monotonic_ns()):
            raise StateError("host budget: other processes that share it change its limit without end: stop them")
        # After the limit is in force: who is woken by this reads the new one.
        lib.orc_budget_changed(handle)

    def look(self, meter: Meter) -> tuple[Limit | None, float]:
        """The limit in force, and the seconds that the next charge would wait."""
        self.check_open()
        raw = ffi.new("struct orc_limit *")
        lib.orc_bucket_limit(self.buckets[meter].handle, monotonic_ns(), raw)
        if not raw.rate:
            return None, 0.0
        try:
            limit = Limit(
                rate=_rounded(raw.rate),
                burst=_rounded(raw.burst),
                max_delay=None if raw.max_delay < 0 else raw.max_delay / 1e9,
            )
        except SpecError as error:
            # Any process with the descriptor can write to the file, so its contents are checked like input.
            raise StateError(f"host budget: a process that shares it has written what is no limit: {error}") from None
        wait = max(0.0, raw.debt + 1 - (limit.tokens - 1)) / limit.rate
        return limit, wait if limit.max_delay is None else min(wait, limit.max_delay)

    def changes(self) -> int:
        """How often a limit was changed, by any process; wraps at 2**32."""
        return int(lib.orc_budget_changes(self.check_open()))

    def share_with(self, fleet: Any) -> None:
        """Join a fleet, before it has vCPUs: the waits of this `orc_fleet` end when a limit changes."""
        lib.orc_fleet_share(fleet, self.check_open())
        self.users += 1

    def leave(self) -> None:
        """A fleet that used the buckets has ended."""
        self.users -= 1

    def close(self) -> None:
        """Unmap the file. A second call does nothing.

        Raises:
            StateError: a fleet uses the buckets.
        """
        if self.users:
            raise StateError(f"can't close a HostBudget that fleets use ({self.users}): leave their blocks first")
        lib.orc_budget_detach(self._handle)
        self._handle, self.fd = ffi.NULL, -1
        self.buckets = {}


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")
