"""What a policy is told at each tick."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import attrs

from ..actions import Action
from ..spec import Limit, Tenant

__all__ = ["Facts", "HostFacts", "Policy", "VmFacts"]


@attrs.frozen
class VmFacts:
    """One VM that did something since the last tick.

    Attributes:
        name, tenant, weight, vcpus: as in its spec.
        bus_locks, exits: how many since the last tick. `bus_locks` is None where the host reports none.
        throttled: seconds that its vCPUs waited for their turn since the last tick, summed over the vCPUs.
        launch: a number of its own for each launch: another VM of the same name has another.
        cpu: seconds of CPU time that its vCPU threads used since the last tick, summed over them.
        run_delay: seconds that they could have run and had no CPU: what the guest sees as stolen. Source:
            ``/proc/PID/task/TID/schedstat``.
        capped: seconds that a CPU cap held it.
        work: how much the guest got done since the last tick, by its own account (`Vm.report_work`); the unit is the
            guest's, so compare it with nothing but itself.

    The last four are None where this host, or this guest, does not tell: never 0 for "unknown".
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
        limit, exit_limit: the host's.
        tenants: all of them, by name.
        vms: by name, those that did something since the last tick. A VM that is not here was idle or is gone.
        host: signals of the host as a whole.
        gone: name and launch of each VM that has ended for good since the last tick: what a policy remembers of it can
            go. It is not in `vms`; another of that name may be.
    """

    time: int
    interval: float
    limit: Limit | None
    exit_limit: Limit | None
    tenants: Mapping[str, Tenant]
    vms: Mapping[str, VmFacts]
    host: HostFacts = HostFacts()
    gone: tuple[tuple[str, int], ...] = ()


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
