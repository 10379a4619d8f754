"""Goes through a journal once more, interval by interval, with other rules."""

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
"""Actions that are kept one by one. Further ones are only counted, so that memory does not grow with the journal."""

ENOUGH: Final = 10_000
"""Intervals to which lines are fitted. More do not make the lines surer, and all of them have to be read twice."""


@attrs.frozen
class ActionRecord:
    """An action that the rules would have led to. `outcome`: "done", "dry-run" or "refused"."""

    time: int
    policy: str
    action: Action
    outcome: str


@attrs.frozen
class Replay:
    """The result of a replay.

    Attributes:
        since, until: the time that was replayed, in nanoseconds since the epoch.
        seconds: how much of that time the journal's intervals cover.
        sessions: how many fleets were open, one after another. The rules start anew for each of them.
        before, after: the world as it was, and as it would have been.
        deeds: the first actions, one by one.
        errors: why policies were switched off, by the policy's name.
        response: how the victims respond to bus locks, as far as the journal shows it.
        budget: there was a budget to share. If not, the fair share of each VM is what it asked for.
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
    """The facts for a policy since it decided last."""

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
    """Let rules decide on the intervals of a journal.

    The time grows with activity: some 10 microseconds for each VM and interval in which it was active, and what the
    policies themselves take. How victims respond is fitted to some 10,000 of the intervals, evenly spread.

    Parameters:
        make: makes the rules. It is called for each session, as policies remember and each session starts anew.
        since, until: nanoseconds since the epoch.
        progress: called now and then with the name of the step, how much of it is done, and of how much.

    Raises:
        FileError: the journal has nothing of that time.
        JournalError: the journal can't be read.
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
        if row.given is None:  # a limit that was given at the start is no action
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
    """About how many intervals there are: each has a row of the host."""
    return int(journal.query("SELECT count(*) FROM hosts WHERE time BETWEEN ? AND ?", span)[0][0])


def _check_kept(rules: Rules) -> None:
    """Check that journals keep what the policies look at.

    Raises:
        SpecError: a policy looks at answers. A replay would show it none, and it would decide as if there were none.
    """
    for policy in rules.policies:
        decides: Any = policy
        while isinstance(decides, Only):  # `Only` shows the meter of its policy, and not the steps
            decides = decides.policy
        signals = {one.signal for step in getattr(decides, "steps", ()) for one in step.when}
        if getattr(decides, "meter", None) is Meter.ANSWERS or Meter.ANSWERS in signals:
            raise SpecError(
                f"policy {policy.name!r}: looks at answers, which journals don't keep: it can't be replayed; leave it "
                "out of the rules to replay, or let it run dry (guard.dry_run) beside a fleet"
            )


@attrs.define(eq=False)
class _Whole:
    """The sums of all sessions."""

    tally: Metrics
    sessions: int = 0
    deeds: list[ActionRecord] = attrs.field(factory=list)
    errors: dict[str, str] = attrs.field(factory=dict)
    budget: bool = False


class _Run:
    """One session with the rules: the engine's source of facts and its executor."""

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
            if limit.vm is not None and limit.generation is not None:
                self._seen(limit.vm, limit.generation)
            self._force.apply(limit, "")
            if limit.tenant is not None:
                tenant = self._tenants.get(limit.tenant) or Tenant(limit.tenant)
                changed: dict[str, Any] = {limit.meter.field: limit.limit}
                self._tenants[limit.tenant] = attrs.evolve(tenant, **changed)
        for vm in tick.new:
            self._seen(vm.name, vm.generation)
            self._living.seen(vm)
            if vm.tenant not in self._tenants:
                self._tenants[vm.tenant] = Tenant(vm.tenant)
        if self._rules.limit is None and tick.host is not None and not self._given.knows_host:
            # A journal of an older version has no row of the host's limit. The rules have none either, so the limit is
            # that of the host's rows.
            rate = tick.host.rate
            base = None if rate is None else Limit(rate=rate)
            self._force.set_base(("host", ""), Meter.BUS_LOCKS, base)
        held = self._demands.held(tick)
        wants: Mapping[str, Want | VmFacts] = {**tick.vms, **held} if held else tick.vms
        passed = self._force.let_through(wants, tick.interval)
        told = self._whole.tally.add(tick, held, passed, self._fair(wants, tick.interval))
        for name, generation in tick.gone:
            self._living.gone(name, generation)
            if not self._force.is_another(name, generation):
                self._gone(name)
        for window in self._windows:
            if told.vms:
                window.told.append(told.vms)
            window.gone += tick.gone
        self._time, self._host = tick.time, told.host
        self._engine.tick(tick.time)

    def _seen(self, vm: str, generation: int) -> None:
        """Note a VM. If it is a new VM of a known name, forget what held the earlier one."""
        if self._force.seen(vm, generation):
            self._gone(vm)
            self._force.seen(vm, generation)

    def _gone(self, vm: str) -> None:
        self._engine.gone(vm)
        self._force.forget(vm)
        self._demands.forget(vm)

    def _fair(self, wants: Mapping[str, Want | VmFacts], interval: float) -> dict[str, float] | None:
        """Each VM's weighted max-min share of the budget, in bus locks. None: there is enough for all demands."""
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

    # ---- the engine's executor

    def do(
        self, action: Action, policy: str | None, verdict: Verdict | None, state: PolicyState | None, now: int
    ) -> Done:
        self._force.apply(action, policy or "")
        if policy is not None:
            self._notify(policy, action, "done")
        return None

    def record(self, applied: Applied, cause: Exception | None = None) -> None:
        policy = applied.policy or ""
        if applied.action is None:  # as in a fleet: the policy is switched off, and the others go on
            self._whole.errors[policy] = applied.error or ""
        elif applied.policy is not None:
            self._notify(policy, applied.action, applied.outcome)

    def _notify(self, policy: str, action: Action, outcome: str) -> None:
        self._whole.tally.would(type(action).__name__, outcome, action.vm)
        if len(self._whole.deeds) < DEEDS:
            self._whole.deeds.append(ActionRecord(self._time, policy, action, outcome))
