"""QEMU's pvpanic (docs/specs/pvpanic.rst): one port. A read tells what the device takes, a write says what happened."""

from __future__ import annotations

from typing import Final

from ...model.actions import Failed
from ...model.chipset import PanicPort
from .peripheral import Peripheral
from .ports import Stateless

__all__ = ["PanicDevice"]

PANICKED: Final = 1 << 0
"""The kernel panicked. Bit 1, "a crash kernel was loaded, and goes on", is not taken: the VM would be gone for it."""


LINES: Final = 60
"""Of the console, which go into the outcome. Linux says why it panics, and prints stack and registers: 50 lines."""


class PanicDevice(Peripheral[PanicPort, Stateless]):
    """See this module."""

    State = Stateless

    def read(self, offset: int, size: int) -> int:
        return PANICKED

    def write(self, offset: int, size: int, value: int) -> None:
        if value & PANICKED:
            self.hooks.end(Failed(reason="the guest's kernel panicked", console=self.hooks.console.last_lines(LINES)))

    def reset(self) -> None:
        """Nothing: it keeps nothing."""

    def state(self) -> Stateless:
        return Stateless()

    def restore(self, state: Stateless) -> None: ...
