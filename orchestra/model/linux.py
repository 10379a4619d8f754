"""Linux as what a VM boots: a kernel file, an initrd, a command line."""

from __future__ import annotations

from typing import ClassVar, Final

import attrs

from .boot import BootSpec, Layout
from .checks import fail
from .chipset import I8042, AcpiRegisters, PanicPort, PciHostBridge, Rtc
from .devices import DeviceSpec, Irqchip, Serial
from .memory import MiB
from .platform import MOST_XAPIC
from .virtio import Console

__all__ = ["LEAST_MEMORY", "LinuxBoot", "check_apic_ids"]

LEAST_MEMORY: Final = 32 * MiB
"""A kernel runs at 16 MiB or above. How much more it needs, its file says, which is read at launch."""

_TTYS: Final = (0x3F8, 0x2F8, 0x3E8, 0x2E8)
"""Ports of ttyS0 to ttyS3, which the kernel looks at without being told (arch/x86/include/asm/serial.h)."""


def check_apic_ids(vcpus: int) -> None:
    """Check that a guest that finds its CPUs by ACPI finds them all.

    Raises:
        SpecError: it has more than 8-bit APIC ids.
    """
    if vcpus > MOST_XAPIC:
        what = "x2APIC ids above 255 need x2APIC entries in ACPI's tables and interrupt remapping"
        raise fail("vcpus", vcpus, f"must be at most {MOST_XAPIC} for Linux: {what}, which orchestra does not make")


def _path(value: object) -> object:
    return value.__fspath__() if hasattr(value, "__fspath__") else value


@attrs.frozen
class LinuxBoot(BootSpec):
    """A Linux kernel, entered as a boot loader would. Needs the kvm backend.

    The files are read at each run of the VM, on the host, straight into guest memory.

    Parameters:
        kernel: the kernel's file: a bzImage (``/boot/vmlinuz``), or an ELF file (``vmlinux``). An ELF file with a PVH
            note is entered by it, also if it is no Linux.
        initrd: an initial RAM disk, such as a cpio archive, compressed or not; None: none.
        cmdline: added to what orchestra says: ``console=ttyS0`` if the VM has a `Serial`, or ``console=hvc0`` if it has
            a `Console` alone, unless you name a console; and ``reboot=a``, by which the kernel resets the VM, unless
            you say ``reboot=`` otherwise.
    """

    loader: ClassVar[str] = "orchestra.machine.boot.linux:load"
    irqchip: ClassVar[Irqchip] = "full"
    huge_pages: ClassVar[bool] = True
    # What arch/x86/kernel/verify_cpu.S demands of a CPU before 64-bit mode; the kernel halts without a word otherwise.
    cpu_features: ClassVar[tuple[str, ...]] = ("fpu", "msr", "pae", "cx8", "cmov", "fxsr", "sse", "sse2", "lm")

    kernel: str = attrs.field(converter=_path)
    initrd: str | None = attrs.field(default=None, converter=_path)
    cmdline: str = ""

    def __attrs_post_init__(self) -> None:
        for field, value in (("kernel", self.kernel), ("initrd", self.initrd)):
            if not (field == "initrd" and value is None) and not (isinstance(value, str) and value):
                raise fail(field, value, "must be the name of a file")
            if isinstance(value, str) and "\0" in value:
                raise fail(field, value, "must be the name of a file, without zero bytes")
        if not isinstance(self.cmdline, str) or "\0" in self.cmdline:
            raise fail("cmdline", self.cmdline, "must be text without zero bytes, such as 'quiet panic=1'")

    def platform(self) -> tuple[DeviceSpec, ...]:
        return PciHostBridge(), AcpiRegisters(), Rtc(), I8042(), PanicPort()

    def check(self, layout: Layout) -> None:
        if layout.irqchip != "full":
            raise fail("irqchip", layout.irqchip, 'must be "full" for Linux, or left out: it needs timers and lines')
        check_apic_ids(layout.vcpus)
        if layout.size < LEAST_MEMORY:
            raise fail("memory", layout.size, f"must be at least {LEAST_MEMORY} for Linux; 256 * MiB is usual")

    def command_line(self, layout: Layout) -> str:
        """What the kernel gets: orchestra's words, and then yours, which so override them."""
        words = []
        if not self._says("console="):
            ports = [device.port for device in layout.devices if isinstance(device, Serial)]
            serial = [f"console=ttyS{_TTYS.index(port)}" for port in ports if port in _TTYS][:1]
            virtio = ["console=hvc0"] * any(isinstance(device, Console) for device in layout.devices)
            words += serial or virtio
        if not self._says("reboot="):
            # With hardware-reduced ACPI, Linux resets by EFI, and where there is none, by the BIOS, which is not here
            # either (arch/x86/kernel/reboot.c, reboot_init). The ACPI reset register has to be asked for.
            words.append("reboot=a")
        return " ".join([*words, *([self.cmdline] if self.cmdline else [])])

    def _says(self, option: str) -> bool:
        return any(word.startswith(option) for word in self.cmdline.split())
