"""Two small port devices: a debug console and an exit port (QEMU's isa-debugcon and isa-debug-exit)."""

from __future__ import annotations

from collections.abc import Callable

from ...native import ffi, lib
from .bus import NativeDevice
from .console import Console

__all__ = ["DebugConsolePort", "ExitDevice"]


class DebugConsolePort(NativeDevice):
    """Bytes written go to `console`; a read gives the low byte of the port's number, by which guests detect it."""

    def __init__(self, port: int, console: Console) -> None:
        self._console = console  # it must outlive the device
        self.native = ffi.gc(lib.orc_debug_console_new(console.handle, port & 0xFF), lib.orc_device_free)
        if self.native == ffi.NULL:
            raise MemoryError("orc_debug_console_new")


class ExitDevice(NativeDevice):
    """A write ends the VM with the value as its code. Reads, which the core answers, are 0."""

    def __init__(self, end: Callable[[int], None]) -> None:
        self._end = end
        self.native = ffi.gc(lib.orc_exit_port_new(), lib.orc_device_free)
        if self.native == ffi.NULL:
            raise MemoryError("orc_exit_port_new")

    def write(self, offset: int, size: int, value: int) -> None:
        self._end(value)
