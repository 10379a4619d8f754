"""A guest played on one engine of a backend, on the calling thread and without a fleet: thousands of them a minute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal

import attrs

from conftest import drained
from orchestra import FlatImage, MiB, VmSpec
from orchestra.backend.emulated.machine import EmulatedBackend
from orchestra.backend.kvm.machine import KvmBackend
from orchestra.backend.memory import GuestMemory
from orchestra.machine import boot
from orchestra.machine.devices.bus import Bus
from orchestra.machine.vcpu import Vcpu
from orchestra.model import exits
from orchestra.model.actions import Failed, Halted, Outcome, Shutdown, Stopped
from orchestra.model.spec import MemoryRegion
from orchestra.native.core import Command, Counters, FleetCore, VcpuCore, monotonic_ns
from orchestra.native.records import decode, event_mask, unpack

__all__ = ["MMIO", "PORTS", "Access", "Detection", "Played", "answer", "play"]

PORTS = range(0x500, 0x540)
MMIO = range(0xD000_0000, 0xD000_4000)
"""Where there is a device in each guest."""

Detection = Literal["fault-like", "trap-like"]


@attrs.frozen
class Access:
    """What the device saw. `value`: what was written, or what it answered."""

    bus: str
    write: bool
    offset: int
    size: int
    value: int


def answer(number: int, size: int) -> int:
    """What the device answers to its so many-th access: the same on each backend, and no two alike."""
    return (0x9E37_79B9_7F4A_7C15 * (number + 1)) & ((1 << 8 * size) - 1)


class _Device:
    def __init__(self, bus: str, log: list[Access]) -> None:
        self.bus, self.log = bus, log

    def read(self, offset: int, size: int) -> int:
        value = answer(len(self.log), size)
        self.log.append(Access(self.bus, False, offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(Access(self.bus, True, offset, size, value))


class _Host:
    """What a vCPU needs of a VM."""

    name = "guest"
    pause_number = 0

    def __init__(self) -> None:
        self.ports, self.mmio = Bus("ports", 1 << 16), Bus("mmio", 1 << 64)
        self.outcome: Outcome | None = None
        self.calls: list[Callable[[], None]] = []

    def on_parked(self, index: int, number: int) -> None: ...

    def on_ended(self, index: int, outcome: Outcome) -> None:
        self.outcome = outcome

    def commanded(self, index: int) -> list[Callable[[], None]]:
        calls, self.calls = self.calls, []
        return calls


class _Lenient(Vcpu):
    """It goes on after exits that would fail it."""

    def __init__(self, host: _Host, index: int, engine: Any, goes_on: tuple[type[exits.Exit], ...]) -> None:
        super().__init__(host, index, engine)
        self.goes_on = goes_on

    def _judge(self, exit: exits.Exit) -> Outcome | None:
        return None if isinstance(exit, self.goes_on) else super()._judge(exit)


@attrs.frozen
class Played:
    """What came of it."""

    outcome: Halted | Shutdown | Stopped | Failed
    exits: list[exits.Exit]
    accesses: list[Access]
    registers: Any
    special: Any
    memory: list[bytes]
    """Of each region, RAM first."""
    counters: Counters

    def word(self, address: int, size: int = 4) -> int:
        """A word of RAM."""
        return int.from_bytes(self.memory[0][address : address + size], "little")

    @property
    def locks(self) -> list[int | None]:
        """RIP of each bus lock."""
        return [exit.rip for exit in self.exits if exit.bus_lock]


def play(
    backend: EmulatedBackend | KvmBackend,
    code: bytes,
    mode: Literal[16, 32, 64] = 32,
    *,
    load: int = 0x1000,
    memory: int = MiB,
    detection: Detection | None = None,
    mmio: Iterable[range] = (MMIO,),
    regions: Iterable[MemoryRegion] = (),
    data: Iterable[tuple[int, bytes]] = (),
    seconds: float = 10,
    devices: Iterable[tuple[range | None, range | None, Any]] = (),
    debug: tuple[int, tuple[int, ...]] | None = None,
    goes_on: tuple[type[exits.Exit], ...] = (),
    prepare: Callable[[GuestMemory, VcpuCore], Callable[[], object] | None] | None = None,
) -> Played:
    """Run `code` to its end; it is stopped after so many seconds.

    `data`: what else memory holds at first. `debug`: for `guest_debug`. `goes_on`: exits that do not end it here.
    `prepare`: called before it runs, and what it returns once it has ended.
    """
    image = FlatImage(code=code, load=load, mode=mode)
    spec = VmSpec(name="guest", boot=image, memory=memory, regions=tuple(regions), bus_lock_detection=detection)
    guest_memory, fleet = GuestMemory(spec), FleetCore()
    core, host = VcpuCore(fleet, 1), _Host()
    core.set_buses(host.ports.handle, host.mmio.handle)
    states = boot.load(spec, guest_memory)
    for address, content in data:
        guest_memory.write(address, content)
    machine = backend.create(spec, [core], guest_memory, states, bus_locks=backend.bus_lock_detection() is not None)
    log: list[Access] = []
    claims = [(PORTS, None, _Device("port", log)), *((None, span, _Device("mmio", log)) for span in mmio), *devices]
    for ports, addresses, device in claims:
        if ports is not None:
            host.ports.claim(ports, device)
        if addresses is not None:
            host.mmio.claim(addresses, device)
    core.subscribe(event_mask((exits.Exit,)))
    engine: Any = machine.engines[0]
    if debug is not None:
        engine.guest_debug(*debug)
    finish = prepare(guest_memory, core) if prepare is not None else None
    vcpu = _Lenient(host, 0, engine, goes_on)
    timer = threading.Timer(seconds, core.command, (Command.STOP,))
    timer.daemon = True
    timer.start()
    try:
        vcpu.drive()
        told = [decode(unpack(record), "guest", 0) for record in drained(fleet)]
        assert host.outcome is not None
        return Played(
            outcome=host.outcome,
            exits=told,
            accesses=log,
            registers=vcpu.final_registers,
            special=engine.special_registers(),
            memory=[guest_memory.read(region.span.start, len(region.span)) for region in guest_memory.regions],
            counters=core.counters(monotonic_ns()),
        )
    finally:
        timer.cancel()
        timer.join()
        if finish is not None:
            finish()
        machine.close()
        core.close()
        fleet.close()
        guest_memory.close()
