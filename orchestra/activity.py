"""What the VMs did, looked at so that it costs what was active and not what exists.

The core says which vCPUs made exits. One that only computes makes none: its thread's CPU clock tells. Those that used
CPU at the last look are looked at again; of the others a few, in turn, so that each is found in the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import attrs

from .guest import Guest
from .native.core import FleetCore
from .policy import Facts, VmFacts
from .signals import HostReading, HostSignals, ThreadTimes
from .spec import Limit, Tenant
from .vm import Vm

__all__ = ["Activity", "Window"]

IN_TURN: Final = 64
"""How many of the vCPUs that seem idle are looked at in a tick."""

NO_THREADS: Final = "the scripted backend has no threads"


class Fleet(Protocol):
    """What this needs of its fleet."""

    core: FleetCore
    bus_locks: bool

    @property
    def tenants(self) -> Mapping[str, Tenant]: ...
    @property
    def limit(self) -> Limit | None: ...
    @property
    def exit_limit(self) -> Limit | None: ...
    def now(self) -> int: ...


@attrs.define(eq=False)
class _Vcpu:
    """A vCPU and what it had done when it was looked at last. Times in nanoseconds."""

    vm: Vm
    guest: Guest
    index: int
    tid: int | None
    exits: int = 0
    bus_locks: int = 0
    throttled: int = 0
    cpu: int = 0
    run_delay: int = 0
    capped: int = 0
    looked: int = 0


@attrs.define(eq=False)
class _Sum:
    """What a VM did since a time. None: nobody told."""

    exits: int = 0
    bus_locks: int = 0
    throttled: int = 0
    cpu: int | None = None
    run_delay: int | None = None
    capped: int | None = None
    work: float | None = None


@attrs.define(eq=False)
class Window:
    """What was done since a time. Those who looked last at the same time share one."""

    since: int
    reading: HostReading
    sums: dict[Vm, _Sum] = attrs.field(factory=dict)
    gone: list[tuple[str, int]] = attrs.field(factory=list)
    users: int = 0

    def of(self, vm: Vm) -> _Sum:
        found = self.sums.get(vm)
        if found is None:
            found = self.sums[vm] = _Sum()
        return found


class Activity:
    """Of one fleet. `look`, and then ask for facts."""

    def __init__(self, fleet: Fleet, host: HostSignals, threads: ThreadTimes | None) -> None:
        """`threads`: None if the fleet's vCPUs have none."""
        self.host = host
        self._fleet = fleet
        self._threads = threads
        self._absent: Mapping[str, str] = (
            dict.fromkeys(("cpu", "run_delay"), NO_THREADS) if threads is None else threads.absent
        )
        self._vcpus: dict[int, _Vcpu] = {}
        self._turn: deque[int] = deque()
        self._again: set[int] = set()
        self._windows: dict[int, Window] = {}
        self._looked = fleet.now()
        self._reading = host.read()
        self._tenants: Mapping[str, Tenant] | None = None
        self._facts: dict[tuple[int, bool], Facts] = {}

    # ---- who there is

    def add(self, id: int, vm: Vm, guest: Guest, index: int) -> None:
        vcpu = self._vcpus[id] = _Vcpu(vm, guest, index, guest.vcpus[index].tid)
        if self._threads is not None and vcpu.tid is not None:
            # What its thread has used so far was for its own start.
            vcpu.cpu = self._threads.cpu(vcpu.tid) or 0
            self._turn.append(id)
            self.host.add_thread(vcpu.tid)

    def forget(self, id: int) -> None:
        """A vCPU is gone: what it did last still counts, as its VM may be restarted."""
        vcpu = self._vcpus.pop(id, None)
        if vcpu is not None:
            self._look(vcpu, self._fleet.now())
        self._again.discard(id)

    def ended(self, vm: Vm) -> None:
        """A VM has ended for good."""
        for window in self._windows.values():
            window.gone.append((vm.name, vm.launch))

    def work(self, vm: Vm, units: float) -> None:
        """A guest got something done, by its own account."""
        for window in self._windows.values():
            total = window.of(vm)
            total.work = (total.work or 0.0) + units

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
        sums = vcpu.guest.sums(vcpu.index, now)
        # Clamped: runner and governor read the clock each for itself, so a wait may end "before" it was looked at.
        exits, bus_locks, throttled = max(0, sums[0] - vcpu.exits), max(0, sums[1] - vcpu.bus_locks), sums[2]
        throttled = max(0, throttled - vcpu.throttled)
        vcpu.exits, vcpu.bus_locks, vcpu.throttled = sums
        used, waited = self._times(vcpu, now)
        capped = self._capped(vcpu, now)
        vcpu.looked = now
        if not (exits or bus_locks or throttled or used or capped):
            return False
        for window in self._windows.values():
            total = window.of(vcpu.vm)
            total.exits += exits
            total.bus_locks += bus_locks
            total.throttled += throttled
            if used is not None:
                total.cpu = (total.cpu or 0) + used
            if waited is not None:
                total.run_delay = (total.run_delay or 0) + waited
            if capped is not None:
                total.capped = (total.capped or 0) + capped
        return bool(throttled or used or capped)

    def _times(self, vcpu: _Vcpu, now: int) -> tuple[int | None, int | None]:
        """CPU time and run-queue delay since the last look."""
        if vcpu.tid is None or self._threads is None:
            return None, None
        ran = self._threads.cpu(vcpu.tid)
        if ran is None:
            return None, None
        used, vcpu.cpu = ran - vcpu.cpu, ran
        if not used:
            return 0, None if self._absent else 0
        waited = None
        delay = self._threads.run_delay(vcpu.tid)
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
        window = self._windows.get(self._looked)
        if window is None:
            window = self._windows[self._looked] = Window(self._looked, self._reading)
        window.users += 1
        return window

    def close(self, window: Window) -> None:
        window.users -= 1
        if not window.users:
            del self._windows[window.since]

    def facts(self, window: Window, *, ended: bool = False) -> Facts:
        """What a window saw up to the last look. `ended`: of VMs that have ended as well."""
        key = window.since, ended
        if key not in self._facts:
            self._facts[key] = self._make_facts(window, ended)
        return self._facts[key]

    def _make_facts(self, window: Window, ended: bool) -> Facts:
        fleet = self._fleet
        if self._tenants is None:
            self._tenants = fleet.tenants
        vms: dict[str, VmFacts] = {}
        for vm, total in window.sums.items():
            if ended or vm.outcome is None:
                # With those that have ended there may be several of a name.
                vms[vm.name if vm.name not in vms else f"{vm.name} {vm.launch}"] = self._vm_facts(vm, total)
        return Facts(
            time=self._looked,
            interval=max((self._looked - window.since) / 1e9, 1e-9),
            limit=fleet.limit,
            exit_limit=fleet.exit_limit,
            tenants=self._tenants,
            vms=MappingProxyType(vms),
            host=self.host.facts(window.reading, self._reading, self._absent),
            gone=tuple(window.gone),
        )

    def _vm_facts(self, vm: Vm, total: _Sum) -> VmFacts:
        return VmFacts(
            name=vm.name,
            tenant=vm.tenant,
            weight=vm.spec.weight,
            vcpus=vm.spec.vcpus,
            bus_locks=total.bus_locks if self._fleet.bus_locks else None,
            exits=total.exits,
            throttled=total.throttled / 1e9,
            launch=vm.launch,
            cpu=_seconds(total.cpu),
            run_delay=_seconds(total.run_delay),
            capped=_seconds(total.capped),
            work=total.work,
        )


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9
