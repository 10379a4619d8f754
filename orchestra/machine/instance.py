"""One run of a VM: its machine, buses, devices and vCPU tasks, from set-up to the last resource given back.

A `Vm` is the handle that lives on; a restart gives it a new `Instance`. `Instance.life` alone has the state of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import trio

from ..backend import Machine
from ..backend.kvm.dirty import DirtyLog, read_logs
from ..backend.memory import GuestMemory
from ..model.actions import Failed, Halted, Outcome, Stopped
from ..model.errors import OrchestraError
from ..model.spec import Meter, VmSpec
from ..native.core import Charged, Command, VcpuCore
from .budget import Budgets, above
from .calls import Calls
from .contain import contained
from .context import InstanceContext, Owner
from .cores import Cores
from .desired import Desired
from .devices.assembly import NONE, Assembly
from .devices.buses import Buses
from .lifecycle import Event, Lifecycle
from .making import Making
from .pause_levels import Level, PauseLevels
from .pausing import Pausing
from .prefault import claim, populate
from .restraint import Restraint, make_caps
from .vcpu import Vcpu

__all__ = ["Instance"]

log: Final = logging.getLogger("orchestra")

CLOSED: Final = "the fleet was closed"


class Instance:
    """`start` sets the run up; `run`, in the VM's task, runs it and gives back what it holds of the host. The memory
    stays readable until `Workers.discard` unmaps it.

    Attributes:
        life: the state of the run.
        pause_levels: how far a pause holds the vCPUs.
        buses: the devices and tasks that answer the guest's accesses.
        cores: what the vCPUs counted, and which exits they report.
        calls: functions for the vCPUs' threads.
        restraint: caps and isolation.
        pausing: pauses the run, and lets it go on.
        levels: the budgets of each vCPU, from the widest to the narrowest.
    """

    def __init__(
        self,
        context: InstanceContext,
        spec: VmSpec,
        levels: Sequence[tuple[Budgets, Budgets, Budgets, Budgets]],
        owner: Owner,
    ) -> None:
        self.context = context
        self.spec = spec
        self.name = spec.name
        self.now = context.backend.now
        self.life = Lifecycle()
        self.pause_levels = PauseLevels(spec.vcpus, self.life, owner.on_pause_level)
        self.buses = Buses()
        self.ports, self.mmio = self.buses.ports, self.buses.mmio
        self.vcpus: list[Vcpu] = []
        self.memory: GuestMemory
        self.devices: Assembly | None = None
        self._cores: list[VcpuCore] = []
        self.cores = Cores(
            context, self.life, self._cores, owner.samples, spec.bus_lock_detection or context.bus_lock_detection
        )
        self.calls = Calls(self._knock, context.post, self._hurried)
        caps = make_caps(context, spec.name, self._cores, self.calls.ask, self._post, owner.on_cap_failed)
        self.restraint = Restraint(self, caps)
        self.pausing = Pausing(self, caps)
        self.disks = owner.disks
        self._owner = owner
        self._caps = caps
        self.levels = levels
        self.back_ends = NONE
        self._machine: Machine
        self.owed = owner.owed
        self._ended = trio.Event()  # set when all vCPUs have ended, or the run is given back

    # ---- set-up

    async def start(self) -> None:
        """Set everything up, as desired. If that fails or is cancelled, everything is given back.

        Claims and the desired record are read after the machine is made, as both may change while that is waited for.

        Raises:
            OrchestraError: the host can't give the run what it needs.
        """
        context = self.context
        with claim(context.workers, self.spec) as mine:
            await Making(self, self._cores).make(mine)
            try:
                if self.spec.backing.prefault:
                    await populate(self.memory, context.workers, mine)
                for ports, mmio, handler in self._owner.claims:
                    self.buses.claim(ports, mmio, handler)
                self.cores.subscribe(context.event_mask(self.name))
                for index, core in enumerate(self._cores):
                    context.register(core, self, index)
                if self.dirty is not None and self.dirty.on:
                    context.logged(self)
                self.life.happen(Event.BUILT)
                self._apply(self._owner.wanted)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await context.workers.run(self._join, context.workers.teardown)
                    await self._give_back()
                    await context.workers.discard(self.memory).wait()
                raise

    def _apply(self, desired: Desired) -> None:
        """Put the desired record into force, before the guest runs. Two parts are elsewhere: `Desired.spec` has the
        dirty log, and the VM's budgets, which outlive its runs, have the limits."""
        self.cores.sample(desired.sample_every)
        if desired.paused:
            self.pausing.pause()
            self.pause_levels.settle()
        if self.devices is not None:
            self.devices.keep_to(desired.memory_target)
        try:
            if desired.cap is not None:
                self.restraint.cap_cpu(desired.cap)
        except OrchestraError as error:
            self._owner.on_cap_failed(error)
        try:
            if desired.isolated:
                self.restraint.isolate(True)
        except OrchestraError as error:
            self._owner.on_isolation_failed(error)

    def equip(self, machine: Machine) -> None:
        """Plug the devices in and start the threads, which are held. If that fails, the machine is closed."""
        context, owner = self.context, self._owner
        self._machine = machine
        try:
            self.devices = Assembly(
                self, machine, owner.console, owner.ports, context.post, self._in_turn, context.pacer
            )
            self.vcpus += [Vcpu(self, index, engine) for index, engine in enumerate(machine.engines)]
            for vcpu in self.vcpus:
                if vcpu.engine.threaded:
                    vcpu.spawn()
        except BaseException:
            self._join()
            if self.devices is not None:
                self.devices.stop()  # what they opened is theirs to close
            machine.close()
            raise

    def _join(self) -> None:
        """The run will not begin: end the runners that are held, and wait until their threads are gone."""
        self.end(Stopped("its set-up failed"))
        for vcpu in self.vcpus:
            vcpu.join()

    def talked(self) -> None:
        """There is output at the console or at a port, or room for input, or the I/O thread has come to rest: whoever
        waits for that looks."""
        self._owner.console.wake()
        self._owner.ports.wake()
        self.pausing.look()

    # ---- life

    async def run(self, ready: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint) -> Outcome:
        """Run all vCPUs until the last has ended, take the machine down, and return how the run ended. Cancelling
        stops the vCPUs first.

        An exception here ends this VM as `Failed`, and no other.

        Parameters:
            ready: awaited before the guest runs its first instruction.
        """
        failed: Failed | None = None
        awaited = [vcpu for vcpu in self.vcpus if not vcpu.engine.threaded]
        try:
            if awaited or (self.devices is not None and self.devices.listens):
                async with trio.open_nursery() as nursery:
                    for vcpu in awaited:
                        nursery.start_soon(self._drive, vcpu)
                    if self.devices is not None and self.devices.listens:
                        nursery.start_soon(self.devices.run, self._ended)
                    await self._run(ready)
            else:  # no task where nothing waits: a task and its nursery are a tenth of what a launch takes of the loop
                await self._run(ready)
        finally:
            with trio.CancelScope(shield=True):  # closing a VM's descriptors takes about a millisecond, no more
                failed = await self._give_back()
        outcome = failed or self.life.outcome
        assert outcome is not None
        return outcome

    async def _run(self, ready: Callable[[], Awaitable[object]]) -> None:
        """Let the guest run until it has ended, and wait until its threads are gone."""
        try:
            await ready()
            if self.devices is not None:
                self.devices.begin()
            self.command(clear=Command.HOLD)
            await self._ended.wait()
        except Exception as error:
            self.fail("run", error)
        finally:
            self.end(Stopped(CLOSED))
            if not self._ended.is_set() and any(vcpu.engine.threaded for vcpu in self.vcpus):
                with trio.CancelScope(shield=True):  # microseconds, as they are told to stop
                    await self._ended.wait()

    async def _drive(self, vcpu: Vcpu) -> None:
        try:
            await vcpu.drive_async()
        except Exception as error:
            self.fail(f"vCPU {vcpu.index}", error)
            self._on_ended(vcpu.index)

    def fail(self, what: str, error: Exception) -> None:
        """An error of orchestra or of the host: it ends this VM. Any thread."""
        log.error("vm %s: %s failed", self.name, what, exc_info=error)
        self.end(Failed(f"{what}: {type(error).__name__}: {error}"))

    def _post(self, function: Callable[..., object], *args: object) -> None:
        """Run a function soon on the fleet's thread. Any thread. If it raises, this VM fails, and not the fleet."""
        self.context.post(partial(self._guarded, function, *args))

    def _in_turn(self, function: Callable[[], object]) -> None:
        """Run a function when it is this VM's turn. If it raises, this VM fails, and not the fleet."""
        self.context.inbox.put((self.spec.tenant or "default", self.name), partial(self._guarded, function))

    def _guarded(self, function: Callable[..., object], *args: object) -> None:
        try:
            function(*args)
        except Exception as error:
            self.fail(getattr(function, "__name__", "a call"), error)

    def end(self, outcome: Outcome) -> None:
        """End the run with that outcome, unless it has one already: the first counts. Any thread."""
        self.life.end(outcome)
        if not self.life.has_ended:
            self.command(set=Command.STOP)
            self._caps.end()

    def command(self, set: int = 0, clear: int = 0) -> None:
        """Command all vCPUs. All are commanded before the first is kicked, and nothing waits here. Any thread."""
        for core in self._cores:
            core.command(set, clear)
        for vcpu in self.vcpus:
            vcpu.engine.kick()

    @contextmanager
    def _hurried(self) -> Iterator[None]:
        """Within the block nothing delays the vCPUs' threads: caps are loosened, and the core is told of the hurry."""
        self._caps.hurry(True)
        try:
            with self.context.core.urgently():
                yield
        finally:
            self._caps.hurry(False)

    def _knock(self, index: int) -> None:
        """Make a vCPU's runner look for calls. Any thread."""
        self._cores[index].command(set=Command.CALL)
        self.vcpus[index].engine.kick()

    # ---- the machine

    @property
    def dirty(self) -> DirtyLog | None:
        """The log of the pages that the guest writes. None: the backend has none."""
        return self._machine.dirty

    @property
    def machine(self) -> Machine:
        return self._machine

    def device_buckets(self, meter: Meter) -> Sequence[Charged]:
        """What the work of its devices is charged to, as the accesses of its vCPUs are: all levels but the vCPU's."""
        return above(self.context.core.shared, self.levels[0][:3], meter)

    # ---- called by runners, on their threads

    @property
    def pause_number(self) -> int:
        return self.pause_levels.number

    def commanded(self, index: int) -> list[Callable[[], None]]:
        return self.calls.take(index, partial(self._cores[index].command, 0, Command.CALL))

    def on_parked(self, index: int, number: int) -> None:
        self._post(self.pause_levels.come, index, number, Level.PAUSED)

    def on_quiesced(self, index: int, number: int) -> None:
        self._post(self.pause_levels.come, index, number, Level.QUIESCED)

    def on_ended(self, index: int, outcome: Outcome) -> None:
        try:
            if not isinstance(outcome, Halted):
                self.end(outcome)
            for call in self.commanded(index):
                call()
            if self.dirty is not None and self.dirty.on:
                read_logs([self.dirty])  # on this thread, as the kernel may take long; the last writes count too
            self._caps.leave(index)  # the fleet waits for this thread's end: no cap may delay that
        except Exception as error:
            self.fail(f"the end of vCPU {index}", error)
        finally:
            self._post(self._on_ended, index)

    def _on_ended(self, index: int) -> None:
        try:
            self.pause_levels.gone(index)
            if not self.life.has_ended:
                self.calls.serve_late(index)
        finally:
            if self.pause_levels.all_gone:
                self.life.end(Halted())  # the first outcome counts: a vCPU that ended otherwise has set it
                self.life.happen(Event.GONE)
                self._ended.set()

    # ---- end

    def has_ended(self, index: int) -> bool:
        """Whether that vCPU has ended."""
        return self.life.has_ended or self.pause_levels.has_gone(index)

    async def _give_back(self) -> Failed | None:
        """Give everything back but the memory, after the last runner has gone. Each step is done even if others fail.

        Order: devices stop first, as they may still use the machine. Figures and records are read before the cores are
        freed. The cores go last, on the fleet's thread.
        """
        problems: list[str] = []
        if self.devices is not None:
            if self.devices.has_queues:  # the file of a disk may take long, or hang: no other VM waits for that
                end_queues = partial(self.devices.end_queues, problems)
                await self.context.workers.run(end_queues, self.context.workers.files)
            self.devices.stop(problems)
        self._finish(problems)
        await self.context.workers.run(lambda: self._close(problems), self.context.workers.teardown)
        self.cores.close(self.name, problems)  # here: the drain task on this thread looks at cores
        self.talked()  # the cores are gone, so nobody would report their last output
        return Failed(f"giving back: {'; '.join(problems)}") if problems else None

    def _finish(self, problems: list[str]) -> None:
        """Keep the last figures and deliver the last records. From `ENDED` on nobody looks at the cores."""
        with contained(f"vm {self.name}: figures", problems):
            self.cores.finish(self.name, problems)
        self.life.happen(Event.FREED)
        self.memory.on_write = None  # no engine executes this memory any more
        self._ended.set()
        with contained(f"vm {self.name}: pauses", problems):
            self.pause_levels.close()
        for vcpu in self.vcpus:
            with contained(f"vm {self.name}: calls", problems):
                self.calls.serve_late(vcpu.index)
            vcpu.keep_registers()

    def _close(self, problems: list[str]) -> None:
        """Close vCPUs, machine and caps, in this order. May run on a worker thread: the kernel takes a millisecond, and
        a vCPU's thread that has ended still needs a CPU to go, for which it may wait long."""
        for vcpu in self.vcpus:
            vcpu.join()
        for vcpu in self.vcpus:
            with contained(f"vm {self.name}: vCPU {vcpu.index}", problems):
                vcpu.engine.close()
        with contained(f"vm {self.name}: machine", problems):
            self._machine.close()
        with contained(f"vm {self.name}: caps", problems):
            self._caps.close()  # after the machine: a thread of KVM's may be in the cgroup until then
