"""The virtio devices whose queues a vhost-user back-end serves.

Another kind of device is another class beside `BlockDevice`: its number, the size of its configuration, and features
that its driver may have.
"""

from __future__ import annotations

import socket
from typing import ClassVar, Final, TypeVar

from ....model.devices import DeviceSpec
from ....model.disk import Disk, VhostUserDisk
from ....model.errors import FileError, SpecError, VhostUserError
from ....native import lib
from ..peripheral import Hooks
from ..virtio import VirtioFunction, VirtioState
from . import qemu
from .backend import BackEnd, Connection
from .lending import Lendable, fire
from .messages import RamRegion

__all__ = ["QcowDevice", "VhostUserDiskDevice"]

SpecT = TypeVar("SpecT", bound=DeviceSpec)

QUEUE: Final = 128
"""Entries of a queue at most, as of the core's own disks, and what QEMU's back-end expects."""

RING_FEATURES: Final = 1 << 28 | 1 << 29 | 1 << 32
"""VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_F_VERSION_1 (virtio 1.2, 6)."""

BLOCK: Final = 2
BLOCK_CONFIG: Final = 60
BLOCK_FEATURES: Final = sum(1 << bit for bit in (1, 2, 4, 5, 6, 9, 10, 12, 13, 14))
"""virtio 1.2, 5.2.3: SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES. Without
CONFIG_WCE: the guest does not write the configuration."""
NUM_QUEUES: Final = slice(34, 36)  # 5.2.4
SECTOR: Final = 512

CONNECT: Final = 10.0
"""Seconds until a socket takes the connection. One whose program does not accept has a full queue."""


class VhostUserDevice(VirtioFunction[SpecT]):
    """A device of a back-end, which was connected before the machine was made (`prepare`)."""

    TYPE: ClassVar[int]
    FEATURES: ClassVar[int]

    def __init__(self, spec: SpecT, hooks: Hooks) -> None:
        assert hooks.back_end is not None  # its spec `has_back_end`
        assert hooks.ram is not None
        self._back_end: BackEnd = hooks.back_end
        self._ram = hooks.ram
        super().__init__(spec, hooks)
        self._back_end.serve(
            Lendable(
                handle=self.handle,
                owner=self.native,
                kicks=[bell.fd for bell in hooks.bells],
                calls=[msi.fd for msi in hooks.msis],
                memory=self._ram.descriptor,
                regions=[RamRegion(*region) for region in self._ram.regions],
                read=hooks.memory.read,
                deliver=self._deliver,
                end=hooks.end,
            )
        )

    @classmethod
    def prepare(cls, spec: SpecT) -> BackEnd:
        """Connect to the back-end. On a thread that may wait.

        Raises:
            OrchestraError: there is none, or it can't do what is needed.
        """
        raise NotImplementedError

    def _config(self) -> bytes:
        """The device's configuration, as the guest sees it."""
        return self._back_end.config

    def _make(self) -> object:
        queues, config = len(self.hooks.bells), self._config()
        features = self._back_end.features & (self.FEATURES | RING_FEATURES)
        return lib.orc_virtio_lent_new(self._ram.guest, self.TYPE, queues, QUEUE, features, config, len(config))

    @property
    def outstanding(self) -> int | None:
        """How many of its requests are in flight. None: some may be, until the back-end has given the queues back."""
        return 0 if self._back_end.is_still else None

    def _deliver(self, vector: int) -> bool:
        return self.hooks.msis[vector].deliver()

    def interrupts_changed(self) -> None:
        super().interrupts_changed()
        fire(self.handle, self._deliver)  # at once: once the vCPU is back in its guest, or paused, nothing is owed
        self._back_end.look()

    def reset(self) -> None:
        super().reset()
        self._back_end.look()

    def restore(self, state: VirtioState) -> None:
        super().restore(state)
        self._back_end.look()


class BlockDevice(VhostUserDevice[SpecT]):
    """A disk."""

    TYPE = BLOCK
    FEATURES = BLOCK_FEATURES

    def _config(self) -> bytes:
        config = bytearray(self._back_end.config)
        config[NUM_QUEUES] = len(self.hooks.bells).to_bytes(2, "little")
        return bytes(config)

    def restore(self, state: VirtioState) -> None:
        had, has = (int.from_bytes(config[:8], "little") for config in (state.config, self.state().config))
        if had != has:  # the guest has read it, and does not look again
            raise SpecError(
                f"{type(self.spec).__name__}: its state is of a disk of {had * SECTOR} bytes, not {has * SECTOR}"
            )
        super().restore(state)


class QcowDevice(BlockDevice[Disk]):
    """A qcow2 image, by a qemu-storage-daemon of its own."""

    @classmethod
    def prepare(cls, spec: Disk) -> BackEnd:
        return BackEnd(f"disk {spec.path}", lambda: qemu.connect(spec), BLOCK_CONFIG)


class VhostUserDiskDevice(BlockDevice[VhostUserDisk]):
    """A disk that somebody else's back-end serves."""

    @classmethod
    def prepare(cls, spec: VhostUserDisk) -> BackEnd:
        back_end = BackEnd(f"disk at {spec.socket}", lambda: _connect(spec.socket), BLOCK_CONFIG)
        if back_end.queues < spec.queues:
            back_end.close()
            raise VhostUserError(f"disk at {spec.socket}: queues={spec.queues}: its back-end has {back_end.queues}")
        return back_end


def _connect(path: str) -> Connection:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(CONNECT)
        made.connect(path)
    except OSError as error:
        made.close()
        raise FileError(
            f"{path}: no vhost-user back-end listens there ({error.strerror or error}): start it before the VM"
        ) from error
    return Connection(made)
