"""The statistics of a fleet: sums by tenant and over all VMs, including VMs that are gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import attrs

from ..backend import Backend, Detection
from ..machine.budget import Budgets
from ..machine.control import VmControl
from ..machine.iobudget import IoBudget
from ..machine.statistics import VmStatistics
from ..model.journalspec import JournalStatistics
from ..model.spec import Limit, Meter, Tenant
from ..policy import HostFacts
from ..policy.state import PolicyStatus

__all__ = ["Figures", "FleetStatistics", "TenantState", "TenantStatistics", "Totals", "summarise"]


@attrs.frozen
class TenantStatistics:
    """What a tenant's VMs did, including VMs that are gone. `vms`: the number that have not ended."""

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
    """What the fleet did since it was opened, including VMs that are gone. Times in seconds.

    Attributes:
        backend, why: the backend that executes the guests, and why it was picked.
        bus_lock_detection: "fault-like" (AMD: reported before the instruction, counts approximate), "trap-like" (Intel:
            behind it), "unknown", or None: bus locks are not seen here, and `bus_locks` is None as well.
        vms, vcpus: the number that have not ended.
        launched: the number of VMs that were ever launched.
        states: how many of `Fleet.vms` are in each state.
        released: waits that ``max_delay`` ended before the turn came.
        answers: accesses that Python answered.
        missed: exits whose details were lost in a full ring or channel. All other figures include them.
        host: the host at the last tick, if there are policies, a journal or a probe.
        journal: how the journal keeps up with the fleet, and what it lost; None: there is no journal.
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
class TenantState:
    """A tenant in its fleet. `live`: the number of VMs that have not ended; `gone`: what the VMs did that left the
    fleet."""

    tenant: Tenant
    budgets: Budgets
    io: IoBudget = attrs.field(factory=IoBudget)
    live: int = 0
    gone: Totals = attrs.field(factory=Totals)

    def limit(self, meter: Meter) -> Limit | None:
        """The tenant's limit in force on that meter."""
        return self.budgets[meter].limit


class Summed(Protocol):
    """The fleet, as `summarise` needs it."""

    backend: Backend
    bus_lock_detection: Detection | None

    @property
    def controls(self) -> Mapping[str, VmControl]: ...
    @property
    def tenant_states(self) -> Mapping[str, TenantState]: ...
    def host_limit(self, meter: Meter) -> Limit | None: ...
    def figures(self) -> Figures:
        """The figures that the fleet's parts keep."""


@attrs.frozen
class Figures:
    """Figures of the fleet's parts. `removed`: what the VMs of removed tenants did; `missed`: exits that channels
    dropped."""

    removed: Totals
    launched: int
    missed: int
    policies: tuple[PolicyStatus, ...]
    host: HostFacts
    journal: JournalStatistics | None


def summarise(fleet: Summed) -> FleetStatistics:
    """The statistics of a whole fleet."""
    tenant_states, detection, figures = fleet.tenant_states, fleet.bus_lock_detection, fleet.figures()
    # Copies: the VMs that are still here are added for this call only.
    sums = {name: state.gone.copy() for name, state in tenant_states.items()}
    states: dict[str, int] = {}
    live = dict.fromkeys(tenant_states, 0)
    vcpus = 0
    for vm in fleet.controls.values():
        statistics = vm.inspection.statistics()
        sums[vm.tenant].add(statistics)
        states[statistics.state] = states.get(statistics.state, 0) + 1
        if vm.outcome is None:
            live[vm.tenant] += 1
            vcpus += vm.spec.vcpus
    total = figures.removed.copy()
    for tenant in sums.values():
        total.join(tenant)
    seen = detection is not None
    return FleetStatistics(
        backend=fleet.backend.name,
        why=fleet.backend.why,
        bus_lock_detection=detection,
        vms=sum(live.values()),
        vcpus=vcpus,
        launched=figures.launched,
        states=states,
        bus_locks=total.bus_locks if seen else None,
        exits=total.exits,
        throttled_seconds=total.throttled,
        waits=total.waits,
        released=total.released,
        missed=total.missed + figures.missed,
        limit=fleet.host_limit(Meter.BUS_LOCKS),
        exit_limit=fleet.host_limit(Meter.EXITS),
        answers=total.answers,
        answer_limit=fleet.host_limit(Meter.ANSWERS),
        tenants={
            name: TenantStatistics(
                name=name,
                weight=state.tenant.weight,
                vms=live[name],
                bus_locks=sums[name].bus_locks if seen else None,
                exits=sum(sums[name].exits.values()),
                throttled_seconds=sums[name].throttled,
                released=sums[name].released,
                limit=state.limit(Meter.BUS_LOCKS),
                exit_limit=state.limit(Meter.EXITS),
                answers=sums[name].answers,
                answer_limit=state.limit(Meter.ANSWERS),
            )
            for name, state in tenant_states.items()
        },
        policies=figures.policies,
        host=figures.host,
        journal=figures.journal,
    )
