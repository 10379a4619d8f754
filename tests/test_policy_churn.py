"""Policies on fleets whose VMs come and go: each word is about one launch, and of those that are gone nothing stays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from orchestra.model.actions import Throttle
from orchestra.model.spec import Limit, Tenant
from orchestra.policy import (
    Adaptive,
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
    default_steps,
    only,
)

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
    "adaptive": lambda: Adaptive({"cpu_pressure": 0.5}),
    "adaptive-work": lambda: Adaptive({"work_drop": 0.3}),
    "only": lambda: only(Ladder(STEPS), vms="v*"),
}


class Fleet:
    """VMs by name, each with its launch: what they do is set from outside, tick by tick."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.time, self.launches = policy, 0, 0
        self.vms: dict[str, int] = {}
        self.gone: list[tuple[str, int]] = []

    def launch(self, name: str) -> None:
        if name in self.vms:
            self.end(name)
        self.launches += 1
        self.vms[name] = self.launches

    def end(self, name: str) -> None:
        self.gone.append((name, self.vms.pop(name)))

    def tick(self, rates: dict[str, float], harm: float = 0.0) -> None:
        self.time += round(TICK * SECOND)
        told = {
            name: VmFacts(
                name, "t", 1.0, 1, round(rate * TICK), round(rate * TICK), 0.0, self.vms[name], 0.05, work=1.0
            )
            for name, rate in rates.items()
        }
        host = HostFacts(lock_ns=10 * (1 + harm), cpu_pressure=harm)
        gone, self.gone = tuple(self.gone), []
        facts = Facts(self.time, TICK, Limit(rate=1000), None, {"t": Tenant("t")}, told, host, gone)
        for action in self.policy.decide(facts):
            if action.vm is not None and action.generation is not None:
                assert action.generation == self.vms[action.vm], action
            if isinstance(action, Throttle) and not isinstance(self.policy, StaticLimits | BurstCredits):
                assert action.limit.tokens >= 2, action  # or one that keeps to it would wait


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_each_action_says_which_launch_is_meant(make):
    fleet = Fleet(make())
    for n in range(300):
        for i in range(4):
            if n % (7 + 5 * i) == 0:
                fleet.launch(f"v{i}")
        fleet.tick({f"v{i}": 500.0 * (n // 20 % 2) + 3 * i for i in range(4)})


def books(policy: object) -> dict[str, object]:
    """All that a policy remembers that can grow, its parts' included."""
    found: dict[str, object] = {}
    for name, value in vars(policy).items():
        if type(value).__module__.startswith("orchestra.policy") and hasattr(value, "__dict__"):
            found |= {f"{name}.{inner}": one for inner, one in books(value).items()}
        elif isinstance(value, dict | set | list | deque):
            found[name] = value
    return found


EVERY: dict[str, Callable[[], Policy]] = POLICIES | {
    "low-share": lambda: WeightedShare(Limit(rate=2)),
    "low-ladder": lambda: Ladder(default_steps(10), interval=1.0),
}


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=10)
@given(
    st.lists(
        st.tuples(st.sampled_from(["launch", "end", "noise", "noise"]), st.integers(0, 5), st.floats(0, 900)),
        min_size=30,
        max_size=60,
    )
)
def test_when_all_vms_are_gone_all_books_are_empty(name, steps):
    fleet = Fleet(EVERY[name]())
    fleet.tick({})
    empty = sizes(fleet.policy)
    rates: dict[str, float] = {}
    for what, which, rate in steps:
        vm = f"v{which}"
        if what == "launch":
            fleet.launch(vm)
        elif what == "end" and vm in fleet.vms:
            fleet.end(vm)
        rates[vm] = rate
        fleet.tick({vm: rates.get(vm, 0.0) for vm in fleet.vms if rates.get(vm)}, harm=float(which > 2))
    for vm in list(fleet.vms):
        fleet.end(vm)
    fleet.tick({})
    if name in ("weighted-share", "static-limits", "bus-time", "ladder", "adaptive", "adaptive-work", "only"):
        assert sizes(fleet.policy) == empty  # at once
    for _ in range(700):  # what is remembered for a time is forgotten as it passes; none of it is a VM's for good
        fleet.tick({})
    assert sizes(fleet.policy) == empty


def sizes(policy: Policy) -> dict[str, int]:
    return {name: len(value) for name, value in books(policy).items()}  # type: ignore[arg-type]  # all have a length


def test_a_thousand_short_lived_vms_leave_nothing_behind():
    for name, make in EVERY.items():
        fleet = Fleet(make())
        most = 0
        for n in range(1000):
            fleet.launch(f"v{n}")
            fleet.tick({f"v{n}": 500.0}, harm=float(n % 50 < 5))
            fleet.end(f"v{n}")
            most = max([most, *sizes(fleet.policy).values()])
        assert most < 700, name  # those of the last minute
