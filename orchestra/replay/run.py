"""Goes through a journal once more, interval by interval, under other rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from ..actions import Action
from ..errors import SpecError
from ..journal import JournalReader
from ..policy import Facts, Guard, HostFacts, Policy, VmFacts
from ..policy.guard import Ruling
from ..policy.inforce import InForce
from ..policy.maxmin import max_min
from ..policy.rehearsal import Rehearsal
from ..rules import Rules
from ..spec import Limit, Meter, Tenant
from .demand import Demands, Tick, Want, ticks, together
from .response import Response, fit
from .tally import Tally, World

__all__ = ["Replay", "World", "replay"]


DEEDS: Final = 1000
"""Actions that are kept one by one."""

ENOUGH: Final = 10_000
"""Intervals from which lines are drawn: more don't make them surer, and would have to be read twice."""


@attrs.frozen
class Deed:
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
    deeds: tuple[Deed, ...]
    errors: Mapping[str, str]
    response: Response
    budget: bool


@attrs.define(eq=False)
class _Seat:
    policy: Policy
    order: int
    last: int
    due: int
    rehearsal: Rehearsal | None
    told: list[Mapping[str, VmFacts]] = attrs.field(factory=list)  # since it decided last
    gone: list[tuple[str, int]] = attrs.field(factory=list)
    on: bool = True


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
        SpecError: there is nothing in that time, or a policy looks at answers, which no journal keeps.
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
    whole = _Whole(Tally(*span, response))
    for tick in told("replay"):
        if run is None or run.session != tick.session:
            run = _Run(make(), tick, whole)
            whole.sessions += 1
        run.step(tick)
    for row in journal.actions(since=span[0], until=span[1]):
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
        raise SpecError("the journal has no intervals to go through: a fleet writes one each time that it looks")
    first = max(span[0], since if since is not None else 0)
    last = min(span[1], until if until is not None else span[1])
    if first >= last:
        raise SpecError("the journal has nothing of that time")
    return first, last


def _intervals(journal: JournalReader, span: tuple[int, int]) -> int:
    """About how many there are. The host's row is there in each."""
    return int(journal.query("SELECT count(*) FROM hosts WHERE time BETWEEN ? AND ?", span)[0][0])


def _check_kept(rules: Rules) -> None:
    """Raises:
    SpecError: a policy would be told that there were none of what is not in a journal.
    """
    for policy in rules.policies:
        signals = {one.signal for step in getattr(policy, "steps", ()) for one in step.when}
        if getattr(policy, "meter", None) is Meter.ANSWERS or Meter.ANSWERS in signals:
            raise SpecError(
                f"policy {policy.name!r}: looks at answers, which journals don't keep: it can't be replayed; leave it "
                "out of the rules to replay, or let it run dry (guard.dry_run) beside a fleet"
            )


@attrs.define(eq=False)
class _Whole:
    """What all sessions add to."""

    tally: Tally
    sessions: int = 0
    deeds: list[Deed] = attrs.field(factory=list)
    errors: dict[str, str] = attrs.field(factory=dict)
    budget: bool = False


class _Run:
    """One session under the rules."""

    def __init__(self, rules: Rules, first: Tick, whole: _Whole) -> None:
        begun = first.time - round(first.interval * 1e9)
        _check_kept(rules)
        self.session = first.session
        self._rules = rules
        self._whole = whole
        self._guard = rules.guard or Guard()
        self._force = InForce(rules.limit, rules.exit_limit, rules.tenants, rules.answer_limit)
        self._seats = [
            _Seat(
                policy,
                i,
                begun,
                begun + round((policy.interval or 0.0) * 1e9),
                Rehearsal() if self._guard.is_dry(policy.name) else None,
            )
            for i, policy in enumerate(rules.policies)
        ]
        self._rehearsals = [seat.rehearsal for seat in self._seats if seat.rehearsal is not None]
        self._demands = Demands()
        self._tenants: dict[str, Tenant] = dict(rules.tenants)

    def step(self, tick: Tick) -> None:
        for vm in tick.new:
            self._new(vm)
        if self._rules.limit is None and tick.host is not None:  # the rules say nothing: as it was
            rate = tick.host.rate
            base = None if rate is None else Limit(rate=rate)
            self._force.set_base(("host", ""), Meter.BUS_LOCKS, base)
        held = self._demands.held(tick)
        wants: Mapping[str, Want | VmFacts] = {**tick.vms, **held} if held else tick.vms
        passed = self._force.let_through(wants, tick.interval)
        told = self._whole.tally.add(tick, held, passed, self._fair(wants, tick.interval))
        for name, launch in tick.gone:
            if not self._force.is_another(name, launch):
                self._gone(name)
        for seat in self._seats:
            if not seat.on:
                continue
            if told.vms:
                seat.told.append(told.vms)
            seat.gone += tick.gone
            if seat.due <= tick.time:
                self._decide(seat, tick.time, told.host)
        for action in self._guard.overdue(tick.time):
            self._force.apply(action, "")
        for action in self._guard.overdue(tick.time, dry=True):
            self._rehearse(action, "", tick.time)

    def _new(self, vm: VmFacts) -> None:
        """A VM that was not seen before; nothing holds it, whatever held another of its name."""
        if self._force.seen(vm.name, vm.launch):
            self._gone(vm.name)
            self._force.seen(vm.name, vm.launch)
        if vm.tenant not in self._tenants:
            self._tenants[vm.tenant] = Tenant(vm.tenant)

    def _rehearse(self, action: Action, policy: str, now: int) -> None:
        for rehearsal in self._rehearsals:
            rehearsal.apply(action, policy, now)

    def _gone(self, vm: str) -> None:
        self._guard.forget(vm)
        self._force.forget(vm)
        self._demands.forget(vm)
        for rehearsal in self._rehearsals:
            rehearsal.forget(vm)

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

    def _decide(self, seat: _Seat, now: int, host: HostFacts) -> None:
        facts = Facts(
            time=now,
            interval=max((now - seat.last) / 1e9, 1e-9),
            limit=self._force.host_limit(Meter.BUS_LOCKS),
            exit_limit=self._force.host_limit(Meter.EXITS),
            answer_limit=self._force.host_limit(Meter.ANSWERS),
            tenants=self._tenants,
            vms=together(seat.told, set(seat.gone)),
            host=host,
            gone=tuple(seat.gone),
        )
        seat.told, seat.gone, seat.last = [], [], now
        policy = seat.policy
        try:
            interval = policy.interval
            actions = list(policy.decide(facts if seat.rehearsal is None else seat.rehearsal.see(facts)))
        except Exception as error:  # as in a fleet: it is switched off, and the others go on
            seat.on = False
            self._whole.errors[policy.name] = f"{type(error).__name__}: {error}"
            return
        seat.on = interval is not None
        seat.due = now + round((interval or 0.0) * 1e9)
        for action in actions:
            self._apply(seat, action, now, max(1, len(facts.vms)))

    def _apply(self, seat: _Seat, action: Action, now: int, vms: int) -> None:
        policy = seat.policy
        verdict = self._guard.judge(action, policy.name, now, seat.order, vms=vms)
        outcome = {Ruling.REFUSED: "refused", Ruling.DRY_RUN: "dry-run"}.get(verdict.outcome, "done")
        if verdict.action is not None:
            self._force.apply(verdict.action, policy.name)
        elif verdict.outcome is Ruling.DRY_RUN:
            self._rehearse(verdict.judged, policy.name, now)
        elif (refused := getattr(policy, "refused", None)) is not None:
            refused(action, verdict.reason)
        judged = verdict.judged
        self._whole.tally.would(type(judged).__name__, outcome, judged.vm)
        if len(self._whole.deeds) < DEEDS:
            self._whole.deeds.append(Deed(now, policy.name, judged, outcome))
