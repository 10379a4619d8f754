"""Two small port devices: a debug console and an exit port (QEMU's isa-debugcon and isa-debug-exit)."""

from __future__ import annotations

import attrs

from ...model.actions import Shutdown
from ...model.devices import DebugConsole, ExitPort
from ...native import ffi, lib
from .bus import NativeDevice
from .peripheral import Hooks, Peripheral

__all__ = ["DebugConsolePort", "ExitDevice", "Stateless"]


@attrs.frozen
class Stateless:
    """The state of a device that keeps nothing."""


class DebugConsolePort(NativeDevice, Peripheral[DebugConsole, Stateless]):
    """Bytes written go to the console; a read gives the low byte of the port's number, by which guests detect it."""

    State = Stateless

    def __init__(self, spec: DebugConsole, hooks: Hooks) -> None:
        super().__init__(spec, hooks)  # the console must outlive the device
        self.native = ffi.gc(lib.orc_debug_console_new(hooks.console.handle, spec.port & 0xFF), lib.orc_device_free)
        if self.native == ffi.NULL:
            raise MemoryError("orc_debug_console_new")

    def reset(self) -> None:
        """Nothing: what it has said stays with the console."""

    def state(self) -> Stateless:
        return Stateless()

    def restore(self, state: Stateless) -> None: ...


class ExitDevice(NativeDevice, Peripheral[ExitPort, Stateless]):
    """A write ends the VM with the value as its code. Reads, which the core answers, are 0."""

    State = Stateless

    def __init__(self, spec: ExitPort, hooks: Hooks) -> None:
        super().__init__(spec, hooks)
        self.native = ffi.gc(lib.orc_exit_port_new(), lib.orc_device_free)
        if self.native == ffi.NULL:
            raise MemoryError("orc_exit_port_new")

    def write(self, offset: int, size: int, value: int) -> None:
        self.hooks.end(Shutdown(code=value))

    def reset(self) -> None:
        """Nothing."""

    def state(self) -> Stateless:
        return Stateless()

    def restore(self, state: Stateless) -> None: ...
