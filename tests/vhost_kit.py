"""Both sides of a vhost-user device for tests: a guest's driver of a disk in a `DeviceRig`, and a scripted back-end.

rig = DeviceRig(orc.Disk(..., format="qcow2"));  driver = DiskDriver(rig);  driver.start();  driver.write(0, bytes(512))
with ScriptedBackEnd(path) as back_end: ...      a real socket, which answers as `answer` says
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestra.machine.devices.vhost.messages import HEADER, Protocol, Request
from orchestra.model import virtio
from orchestra.testing import DeviceRig

STATUS, SELECT, SIZE, MSIX, ENABLE, DESC, AVAIL, USED = 20, 22, 24, 26, 28, 32, 40, 48  # virtio 1.2, 4.1.4.3
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
READ, WRITE, FLUSH = 0, 1, 4
COMMAND, MEMORY_SPACE, BUS_MASTER = 4, 2, 4  # of the configuration space
PATIENCE = 60.0


class DiskDriver:
    """A driver of one queue, in a rig's memory from 64 KiB on."""

    def __init__(self, rig: DeviceRig, *, base: int = 0x10000, size: int = 16) -> None:
        self.rig, self.size = rig, size
        self.descriptors, self.available, self.used = base, base + 0x1000, base + 0x2000
        self.header, self.data = base + 0x3000, base + 0x4000
        self.next = self.seen = 0

    def negotiate(self, features: int = 1 << 32 | 1 << 9) -> int:
        rig = self.rig
        rig.write(STATUS, 0, 1)
        rig.write(STATUS, ACKNOWLEDGE | DRIVER, 1)
        offered = 0
        for half in range(2):
            rig.write(0, half, 4)
            offered |= rig.read(4, 4) << 32 * half
            rig.write(8, half, 4)
            rig.write(12, features >> 32 * half & 0xFFFFFFFF, 4)
        rig.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK, 1)
        return offered

    def start(self, vector: int = 1) -> None:
        rig = self.rig
        rig.configure(COMMAND, MEMORY_SPACE | BUS_MASTER, 2)
        self.negotiate()
        self.next = self.seen = 0
        rig.memory.write(self.descriptors, bytes(0x3000))
        for offset, value, width in (
            (SELECT, 0, 2),
            (SIZE, self.size, 2),
            (MSIX, vector, 2),
            (DESC, self.descriptors, 8),
            (AVAIL, self.available, 8),
            (USED, self.used, 8),
            (ENABLE, 1, 2),
            (STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, 1),
        ):
            rig.write(offset, value, width)

    def offer(self, kind: int, sector: int, size: int = 0) -> None:
        """Make a request available, and ring."""
        memory, writes = self.rig.memory, kind == READ
        memory.write(self.header, struct.pack("<IIQ", kind, 0, sector) + b"\xff")
        chain = [(self.header, 16, 1), (self.data, size, 1 | 2 * writes), (self.header + 16, 1, 2)]
        chain = [part for part in chain if part[1]]
        for place, (address, length, flags) in enumerate(chain):
            memory.write(self.descriptors + 16 * place, struct.pack("<QIHH", address, length, flags, place + 1))
        memory.write(self.available + 4 + 2 * (self.next % self.size), bytes(2))
        self.next += 1
        memory.write(self.available + 2, struct.pack("<H", self.next & 0xFFFF))
        os.eventfd_write(self.rig.bells[0].fd, 1)

    def finished(self, within: float = PATIENCE) -> int:
        """Wait for the interrupt of the last request. Returns the status that the device wrote."""
        vector = self.rig.msis[1].fd
        while self.used_index() == self.seen & 0xFFFF:
            if not select.select([vector], [], [], within)[0]:
                raise TimeoutError("no interrupt")
            os.eventfd_read(vector)
        self.seen += 1
        return self.rig.memory.read(self.header + 16, 1)[0]

    def used_index(self) -> int:
        return int.from_bytes(self.rig.memory.read(self.used + 2, 2), "little")

    def write(self, sector: int, data: bytes) -> int:
        self.rig.memory.write(self.data, data)
        self.offer(WRITE, sector, len(data))
        return self.finished()

    def read(self, sector: int, size: int) -> bytes:
        self.offer(READ, sector, size)
        assert self.finished() == 0
        return self.rig.memory.read(self.data, size)

    def flush(self) -> int:
        self.offer(FLUSH, 0)
        return self.finished()

    @property
    def status(self) -> int:
        return self.rig.read(STATUS, 1)

    def reset(self) -> None:
        self.rig.write(STATUS, 0, 1)

    @property
    def sectors(self) -> int:
        return self.rig.read(virtio.DEVICE, 8)


Answer = Callable[["ScriptedBackEnd", int, bytes], "bytes | None"]


class ScriptedBackEnd:
    """A back-end at a socket. It answers as a good one does, unless `answer` gives other bytes for a request. `b""`: it
    does not answer.

    Attributes:
        seen: the requests, in their order.
        tables: payloads of SET_MEM_TABLE, each with how many descriptors came along.
        closed: set when the front-end has closed the connection.
    """

    def __init__(self, path: Path, answer: Answer = lambda *_: None, *, sectors: int = 128, queues: int = 1) -> None:
        self.path, self.answer, self.sectors, self.queues = path, answer, sectors, queues
        self.features = 1 << 32 | 1 << 30 | 1 << 9
        self.protocol = int(Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIG | Protocol.STATUS)
        self.seen: list[int] = []
        self.payloads: list[tuple[int, bytes, int]] = []
        self.fds: dict[int, int] = {}  # by request: the last descriptor that came with it
        self.bases: dict[int, int] = {}
        self.changed, self.closed = threading.Condition(), threading.Event()
        self.connection: socket.socket | None = None
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> ScriptedBackEnd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        self._thread.join()
        self._listening.close()
        for fd in self.fds.values():
            os.close(fd)

    def hang_up(self) -> None:
        if self.connection is not None:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def wait_for(self, kind: Request, times: int = 1) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.seen.count(kind) >= times, PATIENCE), (kind, self.seen)

    def _run(self) -> None:
        while True:
            try:
                self.connection, _ = self._listening.accept()
            except OSError:
                return
            with self.connection, suppress(OSError):
                while self._serve(self.connection):
                    pass
            self.closed.set()

    def _serve(self, connection: socket.socket) -> bool:
        head, fds, _, _ = socket.recv_fds(connection, HEADER.size, 8)
        if len(head) < HEADER.size:
            return False
        kind, flags, size = HEADER.unpack(head)
        payload = b""
        while len(payload) < size:
            payload += connection.recv(size - len(payload))
        for fd in fds:
            if kind in self.fds:
                os.close(self.fds[kind])
            self.fds[kind] = fd
        given = self.answer(self, kind, payload)
        reply = self._good(kind, flags, payload) if given is None else given
        with self.changed:  # the script has decided; the front-end has no answer yet
            self.seen.append(kind)
            self.payloads.append((kind, payload, len(fds)))
            self.changed.notify_all()
        connection.sendall(reply)
        return True

    def _good(self, kind: int, flags: int, payload: bytes) -> bytes:
        match kind:
            case Request.GET_FEATURES:
                return number(kind, self.features)
            case Request.GET_PROTOCOL_FEATURES:
                return number(kind, self.protocol)
            case Request.GET_QUEUE_NUM:
                return number(kind, self.queues)
            case Request.GET_CONFIG:
                content = struct.pack("<Q", self.sectors).ljust(len(payload) - 12, b"\0")
                return reply(kind, payload[:12] + content)
            case Request.SET_VRING_BASE:
                index, base = struct.unpack("<II", payload)
                self.bases[index] = base
            case Request.GET_VRING_BASE:
                index = struct.unpack("<II", payload)[0]
                return reply(kind, struct.pack("<II", index, self.bases.get(index, 0)))
        return number(kind, 0) if flags & 8 else b""


def reply(kind: int, payload: bytes, flags: int = 5) -> bytes:
    return HEADER.pack(kind, flags, len(payload)) + payload


def number(kind: int, value: int) -> bytes:
    return reply(kind, struct.pack("<Q", value))


def descriptors() -> set[str]:
    """All open descriptors of this process, by what they are."""
    found: list[Any] = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return set(found)


def children(pid: int) -> list[int]:
    """The processes that a process has begun, and that it has not waited for."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
