"""A VM's dirty log, and its one owner: counts the pages that the guest wrote, and tells readers which they were."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from ...native import ffi, lib
from .ioctl import failure

__all__ = ["DirtyLog", "DirtyPages", "DirtyReader", "read_logs"]

PAGE_SHIFT = 12


@attrs.frozen
class DirtyPages:
    """Which pages were written.

    Attributes:
        regions: each range of guest memory with a bit for each of its pages: bit n%8 of byte n//8 for page n, in whole
            words of 64 bits.
    """

    regions: tuple[tuple[range, bytes], ...]

    def __len__(self) -> int:
        """The number of written pages."""
        return sum(int.from_bytes(bits, "little").bit_count() for _, bits in self.regions)

    def __iter__(self) -> Iterator[int]:
        """Their guest-physical addresses, by region and then in order."""
        for span, bits in self.regions:
            for index, byte in enumerate(bits):
                while byte:
                    bit = byte & -byte
                    yield span.start + ((index * 8 + bit.bit_length() - 1) << PAGE_SHIFT)
                    byte ^= bit


class DirtyReader:
    """Reports which pages are written, independently of all other readers. Make one with `DirtyLog.reader`.

    A context manager that closes it. One thread at a time; not two.
    """

    __slots__ = ("_handle", "_log")

    def __init__(self, log: DirtyLog, handle: Any) -> None:
        self._log = log  # its memory must outlive the reader's
        self._handle = handle

    def take(self) -> DirtyPages:
        """The pages that the guest wrote since the reader was opened or took last, and those that were written for it
        (`GuestMemory.write`). Waits for the kernel. While the guest runs it goes on writing: what it writes during the
        call may come with the next. Of a VM that has ended, all that it wrote. If a ring ran over, pages are lost, and
        every page is told.

        Raises:
            KvmError: some of the log can't be read; nothing of it is lost.
        """
        bitmap = ffi.new("uint64_t[]", lib.orc_dirty_words(self._log.handle))
        result = lib.orc_dirty_take(self._handle, bitmap)
        data, regions, start = bytes(ffi.buffer(bitmap)), [], 0
        for span in self._log.spans:
            end = start + ((len(span) >> PAGE_SHIFT) + 63) // 64 * 8
            regions.append((span, data[start:end]))
            start = end
        if result:
            raise failure(-result, "KVM_GET_DIRTY_LOG")
        return DirtyPages(tuple(regions))

    def close(self) -> None:
        """Take no more. Waits for the kernel. Done at once if it is closed already."""
        handle, self._handle = self._handle, ffi.NULL
        if handle != ffi.NULL:
            lib.orc_dirty_shut(handle)

    def __enter__(self) -> DirtyReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DirtyLog:
    """The dirty log of one VM. Any thread; a reading may overlap with a switch or with `close`.

    Attributes:
        spans: guest-physical ranges of the memory, as `DirtyPages` has them.
    """

    __slots__ = ("_slots", "handle", "spans")

    def __init__(self, vm: int, slots: Any, ring: int = 0, vcpus: Sequence[int] = ()) -> None:
        """`vm`: its descriptor. `slots`: its ``struct kvm_userspace_memory_region[]``, whose flags `log` changes.
        `ring`: entries of each vCPU's ring, if KVM was told to keep rings; `vcpus`: their descriptors.

        Raises ResourceLimit, KvmError: a ring can't be mapped.
        """
        handle = lib.orc_dirty_new(vm, slots, len(slots))
        if handle == ffi.NULL:
            raise MemoryError("orc_dirty_new")
        self.handle = ffi.gc(handle, lib.orc_dirty_free)  # a reading may outlive the VM
        self._slots = slots
        starts = [int(slot.guest_phys_addr) for slot in slots]
        sizes = [int(slot.memory_size) for slot in slots]
        self.spans = tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))
        if ring and (result := lib.orc_dirty_rings(self.handle, ring, list(vcpus), len(vcpus))):
            raise failure(-result, "mmap of a vCPU's ring of written pages")

    def log(self, on: bool) -> None:
        """Count what is written into all memory that the guest may write, or into none. Waits for the kernel, and for a
        reading in progress.

        Raises:
            ResourceLimit, KvmError: the kernel refuses; nothing has changed then.
        """
        result = lib.orc_dirty_log(self.handle, on)
        if result:
            raise failure(-result, f"KVM_SET_USER_MEMORY_REGION, to {'log' if on else 'log no more'} written pages")

    def reader(self) -> DirtyReader:
        """One more who is told which pages are written from now on, whether they are counted or not. Waits for the
        kernel. Written pages are logged as long as it is open, and the guest pays a fault for each.

        Raises:
            ResourceLimit, KvmError: the kernel refuses, or the VM has ended (EBADF); nothing has changed then.
        """
        made = ffi.new("orc_dirty_reader **")
        result = lib.orc_dirty_open(self.handle, made)
        if result:
            raise failure(-result, "KVM_SET_USER_MEMORY_REGION, to log written pages")
        return DirtyReader(self, made[0])

    def written(self, address: int, size: int) -> None:
        """The host wrote guest memory, which KVM does not see: readers are told. Any thread, after the write."""
        lib.orc_dirty_mark(self.handle, address, size)

    def sums(self) -> tuple[int, int]:
        """Pages counted by all readings so far; when the last began, 0 if there was none. At once."""
        sums = self._sums()
        return int(sums.pages), int(sums.read)

    @property
    def on(self) -> bool:
        """Whether pages of any of the memory are counted."""
        return bool(self._sums().on)

    def _sums(self) -> Any:
        sums = ffi.new("struct orc_dirty_sums *")
        lib.orc_dirty_sums(self.handle, sums)
        return sums

    def close(self) -> None:
        """Before the VM's descriptor is closed: nothing is read from now on. The sums stay, and so does what readers
        have not taken."""
        lib.orc_dirty_close(self.handle)


def read_logs(logs: Sequence[DirtyLog]) -> str | None:
    """Count what was written, in one log after the other, in one call into the core. Waits for the kernel. What went
    wrong, if anything."""
    result = lib.orc_dirty_read([log.handle for log in logs], len(logs))
    return f"KVM_GET_DIRTY_LOG: {errno.errorcode.get(-result, -result)}" if result else None
