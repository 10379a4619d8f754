"""Scenario files: what they say, and that every mistake is told at once, with its line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestra.policy import CPU_MODELS, Facts, Guard, Ladder, Only, VmFacts, WeightedShare
from orchestra.simulate import CPUS, load_scenario, read_scenario
from orchestra.simulate.behaviours import Bursty, Quiet
from orchestra.simulate.policies import PolicySpec, QemuWindow, kinds, maker
from orchestra.simulate.scenario import Placement
from orchestra.toml import TomlError

GOOD = """
duration = 60
tick = 0.5
placement = "packed"

[budget]
bus_share = 0.1

[cpus.mine]
worst = 4.0

[[hosts]]
count = 2
cpu = "mine"
limit = { bus_share = 0.5, burst = 10 }

[[tenants]]
name = "acme"
weight = 2
limit = { rate = 100 }

[[vms]]
name = "calm"
count = 8
behaviour = "quiet"
tenants = 2

[[vms]]
name = "noisy"
count = 2
tenant = "acme"
behaviour = { kind = "bursty", rate = 1000, on = 1, off = 2 }

[[policies]]
kind = "weighted-share"
limit = { bus_share = 0.05, max_delay = 1.0 }

[[policies]]
kind = "ladder"
over = { bus_share = 0.05 }
interval = 1.0
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(TomlError) as caught:
        load_scenario(text)
    return [str(mistake) for mistake in caught.value.mistakes]


def test_a_scenario_says_what_is_there():
    scenario = load_scenario(GOOD)
    assert scenario.size == 10
    assert scenario.ticks == 120
    assert scenario.placement is Placement.PACKED
    assert isinstance(scenario.vms[0].behaviour, Quiet)
    assert scenario.vms[1].behaviour == Bursty(rate=1000, on=1, off=2)
    assert scenario.cpu_of(scenario.hosts[0]).worst == 4.0
    assert scenario.hosts[0].limit is not None
    assert scenario.hosts[0].limit.on(CPUS["zen-2"]).rate == pytest.approx(0.5 * 2e9 / 7000)


def test_the_guard_is_the_one_that_judges_live():
    assert load_scenario(GOOD).guard.floor == Guard().floor
    scenario = load_scenario(GOOD + "[guard]\nfloor = 5\nactions_per_minute = 'none'")
    assert (scenario.guard.floor, scenario.guard.actions_per_minute) == (5, None)
    found = mistakes(GOOD + "[guard]\nfloor = -5\ncool_down = 3")
    assert [mistake.split(": ")[1] for mistake in found] == ["guard.floor", "guard.cool_down"]
    (dry,) = mistakes(GOOD + "[guard]\ndry_run = true")
    assert "guard.dry_run: True: a simulation does nothing to anybody" in dry


def test_policies_are_made_of_the_classes_that_run_live():
    share, ladder = (maker(policy)(CPUS["skylake"]) for policy in load_scenario(GOOD).policies)
    assert type(share) is WeightedShare
    assert type(ladder) is Ladder
    assert share.interval == 0.1


def test_each_kind_of_policy_can_be_named():
    assert {"static-limits", "weighted-share", "adaptive", "ladder", "burst-credits", "bus-time"} <= set(kinds())
    assert "only" not in kinds()  # it makes one policy out of another


def test_a_ladders_steps_can_be_given():
    steps = [
        {"rung": "warn", "when": {"signal": "bus_locks", "over": 500}},
        {"rung": "throttle", "when": [{"signal": "bus_locks", "over": 500}], "dwell": 2, "limit": {"rate": 100}},
    ]
    made = maker(PolicySpec("ladder", {"steps": steps}))(CPUS["zen-2"])
    assert isinstance(made, Ladder)
    assert made.steps[1].limit is not None
    assert made.steps[1].limit.rate == 100
    again = maker(PolicySpec("ladder", {"steps": steps}))(CPUS["zen-2"])  # it takes nothing out of what it is given
    assert isinstance(again, Ladder)
    assert again.steps == made.steps


def test_policies_are_read_as_in_a_file_of_rules():
    spec = PolicySpec(
        "ladder", {"over": {"bus_share": 0.1}, "meter": "bus_locks", "only": {"vms": "web-*"}, "name": "webs"}
    )
    made = maker(spec)(CPUS["zen-2"])
    assert isinstance(made, Only)
    assert (made.name, made.vms) == ("webs", ("web-*",))
    assert isinstance(made.policy, Ladder)
    assert made.policy.steps[0].when[0].over == pytest.approx(0.1 * 2e9 / 7000)
    free = maker(PolicySpec("weighted-share", {"limit": {"bus_share": 0.1, "max_delay": "none"}}))(CPUS["zen-2"])
    assert isinstance(free, WeightedShare)
    assert free.decide(Facts(1, 1.0, None, None, {}, {})) == []


def test_each_host_has_a_policy_of_its_own():
    make = maker(PolicySpec("weighted-share", {"limit": {"bus_share": 0.1}}))
    one, other = make(CPUS["zen-2"]), make(CPUS["zen-2"])
    vm = VmFacts("a", "t", 1.0, 1, 100_000, 100_000, 0.0)
    for policy in (one, other):  # what the first remembers is no matter of the second
        assert [action.vm for action in policy.decide(Facts(1, 1.0, None, None, {}, {"a": vm}))] == ["a"]


def test_one_table_of_cpus_serves_budgets_and_simulations():
    assert set(CPUS) == set(CPU_MODELS)
    for name, cpu in CPUS.items():
        model = CPU_MODELS[name]
        assert (cpu.cycles, cpu.worst, cpu.about) == (model.cycles, model.worst, model.source)


def test_qemus_window_is_no_policy():
    assert maker(PolicySpec("qemu-window", {"rate": 100}))(CPUS["zen-2"]) == QemuWindow(rate=100)


BAD = """duration = "long"
tick = 1
sed = 5

[budget]
bus_share = 7.0

[[hosts]]
count = 2.5
cpu = "zen2"

[[vms]]
name = "calm one"
behaviour = "calm"

[[vms]]
name = "noisy"
count = true
behaviour = { kind = "bursty", rate = 1000, of = 2 }
limit = { rate = 5, bus_share = 0.1 }
"""


def test_every_mistake_is_told_at_once_with_its_line_and_key():
    found = mistakes(BAD)
    for line, key, text in [
        (1, "duration", "must be a number"),
        (3, "sed", "no such key; there are: name, about, duration"),
        (6, "budget.bus_share", "7.0: must be from 1e-09 to 1"),
        (9, "hosts[0].count", "2.5: must be a whole number"),
        (14, "vms[0].behaviour.kind", "'calm': must be one of adversarial, bursty, diurnal"),
        (12, "vms[0].count", "is missing"),
        (18, "vms[1].count", "true: must be a whole number"),
        (19, "vms[1].behaviour.of", "no such key"),
        (20, "vms[1].limit", "a limit has either rate or bus_share"),
    ]:
        hit = [one for one in found if key in one and text in one]
        assert hit, (key, found)
        assert hit[0].startswith(f"line {line}: ") or key == "budget", hit
    assert len(found) == 9


def test_what_does_not_go_together_is_told_at_once_too():
    text = """
duration = 0.5
seed = -1
[[hosts]]
count = 1
cpu = "z80"
[[vms]]
name = "a"
count = 1
[[vms]]
name = "a"
count = 1
[[policies]]
kind = "weighted-share"
headrom = 1
[[policies]]
kind = "static"
[[policies]]
kind = "adaptive"
floor = -3
[[policies]]
kind = "burst-credits"
baseline = 5
[[policies]]
kind = "bus-time"
share = 0.1
[[policies]]
kind = "bus-time"
share = 0.2
"""
    found = mistakes(text)
    for line, part in [
        (2, "duration: 0.5: must be at least a tick (1 s)"),
        (3, "seed: -1: must be 0 or more"),
        (6, "hosts[0].cpu: 'z80': no such CPU model; there are: alder-lake"),
        (11, "vms[1].name: 'a': another has that name"),
        (15, "policies[0].headrom: no such key; there are: limit"),
        (17, "policies[1].kind: 'static': no such policy; there are: adaptive"),
        (20, "policies[2].floor: -3"),
        (21, "policies[3].most: is missing"),
        (27, "policies[5]: 'bus-time': another policy has that name"),
    ]:
        hit = [one for one in found if part in one]
        assert hit, (part, found)
        assert hit[0].startswith(f"line {line}: "), hit
    assert len(found) == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("duration =\n", "line 1: Invalid value"),
        ("duration = 5\nhosts = 3\nvms = []", "hosts: 3: must be an array"),
        ("duration = 5\n[[hosts]]\ncount = 1", "vms: is missing"),
        ('duration = 5\nhosts = [1]\n[[vms]]\nname="a"\ncount=1', "hosts[0]: 1: must be a table"),
        ("duration = 5\n[[hosts]]\ncount = 1\n[[vms]]\nname='a'\ncount=1\nbehaviour=5", "vms[0].behaviour"),
        ("duration = 5\nvms = []\n[[hosts]]\ncount = 1", "vms: needs at least one table"),
    ],
)
def test_other_mistakes_are_told_in_the_files_own_words(text, said):
    assert any(said in mistake for mistake in mistakes(text)), mistakes(text)


def test_a_file_that_is_no_text_is_told(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TomlError, match="is not UTF-8"):
        read_scenario(path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "examples" / "scenarios").glob("*.toml")))
def test_example_scenarios_can_be_read(path):
    scenario = read_scenario(path)
    assert scenario.about
    for policy in scenario.policies:
        maker(policy)(scenario.cpu_of(scenario.hosts[0]))
