"""What held a VM, by the journal: what the core's counters say, on random afternoons, and nothing beyond what was kept.

`ORCHESTRA_AFTERNOONS=1000` tries so many of them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from trio.testing import MockClock

import orchestra as orc
from conftest import blank
from orchestra import testing
from orchestra.backend.scripted import ScriptedBackend, ScriptedExit, bus_lock, failed_run, io_write, triple_fault
from orchestra.cli.why import sentences
from orchestra.cli.whyheld import held
from orchestra.journal import Journal, read_journal
from orchestra.journal.explain import LATELY, Explanation, explain
from orchestra.model.spec import Meter
from orchestra.native.core import BUCKETS

SECOND = 1_000_000_000
EXAMPLES = int(os.environ.get("ORCHESTRA_AFTERNOONS", "12"))
TENANTS = ("acme", "lab")
METERS = tuple(Meter)

# Waits of a second or so, so that each is worth some intervals.
LIMITS = st.none() | st.builds(
    orc.Limit, rate=st.sampled_from([0.5, 1, 2, 3, 5, 8]), burst=st.sampled_from([1, 5]), max_delay=st.none()
)


@attrs.frozen
class Guest:
    name: str
    tenant: str
    vcpus: int
    locks: bool
    rate: float
    limits: tuple[orc.Limit | None, ...]
    lives: int | None  # exits until it ends, and runs again; None: it never does
    ends: ScriptedExit
    backoff: float

    def script(self) -> Iterable[ScriptedExit]:
        after = 1 / self.rate
        one = bus_lock(after=after) if self.locks else io_write(0x80, b"x", after=after)
        if self.lives is None:
            return itertools.repeat(one)
        return itertools.chain(itertools.repeat(one, self.lives), [self.ends])

    def spec(self) -> orc.VmSpec:
        limit, exit_limit, vcpu_limit, vcpu_exit_limit = self.limits
        return attrs.evolve(
            blank(self.name),
            tenant=self.tenant,
            vcpus=self.vcpus,
            limit=limit,
            exit_limit=exit_limit,
            vcpu_limit=vcpu_limit,
            vcpu_exit_limit=vcpu_exit_limit,
            restart=orc.Restart(when="on-failure", backoff=self.backoff),
            on_reset="reset",
        )


GUESTS = st.builds(
    Guest,
    name=st.just(""),
    tenant=st.sampled_from(TENANTS),
    vcpus=st.integers(1, 2),
    locks=st.booleans(),
    rate=st.sampled_from([0.5, 2, 6, 15]),
    limits=st.tuples(*[LIMITS] * 4),
    lives=st.none() | st.integers(0, 40),
    ends=st.sampled_from([failed_run(5), triple_fault()]),
    backoff=st.sampled_from([0.5, 0.5, 12]),
)

DEEDS = st.one_of(
    st.tuples(
        st.just("limit"),
        st.sampled_from(["host", "tenant", "vm", "vcpu"]),
        st.integers(0, 2),
        st.sampled_from(METERS),
        LIMITS,
    ),
    st.tuples(
        st.just("throttle"),
        st.sampled_from(["host", "tenant", "vm"]),
        st.integers(0, 2),
        st.sampled_from(METERS),
        LIMITS,
    ),
    st.tuples(st.sampled_from(["pause", "resume", "stop", "launch"]), st.integers(0, 2)),
)


POLICIES = {
    "static": lambda limit: orc.StaticLimits(vms={"vm-0": limit}, tenants={"lab": limit}, meter="exits"),
    "share": lambda limit: orc.WeightedShare(limit=limit, meter="exits", interval=1.0),
}


@st.composite
def plans(draw: st.DrawFn) -> dict[str, object]:
    guests = [attrs.evolve(one, name=f"vm-{n}") for n, one in enumerate(draw(st.lists(GUESTS, min_size=1, max_size=3)))]
    return {
        "guests": guests,
        "host": draw(st.tuples(LIMITS, LIMITS)),
        "tenants": draw(st.tuples(*[st.tuples(LIMITS, LIMITS)] * len(TENANTS))),
        "policy": draw(st.none() | st.tuples(st.sampled_from(["static", "share"]), LIMITS)),
        "interval": draw(st.sampled_from([1.0, 1.0, 7.0])),
        "deeds": draw(st.lists(st.tuples(st.floats(0.3, 25), DEEDS), max_size=6)),
        "rest": draw(st.floats(1, 40)),
    }


@attrs.define
class Life:
    """One launch, as whoever looked at its counters knows it. Times are the fleet's."""

    vm: orc.Vm
    begin: int
    end: int | None = None
    seen: list[tuple[int, dict[str, float]]] = attrs.field(factory=list)
    pauses: list[list[int]] = attrs.field(factory=list)
    waits: list[list[int]] = attrs.field(factory=list)  # between two runs
    rates: list[tuple[int, dict[str, set[float]]]] = attrs.field(factory=list)

    def at(self, time: int) -> dict[str, float]:
        """The counters at a time at which somebody looked, before it was launched, or after its end."""
        if time <= self.begin:
            return {}
        if self.end is not None and time >= self.end:
            return self.seen[-1][1]
        return min(self.seen, key=lambda one: abs(one[0] - time))[1]

    def held(self, begin: int, end: int) -> dict[str, float]:
        before, after = self.at(begin), self.at(end)
        found = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in BUCKETS}
        for name, idle in (("pause", self.pauses), ("waiting", self.waits)):
            whole = sum(max(0, min(end, until) - max(begin, since)) for since, until in idle) / SECOND
            found[name] = whole * self.vm.spec.vcpus
        return {name: much for name, much in found.items() if much > 1e-6}


class Afternoon:
    """Lives a plan, and looks at the counters itself."""

    def __init__(self, plan: dict[str, object], path: Path) -> None:
        self.plan, self.path = plan, path
        self.lives: list[Life] = []
        self.offset = 0

    def run(self) -> None:
        trio.run(self._live, clock=MockClock(autojump_threshold=0))

    async def _live(self) -> None:
        plan, kept = self.plan, Journal(self.path, keep_days=36500)
        guests: list[Guest] = plan["guests"]
        scripts = {one.name: one for one in guests}
        backend = ScriptedBackend(lambda spec, vcpu: scripts[spec.name].script())
        policy, interval = plan["policy"], plan["interval"]
        policies = [] if policy is None or policy[1] is None else [POLICIES[policy[0]](policy[1])]
        async with orc.open_fleet(
            backend=backend,
            limit=plan["host"][0],
            exit_limit=plan["host"][1],
            tenants=[
                orc.Tenant(name, limit=limits[0], exit_limit=limits[1])
                for name, limits in zip(TENANTS, plan["tenants"], strict=True)
            ],
            policies=policies,
            guard=orc.Guard(floor=0.001, exit_floor=0.001, max_delay=1e6, max_pause=1e6),
            journal=kept,
            journal_interval=interval,
        ) as fleet:
            self.fleet, self.offset = fleet, kept._offset
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                nursery.start_soon(self._look, trio.current_time(), interval)
                for one in guests:
                    await self._launch(one)
                for after, deed in plan["deeds"]:
                    await trio.sleep(after)
                    await self._do(deed)
                await trio.sleep(plan["rest"])
                nursery.cancel_scope.cancel()
            self._snap()
            self.over = fleet.now()
        for life in self.lives:
            self._end(life)

    async def _look(self, begun: float, interval: float) -> None:
        for n in itertools.count(1):
            await trio.sleep_until(begun + n * interval)
            self._snap()

    def _snap(self) -> None:
        for life in self.lives:
            if life.end is None:
                life.seen.append((self.fleet.now(), dict(life.vm.statistics().throttled_by)))
            self._rates(life)

    def _rates(self, life: Life) -> None:
        vm = life.vm
        if life.end is not None:
            return
        found: dict[str, set[float]] = {}
        for meter in METERS:
            levels = {
                "host": [self.fleet.budgets(None)],
                "tenant": [self.fleet.budgets(vm.tenant)],
                "vm": [vm.budgets],
                "vcpu": vm.vcpu_budgets,
            }
            for level, of in levels.items():
                found[f"{level}.{meter}"] = {one[meter].limit.rate for one in of if one[meter].limit is not None}
        life.rates.append((self.fleet.now(), found))

    async def _launch(self, guest: Guest) -> None:
        self.lives.append(Life(await self.fleet.launch(guest.spec()), self.fleet.now()))
        self._rates(self.lives[-1])
        self.nursery.start_soon(self._runs, self.lives[-1])

    async def _runs(self, life: Life) -> None:
        """Watch it wait between two runs."""
        vm = life.vm
        while vm.outcome is None:
            await testing.wait_until(lambda: vm.state is orc.State.WAITING or vm.outcome, within=1e6)
            if vm.outcome is None:
                life.waits.append([self.fleet.now(), 1 << 62])
                await testing.wait_until(lambda: vm.state is not orc.State.WAITING, within=1e6)
                life.waits[-1][1] = self.fleet.now()

    def _end(self, life: Life) -> None:
        if life.end is None:
            life.end = self.over
            life.seen.append((self.over, dict(life.vm.statistics().throttled_by)))
            for idle in (*life.pauses, *life.waits):
                idle[1] = min(idle[1], self.over)

    async def _do(self, deed: tuple[object, ...]) -> None:
        fleet, guests = self.fleet, self.plan["guests"]
        what, *rest = deed
        if what in ("limit", "throttle"):
            level, number, meter, limit = rest
            guest = guests[number % len(guests)]
            if level in ("vm", "vcpu") and guest.name not in fleet.vms:
                return
            where = {"tenant": guest.tenant} if level == "tenant" else {} if level == "host" else {"vm": guest.name}
            if what == "limit":
                vcpu = number % guest.vcpus if level == "vcpu" else None
                await fleet.set_limit(limit, meter=meter, vcpu=vcpu, **where)
            elif limit is None:
                await fleet.apply(orc.Unthrottle(meter=meter, **where), policy="hand")
            else:
                await fleet.apply(orc.Throttle(limit=limit, meter=meter, **where), policy="hand")
            for life in self.lives:
                self._rates(life)
            return
        guest = guests[rest[0] % len(guests)]
        life = next((one for one in reversed(self.lives) if one.vm.name == guest.name and one.end is None), None)
        if life is None:
            if what == "launch":
                await self._launch(guest)
            return
        now = fleet.now()
        if what == "pause" and not (life.pauses and life.pauses[-1][1] > now) and life.vm.guest.final is None:
            await life.vm.pause()
            life.pauses.append([now, 1 << 62])
        elif what == "resume":
            await life.vm.resume()
            if life.pauses and life.pauses[-1][1] > now:
                life.pauses[-1][1] = now
        elif what == "stop":
            await life.vm.stop()
            self.over = now
            self._end(life)


def told_rightly(lived: Afternoon, told: Explanation, life: Life) -> None:
    """The causes are those of the counters, in their order, and so is the text."""
    offset, interval = lived.offset, lived.plan["interval"]
    begin, end = told.begin - offset, told.end - offset
    assert end == pytest.approx(told.until - offset, abs=interval * SECOND)
    asked = (told.until if told.ends is None else told.at) - offset
    assert begin <= max(life.begin, asked - LATELY) + 1000
    assert begin >= max(life.begin, asked - LATELY - round(interval * SECOND)) - 1000
    counted = life.held(begin, end)
    by = {(f"{one.where}.{one.meter}" if one.kind == "limit" else one.kind): one for one in told.causes}
    text = " ".join(sentences(told))
    whole = told.seconds * life.vm.spec.vcpus
    assert {name: one.share for name, one in by.items()} == pytest.approx(
        {name: much / whole for name, much in counted.items()}, abs=1e-5
    )
    assert list(by.values()) == sorted(by.values(), key=lambda one: -one.seconds)
    assert ("Nothing held it" in text) <= (not counted)
    assert ("Nothing that is known here slows it" in text) <= (not counted)
    if not counted:
        return
    first = told.causes[0]
    name = first.kind if first.kind != "limit" else f"{first.where}.{first.meter}"
    assert counted[name] == pytest.approx(max(counted.values()), abs=2e-6)
    (leads, *_) = held(told)
    assert text.index(leads) < min(
        (text.index(x) for x in ("On the host", "gets no CPU") if x in text), default=1 << 30
    )
    if first.kind == "pause":
        assert "held it paused" in leads
        return
    if first.kind == "waiting":
        assert "Between two runs it waited" in leads
        return
    events = f"{first.meter.replace('_', ' ')}/s"
    whom = {"host": "the whole host", "tenant": f"its tenant {life.vm.tenant}", "vm": "held it to", "vcpu": "its vCPU"}
    assert whom[first.where] in leads
    assert events in leads
    rates = {rate for time, of in life.rates if time <= end + 1000 for rate in of[name]}
    assert first.setters, leads
    if first.setters[0].hold.action.policy != "weighted-share":  # which may have others between two looks of ours
        assert set(first.setters[0].rates) <= rates


def cut(path: Path, time: int) -> Path:
    """The journal as a kill -9 would have left it then."""
    killed = path.with_name("killed.db")
    shutil.copy(path, killed)
    with closing(sqlite3.connect(killed)) as connection, connection:
        for table in ("actions", "states", "aggregates", "vcpus", "hosts"):
            connection.execute(f"DELETE FROM {table} WHERE time > ?", (time,))
        connection.execute("UPDATE sessions SET ended = NULL")
    return killed


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(plan=plans(), part=st.floats(0, 1), late=st.floats(0, 200), killed=st.floats(0, 1))
def test_what_why_names_first_held_the_vm_for_longest_by_the_counters(plan, part, late, killed):
    with tempfile.TemporaryDirectory() as folder:
        lived = Afternoon(plan, Path(folder) / "fleet.db")
        lived.run()
        over = lived.over
        with read_journal(lived.path) as journal:
            for life in lived.lives:
                later = [one.begin for one in lived.lives if one.vm.name == life.vm.name and one.begin > life.begin]
                until = min(later, default=over + round(late * SECOND)) - 1
                at = life.begin + round(part * (until - life.begin))
                told = explain(journal, life.vm.name, at + lived.offset)
                assert told.ends is None
                if told.seconds:
                    told_rightly(lived, told, life)
                else:
                    assert at - life.begin < SECOND
            early = explain(journal, lived.lives[0].vm.name, lived.lives[0].begin + lived.offset - SECOND)
            assert (early.causes, early.fared, early.holds) == ((), None, ())
            assert "the journal begins at" in " ".join(sentences(early))
        at = round(killed * over) + lived.offset
        with read_journal(cut(lived.path, at)) as journal:
            last = journal.last_interval(1)
            for life in lived.lives:
                if not life.begin < at - lived.offset < (life.end or over):
                    continue  # of one that had ended it is known how
                beyond(lived, explain(journal, life.vm.name, at + round(late * SECOND) + 1), life, last)


def beyond(lived: Afternoon, told: Explanation, life: Life, last: int | None) -> None:
    """A question about a time after the kill."""
    text = " ".join(sentences(told))
    assert told.ends is not None
    assert "The journal ends at" in text
    if told.seconds:
        assert told.ends == told.end == last
        assert told.end - told.begin <= LATELY + 8 * SECOND
        assert told.covered.asked[0] >= told.at - LATELY or told.at - told.ends < LATELY
        told_rightly(lived, told, life)
    else:
        assert told.causes == ()
        assert "held it" not in text
        assert "slows it" not in text
        assert "In force" not in text
