"""Channels of the core, which hold the exits that subscribers have yet to receive, and batches of records as
columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from struct import calcsize
from types import MappingProxyType
from typing import Any, Final, overload

from ..model.errors import ResourceLimit
from ..model.exits import Exit
from . import ffi, lib
from .core import FleetCore
from .records import KINDS, RECORD_SIZE, decode_all

__all__ = ["EVERY_VM", "NO_VM", "Channel", "ExitBatch"]

EVERY_VM: Final = int(lib.ORC_EVERY_VM)
NO_VM: Final = int(lib.ORC_NO_VM)


class Channel:
    """A bounded queue of records, filled by `FleetCore.deliver`. Fleet's thread.

    No Python runs while a channel is filled: C code checks which exits it wants (`mask`, as `event_mask` makes it, and
    `vm`, a number of `VcpuCore.set_name`).
    """

    __slots__ = ("_fleet", "_handle")

    def __init__(self, fleet: FleetCore, mask: int, vm: int, capacity: int, *, drop_oldest: bool) -> None:
        handle = lib.orc_channel_new(fleet.handle, mask, vm, capacity, drop_oldest)
        if handle == ffi.NULL:
            raise ResourceLimit(
                ffi.errno,
                f"capacity={capacity}: {os.strerror(ffi.errno)}: ask for fewer exits, or see ulimit -v and "
                "vm.max_map_count",
            )
        self._handle: Any = ffi.gc(handle, lib.orc_channel_free)
        self._fleet = fleet
        fleet.channels.add(self)

    @property
    def received(self) -> int:
        """Exits that came to the channel."""
        return int(self._handle.received)

    @property
    def missed(self) -> int:
        """Exits that were dropped because the channel was full."""
        return int(self._handle.missed)

    @property
    def waiting(self) -> int:
        return int(self._handle.waiting)

    def follow(self, vm: int) -> None:
        """Take the exits of that VM from now on, and of no other."""
        self._handle.vm = vm

    def take(self, most: int) -> bytes:
        """Take the oldest records that wait, `most` at most: raw `struct orc_record`."""
        most = min(most, self._handle.waiting)
        records = ffi.new("struct orc_record[]", most)
        lib.orc_channel_take(self._handle, records, most)
        return bytes(ffi.buffer(records))

    def drop(self) -> None:
        """Drop the records that wait, and count them as missed."""
        lib.orc_channel_drop(self._handle)

    def end(self) -> None:
        """Let no more exits come. The records that wait can still be taken."""
        lib.orc_channel_end(self._handle)
        self._fleet.channels.discard(self)


class ExitBatch(Sequence[Exit]):
    """Consecutive exits as columns: for each field an array with an element for each exit.

    A column is a read-only, contiguous memoryview over a buffer of its own. The core makes a column at its first use
    (``numpy.frombuffer(batch.time, "u8")`` copies nothing). As a sequence, a batch has the exits themselves, and makes
    each exit when it is read: ``for exit in batch``, ``batch[0]``.

    Attributes:
        vms: the names of the VMs in it, by the numbers in `vm`.
    """

    KINDS: Final = KINDS
    """The numbers in `kind` → types of exits. What has no entry is an `OtherExit`."""

    __slots__ = ("_columns", "_records", "vms")

    def __init__(self, records: bytes, names: Mapping[int, str]) -> None:
        """`names`: of the VMs, by number; those in `records` are kept."""
        size = len(records) // RECORD_SIZE
        found = ffi.new("uint32_t[]", size)
        known = lib.orc_records_vms(ffi.from_buffer("struct orc_record[]", records), size, found)
        self._records = records
        self._columns: dict[int, memoryview] = {}
        self.vms: Mapping[int, str] = MappingProxyType({vm: names[vm] for vm in ffi.unpack(found, known)})

    def _column(self, number: int, format: str, width: int = 1) -> memoryview:
        made: memoryview | None = self._columns.get(number)
        if made is None:
            size = len(self)
            bytes_each = calcsize(format) * width
            buffer = bytearray(size * bytes_each)
            records = ffi.from_buffer("struct orc_record[]", self._records)
            lib.orc_records_column(records, size, number, ffi.from_buffer(buffer))
            view: Any = memoryview(buffer).toreadonly()
            made = view.cast(format, (size, width)) if width > 1 and size else view.cast(format)
            self._columns[number] = made
        return made

    @property
    def time(self) -> memoryview:
        """Nanoseconds on CLOCK_MONOTONIC, as `Exit.time` (format Q)."""
        return self._column(lib.ORC_COLUMN_TIME, "Q")

    @property
    def vm(self) -> memoryview:
        """The number of the VM, which no other VM of the fleet has or had (format I). `vms` has the names."""
        return self._column(lib.ORC_COLUMN_VM, "I")

    @property
    def vcpu(self) -> memoryview:
        """The number of the vCPU (format I)."""
        return self._column(lib.ORC_COLUMN_VCPU, "I")

    @property
    def kind(self) -> memoryview:
        """The kernel's number of the exit reason (format H). `KINDS` has the types."""
        return self._column(lib.ORC_COLUMN_KIND, "H")

    @property
    def rip(self) -> memoryview:
        """The instruction pointer (format Q); 0 where `has_rip` is false."""
        return self._column(lib.ORC_COLUMN_RIP, "Q")

    @property
    def has_rip(self) -> memoryview:
        """Whether the instruction pointer was sampled (format ?)."""
        return self._column(lib.ORC_COLUMN_HAS_RIP, "?")

    @property
    def wait(self) -> memoryview:
        """Nanoseconds that the guest has to wait for this exit, as `Exit.wait` (format Q)."""
        return self._column(lib.ORC_COLUMN_WAIT, "Q")

    @property
    def bus_lock(self) -> memoryview:
        """Whether the exit reports a bus lock (format ?)."""
        return self._column(lib.ORC_COLUMN_BUS_LOCK, "?")

    @property
    def guest_mode(self) -> memoryview:
        """Whether a guest of the guest exited (format ?)."""
        return self._column(lib.ORC_COLUMN_GUEST_MODE, "?")

    @property
    def smm(self) -> memoryview:
        """Whether the vCPU was in system management mode (format ?)."""
        return self._column(lib.ORC_COLUMN_SMM, "?")

    @property
    def address(self) -> memoryview:
        """The port of an `Io`, the address of an `Mmio`; of other kinds, their first field (format Q)."""
        return self._column(lib.ORC_COLUMN_ADDRESS, "Q")

    @property
    def size(self) -> memoryview:
        """Bytes of an element of an `Io` or an `Mmio`; of other kinds, their second field (format Q)."""
        return self._column(lib.ORC_COLUMN_SIZE, "Q")

    @property
    def write(self) -> memoryview:
        """Whether it is an `Io` or an `Mmio` by which the guest writes (format ?)."""
        return self._column(lib.ORC_COLUMN_WRITE, "?")

    @property
    def arguments(self) -> memoryview:
        """The kind's own fields as numbers, in its class's order: five for each exit (format Q, two dimensions)."""
        return self._column(lib.ORC_COLUMN_ARGUMENTS, "Q", 5)

    @property
    def data(self) -> memoryview:
        """What was written, 32 bytes for each exit (format B, two dimensions); `data_size` says how many are meant."""
        return self._column(lib.ORC_COLUMN_DATA, "B", 32)

    @property
    def data_size(self) -> memoryview:
        """How many bytes of `data` the exit has (format B)."""
        return self._column(lib.ORC_COLUMN_DATA_SIZE, "B")

    def __len__(self) -> int:
        return len(self._records) // RECORD_SIZE

    @overload
    def __getitem__(self, index: int) -> Exit: ...
    @overload
    def __getitem__(self, index: slice) -> ExitBatch: ...
    def __getitem__(self, index: int | slice) -> Exit | ExitBatch:
        if isinstance(index, slice):
            return ExitBatch(b"".join(map(self._record, range(len(self))[index])), self.vms)
        return decode_all(self._record(range(len(self))[index]), self.vms)[0]

    def _record(self, index: int) -> bytes:
        return self._records[index * RECORD_SIZE : (index + 1) * RECORD_SIZE]

    def __iter__(self) -> Iterator[Exit]:
        return iter(decode_all(self._records, self.vms))

    def __repr__(self) -> str:
        return f"<ExitBatch of {len(self)} exits of {', '.join(self.vms.values()) or 'nobody'}>"
