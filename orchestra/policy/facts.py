"""What a policy is told at each tick."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import attrs

from ..actions import Action
from ..spec import Limit, Tenant

__all__ = ["Facts", "Policy", "VmFacts"]


@attrs.frozen
class VmFacts:
    """One VM that did something since the last tick.

    Attributes:
        name, tenant, weight, vcpus: as in its spec.
        bus_locks, exits: how many since the last tick. `bus_locks` is None where the host reports none.
        throttled: seconds that its vCPUs waited for their turn since the last tick, summed over the vCPUs.
        launch: a number of its own for each launch: another VM of the same name has another.
    """

    name: str
    tenant: str
    weight: float
    vcpus: int
    bus_locks: int | None
    exits: int
    throttled: float
    launch: int = 0


@attrs.frozen
class Facts:
    """The fleet as one tick sees it.

    Attributes:
        time: nanoseconds on the fleet's clock.
        interval: seconds since the last tick (as it was, not as it was planned); more than 0.
        limit, exit_limit: the host's.
        tenants: all of them, by name.
        vms: by name, those that did something since the last tick. A VM that is not here was idle or is gone.
    """

    time: int
    interval: float
    limit: Limit | None
    exit_limit: Limit | None
    tenants: Mapping[str, Tenant]
    vms: Mapping[str, VmFacts]


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
