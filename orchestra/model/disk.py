"""A disk: which file has its bytes, and how fast they may go."""

from __future__ import annotations

from typing import ClassVar, Final

import attrs

from .checks import fail, number
from .devices import DeviceSpec, Wiring
from .errors import SpecError
from .virtio import function

__all__ = ["Disk", "IoLimit"]

MOST_BURST: Final = 1e9
"""Operations or sectors that a bucket of the core can give at once."""


@attrs.frozen
class IoLimit:
    """How fast a disk may be: requests that go faster wait, in their order.

    Parameters:
        operations: requests per second, of any kind; None: no limit.
        bytes: bytes per second that are read, written or zeroed; None: no limit. At least 512, a sector.
        burst: seconds' worth of both that may go at once after a rest; at least one request or sector may.
    """

    operations: float | None = None
    bytes: float | None = None
    burst: float = 1.0

    def __attrs_post_init__(self) -> None:
        for name, least, most in (("operations", 0.0, 1e9), ("bytes", 512.0, 512e9)):
            value = getattr(self, name)
            if value is not None and (not least <= number(name, value) <= most or not value):
                raise fail(name, value, f"must be from {least:g} to {most:g} a second, or None for no limit")
        if self.operations is None and self.bytes is None:
            raise SpecError("operations=None, bytes=None: give one of them, or no io_limit")
        if not 0 <= number("burst", self.burst) <= 3600:
            raise fail("burst", self.burst, "must be from 0 to 3600 seconds")

    def buckets(self) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        """Rate and burst of the core's two buckets, in operations and in sectors of 512 bytes."""
        return (
            None if self.operations is None else self._bucket(self.operations),
            None if self.bytes is None else self._bucket(self.bytes / 512),
        )

    def _bucket(self, rate: float) -> tuple[float, float]:
        # 1 more: a bucket counts what has been done, and a request waits before (native/virtio.h).
        return rate, min(max(1.0, rate * self.burst) + 1, MOST_BURST)


@attrs.frozen
class Disk(DeviceSpec):
    """A disk of a raw image or a block device, ``/dev/vda`` in Linux (virtio-blk).

    The file is locked while a VM has it: shared by those that only read it, else by one VM alone.

    Parameters:
        path: the image or block device. With `base`, the file for what is written, which is made if it is not there.
        readonly: the guest can't write.
        direct: past the host's page cache (``O_DIRECT``).
        base: a raw image that many disks may share and none changes. Blocks that the guest writes go to `path`.
        io_limit: how fast it may be.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.disk:DiskDevice"

    path: str
    readonly: bool = False
    direct: bool = False
    base: str | None = None
    io_limit: IoLimit | None = None

    def __attrs_post_init__(self) -> None:
        for name, value in (("path", self.path), *([("base", self.base)] if self.base is not None else [])):
            if not isinstance(value, str) or not value or "\0" in value:
                raise fail(name, value, "must be the name of a file")
        for name in ("readonly", "direct"):
            if not isinstance(getattr(self, name), bool):
                raise fail(name, getattr(self, name), "must be True or False")
        if self.base is not None and self.direct:
            raise SpecError("direct=True: a disk with a base goes through the page cache: leave one of them out")
        if self.base is not None and self.base == self.path:
            raise fail("base", self.base, "must be another file than path, which is written")
        if not isinstance(self.io_limit, IoLimit | None):
            raise fail("io_limit", self.io_limit, "must be an IoLimit, such as IoLimit(operations=1000), or None")

    def wiring(self) -> Wiring:
        return Wiring(pci=function(2, 0x010000, queues=1, config_size=60))  # a storage controller: SCSI, as others say
