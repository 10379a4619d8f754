"""Of a keyboard controller (Intel 8042) the one command that resets a PC. Its status says that it is ready, always.

A guest that finds no ACPI reset register resets by this port (Linux, arch/x86/kernel/reboot.c, BOOT_KBD).
"""

from __future__ import annotations

from typing import Final

from ...model.actions import KEYBOARD_RESET, Shutdown
from ...model.chipset import I8042
from .peripheral import Peripheral
from .ports import Stateless

__all__ = ["ResetLine"]

PULSE_RESET: Final = 0xFE


class ResetLine(Peripheral[I8042, Stateless]):
    """See this module."""

    State = Stateless

    def read(self, offset: int, size: int) -> int:
        return 0  # input buffer empty: the next command may come; output buffer empty: there is nothing to read

    def write(self, offset: int, size: int, value: int) -> None:
        if value & 0xFF == PULSE_RESET:
            self.hooks.end(Shutdown(reason=KEYBOARD_RESET))

    def reset(self) -> None:
        """Nothing: it keeps nothing."""

    def state(self) -> Stateless:
        return Stateless()

    def restore(self, state: Stateless) -> None: ...
