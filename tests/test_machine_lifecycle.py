"""The states of a run: what leads where, that nothing else does, and what users see of them."""

from __future__ import annotations

import re
import threading
from itertools import product

import pytest
import trio
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import orchestra as orc
from orchestra.machine import lifecycle
from orchestra.machine.lifecycle import TRANSITIONS, Event, Lifecycle, Phase, state_of
from orchestra.machine.pause_levels import Level, PauseLevels

HALTED = orc.Halted()
BROKEN = orc.Failed("broken")


def at(phase: Phase) -> Lifecycle:
    """A run that has come there by the shortest way."""
    ways: dict[Phase, list[Event]] = {Phase.BUILDING: []}
    todo = [Phase.BUILDING]
    while todo:
        here = todo.pop(0)
        for event, there in TRANSITIONS[here].items():
            if there not in ways:
                ways[there] = [*ways[here], event]
                todo.append(there)
    life = Lifecycle()
    for event in ways[phase]:
        life.happen(event)
    assert life.phase is phase
    return life


def test_each_state_is_reached_and_only_the_end_is_left_by_nothing():
    assert set(TRANSITIONS) == set(Phase)
    for phase in Phase:
        at(phase)
        onward = set(TRANSITIONS[phase].values()) - {phase}
        assert bool(onward) == (phase is not Phase.ENDED)


@pytest.mark.parametrize(("phase", "event"), list(product(Phase, Event)), ids=str)
def test_an_event_leads_where_the_table_says_or_is_a_mistake(phase, event):
    life = at(phase)
    there = TRANSITIONS[phase].get(event)
    if there is None:
        with pytest.raises(AssertionError, match=f"a run that is {phase} can't be {event}"):
            life.happen(event)
        there = phase
    else:
        assert life.happen(event) is there
    assert life.phase is there


def test_the_drawing_names_every_state_and_every_event():
    drawing = (lifecycle.__doc__ or "").split("RESUME leads back")[0]
    assert set(re.findall(r"\b[A-Z]{3,}\b", drawing)) == {name.upper() for name in [*Phase, *Event]}


def test_the_first_outcome_counts():
    life = at(Phase.RUNNING)
    assert life.end(BROKEN)
    assert not life.end(HALTED)
    assert (life.outcome, life.phase) == (BROKEN, Phase.STOPPING)


@pytest.mark.parametrize("phase", [Phase.PAUSED, Phase.QUIESCED])
def test_one_that_is_stopped_while_it_is_paused_never_runs_again(phase):
    life = at(phase)
    life.end(HALTED)
    for event in (Event.RESUME, Event.PAUSE, Event.PARKED):
        life.happen(event)
        assert (life.is_still, life.is_quiesced) == (True, phase is Phase.QUIESCED)


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.PAUSING])
def test_one_that_is_stopped_while_it_runs_may_run_to_its_end(phase):
    life = at(phase)
    life.end(HALTED)
    life.happen(Event.PAUSE)
    assert not life.is_still
    life.happen(Event.PARKED)
    assert life.is_still
    assert not life.is_quiesced
    life.happen(Event.GONE)
    assert life.is_quiesced


def test_of_many_threads_that_end_a_run_one_is_first():
    def end(number: int, life: Lifecycle, barrier: threading.Barrier, first: list[int]) -> None:
        barrier.wait()
        if life.end(orc.Failed(str(number))):
            first.append(number)

    for _ in range(50):
        first: list[int] = []
        life, barrier = at(Phase.RUNNING), threading.Barrier(4)
        threads = [threading.Thread(target=end, args=(number, life, barrier, first)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert life.outcome == orc.Failed(str(first[0]))
        assert len(first) == 1


@given(st.lists(st.sampled_from(Event), max_size=40))
@settings(max_examples=300)
def test_whatever_happens_what_is_asked_is_true(events):
    """Any sequence of events, those that can't happen among them: a run is in one state, and its answers agree."""
    life, ended, rested = Lifecycle(), False, (False, False)
    for event in events:
        before = life.phase
        try:
            after = life.happen(event)
        except AssertionError:
            after = before
        assert life.phase is after
        assert life.has_ended == (after is Phase.ENDED)
        ended = ended or life.has_ended
        assert life.has_ended == ended  # for good
        if after in (Phase.RUNNING, Phase.PAUSING, Phase.BUILDING):
            assert not life.is_still
        if after in (Phase.PAUSED, Phase.QUIESCED, Phase.CLOSING, Phase.ENDED):
            assert life.is_still
            assert life.is_quiesced == (after is not Phase.PAUSED)
        if after is before is Phase.STOPPING:  # nothing that stops begins to run again
            assert (life.is_still, life.is_quiesced) >= rested
        rested = (life.is_still, life.is_quiesced)


# ---- what users see

SEEN = {
    # phase, a pause is desired, the next run is waited for → state
    (None, False, False): "created",
    (None, True, False): "created",
    (Phase.RUNNING, False, False): "running",
    (Phase.PAUSING, True, False): "running",
    (Phase.PAUSED, True, False): "paused",
    (Phase.QUIESCED, True, False): "paused",
    (Phase.STOPPING, False, False): "running",
    (Phase.STOPPING, True, False): "running",  # and a pause came too late
    (Phase.CLOSING, False, False): "running",
    (Phase.CLOSING, True, False): "paused",
    (Phase.ENDED, False, True): "waiting",
    (Phase.ENDED, True, True): "paused",
    (Phase.ENDED, False, False): "running",  # the next run is being built
}


@pytest.mark.parametrize(("phase", "paused", "waits"), SEEN)
def test_what_users_see_of_a_run(phase, paused, waits):
    run = None if phase is None else at(phase)
    seen = state_of(None, run, paused=paused, waits=waits)
    assert seen == SEEN[phase, paused, waits]
    for outcome, state in ((HALTED, "stopped"), (BROKEN, "failed")):
        assert state_of(outcome, run, paused=paused, waits=waits) == state


# ---- with the vCPUs beneath


class HeldRun(RuleBasedStateMachine):
    """Commands and what vCPUs say of them, in any order and late: a run is where its vCPUs are."""

    def __init__(self) -> None:
        super().__init__()
        self.life = Lifecycle()
        self.told: list[Level] = []
        self.pause_levels = PauseLevels(3, self.life, self.told.append)
        self.levels = [Level.RUNNING] * 3
        self.gone: set[int] = set()
        self.paused = False

    @initialize(paused=st.booleans())
    def build(self, paused: bool) -> None:
        self.life.happen(Event.BUILT)
        if paused:
            self.pause()
            self.pause_levels.settle()
            self.levels = [Level.QUIESCED] * 3

    @precondition(lambda self: not self.paused and not self.life.has_ended)  # as `Pausing` has it
    @rule()
    def pause(self) -> None:
        self.pause_levels.begin()
        self.paused, self.levels = True, [Level.RUNNING] * 3

    @precondition(lambda self: self.paused and not self.life.has_ended)
    @rule()
    def resume(self) -> None:
        waiting = [self.pause_levels.paused, self.pause_levels.quiesced]
        self.pause_levels.end()
        assert all(event.is_set() for event in waiting)  # nobody waits for a pause that was taken back
        self.paused, self.levels = False, [Level.RUNNING] * 3

    @rule(index=st.integers(0, 2), level=st.sampled_from([Level.PAUSED, Level.QUIESCED]), late=st.booleans())
    def come(self, index: int, level: Level, late: bool) -> None:
        if index not in self.gone:  # also if the pause was taken back: it was said before
            self.pause_levels.come(index, self.pause_levels.number - late, level)
            if self.paused and not late:
                self.levels[index] = max(self.levels[index], level)

    @rule(index=st.integers(0, 2))
    def go(self, index: int) -> None:
        self.gone.add(index)
        self.pause_levels.gone(index)
        if self.pause_levels.all_gone:
            self.life.end(HALTED)
            self.life.happen(Event.GONE)

    @rule()
    def end(self) -> None:
        self.life.end(BROKEN)

    @precondition(lambda self: self.life.phase is Phase.CLOSING)
    @rule()
    def free(self) -> None:
        self.life.happen(Event.FREED)
        self.pause_levels.close()

    @invariant()
    def it_is_where_its_vcpus_are(self) -> None:
        alive = [level for index, level in enumerate(self.levels) if index not in self.gone]
        lowest = min(alive, default=Level.QUIESCED)
        phase = self.life.phase
        assert (phase in (Phase.CLOSING, Phase.ENDED)) == (not alive)
        if phase in (Phase.RUNNING, Phase.PAUSING, Phase.PAUSED, Phase.QUIESCED):
            expected = [Phase.PAUSING, Phase.PAUSED, Phase.QUIESCED][lowest] if self.paused else Phase.RUNNING
            assert phase is expected
            if self.paused:
                assert self.pause_levels.paused.is_set() == (lowest >= Level.PAUSED)
                assert self.pause_levels.quiesced.is_set() == (lowest >= Level.QUIESCED)
        if phase is Phase.ENDED:
            assert self.pause_levels.paused.is_set()
            assert self.pause_levels.quiesced.is_set()


TestHeldRun = HeldRun.TestCase
TestHeldRun.settings = settings(max_examples=200, stateful_step_count=30)


async def test_whoever_waits_for_a_pause_goes_on_when_the_run_ends():
    life = at(Phase.RUNNING)
    pause_levels = PauseLevels(1, life, lambda level: None)
    pause_levels.begin()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pause_levels.quiesced.wait)
        life.end(HALTED)
        life.happen(Event.FREED)
        pause_levels.close()
