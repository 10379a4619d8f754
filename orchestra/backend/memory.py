"""Guest memory: its pages, and the only way to read and write them, which checks each access.

    anonymous     pages of this process alone
    shared        a memfd: `GuestMemory.descriptor` can be handed to other processes
    file          private pages over a file, given by name or as a descriptor (a template, a snapshot's memory)

The guest may change its memory at any moment, also between two reads of the host. So code that takes a value from guest
memory reads it once (`read` and `unpack` copy), checks the copy, and never reads the value again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import attrs

from ..model.errors import FileError, GuestMemoryError, ResourceLimit
from ..model.memory import HUGE_PAGE, Memory
from ..model.mistakes import shown
from ..model.spec import VmSpec
from ..native import ffi, lib

__all__ = ["Backing", "GuestMemory", "Part", "Region", "unmap"]

Backing: TypeAlias = Literal["anonymous", "shared", "file"]

# What Python has no names for, with x86-64's values (asm-generic/mman-common.h, linux/mman.h, linux/memfd.h).
_MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_HUGE_2MB: Final = 0x40000 | 21 << 26  # MAP_HUGETLB, of 2^21 bytes
_MFD_HUGE_2MB: Final = 0x0004 | 21 << 26
_HUGE_POOL: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")

# Python keeps a duplicate of a descriptor that it maps; from 3.13 on an argument prevents that.
_UNTRACKED: Final[dict[str, Any]] = {"trackfd": False} if sys.version_info >= (3, 13) else {}

ZAPPED: Final = 4 << 20
"""Bytes that are given back in one call, half a millisecond of work. While the kernel unmaps, every other thread of
this process waits that maps something, as KVM_CREATE_VM and each launch do, and then every thread that touches a new
page. Between two calls these threads get their turn."""


@attrs.define(eq=False)
class Region:
    """One mapping. `host` is its address in this process, for the backend."""

    span: range
    mapping: mmap.mmap
    view: Any  # cffi's buffer over the mapping. It pins the mapping, and must be released first
    readonly: bool = False
    log_dirty: bool = False
    blank: bool = True  # it was zeros when it was made

    @property
    def host(self) -> int:
        return int(ffi.cast("uintptr_t", self.view))

    def drop(self) -> None:
        """Unmap the region in one piece."""
        ffi.release(self.view)
        self.mapping.close()


class Part(NamedTuple):
    """A part of a region, by its offset."""

    region: Region
    start: int
    size: int

    def populate(self) -> None:
        """Have the host give its pages now. What is there stays. Any thread, while the memory is not unmapped.

        Raises:
            ResourceLimit: the host has no more.
        """
        if result := lib.orc_populate(self.region.view + self.start, self.size):
            raise ResourceLimit(-result, f"memory: prefault=True: the host gives no more ({os.strerror(-result)})")


class GuestMemory:
    """The memory of one VM. Closing it unmaps; no access is possible afterwards.

    Reads and writes are copies and not atomic against a running guest, as with any VMM.

    Parameters:
        spec: the VM; RAM and regions are as its spec says.
        template: a descriptor with the first contents of the RAM, in the order of the addresses; the VM gets private
            pages over it. The caller keeps the descriptor, and may close it. None: as the spec says.

    Raises:
        ResourceLimit: the host has not that much memory, or huge pages; the message names the limit.
        FileError: the file can't be read, is no regular file, or is too short.
    """

    def __init__(self, spec: VmSpec, template: int | None = None) -> None:
        self.regions: list[Region] = []
        # Called with address and size after each write from outside: an engine that executes translated code must know.
        self.on_write: Callable[[int, int], object] | None = None
        self._descriptor = -1
        try:
            if template is None:
                self._map_ram(spec)
            else:
                self._map_file(spec, template, f"descriptor {template}")
            for region in spec.regions:
                log_dirty = region.log_dirty or (spec.log_dirty and not region.readonly)
                self._map(region.span, readonly=region.readonly, log_dirty=log_dirty)
                self.write(region.address, region.contents)
        except BaseException:
            for made in self.detach():
                made.drop()  # in one piece: hardly a page was touched
            raise

    # ---- making

    def _map_ram(self, spec: VmSpec) -> None:
        memory = spec.backing
        if memory.backing == "file":
            assert memory.path is not None
            with _opened(memory.path) as file:
                self._map_file(spec, file, memory.path)
            return
        if memory.backing == "shared":
            self._descriptor = _memfd(memory, spec.name)
        offset = 0
        for span in spec.ram:
            self._map(span, log_dirty=spec.log_dirty, huge=memory.huge_pages, file=self._descriptor, offset=offset)
            self._advise(memory, spec.boot.huge_pages)
            offset += len(span)

    def _map_file(self, spec: VmSpec, file: int, name: str) -> None:
        """RAM of private pages over a file."""
        _check_file(file, name, spec.backing.size)
        offset = 0
        for span in spec.ram:
            self._map(span, log_dirty=spec.log_dirty, file=file, offset=offset, private=True)
            self._advise(spec.backing, wished=False)  # its pages are those of the file
            offset += len(span)

    def _map(
        self,
        span: range,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
        huge: bool = False,
        file: int = -1,
        offset: int = 0,
        private: bool = False,
    ) -> None:
        more: dict[str, Any] = {}
        if file < 0:
            # The kernel need not reserve small pages before they are used. Huge pages must be reserved: the first touch
            # of a huge page that is missing ends the process (SIGBUS).
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_HUGE_2MB if huge else _MAP_NORESERVE)
        else:
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE if private else mmap.MAP_SHARED
            more = {"offset": offset, **_UNTRACKED}
        try:
            mapping = mmap.mmap(file, len(span), flags=flags, **more)
        except (OSError, OverflowError, ValueError) as error:
            raise _no_memory(len(span), huge, error) from error
        self.regions.append(Region(span, mapping, ffi.from_buffer(mapping), readonly, log_dirty, not private))

    def _advise(self, memory: Memory, wished: bool) -> None:
        """Whether the region that was mapped last may have transparent huge pages.

        Parameters:
            wished: the boot spec's wish, where the memory's says nothing. Without any, the guest works as well.
        """
        wanted = memory.transparent_huge_pages
        if wanted is None and (memory.huge_pages or not wished):
            return
        region = self.regions[-1]
        advice = mmap.MADV_NOHUGEPAGE if wanted is False else mmap.MADV_HUGEPAGE
        if lib.madvise(region.view, len(region.span), advice) and wanted:
            raise ResourceLimit(
                ffi.errno,
                "memory: transparent_huge_pages=True: this kernel has none (CONFIG_TRANSPARENT_HUGEPAGE): leave it out",
            )

    # ---- access

    def _pieces(self, address: int, size: int) -> Iterator[tuple[Region, int, int]]:
        """The regions under a range, each with offset and length in it."""
        if not isinstance(address, int) or not isinstance(size, int) or address < 0 or size < 0:
            raise GuestMemoryError(f"address={address!r}, size={size!r}: must be whole numbers, not negative")
        while size:
            region = next((region for region in self.regions if address in region.span), None)
            if region is None:
                where = (
                    ", ".join(f"{r.span.start:#x}-{r.span.stop - 1:#x}" for r in self.regions)
                    or "nowhere: it is released"
                )
                raise GuestMemoryError(f"address {address:#x}, {size} bytes: outside the guest's memory ({where})")
            length = min(size, region.span.stop - address)
            yield region, address - region.span.start, length
            address += length
            size -= length

    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes at guest-physical `address`, each of them once.

        Raises:
            GuestMemoryError: not all of the range is memory, or the memory is released.
        """
        pieces = list(self._pieces(address, size))  # look all up, or raise, before anything is copied
        return b"".join(region.mapping[offset : offset + length] for region, offset, length in pieces)

    def unpack(self, layout: struct.Struct, address: int) -> tuple[Any, ...]:
        """A structure at `address`, unpacked from one copy. The caller still has to check its fields.

        Raises:
            GuestMemoryError: as `read`.
        """
        return layout.unpack(self.read(address, layout.size))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to guest-physical `address`. Read-only regions are so for the guest, not for you.

        Raises:
            GuestMemoryError: not all of the range is memory; nothing was written then.
            TypeError: `data` are no bytes.
        """
        try:
            data = bytes(memoryview(data))  # not bytes(5), which would be five zeros
        except TypeError:
            raise TypeError(f"data={shown(data)}: must be bytes") from None
        done = 0
        for region, offset, length in list(self._pieces(address, len(data))):
            region.mapping[offset : offset + length] = data[done : done + length]
            done += length
        on_write = self.on_write  # read once: the end of the run, on another thread, takes it away
        if on_write is not None and done:
            on_write(address, done)

    def read_file(self, address: int, size: int, file: int, offset: int) -> int:
        """Read `size` bytes of an open file to guest-physical `address`, without a copy in between.

        Returns how many bytes there were: fewer than `size` only if the file ends.

        Raises:
            GuestMemoryError: not all of the range is memory; nothing was written then.
            OSError: the file can't be read.
        """
        done = 0
        for region, start, length in list(self._pieces(address, size)):
            stop = done + length
            with memoryview(region.mapping) as whole, whole[start : start + length] as part:
                while done < stop:
                    with part[length - (stop - done) :] as rest:
                        got = os.preadv(file, [rest], offset + done)
                    done += got
                    if not got:
                        break
            if done < stop:
                break
        if self.on_write is not None and done:
            self.on_write(address, done)
        return done

    def zero(self, address: int, size: int) -> None:
        """Make a range zeros. Memory that nothing was written to is not touched if it is zeros from the start.

        Raises:
            GuestMemoryError: not all of the range is memory; nothing was written then.
        """
        for region, start, length in list(self._pieces(address, size)):
            if not region.blank:
                region.mapping[start : start + length] = bytes(length)

    def parts(self, step: int) -> Iterator[Part]:
        """All memory in parts of at most `step` bytes."""
        for region in self.regions:
            for start in range(0, len(region.span), step):
                yield Part(region, start, min(step, len(region.span) - start))

    # ---- descriptor, and the end

    @property
    def descriptor(self) -> int | None:
        """The memfd of shared RAM, which has the ranges of the RAM one after the other. It can't shrink or grow. None:
        the RAM is not shared, or released. It is closed with the memory: duplicate it to keep it."""
        return self._descriptor if self._descriptor >= 0 else None

    @property
    def backing(self) -> Backing:
        """What the pages of the RAM are: "file" also over a template, whatever the spec says."""
        if self.descriptor is not None:
            return "shared"
        return "anonymous" if all(region.blank for region in self.regions) else "file"

    def spans(self) -> Iterable[range]:
        return (region.span for region in self.regions)

    @property
    def released(self) -> bool:
        return not self.regions

    def detach(self) -> list[Region]:
        """End all access. Returns the regions that are left to `unmap`, on any thread."""
        regions, self.regions = self.regions, []
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)  # the pages stay until the last mapping goes
        return regions

    def close(self) -> None:
        """Unmap the memory on this thread: 0.1 ms for each MiB that was touched."""
        unmap(self.detach())


def unmap(regions: Sequence[Region]) -> None:
    """Unmap detached regions. Any thread; releases the interpreter's lock meanwhile."""
    for region in regions:
        size = len(region.span)
        for start in range(0, size, ZAPPED):
            lib.madvise(region.view + start, min(ZAPPED, size - start), mmap.MADV_DONTNEED)
        region.drop()


# ---- descriptors of the host


def _memfd(memory: Memory, name: str) -> int:
    """A memfd for all of the RAM. Its size is sealed, also against processes that get the descriptor: the next touch of
    a page that is gone would end this process."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (_MFD_HUGE_2MB if memory.huge_pages else 0)
    try:
        descriptor = os.memfd_create(f"orchestra {name}", flags)
    except OSError as error:
        raise _no_memory(memory.size, memory.huge_pages, error) from error
    try:
        os.ftruncate(descriptor, memory.size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(descriptor)
        raise _no_memory(memory.size, memory.huge_pages, error) from error
    return descriptor


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # not to wait for the writer of a pipe
    except OSError as error:
        raise FileError(f"{path}: can't be read as a VM's memory: {os.strerror(error.errno or 0)}") from error
    try:
        yield file
    finally:
        os.close(file)


def _check_file(file: int, name: str, size: int) -> None:
    try:
        found = os.fstat(file)
    except OSError as error:
        raise FileError(f"{name}: can't be read as a VM's memory: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{name}: is no regular file: a VM's memory needs one")
    if found.st_size < size:
        raise FileError(f"{name}: has {found.st_size} bytes, and the VM's RAM {size}: it must be as long, at least")
    # A memfd can be sealed, so that it never becomes shorter while it is mapped. A file on a disk can't.
    with contextlib.suppress(OSError):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)


def _no_memory(size: int, huge: bool, error: Exception) -> ResourceLimit:
    number = getattr(error, "errno", 0) or 0
    if not huge:
        return ResourceLimit(
            number,
            f"memory: {size} bytes can't be mapped ({error}); the host's limits are `ulimit -v`, vm.max_map_count and "
            "vm.overcommit_memory",
        )
    needed = -(-size // HUGE_PAGE)
    try:
        free = int(_HUGE_POOL.read_text())
    except (OSError, ValueError):
        return ResourceLimit(number or errno.ENOMEM, "memory: huge_pages=True: this kernel has no huge pages of 2 MiB")
    return ResourceLimit(
        number or errno.ENOMEM,
        f"memory: huge_pages=True needs {needed} huge pages of 2 MiB, and the host's pool has {free} free ({error}): "
        f"reserve more with `sysctl vm.nr_hugepages=N`, at best right after the host has started",
    )
