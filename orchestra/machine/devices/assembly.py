"""The devices of one run of a VM: made from their specs, wired, listened to, and ended.

    spec.wiring() ─ addresses ──→ claims on the buses           accesses:   vCPU thread → device, under the claim's lock
                  ─ line, msis ─→ Hooks (backend/wiring)        interrupts: any thread → eventfd or line → kernel
                  ─ doorbells ──→ ioeventfds                    rings:      kernel → eventfd → a task → device
                  ─ pci ────────→ a slot of `PciHost`           queues:     kernel → eventfd → the VM's I/O thread
                    timers      → Timers                        expiries:   a task → device

`service` serves rings and expiries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import RLock
from typing import Any, Final, Protocol, runtime_checkable

import trio

from ...backend import Machine
from ...backend.memory import GuestMemory
from ...backend.memory_layout import memory_slots
from ...backend.wiring import InterruptLine, InterruptPulse
from ...model import platform
from ...model.actions import Outcome
from ...model.devices import DeviceSpec, Wiring
from ...model.errors import GuestMemoryError, SpecError, StateError
from ...model.spec import VmSpec
from ...native import ffi, lib
from ...native.core import Charged
from ..contain import contained, in_device
from ..pacer import Pacer
from .balloon import BalloonFigures
from .bridge import ConfigPorts
from .bus import Bus
from .console import Console
from .consoleport import ConsolePort
from .io import IoThread
from .pci import OnBus, PciHost
from .peripheral import NOWHERE, Hooks, implementation
from .service import Plugged, Service, taken

__all__ = ["Assembly", "Board", "Dma"]

log: Final = logging.getLogger("orchestra")


class Board(Protocol):
    """The run that the devices of a VM are plugged into."""

    spec: VmSpec
    ports: Bus
    mmio: Bus
    memory: GuestMemory

    def now(self) -> int: ...
    def end(self, outcome: Outcome) -> None: ...
    def answer_buckets(self) -> Sequence[Charged]:
        """What the work of the VM's devices is charged to, from the widest to the narrowest."""


@runtime_checkable
class Listener(Protocol):
    """A device that takes console input."""

    def listen(self) -> None:
        """Take what is typed at the VM's console from now on, and what was typed before. Called once, of one device."""


@runtime_checkable
class Served(Protocol):
    """A device whose queues the VM's I/O thread serves."""

    def attach(self, io: IoThread) -> None: ...


@runtime_checkable
class EventDevice(Protocol):
    """A device by which the guest is told of its platform's events."""

    def happened(self, event: int) -> None:
        """Tell the guest of `model.platform.POWER_BUTTON`, or of another such event."""


@runtime_checkable
class MemoryTaker(Protocol):
    """A device that takes memory from the guest for the host."""

    def take(self, size: int) -> None: ...
    def figures(self) -> BalloonFigures: ...


class Dma:
    """Guest memory as devices have it. A device can't write where the guest may not write.

    So a guest can't change read-only memory by a request to a device.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def read(self, address: int, size: int) -> bytes:
        return self._memory.read(address, size)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        stop = address + memoryview(data).nbytes
        for region in self._memory.regions:
            span = region.span
            if region.readonly and address < span.stop and span.start < stop:
                raise GuestMemoryError(
                    f"address {address:#x}, {stop - address} bytes: {span.start:#x}-{span.stop - 1:#x} is read-only"
                )
        self._memory.write(address, data)


class Assembly:
    """All devices of a VM (`VmSpec.machine_devices`), in their order.

    Made on any thread; the methods are for the fleet's thread.

    Parameters:
        ports: the host's ends of the devices' streams (`Wiring.streams`).
        post: runs a function soon on the fleet's thread; from any thread.
        in_turn: runs a function when it is this VM's turn (`machine.inbox`).
        pacer: keeps devices to a part of the event loop's time.
        states: what `state` returned for such a spec: the devices go on from there. None: power-on.

    Raises:
        SpecError: a device's addresses are taken, its implementation can't be found, or no device can have its state.
        StateError: the states belong to other devices.
        KvmError, ResourceLimit: the kernel refuses what a device needs.
    """

    def __init__(
        self,
        board: Board,
        machine: Machine,
        console: Console,
        ports: Mapping[str, ConsolePort],
        post: Callable[..., object],
        in_turn: Callable[[Callable[[], object]], object],
        pacer: Pacer,
        states: Sequence[object] | None = None,
    ) -> None:
        specs = board.spec.machine_devices
        if states is not None and len(states) != len(specs):
            raise StateError(f"vm {board.spec.name!r}: {len(states)} states for {len(specs)} devices")
        self._board, self._machine, self._console, self._ports = board, machine, console, ports
        whose = board.spec.tenant or "default", board.spec.name
        self._service = Service(whose, board.now, board.end, board.answer_buckets(), in_turn, pacer, post)
        self._service.going_on = states is not None
        self._makes: Plugged | None = None
        self._io: IoThread | None = None
        self._bus, self._guest = self._pci_bus(specs)
        self._slots = iter(self._bus.slots if self._bus is not None else ())
        self._stopped = False
        self._held = False
        self._taken: int | None = None  # while it is held: what is to be asked for when it goes on
        self.plugged: list[Plugged] = []
        try:
            for index, spec in enumerate(specs):
                self._plug(spec, None if states is None else states[index])
            for device in (plugged.device for plugged in self.plugged):
                if isinstance(device, Listener):
                    device.listen()
                    break
            self._serve()
        except BaseException:
            self.stop()
            raise

    # ---- plugging

    def _pci_bus(self, specs: Sequence[DeviceSpec]) -> tuple[PciHost | None, Any]:
        """The PCI bus, if a device hosts one, and guest memory as devices of the core have it."""
        wirings = [spec.wiring() for spec in specs]
        if not any(wiring.hosts_pci for wiring in wirings):
            return None, None
        bus = PciHost(self._board.mmio, [wiring.pci for wiring in wirings if wiring.pci is not None])
        self._board.ports.claim(platform.PCI_PORTS, ConfigPorts(bus))
        slots, log = memory_slots(self._board.memory), self._machine.dirty
        made = lib.orc_guest_memory_new(slots, len(slots), ffi.NULL if log is None else log.handle)
        if made == ffi.NULL:
            raise MemoryError("orc_guest_memory_new")
        return bus, ffi.gc(made, lib.orc_guest_memory_free)

    def _serve(self) -> None:
        """Start the I/O thread, held, if a device needs it."""
        served = [plugged.device for plugged in self.plugged if isinstance(plugged.device, Served)]
        if served:
            self._io = IoThread(self._board.spec.name, self._machine.engines[0].core.handle)
            for device in served:
                device.attach(self._io)

    def _plug(self, spec: DeviceSpec, state: object) -> None:
        kind, wiring, lock = implementation(spec), spec.wiring(), RLock()
        name = f"{type(spec).__name__} at {_where(wiring)}"
        plugged = self._makes = Plugged(name, None, lock, wiring)  # type: ignore[arg-type]  # in a moment
        hooks = self._hooks(plugged)
        with in_device():
            plugged.device = kind(spec, hooks) if state is None else kind.from_state(spec, hooks, state)
        self._makes = None
        self.plugged.append(plugged)
        board, wires = self._board, self._machine.wires
        if wiring.ports is not None:
            board.ports.claim(wiring.ports, plugged.device, lock)
        if wiring.mmio is not None:
            board.mmio.claim(wiring.mmio, plugged.device, lock)
        for bell in wiring.doorbells:
            assert wires is not None  # otherwise the backend has refused the spec
            address, pio = wiring.address(bell), bell.bus == "ports"
            plugged.bells.append(wires.doorbell(address, bell.size, bell.value, pio=pio))
        if hooks.slot is not None:
            if not isinstance(plugged.device, OnBus):
                raise SpecError(f"{kind.__name__} is on the PCI bus: it must define interrupts_changed()")
            hooks.slot.plug(plugged.device, lock, hooks.bells)

    def _hooks(self, plugged: Plugged) -> Hooks:
        wires, wiring = self._machine.wires, plugged.wiring
        line = wiring.line
        level: InterruptLine = NOWHERE
        pulse: InterruptPulse = NOWHERE
        if wires is not None and line is not None and self._board.spec.irqchip_kind == "full":
            match line.trigger:
                case "level":
                    level = wires.line(line.gsi)
                case "edge":
                    pulse = wires.pulse(line.gsi)
                case "resample":
                    pulse, plugged.ends = wires.resampled(line.gsi)
        slot = next(self._slots) if wiring.pci is not None else None
        bells = wiring.pci.bells if wiring.pci is not None else ()
        return Hooks(
            memory=Dma(self._board.memory),
            timer=lambda expired: self._service.new_timer(self._makes, expired),
            console=self._console,
            end=self._board.end,
            line=level,
            pulse=pulse,
            msis=tuple(wires.msi() for _ in range(wiring.vectors)) if wires is not None else (),
            interrupts=self._machine.interrupts,
            slot=slot,
            bells=tuple(wires.bell() for _ in bells) if wires is not None else (),
            bus=self._bus if wiring.hosts_pci else None,
            ports=self._ports,
            guest=self._guest,
            backing=self._board.memory.backing,
        )

    # ---- rings and expiries

    @property
    def listens(self) -> bool:
        """Whether there are doorbells, resampled lines or timers, so that `run` has something to do."""
        return self._service.has_timers or any(plugged.listened for plugged in self.plugged)

    async def run(self, ended: trio.Event) -> None:
        """Serve doorbells and timers until the guest has ended."""
        await self._service.run(self.plugged, ended)

    # ---- events of the platform

    @property
    def event_device(self) -> Plugged | None:
        """The device that tells the guest of events; None: there is none."""
        return next((plugged for plugged in self.plugged if isinstance(plugged.device, EventDevice)), None)

    async def tell(self, plugged: Plugged, event: int) -> None:
        """Tell the guest of an event: in the VM's turn, and if it is paused, once it goes on."""
        device = plugged.device
        assert isinstance(device, EventDevice)  # it is `event_device`
        await self._service.serve(plugged, partial(device.happened, event))

    # ---- memory

    @property
    def memory_taker(self) -> MemoryTaker | None:
        """The balloon; None: there is none."""
        found = (plugged.device for plugged in self.plugged)
        return next((device for device in found if isinstance(device, MemoryTaker)), None)

    def keep_to(self, memory: int | None) -> None:
        """Ask the guest to keep to so many bytes of RAM; None: to all of it. A paused VM is asked when it goes on, as
        nothing of a quiesced VM may change. Nothing is done without a balloon."""
        size = self._board.spec.backing.size
        self._taken = size - (size if memory is None else memory)
        if not self._held:
            self._take()

    def _take(self) -> None:
        size, self._taken = self._taken, None
        taker = self.memory_taker
        if size is not None and taker is not None:
            taker.take(size)

    # ---- pause, state, reset, end

    def begin(self) -> None:
        """The guest's first instruction is next: queues are served from now on, unless the VM is paused."""
        if self._io is not None:
            self._io.let_go("start")

    def hold(self) -> None:
        """The VM pauses: from now on nothing reaches a device by ring, timer or queue, until `let_go`.

        It does not wait for what is in flight. `state` does.
        """
        self._held = True
        self._service.hold()
        if self._io is not None:
            self._io.hold("pause")

    def let_go(self) -> None:
        """The VM goes on. Timers whose time came during the pause expire now."""
        self._held = False
        self._take()
        self._service.let_go()
        if self._io is not None:
            self._io.let_go("pause")

    def state(self) -> tuple[object, ...]:
        """The state of each device, in the order of the spec. While the VM is quiesced."""
        found = []
        if self._io is not None:
            self._io.wait()
        for plugged in self.plugged:
            with plugged.lock, in_device():
                found.append(plugged.device.state())
        return tuple(found)

    def reset(self) -> None:
        """Reset all devices to power-on, and drop rings that were not served yet. While no vCPU runs."""
        if self._io is not None:
            self._io.hold("reset")
            self._io.wait()
        for plugged in self.plugged:
            with plugged.lock, in_device():
                plugged.device.reset()
                for fd in [*plugged.bells, *([] if plugged.ends is None else [plugged.ends])]:
                    taken(fd)
        if self._io is not None:
            self._io.let_go("reset")

    @property
    def has_queues(self) -> bool:
        """Whether there is an I/O thread, so that `end_queues` may take long."""
        return self._io is not None

    def end_queues(self) -> None:
        """End the I/O thread, which first waits for all requests in flight. The guest has ended. Any thread."""
        if self._io is not None:
            self._io.stop()

    def stop(self, problems: list[str] | None = None) -> None:
        """Stop all devices, after the guest has ended and `run` is over. An error of one stops no other."""
        if self._stopped:
            return
        self._stopped = True
        self._service.close()
        self.end_queues()  # first: no device can stop while it is served
        for plugged in self.plugged:
            with contained(f"vm {self._board.spec.name}: stop of device {plugged.name}", problems), plugged.lock:
                plugged.device.stop()
        if self._io is not None:
            self._io.close()


def _where(wiring: Wiring) -> str:
    found = (("ports", wiring.ports), ("mmio", wiring.mmio))
    if wiring.pci is not None:
        return "the PCI bus"
    return " and ".join(f"{bus} {span.start:#x}" for bus, span in found if span is not None)
