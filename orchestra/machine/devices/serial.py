"""A 16550A UART. Its registers are in native/uart.c."""

from __future__ import annotations

from typing import Any

from ...native import ffi, lib
from .bus import NativeDevice
from .console import Console

__all__ = ["Uart16550"]


class Uart16550(NativeDevice):
    """Eight registers. What is transmitted goes to `console`; `receive` feeds it.

    Parameters:
        interrupts: the lines of an irqchip (``orc_interrupts *``), one of which it is wired to; None: to none.
        gsi: which of them.
    """

    def __init__(self, console: Console, interrupts: Any = None, gsi: int = 0) -> None:
        self._kept = (console, interrupts)  # they must outlive the device
        self._adopt(lib.orc_serial_new(console.handle, ffi.NULL if interrupts is None else interrupts, gsi))

    def _adopt(self, handle: Any) -> None:
        if handle == ffi.NULL:
            raise MemoryError("orc_uart_new")
        self._handle = handle
        self.native = ffi.gc(lib.orc_uart_device(handle), lib.orc_device_free)

    def receive(self, data: bytes) -> int:
        """Bytes from the other side; returns how many fitted in the FIFO. Callers keep the rest. Any thread."""
        return int(lib.orc_uart_receive(self._handle, ffi.from_buffer(data), len(data)))
