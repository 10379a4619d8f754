"""The registers of a hardware-reduced ACPI platform: how the guest sleeps and resets, and is told of events.

    port    size  register
    0x600   1     SLEEP_CONTROL: bit 5 enters the sleep state of bits 2-4; 5 is S5, off. Reads as 0
    0x601   1     SLEEP_STATUS: reads as 0, as no guest ever wakes here
    0x602   1     RESET: 1 resets. Reads as 0
    0x604   4     EVENTS: bit 0: the power button was pressed; bit 1: there is a new VM generation id. A read clears it

Any other access reads as 0 and changes nothing. An event raises the interrupt of the generic event device, which reads
EVENTS (`machine/boot/acpi`). Source: ACPI specification 6.5, 4.8.3.7, 4.8.3.6.
"""

from __future__ import annotations

from typing import Final

import attrs

from ...model import platform
from ...model.actions import ACPI_RESET, POWER_OFF, Shutdown
from ...model.checks import whole
from ...model.chipset import AcpiRegisters
from ...model.platform import NEW_GENERATION, POWER_BUTTON
from .peripheral import Hooks, Peripheral

__all__ = ["AcpiDevice", "AcpiState"]

SLEEP_ENABLE: Final = 1 << 5
SLEEP_TYPE: Final = 7 << 2
OFF: Final = 5 << 2

_BASE: Final = platform.ACPI_PORTS.start
SLEEP_CONTROL, RESET, EVENTS = (
    port - _BASE for port in (platform.ACPI_SLEEP_CONTROL, platform.ACPI_RESET, platform.ACPI_EVENTS)
)


@attrs.frozen
class AcpiState:
    """`events`: what the guest was not told yet."""

    events: int = 0

    def __attrs_post_init__(self) -> None:
        whole("events", self.events, 0, POWER_BUTTON | NEW_GENERATION)


class AcpiDevice(Peripheral[AcpiRegisters, AcpiState]):
    """See this module. `happened` is how the host tells the guest of an event."""

    State = AcpiState

    def __init__(self, spec: AcpiRegisters, hooks: Hooks) -> None:
        super().__init__(spec, hooks)
        self._events = 0

    def happened(self, event: int) -> None:
        """Tell the guest of `POWER_BUTTON` or `NEW_GENERATION`. With the lock of the device's claims."""
        self._events |= event
        self.hooks.pulse.fire()

    def read(self, offset: int, size: int) -> int:
        if (offset, size) != (EVENTS, 4):
            return 0
        events, self._events = self._events, 0
        return events

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        if offset == SLEEP_CONTROL and value & SLEEP_ENABLE and value & SLEEP_TYPE == OFF:
            self.hooks.end(Shutdown(reason=POWER_OFF))
        elif offset == RESET and value == 1:
            self.hooks.end(Shutdown(reason=ACPI_RESET))

    def reset(self) -> None:
        self._events = 0

    def state(self) -> AcpiState:
        return AcpiState(self._events)

    def restore(self, state: AcpiState) -> None:
        if state.events:
            self.happened(state.events)  # one interrupt too many does no harm: the guest finds the register empty
