"""A disk: which file has its bytes, its name, and how fast it may be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Final

import attrs

from .checks import fail
from .devices import DeviceSpec, Wiring
from .errors import SpecError
from .iolimit import IoLimit, optional_io_limit
from .virtio import function

__all__ = ["Disk", "disks_of"]

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LETTERS: Final = 26


@attrs.frozen
class Disk(DeviceSpec):
    """A disk of a raw image or a block device, ``/dev/vda`` in Linux (virtio-blk).

    The file is locked while a VM has it: shared by those that only read it, else by one VM alone.

    Parameters:
        path: the image or block device. With `base`, the file for what is written, which is made if it is not there.
        readonly: the guest can't write.
        direct: past the host's page cache (``O_DIRECT``).
        base: a raw image that many disks may share and none changes. Blocks that the guest writes go to `path`.
        io_limit: how fast it may be; None: as fast as the host's. `Vm.disks` changes it while the VM runs.
        io_group: the group of disks that share a limit: one of `FleetSpec.io_groups`. None: none.
        name: unique among the disks of its VM (`Vm.disks`). None: the name that Linux gives it: "vda", "vdb" and so on,
            by its place among the disks.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.disk:DiskDevice"

    path: str
    readonly: bool = False
    direct: bool = False
    base: str | None = None
    io_limit: IoLimit | None = None
    io_group: str | None = None
    name: str | None = None

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

    def wiring(self) -> Wiring:
        return Wiring(pci=function(2, 0x010000, queues=1, config_size=60))  # a storage controller: SCSI, as others say


def disks_of(devices: Iterable[DeviceSpec]) -> dict[str, Disk]:
    """The disks among some devices, by name, in their order.

    Raises:
        SpecError: two of them have one name.
    """
    found: dict[str, Disk] = {}
    for number, disk in enumerate(device for device in devices if isinstance(device, Disk)):
        name = disk.name or _name_in_linux(number)
        if name in found:
            raise SpecError(
                f"devices: disks {found[name].path!r} and {disk.path!r} are both named {name!r}: give each another name"
            )
        found[name] = disk
    return found


def _name_in_linux(number: int) -> str:
    """As drivers/scsi/sd.c names disks, and drivers/block/virtio_blk.c likewise: vda to vdz, vdaa, and so on."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, LETTERS)
        letters = chr(ord("a") + letter) + letters
    return f"vd{letters}"
