"""A virtual machine: the handle to steer it by, and the task that keeps it to its restart policy."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import attrs
import trio

from .actions import (
    CapCpu,
    Failed,
    Halted,
    Isolate,
    Outcome,
    Pause,
    Rejoin,
    Resume,
    Shutdown,
    State,
    Stop,
    Stopped,
)
from .budget import Budgets, limits_of, make_budgets
from .counted import ZERO, VcpuStatistics, VmStatistics, add, add_names
from .devices.bus import Device, Handler
from .devices.console import Console
from .devices.requests import Requests
from .errors import BusLockUnsupported, OrchestraError, ResourceLimit, SpecError, StateError
from .guest import Guest, House
from .native.core import Counters
from .profile import Profile, Samples, Symbols, make_profile
from .spec import Limit, Meter, VmSpec, check_flag, check_sampling

__all__ = ["VcpuStatistics", "Vm", "VmStatistics"]

log: Final = logging.getLogger("orchestra")


def _check_ranges(ports: range | None, mmio: range | None) -> None:
    if ports is None and mmio is None:
        raise SpecError("ports=None, mmio=None: name the ports or the MMIO addresses to claim, as ranges")


def check_device(device: object, ports: range | None, mmio: range | None) -> None:
    """Check a device of the user's own, before it is claimed for."""
    if not isinstance(device, Device):
        raise SpecError(f"device={device!r}: must have read(offset, size) and write(offset, size, value)")
    _check_ranges(ports, mmio)


class Vm:
    """Made by `Fleet.launch`. All methods are for the fleet's thread; those that wait are checkpoints.

    What it holds of the host (descriptors, memory, threads) goes when it is stopped or its fleet is closed. After it
    ended by itself its memory, registers and statistics can still be read; `stop` then gives the memory back.
    """

    def __init__(self, house: House, spec: VmSpec, tenant: str, above: tuple[Budgets, Budgets]) -> None:
        now = house.backend.now()
        self.spec = spec
        self.name = spec.name
        self.tenant = tenant
        self.restarts = 0
        self.launch = house.next_id()
        self.console = Console(house.post)
        self.budgets = make_budgets(limits_of(spec), now)
        self.vcpu_budgets = [make_budgets(limits_of(spec, "vcpu_"), now) for _ in range(spec.vcpus)]
        self._samples = Samples(spec.sample_every)
        self._house = house
        self._above = above
        self._guest: Guest | None = None
        self._retired: list[Counters] | None = None
        self._outcome: Outcome | None = None
        self._paused = False
        self._released = False
        self._caps: dict[str | None, float] = {}
        self._isolated = False
        self.was_capped = False
        self._log_dirty: bool | None = None  # None: as the spec says
        self._logging = trio.Lock()
        self._dirty_before: int | None = None  # pages, in former runs
        self._stop_reason: Stopped | None = None
        self._kick_restart = trio.Event()
        self._ended = trio.Event()
        self._devices: list[tuple[range | None, range | None, Device]] = []
        self._requests: dict[Requests, tuple[range | None, range | None]] = {}

    # ---- state

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it has not."""
        return self._outcome

    @property
    def state(self) -> State:
        """Created (being set up), running, paused, stopped or failed."""
        if self._outcome is not None:
            return State.FAILED if isinstance(self._outcome, Failed) else State.STOPPED
        if self._guest is None:
            return State.CREATED
        return State.PAUSED if self._paused and self._guest.parked.is_set() else State.RUNNING

    @property
    def throttled(self) -> bool:
        """One of its vCPUs waits for its turn right now."""
        return self._guest is not None and any(c.throttled_since for c in self._guest.counters())

    def __repr__(self) -> str:
        return f"<Vm {self.name!r} {self.state}>"

    # ---- steering

    async def wait(self) -> Outcome:
        """Wait until it has ended for good (its restart policy lets it be), and return how."""
        await self._ended.wait()
        assert self._outcome is not None
        return self._outcome

    async def pause(self) -> None:
        """Hold it: returns when every vCPU is outside the guest, and not waiting for its turn either.

        Cancelled, the VM pauses all the same, as the journal says; call `resume`.

        Raises:
            StateError: it has ended.
        """
        self.hold()
        self._house.did(Pause(vm=self.name, reason="pause()"))
        await self.wait_parked()

    async def resume(self) -> None:
        """Let it go on. What it still had to wait for its turn, it waits.

        Raises:
            StateError: it has ended.
        """
        self.let_go()
        self._house.did(Resume(vm=self.name, reason="resume()"))
        await trio.lowlevel.checkpoint()

    async def stop(self, reason: str = "stop()") -> Outcome:
        """End it, wait until nothing of it is left, and return how it ended. Stopping what has ended is no error.

        It leaves `Fleet.vms` and its memory is given back; registers and statistics stay readable.
        Cancelled, it stops all the same.
        """
        self.stop_soon(Stopped(reason))
        return await self.wait_released()

    @property
    def stopping(self) -> bool:
        """`stop` was asked for."""
        return self._stop_reason is not None

    def release(self) -> None:
        """It has ended: leave the fleet and give the memory back."""
        if not self._released:
            self._released = True
            self._house.released(self)

    def stop_soon(self, outcome: Stopped) -> None:
        """Tell it to stop, and don't wait."""
        first = self._stop_reason is None and self._outcome is None
        self.end(outcome)
        if first:
            self._house.did(Stop(vm=self.name, reason=outcome.reason))

    async def set_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, vcpu: int | None = None
    ) -> None:
        """Change its limit, or one vCPU's; at once, also for waits in progress. None: no limit.

        Raises:
            SpecError: not a limit, no such meter or vCPU.
            BusLockUnsupported: a bus-lock limit where the fleet can't see bus locks.
            StateError: it has ended.
        """
        if self._outcome is not None:  # by now its name may be another's
            raise StateError(f"vm {self.name!r} has ended: it has no limit to change")
        self._house.set_limit_nowait(limit, meter=meter, vm=self.name, vcpu=vcpu)
        await trio.lowlevel.checkpoint()

    def budget(self, meter: Meter, vcpu: int | None) -> Any:
        """The budget that `set_limit` means."""
        if vcpu is None:
            return self.budgets[meter]
        return self.vcpu_budgets[self._vcpu(vcpu)][meter]

    @property
    def cpu_cap(self) -> float | None:
        """The cap in force: the part of a CPU that each of its vCPUs may use. None: none."""
        return min(self._caps.values(), default=None)

    def cap_cpu(self, share: float | None) -> None:
        """Let each of its vCPUs use at most this part of a CPU, by CPU time over periods of 50 ms. At once.

        It is one cap for all callers. Policies have their own, and the tightest counts.

        Parameters:
            share: from 0.01 to 1; None: no cap.

        Raises:
            SpecError: not from 0.01 to 1.
            StateError: it has ended, or its backend gives it no thread (scripted).
            ResourceLimit: the host has nothing left for it, or refuses it.
        """
        action = CapCpu(vm=self.name, share=share, reason="cap_cpu()")
        self.put_cap(None, share)
        self._house.did(action)

    @property
    def isolated(self) -> bool:
        """Its vCPUs run on the quarantine CPUs."""
        return self._isolated

    def isolate(self, isolated: bool = True) -> None:
        """Have its vCPUs run on the fleet's quarantine CPUs only, or (False) wherever the others do.

        Raises:
            StateError: it has ended, or its backend gives it no thread (scripted).
            ResourceLimit: this host has no CPU to spare for it.
        """
        self.place(isolated)
        kind = Isolate if isolated else Rejoin
        self._house.did(kind(vm=self.name, reason="isolate()"))

    @property
    def logs_dirty(self) -> bool:
        """The pages that its guest writes are logged and counted, all of them or some (`MemoryRegion.log_dirty`)."""
        dirty = None if self._guest is None or self._outcome is not None else self._guest.dirty
        return dirty is not None and dirty.on

    async def log_dirty(self, on: bool = True) -> None:
        """Have KVM log which pages of 4 KiB the guest writes, in all memory that it may write; or (False) in none. It
        stays over restarts.

        While it is on, `statistics`, the facts of policies and the journal say how many there were. KVM write-protects
        what it logs, and maps it in pages of 4 KiB: after each reading of the log, about one a second, the first write
        to a page costs the guest a fault. Switching it takes the kernel milliseconds for each gigabyte that is in use;
        the guest goes on meanwhile. The first touch of a page may count even if it only reads; what the host writes
        does not.

        Cancelled, it is either as asked for or as it was.

        Raises:
            SpecError: neither True nor False.
            StateError: it has ended, or does not run on KVM.
            ResourceLimit, KvmError: the kernel has no memory for the log, or won't. It is as it was.
        """
        check_flag("on", on)
        async with self._logging:
            await self._alive("log the memory of").log_dirty(on)
            self._log_dirty = on

    def report_work(self, units: float) -> None:
        """Tell how much the guest got done since this was called last, by its own account: requests served, rounds of
        a benchmark. Policies and the journal compare it with what is usual for this VM (`VmFacts.work`), and with
        nothing else, so the unit is yours.

        Raises:
            SpecError: less than 0, or no number.
        """
        if isinstance(units, bool) or not isinstance(units, int | float) or not 0 <= units < math.inf:
            raise SpecError(f"units={units!r}: must be a number, at least 0")
        self._house.worked(self, units)

    # ---- actions, for those who journal them: each is commanded at once, and what is to come of it may be waited for

    def hold(self) -> None:
        """As `pause`. Each vCPU is held when it leaves the guest or its device; another command may come meanwhile."""
        guest = self._alive("pause")
        if not self._paused:
            self._paused = True
            guest.pause()

    async def wait_parked(self) -> None:
        """After `hold`: until every vCPU is outside the guest, or the pause is taken back, or it has ended."""
        with self._house.core.urgently():
            await self._made().parked.wait()

    def let_go(self) -> None:
        """As `resume`."""
        guest = self._alive("resume")
        if self._paused:
            self._paused = False
            guest.resume()
            self._house.changed(self, State.RUNNING, "resumed")

    async def wait_released(self) -> Outcome:
        """After `end`: until nothing of it is left."""
        with self._house.core.urgently():
            await self._ended.wait()
        self.release()  # its task does so too, but one that had ended by itself has none left
        assert self._outcome is not None
        return self._outcome

    def end(self, outcome: Stopped) -> None:
        """As `stop`."""
        self._stop_reason = self._stop_reason or outcome
        self._kick_restart.set()
        if self._guest is not None and self._outcome is None:
            self._guest.end(self._stop_reason)

    def put_cap(self, by: str | None, share: float | None) -> None:
        """As `cap_cpu`, of whoever asks (a policy's name; None: a caller)."""
        caps = {**self._caps, by: share}
        wanted = {name: cap for name, cap in caps.items() if cap is not None}
        if wanted != self._caps:
            self._alive("cap the CPU of").cap_cpu(min(wanted.values(), default=None))
            self._caps = wanted
            self.was_capped = True

    def cap_of(self, by: str | None) -> float | None:
        """What one of those who cap it asked for last."""
        return self._caps.get(by)

    async def cap_settled(self) -> None:
        """Wait until what was put is in force; no checkpoint if it is.

        Raises:
            ResourceLimit: it can't be; no cap is.
        """
        if self._guest is not None:
            await self._guest.cap_settled()

    def _on_cap_failed(self, error: ResourceLimit) -> None:
        log.error("vm %s is not capped: %s", self.name, error.strerror)
        self._caps = {}

    def place(self, on: bool) -> None:
        """As `isolate`."""
        guest = self._alive("isolate" if on else "let in")
        if on != self._isolated:
            guest.isolate(on)
            self._isolated = on

    # ---- devices and requests

    def attach(self, device: Device, *, ports: range | None = None, mmio: range | None = None) -> None:
        """Add a device of your own. It is called on vCPU threads, one call at a time; it stays over restarts.

        Raises:
            SpecError: no range given, or one that is taken, or not a device.
        """
        check_device(device, ports, mmio)
        self._claim(ports, mmio, device)
        self._devices.append((ports, mmio, device))

    @asynccontextmanager
    async def requests(self, *, ports: range | None = None, mmio: range | None = None) -> AsyncIterator[Requests]:
        """Claim ranges for this task, which answers each access (`Request`).

        When the block is left, unanswered accesses go back to the bus: reads then give ones, as if nobody was there.

        Raises:
            SpecError: no range given, or one that is taken.
        """
        requests = Requests(partial(self._house.inbox.put, (self.tenant, self.name)))
        self._claim(ports, mmio, requests)
        self._requests[requests] = (ports, mmio)
        try:
            await trio.lowlevel.checkpoint()
            yield requests
        finally:
            del self._requests[requests]
            if self._guest is not None:  # it may be another one by now: claims stay over a restart
                self._guest.release(requests)
            requests.close()

    def _claim(self, ports: range | None, mmio: range | None, handler: Handler) -> None:
        _check_ranges(ports, mmio)
        self._alive("claim addresses of").claim(ports, mmio, handler)

    # ---- inspection

    def read_memory(self, address: int, size: int) -> bytes:
        """Copy guest-physical memory. Not atomic against a running guest: pause it for a consistent picture.

        Raises:
            GuestMemoryError: outside its memory, or the memory was given back by `stop`.
        """
        return self._made().memory.read(address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        """Copy bytes into guest-physical memory, read-only regions included.

        Raises:
            GuestMemoryError: outside its memory; nothing is written then.
        """
        self._made().memory.write(address, data)

    def registers(self, vcpu: int = 0) -> Any:
        """A vCPU's general registers (.rax ... .r15, .rip, .rflags), while it is paused or after it ended.

        Raises:
            StateError: it runs: `pause` it first, or use `inspect`.
        """
        guest = self._made()
        index = self._vcpu(vcpu)
        if guest.has_ended(index):
            registers = guest.vcpus[index].final_registers
            if registers is None or isinstance(registers, Exception):
                raise StateError(f"vm {self.name!r}: vCPU {vcpu} ended before its registers could be read: {registers}")
            return registers
        if not (self._paused and guest.is_parked(index)):
            raise StateError(f"vm {self.name!r}: vCPU {vcpu} runs: pause() first, or `await vm.inspect({vcpu})`")
        return guest.vcpus[index].engine.registers()

    async def inspect(self, vcpu: int = 0) -> Any:
        """A running vCPU's general registers, taken between two entries of the guest; it is not paused for it."""
        guest = self._made()
        index = self._vcpu(vcpu)
        if guest.has_ended(index):
            await trio.lowlevel.checkpoint()
            return self.registers(vcpu)
        return await guest.call(index, guest.vcpus[index].engine.registers)

    def statistics(self) -> VmStatistics:
        """What it did so far."""
        guest, seen = self._guest, self._house.bus_locks
        counters: Sequence[Counters] = guest.counters() if guest is not None else []
        if self._retired is not None:
            counters = [add(a, b) for a, b in zip(self._retired, counters, strict=True)] if counters else self._retired
        vcpus = tuple(
            VcpuStatistics(
                index=index,
                state=self._vcpu_state(index),
                throttled=c.throttled_since is not None,
                bus_locks=c.bus_locks if seen else None,
                throttled_seconds=c.throttled / 1e9,
                waits=c.waits,
                released=c.released,
                exits=c.exits,
                unclaimed=c.unclaimed,
                answers=c.answers,
                missed=c.missed,
                kicks=c.kicks,
            )
            for index, c in enumerate(counters)
        )
        return VmStatistics(
            name=self.name,
            tenant=self.tenant,
            state=self.state,
            throttled=any(v.throttled for v in vcpus),
            outcome=self._outcome,
            restarts=self.restarts,
            bus_locks=sum(c.bus_locks for c in counters) if seen else None,
            throttled_seconds=sum(v.throttled_seconds for v in vcpus),
            waits=sum(v.waits for v in vcpus),
            released=sum(v.released for v in vcpus),
            exits=add_names(c.exits for c in counters),
            unclaimed=sum(v.unclaimed for v in vcpus),
            answers=sum(v.answers for v in vcpus),
            missed=sum(v.missed for v in vcpus),
            kicks=sum(v.kicks for v in vcpus),
            dirty_pages=self._dirty_pages(),
            limit=self.budgets[Meter.BUS_LOCKS].limit,
            exit_limit=self.budgets[Meter.EXITS].limit,
            answer_limit=self.budgets[Meter.ANSWERS].limit,
            bus_lock_detection=(self.spec.bus_lock_detection or self._house.bus_lock_detection) if seen else None,
            vcpus=vcpus,
        )

    def _dirty_pages(self) -> int | None:
        dirty = None if self._guest is None else self._guest.dirty
        pages, read = (0, 0) if dirty is None else dirty.sums()
        return (self._dirty_before or 0) + pages if read else self._dirty_before

    def kernel_statistics(self) -> Mapping[str, float]:
        """What KVM itself counts of it, in whole units (seconds, bytes), by the kernel's names: of the VM
        ("pages_4k"), and of each vCPU ("vcpu0.exits"). Which there are differs from kernel to kernel.

        The first call opens a descriptor for the VM and each vCPU; each takes some microseconds.

        Raises:
            StateError: it has ended, or does not run on KVM.
            KvmError: this KVM has none.
        """
        return self._made().kernel_statistics()

    def set_sampling(self, every: int) -> None:
        """Sample one bus lock of so many for `profile` from now on; 0: none. It stays over restarts.

        A lock that is sampled costs its vCPU some microseconds more: with every 100th, a guest that does nothing but
        lock is slowed by 2 % at most (`python -m benchmarks profile`). What is counted and charged stays the same.

        Raises:
            SpecError: not a number from 0 to 1,000,000,000.
            BusLockUnsupported: this fleet does not see bus locks.
        """
        check_sampling("every", every)
        if every and not self._house.bus_locks:
            raise BusLockUnsupported(f"vm {self.name!r}: this fleet does not see bus locks: there is nothing to sample")
        self._samples.every = every
        if self._guest is not None:
            self._guest.sample(every)

    def profile(self, symbols: Iterable[Symbols] = ()) -> Profile:
        """Which of its instructions locked the bus since it was launched, restarts included; see `Profile`.

        Disassembled if iced-x86 is installed (``pip install 'orchestra[profile]'``). Takes a tenth of a millisecond or
        so for each instruction.

        Parameters:
            symbols: functions of the guest; the first that knows an address names it.
        """
        samples = self._guest.gather() if self._guest is not None else self._samples
        return make_profile(
            self.name,
            samples.places,
            symbols=symbols,
            bus_locks=self.statistics().bus_locks,
            unplaced=samples.unplaced,
            every=samples.every if self._house.bus_locks else 0,
        )

    def _vcpu_state(self, index: int) -> State:
        guest = self._guest
        if guest is not None and self._outcome is None and guest.has_ended(index):
            return State.STOPPED
        if guest is not None and self._outcome is None and self._paused and guest.is_parked(index):
            return State.PAUSED
        return self.state

    def _vcpu(self, vcpu: int) -> int:
        if isinstance(vcpu, bool) or not isinstance(vcpu, int) or not 0 <= vcpu < self.spec.vcpus:
            raise SpecError(f"vcpu={vcpu!r}: vm {self.name!r} has vCPUs 0 to {self.spec.vcpus - 1}")
        return vcpu

    def _made(self) -> Guest:
        if self._guest is None:
            raise StateError(f"vm {self.name!r} is still being set up")
        return self._guest

    def _alive(self, verb: str) -> Guest:
        if self._outcome is not None or self._guest is None:
            raise StateError(f"can't {verb} vm {self.name!r}: it is {self.state}")
        return self._guest

    # ---- for the fleet

    @property
    def guest(self) -> Guest | None:
        return self._guest

    async def supervise(
        self, devices: Iterable[tuple[range | None, range | None, Device]], paused: bool, *, task_status: Any
    ) -> None:
        """The VM's task: run it, restart it as its spec says, and leave nothing behind."""
        self._devices = list(devices)
        self._paused = paused
        restart, delay, in_a_row, started = self.spec.restart, self.spec.restart.backoff, 0, False
        outcome: Outcome = Stopped("the fleet was closed")
        try:
            while True:
                begun = trio.current_time()
                try:
                    guest = await self._start_guest()
                except Exception as error:  # whatever it is, it is the end of this VM and of no other
                    outcome = Failed(f"{'restart' if started else 'launch'}: {type(error).__name__}: {error}")
                    if not started:
                        raise
                else:
                    if not started:
                        started = True
                        task_status.started()
                    if not self._paused:  # else it says so once it is
                        self._house.changed(self, State.RUNNING, self._how_often())
                    outcome = await guest.run()
                    self._retire(guest)
                if self._stop_reason is not None:
                    outcome = self._stop_reason if isinstance(outcome, Stopped) else outcome
                    return
                if restart.when == "never" or not isinstance(outcome, Failed):
                    return
                if trio.current_time() - begun > restart.backoff_max:
                    delay, in_a_row = restart.backoff, 0
                in_a_row += 1
                if restart.most is not None and in_a_row > restart.most:
                    return
                with trio.move_on_after(delay):
                    await self._kick_restart.wait()
                    return  # stopped while it waited to be restarted
                delay = min(delay * 2, restart.backoff_max)
                self.restarts += 1
        finally:
            self._outcome = outcome
            self._house.changed(self, self.state, _told(outcome))
            self.console.close()
            for requests in self._requests:
                requests.end()
            self._ended.set()

    async def _start_guest(self) -> Guest:
        levels = [(*self._above, self.budgets, vcpu) for vcpu in self.vcpu_budgets]
        async with self._logging:  # by now, or in the guest that there will be
            guest = Guest(self._house, self._spec_now(), levels, self.console)
            guest.samples = self._samples
            guest.all_parked = self._on_parked
            guest.cap_failed = self._on_cap_failed
            await guest.start(self._claims, lambda: self._paused)
            if self._guest is not None:
                self._dirty_before = self._dirty_pages()
                self._guest.close()
            self._guest = guest
        try:  # a restart changes nothing of what it is held to
            if self._caps:
                guest.cap_cpu(self.cpu_cap)
            if self._isolated:
                guest.isolate(True)
        except OrchestraError as error:
            log.error("vm %s was restarted: %s", self.name, error)
        if self._stop_reason is not None:
            guest.end(self._stop_reason)
        return guest

    def _spec_now(self) -> VmSpec:
        """The spec, with what was changed since."""
        if self._log_dirty is None:
            return self.spec
        regions = [attrs.evolve(region, log_dirty=False) for region in self.spec.regions]
        return attrs.evolve(self.spec, log_dirty=self._log_dirty, regions=regions)

    def _how_often(self) -> str:
        return f"restart {self.restarts}" if self.restarts else ""

    def _on_parked(self) -> None:
        if self._paused and self._outcome is None:
            self._house.changed(self, State.PAUSED, "")

    def _claims(self) -> list[tuple[range | None, range | None, Handler]]:
        claimed = [(ports, mmio, requests) for requests, (ports, mmio) in self._requests.items()]
        return [*self._devices, *claimed]

    def _retire(self, guest: Guest) -> None:
        """Keep an ended guest's figures if another will follow it."""
        assert guest.final is not None
        if self.spec.restart.when != "never":
            previous = self._retired
            self._retired = (
                guest.final if previous is None else [add(a, b) for a, b in zip(previous, guest.final, strict=True)]
            )
            guest.final = [attrs.evolve(ZERO) for _ in guest.final]

    def close(self) -> None:
        """It left the fleet: give its memory back, and free its buckets."""
        self._released = True
        if self._guest is not None:
            self._guest.close()
        for budgets in (self.budgets, *self.vcpu_budgets):
            for budget in budgets.values():
                budget.close()


def _told(outcome: Outcome) -> str:
    """In a line, for the journal."""
    match outcome:
        case Halted():
            return "halted"
        case Shutdown(reason=reason, code=code):
            return f"shutdown: {reason}" + ("" if code is None else f", code {code}")
        case Stopped(reason=reason):
            return reason
    return str(outcome)
