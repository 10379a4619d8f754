"""A disk: which file has its bytes, its name, and how fast it may be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Final, Literal

import attrs

from .checks import fail, whole
from .devices import DeviceSpec, Wiring
from .errors import SpecError
from .iolimit import IoLimit, optional_io_limit
from .pci import PciFunction
from .virtio import function

__all__ = ["Disk", "VhostUserDisk", "disks_of"]

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LETTERS: Final = 26
VHOST: Final = "orchestra.machine.devices.vhost.device"
SOCKET_NAME: Final = 107
"""Bytes of a Unix socket's name, the terminating zero left out."""


def _function(queues: int) -> PciFunction:
    return function(2, 0x010000, queues=queues, config_size=60)  # a storage controller: SCSI, as others say


@attrs.frozen
class Disk(DeviceSpec):
    """A disk of an image or a block device, ``/dev/vda`` in Linux (virtio-blk).

    The file is locked while a VM has it: shared by those that only read it, else by one VM alone.

    Parameters:
        path: the image or block device. With `base`, the file for what is written, which is made if it is not there.
        readonly: the guest can't write.
        direct: past the host's page cache (``O_DIRECT``).
        base: a raw image that many disks may share and none changes. Blocks that the guest writes go to `path`.
        io_limit: how fast it may be; None: as fast as the host's. `Vm.disks` changes it while the VM runs. Not of a
            qcow2 image.
        io_group: the group of disks that share a limit: one of `FleetSpec.io_groups`. None: none. Not of a qcow2 image.
        name: unique among the disks of its VM (`Vm.disks`). None: the name that Linux gives it: "vda", "vdb" and so on,
            by its place among the disks.
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
    io_group: str | None = None
    name: str | None = None
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
        optional_io_limit("io_limit", self.io_limit)
        for name in ("io_group", "name"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and NAME.fullmatch(value)):
                raise fail(name, value, "must be 1 to 64 letters, digits, '.', '_' or '-', or None")
        if self.format not in (None, "raw", "qcow2"):
            raise fail("format", self.format, 'must be "raw" or "qcow2", or None for raw')
        if self.format == "qcow2" and self.base is not None:
            raise SpecError("base: a qcow2 image names its backing file itself: make it with `qemu-img create -b`")
        for name in ("io_limit", "io_group"):
            if self.format == "qcow2" and getattr(self, name) is not None:
                raise SpecError(f'{name}: format="qcow2" has none: leave it out, or convert the image to raw')

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


def disks_of(devices: Iterable[DeviceSpec]) -> dict[str, Disk]:
    """The disks that orchestra serves among some devices, by name, in their order. Names count the others as well.

    Raises:
        SpecError: two of them have one name.
    """
    found: dict[str, Disk] = {}
    for number, disk in enumerate(device for device in devices if isinstance(device, Disk | VhostUserDisk)):
        if isinstance(disk, VhostUserDisk):
            continue
        name = disk.name or _name_in_linux(number)
        if name in found:
            raise SpecError(
                f"devices: disks {found[name].path!r} and {disk.path!r} are both named {name!r}: give each another name"
            )
        found[name] = disk
    return {name: disk for name, disk in found.items() if not disk.has_back_end}


def _name_in_linux(number: int) -> str:
    """As drivers/scsi/sd.c names disks, and drivers/block/virtio_blk.c likewise: vda to vdz, vdaa, and so on."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, LETTERS)
        letters = chr(ord("a") + letter) + letters
    return f"vd{letters}"
