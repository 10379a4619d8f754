"""What a policy is told at each tick."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import attrs

from ..model.actions import Action
from ..model.spec import Limit, Meter, Tenant

__all__ = ["Facts", "HostFacts", "Policy", "TenantFacts", "VcpuFacts", "VmFacts", "add_known", "count_of"]

N = TypeVar("N", int, float)


@attrs.frozen
class VcpuFacts:
    """One vCPU that did something since the last tick; as in `VmFacts`, of which these are the parts."""

    index: int
    bus_locks: int | None
    exits: int
    throttled: float
    cpu: float | None = None
    run_delay: float | None = None
    capped: float | None = None
    answers: int = 0


@attrs.frozen
class VmFacts:
    """One VM that did something since the last tick.

    Attributes:
        name, tenant, weight, vcpus: as in its spec.
        bus_locks, exits: how many since the last tick. `bus_locks` is None where the host reports none.
        answers: accesses that Python answered, a device or a task.
        throttled: seconds that its vCPUs waited for their turn since the last tick, summed over the vCPUs.
        launch: a number of its own for each launch: another VM of the same name has another.
        cpu: seconds of CPU time that its vCPU threads used since the last tick, summed over them.
        run_delay: seconds that they could have run and had no CPU: what the guest sees as stolen. Source:
            ``/proc/PID/task/TID/schedstat``.
        capped: seconds that a CPU cap held it.
        work: how much the guest got done since the last tick, by its own account (`Vm.report_work`); the unit is the
            guest's, so compare it with nothing but itself.
        dirty_pages: pages of 4 KiB that it wrote, by the readings of its dirty log since the last tick. There is about
            one a second, and a page counts once in each. None: none fell in this tick, or its memory is not logged
            (`VmSpec.log_dirty`).
        dirty_rate: pages a second: by these readings, or if there was none by the last one before, unless the VM rested
            since.
        by_reason: its exits by the kernel's name of the reason ("io", "mmio", "x86_bus_lock", ...).
        by_vcpu: the vCPUs that did something, by index.
        throttled_by: the seconds of `throttled` by the limit whose turn was the last: "vm.exits" is the VM's own on
            exits; the levels are "host", "tenant", "vm" and "vcpu". Of what was really so: what a dry run would have
            held is not in it, and a replay has none.

    `cpu`, `run_delay`, `capped`, `work` and the pages are None where this host, or this guest, does not tell: never 0
    for "unknown".
    """

    name: str
    tenant: str
    weight: float
    vcpus: int
    bus_locks: int | None
    exits: int
    throttled: float
    launch: int = 0
    cpu: float | None = None
    run_delay: float | None = None
    capped: float | None = None
    work: float | None = None
    dirty_pages: int | None = None
    dirty_rate: float | None = None
    by_reason: Mapping[str, int] = attrs.field(factory=dict, hash=False)
    by_vcpu: tuple[VcpuFacts, ...] = ()
    answers: int = 0
    throttled_by: Mapping[str, float] = attrs.field(factory=dict, hash=False)


@attrs.frozen
class TenantFacts:
    """What a tenant's VMs did together since the last tick; as in `VmFacts`. `vms`: how many of them did something."""

    name: str
    vms: int
    bus_locks: int | None
    exits: int
    throttled: float
    cpu: float | None
    run_delay: float | None
    capped: float | None
    answers: int = 0


@attrs.frozen
class HostFacts:
    """The host as one tick sees it. What it can't tell is None, and named in `absent` with the reason.

    Attributes:
        cpus: that this process may run on.
        cpu_pressure, memory_pressure, io_pressure: part of the time since the last tick (0 to 1) in which some task
            waited for it. Source: PSI, Documentation/accounting/psi.rst ("some").
        lock_ns, memory_ns: median times that the host probe took since the last tick for a locked operation in a cache
            line of its own, and for a read that misses the caches.
        llc_bytes, memory_bandwidth: of the vCPU threads: bytes of the last-level caches that hold their data, and bytes
            a second from and to memory. Source: resctrl.
        absent: why a signal is missing here, by its name.
    """

    cpus: int = 1
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    io_pressure: float | None = None
    lock_ns: float | None = None
    memory_ns: float | None = None
    absent: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    llc_bytes: float | None = None
    memory_bandwidth: float | None = None


@attrs.frozen
class Facts:
    """The fleet as one tick sees it.

    Attributes:
        time: nanoseconds on the fleet's clock.
        interval: seconds since the last tick (as it was, not as it was planned); more than 0.
        limit, exit_limit, answer_limit: the host's.
        tenants: all of them, by name.
        vms: by name, those that did something since the last tick. A VM that is not here was idle or is gone.
        host: signals of the host as a whole.
        gone: name and launch of each VM that has ended for good since the last tick: what a policy remembers of it can
            go. It is not in `vms`; another of that name may be.
        others: more of `vms`, which this policy may hear of but not hold: those that `only` keeps from it.
    """

    time: int
    interval: float
    limit: Limit | None
    exit_limit: Limit | None
    tenants: Mapping[str, Tenant]
    vms: Mapping[str, VmFacts]
    host: HostFacts = HostFacts()
    gone: tuple[tuple[str, int], ...] = ()
    others: Mapping[str, VmFacts] = attrs.field(factory=dict)
    answer_limit: Limit | None = None

    @property
    def heard(self) -> Mapping[str, VmFacts]:
        """`vms` and `others`: all that may be victims."""
        return {**self.others, **self.vms} if self.others else self.vms

    @functools.cached_property
    def by_tenant(self) -> Mapping[str, TenantFacts]:
        """The tenants of `vms`, added up."""
        of: dict[str, list[VmFacts]] = {}
        for vm in self.vms.values():
            of.setdefault(vm.tenant, []).append(vm)
        return {name: _tenant(name, vms) for name, vms in of.items()}


def _tenant(name: str, vms: Sequence[VmFacts]) -> TenantFacts:
    return TenantFacts(
        name=name,
        vms=len(vms),
        bus_locks=add_known(vm.bus_locks for vm in vms),
        exits=sum(vm.exits for vm in vms),
        throttled=sum(vm.throttled for vm in vms),
        cpu=add_known(vm.cpu for vm in vms),
        run_delay=add_known(vm.run_delay for vm in vms),
        capped=add_known(vm.capped for vm in vms),
        answers=sum(vm.answers for vm in vms),
    )


def count_of(vm: VmFacts, meter: Meter) -> int | None:
    """A meter's events; None where the host does not tell."""
    count: int | None = getattr(vm, meter.value)
    return count


def add_known(values: Iterable[N | None]) -> N | None:
    """The sum of what is known; None: nothing is."""
    total: N | None = None
    for value in values:
        if value is not None:
            total = value if total is None else total + value
    return total


@runtime_checkable
class Policy(Protocol):
    """Something that decides. `interval`: seconds between two ticks; None: only once, when the fleet opens.

    `name` is its own in a fleet. One that limits bus locks may say so by an attribute `meter`: then a host that can't
    see them refuses it when the fleet opens.

    `decide` raises nothing; if it does, the fleet journals it and switches the policy off, and the limits that it set
    last stay in force.
    """

    @property
    def name(self) -> str: ...

    @property
    def interval(self) -> float | None: ...

    def decide(self, facts: Facts) -> Iterable[Action]: ...
