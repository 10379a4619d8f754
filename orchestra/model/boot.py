"""What a VM boots: an open set of boot specs. Each checks itself against a VM, and names the function that loads it.

A class of your own that derives from `BootSpec` works wherever ours do: in `VmSpec.boot` and in the codec.
`FlatImage` is the one to copy, with its loader in orchestra/machine/boot/flat.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Literal

import attrs

from .checks import fail, whole
from .devices import DeviceSpec, Irqchip
from .errors import SpecError
from .memory import MAX_MEMORY, PAGE
from .openset import members

__all__ = ["STACKS", "BootSpec", "FlatImage", "Layout"]

QUICK: Final = 64 << 10
"""Bytes of a flat image that are copied in some 10 us."""

STACKS: Final = 8


@attrs.frozen
class Layout:
    """The memory, vCPUs and interrupt controllers that a VM has for a boot spec.

    Attributes:
        ram: guest-physical ranges of its RAM, from address 0.
        memory: all that is memory, regions beside the RAM included, by address.
        vcpus: how many vCPUs.
        irqchip: its interrupt controllers. With local APICs ("full", "split") vCPUs can wait for one another's signal.
        devices: all that is plugged in, what comes with the boot spec before what the VM's spec names.
    """

    ram: tuple[range, ...]
    memory: tuple[range, ...]
    vcpus: int
    irqchip: Irqchip
    devices: tuple[DeviceSpec, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(map(len, self.ram))


@attrs.frozen
class BootSpec:
    """The base of all boot specs: derive a frozen attrs class from it.

    Attributes:
        loader: "package.module:function". It is called for each run of a VM with the spec, the VM's `Layout` and its
            `GuestMemory`, on a worker thread unless `quick` says otherwise. It writes what the guest needs into that
            memory, and returns an `EntryState` for each vCPU. It may raise any `OrchestraError`, such as `FileError`.
        irqchip: what a VM gets unless `VmSpec.irqchip` says otherwise.
        huge_pages: the guest touches most of its RAM soon, so the host is asked for transparent huge pages
            (MADV_HUGEPAGE). Where its policy is "never", there are none.
        cpu_features: what the guest can't do without, by the names in Linux's /proc/cpuinfo. A host that lacks one of
            them refuses the VM.
    """

    loader: ClassVar[str] = ""
    irqchip: ClassVar[Irqchip] = "none"
    huge_pages: ClassVar[bool] = False
    cpu_features: ClassVar[tuple[str, ...]] = ()

    @property
    def quick(self) -> bool:
        """Whether the loader takes microseconds: it reads no file and writes little. The fleet's thread may call it
        then, which saves a small VM's launch the way to a worker thread and back."""
        return False

    def platform(self) -> tuple[DeviceSpec, ...]:
        """Devices that a guest of this kind expects of every machine. They are plugged in before `VmSpec.devices`."""
        return ()

    def check(self, layout: Layout) -> None:
        """Check that this can boot on a VM with that layout.

        Raises:
            SpecError: it can't. The message says what would help.
        """
        raise NotImplementedError(f"{type(self).__name__} must check itself")

    @staticmethod
    def kinds() -> Mapping[str, type[BootSpec]]:
        """All boot specs that this process has imported, by the name that data call them.

        Raises:
            SpecError: two classes have the same name.
        """
        return members(BootSpec, "boot")


@attrs.frozen
class FlatImage(BootSpec):
    """A raw image in guest memory, entered directly in the given mode.

    Parameters:
        code: the image.
        load: guest-physical address of its first byte.
        entry: where execution starts (default: at `load`).
        mode: 16 (real mode, all segments at 0), 32 (protected mode, flat segments, no paging) or 64 (long mode, the
            first 4 GiB mapped one to one). For 32 and 64 a GDT, for 64 also page tables, are written into the last
            48 KiB of the first RAM region; the image must leave them alone unless it brings its own.
        starts: "all": every vCPU starts at `entry`. "first": only the first does, and the others wait until it sends
            them INIT and SIPI by its local APIC, as on a PC; that takes an irqchip.

    A vCPU that starts at `entry` finds interrupts off, its number in ``DI``/``EDI``/``RDI`` and, in modes 32 and 64, a
    stack of 4 KiB of its own below the tables (the first 8 vCPUs; the others must set up their own).
    """

    loader: ClassVar[str] = "orchestra.machine.boot.flat:load"

    code: bytes = attrs.field(repr=lambda code: f"<{len(code)} bytes>")
    load: int = 0x1000
    entry: int | None = None
    mode: Literal[16, 32, 64] = 16
    starts: Literal["all", "first"] = "all"

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.code, bytes | bytearray | memoryview) or not len(self.code):
            raise fail("code", self.code, "must be the image's bytes, at least one")
        object.__setattr__(self, "code", bytes(self.code))
        if not isinstance(self.mode, int) or self.mode not in (16, 32, 64):
            raise fail("mode", self.mode, "must be 16, 32 or 64")
        whole("load", self.load, 0, MAX_MEMORY)
        if self.entry is None:
            object.__setattr__(self, "entry", self.load)
        whole("entry", self.entry, 0, MAX_MEMORY)
        if self.mode == 16 and self.start > 0xFFFF:
            raise fail("entry", hex(self.start), "must be below 64 KiB in 16-bit mode (CS starts at 0)")
        if self.mode != 16 and self.start > 0xFFFF_FFFF:
            raise fail("entry", hex(self.start), "must be below 4 GiB, which is what a flat image has mapped")
        if self.starts not in ("all", "first"):
            raise fail("starts", self.starts, 'must be "all" or "first"')

    @property
    def quick(self) -> bool:
        return len(self.code) <= QUICK

    @property
    def start(self) -> int:
        assert self.entry is not None
        return self.entry

    @property
    def span(self) -> range:
        return range(self.load, self.load + len(self.code))

    def tables(self, layout: Layout) -> range:
        """Where descriptor and page tables go in modes 32 and 64: the end of the first RAM region.

        8 KiB above them stay free, for guests that put a small stack at the very end of their memory.
        """
        end = layout.ram[0].stop
        return range(end - 12 * PAGE, end - 2 * PAGE)

    def stacks(self, layout: Layout) -> range:
        """Where the stacks of the first vCPUs are in modes 32 and 64, from the top down."""
        top = self.tables(layout).start
        return range(top - min(layout.vcpus, STACKS) * PAGE, top)

    def check(self, layout: Layout) -> None:
        if not any(self.load in span and self.span.stop <= span.stop for span in layout.memory):
            raise SpecError(
                f"boot: the image needs {self.span.start:#x}-{self.span.stop - 1:#x}, which is not inside the guest's "
                f"memory of {layout.size:#x} bytes: give it more memory or another load address"
            )
        if not any(self.start in span for span in layout.memory):
            raise SpecError(f"entry={self.start:#x}: lies outside the guest's memory of {layout.size:#x} bytes")
        if self.starts == "first" and layout.irqchip == "none":
            raise SpecError('starts="first": vCPUs wait for a signal of the local APIC: needs irqchip=True')
        if self.mode != 16:
            self._check_tables(layout)

    def _check_tables(self, layout: Layout) -> None:
        ours = range(self.stacks(layout).start, self.tables(layout).stop)
        if ours.start < 0:
            needed = layout.size - ours.start
            raise fail(
                "memory", layout.size, f"{self.mode}-bit mode needs at least {needed} bytes, for its tables and stacks"
            )
        if self.span.start < ours.stop and ours.start < self.span.stop:
            raise SpecError(
                f"boot: the image at {self.span.start:#x}-{self.span.stop - 1:#x} overlaps the stacks and the "
                f"descriptor and page tables at {ours.start:#x}-{ours.stop - 1:#x}: give it more memory"
            )
