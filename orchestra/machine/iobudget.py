"""The budgets of disks: two buckets of the core, for operations and for bytes, and the limits that several ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from ..model.iolimit import SECTOR, IoLimit, TokenBucket, tightest_io
from ..native import ffi, lib
from ..native.core import monotonic_ns
from .desired import AskedIoLimit

__all__ = ["IoBudget"]

NO_DELAY: Final = -1
"""`max_delay` of the core's buckets: a request waits for as long as its limit says. Its guest runs meanwhile."""


class IoBudget:
    """What disks may do together. For the fleet's thread, but `watch` and `unwatch`.

    Attributes:
        limits: the limits, one of each asker. The buckets have the tightest of all.

    Parameters:
        buckets: the core's, one for each meter (``orc_bucket *``). They are those that vCPUs are charged by.
    """

    __slots__ = ("_watching", "buckets", "in_force", "limits")

    def __init__(self, limits: Iterable[AskedIoLimit] = ()) -> None:
        self.buckets = [lib.orc_bucket_new() for _ in range(lib.ORC_BLK_METERS)]
        self._watching: dict[object, Callable[[], object]] = {}
        self.limits: tuple[AskedIoLimit, ...] = ()
        self.in_force: IoLimit | None = None
        if ffi.NULL in self.buckets:
            self.close()
            raise MemoryError("orc_bucket_new")
        self.put(limits)

    @property
    def base(self) -> IoLimit | None:
        """The limit that the spec or a caller gave; None: there is none."""
        return next((one.io_limit for one in self.limits if one.by is None), None)

    def put(self, limits: Iterable[AskedIoLimit]) -> None:
        """Put these limits into force, at once: disks that wait look again."""
        self.limits = tuple(limits)
        limit = tightest_io(one.io_limit for one in self.limits)
        if limit == self.in_force:
            return
        self.in_force = limit
        sides = (None, None) if limit is None else (limit.operations, limit.bytes)
        # By the clock that the I/O threads go by, and not by the fleet's.
        now = monotonic_ns()
        for handle, bucket, unit in zip(self.buckets, sides, (1, SECTOR), strict=True):
            _set(handle, bucket, unit, now)
        for changed in list(self._watching.values()):
            changed()

    def ask(self, by: str | None, limit: IoLimit | None) -> None:
        """Set or (None) remove the limit of one asker (see `AskedIoLimit.by`)."""
        others = tuple(one for one in self.limits if one.by != by)
        self.put(others if limit is None else (*others, AskedIoLimit(by, limit)))

    def watch(self, disk: object, changed: Callable[[], object]) -> None:
        """Call this whenever the limit in force changes. Any thread."""
        self._watching[disk] = changed

    def unwatch(self, disk: object) -> None:
        """Any thread."""
        self._watching.pop(disk, None)

    def close(self) -> None:
        """No disk has the buckets any more."""
        for bucket in self.buckets:
            lib.orc_bucket_free(bucket)
        self.buckets = []


def _set(handle: Any, bucket: TokenBucket | None, unit: int, now: int) -> None:
    if bucket is None:
        lib.orc_bucket_set(handle, 0.0, 1.0, NO_DELAY, now)
        return
    lib.orc_bucket_set_once(handle, bucket.one_time_burst / unit)
    # 1 more: a bucket counts what has been done, and a request waits before (native/virtio.h).
    lib.orc_bucket_set(handle, bucket.rate / unit, bucket.size / unit + 1, NO_DELAY, now)
