"""A virtual machine: the handle to steer it by, and the task that keeps it to its restart policy."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import trio

from ..model.actions import (
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
from ..model.errors import BusLockUnsupported, OrchestraError, SpecError, StateError
from ..model.spec import Limit, Meter, VmSpec, check_flag, check_sampling
from ..native.core import Counters
from ..profile import Profile, Samples, Symbols, make_profile
from .budget import Budgets, limits_of, make_budgets
from .contain import contained
from .desired import Desired
from .devices.bus import Device, Handler
from .devices.console import Console
from .devices.requests import Requests
from .holding import Level, PendingIo
from .instance import REFUSED, Instance, InstanceContext
from .restart import Next, Succession
from .statistics import VcpuStatistics, VmStatistics, add, add_names, by_bucket

__all__ = ["VcpuStatistics", "Vm", "VmStatistics"]

log: Final = logging.getLogger("orchestra")

PATIENCE: Final = 5.0
"""Seconds until a pause that waits for a device or a task is logged, and then again after twice that."""


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

    def __init__(self, house: InstanceContext, spec: VmSpec, tenant: str, above: tuple[Budgets, Budgets]) -> None:
        now = house.backend.now()
        self.spec = spec
        self.name = spec.name
        self.tenant = tenant
        self.launch = house.next_id()
        self.console = Console(house.post)
        self.budgets = make_budgets(limits_of(spec), now)
        self.vcpu_budgets = [make_budgets(limits_of(spec, "vcpu_"), now) for _ in range(spec.vcpus)]
        self.was_capped = False
        self._desired = Desired(sample_every=spec.sample_every)
        self._succession = Succession(spec, now)
        self._samples = Samples()
        self._house = house
        self._above = above
        self._guest: Instance | None = None
        self._retired: list[Counters] | None = None  # what former runs counted
        self._dirty_before: int | None = None  # pages, in former runs
        self._outcome: Outcome | None = None
        self._released = False
        self._unmapped: trio.Event | None = None
        self._logging = trio.Lock()
        self._stop_reason: Stopped | None = None
        self._reset_reason: str | None = None
        self._waits = ""  # for its next run, and why
        self._nudged = trio.Event()  # somebody wants something while the VM waits for its next run
        self._renewed = trio.Event()  # another run has started, or none will
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
        """Created (being set up), running, waiting (between two runs, for a restart's back-off or a reset's turn),
        paused (also while it waits so), stopped or failed. Whether a paused one's state may be read and saved is
        `quiesced`."""
        if self._outcome is not None:
            return State.FAILED if isinstance(self._outcome, Failed) else State.STOPPED
        if self._guest is None:
            return State.CREATED
        if self._desired.paused and self._guest.holding.paused.is_set():
            return State.PAUSED
        return State.WAITING if self._waits else State.RUNNING

    @property
    def restarts(self) -> int:
        """How often it was restarted (`VmSpec.restart`)."""
        return self._succession.restarts

    @property
    def resets(self) -> int:
        """How often it was reset, by itself (`VmSpec.on_reset`) or by `reset`."""
        return self._succession.resets

    @property
    def quiesced(self) -> bool:
        """It is paused, and nothing of an access is left to be done: registers and memory stay as they are."""
        return self.state is State.PAUSED and self._made().holding.quiesced.is_set()

    @property
    def pending(self) -> tuple[PendingIo, ...]:
        """What keeps it from being quiesced while it pauses, or is paused: accesses that no device or task has answered
        yet. Empty while it runs."""
        return self._guest.pending() if self._guest is not None and self._outcome is None else ()

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

    async def pause(self, *, quiesce: bool = True) -> None:
        """Hold it: returns when every vCPU is outside the guest, not waiting for its turn either, and all accesses of
        the guest's are completed, so that its registers and memory may be read and saved.

        An access that a device, or a task (`requests`), has yet to answer keeps it from that: `pending` has what it
        waits for, and after 5 s the log. So the task that answers requests must not wait for a pause in between.

        Parameters:
            quiesce: False: return once no guest code runs, whatever is pending. An answer that comes then is completed
                without running the guest, and changes registers and memory.

        Returns as well if the pause is taken back meanwhile, or the VM ends. Cancelled, the VM pauses all the same, as
        the journal says; call `resume`.

        Raises:
            StateError: it has ended.
        """
        self.hold()
        self._house.did(Pause(vm=self.name, reason="pause()"))
        await (self._wait_quiesced() if quiesce else self.wait_parked())

    async def resume(self) -> None:
        """Let it go on. What it still had to wait for its turn, it waits.

        Raises:
            StateError: it has ended.
        """
        self.let_go()
        self._house.did(Resume(vm=self.name, reason="resume()"))
        await trio.lowlevel.checkpoint()

    async def reset(self, reason: str = "reset()") -> None:
        """Start it afresh from its boot spec, as the reset button does: what it has in memory and registers is lost.
        Returns when it has started.

        It stays the same VM: name, console, claims and devices, limits, caps, a pause and statistics carry on. Devices
        of your own that have a method `reset()` are told. A VM is reset 5 times in a row and then once a second,
        whoever asks, guests included (`VmSpec.on_reset`): this waits for its turn. In a restart's back-off it starts
        without waiting for the rest of that.

        Cancelled, it is reset all the same.

        Raises:
            StateError: it has ended, also meanwhile.
        """
        self._alive("reset")
        renewed = self._renewed
        self._reset_reason = self._reset_reason or reason
        self._nudge()
        assert self._guest is not None
        self._guest.end(Stopped(reason))
        await renewed.wait()
        if self._outcome is not None:
            raise StateError(f"vm {self.name!r} has ended before it was reset: {_told(self._outcome)}")

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
        """The cap in force, or to be in force when its next run starts: the part of a CPU that each of its vCPUs may
        use. None: none."""
        return self._desired.cap

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
        """Its vCPUs run on the quarantine CPUs, or will when its next run starts."""
        return self._desired.isolated

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
        if dirty is None or self._guest is None:
            return False
        return dirty.on if self._guest.final is None else self._desired.logs_dirty(self.spec)

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
            self._desired.log_dirty = on

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
        """As `pause`. Each vCPU is held when it leaves the guest; another command may come meanwhile."""
        guest = self._alive("pause")
        if not self._desired.paused:
            self._desired.paused = True
            guest.pause()
            if self._waits:  # there is nothing to hold, and nobody will say that it is
                self._house.changed(self, self.state, self._waits)

    async def wait_parked(self) -> None:
        """After `hold`: until no guest code runs, or the pause is taken back, or it has ended."""
        with self._house.core.urgently():
            await self._made().holding.paused.wait()

    async def _wait_quiesced(self) -> None:
        quiesced, patience = self._made().holding.quiesced, PATIENCE  # of this pause, whatever comes
        await self.wait_parked()
        while not quiesced.is_set():
            with trio.move_on_after(patience):
                await quiesced.wait()
                return
            what = "; ".join(map(str, self.pending)) or "a vCPU completes an access"
            log.warning("vm %s: a pause has waited for %.0f s or more: %s", self.name, patience, what)
            patience *= 2

    def let_go(self) -> None:
        """As `resume`."""
        guest = self._alive("resume")
        if self._desired.paused:
            self._desired.paused = False
            guest.resume()
            self._house.changed(self, State.WAITING if self._waits else State.RUNNING, self._waits or "resumed")

    async def wait_released(self) -> Outcome:
        """After `end`: until nothing of it is left."""
        with self._house.core.urgently():
            await self._ended.wait()
        self.release()  # its task does so too, but one that had ended by itself has none left
        if self._unmapped is not None:
            await self._unmapped.wait()
        assert self._outcome is not None
        return self._outcome

    def end(self, outcome: Stopped) -> None:
        """As `stop`."""
        self._stop_reason = self._stop_reason or outcome
        self._nudge()
        if self._guest is not None and self._outcome is None:
            self._guest.end(self._stop_reason)

    def _nudge(self) -> None:
        self._nudged.set()
        self._nudged = trio.Event()

    def put_cap(self, by: str | None, share: float | None) -> None:
        """As `cap_cpu`, of whoever asks (a policy's name; None: a caller)."""
        wanted = self._desired.caps_with(by, share)
        if wanted != self._desired.caps:
            self._alive("cap the CPU of").cap_cpu(min(wanted.values(), default=None))
            self._desired.caps = wanted
            self.was_capped = True

    def cap_of(self, by: str | None) -> float | None:
        """What one of those who cap it asked for last."""
        return self._desired.caps.get(by)

    async def cap_settled(self) -> None:
        """Wait until what was put is in force; no checkpoint if it is.

        Raises:
            ResourceLimit: it can't be; no cap is.
        """
        if self._guest is not None:
            await self._guest.cap_settled()

    def _on_cap_failed(self, error: OrchestraError) -> None:
        log.error("vm %s is not capped any more: %s", self.name, error)
        caps, self._desired.caps = self._desired.caps, {}
        for by in caps:  # or the journal would have them in force for ever
            self._house.did(CapCpu(vm=self.name, share=None, reason=f"{REFUSED}: {error}"), by)

    def place(self, on: bool) -> None:
        """As `isolate`."""
        guest = self._alive("isolate" if on else "let in")
        if on != self._desired.isolated:
            guest.isolate(on)
            self._desired.isolated = on

    # ---- devices and requests

    def attach(self, device: Device, *, ports: range | None = None, mmio: range | None = None) -> None:
        """Add a device of your own. It is called on vCPU threads, one call at a time; it stays over restarts and
        resets. If it has a method `reset()`, that is called before each run but the first, on the fleet's thread: the
        device is to be as it was at power-on.

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
        """A vCPU's general registers (.rax ... .r15, .rip, .rflags), while it is quiesced or after it ended.

        Raises:
            StateError: it runs: `pause` it first, or use `inspect`. Or it is paused in the middle of an access, so that
                its registers change when that is answered (`pending`).
        """
        guest = self._made()
        index = self._vcpu(vcpu)
        if guest.has_ended(index):
            return self._final_registers(guest, index)
        if not (self._desired.paused and guest.is_parked(index)):
            raise StateError(f"vm {self.name!r}: vCPU {vcpu} runs: pause() first, or `await vm.inspect({vcpu})`")
        if not guest.is_quiesced(index):
            what = next((str(access) for access in guest.pending() if access.vcpu == vcpu), f"vCPU {vcpu} is busy")
            raise StateError(f"vm {self.name!r}: {what}: its registers change then; `pause()` waits for that")
        return guest.vcpus[index].engine.registers()

    async def inspect(self, vcpu: int = 0) -> Any:
        """A running vCPU's general registers, taken between two entries of the guest; it is not paused for it. In the
        middle of an access that waits for an answer, they are those before the answer."""
        guest = self._made()
        index = self._vcpu(vcpu)
        if guest.has_ended(index):
            await trio.lowlevel.checkpoint()
            return self._final_registers(guest, index)  # by now there may be another run
        return await guest.call(index, guest.vcpus[index].engine.registers)

    def _final_registers(self, guest: Instance, index: int) -> Any:
        registers = guest.vcpus[index].final_registers
        if registers is None or isinstance(registers, Exception):
            raise StateError(f"vm {self.name!r}: vCPU {index} ended before its registers could be read: {registers}")
        return registers

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
            resets=self.resets,
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
            pending=self.pending,
            limit=self.budgets[Meter.BUS_LOCKS].limit,
            exit_limit=self.budgets[Meter.EXITS].limit,
            answer_limit=self.budgets[Meter.ANSWERS].limit,
            bus_lock_detection=(self.spec.bus_lock_detection or self._house.bus_lock_detection) if seen else None,
            vcpus=vcpus,
            throttled_by=by_bucket(c.held for c in counters),
        )

    def _dirty_pages(self) -> int | None:
        dirty = None if self._guest is None else self._guest.dirty
        pages, read = (0, 0) if dirty is None else dirty.sums()
        return (self._dirty_before or 0) + pages if read else self._dirty_before

    async def kernel_statistics(self) -> Mapping[str, float]:
        """What KVM itself counts of it, in whole units (seconds, bytes), by the kernel's names: of the VM
        ("pages_4k"), and of each vCPU ("vcpu0.exits"). Which there are differs from kernel to kernel.

        The first call of a run opens a descriptor for the VM and each vCPU. A vCPU's thread does it between two entries
        of the guest, so this waits for a device that answers on it.

        Raises:
            StateError: it has ended, or does not run on KVM.
            KvmError: this KVM has none.
        """
        return await self._made().kernel_statistics()

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
        self._desired.sample_every = every
        if self._guest is not None:
            self._guest.sample(every)

    def profile(self, symbols: Iterable[Symbols] = ()) -> Profile:
        """Which of its instructions locked the bus since it was launched, restarts included; see `Profile`.

        Disassembled if iced-x86 is installed (``pip install 'orchestra-kvm[profile]'``). Takes a tenth of a millisecond
        or so for each instruction.

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
            every=self._desired.sample_every if self._house.bus_locks else 0,
        )

    def _vcpu_state(self, index: int) -> State:
        guest = self._guest
        if guest is not None and self._outcome is None and guest.has_ended(index):
            return State.STOPPED
        if guest is not None and self._outcome is None and self._desired.paused and guest.is_parked(index):
            return State.PAUSED
        return self.state

    def _vcpu(self, vcpu: int) -> int:
        if isinstance(vcpu, bool) or not isinstance(vcpu, int) or not 0 <= vcpu < self.spec.vcpus:
            raise SpecError(f"vcpu={vcpu!r}: vm {self.name!r} has vCPUs 0 to {self.spec.vcpus - 1}")
        return vcpu

    def _made(self) -> Instance:
        if self._guest is None:
            raise StateError(f"vm {self.name!r} is still being set up")
        return self._guest

    def _alive(self, verb: str) -> Instance:
        if self._outcome is not None or self._guest is None:
            raise StateError(f"can't {verb} vm {self.name!r}: it is {self.state}")
        return self._guest

    # ---- for the fleet

    @property
    def guest(self) -> Instance | None:
        return self._guest

    async def supervise(
        self, devices: Iterable[tuple[range | None, range | None, Device]], paused: bool, *, task_status: Any
    ) -> None:
        """The VM's task: run it, and again as its spec says or somebody asks, and leave nothing behind."""
        self._devices = list(devices)
        self._desired.paused = paused
        started, following = False, None
        outcome: Outcome = Stopped("the fleet was closed")
        try:
            while True:
                begun = trio.current_time()
                try:
                    guest = await self._start_guest(following)
                    outcome = Stopped("the fleet was closed")  # how the run before ended is over
                    if not started:
                        started = True
                        task_status.started()
                    outcome = await guest.run(self._old_is_unmapped)
                except Exception as error:  # whatever it is, it is the end of this VM and of no other
                    what = "launch" if following is None else following.kind
                    outcome = Failed(f"{what}: {type(error).__name__}: {error}")
                    if not started:
                        raise
                try:
                    following = await self._follow(outcome, trio.current_time() - begun)
                except Exception as error:
                    outcome, following = Failed(f"supervision: {type(error).__name__}: {error}"), None
                if following is None:
                    return
        finally:
            if isinstance(outcome, Stopped) or self._succession.is_reset(outcome):  # another run was to come
                outcome = self._stop_reason or Stopped("the fleet was closed")
            self._outcome = outcome
            with contained(f"vm {self.name}: the journal"):
                self._house.changed(self, self.state, _told(outcome))
            for end in (self.console.close, *(requests.end for requests in self._requests)):
                with contained(f"vm {self.name}: its readers"):
                    end()
            self._renewed.set()
            self._ended.set()

    async def _follow(self, outcome: Outcome, ran: float) -> Next | None:
        """Wait until the next run may start; None: none does."""
        asked, self._reset_reason = self._reset_reason, None
        following = None
        if self._stop_reason is None:
            following = self._succession.after(outcome, ran, self._house.backend.now(), asked)
        if following is None:
            return None
        try:
            return await self._turn(following, outcome, ran)
        finally:
            self._waits = ""

    async def _turn(self, following: Next, outcome: Outcome, ran: float) -> Next | None:
        due = self._wait_for(following, outcome)
        while True:
            with trio.move_on_at(due):
                await self._nudged.wait()
            if self._stop_reason is not None:
                return None
            asked, self._reset_reason = self._reset_reason, None
            if asked is not None and following.kind == "restart":
                again = self._succession.after(outcome, ran, self._house.backend.now(), asked)
                assert again is not None
                following, due = again, self._wait_for(again, outcome)
            elif trio.current_time() >= due:
                return following

    def _wait_for(self, following: Next, outcome: Outcome) -> float:
        """Say so, where there is something to wait for; until when."""
        if following.delay > 0:
            seconds = max(0.01, round(following.delay, 2))
            what, why = ("reset", following.why) if following.kind == "reset" else ("restarted", _told(outcome))
            self._waits = f"waits {seconds:g} s to be {what}: {why}"
            with contained(f"vm {self.name}: the journal"):
                self._house.changed(self, self.state, self._waits)
        return trio.current_time() + following.delay

    async def _start_guest(self, following: Next | None) -> Instance:
        levels = [(*self._above, self.budgets, vcpu) for vcpu in self.vcpu_budgets]
        if following is not None:
            for device in {id(device): device for _, _, device in self._devices}.values():
                if callable(reset := getattr(device, "reset", None)):
                    reset()
        async with self._logging:  # by now, or in the guest that there will be
            guest = Instance(self._house, self._desired.spec(self.spec), levels, self.console, self._desired)
            guest.samples = self._samples
            guest.reached = self._on_held
            guest.cap_failed = self._on_cap_failed
            await guest.start(self._claims)
            if self._guest is not None:
                with contained(f"vm {self.name}: the run before"):
                    self._retire(self._guest)
            self._guest = guest
        self._reset_reason = None  # whoever asked until now has this run
        why = "" if following is None else self._succession.begin(following)
        if self._stop_reason is not None:
            guest.end(self._stop_reason)
        with contained(f"vm {self.name}: the journal"):
            self._house.changed(self, self.state, why)
        if following is not None:
            self._renewed.set()
            self._renewed = trio.Event()
        return guest

    async def _old_is_unmapped(self) -> None:
        """Before another run begins, or a guest that is reset all the time would have ever more memory."""
        await trio.lowlevel.checkpoint()
        if self._unmapped is not None:
            await self._unmapped.wait()

    def _on_held(self, level: Level) -> None:
        if self._desired.paused and self._outcome is None:
            pending = "; ".join(map(str, self.pending)) if level is Level.PAUSED else ""
            self._house.changed(self, State.PAUSED, pending)

    def _claims(self) -> list[tuple[range | None, range | None, Handler]]:
        claimed = [(ports, mmio, requests) for requests, (ports, mmio) in self._requests.items()]
        return [*self._devices, *claimed]

    def _retire(self, guest: Instance) -> None:
        """Another run has taken its place: keep its figures, and give its memory back."""
        self._dirty_before = self._dirty_pages()
        final, previous = guest.counters(), self._retired
        self._retired = final if previous is None else [add(a, b) for a, b in zip(previous, final, strict=True)]
        self._unmapped = self._house.workers.discard(guest.memory)

    def close(self) -> None:
        """It left the fleet: give its memory back, and free its buckets."""
        self._released = True
        if self._guest is not None:
            self._unmapped = self._house.workers.discard(self._guest.memory)
        self._succession.close()
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
