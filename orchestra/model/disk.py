"""A disk: which file has its bytes, and how fast they may go."""

from __future__ import annotations

from typing import ClassVar, Final, Literal

import attrs

from .checks import fail, number, whole
from .devices import DeviceSpec, Wiring
from .errors import SpecError
from .pci import PciFunction
from .virtio import function

__all__ = ["Disk", "IoLimit", "VhostUserDisk"]

MOST_BURST: Final = 1e9
"""Operations or sectors that a bucket of the core can give at once."""


VHOST: Final = "orchestra.machine.devices.vhost.device"
SOCKET_NAME: Final = 107
"""Bytes of a Unix socket's name, the terminating zero left out."""


def _function(queues: int) -> PciFunction:
    return function(2, 0x010000, queues=queues, config_size=60)  # a storage controller: SCSI, as others say


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
    """A disk of an image or a block device, ``/dev/vda`` in Linux (virtio-blk).

    The file is locked while a VM has it: shared by those that only read it, else by one VM alone.

    Parameters:
        path: the image or block device. With `base`, the file for what is written, which is made if it is not there.
        readonly: the guest can't write.
        direct: past the host's page cache (``O_DIRECT``).
        base: a raw image that many disks may share and none changes. Blocks that the guest writes go to `path`.
        io_limit: how fast it may be. Not of a qcow2 image.
        format: "raw", or "qcow2": then a process of its own (QEMU's qemu-storage-daemon) serves the disk, and opens the
            backing files that the image names. None: raw, but a file that begins as a qcow2 image is refused. The
            format is never guessed: a guest writes the first bytes of its raw disk.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.disk:DiskDevice"

    path: str
    readonly: bool = False
    direct: bool = False
    base: str | None = None
    io_limit: IoLimit | None = None
    format: Literal["raw", "qcow2"] | None = None

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
        if self.format not in (None, "raw", "qcow2"):
            raise fail("format", self.format, 'must be "raw" or "qcow2", or None for raw')
        if self.format == "qcow2" and self.base is not None:
            raise SpecError("base: a qcow2 image names its backing file itself: make it with `qemu-img create -b`")
        if self.format == "qcow2" and self.io_limit is not None:
            raise SpecError('io_limit: format="qcow2" has none: leave it out, or convert the image to raw')

    def implemented_by(self) -> str:
        return f"{VHOST}:QcowDevice" if self.format == "qcow2" else self.implementation

    @property
    def has_back_end(self) -> bool:
        return self.format == "qcow2"

    def wiring(self) -> Wiring:
        return Wiring(pci=_function(1))


@attrs.frozen
class VhostUserDisk(DeviceSpec):
    """A disk that a vhost-user back-end of yours serves, at a socket: ``vhost-user-blk`` of any program.

    The back-end maps the VM's memory and may read and write all of it. It must answer at each start of the VM, and the
    VM ends with it.

    Parameters:
        socket: the Unix socket at which the back-end listens.
        queues: how many queues the guest has, at most as many as the back-end has.
    """

    implementation: ClassVar[str] = f"{VHOST}:VhostUserDiskDevice"

    socket: str
    queues: int = 1

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.socket, str) or not self.socket or "\0" in self.socket:
            raise fail("socket", self.socket, "must be the name of a Unix socket")
        if len(self.socket.encode(errors="surrogateescape")) > SOCKET_NAME:
            raise fail("socket", self.socket, f"must have at most {SOCKET_NAME} bytes (unix(7)): use a shorter path")
        whole("queues", self.queues, 1, 16)

    @property
    def has_back_end(self) -> bool:
        return True

    def wiring(self) -> Wiring:
        return Wiring(pci=_function(self.queues))
