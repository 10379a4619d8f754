"""Guest memory: anonymous mappings, and the one checked door to them."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import attrs

from ..model.errors import GuestMemoryError, ResourceLimit
from ..model.spec import MemoryRegion, VmSpec
from ..native import ffi, lib

__all__ = ["GuestMemory", "Region", "unmap"]

# mmap.MAP_NORESERVE has no name in Python before 3.13; the value is x86-64's (asm-generic/mman-common.h: 0x4000).
_FLAGS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)

ZAPPED: Final = 4 << 20
"""Bytes that are given back in one call, half a millisecond of work. While the kernel unmaps, whoever maps something in
this process waits, as KVM_CREATE_VM and every launch do, and then whoever touches a page: between two calls they get
their turn."""


@attrs.define(eq=False)
class Region:
    """One mapping. `host` is its address in this process, for the backend."""

    span: range
    mapping: mmap.mmap
    view: Any  # cffi's buffer over the mapping: it pins it, and must go before it
    readonly: bool = False
    log_dirty: bool = False

    @property
    def host(self) -> int:
        return int(ffi.cast("uintptr_t", self.view))


class GuestMemory:
    """The memory of one VM. Closing it unmaps; no access is possible afterwards.

    Reads and writes are copies and not atomic against a running guest, as with any VMM.
    """

    def __init__(self, spec: VmSpec) -> None:
        self.regions: list[Region] = []
        # Told of address and size after each write from outside: whoever executes translated code has to know.
        self.on_write: Callable[[int, int], object] | None = None
        try:
            for span in spec.ram:
                self._map(span, log_dirty=spec.log_dirty)
            for region in spec.regions:
                self._map_region(region, spec.log_dirty)
        except BaseException:
            self.close()
            raise

    def _map(self, span: range, readonly: bool = False, log_dirty: bool = False) -> None:
        try:
            mapping = mmap.mmap(-1, len(span), flags=_FLAGS)
        except (OSError, OverflowError, ValueError) as error:
            raise ResourceLimit(
                getattr(error, "errno", 0) or 0,
                f"memory: {len(span)} bytes can't be mapped ({error}); the host's limits are `ulimit -v`, "
                "vm.max_map_count and vm.overcommit_memory",
            ) from error
        self.regions.append(Region(span, mapping, ffi.from_buffer(mapping), readonly, log_dirty))

    def _map_region(self, region: MemoryRegion, log_dirty: bool) -> None:
        self._map(region.span, region.readonly, region.log_dirty or (log_dirty and not region.readonly))
        self.write(region.address, region.contents)

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
        """Copy `size` bytes at guest-physical `address`.

        Raises:
            GuestMemoryError: not all of the range is memory, or the memory is released.
        """
        pieces = list(self._pieces(address, size))  # all are looked up before anything is copied
        return b"".join(region.mapping[offset : offset + length] for region, offset, length in pieces)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to guest-physical `address`. Read-only regions are so for the guest, not for you.

        Raises:
            GuestMemoryError: not all of the range is memory; nothing was written then.
        """
        data = bytes(memoryview(data))  # not bytes(5), which would be five zeros
        done = 0
        for region, offset, length in list(self._pieces(address, len(data))):
            region.mapping[offset : offset + length] = data[done : done + length]
            done += length
        if self.on_write is not None and done:
            self.on_write(address, done)

    def zero(self) -> None:
        """Give all pages back: they read as zeros. For a VM that starts over."""
        for region in self.regions:
            region.mapping.madvise(mmap.MADV_DONTNEED)

    def spans(self) -> Iterable[range]:
        return (region.span for region in self.regions)

    @property
    def released(self) -> bool:
        return not self.regions

    def detach(self) -> list[Region]:
        """No access is possible from now on. What is left to `unmap`, on any thread."""
        regions, self.regions = self.regions, []
        return regions

    def close(self) -> None:
        """Unmap it here: 0.1 ms for each MiB that was touched."""
        unmap(self.detach())


def unmap(regions: Sequence[Region]) -> None:
    """Unmap regions that were detached. Any thread; gives up the interpreter lock meanwhile."""
    for region in regions:
        size = len(region.span)
        for start in range(0, size, ZAPPED):
            lib.madvise(region.view + start, min(ZAPPED, size - start), mmap.MADV_DONTNEED)
        ffi.release(region.view)
        region.mapping.close()
