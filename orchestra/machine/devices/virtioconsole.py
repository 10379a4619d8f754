"""The virtio console and its ports: what the core does not do of them (native/virtio_console.c)."""

from __future__ import annotations

from typing import Any

from ...model.virtio import Console
from ...native import lib
from .peripheral import Hooks
from .virtio import VirtioDevice

__all__ = ["ConsoleDevice"]


class ConsoleDevice(VirtioDevice[Console]):
    """What waits to be typed or read is the console's state and that of its ports, not the device's."""

    def __init__(self, spec: Console, hooks: Hooks) -> None:
        super().__init__(spec, hooks)  # console and ports must outlive the device
        self._paused = False
        self._size: tuple[int, int] | None = None  # which the guest is told once it goes on
        self._ports = [hooks.ports[name] for name in spec.ports]
        for number, (name, port) in enumerate(zip(spec.ports, self._ports, strict=True), 1):
            encoded = name.encode()
            lib.orc_virtio_console_port(self.handle, number, encoded, len(encoded), port.handle)
        hooks.console.add_screen(self._resize)

    def _make(self) -> Any:
        spec, console = self.spec, self.hooks.console.handle
        return lib.orc_virtio_console_new(self.hooks.guest, console, spec.columns, spec.rows, len(spec.ports))

    def _resize(self, columns: int, rows: int) -> None:
        if self._paused:
            self._size = columns, rows
        else:
            lib.orc_virtio_console_resize(self.handle, columns, rows)

    def paused(self) -> None:
        self._paused = True

    def resumed(self) -> None:
        self._paused = False
        size, self._size = self._size, None
        if size is not None:
            self._resize(*size)

    def listen(self) -> None:
        lib.orc_virtio_console_listen(self.handle)

    def stop(self) -> None:
        self.hooks.console.remove_screen(self._resize)
        lib.orc_virtio_console_stop(self.handle)  # consoles outlive the I/O thread, and are written to
        for port in self._ports:
            port.changed()  # it is closed, which nobody else says
        super().stop()
