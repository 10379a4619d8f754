"""Simulated worlds: the same policies as live, the same run for the same seed, and every action does what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import attrs
import numpy as np
import pytest

import closed_loop
import orchestra as orc
from orchestra.model.actions import Action, CapCpu, Evict, Isolate, Rejoin, Warn
from orchestra.model.spec import Limit, Meter
from orchestra.policy import Adaptive, BurstCredits, Facts, Ladder, StaticLimits, WeightedShare, default_steps
from orchestra.simulate import HostCpu, LimitSpec, Scenario, load_scenario, simulate
from orchestra.simulate.behaviours import Adversarial, Behaviour, Bursty, Quiet, Steady
from orchestra.simulate.layout import Layout
from orchestra.simulate.report import document
from orchestra.simulate.scenario import Budget, Hosts, Placement, Vms
from orchestra.simulate.world import World

BUDGET = 0.05 * 2e9 / 7000
"""Locks a second that 5 % of the default CPU's bus are."""


def fleet(*behaviours: Behaviour, quiet: int = 9, hosts: int = 1, cpu: str = "default", **more: object) -> Scenario:
    """Hosts with one VM for each behaviour and some quiet ones, spread evenly."""
    return Scenario(
        duration=more.pop("duration", 60),  # type: ignore[arg-type]
        hosts=(Hosts(count=hosts, cpu=cpu),),
        vms=(
            *(Vms(name=f"n{i}", count=hosts, behaviour=one) for i, one in enumerate(behaviours)),
            Vms(name="quiet", count=quiet * hosts),
        ),
        placement=Placement.SPREAD,
        **more,  # type: ignore[arg-type]
    )


@attrs.define(eq=False)
class Scripted:
    """Does what it is told at given times, and keeps all facts."""

    script: dict[int, list[Action]] = attrs.field(factory=dict)
    name: str = "scripted"
    interval: float | None = 1.0
    seen: list[Facts] = attrs.field(factory=list)

    def decide(self, facts: Facts) -> Iterable[Action]:
        self.seen.append(facts)
        return self.script.get(round(facts.time / 1e9), [])


def play(asked: Scenario, *policies: object, seed: int = 1, ticks: int | None = None) -> World:
    """`policies`: one for all hosts, or what makes one."""
    makers = [one if callable(one) else lambda cpu, one=one: one for one in policies]  # type: ignore[misc]
    world = World(Layout(asked, seed), seed, makers)
    rows = [world.locks.copy()]
    for _ in range(ticks or asked.ticks):
        world.step()
        rows.append(world.locks.copy())
    world.tally.finish(world.now)
    world.made = np.diff(np.array(rows), axis=0)  # type: ignore[attr-defined]  # locks of each VM in each tick
    return world


# ---- what guests do, and what policies are told


def test_facts_tell_what_guests_did_and_nothing_of_the_idle():
    policy = Scripted()
    world = play(fleet(Steady(rate=1000, start=5, stop=20), cpu="zen-2"), policy, ticks=30)
    by_time = {round(facts.time / 1e9): facts for facts in policy.seen}
    told = by_time[10].vms
    assert set(told) == {"n0-0"}
    assert told["n0-0"].bus_locks == world.made[9, 0]
    assert told["n0-0"].exits == told["n0-0"].bus_locks  # a bus lock is an exit
    assert told["n0-0"].throttled == 0
    assert not by_time[25].vms
    share = world.made[9, 0] * 7000 / 2e9
    assert by_time[10].host.lock_ns == pytest.approx(10 * (1 + 9 * share))
    assert by_time[25].host.lock_ns == 10
    assert by_time[10].host.io_pressure is None
    assert "io_pressure" in by_time[10].host.absent


def test_locks_that_facts_tell_add_up_to_those_made():
    policy = Scripted()
    asked = fleet(Steady(rate=37.3), Bursty(rate=11, on=1, off=1), hosts=3, duration=50)
    asked = attrs.evolve(asked, vms=(attrs.evolve(asked.vms[0], limit=LimitSpec(rate=7.7)), *asked.vms[1:]))
    world = play(asked, policy)
    for vm in range(6):
        name = world.layout.name(vm)
        told = sum(facts.vms[name].bus_locks for facts in policy.seen if name in facts.vms)
        assert told == math.floor(world.locks[vm])


def test_a_policy_that_ticks_slower_is_told_of_all_ticks_since():
    slow, fast = Scripted(name="slow", interval=3.0), Scripted(name="fast", interval=0.5)
    world = play(fleet(Steady(rate=100), tick=0.5, duration=12), slow, fast)
    assert [facts.time / 1e9 for facts in slow.seen] == [3, 6, 9, 12]
    assert slow.seen[1].interval == 3
    assert slow.seen[1].vms["n0-0"].bus_locks == world.made[6:12, 0].sum()
    assert len(fast.seen) == 24


def test_guests_that_report_their_work_are_in_the_facts_of_hosts_that_are_awake():
    asked = fleet(Steady(rate=100_000, start=10, stop=20), quiet=2, cpu="zen-2", duration=20)
    asked = attrs.evolve(asked, vms=(asked.vms[0], attrs.evolve(asked.vms[1], reports_work=True, cpu=0.5)))
    policy = Scripted()
    play(asked, policy)
    last = policy.seen[-1]
    share = last.vms["n0-0"].bus_locks * 7000 / 2e9
    assert last.vms["quiet-1"].work == pytest.approx(0.5 / (1 + 0.3 * 9 * share), rel=1e-6)
    assert last.vms["n0-0"].work is None


# ---- the same as live


def test_policies_are_the_objects_that_run_live_and_each_host_has_its_own():
    made: list[object] = []

    def factory(cpu: HostCpu) -> WeightedShare:
        made.append(WeightedShare(LimitSpec(bus_share=0.05).on(cpu), interval=1.0))
        return made[-1]  # type: ignore[return-value]

    result = simulate(fleet(Steady(rate=50_000), hosts=3, duration=10), policies=[factory])
    assert result.policies == ("weighted-share",)
    assert {type(one) for one in made} == {orc.WeightedShare}
    assert len({id(one) for one in made}) == len(made) >= 4  # one for its name, one for each host


def test_a_policy_fares_here_as_under_the_cores_own_buckets():
    limit = Limit(rate=300, burst=15)
    rates = [400.0, 250.0, 30.0]
    asked = fleet(*(Steady(rate=rate) for rate in rates), duration=20, tick=0.1)
    world = play(asked, WeightedShare(limit))
    exact = closed_loop.World(
        WeightedShare(limit), [closed_loop.Guest(f"n{i}-0", closed_loop.steady(rate)) for i, rate in enumerate(rates)]
    ).run(20)
    for i in range(3):
        here = world.made[100:, i].sum() / 10
        assert here == pytest.approx(exact.rate(f"n{i}-0", 10), rel=0.08)


@pytest.mark.parametrize(
    ("make", "settle"),
    [
        (lambda: WeightedShare(Limit(rate=BUDGET), interval=1.0), 5),
        (lambda: Ladder(default_steps(BUDGET), interval=1.0), 5),
        (lambda: Adaptive(interval=1.0), 5),
        (lambda: BurstCredits(1000, 50_000, interval=1.0), 5),
        (lambda: StaticLimits(vms={"*": Limit(rate=2000)}, interval=1.0), 5),
    ],
)
def test_leaving_quiet_hosts_alone_changes_nothing_that_guests_feel(make, settle):
    asked = fleet(
        Bursty(rate=60_000, on=5, off=120), Quiet(rate=0.002), Adversarial(rate=50_000, on=2, off=200),
        hosts=4, duration=1000, cpu="zen-2",
    )  # fmt: skip

    def run(settle: int) -> World:
        world = World(Layout(attrs.evolve(asked, settle=settle), 3), 3, [lambda cpu: make()])
        for _ in range(asked.ticks):
            world.step()
        world.tally.finish(world.now)
        return world

    lazy, eager = run(settle), run(10**9)
    assert lazy.hosts.decisions < eager.hosts.decisions == 4000
    assert lazy.locks == pytest.approx(eager.locks, rel=0.02, abs=1)
    ours, theirs = lazy.tally.facts(), eager.tally.facts()
    assert ours["slowdown"]["mean"] == pytest.approx(theirs["slowdown"]["mean"], rel=0.002)
    assert ours["actions"]["total"] == pytest.approx(theirs["actions"]["total"], rel=0.05, abs=2)


def test_a_policy_that_raises_is_switched_off_on_its_host_and_its_limits_stay():
    class Breaks(Scripted):
        def decide(self, facts: Facts) -> Iterable[Action]:
            if facts.time >= 5e9:
                raise ZeroDivisionError("oh")
            return [orc.Throttle(vm="n0-0", limit=Limit(rate=50))]

    world = play(fleet(Steady(rate=1000), duration=20), Breaks())
    assert dict(world.engines.errors) == {"scripted: ZeroDivisionError: oh": 1}
    assert world.made[10:, 0] == pytest.approx(50)


# ---- actions


def test_limits_of_vm_tenant_and_host_hold_and_can_be_taken_away():
    script = {
        5: [orc.Throttle(vm="n0-0", limit=Limit(rate=100))],
        10: [orc.Throttle(tenant="tenant", limit=Limit(rate=150))],
        15: [orc.Throttle(limit=Limit(rate=60))],
        20: [orc.Unthrottle(), orc.Unthrottle(tenant="tenant"), orc.Unthrottle(vm="n0-0")],
    }
    world = play(fleet(Steady(rate=1000), Steady(rate=1000), duration=25), Scripted(script))
    rows = world.made
    assert rows[8] == pytest.approx([100, rows[8, 1], *[0] * 9])
    assert rows[8, 1] > 800
    assert rows[13].sum() == pytest.approx(150)
    assert rows[18].sum() == pytest.approx(60)
    assert rows[22, :2].min() > 800
    assert not world.engines.errors
    assert world.tally.failed == 0


def test_caps_pauses_isolation_and_the_end_of_a_vm_hold_its_guest():
    script: dict[int, list[Action]] = {
        5: [CapCpu(vm="n0-0", share=0.25), orc.SetMemory(vm="n0-0", memory=4096)],
        8: [orc.SetMemory(vm="n0-0", memory=None)],
        10: [CapCpu(vm="n0-0", share=None), Isolate(vm="n0-0"), Isolate(vm="n1-0"), Isolate(vm="n2-0")],
        15: [Rejoin(vm="n0-0"), Rejoin(vm="n1-0"), Rejoin(vm="n2-0"), orc.Pause(vm="n0-0")],
        20: [orc.Resume(vm="n0-0"), Evict(vm="n1-0"), orc.Stop(vm="n2-0"), Warn(vm="n0-0")],
    }
    policy = Scripted(script)
    free = orc.Guard(vm_cool_down=0, host_cool_down=0)
    world = play(fleet(*[Steady(rate=3000)] * 3, duration=25, guard=free), policy)
    rows = world.made[:, :3]
    assert rows[3].min() > 2700
    assert rows[8, 0] == pytest.approx(750, rel=0.15)
    assert rows[12] == pytest.approx([2000] * 3, rel=0.15)  # three on two quarantine CPUs
    assert rows[17, 0] == 0
    assert rows[17, 1] > 2700
    assert rows[22, 0] > 2700
    assert rows[22, 1:].sum() == 0
    capped = next(facts for facts in policy.seen if round(facts.time / 1e9) == 8).vms["n0-0"]
    assert capped.capped == pytest.approx(0.75)
    assert capped.throttled == 0


def test_policies_are_told_who_left():
    policy, slow = Scripted({5: [Evict(vm="n0-0")]}), Scripted(name="slow", interval=4.0)
    play(fleet(Steady(rate=100), Steady(rate=100), duration=12), policy, slow)
    for one, time in ((policy, 6), (slow, 8)):
        assert [round(facts.time / 1e9) for facts in one.seen if facts.gone == (("n0-0", 0),)] == [time]
        assert all("n0-0" not in facts.vms for facts in one.seen if facts.time >= time * 10**9)


def test_what_can_not_be_done_is_told_to_the_policy_that_asked():
    refused = []

    class Asks(Scripted):
        def refused(self, action: Action, reason: str) -> None:
            refused.append(reason)

    script: dict[int, list[Action]] = {
        2: [
            orc.Pause(vm="nobody-7"),
            orc.Throttle(vm="n0-0", limit=Limit(rate=1), meter=Meter.EXITS),
            orc.Throttle(vm="n0-99", limit=Limit(rate=1)),
            orc.Unthrottle(vm="n0-99"),
        ]
    }
    world = play(fleet(Steady(rate=10), duration=4), Asks(script))
    assert refused == [
        "nobody-7: no such VM on this host",
        "only bus locks are simulated",
        "n0-99: no such VM on this host",
    ]
    assert world.tally.failed == 3


def test_each_hosts_guard_judges_as_live():
    refused = []

    class Asks(Scripted):
        def refused(self, action: Action, reason: str) -> None:
            refused.append(reason)

    def script(host: int) -> dict[int, list[Action]]:
        name = f"n0-{host}"
        return {
            2: [orc.Throttle(vm=name, limit=Limit(rate=1, burst=1, max_delay=None)), orc.Throttle(limit=Limit(rate=1))],
            4: [orc.Pause(vm=name), orc.Isolate(vm=name)],
            6: [Evict(vm=name)],
            20: [Evict(vm=name)],
        }

    asked = fleet(Steady(rate=1000), hosts=2, duration=30, guard=orc.Guard(floor=20, max_delay=5, vm_cool_down=10))
    hosts = iter([-1, 0, 1])  # the first is only looked at
    world = play(asked, lambda cpu: Asks(script(next(hosts))))
    assert sorted(refused) == sorted(
        2
        * [
            "cool-down: 0 of 10 s since the last one on this VM",
            "cool-down: 2 of 10 s since the last one on this VM",
        ]
    )
    assert world.made[2, 0] == pytest.approx(20 + 2, abs=3)  # type: ignore[attr-defined]  # set above
    limits = [deed.action.limit for deed in world.tally.deeds if isinstance(deed.action, orc.Throttle)]
    assert limits[:2] == [Limit(rate=20, burst=2, max_delay=5), Limit(rate=200, max_delay=5)]
    facts = world.tally.facts()["actions"]
    assert (facts["total"], facts["refused"], facts["kinds"]["Evict"]) == (8, 4, 2)


def test_what_was_refused_to_one_that_decides_once_is_asked_for_again_on_its_host():
    asked = fleet(Steady(rate=1000), hosts=2, duration=80, guard=orc.Guard(limits_per_minute=1))
    world = play(asked, lambda cpu: StaticLimits(tenants={"*": Limit(rate=500)}, host=Limit(rate=900)))
    told = [(deed.host, deed.action.tenant, deed.error is None) for deed in world.tally.deeds]
    for host in range(2):
        assert [done for on, _, done in told if on == host] == [True, *[False] * 6, True]


def test_a_pause_ends_after_the_most_it_may_last():
    policy = Scripted({3: [orc.Pause(vm="n0-0")]})
    world = play(fleet(Steady(rate=1000), duration=30, guard=orc.Guard(max_pause=10)), policy)
    rows = world.made[:, 0]  # type: ignore[attr-defined]  # set above
    assert rows[:3].min() > 800
    assert rows[3:14].sum() == 0
    assert rows[14:].min() > 800
    assert world.tally.deeds[-1].action.reason == "paused by policy scripted for more than 10 s"


def test_a_dry_run_is_no_matter_for_a_simulation():
    with pytest.raises(orc.SpecError, match=r"guard\.dry_run: True: a simulation does nothing to anybody"):
        fleet(guard=orc.Guard(dry_run=True))


def test_a_tighter_limit_of_another_policy_counts():
    one = Scripted({3: [orc.Throttle(vm="n0-0", limit=Limit(rate=500))]}, name="one")
    two = Scripted({3: [orc.Throttle(vm="n0-0", limit=Limit(rate=80))], 10: [orc.Unthrottle(vm="n0-0")]}, name="two")
    rows = play(fleet(Steady(rate=1000), duration=15), one, two).made
    assert rows[7, 0] == pytest.approx(80)
    assert rows[13, 0] == pytest.approx(500)


# ---- damage, and what the tally makes of it


@pytest.mark.parametrize(("cpu", "worst"), [("zen-2", 10), ("arrow-lake", 2), ("skylake", 2.11), ("alder-lake", 1.17)])
def test_victims_suffer_by_the_bus_time_taken_and_the_cpus_model(cpu, worst):
    world = play(fleet(Steady(rate=100_000), cpu=cpu, duration=30))
    share = world.locks[0] * 7000 / 2e9 / 30
    facts = world.tally.facts()
    assert facts["bus_share"]["mean"] == pytest.approx(share)
    assert facts["slowdown"]["mean"] == pytest.approx(1 + 0.3 * (worst - 1) * share, rel=1e-6)
    assert facts["slowdown"]["p50"] == pytest.approx(facts["slowdown"]["mean"], rel=0.013)


def test_skylake_slows_the_reference_victim_by_what_was_measured():
    world = play(fleet(Steady(rate=280_000), cpu="skylake", duration=10))
    speed = 1 / world.tally.facts()["slowdown"]["mean"]
    assert 1 - 0.34 < speed < 1 - 0.16


def test_a_bus_has_only_so_much_time():
    world = play(fleet(*[Steady(rate=200_000)] * 3, duration=10))
    assert world.locks.sum() == pytest.approx(10 * 2e9 / 7000)
    assert world.throttled.sum() == 0  # slow, but nobody made them wait


def test_time_to_detect_and_recover_are_those_of_the_policy():
    script: dict[int, list[Action]] = {
        34: [orc.Throttle(vm="n0-0", limit=Limit(rate=1000))],
        90: [orc.Unthrottle(vm="n0-0")],
    }
    asked = fleet(Steady(rate=50_000, start=30, stop=80), duration=120)
    facts = play(asked, Scripted(script)).tally.facts()
    assert facts["guilty"]["episodes"] == facts["guilty"]["vms"] == 1
    assert facts["time_to_detect"] == pytest.approx(
        {"count": 1, "mean": 4, "p50": 4, "p90": 4, "worst": 4, "missed": 0}
    )
    assert facts["time_to_recover"]["mean"] == pytest.approx(4)
    assert facts["time_to_release"]["mean"] == pytest.approx(10)
    assert facts["false_positives"]["actions"] == 0
    free = play(asked).tally.facts()
    assert free["time_to_detect"]["missed"] == 1
    assert free["time_to_recover"]["mean"] == pytest.approx(50)


def test_holding_an_innocent_is_a_false_positive():
    script: dict[int, list[Action]] = {10: [orc.Throttle(vm="n1-0", limit=Limit(rate=10))]}
    facts = play(fleet(Steady(rate=60_000), Steady(rate=100), duration=40), Scripted(script)).tally.facts()
    wrong = facts["false_positives"]
    assert (wrong["vms"], wrong["actions"]) == (1, 1)
    assert wrong["vm_seconds"] == 30
    assert wrong["throttled_seconds"] == pytest.approx(27, rel=0.03)


def test_fair_shares_make_jains_index_1_and_greed_does_not():
    asked = fleet(Steady(rate=100_000), Steady(rate=20_000), Steady(rate=2000), duration=60)
    free = play(asked).tally.facts()
    fair = play(asked, WeightedShare(Limit(rate=BUDGET), interval=1.0)).tally.facts()
    assert free["jain"] < 0.7
    assert fair["jain"] > 0.95
    assert free["guilty"]["locks_per_fair_lock"] > 5 > 1.2 > fair["guilty"]["locks_per_fair_lock"]


def test_the_adversary_gains_little_from_a_shared_budget_that_ticks_fast():
    asked = fleet(Adversarial(rate=100_000, on=1, off=5), duration=120, tick=0.1)
    held = play(asked, WeightedShare(Limit(rate=BUDGET)), ticks=1200)
    limit = BUDGET * 120 + BUDGET * 0.05
    # At most one tick of each burst goes by before it is held.
    assert held.locks[0] < limit


@pytest.mark.parametrize("tick", [0.25, 1.0])
def test_judging_does_not_depend_on_the_tick(tick):
    asked = fleet(Steady(rate=50_000, start=30, stop=80), Steady(rate=500), duration=120, tick=tick)
    facts = play(asked, StaticLimits(vms={"n0-*": Limit(rate=5000)}, interval=1.0)).tally.facts()
    assert facts["guilty"]["episodes"] == 1
    assert facts["time_to_detect"]["mean"] == pytest.approx(1, abs=0.3)
    assert facts["time_to_recover"]["mean"] == pytest.approx(1, abs=0.3)
    assert facts["false_positives"]["vms"] == 0


# ---- the same seed


BUSY = """
duration = 120
[[hosts]]
count = 20
cpu = "zen-5"
[[vms]]
name = "quiet"
count = 900
behaviour = { kind = "quiet", rate = 0.01 }
[[vms]]
name = "steady"
count = 20
behaviour = { kind = "steady", rate = 30_000, stagger = 60, spread = 0.3 }
[[vms]]
name = "bursty"
count = 20
behaviour = { kind = "bursty", rate = 30_000 }
[[vms]]
name = "diurnal"
count = 20
behaviour = { kind = "diurnal", rate = 3000, period = 60 }
[[vms]]
name = "evader"
count = 10
behaviour = { kind = "adversarial", rate = 60_000 }
[[policies]]
kind = "weighted-share"
limit = { bus_share = 0.05 }
interval = 1.0
"""


def test_the_same_seed_gives_the_same_run_bit_by_bit():
    def run(seed: int | None) -> str:
        whole = document(simulate(load_scenario(BUSY), seed=seed))
        del whole["cost"]
        return json.dumps(whole)

    assert run(None) == run(1)
    assert run(1) != run(2)


def test_guests_are_the_same_with_and_without_policies():
    result = simulate(load_scenario(BUSY))
    assert result.with_policies is not None
    ruled, free = result.with_policies.series["wanted"], result.without.series["wanted"]
    assert ruled[:4] == free[:4]
    assert ruled[4] != free[4]  # the evader learns


def test_progress_is_told_and_may_end_it():
    told = []
    simulate(load_scenario(BUSY), progress=lambda *row: told.append(row))
    assert told[0] == ("with policies", 0, 120)
    assert told[-1] == ("without policies", 120, 120)

    def stop(label: str, done: int, of: int) -> None:
        if done >= 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(load_scenario(BUSY), progress=stop)


@pytest.mark.parametrize("placement", list(Placement))
def test_hosts_are_about_equally_full(placement):
    asked = attrs.evolve(load_scenario(BUSY), placement=placement, budget=Budget(bus_share=0.1))
    layout = Layout(asked, 1)
    full = np.bincount(layout.host, minlength=20)
    assert full.min() >= 48
    assert full.max() <= 50 if placement is not Placement.SPREAD else 52
    names = [layout.name(vm) for vm in (0, 899, 900, 969)]
    assert names == ["quiet-0", "quiet-899", "steady-0", "evader-9"]
    assert [layout.number(name, int(layout.host[vm])) for vm, name in zip((0, 899, 900, 969), names, strict=True)] == [
        0, 899, 900, 969,
    ]  # fmt: skip
    assert layout.number("steady-00", int(layout.host[900])) is None
