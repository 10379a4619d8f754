"""The facts that a policy gets at each tick, and the protocol of a policy."""

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
    """The part of one vCPU in its VM's `VmFacts`. The fields mean the same as there.

    `VmFacts.by_vcpu` lists only the vCPUs that were active since the last tick.
    """

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
    """One VM that was active since the last tick.

    Attributes:
        name, tenant, weight, vcpus: as in the VM's spec.
        bus_locks, exits: events since the last tick. `bus_locks` is None where the host reports no bus locks.
        answers: accesses since the last tick that Python answered, by a device or by a task.
        throttled: seconds since the last tick in which vCPUs waited for a bucket, summed over the vCPUs.
        generation: a number that no other VM of the fleet has, also none of the same name.
        cpu: seconds of CPU time that the vCPU threads used since the last tick, summed over the threads.
        run_delay: seconds in which the vCPU threads could have run and had no CPU. The guest sees this time as stolen.
            Source: ``/proc/PID/task/TID/schedstat``.
        capped: seconds in which a CPU cap held the VM.
        work: how much the guest got done since the last tick, as the guest reports it (`Vm.report_work`). The guest
            chooses the unit, so the figures of two VMs can't be compared.
        dirty_pages: pages of 4 KiB that the VM wrote, by the readings of its dirty log since the last tick. The fleet
            reads the log about once a second, and a page counts once in each reading. None: no reading fell in this
            tick, or the VM's memory is not logged (`VmSpec.log_dirty`).
        dirty_rate: pages a second, by the readings in this tick. If there was no reading in this tick, by the last
            reading before, unless the VM rested since.
        by_reason: the VM's exits by the kernel's name of the reason ("io", "mmio", "x86_bus_lock", ...).
        by_vcpu: the vCPUs that were active, by index.
        throttled_by: the seconds of `throttled` by the limit that the vCPU waited for last. "vm.exits" is the VM's own
            limit on exits. The levels are "host", "tenant", "vm" and "vcpu". In a fleet that shares a `HostBudget`
            "host" is that budget, and "fleet" is the fleet's own limit. Only real waits are in it: the waits that a dry
            run would have caused are not, and in a replay the mapping is empty.

    `cpu`, `run_delay`, `capped`, `work` and the pages are None where this host or this guest does not report them. 0
    never means "unknown".
    """

    name: str
    tenant: str
    weight: float
    vcpus: int
    bus_locks: int | None
    exits: int
    throttled: float
    generation: int = 0
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
    """The sums over a tenant's VMs since the last tick. The fields mean the same as in `VmFacts`.

    `vms` is the number of the tenant's VMs that were active since the last tick.
    """

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
    """The host's signals in one tick. A signal that this host can't give is None; `absent` has the reason.

    Attributes:
        cpus: how many CPUs this process may run on.
        cpu_pressure, memory_pressure, io_pressure: the part of the time since the last tick (0 to 1) in which some task
            waited for CPU, memory or I/O. Source: PSI, Documentation/accounting/psi.rst ("some").
        lock_ns, memory_ns: median times in nanoseconds that the host probe measured since the last tick: for a locked
            operation in a cache line of the probe's own, and for a read that misses the caches.
        llc_bytes: bytes of the last-level caches that hold data of the vCPU threads. Source: resctrl.
        memory_bandwidth: bytes a second that the vCPU threads read and write in memory. Source: resctrl.
        absent: the reason why a signal is missing, by the signal's name.
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
    """The fleet in one tick.

    Attributes:
        time: nanoseconds on the fleet's clock.
        interval: seconds since the last tick, as measured and not as planned; more than 0.
        limit, exit_limit, answer_limit: the host's limits.
        tenants: all tenants, by name.
        vms: the VMs that were active since the last tick, by name. A VM that is not in it was idle or is gone.
        host: signals of the host as a whole.
        gone: name and generation of each VM that has ended for good since the last tick. A policy can forget that VM.
            The VM is not in `vms`; another VM of the same name may be.
        others: active VMs whose facts this policy sees but on which it may not act (see `only`).
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
    def all_vms(self) -> Mapping[str, VmFacts]:
        """`vms` and `others` together: all VMs that may be victims."""
        return {**self.others, **self.vms} if self.others else self.vms

    @functools.cached_property
    def by_tenant(self) -> Mapping[str, TenantFacts]:
        """The sums of `vms` for each tenant."""
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
    """The VM's events of a meter since the last tick. None: the host does not report them."""
    count: int | None = getattr(vm, meter.value)
    return count


def add_known(values: Iterable[N | None]) -> N | None:
    """The sum of the values that are known. None: no value is known, which a sum of 0 would hide."""
    total: N | None = None
    for value in values:
        if value is not None:
            total = value if total is None else total + value
    return total


@runtime_checkable
class Policy(Protocol):
    """An object that gets facts and asks for actions.

    Attributes:
        name: no two policies of a fleet have the same name.
        interval: seconds between two ticks. None: the policy decides only once, when the fleet opens.

    A policy may have an attribute `meter`. If `meter` is bus locks, a fleet on a host that can't see bus locks refuses
    the policy when it opens.

    `decide` must not raise. If it raises, the fleet records the error in the journal and switches the policy off. The
    limits that the policy set last stay in force.
    """

    @property
    def name(self) -> str: ...

    @property
    def interval(self) -> float | None: ...

    def decide(self, facts: Facts) -> Iterable[Action]: ...
