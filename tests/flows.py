"""Guests as flows under a policy: coarser than `closed_loop`, and fast enough for hours. Time is injected."""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestra.model.actions import Throttle
from orchestra.model.spec import Limit
from orchestra.policy import Facts, HostFacts, Policy, VmFacts

TICK = 0.1


def facts(time: float, *vms: VmFacts, host: HostFacts | None = None, interval: float = TICK) -> Facts:
    return Facts(round(time * 1e9), interval, None, None, {}, {vm.name: vm for vm in vms}, host or HostFacts())


def pressure(harm: float) -> HostFacts:
    return HostFacts(cpu_pressure=harm)


def slowness(times: float) -> HostFacts:
    return HostFacts(lock_ns=20.0 * times)


class Fluid:
    """Guests as flows: each does what it wants or what it may.

    `harm`: from the time and what all do together. `told`: how the host shows it. `over`: from which on it hurts.
    """

    def __init__(
        self,
        policy: Policy,
        wants: list[float],
        harm: Callable[[float, float], float],
        told: Callable[[float], HostFacts] = pressure,
        over: float = 0.5,
    ) -> None:
        self.policy, self.wants, self.harm = policy, dict(enumerate(wants)), harm
        self.told, self.over = told, over
        self.interval = policy.interval or TICK
        self.limits: dict[str, Limit] = {}
        self.now = 0.0
        self.totals: list[float] = []
        self.held: list[bool] = []
        self.hurt: list[bool] = []

    def run(self, seconds: float) -> Fluid:
        for _ in range(round(seconds / self.interval)):
            self.tick()
        return self

    def tick(self, *others: VmFacts) -> None:
        self.now += self.interval
        vms = list(others)
        for n, want in self.wants.items():
            limit = self.limits.get(f"v{n}")
            rate = want if limit is None else min(want, limit.rate)
            waited = self.interval * (1 - rate / want) if want else 0.0
            vms.append(VmFacts(f"v{n}", "default", 1.0, 1, rate * self.interval, 1, waited, 1))  # type: ignore[arg-type]  # fluid
        total = sum(vm.bus_locks or 0.0 for vm in vms) / self.interval
        harm = self.harm(self.now, total)
        self.totals.append(total)
        self.hurt.append(harm > self.over)
        for action in self.policy.decide(facts(self.now, *vms, host=self.told(harm), interval=self.interval)):
            assert action.vm is not None
            if isinstance(action, Throttle):
                self.limits[action.vm] = action.limit
            else:
                del self.limits[action.vm]
        self.held.append(bool(self.limits))


def cliff(
    capacity: float, start: float = 1.0, end: float = math.inf, fine: float = 0.0, bad: float = 1.0
) -> Callable[[float, float], float]:
    """Everything is fine up to the capacity, and terrible above it."""
    return lambda now, total: bad if start < now <= end and total > capacity * (1 + 1e-9) else fine
