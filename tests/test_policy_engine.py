"""The one policy engine: who decides when, what comes of what is asked for, and that it rules the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import Phase, given, settings, strategies as st

import orchestra as orc
from conftest import blank, play
from orchestra.backend.scripted import hlt
from orchestra.config import PolicyRule, Rules
from orchestra.journal import Journal, read_journal
from orchestra.model.actions import Action, Applied
from orchestra.model.effects import ActionsInForce
from orchestra.policy.engine import PENDING, Done, PolicyEngine
from orchestra.replay import replay
from orchestra.simulate import Scenario
from orchestra.simulate.behaviours import Steady
from orchestra.simulate.layout import Layout
from orchestra.simulate.scenario import Hosts, Vms
from orchestra.simulate.world import World

SECOND = 1_000_000_000
LIMIT = orc.Limit(rate=10, burst=2, max_delay=1.0)


class Does:
    """Asks for what `program` says at each of its decisions, and remembers what it was told."""

    def __init__(self, *program: list[Action], name: str = "does", interval: float | None = 1.0) -> None:
        self.name, self.interval = name, interval
        self.program = program
        self.seen: list[orc.Facts] = []
        self.refusals: list[tuple[Action, str]] = []

    def decide(self, facts: orc.Facts) -> Iterable[Action]:
        n = len(self.seen)
        self.seen.append(facts)
        return [attrs.evolve(one, reason=f"decision {n}") for one in (self.program[n] if n < len(self.program) else ())]

    def refused(self, action: Action, reason: str) -> None:
        self.refusals.append((action, reason))


class World1:
    """A source of facts and an executor: what can't be done is in `errors`, and what is known later in `later`."""

    def __init__(self) -> None:
        self.done: list[tuple[str | None, Action]] = []
        self.recorded: list[Applied] = []
        self.causes: list[Exception] = []
        self.errors: dict[type, str] = {}
        self.later: list[tuple[Any, Any]] = []
        self.windows: set[int] = set()
        self._next = iter(range(1000))
        self.now = 0

    def open(self) -> int:
        window = next(self._next)
        self.windows.add(window)
        return window

    def close(self, window: int) -> None:
        self.windows.remove(window)

    def facts(self, window: int) -> orc.Facts:
        assert window in self.windows
        return orc.Facts(self.now, 1.0, None, None, {}, {})

    def below(self, action: Action) -> int:
        return 3

    def do(self, action: Action, policy: str | None, verdict: Any, state: Any, now: int) -> Done:
        self.done.append((policy, action))
        if isinstance(action, orc.Evict):
            self.later.append((state, verdict))
            return PENDING
        return self.errors.get(type(action))

    def record(self, applied: Applied, cause: Exception | None = None) -> None:
        self.recorded.append(applied)
        if cause is not None:
            self.causes.append(cause)


@pytest.fixture
def world() -> World1:
    return World1()


def engine(world: World1, *policies: Any, guard: orc.Guard | None = None, strict: bool = False) -> PolicyEngine:
    return PolicyEngine(policies, guard or orc.Guard(), now=0, executor=world, source=world, strict=strict)


def run(engine: PolicyEngine, world: World1, *seconds: float) -> None:
    for second in seconds:
        world.now = round(second * SECOND)
        engine.tick(world.now)


def test_one_that_ticks_decides_first_when_an_interval_has_passed(world):
    fast, slow = Does(name="fast"), Does(name="slow", interval=2.0)
    made = engine(world, fast, slow)
    assert made.due == SECOND
    run(made, world, 0.5, 1, 2, 3)
    assert [len(fast.seen), len(slow.seen)] == [3, 1]
    assert made.due == 4 * SECOND


def test_one_without_an_interval_decides_at_once_and_no_more(world):
    once = Does([orc.Warn(vm="a")], interval=None)
    made = engine(world, once)
    run(made, world, 0, 1, 2)
    assert len(once.seen) == 1
    assert [type(action) for _, action in world.done] == [orc.Warn]
    assert made.due is None
    assert not world.windows  # nobody looks any more


def test_the_interval_is_asked_last_so_that_one_that_was_refused_may_want_another_turn(world):
    class Again(Does):
        def refused(self, action: Action, reason: str) -> None:
            super().refused(action, reason)
            self.interval = 5.0

    again = Again([orc.Warn(vm="a"), orc.Warn(vm="b")], interval=None)
    made = engine(world, again, guard=orc.Guard(actions_per_minute=1))
    run(made, world, 0)
    assert [reason for _, reason in again.refusals] == ["1 actions in the last minute: no more"]
    assert made.due == 5 * SECOND
    (refused,) = world.recorded
    assert (refused.outcome, refused.policy, refused.action.vm) == ("refused", "does", "b")


def test_what_failed_is_told_and_is_not_tried_again_at_once(world):
    policy = Does([orc.Pause(vm="a")], [orc.Pause(vm="a")], interval=0.5)
    world.errors[orc.Pause] = "it has ended"
    run(engine(world, policy), world, 1, 1.5)
    assert [reason for _, reason in policy.refusals] == ["it has ended", "it failed: not tried again for 0.5 s"]
    assert len(world.done) == 1


def test_what_is_known_later_fails_later(world):
    policy = Does([orc.Evict(vm="a")], [], [orc.Evict(vm="a")])
    made = engine(world, policy, guard=orc.Guard(vm_cool_down=100.0))
    run(made, world, 1)
    assert policy.refusals == []
    ((state, verdict),) = world.later
    made.settle(state, verdict, "no host has room", round(1.5 * SECOND))
    assert [reason for _, reason in policy.refusals] == ["no host has room"]
    run(made, world, 2, 3)
    assert len(world.done) == 2  # what failed began no cool-down


def test_a_dry_run_does_nothing_and_is_recorded(world):
    policy = Does([orc.Pause(vm="a")])
    run(engine(world, policy, guard=orc.Guard(dry_run=True)), world, 1)
    assert world.done == []
    assert [(one.outcome, type(one.action)) for one in world.recorded] == [("dry-run", orc.Pause)]
    assert policy.refusals == []


def test_one_that_raises_is_switched_off_and_the_others_go_on(world):
    bad, good = Does(name="bad"), Does([], [orc.Warn(vm="a")], name="good")
    bad.decide = lambda facts: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    made = engine(world, bad, good)
    run(made, world, 1, 2)
    assert [type(action) for _, action in world.done] == [orc.Warn]
    assert [(status.name, status.on) for status in made.statistics()] == [("bad", False), ("good", True)]
    assert [(one.action, one.policy, one.error) for one in world.recorded] == [
        (None, "bad", "ZeroDivisionError: division by zero")
    ]
    assert isinstance(world.causes[0], ZeroDivisionError)
    assert len(world.windows) == 1


@pytest.mark.parametrize("nonsense", [["pause it"], [None], 5])
def test_what_is_no_action_switches_its_policy_off(world, nonsense):
    bad = Does()
    bad.decide = lambda facts: nonsense  # type: ignore[method-assign,assignment]
    made = engine(world, bad)
    run(made, world, 1)
    assert not made.states[0].on
    assert world.done == []


def test_strict_raises(world):
    bad = Does()
    bad.decide = lambda facts: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        run(engine(world, bad, strict=True), world, 1)


def test_a_pause_that_lasts_too_long_is_ended_by_nobodys_word(world):
    made = engine(world, Does([orc.Pause(vm="a")]), guard=orc.Guard(max_pause=3.0))
    run(made, world, 1)
    assert made.pausing
    run(made, world, 2, 3, 4, 5)
    assert [(policy, type(action)) for policy, action in world.done] == [("does", orc.Pause), (None, orc.Resume)]
    assert not made.pausing


def test_other_policies_keep_their_state_and_what_went_is_let_go(world):
    kept, gone, new = Does(name="kept"), Does([orc.Throttle(vm="a", limit=LIMIT)], name="gone"), Does(name="new")
    made = engine(world, kept, gone)
    run(made, world, 1)
    in_force = ActionsInForce()
    for policy, action in world.done:
        in_force.note(action, policy)
    state = made.states[0]
    made.set_policies([new, kept], None, round(1.5 * SECOND), in_force)
    assert made.states[1] is state
    assert [one.order for one in made.states] == [0, 1]
    policy, action = world.done[-1]
    assert (policy, type(action), action.reason) == ("gone", orc.Unthrottle, "policy gone was taken away")
    run(made, world, 2, 2.5)
    assert [len(kept.seen), len(gone.seen), len(new.seen)] == [2, 1, 1]
    assert len(world.windows) == 2


def test_a_policy_that_is_there_can_not_become_a_dry_run(world):
    policy = Does()
    made = engine(world, policy)
    with pytest.raises(orc.SpecError, match="was no dry run so far"):
        made.set_policies([policy], orc.Guard(dry_run=True), 0, ActionsInForce())
    assert [state.name for state in made.states] == ["does"]


# ---- live, replayed and simulated -----------------------------------------------------------------------------------

VMS = {"acme-0": "acme", "acme-1": "acme", "lab-0": "lab"}
SECONDS = 24
EXAMPLES = int(os.environ.get("ORCHESTRA_RULINGS", "12"))

limits = st.builds(
    orc.Limit, rate=st.sampled_from([0.5, 5.0, 50.0]), burst=st.sampled_from([1, 4]), max_delay=st.none()
)
vms = st.sampled_from(list(VMS))
actions = st.one_of(
    st.builds(orc.Throttle, limit=limits, vm=vms),
    st.builds(orc.Throttle, limit=limits, tenant=st.sampled_from(["acme", "lab"])),
    st.builds(orc.Throttle, limit=limits),
    st.builds(orc.Unthrottle, vm=vms),
    st.builds(orc.Unthrottle, tenant=st.sampled_from(["acme", "lab"])),
    st.builds(orc.SetLimit, limit=limits, vm=vms),
    st.builds(orc.Warn, vm=vms),
    st.builds(orc.Pause, vm=vms),
    st.builds(orc.Resume, vm=vms),
)
programs = st.lists(st.lists(actions, max_size=3), min_size=1, max_size=SECONDS)
guards = st.fixed_dictionaries(
    {
        "floor": st.sampled_from([1.0, 7.0]),
        "vm_cool_down": st.sampled_from([0.0, 2.5, 10.5]),
        "host_cool_down": st.sampled_from([0.0, 1.5]),
        "actions_per_minute": st.sampled_from([None, 0, 3]),
        "limits_per_minute": st.sampled_from([0, 2, 60_000]),
        "max_pause": st.sampled_from([None, 3.5]),
        "most_paused": st.sampled_from([0.3, 0.9]),
        "dry_run": st.sampled_from([False, True, ("p1",)]),
    }
)


@attrs.frozen
class Program:
    """What policies ask for, decision by decision, and at which second which VM is stopped."""

    policies: tuple[tuple[float | None, tuple[tuple[Action, ...], ...]], ...]
    guard: dict[str, Any]
    leaves: dict[str, int]

    def make(self) -> list[Does]:
        made = []
        for n, (interval, asked) in enumerate(self.policies):
            program: list[list[Action]] = []
            for i, some in enumerate(asked):
                second = i + 1 if interval is None else (i + 1) * interval
                # Nobody asks for anything of a VM that may be gone: whether it is by then, is a matter of instants. So
                # is how many VMs a tenant or the host has in the second in which one leaves, by which a floor goes.
                leaving = n > 0 and second in self.leaves.values()
                program.append(
                    [
                        one
                        for one in some
                        if (not leaving if one.vm is None else second < self.leaves.get(one.vm, SECONDS + 1))
                    ]
                )
            for vm, second in self.leaves.items():
                if n == 0 and interval == 1.0 and second <= len(program):
                    program[second - 1].append(orc.Stop(vm=vm))
            made.append(Does(*program, name=f"p{n}", interval=interval))
        return made


@st.composite
def some_programs(draw: Any) -> Program:
    asked = tuple(
        (draw(st.sampled_from([1.0, 2.0, 3.0] if n else [1.0])), tuple(map(tuple, draw(programs)))) for n in range(2)
    )
    return Program(asked, draw(guards), draw(st.dictionaries(vms, st.integers(2, SECONDS), max_size=2)))


Ruled = tuple[str, str, str | None, str | None, str, str]


def ruled(policy: str | None, action: Action | None, outcome: str) -> Iterator[Ruled]:
    """A ruling on what a policy asked for, with the decision that it was asked for in."""
    if policy and action is not None:
        limit = getattr(action, "limit", None)
        said = "" if limit is None else f"{limit.rate:g} {limit.tokens:g}"
        where = action.vm, getattr(action, "tenant", None)
        yield (policy, type(action).__name__, *where, f"{action.reason} {said}", outcome)


async def live(program: Program, path: Path) -> list[Ruled]:
    async with play(
        {name: [hlt(after=1e9)] for name in VMS},
        tenants={"acme": None, "lab": None},
        policies=program.make(),
        guard=orc.Guard(**program.guard),
        journal=Journal(path),
    ) as fleet:
        for name, tenant in VMS.items():
            await fleet.launch(attrs.evolve(blank(name), tenant=tenant))
        await trio.sleep(SECONDS + 0.5)
        applied = fleet.actions()
    return [one for told in applied for one in ruled(told.policy, told.action, told.outcome)]


def replayed(program: Program, path: Path) -> list[Ruled]:
    def rules() -> Rules:
        entries = tuple(PolicyRule(one.name, "own", {}, one) for one in program.make())
        return Rules("here", entries, orc.Guard(**program.guard), tenants={t: orc.Tenant(t) for t in ("acme", "lab")})

    with read_journal(path) as journal:
        deeds = replay(journal, rules).deeds
    return [one for deed in deeds for one in ruled(deed.policy, deed.action, deed.outcome)]


def simulated(program: Program) -> list[Ruled]:
    # They lock now and then, and `settle` does the rest: a host is looked at in every tick then, as live.
    now_and_then = Steady(rate=1)
    groups = tuple(
        Vms(name=tenant, tenant=tenant, count=sum(of == tenant for of in VMS.values()), behaviour=now_and_then)
        for tenant in ("acme", "lab")
    )
    scenario = Scenario(duration=SECONDS, hosts=(Hosts(count=1),), vms=groups, settle=10_000, guard=orc.Guard())
    makers: list[Callable[[Any], Any]] = [lambda cpu, n=n: program.make()[n] for n in range(len(program.policies))]
    world = World(Layout(scenario, 1), 1, makers, guard=orc.Guard(**program.guard))
    for _ in range(scenario.ticks):
        world.step()
    return [
        one
        for deed in world.tally.deeds
        for one in ruled(
            deed.policy,
            deed.action,
            "dry-run" if (deed.error or "").startswith("a dry run") else "refused" if deed.refused else "done",
        )
    ]


# A failure is read as it is: making it smaller takes minutes.
@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(program=some_programs())
def test_live_replayed_and_simulated_rule_the_same(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("ruled") / "fleet.db"
    clock = trio.testing.MockClock(autojump_threshold=0)
    there = trio.run(live, program, path, clock=clock)
    assert replayed(program, path) == there
    assert simulated(program) == there
