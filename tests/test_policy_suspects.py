"""Who slows a VM: the one it truly depends on is named, and nobody more often than is said where nobody is to blame."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings, strategies as st

import orchestra as orc
from journals import vm
from orchestra.policy.suspects import CHANCE, FEWEST, LEAST, Past, Suspicion, suspects

Maker = Callable[[random.Random, int], list[float]]


def noise(chance: random.Random, n: int) -> list[float]:
    return [chance.random() for _ in range(n)]


def slow(chance: random.Random, n: int) -> list[float]:
    """It goes on as it was, for the most part."""
    values = [0.0]
    while len(values) < n:
        values.append(0.9 * values[-1] + chance.gauss(0, 1))
    return _upward(values)


def wandering(chance: random.Random, n: int) -> list[float]:
    values = [0.0]
    while len(values) < n:
        values.append(values[-1] + chance.gauss(0, 1))
    return _upward(values)


def storms(chance: random.Random, n: int) -> list[float]:
    """On and off, for some time each."""
    on, values = False, []
    for _ in range(n):
        on = on != (chance.random() < 0.07)
        values.append(on + 0.01 * chance.random())
    return values


def one_storm(chance: random.Random, n: int) -> list[float]:
    begin = chance.randrange(n - 5)
    end = begin + chance.randrange(5, n)
    return [(begin <= i < end) + 0.1 * chance.random() for i in range(n)]


def spikes(chance: random.Random, n: int) -> list[float]:
    return [(chance.random() < 0.04) * (1 + chance.random()) + 0.01 * chance.random() for _ in range(n)]


def rising(chance: random.Random, n: int) -> list[float]:
    slope = chance.uniform(-1, 1)
    return _upward([slope * i + chance.gauss(0, 3) for i in range(n)])


def clockwork(chance: random.Random, n: int) -> list[float]:
    """Always after the same time."""
    phase = chance.randrange(12)
    return [((i + phase) % 12 == 0) + 0.01 * chance.random() for i in range(n)]


MAKERS: Sequence[Maker] = (noise, slow, wandering, storms, one_storm, spikes, rising, clockwork)


def _upward(values: list[float]) -> list[float]:
    least = min(values)
    return [value - least for value in values]


def normal(values: list[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / spread for value in values]


def seen(delays: Sequence[float], others: dict[str, list[float]], **more: list[float]) -> Suspicion:
    """A victim that waits so much, and others that do so many locks in each window of 5 s."""
    past = Past("victim")
    least, most = min(delays), max(delays)
    for i, delay in enumerate(delays):
        part = 0.1 + 0.8 * ((delay - least) / (most - least) if most > least else 0.0)
        vms = {name: vm(name, 1000 * values[i], cpu=1.0) for name, values in others.items()}
        facts = {name: values[i] for name, values in more.items()}
        vms["victim"] = vm("victim", 0, cpu=5 * (1 - part), run_delay=5 * part, **facts)
        past.add(5.0, vms, orc.HostFacts())
    return past.suspicion()


@pytest.mark.parametrize("made", [noise, slow, wandering, storms, one_storm, spikes], ids=lambda made: made.__name__)
def test_a_victim_that_depends_on_one_of_many_names_that_one(made):
    right = wrong = 0
    for seed in range(20):
        chance = random.Random(seed)
        others = {f"vm-{i}": made(chance, 120) for i in range(6)}
        harm, rest = normal(others["vm-3"]), normal(noise(chance, 120))
        found = seen([3 * one + other for one, other in zip(harm, rest, strict=True)], others)
        names = [one.vm for one in found.named("run_delay")]
        right += names[:1] == ["vm-3"]
        wrong += any(name != "vm-3" for name in names)
    assert right >= 19
    assert wrong <= 2


@pytest.mark.parametrize("victim", MAKERS, ids=lambda made: made.__name__)
def test_where_nobody_is_to_blame_nobody_is_named_more_often_than_is_said(victim):
    named = tries = 0
    for made in MAKERS:
        for seed in range(9):
            chance = random.Random(f"{victim.__name__} {made.__name__} {seed}")
            delays = victim(chance, 60)
            found = seen(delays, {f"vm-{i}": made(chance, 60) for i in range(4)})
            assert found.suspects
            named += any(one.named for one in found.suspects)
            tries += 1
    assert named <= CHANCE * tries


@pytest.mark.parametrize("made", [slow, storms], ids=lambda made: made.__name__)
def test_many_suspects_make_nobody_more_suspect(made):
    named = tempting = 0
    for seed in range(60):
        chance = random.Random(seed)
        delays = made(chance, 40)
        found = seen(delays, {f"vm-{i}": made(chance, 40) for i in range(24)})
        tempting += any(one.correlation >= LEAST for one in found.suspects)
        named += any(one.named for one in found.suspects)
    assert named <= CHANCE * 60
    assert tempting > 30


def test_what_everybody_would_call_proof_is_none_if_both_only_go_on_as_they_began():
    up = [float(i) + 0.01 * (i % 3) for i in range(100)]
    found = seen(up, {"riser": [2 * value + 0.01 * (i % 7) for i, value in enumerate(up)]})
    (one,) = found.suspects
    assert one.correlation > 0.99
    assert not one.named


def test_less_work_done_is_harm_and_more_waiting_is_harm():
    chance = random.Random(1)
    locks = storms(chance, 100)
    slower = [100 - 50 * value + chance.random() for value in locks]
    (one,) = seen(noise(chance, 100), {"loud": locks}, work=slower).named("work")
    assert (one.vm, one.activity) == ("loud", "bus_locks")
    assert one.correlation > 0.9
    better = [100 + 50 * value + chance.random() for value in locks]
    assert not seen(noise(chance, 100), {"loud": locks}, work=better).named("work")


def test_windows_in_which_the_victim_was_held_say_nothing_of_its_work():
    chance = random.Random(2)
    locks = storms(chance, 100)
    held = [5.0 * (value > 0.5) for value in locks]
    work = [100.0 * (not wait) + chance.random() for wait in held]
    assert not seen(noise(chance, 100), {"loud": locks}, work=work, throttled=held).named("work")


def test_two_that_act_together_are_both_named():
    chance = random.Random(4)
    locks = storms(chance, 120)
    found = seen(
        locks, {"one": locks, "other": [value + 0.01 * chance.random() for value in locks], "third": noise(chance, 120)}
    )
    assert {one.vm for one in found.named("run_delay")} == {"one", "other"}


def test_facts_that_were_kept_tell_who():
    chance = random.Random(6)
    kept = []
    for i in range(60):
        loud = 5000 * (chance.random() < 0.3)
        vms = {"web": vm("web", 0, cpu=0.5, run_delay=0.001 * loud), "loud": vm("loud", loud, cpu=0.2 + 1e-4 * loud)}
        kept.append(orc.Facts(i * 10**9, 1.0, None, None, {}, vms, orc.HostFacts(lock_ns=14.0 + 0.01 * loud)))
    found = suspects("web", kept)
    assert (found.windows, found.seconds, found.asked) == (60, 1.0, 1)
    assert [one.vm for one in found.named("run_delay")] == ["loud"]
    assert [one.vm for one in found.named("lock_ns")] == ["loud"]
    assert not [one for one in found.suspects if one.vm == "web" and one.signal == "run_delay"]


def test_too_little_is_told_as_nothing():
    chance = random.Random(7)
    assert seen(noise(chance, FEWEST - 1), {"a": noise(chance, FEWEST - 1)}).suspects == ()
    assert seen([0.0] * 50, {"a": noise(chance, 50)}).suspects == ()
    assert seen(noise(chance, 50), {"a": [0.3] * 50}).suspects == ()
    assert Past("nobody").suspicion() == Suspicion("nobody", 0, 0.0, 0, ())


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(*[st.floats(0, 1e300) | st.sampled_from([0.0, 1.0, 5.0])] * 3), min_size=FEWEST, max_size=2 * FEWEST
    )
)
def test_whatever_was_seen_the_figures_are_figures(values):
    past = Past("victim")
    for locks, delay, work in values:
        seen_vm = vm("victim", 0, cpu=1.0, run_delay=delay, work=work)
        past.add(1.0, {"victim": seen_vm, "a": vm("a", min(locks, 1e15), cpu=locks)}, orc.HostFacts(lock_ns=work))
    for one in past.suspicion().suspects:
        assert -1.001 <= one.correlation <= 1.001
        assert 0 < one.chance <= 1
        assert one.named == (one.correlation >= LEAST and one.chance <= CHANCE)
