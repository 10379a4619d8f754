"""A 16550A UART. Its registers are in native/uart.c."""

from __future__ import annotations

from typing import Any

import attrs

from ...model.checks import fail
from ...model.devices import Serial
from ...model.errors import SpecError
from ...native import ffi, lib
from .bus import NativeDevice
from .peripheral import Hooks, Peripheral

__all__ = ["Uart16550", "UartState"]


@attrs.frozen
class UartState:
    """The registers. `received`: the bytes that wait in the FIFO, the oldest first. `level`: of the interrupt line."""

    received: bytes = b""
    ier: int = 0
    lcr: int = 0
    mcr: int = 0
    scratch: int = 0
    fcr: int = 0
    line_errors: int = 0
    modem_changes: int = 0
    divisor: int = 12
    thre_pending: bool = False
    level: bool = False


class Uart16550(NativeDevice, Peripheral[Serial, UartState]):
    """Eight registers. What the guest transmits goes to the VM's console. What is typed there comes in (`listen`)."""

    State = UartState

    def __init__(self, spec: Serial, hooks: Hooks) -> None:
        super().__init__(spec, hooks)  # the hooks must outlive the device
        interrupts = ffi.NULL if spec.irq is None or hooks.interrupts is None else hooks.interrupts
        self._adopt(lib.orc_serial_new(hooks.console.handle, interrupts, spec.irq or 0))

    def _adopt(self, handle: Any) -> None:
        if handle == ffi.NULL:
            raise MemoryError("orc_uart_new")
        self._handle = handle
        self.native = ffi.gc(lib.orc_uart_device(handle), lib.orc_device_free)

    def listen(self) -> None:
        lib.orc_serial_listen(self._handle)

    def paused(self) -> None:
        lib.orc_serial_hold(self._handle, True)

    def resumed(self) -> None:
        lib.orc_serial_hold(self._handle, False)

    def stop(self) -> None:
        # Not left to the garbage collector: until the next run nothing takes input.
        lib.orc_serial_stop(self._handle)

    def reset(self) -> None:
        lib.orc_uart_reset(self._handle)

    def state(self) -> UartState:
        raw = ffi.new("struct orc_uart_state *")
        lib.orc_uart_save(self._handle, raw)
        received = bytes(ffi.buffer(raw.received, raw.waiting))
        fields = attrs.fields_dict(UartState).keys() - {"received"}
        return UartState(received=received, **{name: getattr(raw, name) for name in fields})

    def restore(self, state: UartState) -> None:
        values = attrs.asdict(state)
        received = values.pop("received")
        if not isinstance(received, bytes) or len(received) > lib.ORC_UART_FIFO:
            raise fail("received", received, f"must be bytes, {lib.ORC_UART_FIFO} at most, as the FIFO has")
        try:
            raw = ffi.new("struct orc_uart_state *", {**values, "received": received, "waiting": len(received)})
        except (OverflowError, TypeError) as error:
            raise SpecError(f"serial port: {state}: a register's value does not fit ({error})") from None
        if not lib.orc_uart_load(self._handle, raw):
            raise SpecError(f"serial port: {state}: no 16550A can be in that state")
