"""Two small port devices: a debug console and an exit port (QEMU's isa-debugcon and isa-debug-exit)."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["DebugConsolePort", "ExitDevice"]


class DebugConsolePort:
    """Bytes written go to `output`; a read gives the low byte of the port's number, by which guests detect it."""

    def __init__(self, port: int, output: Callable[[bytes], None]) -> None:
        self._port = port
        self._output = output

    def read(self, offset: int, size: int) -> int:
        return self._port & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        self._output(value.to_bytes(size, "little"))


class ExitDevice:
    """A write ends the VM with the value as its code."""

    def __init__(self, end: Callable[[int], None]) -> None:
        self._end = end

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._end(value)
