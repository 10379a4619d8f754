"""Ladder: up when the step before did not help, back when it is over; one step at a time, and never to and fro."""

from __future__ import annotations

import itertools

import attrs
import pytest
from hypothesis import example, given, settings, strategies as st

from closed_loop import SECOND, Guest, World, during, steady
from orchestra.model.actions import (
    Action,
    CapCpu,
    Evict,
    Isolate,
    Pause,
    Rejoin,
    Resume,
    Stop,
    Throttle,
    Unthrottle,
    Warn,
)
from orchestra.model.errors import SpecError
from orchestra.model.spec import Limit, Meter
from orchestra.policy import Condition, Facts, Guard, HostFacts, Ladder, Policy, Rung, Step, VmFacts, default_steps
from orchestra.policy.standing import PATIENCE

TICK = 0.1
BAD = Condition("bus_locks", 100)
STEPS = (
    Step(rung="warn", when=BAD, clear=2),
    Step(rung="throttle", when=BAD, dwell=0.5, clear=2, limit=Limit(rate=50, max_delay=1.0)),
    Step(rung="cap_cpu", when=BAD, dwell=1, clear=2, cpu=0.5),
    Step(rung="isolate", when=BAD, dwell=1, clear=2),
    Step(rung="pause", when=BAD, dwell=1, clear=3),
    Step(rung="evict", dwell=1, clear=5, returns=3),
    Step(rung="stop", dwell=2, clear=50, returns=2),
)


class Stairs:
    """A ladder and one VM that does what it is told to, whatever is done about it: `rates` is the world."""

    def __init__(self, ladder: Ladder, name: str = "a", meter: Meter = Meter.BUS_LOCKS) -> None:
        self.ladder, self.name, self.meter, self.now = ladder, name, meter, 0.0
        self.actions: list[tuple[float, Action]] = []
        self.rungs: list[Rung] = []

    def tick(
        self, rate: float = 0.0, generation: int = 1, others: tuple[VmFacts, ...] = (), **more: object
    ) -> list[Action]:
        self.now += TICK
        host = more.pop("host", HostFacts())
        vms = {vm.name: vm for vm in others}
        if rate or more:
            count = round(rate * TICK)
            vm = VmFacts(self.name, "default", 1.0, 1, count, count, 0.0, generation)
            vms[self.name] = attrs.evolve(vm, **more)  # type: ignore[arg-type]  # passed through
        told = self.ladder.decide(Facts(round(self.now * SECOND), TICK, None, None, {}, vms, host))  # type: ignore[arg-type]  # checked above
        self.actions += [(self.now, action) for action in told]
        self.rungs.append(self.ladder.rung(self.name))
        return told

    def run(self, seconds: float, rate: float = 0.0, **more: object) -> list[Action]:
        return [action for _ in range(round(seconds / TICK)) for action in self.tick(rate, **more)]  # type: ignore[arg-type]  # passed through

    def climb(self, rung: str) -> None:
        """Be bad until it is there."""
        while self.rungs[-1:] != [Rung(rung)]:
            self.tick(500)


def test_it_is_a_policy():
    assert isinstance(Ladder(), Policy)
    assert (Ladder().name, Ladder(meter="exits").name) == ("ladder", "ladder-exits")


def test_the_first_step_is_taken_in_the_first_bad_tick():
    stairs = Stairs(Ladder(STEPS))
    stairs.run(3, 90)
    (warning,) = stairs.tick(110)
    assert isinstance(warning, Warn)
    assert warning.reason == "warn: bus_locks 110 over 100, for 0.1 s"


def test_each_step_comes_after_its_time_and_in_order():
    stairs = Stairs(Ladder(STEPS))
    stairs.run(4, 500)
    assert [(round(time, 1), type(action)) for time, action in stairs.actions] == [
        (0.1, Warn),
        (0.6, Throttle),
        (1.6, CapCpu),
        (2.6, Isolate),
        (3.6, Pause),
    ]


def test_the_way_back_is_one_step_at_a_time_and_undoes_each():
    stairs = Stairs(Ladder(STEPS))
    stairs.climb("pause")
    up = stairs.now
    back = stairs.run(30)
    assert [type(action) for action in back] == [Resume, Rejoin, CapCpu, Unthrottle]
    assert [round(time - up, 1) for time, action in stairs.actions if action in back] == [3, 5, 7, 9]
    assert back[2].share is None
    assert back[0].reason == "back to isolate: 3 s in the clear"
    assert stairs.rungs[-1] is Rung.OBSERVE


def test_a_vm_that_presses_against_its_throttle_stays_where_it_is():
    world = World(Ladder(STEPS), [Guest("a", during(1000, (0, 20)))]).run(20)
    assert [type(action) for _, action in world.actions] == [Warn, Throttle]
    assert world.rate("a", 5) == pytest.approx(50, rel=0.05)
    world.run(10)
    assert [type(action) for _, action in world.actions] == [Warn, Throttle, Unthrottle]


def test_waiting_for_somebody_elses_limit_is_not_pressing():
    stairs = Stairs(Ladder(STEPS[:2]))
    stairs.climb("throttle")
    stairs.run(3, 10, throttled=0.09)
    assert stairs.rungs[-1] is Rung.THROTTLE  # 10/s and the two that a tick may be off by could be 50/s
    slow = Stairs(Ladder([STEPS[0], attrs.evolve(STEPS[1], limit=Limit(rate=90))]))
    slow.climb("throttle")
    slow.run(3, 20, throttled=0.09)
    assert slow.rungs[-1] is Rung.WARN


def test_silence_behind_a_slow_throttle_is_not_rest():
    slow = Limit(rate=0.5, max_delay=None)
    stairs = Stairs(Ladder([STEPS[0], attrs.evolve(STEPS[1], limit=slow, clear=0.5)]))
    stairs.climb("throttle")
    stairs.run(4.2)
    assert stairs.rungs[-1] is Rung.THROTTLE
    stairs.run(0.6)
    assert stairs.rungs[-1] is Rung.WARN


def test_what_a_cap_took_is_reckoned_with():
    stairs = Stairs(Ladder(STEPS))
    stairs.climb("cap_cpu")
    stairs.run(5, 40, capped=0.05)  # without the cap it would be 80
    assert stairs.rungs[-1] is Rung.CAP_CPU
    stairs.run(3, 20, capped=0.05)
    assert stairs.rungs[-1] is Rung.THROTTLE


def test_a_relapse_is_answered_at_once_and_asks_for_twice_the_time():
    stairs = Stairs(Ladder(STEPS))
    stairs.climb("cap_cpu")
    stairs.run(2)
    assert stairs.rungs[-1] is Rung.THROTTLE
    (again,) = stairs.tick(500)
    assert isinstance(again, CapCpu)
    assert "a relapse on probation" in again.reason
    assert (again.evidence["relapses"], again.evidence["times"]) == (1, 2)
    stairs.run(3.9)
    assert stairs.rungs[-1] is Rung.CAP_CPU
    stairs.run(0.2)
    assert stairs.rungs[-1] is Rung.THROTTLE


def test_after_probation_the_full_time_is_asked_for_again():
    stairs = Stairs(Ladder([STEPS[0], attrs.evolve(STEPS[1], probation=0.5)]))
    stairs.climb("throttle")
    stairs.run(2)
    assert stairs.rungs[-1] is Rung.WARN
    stairs.run(0.6)
    assert stairs.tick(500) == []
    assert len(stairs.run(0.5, 500)) == 1


def test_between_the_thresholds_nothing_moves():
    stairs = Stairs(Ladder(STEPS))
    stairs.climb("throttle")
    assert stairs.run(60, 80) == []


def test_a_third_pause_is_followed_by_eviction_and_a_second_eviction_by_a_stop():
    stairs = Stairs(Ladder(STEPS))

    def paused_again() -> list[Action]:
        stairs.climb("pause")
        # paused, it does nothing; let go, it starts again
        return [action for _ in range(2000) if stairs.rungs[-1] is not Rung.ISOLATE for action in stairs.tick()]

    assert [type(action) for action in paused_again()] == [Resume]
    assert [type(action) for action in paused_again()] == [Resume]
    third = paused_again()
    assert [type(action) for action in third] == [Evict, Resume]
    assert third[0].reason == "evict: pause for the 3. time, for 1 s"
    assert [type(action) for action in paused_again()] == [Evict, Stop]
    assert stairs.rungs[-1] is Rung.OBSERVE  # it is gone, and so is what was known of it


def test_who_is_let_go_by_somebody_else_is_not_taken_for_paused():
    stairs = Stairs(Ladder(STEPS))
    stairs.climb("pause")
    assert stairs.run(0.2, 20) == []
    assert stairs.rungs[-1] is Rung.PAUSE  # the tick of the pause still tells of the time before
    stairs.run(0.1, 20)
    assert stairs.rungs[-1] is Rung.ISOLATE
    assert len(stairs.run(0.9, 500)) == 0  # no probation: whoever did it knows why
    assert len(stairs.run(0.1, 500)) == 1


def test_another_vm_of_the_name_starts_at_the_bottom():
    stairs = Stairs(Ladder(STEPS))
    stairs.climb("isolate")
    (action,) = stairs.tick(500, generation=2)
    assert isinstance(action, Warn)
    assert action.evidence["generation"] == 2


def test_a_step_that_was_refused_was_not_taken():
    ladder = Ladder(STEPS)
    stairs = Stairs(ladder)
    stairs.climb("throttle")
    ladder.refused(stairs.actions[-1][1], "no")
    assert ladder.rung("a") is Rung.WARN
    assert len(stairs.run(0.4, 500)) == 0
    (again,) = stairs.run(0.1, 500)
    assert isinstance(again, Throttle)


def test_a_way_back_that_was_refused_is_tried_again():
    ladder = Ladder(STEPS)
    stairs = Stairs(ladder)
    stairs.climb("isolate")
    (back,) = stairs.run(2)
    ladder.refused(back, "another holds it")
    assert ladder.rung("a") is Rung.ISOLATE
    assert [type(action) for action in stairs.run(2)] == [Rejoin]


@pytest.mark.parametrize("action", [Warn(vm="b"), Pause(vm="a"), Resume(vm="a")])
def test_what_is_not_its_last_action_can_not_be_refused(action):
    ladder = Ladder(STEPS)
    stairs = Stairs(ladder)
    stairs.climb("throttle")
    ladder.refused(action, "no")
    stairs.run(2)
    ladder.refused(action, "no")
    assert ladder.rung("a") is Rung.WARN


def test_a_guards_cool_down_makes_it_wait_and_not_skip():
    guard = Guard(vm_cool_down=3, host_cool_down=0)
    steps = [*STEPS[:2], *STEPS[3:6]]
    world = World(
        Ladder([attrs.evolve(step, when=Condition("cpu_pressure", 0.5)) if step.when else step for step in steps]),
        [Guest("a", steady(200))],
        host=lambda total: HostFacts(cpu_pressure=1.0 if total else 0.0),
        guard=guard,
    ).run(20)
    hard = [(time, type(action)) for time, action in world.actions if isinstance(action, Isolate | Pause | Evict)]
    assert [kind for _, kind in hard][:2] == [Isolate, Pause]
    assert all(later - earlier > 2.99 for (earlier, _), (later, _) in itertools.pairwise(hard))


# ---- conditions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "over", "bad", "good"),
    [
        ("exits", 100, {"exits": 20}, {"exits": 9}),
        ("cpu", 0.5, {"cpu": 0.16, "vcpus": 2}, {"cpu": 0.09, "vcpus": 2}),
        ("share", 0.5, {"bus_locks": 31}, {"bus_locks": 30}),
        ("cpu_pressure", 0.5, {"host": HostFacts(cpu_pressure=0.6)}, {"host": HostFacts(cpu_pressure=0.4)}),
        ("lock_ns", 50, {"host": HostFacts(lock_ns=51)}, {"host": HostFacts()}),
    ],
)
def test_signals_are_what_they_say(signal, over, bad, good):
    other = VmFacts("b", "default", 1.0, 1, 30, 1, 0.0)
    for more, expected in ((bad, True), (good, False)):
        stairs = Stairs(Ladder([Step(rung="warn", when=Condition(signal, over))]))
        assert bool(stairs.tick(10, others=(other,), **more)) is expected, more


def test_a_victim_is_always_another():
    steps = [Step(rung="warn", when=(BAD, Condition("run_delay", 0.3)))]
    complains = VmFacts("b", "default", 1.0, 1, 0, 5, 0.0, cpu=0.02, run_delay=0.08)
    fine = attrs.evolve(complains, run_delay=0.001)
    assert len(Stairs(Ladder(steps)).tick(500, others=(complains,))) == 1
    assert Stairs(Ladder(steps)).tick(500, others=(fine,), cpu=0.02, run_delay=0.08) == []


def test_all_conditions_must_hold_to_go_up_and_one_in_the_clear_is_enough_to_go_down():
    both = (BAD, Condition("cpu_pressure", 0.5, clear=0.2))
    stairs = Stairs(Ladder([Step(rung="warn", when=both, clear=1)]))
    stress, ease = HostFacts(cpu_pressure=0.9), HostFacts(cpu_pressure=0.1)
    assert stairs.run(1, 500, host=ease) == []
    assert len(stairs.run(1, 500, host=stress)) == 1
    stairs.run(1, 500, host=ease)
    assert stairs.rungs[-1] is Rung.OBSERVE


def test_what_can_not_be_told_is_no_reason_to_go_up_or_to_stay():
    steps = [Step(rung="warn", when=Condition("memory_slowdown", 2), clear=1)]
    stairs = Stairs(Ladder(steps))
    for _ in range(10):
        stairs.tick(500, host=HostFacts(memory_ns=80))
    assert stairs.tick(500) == []
    (warning,) = stairs.tick(500, host=HostFacts(memory_ns=200))
    assert warning.evidence["memory_slowdown"] == 2.5
    stairs.run(1, 500)
    assert stairs.rungs[-1] is Rung.OBSERVE
    assert Stairs(Ladder(STEPS)).tick(500, bus_locks=None) == []


# ---- as data ------------------------------------------------------------------------------------------------------


def test_the_default_ladder_ends_before_it_stops_anybody():
    assert [step.rung for step in Ladder().steps] == [
        r
        for r in Rung
        if r not in (Rung.OBSERVE, Rung.SET_MEMORY, Rung.STOP)  # not every VM has a balloon
    ]
    assert default_steps(highest="throttle")[-1].limit == Limit(rate=500, max_delay=1.0)
    assert default_steps(highest=Rung.STOP)[-1].rung is Rung.STOP
    assert Ladder(default_steps(meter="exits"), meter="exits").steps[0].when == (Condition("exits", 1000),)


def test_the_default_ladder_holds_a_storm_with_a_throttle_and_lets_go():
    world = World(Ladder(), [Guest("a", during(3000, (1, 5))), Guest("b", steady(200))]).run(30)
    assert [(round(time, 1), type(action)) for time, action in world.actions] == [
        (1.1, Warn),
        (2.1, Throttle),
        (pytest.approx(15, abs=0.5), Unthrottle),
    ]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Step(rung="observe", when=BAD), "where each VM starts"),
        (lambda: Step(rung="shout", when=BAD), "shout"),
        (lambda: Step(rung="throttle", when=BAD), "needs a Limit"),
        (lambda: Step(rung="warn", when=BAD, limit=Limit(rate=1)), "nothing else has one"),
        (lambda: Step(rung="cap_cpu", when=BAD), "cpu=None"),
        (lambda: Step(rung="cap_cpu", when=BAD, cpu=2), "cpu=2"),
        (lambda: Step(rung="pause", when=BAD, cpu=0.5), "nothing else has one"),
        (lambda: Step(rung="warn", when=BAD, dwell=-1), "dwell=-1"),
        (lambda: Step(rung="warn", when=BAD, clear=0), "clear=0"),
        (lambda: Step(rung="warn", when=BAD, probation=-1), "probation=-1"),
        (lambda: Step(rung="warn", when=BAD, returns=-1), "returns=-1"),
        (lambda: Condition("noise", 1), "signal='noise'"),
        (lambda: Condition("bus_locks", 0), "over=0"),
        (lambda: Condition("lock_slowdown", 1), "over=1"),
        (lambda: Condition("bus_locks", 10, clear=11), "clear=11"),
        (lambda: Ladder([]), "in the order"),
        (lambda: Ladder([STEPS[1], STEPS[0]]), "in the order"),
        (lambda: Ladder([STEPS[0], STEPS[0]]), "at most once"),
        (lambda: Ladder([Step(rung="warn")]), "first step needs a condition"),
        (lambda: Ladder([Step(rung="warn", when=Condition("bus_locks", 49))]), "5 events in a tick"),
        (lambda: Ladder([*STEPS[:1], Step(rung="evict", dwell=20)]), "never taken"),
        (lambda: Ladder([attrs.evolve(STEPS[1], limit=Limit(rate=100)), STEPS[2]]), "keeps to its throttle"),
        (lambda: Ladder(interval=0), "interval=0"),
    ],
)
def test_bad_ladders_are_named(make, named):
    with pytest.raises((SpecError, ValueError), match=named):
        make()


# ---- whatever the load does ---------------------------------------------------------------------------------------

LOAD = st.lists(st.tuples(st.sampled_from([0, 40, 70, 120, 1000]), st.integers(1, 60)), min_size=1, max_size=25)


def check(stairs: Stairs, start: float = 0.0) -> None:
    """Neither skips a step nor flaps."""
    order = [Rung.OBSERVE, *(step.rung for step in stairs.ladder.steps)]
    gone = False
    for (before, after), n in zip(itertools.pairwise([Rung.OBSERVE, *stairs.rungs]), itertools.count(), strict=False):
        gone = before is Rung.STOP and after is Rung.OBSERVE
        assert gone or abs(order.index(after) - order.index(before)) <= 1, (n, before, after)
    # No step down before its time in the clear has passed since the last move, so up and down can't alternate faster.
    clear = {step.rung: step.clear for step in stairs.ladder.steps}
    moves = [
        (n * TICK, order.index(after) - order.index(before), before)
        for n, (before, after) in enumerate(itertools.pairwise(stairs.rungs))
        if before is not after
    ]
    for (earlier, _, _), (later, way, left) in itertools.pairwise(moves):
        if way < 0:
            assert later - earlier >= clear[left] - TICK - 1e-6


@settings(max_examples=150)
@given(LOAD)
@example([(1000, 60)] * 10)
def test_it_never_skips_a_step_and_gives_each_its_time(load):
    stairs = Stairs(Ladder(STEPS[:5]))
    for rate, ticks in load:
        for _ in range(ticks):
            # as in the world: who is paused does nothing
            stairs.tick(0 if stairs.ladder.rung("a") is Rung.PAUSE else rate)
    check(stairs)
    for _ in range(20_000):
        if not stairs.ladder._vms:
            break
        stairs.tick()
    check(stairs)
    assert stairs.rungs[-1] is Rung.OBSERVE  # back when it is over
    assert stairs.ladder._vms == {}


@settings(max_examples=25)
@given(st.floats(0.1, 40), st.floats(0.1, 40))
def test_no_rhythm_makes_it_go_up_and_down_for_ever(loud, quiet):
    """Each relapse doubles the time in the clear: turns become as rare as 16 times that, or it stays where it is."""
    stairs = Stairs(Ladder(STEPS[:5]))
    period = round((loud + quiet) / TICK)
    for n in range(6000):
        stairs.tick(0 if stairs.ladder.rung("a") is Rung.PAUSE or n % period >= loud / TICK else 1000)
    check(stairs)
    order = list(Rung)
    ways = [order.index(b) - order.index(a) for a, b in itertools.pairwise(stairs.rungs) if a is not b]
    turns = sum(1 for a, b in itertools.pairwise(ways) if a * b < 0)
    # Five steps can each be relapsed to while the factor grows to 16, and then one turn per 16 times the least clear;
    # a rhythm that is slower than going all the way back, probation included, starts anew each time, once a period.
    assert turns <= 2 * (5 * 5 + 600 / (PATIENCE * 2) + 600 / (loud + quiet))
    assert turns / 600 <= 1 / 2  # never faster than the shortest time in the clear


def test_under_a_load_that_does_not_change_it_comes_to_rest():
    for rate in (40.0, 70.0, 99.0, 150.0, 3000.0):
        world = World(Ladder(STEPS), [Guest("a", steady(rate))]).run(20)
        moves = len(world.actions)
        world.run(20)
        assert len(world.actions) == moves, rate


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(1, 40))
def test_one_that_times_its_bursts_gains_no_more_than_a_burst_for_each_time_in_the_clear(loud, quiet):
    world = World(
        Ladder(STEPS[:2]), [Guest("a", lambda now, seen: 600.0 if len(seen) % (loud + quiet) < loud else 0.0)]
    ).run(24)
    # Throttled to 50/s, but for what it does before it is (0.6 s), once in the 2 s that it has to keep quiet after.
    free = 600 * 0.7
    spans = 1 + 24 / (2 + 0.6)
    assert sum(world.guests["a"].seen) <= 50 * 24 + free * spans
    # And if it does not keep quiet for the time in the clear, it stays throttled for good.
    if quiet < 20 and loud / (loud + quiet) > 0.3:
        assert world.rate("a", 12) <= 55
