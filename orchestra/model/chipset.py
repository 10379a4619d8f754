"""Devices that come with a PC, which no user names: the boot specs of kernels that expect a PC have them.

`BootSpec.platform` returns them. Their addresses are `model.platform`'s.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from . import platform
from .devices import DeviceSpec, Line, Wiring

__all__ = ["I8042", "AcpiRegisters", "PanicPort", "PciHostBridge", "Rtc"]


@attrs.frozen
class AcpiRegisters(DeviceSpec):
    """What a hardware-reduced ACPI platform has in place of fixed hardware: sleep control, reset, and events.

    The guest powers off and resets here. It is told of the power button, and of a new VM generation id.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.acpi:AcpiDevice"

    def wiring(self) -> Wiring:
        return Wiring(ports=platform.ACPI_PORTS, line=Line(platform.EVENT_GSI, trigger="edge"))


@attrs.frozen
class PciHostBridge(DeviceSpec):
    """The PCI bus: configuration space, memory-mapped (`platform.ECAM`) and by ports, of all devices that are on it.

    It answers as device 0. Devices have the slots from 1 on, in the order of the spec.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.bridge:PciBridge"

    def wiring(self) -> Wiring:
        return Wiring(mmio=platform.ECAM, hosts_pci=True)


@attrs.frozen
class Rtc(DeviceSpec):
    """An MC146818 real-time clock: UTC, and memory that a run keeps. It makes no interrupts."""

    implementation: ClassVar[str] = "orchestra.machine.devices.rtc:RtcDevice"

    def wiring(self) -> Wiring:
        return Wiring(ports=platform.RTC_PORTS)


@attrs.frozen
class I8042(DeviceSpec):
    """Of a keyboard controller the command port alone, by which PCs are reset (0xfe)."""

    implementation: ClassVar[str] = "orchestra.machine.devices.i8042:ResetLine"

    def wiring(self) -> Wiring:
        return Wiring(ports=platform.I8042_PORTS)


@attrs.frozen
class PanicPort(DeviceSpec):
    """QEMU's pvpanic: a guest whose kernel panics says so, and its VM ends as ``Failed``."""

    implementation: ClassVar[str] = "orchestra.machine.devices.panic:PanicDevice"

    def wiring(self) -> Wiring:
        return Wiring(ports=platform.PANIC_PORTS)
