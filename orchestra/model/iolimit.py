"""How fast disks may be: token buckets in the shape that other monitors have, and limits made of two of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import attrs

from .checks import fail, number
from .errors import SpecError

__all__ = ["IoLimit", "TokenBucket", "optional_io_limit", "tightest_io"]

MOST: Final = 1e9
"""Operations or sectors that a bucket of the core can have, and make in a second."""

SECTOR: Final = 512


@attrs.frozen
class TokenBucket:
    """A bucket of operations, or of bytes. It starts full; what a request is, it takes out, and waits until there is
    enough.

    The shape is that of Firecracker and Cloud Hypervisor, whose `refill_time` is in milliseconds. Here it is in
    seconds, as all times of orchestra are.

    Parameters:
        size: what goes at once after a rest. A larger request waits for what it lacks, and goes then.
        refill_time: seconds in which an empty bucket is full again: `size` / `refill_time` is the rate.
        one_time_burst: what goes beside that, once. It is used first, and never made again. If the limit is changed
            while the VM runs, what was given before counts: a larger one gives the difference.
    """

    size: float
    refill_time: float = 1.0
    one_time_burst: float = 0.0

    def __attrs_post_init__(self) -> None:
        if not 0 < number("size", self.size) <= MOST * SECTOR:
            raise fail("size", self.size, f"must be more than 0 and at most {MOST * SECTOR:g}")
        if not 0.001 <= number("refill_time", self.refill_time) <= 86_400:
            raise fail("refill_time", self.refill_time, "must be from 0.001 to 86400 seconds")
        if not 0 <= number("one_time_burst", self.one_time_burst) <= MOST * SECTOR:
            raise fail("one_time_burst", self.one_time_burst, f"must be from 0 to {MOST * SECTOR:g}")

    @property
    def rate(self) -> float:
        """Operations or bytes per second."""
        return self.size / self.refill_time


def _to_bucket(value: Any) -> Any:
    """A number is a rate: so much each second, and as much at once."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return TokenBucket(value) if number and value > 0 else value


@attrs.frozen
class IoLimit:
    """How fast a disk may be, or several disks together. Requests that go faster wait, in their order.

    Parameters:
        operations: requests, of any kind; None: no limit. A number is ``TokenBucket(number)``: so many a second.
        bytes: bytes that are read, written or zeroed; likewise. At least 512, a sector.
    """

    operations: TokenBucket | None = attrs.field(default=None, converter=_to_bucket)
    bytes: TokenBucket | None = attrs.field(default=None, converter=_to_bucket)

    def __attrs_post_init__(self) -> None:
        for name, unit in (("operations", 1), ("bytes", SECTOR)):
            bucket = getattr(self, name)
            if bucket is None:
                continue
            if not isinstance(bucket, TokenBucket):
                raise fail(name, bucket, "must be more than 0 a second, a TokenBucket, or None for no limit")
            if not unit <= bucket.size <= MOST * unit:
                raise fail(f"{name}: size", bucket.size, f"must be from {unit} to {MOST * unit:g}")
            if bucket.rate > MOST * unit:
                raise fail(f"{name}: refill_time", bucket.refill_time, f"gives more than {MOST * unit:g} a second")
            if bucket.one_time_burst > MOST * unit:
                raise fail(f"{name}: one_time_burst", bucket.one_time_burst, f"must be at most {MOST * unit:g}")
        if self.operations is None and self.bytes is None:
            raise SpecError("operations=None, bytes=None: give one of them, or no limit (None)")

    def __str__(self) -> str:
        parts = [("operations", self.operations), ("bytes", self.bytes)]
        return " and ".join(f"{_shown(bucket.rate)} {what}/s" for what, bucket in parts if bucket is not None)


def _shown(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def optional_io_limit(field: str, value: object) -> IoLimit | None:
    """Check an argument that may be an `IoLimit` or ``None``."""
    if value is None or isinstance(value, IoLimit):
        return value
    raise fail(field, value, "must be an IoLimit, such as IoLimit(operations=1000), or None for no limit")


def _tightest(buckets: Iterable[TokenBucket | None]) -> TokenBucket | None:
    given = [bucket for bucket in buckets if bucket is not None]
    if len(given) < 2:
        return given[0] if given else None
    size, rate = min(bucket.size for bucket in given), min(bucket.rate for bucket in given)
    return TokenBucket(size, min(86_400.0, size / rate), min(bucket.one_time_burst for bucket in given))


def tightest_io(limits: Iterable[IoLimit]) -> IoLimit | None:
    """The limit in force: of each meter the lowest rate with the smallest size, so that no limit loosens another."""
    given = list(limits)
    if len(given) < 2:
        return given[0] if given else None
    return IoLimit(_tightest(one.operations for one in given), _tightest(one.bytes for one in given))
