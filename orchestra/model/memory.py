"""The specs of guest memory: sizes, regions, and what the pages are made of."""

from __future__ import annotations

from typing import Final, Literal

import attrs

from .checks import fail, whole

__all__ = [
    "HUGE_PAGE",
    "MAX_MEMORY",
    "MMIO_HOLE",
    "PAGE",
    "GiB",
    "KiB",
    "Memory",
    "MemoryRegion",
    "MiB",
    "ram_ranges",
]

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

PAGE: Final = 4096
HUGE_PAGE: Final = 2 * MiB
MAX_MEMORY: Final = 1 << 46
MMIO_HOLE: Final = range(0xC000_0000, 0x1_0000_0000)
"""Guest-physical addresses that hold no RAM: the local APIC, the I/O APIC and MMIO devices live there, as on a PC."""

RING: Final = (1024, 65536)
"""Entries of a dirty ring. KVM keeps 64 of them, and up to 512 more where the CPU logs pages by itself, for what it
writes before it can stop the guest; 65,536 are its maximum (virt/kvm/dirty_ring.c)."""


def ram_ranges(size: int) -> tuple[range, ...]:
    """Guest-physical ranges of that much RAM, around the MMIO hole."""
    if size <= MMIO_HOLE.start:
        return (range(size),)
    return range(MMIO_HOLE.start), range(MMIO_HOLE.stop, MMIO_HOLE.stop + size - MMIO_HOLE.start)


def check_size(field: str, size: object, unit: int = PAGE) -> None:
    """Check bytes of RAM."""
    if whole(field, size, unit, MAX_MEMORY, " bytes") % unit:
        raise fail(field, size, f"must be a multiple of {unit} bytes")


@attrs.frozen
class Memory:
    """A VM's RAM and what it is made of. A plain number of bytes means anonymous memory.

    Parameters:
        size: bytes of RAM from address 0, a multiple of 4096. Above 3 GiB it continues at 4 GiB.
        backing: "anonymous": pages of this process alone. "shared": a memfd, which can be handed to other processes.
            "file": the contents of `path`, in the order of the addresses. A page becomes the VM's own when it is
            first written, and the file is never changed. If another program truncates the file while the VM runs,
            the kernel ends this process (SIGBUS). So give the VM files that no other program writes.
        path: the file. It must be as long as the RAM, at least.
        huge_pages: take pages of 2 MiB from the host's pool (`vm.nr_hugepages`), all of them at launch. `size` must be
            a multiple of 2 MiB. Not with "file".
        dirty_ring: log written pages in a ring of so many entries for each vCPU, a power of two from 1,024 to 65,536,
            instead of a bitmap. Reading a ring costs time for each written page, and not for each page there is. So
            a ring pays for a big memory of which the guest writes little. A full ring stops the guest until it was
            read. A KVM without hardware may overwrite entries; readers then get every page as written. None: a
            bitmap. Ring and bitmap are in use only while pages are logged (`VmSpec.log_dirty`).
        transparent_huge_pages: whether the kernel may back it with huge pages of 2 MiB by itself (MADV_HUGEPAGE,
            MADV_NOHUGEPAGE); None: it may for a guest that touches most of its memory soon (Linux), and else as the
            host's policy says (/sys/kernel/mm/transparent_hugepage/enabled). Where that is "never", it stays so. Not
            with `huge_pages`.
        prefault: take all of it from the host at launch, on several worker threads, and not page by page when the
            guest touches it. The launch takes as long as that takes, and can be cancelled meanwhile. A launch is
            refused if the host has too little free memory then.
    """

    size: int
    backing: Literal["anonymous", "shared", "file"] = "anonymous"
    path: str | None = None
    huge_pages: bool = False
    dirty_ring: int | None = None
    transparent_huge_pages: bool | None = None
    prefault: bool = False

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.prefault, bool):
            raise fail("prefault", self.prefault, "must be True or False")
        if not isinstance(self.transparent_huge_pages, bool | None):
            raise fail(
                "transparent_huge_pages",
                self.transparent_huge_pages,
                "must be True, False, or None for the host's policy",
            )
        if self.huge_pages and self.transparent_huge_pages is not None:
            raise fail("transparent_huge_pages", self.transparent_huge_pages, "must be None with huge_pages=True")
        if not isinstance(self.huge_pages, bool):
            raise fail("huge_pages", self.huge_pages, "must be True or False")
        check_size("size", self.size, HUGE_PAGE if self.huge_pages else PAGE)
        if self.backing not in ("anonymous", "shared", "file"):
            raise fail("backing", self.backing, 'must be "anonymous", "shared" or "file"')
        if (self.backing == "file") != (self.path is not None):
            raise fail("path", self.path, 'must be given with backing="file", and only then')
        if self.path is not None and (not isinstance(self.path, str) or not self.path or "\0" in self.path):
            raise fail("path", self.path, "must be the name of a file")
        if self.huge_pages and self.backing == "file":
            raise fail("huge_pages", True, 'must be False with backing="file": the file\'s own pages are used')
        if self.dirty_ring is not None:
            entries = whole("dirty_ring", self.dirty_ring, *RING, " entries")
            if entries & (entries - 1):
                raise fail("dirty_ring", entries, "must be a power of two")

    @property
    def upfront(self) -> bool:
        """Whether all of it is taken from the host at launch."""
        return self.huge_pages or self.prefault


@attrs.frozen
class MemoryRegion:
    """More guest memory, beside the RAM of `VmSpec.memory`. It is anonymous, whatever the RAM is made of.

    Parameters:
        address: guest-physical, a multiple of 4096.
        size: bytes, a multiple of 4096.
        readonly: a guest's write does not reach the memory; KVM reports it as MMIO (KVM_MEM_READONLY).
        log_dirty: written pages are logged and counted, whatever `VmSpec.log_dirty` says of the rest.
        contents: the first bytes of the region.
    """

    address: int
    size: int
    readonly: bool = False
    log_dirty: bool = False
    contents: bytes = attrs.field(default=b"", repr=lambda contents: f"<{len(contents)} bytes>")

    def __attrs_post_init__(self) -> None:
        whole("region address", self.address, 0, MAX_MEMORY)
        whole("region size", self.size, PAGE, MAX_MEMORY, " bytes")
        for field in ("address", "size"):
            if getattr(self, field) % PAGE:
                raise fail(f"region {field}", getattr(self, field), f"must be a multiple of {PAGE}")
        for field in ("readonly", "log_dirty"):
            if not isinstance(getattr(self, field), bool):
                raise fail(f"region {field}", getattr(self, field), "must be True or False")
        if not isinstance(self.contents, bytes | bytearray | memoryview):
            raise fail("region contents", self.contents, "must be bytes")
        object.__setattr__(self, "contents", bytes(self.contents))
        if len(self.contents) > self.size:
            raise fail("region contents", f"{len(self.contents)} bytes", f"must fit the region's {self.size} bytes")

    @property
    def span(self) -> range:
        return range(self.address, self.address + self.size)
