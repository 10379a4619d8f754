"""What a fleet did: sums by tenant and over all, VMs that are gone included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from ..backend import Backend, Detection
from ..machine.budget import Budgets
from ..machine.vm import Vm, VmStatistics
from ..model.spec import Limit, Meter, Tenant
from ..policy import HostFacts
from ..policy.state import PolicyStatus
from .recorder import JournalStatistics

__all__ = ["FleetStatistics", "TenantSeat", "TenantStatistics", "Totals", "summarise"]


@attrs.frozen
class TenantStatistics:
    """What a tenant's VMs did, those that are gone included."""

    name: str
    weight: float
    vms: int
    bus_locks: int | None
    exits: int
    throttled_seconds: float
    released: int
    limit: Limit | None
    exit_limit: Limit | None
    answers: int
    answer_limit: Limit | None


@attrs.frozen
class FleetStatistics:
    """What the fleet did since it was opened, VMs that are gone included. Times in seconds.

    Attributes:
        backend, why: what executes the guests, and why it was picked.
        bus_lock_detection: "fault-like" (AMD: reported before the instruction, counts approximate), "trap-like" (Intel:
            behind it), "unknown", or None: bus locks are not seen here, and `bus_locks` is None as well.
        vms, vcpus: that have not ended.
        launched: VMs, ever. states: how many of `Fleet.vms` are in each state.
        released: waits that ``max_delay`` ended before the turn came.
        answers: accesses that Python answered.
        missed: exits whose details were lost in a full ring or channel; they are counted in everything else.
        host: as the last tick saw it, if there are policies, a journal or a probe.
        journal: how it keeps up with the fleet, and what is lost; None: there is none.
    """

    backend: str
    why: str
    bus_lock_detection: Detection | None
    vms: int
    vcpus: int
    launched: int
    states: Mapping[str, int]
    bus_locks: int | None
    exits: Mapping[str, int]
    throttled_seconds: float
    waits: int
    released: int
    missed: int
    limit: Limit | None
    exit_limit: Limit | None
    answers: int
    answer_limit: Limit | None
    tenants: Mapping[str, TenantStatistics]
    policies: tuple[PolicyStatus, ...]
    host: HostFacts
    journal: JournalStatistics | None = None


@attrs.define
class Totals:
    """Sums over VMs."""

    bus_locks: int = 0
    throttled: float = 0.0
    waits: int = 0
    released: int = 0
    missed: int = 0
    answers: int = 0
    exits: dict[str, int] = attrs.field(factory=dict)

    def add(self, statistics: VmStatistics) -> None:
        self.bus_locks += statistics.bus_locks or 0
        self.throttled += statistics.throttled_seconds
        self.waits += statistics.waits
        self.released += statistics.released
        self.missed += statistics.missed
        self.answers += statistics.answers
        for name, count in statistics.exits.items():
            self.exits[name] = self.exits.get(name, 0) + count

    def join(self, other: Totals) -> None:
        self.bus_locks += other.bus_locks
        self.throttled += other.throttled
        self.waits += other.waits
        self.released += other.released
        self.missed += other.missed
        self.answers += other.answers
        for name, count in other.exits.items():
            self.exits[name] = self.exits.get(name, 0) + count

    def copy(self) -> Totals:
        return attrs.evolve(self, exits=dict(self.exits))


@attrs.define(eq=False)
class TenantSeat:
    """A tenant as its fleet has it. `live`: VMs that have not ended; `gone`: what those did that left the fleet."""

    tenant: Tenant
    budgets: Budgets
    live: int = 0
    gone: Totals = attrs.field(factory=Totals)

    def limit(self, meter: Meter) -> Limit | None:
        """What is in force."""
        return self.budgets[meter].limit


def summarise(
    vms: Iterable[Vm],
    seats: Mapping[str, TenantSeat],
    removed: Totals,
    *,
    backend: Backend,
    detection: Detection | None,
    launched: int,
    missed: int,
    limit: Limit | None,
    exit_limit: Limit | None,
    answer_limit: Limit | None,
    policies: tuple[PolicyStatus, ...],
    host: HostFacts,
    journal: JournalStatistics | None = None,
) -> FleetStatistics:
    """Add a fleet up. `removed`: by tenants that it has no more; `missed`: by its channels."""
    sums = {name: seat.gone.copy() for name, seat in seats.items()}
    states: dict[str, int] = {}
    live = dict.fromkeys(seats, 0)
    vcpus = 0
    for vm in vms:
        statistics = vm.statistics()
        sums[vm.tenant].add(statistics)
        states[statistics.state] = states.get(statistics.state, 0) + 1
        if vm.outcome is None:
            live[vm.tenant] += 1
            vcpus += vm.spec.vcpus
    total = removed.copy()
    for tenant in sums.values():
        total.join(tenant)
    seen = detection is not None
    return FleetStatistics(
        backend=backend.name,
        why=backend.why,
        bus_lock_detection=detection,
        vms=sum(live.values()),
        vcpus=vcpus,
        launched=launched,
        states=states,
        bus_locks=total.bus_locks if seen else None,
        exits=total.exits,
        throttled_seconds=total.throttled,
        waits=total.waits,
        released=total.released,
        missed=total.missed + missed,
        limit=limit,
        exit_limit=exit_limit,
        answers=total.answers,
        answer_limit=answer_limit,
        tenants={
            name: TenantStatistics(
                name=name,
                weight=seat.tenant.weight,
                vms=live[name],
                bus_locks=sums[name].bus_locks if seen else None,
                exits=sum(sums[name].exits.values()),
                throttled_seconds=sums[name].throttled,
                released=sums[name].released,
                limit=seat.limit(Meter.BUS_LOCKS),
                exit_limit=seat.limit(Meter.EXITS),
                answers=sums[name].answers,
                answer_limit=seat.limit(Meter.ANSWERS),
            )
            for name, seat in seats.items()
        },
        policies=policies,
        host=host,
        journal=journal,
    )
