"""What the journal tells of a VM: its own launch and nothing of others of its name, whatever it was paused by."""

from __future__ import annotations

import itertools
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

import orchestra as orc
from conftest import blank, play
from journals import BEGIN, SECOND, Afternoon, vm
from orchestra.backend.scripted import ScriptedExit, bus_lock, failed_run, hlt, io_write, triple_fault
from orchestra.cli.why import sentences
from orchestra.journal import Journal, read_journal, suspects
from orchestra.journal.explain import Explanation, explain
from orchestra.journal.series import series
from orchestra.output.times import day_and_time, time_of_day
from orchestra.replay.demand import ticks

FOR_EVER = hlt(after=1e9)


@pytest.fixture
def afternoon(tmp_path: Path) -> Iterator[Afternoon]:
    made = Afternoon(tmp_path / "fleet.db")
    yield made
    made.close()


def at(seconds: float) -> int:
    return BEGIN + round(seconds * SECOND)


def throttle(rate: float) -> orc.Throttle:
    return orc.Throttle(vm="a", limit=orc.Limit(rate=rate))


def told(afternoon: Afternoon, name: str = "a", when: int | None = None) -> Explanation:
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        return explain(journal, name, when)


def two_fleets(first: Afternoon) -> Afternoon:
    """The first, whose VM is throttled, its host and tenant too, is killed after 10 s; another has a VM of that name
    and launch."""
    first.state("a", "running", generation=1)
    first.applied(throttle(5), "p")
    first.applied(orc.SetLimit(limit=orc.Limit(rate=70)))
    first.applied(orc.Throttle(tenant="acme", limit=orc.Limit(rate=60)), "p")
    for _ in range(10):
        first.second(vm("a", 5))
    first.close()
    second = Afternoon(first.path)
    second.seconds = 20
    second.state("a", "running", generation=1)
    for _ in range(10):
        second.second(vm("a", 900))
    second.close()
    with closing(sqlite3.connect(first.path)) as connection, connection:
        connection.execute("UPDATE sessions SET begun = ?, ended = NULL WHERE id = 1", (at(-1),))
        connection.execute("UPDATE sessions SET begun = ?, ended = NULL WHERE id = 2", (at(19),))
    return second


def test_what_an_earlier_fleet_did_to_a_vm_of_that_name_and_launch_holds_no_more(afternoon):
    second = two_fleets(afternoon)
    now = told(second)
    assert (now.holds, now.done, now.launched, now.over) == ((), (), at(20), None)
    assert now.fared is not None
    assert now.fared.bus_locks == 900
    assert now.host is not None
    assert now.host.bus_locks == 900
    assert [hold.rate for hold in told(second, when=at(9)).holds] == [5, 60, 70]


def test_a_vm_whose_fleet_was_killed_is_gone_with_it(afternoon):
    two_fleets(afternoon)
    between = told(afternoon, when=at(19.5))
    assert (between.holds, between.over) == ((), at(19))
    assert "its fleet had gone by then" in next(iter(sentences(between)))


def test_the_plots_limit_begins_anew_with_each_launch_and_ends_with_the_vm(afternoon):
    afternoon.state("a", "running", generation=1)
    afternoon.applied(throttle(5), "p")
    afternoon.second(vm("a"))
    afternoon.state("a", "stopped", generation=1)
    afternoon.second()
    afternoon.state("a", "running", generation=2)
    afternoon.second(vm("a", generation=2))
    afternoon.applied(throttle(7), "p")
    afternoon.second(vm("a", generation=2))
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        limits = [one.limit for one in series(journal, "a", at(0), at(4), 8)]
        assert limits[:1] + limits[2:3] + limits[4:5] + limits[7:] == [5, None, None, 7]
        assert [one.limit for one in series(journal, "a", at(3.2), at(4), 2)] == [7, 7]


def test_the_plots_limit_is_that_of_its_own_fleet(afternoon):
    second = two_fleets(afternoon)
    with read_journal(second.path) as journal:
        assert [one.limit for one in series(journal, "a", at(0), at(27), 3)] == [5, 5, None]


def test_limits_of_single_vcpus_do_not_replace_each_other(afternoon):
    afternoon.state("a", "running")
    for vcpu, rate in ((0, 5), (1, 9)):
        afternoon.applied(orc.SetLimit(vm="a", vcpu=vcpu, limit=orc.Limit(rate=rate)))
        afternoon.second(vm("a"))
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        assert [one.limit for one in series(journal, "a", at(0), at(2), 2)] == [5, 5]


def test_thousands_of_dry_runs_cost_next_to_nothing(afternoon):
    afternoon.state("a", "running")
    afternoon.applied(throttle(5), "p")
    for _ in range(20):
        afternoon.second(vm("a", 10))
        for _ in range(500):
            afternoon.applied(throttle(7), "weighted-share", outcome="dry-run", error="a dry run")
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        begun = time.process_time()
        bins = series(journal, "a", at(0), at(20), 72)
        assert time.process_time() - begun < 1.0  # it was 13 s on the machine on which the new one takes 0.02 s
        assert {one.limit for one in bins} == {5}
        assert [hold.rate for hold in explain(journal, "a").holds] == [5]


@pytest.mark.parametrize("how", ["cancelled", "by an action", "launched"])
async def test_a_vm_that_is_paused_is_held_by_who_paused_it(tmp_path, autojump_clock, how):
    path = tmp_path / "fleet.db"
    async with play([FOR_EVER], journal=Journal(path)) as fleet:
        guest = await fleet.launch(blank("a"), paused=how == "launched")
        await trio.sleep(2)
        with trio.CancelScope() as scope:
            if how == "cancelled":
                scope.cancel()
                await guest.pause()
            elif how == "by an action":
                scope.cancel()
                await fleet.apply(orc.Pause(vm="a", reason="for a while"))
        await trio.sleep(5)
        await guest.resume()
        await trio.sleep(5)
    with read_journal(path) as journal:
        states = {row.state: row.time for row in journal.states(vm="a")}
        paused = explain(journal, "a", states["paused"] + SECOND)
        (hold,) = paused.holds
        assert (hold.action.kind, hold.action.policy, hold.where) == ("Pause", None, "vm")
        assert hold.since <= states["paused"]
        reason = {"cancelled": "pause()", "by an action": "for a while", "launched": "launch(paused=True)"}[how]
        assert f"a caller has held it paused: {reason}" in " ".join(sentences(paused))
        assert explain(journal, "a", states["running"] + SECOND).holds == ()


@pytest.mark.parametrize("adjacent", [True, False])
def test_the_rest_of_an_interval_at_a_fleets_end_makes_no_rate_of_its_own(afternoon, adjacent):
    afternoon.state("a", "running")
    for _ in range(3):
        afternoon.second(vm("a", 10))
    if not adjacent:
        for _ in range(3):
            afternoon.second()
    facts = afternoon.second(vm("a", 10))
    rest = orc.Facts(facts.time + 200, 2e-7, None, None, {}, {"a": vm("a", 1)}, orc.HostFacts(cpus=4))
    afternoon.journal.aggregate(rest)
    afternoon.journal.action(orc.Applied(time=facts.time + 300, action=throttle(5)))
    afternoon.seconds += 1
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        before = explain(journal, "a").before
        assert before is not None
        assert before.bus_locks == pytest.approx(11, rel=1e-3)
        bins = series(journal, "a", at(0), facts.time + 200, 300)
        assert max(one.bus_locks or 0 for one in bins) == pytest.approx(11, rel=0.02)
        seen = list(ticks(journal))
        assert sum(row.bus_locks or 0 for tick in seen for row in tick.vms.values()) == 41
        assert max((row.bus_locks or 0) / tick.interval for tick in seen for row in tick.vms.values()) < 12


def test_a_vm_that_did_something_in_the_rest_only_is_replayed_over_the_whole(afternoon):
    afternoon.state("a", "running")
    facts = afternoon.second()
    rest = orc.Facts(facts.time + 200, 2e-7, None, None, {}, {"a": vm("a", 1)}, orc.HostFacts(cpus=4))
    afternoon.journal.aggregate(rest)
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        (tick,) = ticks(journal)
    assert tick.interval == pytest.approx(1)
    assert tick.vms["a"].bus_locks == 1
    assert tick.host is not None
    assert (tick.host.time, tick.host.interval) == (tick.time, tick.interval)


async def test_a_fleets_statistics_tell_how_its_journal_keeps_up(tmp_path, autojump_clock):
    kept = Journal(tmp_path / "fleet.db")
    async with play([FOR_EVER], journal=kept) as fleet:
        await fleet.launch(blank("a"))
        told = fleet.statistics().journal
        assert told is not None
        assert (told.dropped, told.error) == (0, None)
    async with play([FOR_EVER]) as fleet:
        assert fleet.statistics().journal is None


# ---- limits that nobody set, and what the counters say


def storm(after: float = 0.001) -> Iterator[ScriptedExit]:
    return itertools.repeat(io_write(0x80, b"x", after=after))


async def test_a_limit_of_its_spec_is_named_while_it_runs_and_after_its_fleet_has_closed(tmp_path, autojump_clock):
    path = tmp_path / "fleet.db"
    async with play({"a": storm()}, journal=Journal(path)) as fleet:
        await fleet.launch(blank("a", exit_limit=orc.Limit(rate=10, burst=1)))
        await trio.sleep(90)
    with read_journal(path) as journal:
        begun = next(journal.states(vm="a")).time
        for when in (begun + 80 * SECOND, None, begun + 3600 * SECOND):
            found = explain(journal, "a", when)
            (cause,) = found.causes
            assert (cause.kind, cause.where, cause.meter) == ("limit", "vm", "exits")
            assert cause.share == pytest.approx(0.99, abs=0.01)
            (setter,) = cause.setters
            assert (setter.hold.action.given, setter.rates, setter.since) == ("spec", (10, 10), begun)
            text = " ".join(sentences(found))
            assert "its spec h" in text
            assert "held it to 10 exits/s; it waited for that 99% of its vCPUs' time in its last minute" in text
            assert "Nothing held it" not in text
            assert "slows it" not in text
        assert "the fleet was closed. From " in text


async def test_limits_of_the_fleet_tenants_and_vcpus_are_named_by_who_gave_them(tmp_path, autojump_clock):
    path = tmp_path / "fleet.db"
    tenants = [orc.Tenant("acme", exit_limit=orc.Limit(rate=20, burst=1)), orc.Tenant("lab")]
    scripts = {name: storm() for name in "ab"} | {"c": itertools.repeat(bus_lock(after=0.001))}
    async with play(scripts, journal=Journal(path), limit=orc.Limit(rate=7, burst=1), tenants=tenants) as fleet:
        await fleet.launch(blank("a", tenant="acme"))
        await fleet.launch(blank("b", tenant="lab", vcpus=2, vcpu_exit_limit=orc.Limit(rate=3, burst=1)))
        await fleet.launch(blank("c", tenant="lab"))
        await trio.sleep(30)
    told = {}
    with read_journal(path) as journal:
        for name in "abc":
            found = explain(journal, name)
            told[name] = " ".join(sentences(found))
            assert [one.share > 0.95 for one in found.causes] == [True]
    assert "what its fleet was opened with held its tenant acme to 20 exits/s" in told["a"]
    assert "its spec held its vCPU 0 to 3 exits/s" in told["b"]
    assert "in part of that time its spec held its vCPU 1 to 3 exits/s" in told["b"]
    assert "what its fleet was opened with held the whole host to 7 bus locks/s" in told["c"]


async def test_a_restart_changes_nothing_of_what_is_named(tmp_path, autojump_clock):
    path = tmp_path / "fleet.db"
    again = orc.Restart(when="on-failure", backoff=0.1)
    script = [*itertools.islice(storm(), 50), failed_run(5)]
    async with play({"a": script}, journal=Journal(path)) as fleet:
        guest = await fleet.launch(blank("a", exit_limit=orc.Limit(rate=10, burst=1), restart=again))
        await trio.sleep(50)
        assert guest.restarts > 5
        await fleet.set_limit(orc.Limit(rate=2, burst=1), vm="a", meter="exits")
        await trio.sleep(61)
    with read_journal(path) as journal:
        begun = next(journal.states(vm="a")).time
        assert "its spec has held it to 10 exits/s" in " ".join(sentences(explain(journal, "a", begun + 45 * SECOND)))
        now = explain(journal, "a")
        assert [one.hold.action.given for one in now.causes[0].setters] == [None]
        assert "a caller held it to 2 exits/s" in " ".join(sentences(now))


def test_a_policy_that_was_switched_off_is_not_said_to_end_anything(afternoon):
    afternoon.state("a", "running")
    afternoon.applied(throttle(5), "p")
    waiting(afternoon, 60, vm__bus_locks=0.9)
    before = afternoon.now
    afternoon.seconds += 1
    afternoon.applied(None, "p", error="RuntimeError: oops")
    waiting(afternoon, 5, vm__bus_locks=0.9)
    text = " ".join(sentences(told(afternoon)))
    with read_journal(afternoon.path) as journal:
        assert "Policy p will end that limit when it sees fit." in " ".join(sentences(explain(journal, "a", before)))
    assert "policy p has held it to 5 bus locks/s" in text
    assert "sees fit" not in text
    assert "Policy p is switched off since " in text
    assert "(RuntimeError: oops): that limit stays until somebody ends it." in text


async def test_one_that_waits_for_its_next_run_is_told_so_and_not_sent_to_look_inside_the_guest(
    tmp_path, autojump_clock
):
    path = tmp_path / "fleet.db"
    again = orc.Restart(when="on-failure", backoff=20)
    script = [*[io_write(0x80, b"x", after=0.1)] * 20, failed_run(5)]
    async with play({"a": script, "b": [triple_fault(after=0.001)]}, journal=Journal(path)) as fleet:
        fails = await fleet.launch(blank("a", restart=again))
        await fleet.launch(blank("b", on_reset="reset"))
        await trio.sleep(12)
        assert (fails.state, fails.statistics().state) == ("waiting", "waiting")
        await fails.pause()
        assert fails.state == "paused"
        await fails.resume()
        assert fails.state == "waiting"
        await trio.sleep(11)
        assert fails.state == "running"
    assert fails.outcome == orc.Stopped("the fleet was closed")  # and not as the run before had ended
    with read_journal(path) as journal:
        begun = next(journal.states(vm="a")).time
        for vm, rest, why in (("a", 8, "waits 20 s to be restarted: vCPU 0: KVM_RUN failed: EIO"), ("b", 9.5, "reset")):
            found = explain(journal, vm, begun + 10 * SECOND)
            text = " ".join(sentences(found))
            assert [cause.kind for cause in found.causes] == ["waiting"]
            assert found.causes[0].seconds == pytest.approx(rest, abs=0.6)
            assert "Between two runs it waited" in text
            assert why in text
            assert "Nothing held it" not in text
            assert "slows it" not in text
        later = " ".join(sentences(explain(journal, "a", begun + 45 * SECOND // 2)))
        assert "was running" in later
        assert "Between two runs it waited 8" in later
        assert "waits 20 s to be restarted" in later


async def test_one_that_is_paused_while_it_waits_for_its_next_run_is_paused(tmp_path, autojump_clock):
    path = tmp_path / "fleet.db"
    again = orc.Restart(when="on-failure", backoff=10)
    script = [*[io_write(0x80, b"x", after=0.1)] * 50, failed_run(5)]
    async with play({"a": script}, journal=Journal(path)) as fleet:
        guest = await fleet.launch(blank("a", restart=again))
        await trio.sleep(7)
        await guest.pause()
        await trio.sleep(30)
        assert guest.state == "paused"
    with read_journal(path) as journal:
        assert [row.state for row in journal.states(vm="a")][2:-1] == ["waiting", "paused", "paused"]
        found = {cause.kind: cause.seconds for cause in explain(journal, "a").causes}
    assert found == {"pause": pytest.approx(30), "waiting": pytest.approx(2)}


def waiting(afternoon: Afternoon, seconds: int, **by: float) -> None:
    """A VM that waited for its turn all the time, by these limits, and got no CPU when it could have run."""
    parts = {name.replace("__", "."): part for name, part in by.items()}
    for _ in range(seconds):
        afternoon.second(
            vm("a", 10, throttled=sum(parts.values()), throttled_by=parts, cpu=0.001, run_delay=0.009), vm("b", 900)
        )


def test_what_no_recorded_limit_explains_is_told_as_that_and_never_as_another_cause(afternoon):
    afternoon.state("a", "running")
    afternoon.applied(throttle(5), "p")
    waiting(afternoon, 60, tenant__exits=0.9)
    text = " ".join(sentences(told(afternoon)))
    assert (
        "A limit on exits of its tenant held it 90% of its vCPUs' time in its last minute; who did that is not" in text
    )
    assert "In force: 5 bus locks/s for it (policy p); by the counters it did not wait for that" in text
    assert text.index("A limit on exits") < text.index("In force")
    assert "slows it" not in text
    assert "Nothing held it" not in text


def test_what_an_older_journal_does_not_tell_is_not_guessed(afternoon):
    afternoon.state("a", "running")
    afternoon.applied(throttle(5), "p")
    waiting(afternoon, 60, vm__bus_locks=0.9)
    afternoon.close()
    with closing(sqlite3.connect(afternoon.path)) as connection, connection:
        connection.execute("UPDATE aggregates SET throttled_by = NULL")
    text = " ".join(sentences(told(afternoon)))
    assert (
        "It was throttled 90% of its vCPUs' time in its last minute; by which limit, the journal does not tell; "
        "those that are in the journal: 5 bus locks/s for it (policy p)." in text
    )


def test_of_several_limits_that_held_it_the_one_that_did_for_longest_goes_first(afternoon):
    afternoon.state("a", "running")
    afternoon.applied(throttle(5), "p")
    afternoon.applied(orc.SetLimit(limit=orc.Limit(rate=70), meter="exits"))
    afternoon.applied(orc.Throttle(limit=orc.Limit(rate=60), meter="exits"), "q")
    waiting(afternoon, 60, vm__bus_locks=0.3, host__exits=0.6)
    found = told(afternoon)
    assert [(one.where, one.meter) for one in found.causes] == [("host", "exits"), ("vm", "bus_locks")]
    assert [(one.hold.action.policy, one.rates) for one in found.causes[0].setters] == [("q", (60, 60))]
    text = " ".join(sentences(found))
    assert text.index("policy q has held the whole host to 60 exits/s") < text.index(
        "policy p has held it to 5 bus locks"
    )
    assert "70 exits/s for the whole host (a caller); by the counters it did not wait for that" in text


def test_who_changed_a_limit_meanwhile_is_told_with_what_there_was_before(afternoon):
    afternoon.state("a", "running")
    afternoon.applied(throttle(5), "p")
    waiting(afternoon, 20, vm__bus_locks=0.9)
    afternoon.applied(throttle(3), "q")
    waiting(afternoon, 40, vm__bus_locks=0.9)
    (cause,) = told(afternoon).causes
    assert [(one.hold.action.policy, one.seconds) for one in cause.setters] == [("q", 40), ("p", 20)]
    assert "; and in part of that time policy p held it to 5 bus locks/s." in " ".join(sentences(told(afternoon)))


def test_caps_and_pauses_are_causes_like_limits(afternoon):
    afternoon.state("a", "running")
    afternoon.applied(orc.CapCpu(vm="a", share=0.5, reason="r"), "p")
    afternoon.applied(throttle(5), "q")
    for _ in range(30):
        afternoon.second(vm("a", 5, capped=0.5, throttled=0.2, throttled_by={"vm.bus_locks": 0.2}, cpu=0.3))
    afternoon.applied(orc.Pause(vm="a"), None)
    afternoon.state("a", "paused")
    for _ in range(20):
        afternoon.second()
    afternoon.applied(orc.Resume(vm="a"), None)
    afternoon.state("a", "running")
    for _ in range(10):
        afternoon.second(vm("a", 5, capped=0.0, throttled=0.0, cpu=0.3))
    found = told(afternoon)
    assert [(one.kind, round(one.seconds, 6)) for one in found.causes] == [("pause", 20), ("cap", 15), ("limit", 6)]
    text = " ".join(sentences(found))
    paused = f"From {time_of_day(at(30))} to {time_of_day(at(50))}, a caller held it paused."
    capped = "policy p has let it run for at most 50% of the time: r; that held it 25% of its vCPUs' time"
    limited = "policy q has held it to 5 bus locks/s; it waited for that 10% of its vCPUs' time"
    assert text.index(paused) < text.index(capped) < text.index(limited)


def test_a_cap_that_nobody_is_known_to_have_put_there_is_told_as_that(afternoon):
    afternoon.state("a", "running")
    for _ in range(60):
        afternoon.second(vm("a", 5, capped=0.5, cpu=0.3))
    text = " ".join(sentences(told(afternoon)))
    assert "A CPU cap held it 50% of its vCPUs' time in its last minute; who did that is not in the journal." in text


# ---- what is not in the journal


def killed(afternoon: Afternoon) -> None:
    afternoon.close()
    with closing(sqlite3.connect(afternoon.path)) as connection, connection:
        connection.execute("UPDATE sessions SET ended = NULL, begun = ? WHERE id = 1", (at(0),))


def test_beyond_a_kill_nothing_is_said_but_where_the_journal_ends(afternoon):
    afternoon.state("a", "running")
    afternoon.applied(throttle(5), "p")
    waiting(afternoon, 60, vm__bus_locks=0.9)
    killed(afternoon)
    partly = told(afternoon, when=at(100))
    assert (partly.ends, partly.seconds, partly.begin, partly.end) == (at(60), 20, at(40), at(60))
    text = " ".join(sentences(partly))
    assert (
        f"The journal ends at {day_and_time(at(60))}: of the minute before {time_of_day(at(100))} it has that from"
        in text
    )
    assert f"From {time_of_day(at(0))} to {time_of_day(at(60))}, policy p held it to 5 bus locks/s" in text
    late = told(afternoon, when=at(121))
    text = " ".join(sentences(late))
    assert (
        f"The journal ends at {day_and_time(at(60))}: it has nothing of the minute before {time_of_day(at(121))}."
        in text
    )
    assert f"a of tenant acme was running since {time_of_day(at(0))} when the journal told of it last" in text
    assert (late.causes, late.fared, late.host, late.seconds) == ((), None, None, 0)
    for word in ("held", "did", "wait", "slow", "In force", "limit"):
        assert word not in text.replace("does not tell", "")


KILLED = """
import itertools, sys, trio, orchestra as orc
from orchestra.backend.scripted import ScriptedBackend, io_write
from orchestra.journal import Journal
async def live():
    script = {"a": itertools.repeat(io_write(0x80, b"x", after=0.001))}
    journal = Journal(sys.argv[1])
    async with orc.open_fleet(backend=ScriptedBackend(script), journal=journal, journal_interval=0.02) as fleet:
        boot = orc.FlatImage(code=b"\\xf4")
        await fleet.launch(orc.VmSpec(name="a", boot=boot, exit_limit=orc.Limit(rate=10, burst=1)))
        while journal.statistics().written < 20:
            await trio.sleep(0.01)
        print("written", flush=True)
        await trio.sleep_forever()
trio.run(live)
"""


def test_a_fleet_that_was_killed_is_told_of_up_to_its_last_interval_and_no_further(tmp_path):
    path = tmp_path / "fleet.db"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.kill()
    with read_journal(path) as journal:
        last = journal.last_interval(1)
        assert last is not None
        there = explain(journal, "a", last)
        assert (there.ends, there.causes[0].where, there.causes[0].meter) == (None, "vm", "exits")
        assert "its spec has held it to 10 exits/s" in " ".join(sentences(there))
        for late in (SECOND, 59 * SECOND, 3600 * SECOND):
            told = explain(journal, "a", last + late)
            assert told.ends == last
            assert told.end == last or not told.seconds
            assert f"The journal ends at {day_and_time(last)}" in " ".join(sentences(told))
            assert bool(told.causes) == (late < 60 * SECOND)
            assert " has held" not in " ".join(sentences(told))


def test_a_limit_is_known_though_the_states_of_that_time_were_removed(afternoon):
    afternoon.state("a", "created", generation=7)
    afternoon.applied(throttle(4), "p")
    afternoon.seconds += 1
    afternoon.state("a", "stopped", generation=7)
    afternoon.seconds += 1
    afternoon.state("a", "created")
    afternoon.applied(throttle(5), "q")
    waiting(afternoon, 30, vm__bus_locks=0.9)
    afternoon.state("a", "paused")
    afternoon.state("a", "running")
    waiting(afternoon, 30, vm__bus_locks=0.9)
    afternoon.close()
    with closing(sqlite3.connect(afternoon.path)) as connection, connection:
        connection.execute("DELETE FROM states WHERE state = 'created' AND generation = 1")
    (cause,) = told(afternoon).causes
    assert [one.hold.rate for one in cause.setters] == [5]  # and not 4: that was another of its name


def test_before_the_journal_begins_nothing_is_said(afternoon):
    afternoon.second(vm("b", 900))
    afternoon.state("a", "running")
    waiting(afternoon, 10, vm__bus_locks=0.9)
    for when, begins in ((at(-50), at(1)), (at(0.5), at(1))):
        found = told(afternoon, when=when)
        assert (found.begins, found.causes, found.fared, found.state) == (begins, (), None, None)
        assert " ".join(sentences(found)) == (
            f"Of a the journal begins at {day_and_time(begins)}: it has nothing of it at {day_and_time(when)}."
        )


def test_a_vm_that_only_actions_name_is_not_told_of(afternoon):
    afternoon.second(vm("b"))
    afternoon.applied(throttle(5), "p", error="no such VM")
    afternoon.second(vm("b"))
    (text,) = [" ".join(sentences(told(afternoon)))]
    assert "By then the journal has no state and no interval of it: what held it is not known." in text
    assert "Nothing" not in text


def test_without_a_time_it_is_the_last_that_all_is_known_of(afternoon):
    afternoon.state("a", "running")
    waiting(afternoon, 60, vm__bus_locks=0.9)
    afternoon.seconds += 1
    afternoon.applied(throttle(5), "p")
    killed(afternoon)
    found = told(afternoon)
    assert (found.at, found.ends, found.holds) == (at(60), None, ())


def test_a_gap_in_the_intervals_is_told_and_its_time_counts_for_nothing(afternoon):
    afternoon.state("a", "running")
    waiting(afternoon, 30, vm__exits=0.9)
    afternoon.seconds += 10
    waiting(afternoon, 20, vm__exits=0.9)
    found = told(afternoon)
    assert (found.seconds, found.covered.gaps) == (50, ((at(30), at(40)),))
    assert found.causes[0].share == pytest.approx(0.9)
    text = " ".join(sentences(found))
    assert f"The journal has a gap from {time_of_day(at(30))} to {time_of_day(at(40))}." in text
    assert f"from {time_of_day(at(0))} to {time_of_day(at(60))}, of which 50 s are known," in text
    inside = told(afternoon, when=at(35))
    assert f"the journal's intervals end at {time_of_day(at(30))}." in " ".join(sentences(inside))


def test_intervals_that_were_removed_are_not_taken_for_idle(afternoon):
    afternoon.state("a", "running")
    for _ in range(60):
        afternoon.second()
    afternoon.close()
    with closing(sqlite3.connect(afternoon.path)) as connection, connection:
        connection.execute("INSERT INTO removed VALUES ('aggregates', ?)", (at(40),))
    found = told(afternoon)
    assert (found.seconds, found.begin) == (20, at(40))
    gone = told(afternoon, when=at(30))
    assert (gone.seconds, gone.causes) == (0, ())
    text = " ".join(sentences(gone))
    assert "what held it then is not known" in text
    assert "Nothing" not in text


def test_a_time_in_the_middle_of_an_interval_is_told_of_the_whole_interval(afternoon):
    afternoon.state("a", "running")
    afternoon.second(vm("a", 1))
    afternoon.seconds += 100
    facts = orc.Facts(
        afternoon.now,
        100.0,
        None,
        None,
        {},
        {"a": vm("a", throttled=50.0, throttled_by={"vm.exits": 50.0})},
        orc.HostFacts(),
    )
    afternoon.journal.aggregate(facts)
    found = told(afternoon, when=at(80))
    assert (found.begin, found.end, found.seconds) == (at(1), at(101), 100)
    text = " ".join(sentences(found))
    assert f"held it 50% of its vCPUs' time from {time_of_day(at(1))} to {time_of_day(at(101))}" in text


def test_figures_are_of_all_the_time_and_not_only_of_that_in_which_it_did_something(afternoon):
    afternoon.state("a", "running")
    for second in range(60):
        afternoon.second(*([vm("a", 600)] if second == 30 else []))
    found = told(afternoon)
    assert found.fared is not None
    assert (found.fared.bus_locks, found.fared.seconds) == (10, 60)


# ---- who slows it


def test_a_suspect_is_a_vm_of_the_same_fleet_and_time(afternoon):
    def one_fleet(fleet: Afternoon, loud: str) -> None:
        chance = random.Random(loud)
        for _ in range(60):
            locks = 5000 * (chance.random() < 0.3)
            victim = vm("a", 1, cpu=0.5, run_delay=0.01 + 1e-4 * locks)
            fleet.second(victim, vm(loud, locks, cpu=0.2), vm("steady", 10, cpu=0.2))
        fleet.close()

    one_fleet(afternoon, "before")
    second = Afternoon(afternoon.path)
    second.seconds = 60
    one_fleet(second, "now")
    with read_journal(afternoon.path) as journal:
        found = suspects(journal, "a", at(120))
        assert (found.windows, found.seconds, found.asked) == (60, pytest.approx(1), 2)
        (named,) = found.named("run_delay")
        assert (named.vm, named.activity, named.windows) == ("now", "bus_locks", 60)
        assert named.correlation > 0.99
        assert suspects(journal, "a", at(60)).named("run_delay")[0].vm == "before"
        assert suspects(journal, "a", at(-5)).windows == 0
        with pytest.raises(orc.UnknownVm, match="vm='nix'"):
            suspects(journal, "nix")


def test_windows_are_of_whole_intervals_and_only_the_most_active_are_asked(afternoon):
    chance = random.Random(1)
    for _ in range(610):
        locks = 5000 * (chance.random() < 0.3)
        others = [vm(f"vm-{i}", i, cpu=0.001 * i) for i in range(16)]
        afternoon.second(vm("a", 0, cpu=0.5, run_delay=0.01 + 1e-4 * locks), vm("loud", locks, cpu=0.2), *others)
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        found = suspects(journal, "a")
        assert (found.windows, found.seconds) == (120, pytest.approx(5))
        assert found.asked == 8
        assert [one.vm for one in found.named("run_delay")] == ["loud"]
