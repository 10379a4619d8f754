"""Goes through a journal once more, interval by interval, under other rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from ..config import Rules
from ..journal import JournalReader
from ..model.actions import Action, Applied
from ..model.errors import FileError, SpecError
from ..model.spec import Limit, Meter, Tenant
from ..policy import Facts, Guard, HostFacts, Verdict, VmFacts
from ..policy.compose import Only
from ..policy.enforcement import Enforcement
from ..policy.engine import Done, PolicyEngine
from ..policy.maxmin import max_min
from ..policy.state import PolicyState
from .demand import Demands, Tick, Want, ticks, together
from .given import Given
from .living import Living
from .metrics import Metrics, World
from .response import Response, fit

__all__ = ["Replay", "World", "replay"]


DEEDS: Final = 1000
"""Actions that are kept one by one."""

ENOUGH: Final = 10_000
"""Intervals from which lines are drawn: more don't make them surer, and would have to be read twice."""


@attrs.frozen
class ActionRecord:
    """An action that the rules would have led to. `outcome`: "done", "dry-run" or "refused"."""

    time: int
    policy: str
    action: Action
    outcome: str


@attrs.frozen
class Replay:
    """What came of it.

    Attributes:
        since, until: the time that was gone through, nanoseconds since the epoch.
        seconds: of it, in which the journal was written.
        sessions: fleets that were open one after another. Each starts anew.
        before, after: as it was, and as it would have been.
        deeds: the first actions, one by one.
        errors: why policies were switched off.
        response: how the victims answer to bus locks, as far as that can be told.
        budget: there was a budget to share fairly; if not, fair is what each asked for.
    """

    since: int
    until: int
    seconds: float
    sessions: int
    before: World
    after: World
    deeds: tuple[ActionRecord, ...]
    errors: Mapping[str, str]
    response: Response
    budget: bool


@attrs.define(eq=False)
class _Window:
    """What was told to a policy since it decided last."""

    since: int
    told: list[Mapping[str, VmFacts]] = attrs.field(factory=list)
    gone: list[tuple[str, int]] = attrs.field(factory=list)


def replay(
    journal: JournalReader,
    make: Callable[[], Rules],
    *,
    since: int | None = None,
    until: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Replay:
    """Have rules decide on what a journal saw.

    It costs what was active: some 10 microseconds for each VM and interval in which it did something, and what the
    policies themselves take. How victims answer is worked out from some 10,000 of the intervals, evenly spread.

    Parameters:
        make: the rules, made anew: policies remember, and each session starts with new ones.
        since, until: nanoseconds since the epoch.
        progress: told now and then: what is done, how much of it, of how much.

    Raises:
        FileError: there is nothing in that time.
        SpecError: a policy looks at answers, which no journal keeps.
    """
    span = _span(journal, since, until)
    tell = progress or (lambda *_: None)

    def told(label: str, every: int = 1) -> Any:
        for i, tick in enumerate(ticks(journal, *span, every=every)):
            if i % 1000 == 0:
                tell(label, tick.time - span[0], span[1] - span[0])
            yield tick
        tell(label, span[1] - span[0], span[1] - span[0])

    response = fit(told("how victims answer", max(1, _intervals(journal, span) // ENOUGH)))
    run: _Run | None = None
    whole = _Whole(Metrics(*span, response))
    for tick in told("replay"):
        if run is None or run.session != tick.session:
            run = _Run(make(), tick, whole, journal)
            whole.sessions += 1
        run.step(tick)
    for row in journal.actions(since=span[0], until=span[1]):
        if row.given is None:  # else nobody did it
            whole.tally.did(row.kind, row.outcome, row.vm)
    before, after = whole.tally.worlds()
    return Replay(
        since=span[0],
        until=span[1],
        seconds=whole.tally.seconds,
        sessions=whole.sessions,
        before=before,
        after=after,
        deeds=tuple(whole.deeds),
        errors=whole.errors,
        response=response,
        budget=whole.budget,
    )


def _span(journal: JournalReader, since: int | None, until: int | None) -> tuple[int, int]:
    span = journal.intervals()
    if span is None:
        raise FileError(f"{journal.path}: has no intervals to go through: a fleet writes one each time that it looks")
    first = max(span[0], since if since is not None else 0)
    last = min(span[1], until if until is not None else span[1])
    if first >= last:
        raise FileError(f"{journal.path}: has nothing of that time")
    return first, last


def _intervals(journal: JournalReader, span: tuple[int, int]) -> int:
    """About how many there are. The host's row is there in each."""
    return int(journal.query("SELECT count(*) FROM hosts WHERE time BETWEEN ? AND ?", span)[0][0])


def _check_kept(rules: Rules) -> None:
    """Raises:
    SpecError: a policy would be told that there were none of what is not in a journal.
    """
    for policy in rules.policies:
        decides: Any = policy
        while isinstance(decides, Only):  # it shows the meter of what decides, and not its steps
            decides = decides.policy
        signals = {one.signal for step in getattr(decides, "steps", ()) for one in step.when}
        if getattr(decides, "meter", None) is Meter.ANSWERS or Meter.ANSWERS in signals:
            raise SpecError(
                f"policy {policy.name!r}: looks at answers, which journals don't keep: it can't be replayed; leave it "
                "out of the rules to replay, or let it run dry (guard.dry_run) beside a fleet"
            )


@attrs.define(eq=False)
class _Whole:
    """What all sessions add to."""

    tally: Metrics
    sessions: int = 0
    deeds: list[ActionRecord] = attrs.field(factory=list)
    errors: dict[str, str] = attrs.field(factory=dict)
    budget: bool = False


class _Run:
    """One session under the rules: the engine's source of facts and its executor."""

    def __init__(self, rules: Rules, first: Tick, whole: _Whole, journal: JournalReader) -> None:
        _check_kept(rules)
        self.session = first.session
        self._rules = rules
        self._whole = whole
        self._force = Enforcement(rules.limit, rules.exit_limit, rules.tenants, rules.answer_limit)
        self._demands = Demands()
        self._tenants: dict[str, Tenant] = dict(rules.tenants)
        self._living = Living(journal, first.session)
        self._given = Given(journal, first.session, rules)
        self.below = self._living.below
        self._windows: set[_Window] = set()
        self._time = first.time - round(first.interval * 1e9)
        self._host = HostFacts()
        self._engine = PolicyEngine(rules.policies, rules.guard or Guard(), now=self._time, executor=self, source=self)

    def step(self, tick: Tick) -> None:
        self._living.until(tick.time)
        for limit in self._given.until(tick.time):
            if limit.vm is not None and limit.launch is not None:
                self._seen(limit.vm, limit.launch)
            self._force.apply(limit, "")
            if limit.tenant is not None:
                tenant = self._tenants.get(limit.tenant) or Tenant(limit.tenant)
                changed: dict[str, Any] = {limit.meter.field: limit.limit}
                self._tenants[limit.tenant] = attrs.evolve(tenant, **changed)
        for vm in tick.new:
            self._seen(vm.name, vm.launch)
            self._living.seen(vm)
            if vm.tenant not in self._tenants:
                self._tenants[vm.tenant] = Tenant(vm.tenant)
        if self._rules.limit is None and tick.host is not None and not self._given.knows_host:
            # An older journal, and the rules say nothing: as it was.
            rate = tick.host.rate
            base = None if rate is None else Limit(rate=rate)
            self._force.set_base(("host", ""), Meter.BUS_LOCKS, base)
        held = self._demands.held(tick)
        wants: Mapping[str, Want | VmFacts] = {**tick.vms, **held} if held else tick.vms
        passed = self._force.let_through(wants, tick.interval)
        told = self._whole.tally.add(tick, held, passed, self._fair(wants, tick.interval))
        for name, launch in tick.gone:
            self._living.gone(name, launch)
            if not self._force.is_another(name, launch):
                self._gone(name)
        for window in self._windows:
            if told.vms:
                window.told.append(told.vms)
            window.gone += tick.gone
        self._time, self._host = tick.time, told.host
        self._engine.tick(tick.time)

    def _seen(self, vm: str, launch: int) -> None:
        """Maybe a VM that was not seen before; then nothing holds it, whatever held another of its name."""
        if self._force.seen(vm, launch):
            self._gone(vm)
            self._force.seen(vm, launch)

    def _gone(self, vm: str) -> None:
        self._engine.gone(vm)
        self._force.forget(vm)
        self._demands.forget(vm)

    def _fair(self, wants: Mapping[str, Want | VmFacts], interval: float) -> dict[str, float] | None:
        """Each VM's weighted max-min share of the budget, in bus locks; None: all can have what they ask for."""
        budgets = [self._rules.limit or self._force.host_limit(Meter.BUS_LOCKS)]
        budgets += [
            getattr(policy, "limit", None)
            for policy in self._rules.policies
            if getattr(policy, "meter", None) is Meter.BUS_LOCKS
        ]
        rates = [limit.rate for limit in budgets if isinstance(limit, Limit)]
        self._whole.budget = self._whole.budget or bool(rates)
        budget = min(rates, default=math.inf) * interval
        if sum([want.bus_locks or 0.0 for want in wants.values()]) <= budget:
            return None
        some = [(name, want) for name, want in wants.items() if want.bus_locks]
        shares = max_min(budget, [want.bus_locks or 0.0 for _, want in some], [want.weight for _, want in some])
        return dict(zip([name for name, _ in some], shares, strict=True))

    # ---- facts, for the engine

    def open(self) -> _Window:
        window = _Window(self._time)
        self._windows.add(window)
        return window

    def close(self, window: _Window) -> None:
        self._windows.discard(window)

    def facts(self, window: _Window) -> Facts:
        return Facts(
            time=self._time,
            interval=max((self._time - window.since) / 1e9, 1e-9),
            limit=self._force.host_limit(Meter.BUS_LOCKS),
            exit_limit=self._force.host_limit(Meter.EXITS),
            answer_limit=self._force.host_limit(Meter.ANSWERS),
            tenants=self._tenants,
            vms=together(window.told, set(window.gone)),
            host=self._host,
            gone=tuple(window.gone),
        )

    # ---- what the engine wants done

    def do(
        self, action: Action, policy: str | None, verdict: Verdict | None, state: PolicyState | None, now: int
    ) -> Done:
        self._force.apply(action, policy or "")
        if policy is not None:
            self._tell(policy, action, "done")
        return None

    def record(self, applied: Applied, cause: Exception | None = None) -> None:
        policy = applied.policy or ""
        if applied.action is None:  # as in a fleet: it is switched off, and the others go on
            self._whole.errors[policy] = applied.error or ""
        elif applied.policy is not None:
            self._tell(policy, applied.action, applied.outcome)

    def _tell(self, policy: str, action: Action, outcome: str) -> None:
        self._whole.tally.would(type(action).__name__, outcome, action.vm)
        if len(self._whole.deeds) < DEEDS:
            self._whole.deeds.append(ActionRecord(self._time, policy, action, outcome))
