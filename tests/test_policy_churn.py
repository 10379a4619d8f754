"""Policies on fleets whose VMs come and go: each word is about one launch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestra.policy import (
    BurstCredits,
    BusTime,
    Condition,
    Facts,
    HostFacts,
    Ladder,
    Policy,
    StaticLimits,
    Step,
    VmFacts,
    WeightedShare,
    only,
)
from orchestra.spec import Limit, Tenant

SECOND = 1_000_000_000
TICK = 0.1
BAD = Condition("bus_locks", 100)
STEPS = (
    Step(rung="throttle", when=BAD, clear=0.3, limit=Limit(rate=50, max_delay=1.0)),
    Step(rung="cap_cpu", when=BAD, dwell=0.1, clear=0.3, cpu=0.5),
    Step(rung="isolate", when=BAD, dwell=0.1, clear=0.3),
    Step(rung="pause", when=BAD, dwell=0.1, clear=0.3),
    Step(rung="evict", dwell=0.1, clear=1, returns=2),
)
POLICIES: dict[str, Callable[[], Policy]] = {
    "weighted-share": lambda: WeightedShare(Limit(rate=300)),
    "bus-time": lambda: BusTime(0.001),
    "static-limits": lambda: StaticLimits({"v*": Limit(rate=20)}, {"t": Limit(rate=50)}, Limit(rate=100)),
    "burst-credits": lambda: BurstCredits(10, 40, launch=20),
    "ladder": lambda: Ladder(STEPS),
    "ladder-work": lambda: Ladder([Step(rung="warn", when=Condition("work_drop", 0.3)), *STEPS]),
    "only": lambda: only(Ladder(STEPS), vms="v*"),
}


class Fleet:
    """VMs by name, each with its launch: what they do is set from outside, tick by tick."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.time, self.launches = policy, 0, 0
        self.vms: dict[str, int] = {}

    def launch(self, name: str) -> None:
        self.launches += 1
        self.vms[name] = self.launches

    def tick(self, rates: dict[str, float]) -> None:
        self.time += round(TICK * SECOND)
        told = {
            name: VmFacts(name, "t", 1.0, 1, round(rate * TICK), round(rate * TICK), 0.0, self.vms[name], 0.05)
            for name, rate in rates.items()
        }
        facts = Facts(self.time, TICK, Limit(rate=1000), None, {"t": Tenant("t")}, told, HostFacts())
        for action in self.policy.decide(facts):
            if action.vm is not None:
                assert action.launch == self.vms[action.vm], action


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_each_action_says_which_launch_is_meant(make):
    fleet = Fleet(make())
    for n in range(300):
        for i in range(4):
            if n % (7 + 5 * i) == 0:
                fleet.launch(f"v{i}")
        fleet.tick({f"v{i}": 500.0 * (n // 20 % 2) + 3 * i for i in range(4)})
