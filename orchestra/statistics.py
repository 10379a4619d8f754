"""What a fleet did: sums by tenant and over all, VMs that are gone included."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from .backend import Detection
from .governor import PolicyStatus
from .spec import Limit
from .vm import VmStatistics

__all__ = ["FleetStatistics", "TenantStatistics", "Totals"]


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
        missed: exits whose details were lost in a full ring or channel; they are counted in everything else.
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
    tenants: Mapping[str, TenantStatistics]
    policies: tuple[PolicyStatus, ...]


@attrs.define
class Totals:
    """Sums over VMs."""

    bus_locks: int = 0
    throttled: float = 0.0
    waits: int = 0
    released: int = 0
    missed: int = 0
    exits: dict[str, int] = attrs.field(factory=dict)

    def add(self, statistics: VmStatistics) -> None:
        self.bus_locks += statistics.bus_locks or 0
        self.throttled += statistics.throttled_seconds
        self.waits += statistics.waits
        self.released += statistics.released
        self.missed += statistics.missed
        for name, count in statistics.exits.items():
            self.exits[name] = self.exits.get(name, 0) + count

    def join(self, other: Totals) -> None:
        self.bus_locks += other.bus_locks
        self.throttled += other.throttled
        self.waits += other.waits
        self.released += other.released
        self.missed += other.missed
        for name, count in other.exits.items():
            self.exits[name] = self.exits.get(name, 0) + count

    def copy(self) -> Totals:
        return attrs.evolve(self, exits=dict(self.exits))
