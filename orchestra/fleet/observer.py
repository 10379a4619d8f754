"""What the VMs did, looked at so that it costs what was active and not what exists.

The core says which vCPUs made exits. One that only computes makes none: its thread's CPU clock tells. Those that used
CPU at the last look are looked at again; of the others a few, in turn, so that each is found in the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

import attrs

from ..backend import Backend
from ..host.observe import HostReading, HostSignals, ThreadTimes
from ..machine.instance import Instance
from ..machine.statistics import by_bucket
from ..machine.vm import Vm
from ..model.spec import Limit, Tenant
from ..native.core import BUCKETS, FleetCore, reason_name
from ..policy import Facts, VcpuFacts, VmFacts
from ..policy.facts import add_known
from .dirty import DirtyLogs, Told

__all__ = ["Observer", "Window"]

IN_TURN: Final = 64
"""How many of the vCPUs that seem idle are looked at in a tick."""

NO_THREADS: Final = "the scripted backend has no threads"
NO_LOG: Final = "only KVM can tell which pages a guest writes"


class Fleet(Protocol):
    """What this needs of its fleet."""

    core: FleetCore
    backend: Backend
    bus_locks: bool

    @property
    def tenants(self) -> Mapping[str, Tenant]: ...
    @property
    def limit(self) -> Limit | None: ...
    @property
    def exit_limit(self) -> Limit | None: ...
    @property
    def answer_limit(self) -> Limit | None: ...
    def now(self) -> int: ...


@attrs.define(eq=False)
class _Vcpu:
    """A vCPU and what it had done when it was looked at last. Times in nanoseconds."""

    vm: Vm
    guest: Instance
    index: int
    bus_locks: int = 0
    answers: int = 0
    held: list[int] = attrs.field(factory=lambda: [0] * len(BUCKETS))
    cpu: int = 0
    run_delay: int = 0
    capped: int = 0
    looked: int = 0


@attrs.define(eq=False)
class _Sum:
    """What a vCPU did since a time; exits by the kernel's number of the reason, waits for its turn by `BUCKETS`. None:
    nobody told."""

    exits: dict[int, int] = attrs.field(factory=dict)
    bus_locks: int = 0
    answers: int = 0
    held: list[int] = attrs.field(factory=lambda: [0] * len(BUCKETS))
    cpu: int | None = None
    run_delay: int | None = None
    capped: int | None = None


@attrs.define(eq=False)
class _Dirty:
    """What readings of a VM's dirty log said: pages written, and in how many nanoseconds."""

    pages: int = 0
    time: int = 0


@attrs.define(eq=False)
class Window:
    """What was done since a time. Those who looked last at the same time share one."""

    since: int
    reading: HostReading
    vms: dict[Vm, dict[int, _Sum]] = attrs.field(factory=dict)
    work: dict[Vm, float] = attrs.field(factory=dict)
    dirty: dict[Vm, _Dirty] = attrs.field(factory=dict)
    gone: list[tuple[str, int]] = attrs.field(factory=list)
    users: int = 0

    def of(self, vm: Vm, index: int) -> _Sum:
        """A vCPU's."""
        return self.vms.setdefault(vm, {}).setdefault(index, _Sum())


class Observer:
    """Of one fleet. `look`, and then ask for facts.

    Attributes:
        logs: its VMs' dirty logs. Whoever looks has those read that are due, and tells what they said (`dirty`).
    """

    def __init__(self, fleet: Fleet, host: HostSignals, threads: ThreadTimes | None) -> None:
        """`threads`: None if the fleet's vCPUs have none."""
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

    # ---- who there is

    def add(self, id: int, vm: Vm, guest: Instance, index: int) -> None:
        vcpu = self._vcpus[id] = _Vcpu(vm, guest, index)
        if self._threads is None:
            return
        with guest.vcpus[index].living() as tid:
            if tid is not None:
                # What its thread has used so far was for its own start.
                vcpu.cpu = self._threads.cpu(tid) or 0
                self._turn.append(id)
                self.host.add_thread(tid)

    def forget(self, id: int) -> None:
        """A vCPU is gone: what it did last still counts, as its VM may be restarted."""
        self._facts.clear()
        vcpu = self._vcpus.pop(id, None)
        if vcpu is not None:
            self._look(vcpu, self._fleet.now())
            self.dirty(self.logs.forget(vcpu.vm, vcpu.guest.dirty))
        self._again.discard(id)

    def ended(self, vm: Vm) -> None:
        """A VM has ended for good."""
        self._facts.clear()
        for window in self._windows:
            window.gone.append((vm.name, vm.launch))

    def work(self, vm: Vm, units: float) -> None:
        """A guest got something done, by its own account."""
        self._facts.clear()
        for window in self._windows:
            window.vms.setdefault(vm, {})
            window.work[vm] = window.work.get(vm, 0.0) + units

    def dirty(self, told: Iterable[Told]) -> None:
        """Dirty logs were read."""
        self._facts.clear()
        for vm, pages, time in told:
            for window in self._windows:
                window.vms.setdefault(vm, {})
                dirty = window.dirty.setdefault(vm, _Dirty())
                dirty.pages += pages
                dirty.time += time

    # ---- looking

    def look(self, now: int) -> None:
        """Add what was done since the last time to every window."""
        vcpus = self._vcpus
        # One that waits for its turn accounts nothing meanwhile, but it is not idle: it is looked at until it did not
        # wait any more.
        ids = self._again.union(self._fleet.core.active())
        turn = self._turn
        for _ in range(min(IN_TURN, len(turn))):
            id = turn.popleft()
            if id in vcpus:
                turn.append(id)
                ids.add(id)
        self._again = {id for id in ids if (vcpu := vcpus.get(id)) is not None and self._look(vcpu, now)}
        self._looked = now
        self._reading = self.host.read()
        self._tenants = None
        self._facts.clear()

    def _look(self, vcpu: _Vcpu, now: int) -> bool:
        """Whether it is to be looked at the next time, whatever the core says."""
        exits, locks_so_far, held_so_far, answers_so_far = vcpu.guest.look(vcpu.index, now)
        bus_locks, vcpu.bus_locks = max(0, locks_so_far - vcpu.bus_locks), locks_so_far
        answers, vcpu.answers = max(0, answers_so_far - vcpu.answers), answers_so_far
        held: list[int] | None = None
        if held_so_far != vcpu.held:
            # Clamped: runner and governor read the clock each for itself, so a wait may end "before" it was looked at.
            held = [max(0, far - before) for far, before in zip(held_so_far, vcpu.held, strict=True)]
            vcpu.held, held = held_so_far, held if any(held) else None
        used, waited = self._times(vcpu, now)
        capped = self._capped(vcpu, now)
        if exits or used:
            self.logs.stir(vcpu.vm, vcpu.looked, now)
        vcpu.looked = now
        if not (exits or bus_locks or held or used or capped):
            return False
        for window in self._windows:
            total = window.of(vcpu.vm, vcpu.index)
            for reason, count in exits.items():
                total.exits[reason] = total.exits.get(reason, 0) + count
            total.bus_locks += bus_locks
            if held is not None:
                total.held = [sum(both) for both in zip(total.held, held, strict=True)]
            total.answers += answers
            if used is not None:
                total.cpu = (total.cpu or 0) + used
            if waited is not None:
                total.run_delay = (total.run_delay or 0) + waited
            if capped is not None:
                total.capped = (total.capped or 0) + capped
        # Whoever made an exit may just have begun to wait for its turn, and will account nothing until that has come.
        return bool(exits or held or used or capped)

    def _times(self, vcpu: _Vcpu, now: int) -> tuple[int | None, int | None]:
        """CPU time and run-queue delay since the last look."""
        if self._threads is None:
            return None, None
        with vcpu.guest.vcpus[vcpu.index].living() as tid:  # or the figures could be another thread's
            return (None, None) if tid is None else self._times_of(self._threads, tid, vcpu, now)

    def _times_of(self, threads: ThreadTimes, tid: int, vcpu: _Vcpu, now: int) -> tuple[int | None, int | None]:
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
            # It was not looked at for some ticks and may have done it in any of them: what does not fit into this one
            # was not in this one.
            most = max(0, now - self._looked)
            used = min(used, most)
            waited = None if waited is None else min(waited, most)
        return used, waited

    def _capped(self, vcpu: _Vcpu, now: int) -> int | None:
        if not vcpu.vm.was_capped:
            return None
        held = vcpu.guest.capped(vcpu.index, now)
        capped, vcpu.capped = max(0, held - vcpu.capped), held
        return capped

    # ---- windows

    def open(self) -> Window:
        """What is done from the last look on. `close` it."""
        window = self._fresh
        # Nothing was told since that look, or it would count for this one as well.
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
        """What a window saw up to the last look. `ended`: of VMs that have ended as well."""
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
                # With those that have ended there may be several of a name.
                told = self._vm_facts(vm, sums, window.work.get(vm), window.dirty.get(vm))
                vms[vm.name if vm.name not in vms else f"{vm.name} {vm.launch}"] = told
        return Facts(
            time=self._looked,
            interval=max((self._looked - window.since) / 1e9, 1e-9),
            limit=fleet.limit,
            exit_limit=fleet.exit_limit,
            answer_limit=fleet.answer_limit,
            tenants=self._tenants,
            vms=MappingProxyType(vms),
            host=self.host.facts(window.reading, self._reading, self._absent),
            gone=tuple(window.gone),
        )

    def _vm_facts(self, vm: Vm, sums: Mapping[int, _Sum], work: float | None, dirty: _Dirty | None) -> VmFacts:
        seen = self._fleet.bus_locks
        vcpus = tuple(
            VcpuFacts(
                index=index,
                bus_locks=one.bus_locks if seen else None,
                exits=sum(one.exits.values()),
                throttled=sum(one.held) / 1e9,
                cpu=_seconds(one.cpu),
                run_delay=_seconds(one.run_delay),
                capped=_seconds(one.capped),
                answers=one.answers,
            )
            for index, one in sorted(sums.items())
        )
        reasons: dict[str, int] = {}
        for one in sums.values():
            for number, count in one.exits.items():
                name = reason_name(number)
                reasons[name] = reasons.get(name, 0) + count
        return VmFacts(
            name=vm.name,
            tenant=vm.tenant,
            weight=vm.spec.weight,
            vcpus=vm.spec.vcpus,
            bus_locks=sum(one.bus_locks for one in sums.values()) if seen else None,
            exits=sum(reasons.values()),
            throttled=sum(vcpu.throttled for vcpu in vcpus),
            answers=sum(vcpu.answers for vcpu in vcpus),
            launch=vm.launch,
            cpu=add_known(vcpu.cpu for vcpu in vcpus),
            run_delay=add_known(vcpu.run_delay for vcpu in vcpus),
            capped=add_known(vcpu.capped for vcpu in vcpus),
            work=work,
            by_reason=reasons,
            by_vcpu=vcpus,
            dirty_pages=None if dirty is None else dirty.pages,
            dirty_rate=self.logs.rate(vm) if dirty is None else dirty.pages * 1e9 / dirty.time,
            throttled_by=by_bucket(one.held for one in sums.values()),
        )


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9
