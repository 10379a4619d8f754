"""The worked timelines in the docstrings of ladder, share and adaptive: played again, they come out as written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from flows import TICK, facts
from orchestra.model.actions import Throttle, Unthrottle
from orchestra.model.spec import Limit
from orchestra.policy import (
    Adaptive,
    HostFacts,
    Ladder,
    Policy,
    VmFacts,
    WeightedShare,
    adaptive,
    default_steps,
    ladder,
    share,
)
from orchestra.policy.standing import TRANSITIONS, Standing


class Guests:
    """Each does in a tick what it wants and may. `wants`: bus locks a second, by name and time."""

    def __init__(self, policy: Policy, wants: Callable[[float], Mapping[str, float]]) -> None:
        self.policy, self.wants = policy, wants
        self.limits: dict[str, Limit] = {}
        self.now = 0.0
        self.did: dict[str, float] = {}

    def tick(self, host: Callable[[float], HostFacts] = lambda total: HostFacts(), budget: float = 1e9) -> list[object]:
        wants = self.wants(self.now)
        self.now = round(self.now + TICK, 6)
        may = {name: min(want, self.limits[name].rate) if name in self.limits else want for name, want in wants.items()}
        total = sum(may.values())
        self.did = {name: rate * min(1.0, budget / total) if total else 0.0 for name, rate in may.items()}
        vms = [
            VmFacts(name, "t", 1.0, 1, round(rate * TICK), 1, TICK * (1 - rate / wants[name]), 1)
            for name, rate in self.did.items()
            if wants[name]
        ]
        actions = list(self.policy.decide(facts(self.now, *vms, host=host(total))))
        for action in actions:
            if isinstance(action, Throttle):
                self.limits[action.vm or ""] = action.limit
            elif isinstance(action, Unthrottle):
                del self.limits[action.vm or ""]
        return actions


def on_a_ladder() -> list[str]:
    policy = Ladder(default_steps(over=1000, highest="cap_cpu"))
    guests = Guests(policy, lambda now: {"a": 5000.0 if now < 4 or 16 <= now < 17 else 0.0})
    rows = ["    time    does  step      standing   action"]
    while guests.now < 90:
        for action in guests.tick():
            state = policy._vms["a"]
            what = type(action).__name__
            if isinstance(action, Throttle):
                what += f" to {action.limit.rate:g}/s"
            rows.append(
                f"  {guests.now:4.1f} s  {guests.did['a']:4.0f}/s  {policy.rung('a'):8}  {state.standing:9}  {what}"
            )
    assert "a" not in policy._vms
    return rows


def shares() -> list[str]:
    policy = WeightedShare(Limit(rate=1000))
    guests = Guests(policy, lambda now: {"a": 2000.0, "b": 900.0, "c": 100.0 if now < 0.55 else 0.0})
    rows = ["    time  did: a    b    c  asked for: a    b    c  limits: a    b"]
    while guests.now < 0.95:
        before = {name: limit.rate for name, limit in guests.limits.items()}
        guests.tick(budget=1000)
        vms = policy._vms
        asked = [f"{vms[name].demand:4.0f}" if name in vms else "   -" for name in "abc"]
        did = [f"{guests.did[name]:4.0f}" for name in "abc"]
        now = [f"{guests.limits[name].rate:4.0f}" if name in guests.limits else "   -" for name in "ab"]
        changed = "" if before == {name: limit.rate for name, limit in guests.limits.items()} else "  set"
        rows.append(f"  {guests.now:4.1f} s     {' '.join(did)}       {' '.join(asked)}    {' '.join(now)}{changed}")
    return rows


def levels() -> list[str]:
    policy = Adaptive({"cpu_pressure": 0.5}, increase=1.0)
    guests = Guests(policy, lambda now: {"a": 1200.0, "b": 400.0})

    def host(total: float) -> HostFacts:
        return HostFacts(cpu_pressure=1.0 if total > 1000 and guests.now < 0.65 else 0.0)

    rows = ["    time  did: a     b  harm   level  limits: a     b"]
    while guests.now < 2:
        guests.tick(host)
        harm = "yes" if sum(guests.did.values()) > 1000 and guests.now < 0.65 else "no"
        level = "   -" if policy.level is None else f"{policy.level:4.0f}"
        now = [f"{guests.limits[name].rate:4.0f}" if name in guests.limits else "   -" for name in "ab"]
        did = [f"{guests.did[name]:4.0f}" for name in "ab"]
        rows.append(f"  {guests.now:4.1f} s    {'  '.join(did)}  {harm:4}   {level}       {'  '.join(now)}")
        if not guests.limits and guests.now > 0.5:
            break
    return rows


@pytest.mark.parametrize(("module", "play"), [(ladder, on_a_ladder), (share, shares), (adaptive, levels)])
def test_a_worked_timeline_comes_out_as_it_is_written(module: object, play: Callable[[], list[str]]) -> None:
    assert "\n".join(play()) in (module.__doc__ or "")


def test_each_standing_of_a_ladder_is_in_its_table() -> None:
    assert {standing for standing, _ in TRANSITIONS} == set(Standing)
