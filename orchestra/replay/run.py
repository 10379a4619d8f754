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
from ..policy.maxmin import max_min
from ..rules import Rules
from ..spec import Limit, Meter, Tenant
from .demand import Demands, Tick, Want, ticks
from .limits import InForce
from .response import Response, fit
from .tally import Tally, World

__all__ = ["Replay", "World", "replay"]

DEEDS: Final = 1000
"""Actions that are kept one by one."""


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
    sums: dict[str, VmFacts] = attrs.field(factory=dict)
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

    Takes two passes over the journal's intervals; some 40 microseconds for each VM in each.

    Parameters:
        make: the rules, made anew: policies remember, and each session starts with new ones.
        since, until: nanoseconds since the epoch.
        progress: told now and then: what is done, how much of it, of how much.

    Raises:
        SpecError: there is nothing in that time.
    """
    span = _span(journal, since, until)
    tell = progress or (lambda *_: None)

    def told(label: str) -> Any:
        for i, tick in enumerate(ticks(journal, *span)):
            if i % 1000 == 0:
                tell(label, tick.time - span[0], span[1] - span[0])
            yield tick
        tell(label, span[1] - span[0], span[1] - span[0])

    response = fit(told("how victims answer"))
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
        self.session = first.session
        self._rules = rules
        self._whole = whole
        self._guard = rules.guard or Guard()
        self._force = InForce(rules.limit, rules.exit_limit, rules.tenants)
        self._seats = [
            _Seat(policy, i, begun, begun + round((policy.interval or 0.0) * 1e9))
            for i, policy in enumerate(rules.policies)
        ]
        self._demands = Demands()
        self._tenants: dict[str, Tenant] = dict(rules.tenants)

    def step(self, tick: Tick) -> None:
        wants = {name: self._demands.want(row) for name, row in tick.vms.items()}
        for name, want in wants.items():
            self._force.seen(name, want.seen.launch)
            if want.seen.tenant not in self._tenants:
                self._tenants[want.seen.tenant] = Tenant(want.seen.tenant)
        if self._rules.limit is None and tick.host is not None:  # the rules say nothing: as it was
            rate = tick.host.rate
            base = None if rate is None else Limit(rate=rate)
            self._force.set_base(("host", ""), Meter.BUS_LOCKS, base)
        passed = self._force.let_through(wants, tick.interval)
        fair = self._fair(wants, tick.interval)
        told = self._whole.tally.add(tick, wants, passed, fair)
        for seat in self._seats:
            for fact in told.vms.values():
                seat.sums[fact.name] = _sum(seat.sums.get(fact.name), fact)
            if seat.on and seat.due <= tick.time:
                self._decide(seat, tick.time, told.host)
        for action in self._guard.overdue(tick.time):
            self._force.apply(action, "")

    def _fair(self, wants: Mapping[str, Want], interval: float) -> dict[str, float]:
        """Each VM's weighted max-min share of the budget, in bus locks; where there is none, what it asks for."""
        names = [name for name, want in wants.items() if want.events.get(Meter.BUS_LOCKS)]
        budgets = [self._rules.limit or self._force.host_limit(Meter.BUS_LOCKS)]
        budgets += [getattr(policy, "limit", None) for policy in self._rules.policies]
        rates = [limit.rate for limit in budgets if isinstance(limit, Limit)]
        self._whole.budget = self._whole.budget or bool(rates)
        budget = min(rates, default=math.inf) * interval
        demands = [wants[name].events[Meter.BUS_LOCKS] for name in names]
        shares = max_min(budget, demands, [wants[name].seen.weight for name in names])
        return dict(zip(names, shares, strict=True))

    def _decide(self, seat: _Seat, now: int, host: HostFacts) -> None:
        facts = Facts(
            time=now,
            interval=max((now - seat.last) / 1e9, 1e-9),
            limit=self._force.host_limit(Meter.BUS_LOCKS),
            exit_limit=self._force.host_limit(Meter.EXITS),
            tenants=self._tenants,
            vms=seat.sums,
            host=host,
        )
        seat.sums, seat.last = {}, now
        policy = seat.policy
        try:
            interval = policy.interval
            actions = list(policy.decide(facts))
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
        elif outcome == "refused" and (refused := getattr(policy, "refused", None)) is not None:
            refused(action, verdict.reason)
        judged = verdict.judged
        self._whole.tally.would(type(judged).__name__, outcome, judged.vm)
        if len(self._whole.deeds) < DEEDS:
            self._whole.deeds.append(Deed(now, policy.name, judged, outcome))


def _sum(one: VmFacts | None, other: VmFacts) -> VmFacts:
    """What a VM did in two intervals."""
    if one is None or one.launch != other.launch:
        return other

    def both(a: float | None, b: float | None) -> float | None:
        return b if a is None else a if b is None else a + b

    locks = both(one.bus_locks, other.bus_locks)
    return attrs.evolve(
        other,
        bus_locks=None if locks is None else round(locks),
        exits=one.exits + other.exits,
        throttled=one.throttled + other.throttled,
        cpu=both(one.cpu, other.cpu),
        run_delay=both(one.run_delay, other.run_delay),
        capped=both(one.capped, other.capped),
        work=both(one.work, other.work),
    )
