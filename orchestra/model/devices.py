"""The devices on a guest's buses: an open set of device specs, each with its wiring.

A device spec is plain data. The spec names the class that implements the device, and `wiring` says what that class
needs of the machine: addresses, interrupts, doorbells. No other list of devices exists. So a class of your own that
derives from `DeviceSpec` works wherever ours do: in `VmSpec.devices`, in the codec, on the buses. See docs/devices.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Final, Literal, TypeAlias

import attrs

from .checks import fail, whole
from .errors import SpecError
from .mistakes import shown
from .openset import members
from .pci import MOST_FUNCTIONS, PciFunction

__all__ = [
    "DebugConsole",
    "DeviceSpec",
    "Digest",
    "Doorbell",
    "ExitPort",
    "Irqchip",
    "Line",
    "Serial",
    "Wiring",
    "check_streams",
    "check_wiring",
    "irqchip_kind",
    "unwired",
]

PORTS: Final = 1 << 16
PHYSICAL: Final = 1 << 52
"""One more than the last guest-physical address that x86-64 has room for (Intel SDM vol. 3, 4.1.4: MAXPHYADDR)."""
IRQS: Final = 24
"""Lines of the in-kernel I/O APIC (KVM_IOAPIC_NUM_PINS). The first 16 of them reach the two PICs as well."""
MOST_MSIS: Final = 64
"""MSI vectors of one device. Each costs a descriptor; a virtio device has one for each queue and one more."""
MOST_DOORBELLS: Final = 64
STREAM_NAME: Final = 64
"""Bytes of a stream's name. Drivers keep it, and some have no room for a long one (FreeBSD's: 128)."""
CONTROLLERS: Final = range(0xFEC0_0000, 0xFEF0_0000)
"""Where the I/O APIC (0xfec00000) and the local APICs (0xfee00000, and 1 MiB of MSI addresses) answer."""

Irqchip: TypeAlias = Literal["none", "full", "split"]


@attrs.frozen
class Doorbell:
    """A register that a guest writes to tell the device that there is work, without an exit: an ioeventfd.

    The guest goes on at once, and the fleet's thread calls the device (`Peripheral.rang`). A write of another size or,
    with `value`, of another value does not ring: the device gets it in `Peripheral.write` like any other write.

    Parameters:
        offset: from the start of the device's MMIO addresses, or of its ports.
        size: bytes of the write: 1, 2, 4 or 8.
        value: only a write of this value rings; None: any.
        bus: which of the device's ranges the offset belongs to.
    """

    offset: int
    size: int = 4
    value: int | None = None
    bus: Literal["mmio", "ports"] = "mmio"

    def __attrs_post_init__(self) -> None:
        whole("doorbell offset", self.offset, 0, PHYSICAL)
        if self.bus not in ("mmio", "ports"):
            raise fail("doorbell bus", self.bus, 'must be "mmio" or "ports"')
        sizes = (1, 2, 4, 8) if self.bus == "mmio" else (1, 2, 4)
        if self.size not in sizes or isinstance(self.size, bool):
            raise fail("doorbell size", self.size, f"must be one of {', '.join(map(str, sizes))} bytes")
        if self.value is not None:
            whole("doorbell value", self.value, 0, (1 << 8 * self.size) - 1)


@attrs.frozen
class Line:
    """An interrupt line of the irqchip.

    Parameters:
        gsi: its number.
        trigger: "level": the device holds the line for as long as it wants attention. "edge": each `fire` is one
            interrupt, which is made in the kernel (irqfd). "resample": level-triggered for the guest; `fire` raises the
            line in the kernel, the guest's end of interrupt lowers it there and tells the device
            (`Peripheral.acknowledged`), which fires again if it still wants attention.
        optional: the device works without it, where the VM has no irqchip.
    """

    gsi: int
    trigger: Literal["level", "edge", "resample"] = "level"
    optional: bool = False

    def __attrs_post_init__(self) -> None:
        whole("irq", self.gsi, 0, IRQS - 1)
        if self.trigger not in ("level", "edge", "resample"):
            raise fail("trigger", self.trigger, 'must be "level", "edge" or "resample"')


@attrs.frozen
class Wiring:
    """What a device needs of its machine.

    Parameters:
        ports, mmio: addresses that it answers at; None: none on that bus.
        line: its interrupt line.
        msis: how many message-signalled interrupts it has. The guest programs where each one goes.
        doorbells: registers that reach it without an exit.
        pci: what it is on the PCI bus. Where its BAR is, is the guest's to say; so it has neither MSIs nor doorbells
            of its own.
        hosts_pci: it is the host bridge of the PCI bus, of which a VM has one if it has devices there.
        streams: names of the byte streams between it and the VM's users, who find them in `Vm.ports`.
    """

    ports: range | None = None
    mmio: range | None = None
    line: Line | None = None
    msis: int = 0
    doorbells: tuple[Doorbell, ...] = ()
    pci: PciFunction | None = None
    hosts_pci: bool = False
    streams: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.pci, PciFunction | None):
            raise fail("pci", self.pci, "must be a PciFunction, or None for a device that is not on the PCI bus")
        if self.ports is None and self.mmio is None and self.pci is None:
            raise SpecError("ports=None, mmio=None: a device answers at one of them at least, or is on the PCI bus")
        if self.pci is not None and (self.msis or self.doorbells):
            raise SpecError("pci: its interrupts and doorbells are those of the PciFunction")
        for name, span, end in (("ports", self.ports, PORTS), ("mmio", self.mmio, PHYSICAL)):
            if span is not None and not (isinstance(span, range) and span.step == 1 and 0 <= span.start < span.stop):
                raise fail(name, span, "must be a range of addresses with step 1, at least one")
            if span is not None and span.stop > end:
                raise fail(name, span, f"must lie in 0-{end - 1:#x}")
        if not isinstance(self.line, Line | None):
            raise fail("line", self.line, "must be a Line, such as Line(5), or None for none")
        whole("msis", self.msis, 0, MOST_MSIS)
        if len(self.doorbells) > MOST_DOORBELLS:
            raise fail("doorbells", len(self.doorbells), f"must be at most {MOST_DOORBELLS}")
        for bell in self.doorbells:
            if not isinstance(bell, Doorbell):
                raise fail("doorbells", bell, "must be Doorbell objects, in a tuple")
            where = self.mmio if bell.bus == "mmio" else self.ports
            if where is None or bell.offset + bell.size > len(where):
                raise fail("doorbell offset", bell.offset, f"must lie within the device's {bell.bus}")

    @property
    def vectors(self) -> int:
        """How many message-signalled interrupts it has, as a PCI function or by itself."""
        return self.msis if self.pci is None else self.pci.vectors

    def address(self, bell: Doorbell) -> int:
        """The port or guest-physical address of a doorbell."""
        where = self.mmio if bell.bus == "mmio" else self.ports
        assert where is not None
        return where.start + bell.offset


@attrs.frozen
class DeviceSpec:
    """The base of all device specs. Derive a frozen attrs class from it, with an implementation and a wiring.

    Attributes:
        implementation: "package.module:Class" of its `Peripheral`, which is imported when a VM with it is launched.
        quick: making it takes microseconds: it opens nothing and starts no thread. The fleet's thread may make it then,
            which saves a small VM's launch the way to a worker thread and back.
    """

    implementation: ClassVar[str] = ""
    quick: ClassVar[bool] = False

    def implemented_by(self) -> str:
        """The `implementation` of this spec, where that depends on its fields."""
        return self.implementation

    @property
    def has_back_end(self) -> bool:
        """Whether another process serves it (vhost-user). That process gets the VM's memory."""
        return False

    def wiring(self) -> Wiring:
        """What it needs of its machine."""
        raise NotImplementedError(f"{type(self).__name__} must say its wiring: define wiring(), which returns a Wiring")

    @property
    def memory_floor(self) -> int | None:
        """For a device that takes memory from the guest for the host: the least RAM that it may leave, in bytes. None:
        this is no such device."""
        return None

    @staticmethod
    def kinds() -> Mapping[str, type[DeviceSpec]]:
        """All device specs that this process has imported, by the name that data call them.

        Raises:
            SpecError: two classes have the same name.
        """
        return members(DeviceSpec, "device")


def irqchip_kind(irqchip: bool | str) -> Irqchip:
    """What `VmSpec.irqchip` means.

    Raises:
        SpecError: it is none of the values that it may have.
    """
    if isinstance(irqchip, bool):
        return "full" if irqchip else "none"
    if irqchip == "full" or irqchip == "split":
        return irqchip  # type: ignore[return-value]  # mypy does not narrow str by ==
    raise fail("irqchip", irqchip, 'must be True or "full" (all controllers in the kernel), "split", or False')


def check_wiring(devices: Sequence[DeviceSpec], irqchip: Irqchip, memory: Iterable[range]) -> None:
    """Check what the devices of a VM need against what it has. (Who overlaps whom on a bus, the bus itself says.)

    Raises:
        SpecError: a device needs interrupts that the VM has not, or another's line, or its addresses are memory or an
            APIC's.
    """
    spans = list(memory)
    _check_bus(devices)
    if irqchip == "full":
        _check_lines(devices)
    check_streams([name for device in devices for name in _is_wired(device).streams])
    for device in devices:
        name, wiring = type(device).__name__, _is_wired(device)
        if wiring.vectors and irqchip == "none":
            raise SpecError(f'{name}: its interrupts need irqchip="full" or irqchip="split"')
        if wiring.line is not None and irqchip == "split":
            raise SpecError(
                f'{name}: irq={wiring.line.gsi}: irqchip="split" has no interrupt lines: use irqchip="full"'
                + ", or irq=None" * wiring.line.optional
            )
        if wiring.line is not None and irqchip == "none" and not wiring.line.optional:
            raise SpecError(f'{name}: irq={wiring.line.gsi}: needs irqchip="full"')
        if (mmio := wiring.mmio) is not None:
            taken = [("the guest's memory", span) for span in spans]
            taken += [("the interrupt controllers", CONTROLLERS)] * (irqchip != "none")
            for what, span in taken:
                if mmio.start < span.stop and span.start < mmio.stop:
                    raise SpecError(
                        f"{name}: mmio {mmio.start:#x}-{mmio.stop - 1:#x} overlaps {what} at "
                        f"{span.start:#x}-{span.stop - 1:#x}: give it another address"
                    )


def _check_bus(devices: Sequence[DeviceSpec]) -> None:
    functions = [type(device).__name__ for device in devices if _is_wired(device).pci is not None]
    hosts = sum(_is_wired(device).hosts_pci for device in devices)
    if len(functions) > MOST_FUNCTIONS:
        raise SpecError(f"{len(functions)} devices on the PCI bus: it has room for {MOST_FUNCTIONS}")
    if functions and not hosts:
        raise SpecError(f"{functions[0]} is on the PCI bus: add PciHostBridge() to the devices")
    if hosts > 1:
        raise SpecError(f"{hosts} host bridges: a VM has one PCI bus")


def _check_lines(devices: Sequence[DeviceSpec]) -> None:
    """No two devices may have one line: the one that lowers it would take the other's interrupt back, and of an edge
    nobody can tell whose it was."""
    owners: dict[int, str] = {}
    for device in devices:
        line, name = _is_wired(device).line, type(device).__name__
        if line is None:
            continue
        if line.gsi in owners:
            raise SpecError(
                f"{name}: irq={line.gsi}: {owners[line.gsi]} has that line: choose another one"
                + ", or irq=None" * line.optional
            )
        owners[line.gsi] = name


def check_streams(names: Sequence[str]) -> None:
    """Check names of streams.

    Raises:
        SpecError: one is no name, or there twice.
    """
    for name in names:
        is_text = isinstance(name, str) and name.isprintable()
        if not is_text or not 0 < len(name.encode()) <= STREAM_NAME:
            raise fail("ports", name, f"must be names of 1 to {STREAM_NAME} printable bytes, as 'org.example.agent'")
        if "/" in name or name in (".", ".."):
            raise fail("ports", name, "must be no path: Linux makes a file of that name, /dev/virtio-ports/NAME")
        if names.count(name) > 1:
            raise fail("ports", name, "must be there once: each port of a VM has a name of its own")


def _is_wired(device: DeviceSpec) -> Wiring:
    """Its wiring, if it is one."""
    wiring = device.wiring()
    if not isinstance(wiring, Wiring):
        raise SpecError(f"{type(device).__name__}: wiring() returned {shown(wiring)}: it must return a Wiring")
    return wiring


def unwired(devices: Iterable[DeviceSpec], irqchip: Irqchip) -> str | None:
    """What this VM needs that a backend without irqchip and ioeventfds can't give. None: it needs no such thing."""
    if irqchip != "none":
        return f"irqchip={irqchip!r}"
    for device in devices:
        wiring = device.wiring()
        if wiring.doorbells:
            return f"the doorbells of {type(device).__name__} (ioeventfd)"
        if wiring.pci is not None:
            return f"{type(device).__name__} on the PCI bus (irqfd)"
    return None


# ---- ours


def _check_port(value: object, width: int) -> None:
    whole("port", value, 0, PORTS - width, f", as the device has {width} of the {PORTS} ports" if width > 1 else "")


@attrs.frozen
class DebugConsole(DeviceSpec):
    """A write-only port whose bytes go to the VM's console (QEMU's ``isa-debugcon``). Reads give the port's number."""

    implementation: ClassVar[str] = "orchestra.machine.devices.ports:DebugConsolePort"
    quick: ClassVar[bool] = True

    port: int = 0xE9

    def __attrs_post_init__(self) -> None:
        _check_port(self.port, 1)

    def wiring(self) -> Wiring:
        return Wiring(ports=range(self.port, self.port + 1))


@attrs.frozen
class ExitPort(DeviceSpec):
    """A port that ends the VM when written: outcome ``Shutdown`` with the value as its code (``isa-debug-exit``)."""

    implementation: ClassVar[str] = "orchestra.machine.devices.ports:ExitDevice"
    quick: ClassVar[bool] = True

    port: int = 0xF4

    def __attrs_post_init__(self) -> None:
        _check_port(self.port, 4)

    def wiring(self) -> Wiring:
        return Wiring(ports=range(self.port, self.port + 4))


@attrs.frozen
class Serial(DeviceSpec):
    """A 16550A serial port; its output goes to the VM's console. COM1 is port 0x3f8, interrupt 4.

    Without an irqchip it works all the same, and its interrupt goes nowhere.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.serial:Uart16550"
    quick: ClassVar[bool] = True

    port: int = 0x3F8
    irq: int | None = 4

    def __attrs_post_init__(self) -> None:
        _check_port(self.port, 8)
        if self.irq is not None:
            whole("irq", self.irq, 0, IRQS - 1)

    def wiring(self) -> Wiring:
        line = None if self.irq is None else Line(self.irq, optional=True)
        return Wiring(ports=range(self.port, self.port + 8), line=line)


@attrs.frozen
class Digest(DeviceSpec):
    """A device that computes the CRC-32 of guest memory: the one to copy (``orchestra/machine/devices/digest.py``).

    The guest writes a descriptor into its memory, tells the device where that is, and rings. The device writes the
    result into the descriptor and interrupts. See docs/devices.md for its registers.

    Parameters:
        base: guest-physical address of its registers, a multiple of 8.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.digest:DigestDevice"
    SIZE: ClassVar[int] = 0x28
    DOORBELL: ClassVar[int] = 0x20

    base: int = 0xD000_0000

    def __attrs_post_init__(self) -> None:
        whole("base", self.base, 0, PHYSICAL - self.SIZE)
        if self.base % 8:
            raise fail("base", hex(self.base), "must be a multiple of 8, as its registers are up to 8 bytes wide")

    def wiring(self) -> Wiring:
        return Wiring(
            mmio=range(self.base, self.base + self.SIZE), msis=1, doorbells=(Doorbell(self.DOORBELL, size=4),)
        )
