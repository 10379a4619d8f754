"""One run of a VM: its machine, buses, devices and vCPU tasks, from set-up to the last resource given back.

A `Vm` is the handle that lives on; a restart gives it a new `Instance`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock, RLock
from typing import Any, Final, Protocol, cast

import attrs
import trio

from ..backend import Backend, Detection, Machine
from ..backend.kvm.dirty import DirtyLog, read_logs
from ..backend.memory import GuestMemory
from ..host.control.bandwidth import CpuCgroup
from ..host.control.caps import Caps, CgroupCaps, RunLoopCaps
from ..host.control.placement import Quarantine
from ..model.actions import Action, Failed, Halted, Outcome, Rejoin, Shutdown, State, Stopped
from ..model.errors import OrchestraError, ResourceLimit, StateError
from ..model.spec import DebugConsole, ExitPort, Limit, Meter, Serial, VmSpec
from ..native.core import BUCKETS, Command, Counters, FleetCore, VcpuCore
from ..profile import Row, Samples
from .boot import flat
from .budget import Budgets, connect
from .contain import contained
from .desired import Desired
from .devices.bus import Bus, Handler
from .devices.console import Console
from .devices.ports import DebugConsolePort, ExitDevice
from .devices.serial import Uart16550
from .holding import Holding, Level, PendingIo
from .inbox import Inbox
from .statistics import ZERO
from .vcpu import Vcpu
from .workers import Workers

__all__ = ["REFUSED", "Instance", "InstanceContext"]

log: Final = logging.getLogger("orchestra")

PORTS = 1 << 16
PHYSICAL = 1 << 52
NO_THREAD = "can't start new thread"  # threading's RuntimeError has no type of its own
THREADS = "see ulimit -u and cgroup pids.max"
REFUSED: Final = "the host can't put it into force"


class InstanceContext(Protocol):
    """What a guest needs from its fleet."""

    backend: Backend
    core: FleetCore
    bus_locks: bool
    bus_lock_detection: Detection | None
    workers: Workers
    quarantine: Quarantine
    inbox: Inbox
    cpu_cgroup: CpuCgroup | None
    """Where CPU caps are kept; None: in the run loop."""

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Run it soon on the fleet's thread. Any thread; nothing happens once the fleet is gone."""

    def next_id(self) -> int: ...
    def told(self, vm: str) -> int: ...
    def register(self, core: VcpuCore, guest: Instance, index: int) -> None:
        """Exits of this core belong to that vCPU."""

    def retire(self, cores: Iterable[VcpuCore]) -> None:
        """Deliver what these cores still have to tell; none of them runs any more."""

    def released(self, vm: Any) -> None:
        """A VM was stopped and leaves the fleet."""

    def did(self, action: Action, policy: str | None = None) -> None:
        """It was done, and not by an action: journal it. `policy`: whose word it ends; None: a caller's."""

    def changed(self, vm: Any, state: State, reason: str) -> None:
        """A VM came into a state: journal it."""

    def worked(self, vm: Any, units: float) -> None:
        """A guest got something done, by its own account."""

    def logged(self, guest: Instance) -> None:
        """The log of the pages that a guest writes was switched on or off."""

    def set_limit_nowait(
        self, limit: Limit | None, *, meter: Meter | str, tenant: str | None = None, vm: str | None, vcpu: int | None
    ) -> None: ...


class Instance:
    """`Instance.start` makes it; `Instance.run`, in the VM's task, runs it and gives back what it holds. Its memory
    stays readable until somebody closes it (`Workers.discard`).

    Attributes:
        reached: told of how far it is held when that changes.
        cap_failed: told that what it is capped to can't be put into force: nothing is.
    """

    def __init__(
        self,
        house: InstanceContext,
        spec: VmSpec,
        levels: Sequence[tuple[Budgets, Budgets, Budgets, Budgets]],
        console: Console,
        desired: Desired,
    ) -> None:
        self.house = house
        self.spec = spec
        self.name = spec.name
        self.ports = Bus("ports", PORTS)
        self.mmio = Bus("mmio", PHYSICAL)
        self.now = house.backend.now
        self.final: list[Counters] | None = None
        self.ended = trio.Event()
        self.reached: Callable[[Level], object] = lambda level: None
        self.cap_failed: Callable[[OrchestraError], object] = lambda error: None
        self.vcpus: list[Vcpu] = []
        self.memory: GuestMemory
        self.samples = Samples()  # a Vm puts its own there, as it lives on over restarts
        self.holding = Holding(spec.vcpus, lambda level: self.reached(level))
        self._machine: Machine
        self._console = console
        self._levels = levels
        self._desired = desired
        self._cores: list[VcpuCore] = []
        self._lock = Lock()
        self._outcome: Outcome | None = None
        self._pause_began = 0
        self._gone: set[int] = set()
        self._calls: dict[int, list[Callable[[], None]]] = {}
        self._done: list[trio.Event] = []
        self._caps: Caps = RunLoopCaps(self._cores)
        if house.cpu_cgroup is not None:
            self._caps = CgroupCaps(
                house.cpu_cgroup, spec.name, self._ask, self._post, lambda error: self.cap_failed(error)
            )

    # ---- set-up

    async def start(self, devices: Callable[[], Iterable[tuple[range | None, range | None, Handler]]]) -> None:
        """Set everything up, as it is desired. If it fails or is cancelled, all of it is given back.

        `devices` is asked once the machine is made, and what is desired is looked at then, as both may change while
        that is waited for.

        Raises:
            OrchestraError: the host can't give it what it needs.
        """
        house = self.house
        if house.backend.blocking:
            try:
                await house.workers.run(self._build, house.workers.setup)
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
                core.sample(self._desired.sample_every if house.bus_locks else 0)
                house.register(core, self, index)
            if self.dirty is not None and self.dirty.on:
                house.logged(self)
            self._apply()
        except BaseException:
            with trio.CancelScope(shield=True):
                self._join()
                await self._give_back()
                await house.workers.discard(self.memory).wait()
            raise

    def _apply(self) -> None:
        """Put what is desired into force, before it runs."""
        desired = self._desired
        if desired.paused:
            self.pause()
            self.holding.settle()
        try:
            if desired.cap is not None:
                self.cap_cpu(desired.cap)
        except OrchestraError as error:
            self.cap_failed(error)
        try:
            if desired.isolated:
                self.isolate(True)
        except OrchestraError as error:
            desired.isolated = False
            log.error("vm %s is not isolated any more: %s", self.name, error)
            self.house.did(Rejoin(vm=self.name, reason=f"{REFUSED}: {error}"))

    def _build(self) -> None:
        """May run on a worker thread: ioctls that create VMs take from 0.3 to 30 ms."""
        house, spec = self.house, self.spec
        self.memory = GuestMemory(spec)
        try:
            for index in range(spec.vcpus):
                core = VcpuCore(house.core, house.next_id())
                self._cores.append(core)
                connect(core, self._levels[index])
                core.set_buses(self.ports.handle, self.mmio.handle)
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
                self.claim(range(port, port + 1), None, DebugConsolePort(port, self._console))
            case ExitPort(port=port):
                self.claim(range(port, port + 4), None, ExitDevice(lambda code: self.end(Shutdown(code=code))))
            case Serial(port=port, irq=irq):
                wired = irq is not None and self.spec.irqchip
                interrupts = self._machine.interrupts if wired else None
                self.claim(range(port, port + 8), None, Uart16550(self._console, interrupts, irq or 0))

    def claim(self, ports: range | None, mmio: range | None, handler: Handler) -> None:
        """Give ranges of the buses to a handler; all of them or, with an error, none."""
        # A device's calls never overlap, wherever they come from: one lock for all its claims.
        held = [*self.ports.claims(), *self.mmio.claims()]
        lock = next((claim.lock for claim in held if claim.handler is handler), None) or RLock()
        claimed = self.ports.claim(ports, handler, lock) if ports is not None else None
        if mmio is not None:
            try:
                self.mmio.claim(mmio, handler, lock)
            except BaseException:
                if claimed is not None:
                    self.ports.release(claimed)
                raise

    def release(self, handler: Handler) -> None:
        """Take back whatever the handler claimed: when it returns, nobody calls it."""
        for bus in (self.ports, self.mmio):
            for claim in bus.claims():
                if claim.handler is handler:
                    bus.release(claim)

    def talked(self) -> None:
        """A vCPU wrote to the console, and somebody waits for that."""
        self._console.wake()

    # ---- life

    async def run(self, ready: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint) -> Outcome:
        """Run all vCPUs until the last has ended, and take the machine down. Cancelling stops them first.

        Whatever goes wrong here is the end of this VM (`Failed`), and of no other.

        Parameters:
            ready: awaited before the guest runs its first instruction.
        """
        try:
            async with trio.open_nursery() as nursery:
                for vcpu in self.vcpus:
                    nursery.start_soon(self._run_vcpu, vcpu)
                try:
                    await ready()
                    self.command(clear=Command.HOLD)
                    await self.ended.wait()
                except Exception as error:
                    self._fail("run", error)
                finally:
                    self.end(Stopped("the fleet was closed"))
        finally:
            with trio.CancelScope(shield=True):  # closing a VM's descriptors takes about a millisecond, no more
                await self._give_back()
        assert self._outcome is not None
        return self._outcome

    async def _run_vcpu(self, vcpu: Vcpu) -> None:
        try:
            if vcpu.engine.threaded:
                with trio.CancelScope(shield=True):  # `run` tells all vCPUs to stop first, and then waits for each
                    await self._done[vcpu.index].wait()
                vcpu.join()
            else:
                await vcpu.drive_async()
        except Exception as error:
            self._fail(f"vCPU {vcpu.index}", error)
            self._on_ended(vcpu.index)

    def _fail(self, what: str, error: Exception) -> None:
        """A mistake in orchestra, or the host's: it ends this VM. Any thread."""
        log.error("vm %s: %s failed", self.name, what, exc_info=error)
        self.end(Failed(f"{what}: {type(error).__name__}: {error}"))

    def _post(self, function: Callable[..., object], *args: object) -> None:
        """Run it soon on the fleet's thread, where what it raises would end everything. Any thread."""

        def run() -> None:
            try:
                function(*args)
            except Exception as error:
                self._fail(getattr(function, "__name__", "a call"), error)

        self.house.post(run)

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
        """Ask all vCPUs to park: `holding` tells how far that is."""
        if self.final is not None:
            return  # none of them runs
        self.holding.begin()
        self._pause_began = self.now()
        self.command(set=Command.PAUSE)
        for vcpu in self.vcpus:
            vcpu.pausing = True
            if vcpu.using is not None:  # seen after the command, so it runs no guest code any more
                self.holding.come(vcpu.index, self.holding.number, Level.PAUSED)
        self._caps.hurry(True)

    def resume(self) -> None:
        if self.final is not None:
            return
        self.holding.end()
        for vcpu in self.vcpus:
            vcpu.pausing = False
        self._caps.hurry(False)
        self.command(clear=Command.PAUSE)

    @property
    def pause_number(self) -> int:
        return self.holding.number

    def pending(self) -> tuple[PendingIo, ...]:
        """What keeps it from being quiesced, while it is told to pause: accesses that were not answered."""
        return tuple(found for vcpu in self.vcpus if (found := self._pending(vcpu)) is not None)

    def _pending(self, vcpu: Vcpu) -> PendingIo | None:
        index, using, asked = vcpu.index, vcpu.using, vcpu.asked
        if self.final is not None or not vcpu.pausing or index in self._gone or self.is_quiesced(index):
            return None
        if asked is not None:
            bus, request, since = asked
            name, waits_for = bus.name, "a task"
            address, size, write = request.address, request.size, request.write
        elif using is not None:
            access, since = vcpu.engine.access, self._pause_began
            name, waits_for = "mmio" if using in self.mmio.claims() else "ports", type(using.handler).__name__
            address, size, write = int(access.address), int(access.size), bool(access.write)
        else:
            return None
        return PendingIo(index, cast(Any, name), address, size, write, waits_for, since)

    def cap_cpu(self, share: float | None) -> None:
        """Let each vCPU's thread use that part of a CPU from now on; None: all of it.

        Raises:
            StateError: it has no threads.
            ResourceLimit: the host has nothing left for it, or refuses it.
        """
        with self._threads("cap the CPU of") as threads:
            if self.final is None:
                self._caps.put(share, threads)

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
            StateError: it has no threads.
            ResourceLimit: this host has no CPU to spare.
        """
        with self._threads("isolate" if on else "let in") as threads:
            if on:
                self.house.quarantine.confine(threads.values())
            else:
                self.house.quarantine.free(threads.values())

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
        if self.final is not None:
            return
        # The kernel goes through its page tables: milliseconds for gigabytes.
        await self.house.workers.run(lambda: dirty.log(on), self.house.workers.dirty)
        if self.final is None:
            self.house.logged(self)

    @contextmanager
    def _threads(self, verb: str) -> Iterator[dict[int, int]]:
        """The kernel's numbers of its vCPUs' threads, by vCPU; of those that have not ended. None of them ends within
        the block, or its number could be a stranger's by the time it is used."""
        if not all(vcpu.engine.threaded for vcpu in self.vcpus):
            name = self.house.backend.name
            raise StateError(
                f"can't {verb} vm {self.name!r}: not supported by this backend ({name}), it has no threads"
            )
        with ExitStack() as stack:
            numbers = {vcpu.index: stack.enter_context(vcpu.living()) for vcpu in self.vcpus}
            yield {index: tid for index, tid in numbers.items() if tid is not None}

    async def kernel_statistics(self) -> dict[str, float]:
        """What the kernel counts of it, by names that differ from kernel to kernel.

        Raises:
            StateError: it has ended, or its backend's guests are not the kernel's.
        """
        machine: Any = self._machine
        await trio.lowlevel.checkpoint()
        why = None if hasattr(machine, "statistics") else f"backend {self.house.backend.name!r} has none"
        for index in range(len(self.vcpus)):
            if why is None and not self.has_ended(index):
                # The kernel holds a lock of a vCPU's while that is in KVM_RUN, which may be for ever.
                await self.call(index, partial(machine.open_statistics, index))
        if self.final is not None:
            why = "it has ended"
        if why is not None:
            raise StateError(f"vm {self.name!r}: no statistics of KVM's: {why}")
        statistics: dict[str, float] = machine.statistics()
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
        self._post(self.holding.come, index, number, Level.PAUSED)

    def on_quiesced(self, index: int, number: int) -> None:
        self._post(self.holding.come, index, number, Level.QUIESCED)

    def on_ended(self, index: int, outcome: Outcome) -> None:
        try:
            if not isinstance(outcome, Halted):
                self.end(outcome)
            for call in self.commanded(index):
                call()
            if self.dirty is not None and self.dirty.on:
                read_logs([self.dirty])  # here, as it waits for the kernel: what it wrote last counts as well
            self._caps.leave(index)  # its end is waited for
        except Exception as error:
            self._fail(f"the end of vCPU {index}", error)
        finally:
            self._post(self._on_ended, index)

    def _on_ended(self, index: int) -> None:
        self._done[index].set()
        self._gone.add(index)
        try:
            if self.final is None:
                self._serve_late_calls(index)
            self.holding.gone(index)
        finally:
            if len(self._gone) == len(self.vcpus):
                with self._lock:
                    if self._outcome is None:
                        self._outcome = Halted()
                self.ended.set()

    # ---- end

    def is_parked(self, index: int) -> bool:
        """It runs no guest code, as it is paused."""
        return self.holding.level(index) >= Level.PAUSED

    def is_quiesced(self, index: int) -> bool:
        """And nothing of an access is left to be done."""
        return self.holding.level(index) is Level.QUIESCED

    @property
    def parked(self) -> trio.Event:
        """Set when none of its vCPUs runs guest code."""
        return self.holding.paused

    def has_ended(self, index: int) -> bool:
        return index in self._gone or self.final is not None

    def counters(self) -> list[Counters]:
        if self.final is not None:
            return self.final
        now = self.house.backend.now()
        return [core.counters(now) for core in self._cores]

    def look(self, index: int, now: int) -> tuple[dict[int, int], int, list[int], int]:
        """As `VcpuCore.look`."""
        return self._cores[index].look(now) if self.final is None else ({}, 0, [0] * len(BUCKETS), 0)

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

    async def _give_back(self) -> None:
        """No runner is left. All but the memory is given back; what goes wrong with one thing keeps no other."""
        problems: list[str] = []
        self._finish(problems)
        await self.house.workers.run(lambda: self._close(problems), self.house.workers.teardown)
        for core in self._cores:  # here, as the fleet's thread looks for those that have something to tell
            with contained(f"vm {self.name}: core", problems):
                core.close()
        self.talked()  # if one of them had something to say, nobody is told of it any more
        if problems:
            self._outcome = Failed(f"giving back: {'; '.join(problems)}")

    def _finish(self, problems: list[str]) -> None:
        """Keep the last figures, deliver the last records, and have nobody look at the cores any more."""
        final = [attrs.evolve(ZERO) for _ in self._cores]
        with contained(f"vm {self.name}: counters", problems):
            final = self.counters()
        with contained(f"vm {self.name}: samples", problems):
            self.gather()
        # Before `final` is set, as policies are told what is new in these cores.
        with contained(f"vm {self.name}: last exits", problems):
            self.house.retire(self._cores)
        self.final = final
        self.memory.on_write = None  # nobody executes it any more
        self.ended.set()
        with contained(f"vm {self.name}: pauses", problems):
            self.holding.close()
        for vcpu in self.vcpus:
            with contained(f"vm {self.name}: calls", problems):
                self._serve_late_calls(vcpu.index)
            vcpu.keep_registers()

    def _close(self, problems: list[str]) -> None:
        """May run on a worker thread: it takes the kernel a millisecond."""
        for vcpu in self.vcpus:
            with contained(f"vm {self.name}: vCPU {vcpu.index}", problems):
                vcpu.engine.close()
        with contained(f"vm {self.name}: machine", problems):
            self._machine.close()
        with contained(f"vm {self.name}: caps", problems):
            self._caps.close()  # KVM may have had a thread there
