"""Observes what the VMs did. A look costs what was active, and not what exists.

The core says which vCPUs made exits. A vCPU that only computes makes no exits: its thread's CPU clock shows that it
runs. The observer looks again at vCPUs that used CPU at the last look. Of the others it looks at a few in each tick, in
turn, so that it finds each of them in the end.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

import attrs

from ..backend import Backend
from ..host.observe import HostReading, HostSignals, ThreadTimes
from ..machine.control import VmControl
from ..machine.instance import Instance
from ..machine.statistics import by_bucket
from ..model.spec import Limit, Meter, Tenant
from ..native.core import NOT_HELD, FleetCore, reason_name
from ..policy import Facts, VcpuFacts, VmFacts
from .dirty import DirtyLogs, DirtyPages

__all__ = ["Observer", "Window"]

IN_TURN: Final = 64
"""How many of the vCPUs that seem idle are looked at in a tick. This bounds the cost of a tick where many are idle."""

NO_THREADS: Final = "the scripted backend has no threads"
NO_LOG: Final = "only KVM can tell which pages a guest writes"


class Fleet(Protocol):
    """The fleet, as the observer needs it."""

    core: FleetCore
    backend: Backend
    bus_locks: bool

    @property
    def tenants(self) -> Mapping[str, Tenant]: ...
    def host_limit(self, meter: Meter) -> Limit | None:
        """The host's limit in force on that meter."""

    def now(self) -> int: ...


@attrs.define(eq=False)
class _Vcpu:
    """A vCPU, its thread's number, and its counters at the last look. Times in nanoseconds."""

    vm: VmControl
    guest: Instance
    index: int
    tid: int | None = None
    bus_locks: int = 0
    answers: int = 0
    held: list[int] = NOT_HELD
    cpu: int = 0
    run_delay: int = 0
    capped: int = 0
    looked: int = 0


@attrs.define(eq=False)
class _Did:
    """What a vCPU did between two looks, or longer. `exits`: by the kernel's number of the reason. `held`: waits for
    its turn, by `BUCKETS`; None: it did not wait. Other times: None: unknown.

    All windows share what one look found, so it never changes; only a `sum` of several is added to.
    """

    exits: dict[int, int]
    bus_locks: int = 0
    answers: int = 0
    held: list[int] | None = None
    cpu: int | None = None
    run_delay: int | None = None
    capped: int | None = None
    summed: bool = False

    def sum(self, other: _Did) -> _Did:
        """The sum of both: this object itself, if it is a sum already; otherwise a new one."""
        to = self if self.summed else attrs.evolve(self, exits=dict(self.exits), summed=True)
        exits = to.exits
        for reason, count in other.exits.items():
            exits[reason] = exits.get(reason, 0) + count
        to.bus_locks += other.bus_locks
        to.answers += other.answers
        if other.held is not None:
            to.held = other.held if to.held is None else [a + b for a, b in zip(to.held, other.held, strict=True)]
        if other.cpu is not None:
            to.cpu = (to.cpu or 0) + other.cpu
        if other.run_delay is not None:
            to.run_delay = (to.run_delay or 0) + other.run_delay
        if other.capped is not None:
            to.capped = (to.capped or 0) + other.capped
        return to


@attrs.define(eq=False)
class _Dirty:
    """The readings of a VM's dirty log: pages written, and in how many nanoseconds."""

    pages: int = 0
    time: int = 0


@attrs.define(eq=False)
class Window:
    """What was done since a time. Policies and watches that looked last at the same time share a window."""

    since: int
    reading: HostReading
    vms: dict[VmControl, dict[int, _Did]] = attrs.field(factory=dict)
    work: dict[VmControl, float] = attrs.field(factory=dict)
    dirty: dict[VmControl, _Dirty] = attrs.field(factory=dict)
    gone: list[tuple[str, int]] = attrs.field(factory=list)
    users: int = 0

    def add(self, vm: VmControl, index: int, did: _Did) -> None:
        """Add what a vCPU did."""
        of = self.vms.get(vm)
        if of is None:
            self.vms[vm] = {index: did}
        else:
            before = of.get(index)
            of[index] = did if before is None else before.sum(did)


class Observer:
    """Observes one fleet: call `look`, then `facts`. Fleet's thread.

    Attributes:
        logs: the VMs' dirty logs. The policy runner has the due logs read, and passes the results to `dirty`.
    """

    def __init__(self, fleet: Fleet, host: HostSignals, threads: ThreadTimes | None) -> None:
        """`threads`: None: the fleet's vCPUs have no threads."""
        self.host = host
        self.logs = DirtyLogs()
        self._fleet = fleet
        self._threads = threads
        self._absent: Mapping[str, str] = (
            dict.fromkeys(("cpu", "run_delay"), NO_THREADS) if threads is None else threads.absent
        )
        if not fleet.backend.logs_dirty:
            self._absent = {**self._absent, "dirty_pages": NO_LOG, "dirty_rate": NO_LOG}
        self._vcpus: dict[int, _Vcpu] = {}
        self._turn: deque[int] = deque()
        self._again: set[int] = set()
        self._windows: set[Window] = set()
        self._fresh: Window | None = None
        self._looked = fleet.now()
        self._reading = host.read()
        self._tenants: Mapping[str, Tenant] | None = None
        self._facts: dict[tuple[Window, bool], Facts] = {}

    # ---- which vCPUs there are

    def add(self, id: int, vm: VmControl, guest: Instance, index: int) -> None:
        vcpu = self._vcpus[id] = _Vcpu(vm, guest, index)
        if self._threads is None:
            return
        with guest.vcpus[index].living() as tid:
            if tid is not None:
                # The CPU time so far was the start of the thread, and not the guest's.
                vcpu.tid, vcpu.cpu = tid, self._threads.cpu(tid) or 0
                self._turn.append(id)
                self.host.add_thread(tid)

    def forget(self, id: int) -> None:
        """A vCPU has ended. What it did last still counts: the VM may be restarted."""
        self._facts.clear()
        vcpu = self._vcpus.pop(id, None)
        if vcpu is not None:
            self._look(vcpu, self._fleet.now())
            if self._threads is not None and vcpu.tid is not None:
                self._threads.forget(vcpu.tid)
            self.dirty(self.logs.forget(vcpu.vm, vcpu.guest.dirty))
        self._again.discard(id)

    def end(self) -> None:
        """All vCPUs are gone for good."""
        if self._threads is not None:
            self._threads.close()

    def ended(self, vm: VmControl) -> None:
        """A VM has ended for good."""
        self._facts.clear()
        for window in self._windows:
            window.gone.append((vm.name, vm.generation))

    def work(self, vm: VmControl, units: float) -> None:
        """Add the work that a guest says it has done."""
        self._facts.clear()
        for window in self._windows:
            window.vms.setdefault(vm, {})
            window.work[vm] = window.work.get(vm, 0.0) + units

    def dirty(self, told: Iterable[DirtyPages]) -> None:
        """Add the results of dirty logs that were read."""
        self._facts.clear()
        for vm, pages, time in told:
            for window in self._windows:
                window.vms.setdefault(vm, {})
                dirty = window.dirty.setdefault(vm, _Dirty())
                dirty.pages += pages
                dirty.time += time

    # ---- looking

    def look(self, now: int) -> None:
        """Add what was done since the last look to every window. `now`: nanoseconds on the fleet's clock."""
        vcpus = self._vcpus
        # A vCPU that waits for its turn accounts no exit meanwhile, but it is not idle. So the observer looks at it
        # again until it has stopped waiting.
        ids = self._again.union(self._fleet.core.active())
        again = {id for id in ids if (vcpu := vcpus.get(id)) is not None and self._look(vcpu, now)}
        turn = self._turn
        for _ in range(min(IN_TURN, len(turn))):
            id = turn.popleft()
            if (vcpu := vcpus.get(id)) is not None:
                turn.append(id)
                if id not in ids and self._look(vcpu, now, idle=True):
                    again.add(id)
        self._again = again
        self._looked = now
        self._reading = self.host.read()
        self._tenants = None
        self._facts.clear()

    def _look(self, vcpu: _Vcpu, now: int, *, idle: bool = False) -> bool:
        """Look at one vCPU. Returns whether the next look must include it, whatever the core says.

        Parameters:
            idle: the core knows of no exit of this vCPU, and it did not wait at the last look. If its thread did not
                run either, it did nothing.
        """
        used = waited = None
        if self._threads is not None:
            with vcpu.guest.vcpus[vcpu.index].living() as tid:  # otherwise the figures could be another thread's
                if tid is not None:
                    used, waited = self._times(self._threads, tid, vcpu, now)
        if idle and not used:
            vcpu.looked = now
            return False
        exits, locks_so_far, held_so_far, answers_so_far = vcpu.guest.cores.look(vcpu.index, now)
        bus_locks, vcpu.bus_locks = max(0, locks_so_far - vcpu.bus_locks), locks_so_far
        answers, vcpu.answers = max(0, answers_so_far - vcpu.answers), answers_so_far
        held: list[int] | None = None
        if held_so_far != vcpu.held:
            # Clamped: vCPU and observer read the clock separately, so a wait may end "before" the look that saw it.
            held = [max(0, far - before) for far, before in zip(held_so_far, vcpu.held, strict=True)]
            vcpu.held, held = held_so_far, held if any(held) else None
        capped = self._capped(vcpu, now) if vcpu.vm.was_capped else None
        if exits or used:
            self.logs.stir(vcpu.vm, vcpu.looked, now)
        vcpu.looked = now
        if not (exits or bus_locks or held or used or capped):
            return False
        did = _Did(exits, bus_locks, answers, held, used, waited, capped)
        for window in self._windows:
            window.add(vcpu.vm, vcpu.index, did)
        # A vCPU that made an exit may have just begun to wait for its turn, and accounts no exit until the turn comes.
        return bool(exits or held or used or capped)

    def _times(self, threads: ThreadTimes, tid: int, vcpu: _Vcpu, now: int) -> tuple[int | None, int | None]:
        """CPU time and run-queue delay since the last look."""
        ran = threads.cpu(tid)
        if ran is None:
            return None, None
        used, vcpu.cpu = ran - vcpu.cpu, ran
        if not used:
            return 0, None if "run_delay" in self._absent else 0
        waited = None
        delay = threads.run_delay(tid)
        if delay is not None:
            waited, vcpu.run_delay = max(0, delay - vcpu.run_delay), delay
        if vcpu.looked < self._looked:
            # The vCPU was not looked at for some ticks, and may have run in any of them. What does not fit into this
            # tick was not done in this tick.
            most = max(0, now - self._looked)
            used = min(used, most)
            waited = None if waited is None else min(waited, most)
        return used, waited

    def _capped(self, vcpu: _Vcpu, now: int) -> int:
        held = vcpu.guest.restraint.capped(vcpu.index, now)
        capped, vcpu.capped = max(0, held - vcpu.capped), held
        return capped

    # ---- windows

    def open(self) -> Window:
        """A window on what is done from the last look on. `close` it at the end."""
        window = self._fresh
        # A window is shared only while it is empty: what it has already would count for the new user as well.
        if window is None or window.since != self._looked or window.vms or window.gone:
            window = self._fresh = Window(self._looked, self._reading)
            self._windows.add(window)
        window.users += 1
        return window

    def close(self, window: Window) -> None:
        window.users -= 1
        if not window.users:
            self._windows.discard(window)
            self._fresh = None if window is self._fresh else self._fresh

    def facts(self, window: Window, *, ended: bool = False) -> Facts:
        """What a window saw up to the last look. `ended`: include VMs that have ended."""
        key = window, ended
        if key not in self._facts:
            self._facts[key] = self._make_facts(window, ended)
        return self._facts[key]

    def _make_facts(self, window: Window, ended: bool) -> Facts:
        fleet = self._fleet
        if self._tenants is None:
            self._tenants = fleet.tenants
        vms: dict[str, VmFacts] = {}
        for vm, sums in window.vms.items():
            if ended or vm.outcome is None:
                # With VMs that have ended there may be several VMs of one name.
                told = self._vm_facts(vm, sums, window.work.get(vm), window.dirty.get(vm))
                vms[vm.name if vm.name not in vms else f"{vm.name} {vm.generation}"] = told
        return Facts(
            time=self._looked,
            interval=max((self._looked - window.since) / 1e9, 1e-9),
            limit=fleet.host_limit(Meter.BUS_LOCKS),
            exit_limit=fleet.host_limit(Meter.EXITS),
            answer_limit=fleet.host_limit(Meter.ANSWERS),
            tenants=self._tenants,
            vms=MappingProxyType(vms),
            host=self.host.facts(window.reading, self._reading, self._absent),
            gone=tuple(window.gone),
        )

    def _vm_facts(self, vm: VmControl, did: Mapping[int, _Did], work: float | None, dirty: _Dirty | None) -> VmFacts:
        """The facts of one VM. It runs for each active VM in each tick, so it does no more than it must."""
        seen = self._fleet.bus_locks
        vcpus: tuple[VcpuFacts, ...]
        if len(did) == 1:
            ((index, both),) = did.items()
            sums = _vcpu_facts(index, both, seen)
            vcpus = (sums,)
        else:
            both = functools.reduce(_Did.sum, did.values(), _Did({}))
            sums = _vcpu_facts(0, both, seen)
            vcpus = tuple([_vcpu_facts(index, one, seen) for index, one in sorted(did.items())])
        spec = vm.spec
        return VmFacts(
            vm.name,
            vm.tenant,
            spec.weight,
            spec.vcpus,
            sums.bus_locks,
            sums.exits,
            sums.throttled,
            vm.generation,
            sums.cpu,
            sums.run_delay,
            sums.capped,
            work,
            None if dirty is None else dirty.pages,
            self.logs.rate(vm) if dirty is None else dirty.pages * 1e9 / dirty.time,
            {reason_name(number): count for number, count in both.exits.items()},
            vcpus,
            sums.answers,
            by_bucket([both.held]) if both.held else {},
        )


def _vcpu_facts(index: int, did: _Did, seen: bool) -> VcpuFacts:
    """The facts of one vCPU. `seen`: the fleet sees bus locks."""
    cpu, run_delay, capped = did.cpu, did.run_delay, did.capped
    return VcpuFacts(
        index,
        did.bus_locks if seen else None,
        sum(did.exits.values()),
        sum(did.held) / 1e9 if did.held else 0.0,
        None if cpu is None else cpu / 1e9,
        None if run_delay is None else run_delay / 1e9,
        None if capped is None else capped / 1e9,
        did.answers,
    )
