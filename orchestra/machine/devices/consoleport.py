"""The ports of a VM: byte streams to programs in the guest, beside its console."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import trio

from ...model.checks import whole
from ...model.devices import DeviceSpec
from ...model.errors import StateError
from ...native import ffi, lib
from .stream import Notify, Stream

__all__ = ["ConsolePort", "Ports"]

KEPT: Final = int(lib.ORC_CONSOLE_KEPT)


class ConsolePort(Stream):
    """One end of a byte stream; a program in the guest that opens the port of that name has the other.

        port = vm.ports["org.example.agent"]
        await port.wait_open()
        await port.write(b"ping\\n")
        answer = await port.read()

    Nothing is lost and nothing piles up: up to 64 KiB that the guest wrote wait here, and with what it writes then, the
    program in the guest waits until you read. The guest opens and closes the port as often as it likes, and a reset or
    a restart of the VM closes it. What the guest has written before it closed can still be read.

    One task may read and one may write at a time.

    Attributes:
        name: of `orc.Console(ports=...)`.
    """

    def __init__(self, notify: Notify, name: str, vm: str = "") -> None:
        super().__init__(lib.orc_console_new(), notify, vm)
        self.name = name
        self._reads = self._writes = False

    def __repr__(self) -> str:
        return f"<ConsolePort {self.name!r} {'open' if self.is_open else 'closed'}>"

    @property
    def is_open(self) -> bool:
        """Whether a program in the guest has it open, or has closed it and you have not read all that it wrote."""
        return self._opening() != 0

    def _opening(self) -> int:
        """The number of the guest's opening; 0: it has it not open."""
        return 0 if self._closed else int(lib.orc_port_opening(self.handle))

    async def wait_open(self) -> None:
        """Wait until a program in the guest has opened it.

        Raises:
            StateError: the VM has ended.
        """
        await trio.lowlevel.checkpoint()
        while True:
            changed = self._changed
            if self.is_open:
                return
            if self._closed:
                raise StateError(f"{self._who}the VM has ended, and no program will open it")
            if lib.orc_port_want(self.handle, 0, False):
                await changed.wait()

    async def read(self, most: int = KEPT) -> bytes:
        """What the guest wrote: one byte at least, as soon as there is one.

        Returns b"" once the guest has closed the port, or has not opened it yet, and all that it wrote was read. If
        this is cancelled, nothing is lost.

        Parameters:
            most: bytes that are returned at most.

        Raises:
            SpecError: `most` is no number of bytes from 1 on.
            trio.BusyResourceError: another task is reading.
        """
        whole("most", most, 1, 1 << 32, " bytes")
        if self._reads:
            raise trio.BusyResourceError(f"{self._who}another task is reading")
        self._reads = True
        try:
            return await self._read(min(most, KEPT))
        finally:
            self._reads = False

    async def _read(self, most: int) -> bytes:
        room = ffi.new("uint8_t[]", most)
        while True:
            changed, opening = self._changed, self._opening()  # before the bytes: what comes before a close is there
            await trio.lowlevel.checkpoint()  # before bytes are taken: a cancelled call has taken none
            if size := lib.orc_port_take(self.handle, room, most):
                return bytes(ffi.buffer(room, size))
            if not opening:
                return b""
            if lib.orc_port_want(self.handle, opening, True):
                await changed.wait()

    async def write(self, data: bytes | str) -> None:
        """Give the program in the guest that to read. Returns when all of it is on its way: up to 4 KiB wait.

        If this is cancelled, a part of the data may be on its way.

        Raises:
            StateError: no program has the port open, or it closed the port before all was on its way.
            trio.BusyResourceError: another task is writing.
        """
        if self._writes:
            raise trio.BusyResourceError(f"{self._who}another task is writing")
        self._writes = True
        try:
            opening = self._opening()
            await self._type(data, lambda: self._refusal(opening))
        finally:
            self._writes = False

    def _refusal(self, opening: int) -> str | None:
        if not opening:
            return f"{self._who}no program in the guest has it open: use wait_open() first"
        return None if opening == self._opening() else f"{self._who}the guest has closed it"

    @property
    def _who(self) -> str:
        return (f"vm {self._vm!r}: " if self._vm else "") + f"port {self.name!r}: "


class Ports(Mapping[str, ConsolePort]):
    """The ports of a VM, by their names. They stay when the VM is restarted or reset.

    Parameters:
        devices: those of the VM, whose `Wiring.streams` these are.
    """

    def __init__(self, notify: Notify, devices: Iterable[DeviceSpec], vm: str = "") -> None:
        names = [name for device in devices for name in device.wiring().streams]
        self._ports = {name: ConsolePort(notify, name, vm) for name in names}

    def __getitem__(self, name: str) -> ConsolePort:
        return self._ports[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ports)

    def __len__(self) -> int:
        return len(self._ports)

    def __repr__(self) -> str:
        return f"<Ports {', '.join(map(repr, self._ports.values()))}>"

    def wake(self) -> None:
        """As `Stream.wake`, of each."""
        for port in self._ports.values():
            port.wake()

    def close(self) -> None:
        """The VM has ended. Fleet's thread."""
        for port in self._ports.values():
            port.close()
