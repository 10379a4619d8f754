"""The devices of one run of a VM: made from their specs, wired, listened to, and ended.

    spec.wiring() ─ addresses ──→ claims on the buses           accesses:   vCPU thread → device, under the claim's lock
                  ─ line, msis ─→ Hooks (backend/wiring)        interrupts: any thread → eventfd or line → kernel
                  ─ doorbells ──→ ioeventfds                    rings:      kernel → eventfd → a task → device
                    timers      → Timers                        expiries:   a task → device

Rings and expiries are served on the fleet's thread, under the same lock as accesses, and paced like them: they are
charged to a budget as large as the VM's `answer_limit`, by the time that they take the event loop, and take turns with
those of all others.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import Any, Final, Protocol

import attrs
import trio

from ...backend import Machine
from ...backend.memory import GuestMemory
from ...backend.wiring import InterruptLine, InterruptPulse
from ...model.actions import Failed, Outcome, Shutdown
from ...model.devices import DeviceSpec, Wiring, irqchip_kind
from ...model.errors import GuestMemoryError, StateError
from ...model.spec import VmSpec
from ...native.core import Bucket
from ..contain import contained
from .bus import Bus
from .console import Console
from .peripheral import NOWHERE, Hooks, Peripheral, implementation
from .timers import Timers, VmTimer

__all__ = ["Assembly", "Board", "Dma"]

log: Final = logging.getLogger("orchestra")

RING: Final = 20
"""Answers that a ring or an expiry counts as. An answer takes the interpreter for about 6 us (`ANSWER_LIMIT`). To wake
a task on the event loop, give it its turn and have it wait again takes 0.1 ms of the loop's CPU time."""

ANSWER: Final = 6_000
"""Nanoseconds. For so much work of the device it counts as one more."""

GRID: Final = 5_000_000
"""Nanoseconds. Those that have to wait for their turn are served at multiples of this, so that the event loop wakes
once for all of them, and not once for each."""

BUSY: Final = 0.0005
"""Seconds until a device is tried again that a vCPU is in. An access takes Python some microseconds."""


class Board(Protocol):
    """What the devices of a VM are plugged into: its run."""

    spec: VmSpec
    ports: Bus
    mmio: Bus
    memory: GuestMemory

    def now(self) -> int: ...
    def end(self, outcome: Outcome) -> None: ...


class Dma:
    """Guest memory as devices have it: what the guest may not write, it can't have a device write."""

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


@attrs.define(eq=False)
class Plugged:
    """A device with what it was wired by.

    Attributes:
        lock: held while it is called, by whoever calls it.
        bells: the eventfds of its doorbells.
        ends: the one that tells when the guest ends its interrupt, if its line is resampled.
    """

    name: str
    device: Peripheral[Any, Any]
    lock: RLock
    wiring: Wiring
    bells: list[int] = attrs.Factory(list)
    ends: int | None = None

    def acknowledge(self, times: int) -> None:
        self.device.acknowledged()


class Assembly:
    """All devices that a spec names, in its order. It is made on any thread; its methods are the fleet's thread's.

    Parameters:
        post: runs a function soon on the fleet's thread; from any thread.
        in_turn: runs one in this VM's turn among all that ask (`machine.inbox`).
        states: as `state` returned them for such a spec: the devices go on from there. None: power-on.

    Raises:
        SpecError: a device's addresses are taken, or its implementation can't be found, or a state can't be.
        StateError: the states are of other devices.
        KvmError, ResourceLimit: the kernel won't give it what it needs.
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
        specs = board.spec.devices
        if states is not None and len(states) != len(specs):
            raise StateError(f"vm {board.spec.name!r}: {len(states)} states for {len(specs)} devices")
        self._board, self._machine, self._console, self._in_turn = board, machine, console, in_turn
        self._changed, self._held = trio.Event(), False  # the event is replaced at each change
        self._timers = Timers(board.now, lambda: post(self._wake))
        self._owner: dict[int, Plugged] = {}  # of a timer, by its identity
        self._makes: Plugged | None = None
        self._stopped = False
        self._bucket: Bucket | None = None
        self._worth = 0  # answers that what was served is worth and that were not charged yet
        self.plugged: list[Plugged] = []
        for index, spec in enumerate(specs):
            self._plug(spec, None if states is None else states[index])
        self._restored = states is not None

    # ---- plugging

    def _plug(self, spec: DeviceSpec, state: object) -> None:
        kind, wiring, lock = implementation(spec), spec.wiring(), RLock()
        name = f"{type(spec).__name__} at {_where(wiring)}"
        plugged = self._makes = Plugged(name, None, lock, wiring)  # type: ignore[arg-type]  # in a moment
        hooks = self._hooks(plugged)
        plugged.device = kind(spec, hooks) if state is None else kind.from_state(spec, hooks, state)
        self._makes = None
        board, wires = self._board, self._machine.wires
        if wiring.ports is not None:
            board.ports.claim(wiring.ports, plugged.device, lock)
        if wiring.mmio is not None:
            board.mmio.claim(wiring.mmio, plugged.device, lock)
        for bell in wiring.doorbells:
            assert wires is not None  # or the backend had refused the spec
            address, pio = wiring.address(bell), bell.bus == "ports"
            plugged.bells.append(wires.doorbell(address, bell.size, bell.value, pio=pio))
        self.plugged.append(plugged)

    def _hooks(self, plugged: Plugged) -> Hooks:
        wires, wiring = self._machine.wires, plugged.wiring
        line = wiring.line
        level: InterruptLine = NOWHERE
        pulse: InterruptPulse = NOWHERE
        if wires is not None and line is not None and irqchip_kind(self._board.spec.irqchip) == "full":
            match line.trigger:
                case "level":
                    level = wires.line(line.gsi)
                case "edge":
                    pulse = wires.pulse(line.gsi)
                case "resample":
                    pulse, plugged.ends = wires.resampled(line.gsi)
        return Hooks(
            memory=Dma(self._board.memory),
            timer=self._new_timer,
            console=self._console,
            shut_down=lambda code: self._board.end(Shutdown(code=code)),
            line=level,
            pulse=pulse,
            msis=tuple(wires.msi() for _ in range(wiring.msis)) if wires is not None else (),
            interrupts=self._machine.interrupts,
        )

    def _new_timer(self, expired: Callable[[], None]) -> VmTimer:
        if self._makes is None:
            raise StateError("a device makes its timers in __init__")
        timer = self._timers.new(expired)
        self._owner[id(timer)] = self._makes  # Timers keeps it, so that its identity stays its own
        return timer

    # ---- rings and expiries

    @property
    def listens(self) -> bool:
        """There are doorbells, ends of interrupts or timers, so `run` has something to do."""
        return bool(self._owner) or any(plugged.bells or plugged.ends is not None for plugged in self.plugged)

    async def run(self, ended: trio.Event) -> None:
        """Serve doorbells and timers until the guest has ended."""
        self._bucket = Bucket()
        self._bucket.set(self._board.spec.answer_limit, self._board.now())
        try:
            async with trio.open_nursery() as nursery:
                for plugged in self.plugged:
                    for number, fd in enumerate(plugged.bells):
                        nursery.start_soon(self._listen, plugged, fd, partial(plugged.device.rang, number))
                    if plugged.ends is not None:
                        nursery.start_soon(self._listen, plugged, plugged.ends, plugged.acknowledge)
                if self._owner:
                    nursery.start_soon(self._watch_timers)
                await ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._bucket.close()

    async def _listen(self, plugged: Plugged, fd: int, tell: Callable[[int], object]) -> None:
        if self._restored:  # what the kernel had counted is in no state
            await self._serve(plugged, partial(tell, 1))
        while True:
            await trio.lowlevel.wait_readable(fd)
            # Who had to wait for its pace looks again itself: the descriptor needs no look of the event loop's.
            while await self._serve(plugged, partial(_tell, fd, tell)) and await self._waited():
                pass

    async def _watch_timers(self) -> None:
        while True:
            changed, at = self._changed, self._timers.next()
            if at is None:
                await changed.wait()
                continue
            if (left := at - self._board.now()) > 0:
                with trio.move_on_after(left / 1e9):
                    await changed.wait()
            for timer, setting in self._timers.due():
                await self._serve(self._owner[id(timer)], partial(self._expire, timer, setting))
                await self._waited()

    def _expire(self, timer: VmTimer, setting: int) -> None:
        if self._timers.taken(timer, setting):
            timer.expired()

    async def _serve(self, plugged: Plugged, call: Callable[[], object]) -> object:
        """Call a device: in the VM's turn among all others, not while the VM is held, and with no vCPU in the device.
        What it raises is the end of this VM."""
        served = trio.Event()
        self._in_turn(served.set)
        await served.wait()
        while self._held or not plugged.lock.acquire(blocking=False):
            if self._held:
                await self._changed.wait()
            else:  # a vCPU is in it, perhaps for long: the event loop is everybody's and waits for no lock
                await trio.sleep(BUSY)
        begun = time.thread_time_ns()
        try:  # nothing is awaited here, so a pause finds all of it done or nothing of it
            return call()
        except Exception as error:
            log.error("vm %s: device %s failed", self._board.spec.name, plugged.name, exc_info=error)
            self._board.end(Failed(f"device {plugged.name} failed: {error!r}"))
            return None
        finally:
            plugged.lock.release()
            self._worth += RING + (time.thread_time_ns() - begun) // ANSWER

    async def _waited(self) -> bool:
        """Pay for what was served. False: it was within the budget, and there was nothing to wait for."""
        assert self._bucket is not None
        worth, self._worth = self._worth, 0
        now = self._board.now()
        turn = self._bucket.take(now, worth) if worth else now
        if turn <= now:
            return False
        turn += -turn % GRID
        while turn > now:
            await trio.sleep((turn - now) / 1e9)
            now = self._board.now()
        return True

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- what becomes of the VM

    def hold(self) -> None:
        """The VM pauses: from now on nothing reaches a device by ring or timer, until `let_go`."""
        self._held = True

    def let_go(self) -> None:
        """It goes on. Timers that expired meanwhile do so now."""
        self._held = False
        self._wake()

    def state(self) -> tuple[object, ...]:
        """Of each device, in the order of the spec. While the VM is quiesced."""
        found = []
        for plugged in self.plugged:
            with plugged.lock:
                found.append(plugged.device.state())
        return tuple(found)

    def reset(self) -> None:
        """All devices as at power-on, and rings that nobody heard are forgotten. While no vCPU runs."""
        for plugged in self.plugged:
            with plugged.lock:
                plugged.device.reset()
                for fd in plugged.bells:
                    _taken(fd)

    def stop(self, problems: list[str] | None = None) -> None:
        """The guest has ended and `run` is over. What goes wrong with one device keeps no other."""
        if self._stopped:
            return
        self._stopped = True
        self._timers.close()
        for plugged in self.plugged:
            with contained(f"vm {self._board.spec.name}: stop of device {plugged.name}", problems), plugged.lock:
                plugged.device.stop()


def _where(wiring: Wiring) -> str:
    found = (("ports", wiring.ports), ("mmio", wiring.mmio))
    return " and ".join(f"{bus} {span.start:#x}" for bus, span in found if span is not None)


def _tell(fd: int, tell: Callable[[int], object]) -> bool:
    times = _taken(fd)
    if times:
        tell(times)
    return times > 0


def _taken(fd: int) -> int:
    """How often it was rung since this was asked last."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
