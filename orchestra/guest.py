"""One run of a VM: its machine, buses, devices and vCPU tasks, from set-up to the last resource given back.

A `Vm` is the handle that lives on; a restart gives it a new `Guest`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Any, Protocol

import trio

from .actions import Action, Halted, Outcome, Shutdown, State, Stopped
from .actuators.bandwidth import CpuCgroup
from .actuators.caps import Caps, CgroupCaps, RunLoopCaps
from .actuators.placement import Quarantine
from .backend import Backend, Detection, Machine
from .backend.kvm.dirty import DirtyLog, read_logs
from .boot import flat
from .budget import Budgets, connect
from .devices.bus import Bus, Handler
from .devices.console import Console
from .devices.ports import DebugConsolePort, ExitDevice
from .devices.serial import Uart16550
from .errors import ResourceLimit, StateError
from .inbox import Inbox
from .memory import GuestMemory
from .native.core import Command, Counters, FleetCore, VcpuCore
from .profile import Row, Samples
from .spec import DebugConsole, ExitPort, Limit, Meter, Serial, VmSpec
from .vcpu import Vcpu

__all__ = ["Guest", "House"]

PORTS = 1 << 16
PHYSICAL = 1 << 52
NO_THREAD = "can't start new thread"  # threading's RuntimeError has no type of its own
THREADS = "see ulimit -u and cgroup pids.max"


class House(Protocol):
    """What a guest needs from its fleet."""

    backend: Backend
    core: FleetCore
    bus_locks: bool
    bus_lock_detection: Detection | None
    setup_threads: trio.CapacityLimiter
    quarantine: Quarantine
    inbox: Inbox
    cpu_cgroup: CpuCgroup | None
    """Where CPU caps are kept; None: in the run loop."""

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Run it soon on the fleet's thread. Any thread; nothing happens once the fleet is gone."""

    def next_id(self) -> int: ...
    def told(self, vm: str) -> int: ...
    def register(self, core: VcpuCore, guest: Guest, index: int) -> None:
        """Exits of this core belong to that vCPU."""

    def retire(self, cores: Iterable[VcpuCore]) -> None:
        """Deliver what these cores still have to tell; none of them runs any more."""

    def released(self, vm: Any) -> None:
        """A VM was stopped and leaves the fleet."""

    def did(self, action: Action) -> None:
        """A caller did it directly: journal it."""

    def changed(self, vm: Any, state: State, reason: str) -> None:
        """A VM came into a state: journal it."""

    def worked(self, vm: Any, units: float) -> None:
        """A guest got something done, by its own account."""

    def logged(self, guest: Guest) -> None:
        """The log of the pages that a guest writes was switched on or off."""

    def set_limit_nowait(
        self, limit: Limit | None, *, meter: Meter | str, tenant: str | None = None, vm: str | None, vcpu: int | None
    ) -> None: ...


class Guest:
    """Made by `Guest.start`, run by `Guest.run` in the VM's task, released by `Guest.close`."""

    def __init__(
        self, house: House, spec: VmSpec, levels: Sequence[tuple[Budgets, Budgets, Budgets, Budgets]], console: Console
    ) -> None:
        self.house = house
        self.spec = spec
        self.name = spec.name
        self.ports = Bus("ports", PORTS)
        self.mmio = Bus("mmio", PHYSICAL)
        self.pause_number = 0
        self.final: list[Counters] | None = None
        self.parked = trio.Event()
        self.ended = trio.Event()
        self.all_parked: Callable[[], object] = lambda: None
        self.cap_failed: Callable[[ResourceLimit], object] = lambda error: None
        self.vcpus: list[Vcpu] = []
        self.memory: GuestMemory
        self.samples = Samples(spec.sample_every)  # a Vm puts its own there, as it lives on over restarts
        self._machine: Machine
        self._console = console
        self._levels = levels
        self._cores: list[VcpuCore] = []
        self._lock = Lock()
        self._outcome: Outcome | None = None
        self._parked: set[int] = set()
        self._gone: set[int] = set()
        self._calls: dict[int, list[Callable[[], None]]] = {}
        self._done: list[trio.Event] = []
        self._caps: Caps = RunLoopCaps(self._cores)
        if house.cpu_cgroup is not None:
            self._caps = CgroupCaps(house.cpu_cgroup, spec.name, self._ask, house.post, self._on_cap_failed)

    # ---- set-up

    async def start(
        self,
        devices: Callable[[], Iterable[tuple[range | None, range | None, Handler]]],
        paused: Callable[[], bool],
    ) -> None:
        """Set everything up. If it fails or is cancelled, all of it is given back.

        `devices` and `paused` are asked once the machine is made, as both may change while that is waited for.

        Raises:
            OrchestraError: the host can't give it what it needs.
        """
        house = self.house
        if house.backend.blocking:
            try:
                await trio.to_thread.run_sync(self._build, limiter=house.setup_threads)
            except RuntimeError as error:
                if NO_THREAD not in str(error):
                    raise
                raise ResourceLimit(errno.EAGAIN, f"vm {self.name!r}: {error}; {THREADS}") from error
        else:
            await trio.lowlevel.checkpoint()
            self._build()
        try:
            for device in self.spec.devices:
                self._plug(device)
            for ports, mmio, handler in devices():
                self.claim(ports, mmio, handler)
            told = house.told(self.name)
            for index, core in enumerate(self._cores):
                core.tell(told)
                core.sample(self.samples.every if house.bus_locks else 0)
                house.register(core, self, index)
            if self.dirty is not None and self.dirty.on:
                house.logged(self)
            if paused():
                self.pause_number = 1
                self._caps.hurry(True)
                for core in self._cores:
                    core.command(set=Command.PAUSE)
        except BaseException:
            self._teardown()
            self.memory.close()
            raise

    def _build(self) -> None:
        """May run on a worker thread: ioctls that create VMs take from 0.3 to 30 ms."""
        house, spec = self.house, self.spec
        self.memory = GuestMemory(spec)
        try:
            for index in range(spec.vcpus):
                core = VcpuCore(house.core, house.next_id())
                self._cores.append(core)
                connect(core, self._levels[index])
            states = flat.load(spec, self.memory)
            self._machine = house.backend.create(spec, self._cores, self.memory, states, bus_locks=house.bus_locks)
            try:
                self.vcpus = [Vcpu(self, index, engine) for index, engine in enumerate(self._machine.engines)]
                self._done = [trio.Event() for _ in self.vcpus]
                for vcpu in self.vcpus:
                    if vcpu.engine.threaded:
                        vcpu.spawn()
            except BaseException:
                self._join()
                self._machine.close()
                raise
        except BaseException:
            for core in self._cores:
                core.close()
            self.memory.close()
            raise

    def _join(self) -> None:
        """Stop runners that were held, and see them gone."""
        self.command(set=Command.STOP)
        for vcpu in self.vcpus:
            vcpu.join()

    def _plug(self, device: object) -> None:
        match device:
            case DebugConsole(port=port):
                self.claim(range(port, port + 1), None, DebugConsolePort(port, self._console.write))
            case ExitPort(port=port):
                self.claim(range(port, port + 4), None, ExitDevice(lambda code: self.end(Shutdown(code=code))))
            case Serial(port=port, irq=irq):
                wired = irq is not None and self.spec.irqchip

                def interrupt(level: bool) -> None:
                    if wired and irq is not None:
                        self._machine.irq_line(irq, level)

                self.claim(range(port, port + 8), None, Uart16550(self._console.write, interrupt))

    def claim(self, ports: range | None, mmio: range | None, handler: Handler) -> None:
        """Give ranges of the buses to a handler; all of them or, with an error, none."""
        # A device's calls never overlap, wherever they come from: one lock for all its claims.
        held = [*self.ports.claims(), *self.mmio.claims()]
        lock = next((claim.lock for claim in held if claim.handler is handler), None) or Lock()
        claimed = self.ports.claim(ports, handler, lock) if ports is not None else None
        if mmio is not None:
            try:
                self.mmio.claim(mmio, handler, lock)
            except BaseException:
                if claimed is not None:
                    self.ports.release(claimed)
                raise
        if ports is not None and self.final is None:
            self._machine.claim_ports(ports, True)

    def release(self, handler: Handler) -> None:
        """Take back whatever the handler claimed."""
        for bus in (self.ports, self.mmio):
            for claim in bus.claims():
                if claim.handler is handler:
                    bus.release(claim)
                    if bus is self.ports and self.final is None:
                        self._machine.claim_ports(claim.span, False)

    # ---- life

    async def run(self) -> Outcome:
        """Run all vCPUs until the last has ended, and take the machine down. Cancelling stops them first."""
        try:
            async with trio.open_nursery() as nursery:
                for vcpu in self.vcpus:
                    nursery.start_soon(self._run_vcpu, vcpu)
                self.command(clear=Command.HOLD)
                try:
                    await self.ended.wait()
                finally:
                    self.end(Stopped("the fleet was closed"))
        finally:
            self._finish()
            with trio.CancelScope(shield=True):  # closing a VM's descriptors takes about a millisecond, no more
                try:
                    if self.house.backend.blocking:
                        await trio.to_thread.run_sync(self._give_back, limiter=self.house.setup_threads)
                    else:
                        self._give_back()
                except RuntimeError as error:
                    if NO_THREAD not in str(error):
                        raise
                    self._give_back()
        assert self._outcome is not None
        return self._outcome

    def _give_back(self) -> None:
        """May run on a worker thread: closing takes a millisecond, unmapping 0.1 ms for each MiB that was touched."""
        self._machine.close()
        self._caps.close()  # KVM may have had a thread there
        if isinstance(self._outcome, Stopped):  # nobody will look at its memory
            self.memory.close()

    async def _run_vcpu(self, vcpu: Vcpu) -> None:
        if vcpu.engine.threaded:
            with trio.CancelScope(shield=True):  # `run` tells all vCPUs to stop first, and then waits for each
                await self._done[vcpu.index].wait()
            vcpu.join()
        else:
            await vcpu.drive_async()

    def end(self, outcome: Outcome) -> None:
        """End the VM with that outcome, unless it has one. Any thread, while the guest is not finished."""
        with self._lock:
            if self._outcome is None:
                self._outcome = outcome
        if self.final is None:
            self.command(set=Command.STOP)
            self._caps.end()

    def command(self, set: int = 0, clear: int = 0) -> None:
        """Command all vCPUs: all are signalled before anybody waits for one. Any thread."""
        for core in self._cores:
            core.command(set, clear)
        for vcpu in self.vcpus:
            vcpu.engine.kick()

    def pause(self) -> None:
        """Ask all vCPUs to park; `parked` is set when they have."""
        if self.final is not None:
            return  # none of them runs
        self.pause_number += 1
        self._parked.clear()
        self.parked = trio.Event()
        self.command(set=Command.PAUSE)
        self._caps.hurry(True)

    def resume(self) -> None:
        if self.final is not None:
            return
        self.parked.set()  # whoever waits for a pause that is taken back goes on
        self.parked = trio.Event()
        self._parked.clear()
        self._caps.hurry(False)
        self.command(clear=Command.PAUSE)

    def cap_cpu(self, share: float | None) -> None:
        """Let each vCPU's thread use that part of a CPU from now on; None: all of it.

        Raises:
            StateError: it has no threads, or has ended.
            ResourceLimit: the host has nothing left for it, or refuses it.
        """
        threads = self._threads("cap the CPU of")
        self._caps.put(share, {index: tid for index, tid in enumerate(threads) if index not in self._gone})

    def _on_cap_failed(self, error: ResourceLimit) -> None:
        self.cap_failed(error)

    async def cap_settled(self) -> None:
        """Wait until the cap is in force; no checkpoint if it is.

        Raises:
            ResourceLimit: it can't be; no cap is.
        """
        await self._caps.settled()

    def capped(self, index: int, now: int) -> int:
        """Nanoseconds that a cap held that vCPU so far."""
        return self._caps.held(index, now) if self.final is None else 0

    def isolate(self, on: bool) -> None:
        """Have the vCPUs' threads run on the quarantine CPUs only, or wherever the others do.

        Raises:
            StateError: it has no threads, or has ended.
            ResourceLimit: this host has no CPU to spare.
        """
        threads = self._threads("isolate" if on else "let in")
        if on:
            self.house.quarantine.confine(threads)
        else:
            self.house.quarantine.free(threads)

    @property
    def dirty(self) -> DirtyLog | None:
        """Counts the pages that it writes; None where the backend can't tell."""
        return self._machine.dirty

    async def log_dirty(self, on: bool) -> None:
        """Have the pages that it writes logged, or not. Nothing if it has ended.

        Raises:
            StateError: its backend can't.
            ResourceLimit, KvmError: the kernel won't; all is as it was.
        """
        dirty, name = self.dirty, self.house.backend.name
        if dirty is None:
            raise StateError(f"can't log the memory of vm {self.name!r}: not supported by this backend ({name})")
        try:  # on a worker thread, as the kernel goes through its page tables: milliseconds for gigabytes
            await trio.to_thread.run_sync(dirty.log, on, limiter=self.house.setup_threads)
        except RuntimeError as error:
            if NO_THREAD not in str(error):
                raise
            dirty.log(on)
        if self.final is None:
            self.house.logged(self)

    def _threads(self, verb: str) -> list[int]:
        """The kernel's numbers of its vCPUs' threads."""
        if self.final is not None:
            raise StateError(f"can't {verb} vm {self.name!r}: it has ended")
        threads = [vcpu.tid for vcpu in self.vcpus]
        if None in threads:
            name = self.house.backend.name
            raise StateError(
                f"can't {verb} vm {self.name!r}: not supported by this backend ({name}), it has no threads"
            )
        return [tid for tid in threads if tid is not None]

    def kernel_statistics(self) -> dict[str, float]:
        """What the kernel counts of it, by names that differ from kernel to kernel.

        Raises:
            StateError: it has ended, or its backend's guests are not the kernel's.
        """
        read = getattr(self._machine, "statistics", None)
        if self.final is not None or read is None:
            why = "it has ended" if self.final is not None else f"backend {self.house.backend.name!r} has none"
            raise StateError(f"vm {self.name!r}: no statistics of KVM's: {why}")
        statistics: dict[str, float] = read()
        return statistics

    async def call(self, index: int, function: Callable[[], Any]) -> Any:
        """Run a function on a vCPU's runner between two entries of the guest, and return what it does.

        Cancelling abandons the result; the function may run all the same.
        """
        done = trio.Event()
        result: list[Any] = []

        def run() -> None:
            try:
                result.append(function())
            except Exception as error:
                result.append(error)
            self.house.post(done.set)

        self._caps.hurry(True)
        try:
            self._ask(index, run)
            with self.house.core.urgently():
                await done.wait()
        finally:
            self._caps.hurry(False)
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def _ask(self, index: int, function: Callable[[], None]) -> None:
        """Have a vCPU's runner run a function between two entries of the guest."""
        with self._lock:
            self._calls.setdefault(index, []).append(function)
        self._cores[index].command(set=Command.CALL)
        self.vcpus[index].engine.kick()

    # ---- told by runners, on their threads

    def commanded(self, index: int) -> list[Callable[[], None]]:
        with self._lock:
            self._cores[index].command(clear=Command.CALL)
            return self._calls.pop(index, [])

    def _serve_late_calls(self, index: int) -> None:
        """Those that came when the runner had looked for the last time."""
        with self._lock:
            calls = self._calls.pop(index, [])
        for call in calls:
            call()

    def on_parked(self, index: int, number: int) -> None:
        self.house.post(self._on_parked, index, number)

    def on_ended(self, index: int, outcome: Outcome) -> None:
        if not isinstance(outcome, Halted):
            self.end(outcome)
        for call in self.commanded(index):
            call()
        if self.dirty is not None and self.dirty.on:
            read_logs([self.dirty])  # here, as it waits for the kernel: what it wrote last counts as well
        self._caps.leave(index)  # its end is waited for
        self.house.post(self._on_ended, index)

    def _on_parked(self, index: int, number: int) -> None:
        if number == self.pause_number:
            self._parked.add(index)
            self._check_parked()

    def _on_ended(self, index: int) -> None:
        self._done[index].set()
        self._gone.add(index)
        if self.final is None:
            self._serve_late_calls(index)
        self._check_parked()
        if len(self._gone) == len(self.vcpus):
            with self._lock:
                if self._outcome is None:
                    self._outcome = Halted()
            self.ended.set()

    def _check_parked(self) -> None:
        if len(self._parked | self._gone) == len(self.vcpus) and not self.parked.is_set():
            self.parked.set()
            if self._parked:
                self.all_parked()

    # ---- end

    def is_parked(self, index: int) -> bool:
        return index in self._parked

    def has_ended(self, index: int) -> bool:
        return index in self._gone or self.final is not None

    def counters(self) -> list[Counters]:
        if self.final is not None:
            return self.final
        now = self.house.backend.now()
        return [core.counters(now) for core in self._cores]

    def look(self, index: int, now: int) -> tuple[dict[int, int], int, int, int]:
        """As `VcpuCore.look`."""
        return self._cores[index].look(now) if self.final is None else ({}, 0, 0, 0)

    def tell(self, mask: int) -> None:
        if self.final is None:
            for core in self._cores:
                core.tell(mask)

    def sample(self, every: int) -> None:
        """Look at one bus lock of so many more closely; 0: at none."""
        if self.final is None and self.house.bus_locks:
            for core in self._cores:
                core.sample(every)

    def gather(self) -> Samples:
        """What was sampled so far, of all runs of the VM."""
        if self.final is None:
            for core in self._cores:
                sampled, lost, _ = core.profile()
                self.samples.add(sampled, lost, self.spec.bus_lock_detection or self.house.bus_lock_detection)
        return self.samples

    def profile_rows(self) -> list[Row]:
        """What was sampled since this was asked last, for `Journal.profile(now, vm.name, vm.launch, rows)`.

        The fleet asks at each interval of its journal, and once more when the VM has ended. Empty if nothing is new.
        """
        return self.gather().rows()

    def _finish(self) -> None:
        """No runner is left: keep the last figures, deliver the last records, free the cores."""
        final = self.counters()
        self.gather()
        self.house.retire(self._cores)  # before `final`, as policies are told what is new in these cores
        self.final = final
        self.ended.set()
        self.parked.set()
        for vcpu in self.vcpus:
            self._serve_late_calls(vcpu.index)
            vcpu.keep_registers()
            vcpu.engine.close()
        for core in self._cores:
            core.close()

    def _teardown(self) -> None:
        self._join()
        self._finish()
        self._machine.close()

    def close(self) -> None:
        """Unmap the memory, which stays readable until then."""
        self.memory.close()
