"""The devices of one run of a VM: made from their specs, wired, listened to, and ended.

    spec.wiring() ─ addresses ──→ claims on the buses           accesses:   vCPU thread → device, under the claim's lock
                  ─ line, msis ─→ Hooks (backend/wiring)        interrupts: any thread → eventfd or line → kernel
                  ─ doorbells ──→ ioeventfds                    rings:      kernel → eventfd → a task → device
                    timers      → Timers                        expiries:   a task → device

`service` serves rings and expiries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import Final, Protocol, runtime_checkable

import trio

from ...backend import Machine
from ...backend.memory import GuestMemory
from ...backend.wiring import InterruptLine, InterruptPulse
from ...model.actions import Outcome
from ...model.devices import DeviceSpec, Wiring
from ...model.errors import GuestMemoryError, StateError
from ...model.spec import Limit, VmSpec
from ..contain import contained
from .bus import Bus
from .console import Console
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
    def answer_limit(self) -> Limit | None:
        """The VM's, as in force."""


@runtime_checkable
class Listener(Protocol):
    """A device that takes console input."""

    def listen(self) -> None:
        """Take what is typed at the VM's console from now on, and what was typed before. Called once, of one device."""


@runtime_checkable
class EventDevice(Protocol):
    """A device by which the guest is told of its platform's events."""

    def happened(self, event: int) -> None:
        """Tell the guest of `model.platform.POWER_BUTTON`, or of another such event."""


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
        post: runs a function soon on the fleet's thread; from any thread.
        in_turn: runs a function when it is this VM's turn (`machine.inbox`).
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
        post: Callable[..., object],
        in_turn: Callable[[Callable[[], object]], object],
        states: Sequence[object] | None = None,
    ) -> None:
        specs = board.spec.machine_devices
        if states is not None and len(states) != len(specs):
            raise StateError(f"vm {board.spec.name!r}: {len(states)} states for {len(specs)} devices")
        self._board, self._machine, self._console = board, machine, console
        self._service = Service(board.spec.name, board.now, board.end, board.answer_limit, in_turn, post)
        self._service.going_on = states is not None
        self._makes: Plugged | None = None
        self._stopped = False
        self.plugged: list[Plugged] = []
        try:
            for index, spec in enumerate(specs):
                self._plug(spec, None if states is None else states[index])
            for device in (plugged.device for plugged in self.plugged):
                if isinstance(device, Listener):
                    device.listen()
                    break
        except BaseException:
            self.stop()
            raise

    # ---- plugging

    def _plug(self, spec: DeviceSpec, state: object) -> None:
        kind, wiring, lock = implementation(spec), spec.wiring(), RLock()
        name = f"{type(spec).__name__} at {_where(wiring)}"
        plugged = self._makes = Plugged(name, None, lock, wiring)  # type: ignore[arg-type]  # in a moment
        hooks = self._hooks(plugged)
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
        return Hooks(
            memory=Dma(self._board.memory),
            timer=lambda expired: self._service.new_timer(self._makes, expired),
            console=self._console,
            end=self._board.end,
            line=level,
            pulse=pulse,
            msis=tuple(wires.msi() for _ in range(wiring.msis)) if wires is not None else (),
            interrupts=self._machine.interrupts,
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

    # ---- pause, state, reset, end

    def hold(self) -> None:
        """The VM pauses: from now on nothing reaches a device by ring or timer, until `let_go`."""
        self._service.hold()

    def let_go(self) -> None:
        """The VM goes on. Timers whose time came during the pause expire now."""
        self._service.let_go()

    def state(self) -> tuple[object, ...]:
        """The state of each device, in the order of the spec. While the VM is quiesced."""
        found = []
        for plugged in self.plugged:
            with plugged.lock:
                found.append(plugged.device.state())
        return tuple(found)

    def reset(self) -> None:
        """Reset all devices to power-on, and drop rings that were not served yet. While no vCPU runs."""
        for plugged in self.plugged:
            with plugged.lock:
                plugged.device.reset()
                for fd in [*plugged.bells, *([] if plugged.ends is None else [plugged.ends])]:
                    taken(fd)

    def stop(self, problems: list[str] | None = None) -> None:
        """Stop all devices, after the guest has ended and `run` is over. An error of one stops no other."""
        if self._stopped:
            return
        self._stopped = True
        self._service.close()
        for plugged in self.plugged:
            with contained(f"vm {self._board.spec.name}: stop of device {plugged.name}", problems), plugged.lock:
                plugged.device.stop()


def _where(wiring: Wiring) -> str:
    found = (("ports", wiring.ports), ("mmio", wiring.mmio))
    return " and ".join(f"{bus} {span.start:#x}" for bus, span in found if span is not None)
