"""The devices of one run of a VM: made from their specs, wired, listened to, and ended.

    spec.wiring() ─ addresses ──→ claims on the buses           accesses:   vCPU thread → device, under the claim's lock
                  ─ line, msis ─→ Hooks (backend/wiring)        interrupts: any thread → eventfd or line → kernel
                  ─ doorbells ──→ ioeventfds                    rings:      kernel → eventfd → a task → device
                  ─ pci ────────→ a slot of `PciHost`           queues:     kernel → eventfd → the VM's I/O thread,
                                                                            or another process (`vhost`)
                    timers      → Timers                        expiries:   a task → device

`service` serves rings and expiries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import trio

from ...backend import Machine
from ...backend.memory import GuestMemory
from ...backend.memory_layout import memory_slots
from ...backend.wiring import InterruptLine, InterruptPulse
from ...model import platform
from ...model.actions import Outcome
from ...model.devices import DeviceSpec, Wiring
from ...model.disk import Disk
from ...model.errors import GuestMemoryError, SpecError, StateError
from ...model.spec import Meter, VmSpec
from ...native import ffi, lib
from ...native.core import Charged
from ..contain import contained, in_device
from ..debt import Owed
from ..pacer import Pacer
from .balloon import BalloonFigures
from .bridge import ConfigPorts
from .bus import Bus
from .console import Console
from .consoleport import ConsolePort
from .disk import DiskDevice
from .io import IoThread
from .pci import OnBus, PciHost
from .peripheral import NOWHERE, DiskPort, Hooks, SharedRam, implementation
from .service import Plugged, Service, taken

if TYPE_CHECKING:  # a program without such devices need not have that in its memory
    from .vhost.backend import BackEnd

__all__ = ["Assembly", "Board", "DisksOfVm", "Dma", "close_back_ends", "connect_back_ends"]

log: Final = logging.getLogger("orchestra")

NONE: Final[Mapping[int, BackEnd]] = MappingProxyType({})


class DisksOfVm(Protocol):
    """The disks of a VM (`machine.disks`), as its runs see them."""

    def of_number(self, number: int) -> DiskPort | None:
        """What the VM's first, second or later disk has beside its runs."""


class Board(Protocol):
    """The run that the devices of a VM are plugged into."""

    spec: VmSpec
    ports: Bus
    mmio: Bus
    memory: GuestMemory
    back_ends: Mapping[int, BackEnd]
    """Of the devices that other processes serve, by their place (`connect_back_ends`). They end with the devices."""
    owed: Owed
    disks: DisksOfVm

    def now(self) -> int: ...
    def end(self, outcome: Outcome) -> None: ...
    def device_buckets(self, meter: Meter) -> Sequence[Charged]:
        """What the work of the VM's devices is charged to, from the widest to the narrowest."""


@runtime_checkable
class Listener(Protocol):
    """A device that takes console input."""

    def listen(self) -> None:
        """Take what is typed at the VM's console from now on, and what was typed before. Called once, of one device."""


@runtime_checkable
class Asked(Protocol):
    """A device that has requests of its guest in flight."""

    @property
    def label(self) -> str:
        """What it is called where it keeps a pause waiting."""

    @property
    def outstanding(self) -> int | None:
        """How many of its requests are in flight. None: it can't be asked just now. Waits for no lock."""


@runtime_checkable
class Served(Protocol):
    """A device whose queues the VM's I/O thread serves."""

    def attach(self, io: IoThread) -> None: ...
    def drained(self) -> None:
        """The I/O thread has ended: give back what may take long. Before `stop`. Any thread."""


@runtime_checkable
class Reached(Protocol):
    """A device that the host reaches at any time: by what is typed at a console, or by its new size."""

    def paused(self) -> None:
        """The VM pauses: from now on what the host does waits, and changes nothing of the device. Fleet's thread."""

    def resumed(self) -> None:
        """The VM goes on: now it gets that. Fleet's thread."""


class Server(Protocol):
    """Serves queues while nothing holds it, or has another process do that: `IoThread`, `vhost.backend.BackEnd`."""

    def hold(self, reason: str) -> None:
        """Serve no queue any more. Does not wait for what is in flight."""

    @property
    def is_still(self) -> bool:
        """While it is held: whether nothing is in flight."""

    def wait(self) -> None:
        """While it is held: wait until nothing is in flight."""

    def let_go(self, reason: str) -> None: ...
    def stop(self) -> None:
        """Touch no guest memory any more. Waits for what is in flight. Any thread."""

    def close(self) -> None:
        """Give back what it holds of the host, once its devices have stopped."""


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


def connect_back_ends(spec: VmSpec) -> dict[int, BackEnd]:
    """Connect to the processes that serve devices of this VM, or begin them. They are keyed by the device's place.

    On a thread that may wait: a process that does not answer takes its time, and no other VM's.

    Raises:
        OrchestraError: one can't be had; the others are ended again.
    """
    made: dict[int, BackEnd] = {}
    try:
        for index, device in enumerate(spec.machine_devices):
            if device.has_back_end:
                kind: Any = implementation(device)
                made[index] = kind.prepare(device)
    except BaseException:
        close_back_ends(made)
        raise
    return made


def close_back_ends(back_ends: Mapping[int, BackEnd]) -> None:
    """End those that no `Assembly` has ended. On a thread that may wait."""
    for back_end in back_ends.values():
        back_end.close()


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
        self._back_ends = back_ends = board.back_ends
        self._servers: list[Server] = [*back_ends.values()]
        self._post = post
        if states is not None and len(states) != len(specs):
            raise StateError(f"vm {board.spec.name!r}: {len(states)} states for {len(specs)} devices")
        self._board, self._machine, self._console, self._ports = board, machine, console, ports
        whose = board.spec.tenant or "default", board.spec.name
        answers = board.device_buckets(Meter.ANSWERS)
        self._service = Service(whose, board.now, board.end, answers, in_turn, pacer, post, board.owed)
        self._service.going_on = states is not None
        self._makes: Plugged | None = None
        self._disks = 0  # that were plugged so far
        self._io: IoThread | None = None
        self._bus, self._guest = self._pci_bus(specs)
        self._ram = self._shared_ram() if back_ends else None
        self._slots = iter(self._bus.slots if self._bus is not None else ())
        self._stopped = self._drained = False
        self._held = False
        self._taken: int | None = None  # while it is held: what is to be asked for when it goes on
        self.plugged: list[Plugged] = []
        try:
            for index, spec in enumerate(specs):
                self._plug(spec, None if states is None else states[index], back_ends.get(index))
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

    def _shared_ram(self) -> SharedRam:
        """The RAM alone: other regions are this process's."""
        spec, memory = self._board.spec, self._board.memory
        assert memory.descriptor is not None  # `VmSpec.backing` has seen to it
        whole = memory_slots(memory)
        slots = [slot for slot in whole if slot.guest_phys_addr in {span.start for span in spec.ram}]
        made = lib.orc_guest_memory_new(ffi.new("struct kvm_userspace_memory_region[]", slots), len(slots), ffi.NULL)
        if made == ffi.NULL:
            raise MemoryError("orc_guest_memory_new")
        sizes = [len(span) for span in spec.ram]
        regions = tuple((span.start, len(span), sum(sizes[:place])) for place, span in enumerate(spec.ram))
        return SharedRam(memory.descriptor, regions, ffi.gc(made, lib.orc_guest_memory_free))

    def _served(self) -> list[Served]:
        return [plugged.device for plugged in self.plugged if isinstance(plugged.device, Served)]

    def _reached(self) -> list[Reached]:
        return [plugged.device for plugged in self.plugged if isinstance(plugged.device, Reached)]

    def _serve(self) -> None:
        """Start the I/O thread, held, if a device needs it."""
        served = self._served()
        if served:
            voice, exits = self._machine.engines[0].core.handle, self._board.device_buckets(Meter.EXITS)
            self._io = io = IoThread(self._board.spec.name, voice, exits)
            self._servers.append(io)
            for device in served:
                device.attach(io)

    def _plug(self, spec: DeviceSpec, state: object, back_end: BackEnd | None) -> None:
        kind, wiring, lock = implementation(spec), spec.wiring(), RLock()
        name = f"{type(spec).__name__} at {_where(wiring)}"
        plugged = self._makes = Plugged(name, None, lock, wiring)  # type: ignore[arg-type]  # in a moment
        hooks = self._hooks(plugged, self._disk_port(spec), back_end)
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

    def _disk_port(self, spec: DeviceSpec) -> DiskPort | None:
        if not isinstance(spec, Disk) or spec.has_back_end:
            return None
        self._disks += 1
        return self._board.disks.of_number(self._disks - 1)

    def _hooks(self, plugged: Plugged, disk: DiskPort | None, back_end: BackEnd | None) -> Hooks:
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
            ram=self._ram,
            back_end=back_end,
            slot=slot,
            bells=tuple(wires.bell() for _ in bells) if wires is not None else (),
            bus=self._bus if wiring.hosts_pci else None,
            ports=self._ports,
            guest=self._guest,
            open_file=self._board.memory.open_file,
            disk=disk,
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
        for server in self._servers:
            server.let_go("start")

    def hold(self, still: Callable[[], object] = lambda: None) -> None:
        """The VM pauses: from now on nothing reaches a device by ring, timer, queue or console, until `let_go`.

        It does not wait for what is in flight: see `is_still`.

        Parameters:
            still: called on the fleet's thread for each back-end of a device, once that is still.
        """
        self._held = True
        self._service.hold()
        for device in self._reached():
            device.paused()
        for server in self._servers:
            server.hold("pause")
        for back_end in self._back_ends.values():
            back_end.when_still(lambda: self._post(still))

    @property
    def is_still(self) -> bool:
        """While it is held: no request to a device is in flight. Where there are some, the fleet's thread is told once
        they are done: by the drain task (`IoThread`, `voice`), or as `hold` says."""
        return all(server.is_still for server in self._servers)

    def outstanding(self) -> list[tuple[str, int | None]]:
        """The devices with requests in flight, and how many; None: not known just now. Waits for nothing."""
        asked = [plugged.device for plugged in self.plugged if isinstance(plugged.device, Asked)]
        return [(device.label, found) for device in asked if (found := device.outstanding) != 0]

    def let_go(self) -> None:
        """The VM goes on. Timers whose time came during the pause expire now."""
        self._held = False
        self._take()
        for device in self._reached():
            device.resumed()
        self._service.let_go()
        for server in self._servers:
            server.let_go("pause")

    def state(self) -> tuple[object, ...]:
        """The state of each device, in the order of the spec. While the VM is quiesced."""
        found = []
        for server in self._servers:
            server.wait()
        for plugged in self.plugged:
            with plugged.lock, in_device():
                found.append(plugged.device.state())
        return tuple(found)

    def reset(self) -> None:
        """Reset all devices to power-on, and drop rings that were not served yet. While no vCPU runs."""
        for server in self._servers:
            server.hold("reset")
        for server in self._servers:
            server.wait()
        for plugged in self.plugged:
            with plugged.lock, in_device():
                plugged.device.reset()
                for fd in [*plugged.bells, *([] if plugged.ends is None else [plugged.ends])]:
                    taken(fd)
        for server in self._servers:
            server.let_go("reset")

    @property
    def has_queues(self) -> bool:
        """Whether queues are served, so that `end_queues` may take long."""
        return bool(self._servers)

    def cap_io(self, fleet: Any, share: float | None) -> None:
        """Let the I/O thread use this share of a CPU (`IoThread.cap`). For the fleet's thread."""
        if self._io is not None:
            self._io.cap(fleet, share)

    @contextmanager
    def io_threads(self) -> Iterator[list[int]]:
        """A block that gives the kernel's numbers of the threads that work for the guest and are none of its vCPUs. No
        such thread ends within the block."""
        if self._io is None:
            yield []
            return
        with self._io.living() as thread:
            disks = [plugged.device.thread for plugged in self.plugged if isinstance(plugged.device, DiskDevice)]
            yield [] if thread is None else [thread, *(one for one in disks if one)]

    def end_queues(self, problems: list[str] | None = None) -> None:
        """End what serves queues, which first waits for all requests in flight, and what of its devices may take long.
        The guest has ended. Any thread. A second call does nothing. An error of one stops no other."""
        if self._drained:
            return
        self._drained = True
        for server in self._servers:
            with contained(f"vm {self._board.spec.name}: end of {type(server).__name__}", problems):
                server.stop()
        for device in self._served():
            with contained(f"vm {self._board.spec.name}: end of {type(device).__name__}", problems):
                device.drained()

    def stop(self, problems: list[str] | None = None) -> None:
        """Stop all devices, after the guest has ended and `run` is over. An error of one stops no other."""
        if self._stopped:
            return
        self._stopped = True
        self._service.close()
        self.end_queues(problems)  # first: no device can stop while it is served
        for plugged in self.plugged:
            with contained(f"vm {self._board.spec.name}: stop of device {plugged.name}", problems), plugged.lock:
                plugged.device.stop()
        for server in self._servers:
            server.close()


def _where(wiring: Wiring) -> str:
    found = (("ports", wiring.ports), ("mmio", wiring.mmio))
    if wiring.pci is not None:
        return "the PCI bus"
    return " and ".join(f"{bus} {span.start:#x}" for bus, span in found if span is not None)
