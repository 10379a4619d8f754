"""Runs the policies: looks, lets each decide when it is due, has the guard judge what it wants, and hands that on."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final, Protocol

import attrs
import trio

from .actions import Action, Applied
from .activity import Activity, Window
from .apply import Begun
from .effects import Holdings
from .errors import SpecError
from .policy import Facts, Guard, HostFacts, Policy, Ruling, Verdict
from .policy.rehearsal import Rehearsal
from .signals import Trigger

__all__ = ["Governor", "PolicyStatus", "check_policies"]

log: Final = logging.getLogger("orchestra.policy")

SOON: Final = 100_000_000
"""Nanoseconds: pressure that comes up brings a tick forward only if it would be later than that, and only for a policy
that decided longer ago."""

REST: Final = 0.1
"""Part of an observer's interval: what is left at the end and is shorter joins the interval before. A rate of so little
time says nothing. So an interval is told when so much more time has passed."""

OVERDUE: Final = 1_000_000_000
"""Nanoseconds between two looks for VMs that were held for too long, where no policy ticks more often."""

LOGS: Final = 0.005
"""Seconds that a tick waits at most for dirty logs to be read: what takes longer is told at the next."""


class Fleet(Protocol):
    """What the governor needs of its fleet."""

    def now(self) -> int: ...
    def below(self, action: Action) -> int:
        """How many VMs an action is about."""

    def takes_time(self, action: Action) -> bool:
        """What comes of it is known only later: `begin` it, and `finish` it in a task."""

    def begin(self, action: Action, policy: str | None) -> Begun: ...
    async def finish(self, begun: Begun) -> Applied: ...

    async def carry_out(self, action: Action, policy: str | None) -> Applied:
        """Apply it, and journal it. There is a checkpoint for an eviction only: no tick waits for a VM."""

    def record(self, applied: Applied) -> Applied:
        """Journal what was not even tried."""

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run it in a task of the fleet's."""


@attrs.frozen
class PolicyStatus:
    """A policy's name, whether it is on, why it was switched off, and how many actions it asked for."""

    name: str
    on: bool
    error: str | None
    actions: int


@attrs.define(eq=False)
class _Seat:
    """A policy. `name` and `signals` are as it said at first: asked again, it might raise where nobody expects it."""

    policy: Policy
    name: str
    signals: tuple[str, ...]
    order: int
    window: Window
    due: int
    interval: int | None
    on: bool = True
    error: str | None = None
    actions: int = 0
    rehearsal: Rehearsal | None = None


@attrs.define(eq=False)
class _Observer:
    """Takes the facts of each interval, and decides nothing. `passed`: the interval before, until it is told."""

    take: Callable[[Facts], object]
    interval: int
    window: Window
    due: int
    passed: _Passed | None = None


@attrs.frozen(eq=False)
class _Passed:
    facts: Facts
    window: Window
    tell: int


def check_policies(policies: Iterable[Policy]) -> list[Policy]:
    """Raises:
    SpecError: one is no policy, or two have one name, or one raises when it is asked what it is.
    """
    checked = list(policies)
    for policy in checked:
        for what in ("name", "interval", "meter"):
            _ask(policy, what)
        if not isinstance(policy, Policy):
            raise SpecError(f"policies: {policy!r} must have a name, an interval and decide(facts)")
        _signals(policy)
    names = [_name(policy) for policy in checked]
    for name in names:
        if names.count(name) > 1:  # its limits and its entries in the journal go by its name
            raise SpecError(f"policies: two are named {name!r}; give each a name of its own (name=...)")
    return checked


def _ask(policy: Policy, what: str, default: Any = None) -> Any:
    """What a policy says of itself. Out of a property anything may come."""
    try:
        return getattr(policy, what, default)
    except Exception as error:
        raise SpecError(f"policies: {type(policy).__name__}: {what}: {type(error).__name__}: {error}") from error


def _name(policy: Policy) -> str:
    name = _ask(policy, "name")
    if not isinstance(name, str) or not name:
        raise SpecError(f"policies: {type(policy).__name__}: name={name!r}: must be a text")
    return name


def _signals(policy: Policy) -> tuple[str, ...]:
    """The host's signals that a policy says it listens to."""
    signals = _ask(policy, "signals", ())
    if not isinstance(signals, Collection) or isinstance(signals, str) or not all(isinstance(s, str) for s in signals):
        raise SpecError(f"policies: {type(policy).__name__}: signals={signals!r}: must be names of signals")
    return tuple(signals)


def _interval(policy: Policy) -> int | None:
    """A policy's interval in nanoseconds."""
    interval = _ask(policy, "interval")
    if interval is None:
        return None
    if isinstance(interval, bool) or not isinstance(interval, int | float) or not 1e-6 <= interval < math.inf:
        raise SpecError(
            f"policy {_name(policy)!r}: interval={interval!r}: must be seconds, at least 1e-6, or None for only once"
        )
    return round(interval * 1e9)


class Governor:
    """One tick serves all policies, and whoever only looks."""

    def __init__(
        self, fleet: Fleet, policies: Iterable[Policy], *, activity: Activity, guard: Guard, strict: bool
    ) -> None:
        self._fleet = fleet
        self._activity = activity
        self._guard = guard
        self._strict = strict
        self._seats: list[_Seat] = []
        self._observer: _Observer | None = None
        self._hurry = trio.Event()
        self._lock = trio.Lock()
        self._watched: set[str] = set()
        self._host = HostFacts()
        self._seat(policies, guard)

    def _seat(self, policies: Iterable[Policy], guard: Guard) -> None:
        """Have these policies decide from now on. One that is there already keeps its seat."""
        policies, now = list(policies), self._fleet.now()
        # These may refuse one, before anything is changed.
        intervals = [_interval(policy) for policy in policies]
        said = [(_name(policy), _signals(policy)) for policy in policies]
        there = {id(seat.policy): seat for seat in self._seats}
        rehearsal = next(self._rehearsals(), None)
        self._seats = []
        for order, policy in enumerate(policies):
            seat = there.pop(id(policy), None)
            if seat is None:
                # Facts are about an interval: a policy that ticks decides first when one has passed.
                interval = intervals[order]
                seat = _Seat(policy, *said[order], order, self._activity.open(), now + (interval or 0), interval)
                if guard.is_dry(seat.name):  # what others rehearse is in force for it as well
                    seat.rehearsal = Rehearsal() if rehearsal is None else copy.deepcopy(rehearsal)
                self._activity.host.listen(seat.signals)
            seat.order = order
            self._seats.append(seat)
        for seat in there.values():
            if seat.on:
                self._activity.close(seat.window)
            seat.on = False
            for one in self._rehearsals():
                one.let_go(seat.name)

    def _rehearsals(self) -> Iterator[Rehearsal]:
        return (seat.rehearsal for seat in self._seats if seat.rehearsal is not None)

    async def set_policies(self, policies: Sequence[Policy], guard: Guard | None, holdings: Holdings) -> None:
        """As `Fleet.set_policies`. `holdings`: what is in force."""
        async with self._lock:  # no tick meanwhile; and from here on no checkpoint, so nobody stops half way
            guard = guard or self._guard
            self._check_rehearsals(policies, guard)
            before = {id(seat.policy): seat for seat in self._seats}
            self._activity.look(self._fleet.now())  # what was before is no new policy's affair
            self._seat(policies, guard)
            for policy in policies:
                before.pop(id(policy), None)
            for seat in before.values():
                for action in holdings.undo(seat.name):
                    await self._let_go(seat, action)
            guard.succeed(self._guard, [seat.name for seat in self._seats])
            self._guard = guard
        self._hurry.set()

    def _check_rehearsals(self, policies: Iterable[Policy], guard: Guard) -> None:
        """A policy that rehearsed believes to be in force what is not, and the other way round."""
        there = {id(seat.policy) for seat in self._seats}
        for policy in policies:
            name = _name(policy)
            was, dry = self._guard.is_dry(name), guard.is_dry(name)
            if was != dry and id(policy) in there:
                raise SpecError(
                    f"guard: policy {name!r} {'only rehearsed' if was else 'was no rehearsal'} so far, and "
                    "remembers that: give a new one in its place"
                )

    async def _let_go(self, seat: _Seat, action: Action) -> None:
        """What a policy held that is not there any more, unless somebody holds it who goes first."""
        fleet, name = self._fleet, seat.name
        now = fleet.now()
        action = attrs.evolve(action, reason=f"policy {name} was taken away")
        verdict = self._guard.judge(action, name, now, seat.order)
        if verdict.action is None:
            fleet.record(Applied(time=now, action=action, policy=name, error=verdict.reason, outcome="refused"))
        elif (await fleet.carry_out(action, name)).error is not None:
            self._guard.failed(verdict, fleet.now())

    def observe(self, take: Callable[[Facts], object], interval: float) -> None:
        """Have the facts of each interval (seconds) taken as well, before the policies decide."""
        every = round(interval * 1e9)
        self._observer = _Observer(take, every, self._activity.open(), self._fleet.now() + every)

    def statistics(self) -> tuple[PolicyStatus, ...]:
        return tuple(PolicyStatus(seat.name, seat.on, seat.error, seat.actions) for seat in self._seats)

    @property
    def host(self) -> HostFacts:
        """The host as the last tick saw it."""
        return self._host

    def wake(self) -> None:
        """There is more to look at than before."""
        self._hurry.set()

    def gone(self, vm: str) -> None:
        """A VM has ended for good."""
        self._guard.forget(vm)
        for rehearsal in self._rehearsals():
            rehearsal.forget(vm)

    # ---- the task

    async def run(self) -> None:
        """Tick whenever somebody is due, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                if new := self._pressures() - self._watched:
                    self._watched |= new
                    for trigger in self._activity.host.triggers(new):
                        nursery.start_soon(self._watch, trigger)
                self._hurry = trio.Event()
                due = await self.tick()
                with trio.move_on_after(math.inf if due is None else max(0.0, (due - self._fleet.now()) / 1e9)):
                    await self._hurry.wait()

    def _pressures(self) -> set[str]:
        """The pressures that can't wait for a policy's next tick."""
        slow = (seat for seat in self._seats if seat.on and (seat.interval or 0) > 2 * SOON)
        return {signal for seat in slow for signal in seat.signals if signal.endswith("_pressure")}

    async def _watch(self, trigger: Trigger) -> None:
        try:
            while True:
                await trigger.wait()
                self.hurry(trigger.signal)
        except OSError as error:
            log.warning("%s: no longer waited for", error)
        finally:
            trigger.close()

    def hurry(self, signal: str) -> None:
        """Pressure came up: policies that listen to it decide now, unless they just did or will at once."""
        now = self._fleet.now()
        for seat in self._seats:
            recent = now - seat.window.since < SOON
            if seat.on and not recent and seat.due - now > SOON and signal in seat.signals:
                seat.due = now
                self._hurry.set()

    async def tick(self) -> int | None:
        """Look, and let everybody decide who is due. When the next is, on the fleet's clock; None: never."""
        async with self._lock:
            return await self._tick()

    async def _tick(self) -> int | None:
        now = self._fleet.now()
        self._activity.look(now)
        await self._read_logs(now)
        if self._observer is not None:
            self._observe(self._observer, now)
        for resume in self._guard.overdue(now):
            await self._fleet.carry_out(resume, None)
        for resume in self._guard.overdue(now, dry=True):
            self._rehearse(resume, None, now, "a dry run")
        for seat in self._seats:
            if seat.on and seat.due <= now:
                await self._decide(seat, now)
        dues = [seat.due for seat in self._seats if seat.on]
        if self._observer is not None:
            passed = self._observer.passed
            dues.append(self._observer.due if passed is None else passed.tell)
        if self._guard.pauses:
            dues.append(now + OVERDUE)
        if (due := self._activity.logs.next(now)) is not None:
            dues.append(due)
        return min(dues, default=None)

    async def _read_logs(self, now: int) -> None:
        logs = self._activity.logs
        self._activity.dirty(logs.take())  # what took longer than the last tick waited; then it is not due again
        if due := logs.due(now):
            done = trio.Event()
            self._fleet.start_soon(logs.read, due, done)
            with trio.move_on_after(LOGS):
                await done.wait()
            self._activity.dirty(logs.take())

    def close(self) -> None:
        """All VMs have ended: the last of what they did is told to who only looks."""
        now = self._fleet.now()
        self._activity.look(now)
        self._activity.dirty(self._activity.logs.take())
        observer = self._observer
        if observer is None:
            return
        last = observer.window
        if observer.passed is not None and now - last.since < REST * observer.interval:
            last = observer.passed.window  # it has gone on summing up
        else:
            self._tell_passed(observer)
        observer.take(self._activity.facts(last, ended=True))

    # ---- deciding

    def _observe(self, observer: _Observer, now: int) -> None:
        if observer.passed is not None and (observer.passed.tell <= now or observer.due <= now):
            self._tell_passed(observer)
        if observer.due <= now:
            facts = self._activity.facts(observer.window, ended=True)
            self._host = facts.host
            observer.passed = _Passed(facts, observer.window, now + round(REST * observer.interval))
            observer.window = self._activity.open()
            observer.due = now + observer.interval

    def _tell_passed(self, observer: _Observer) -> None:
        if observer.passed is not None:
            observer.take(observer.passed.facts)
            self._activity.close(observer.passed.window)
            observer.passed = None

    async def _decide(self, seat: _Seat, now: int) -> None:
        policy = seat.policy
        facts = self._activity.facts(seat.window)
        self._host = facts.host
        self._activity.close(seat.window)
        seat.window = self._activity.open()
        try:
            actions = list(policy.decide(facts if seat.rehearsal is None else seat.rehearsal.see(facts)))
            for action in actions:
                if not isinstance(action, Action):
                    raise SpecError(f"action={action!r}: must be one of orchestra's actions")
            for action in actions:
                seat.actions += 1
                await self._carry_out(seat, action)
            interval = seat.interval = _interval(policy)  # asked last: who was refused something may want another turn
            seat.due = now + (interval or 0)
            seat.on = interval is not None
        except Exception as error:
            if self._strict:
                raise
            self._switch_off(seat, error)
        if not seat.on:
            self._activity.close(seat.window)

    def _switch_off(self, seat: _Seat, error: Exception) -> None:
        seat.on = False
        seat.error = f"{type(error).__name__}: {error}"
        name = seat.name
        log.error("policy %r raised and is switched off; its limits stay in force", name, exc_info=error)
        self._fleet.record(Applied(time=self._fleet.now(), action=None, policy=name, error=seat.error))

    async def _carry_out(self, seat: _Seat, action: Action) -> None:
        fleet, name = self._fleet, seat.name
        now = fleet.now()
        verdict = self._guard.judge(action, name, now, seat.order, vms=fleet.below(action))
        if verdict.outcome is Ruling.DRY_RUN:
            self._rehearse(verdict.judged, name, now, verdict.reason)
            return
        if verdict.action is None:
            told = Applied(time=now, action=verdict.judged, policy=name, error=verdict.reason, outcome="refused")
            fleet.record(told)
            _tell_refused(seat.policy, action, verdict.reason)
            return
        if fleet.takes_time(verdict.action):  # the ticks don't wait for it
            fleet.start_soon(self._finish, seat, verdict, fleet.begin(verdict.action, name))
            return
        applied = await fleet.carry_out(verdict.action, name)
        if applied.error is not None:
            self._guard.failed(verdict, fleet.now())
            _tell_refused(seat.policy, action, applied.error)

    def _rehearse(self, action: Action, policy: str | None, now: int, why: str) -> None:
        """Do nothing, and have those that run dry see what it would have done."""
        self._fleet.record(Applied(time=now, action=action, policy=policy, error=why, outcome="dry-run"))
        for rehearsal in self._rehearsals():
            rehearsal.apply(action, policy or "", now)

    async def _finish(self, seat: _Seat, verdict: Verdict, begun: Begun) -> None:
        action, applied = begun.action, await self._fleet.finish(begun)
        if applied.error is None:
            return
        self._guard.failed(verdict, self._fleet.now())
        if not seat.on:
            return
        try:
            _tell_refused(seat.policy, action, applied.error)
        except Exception as error:
            if self._strict:
                raise
            self._switch_off(seat, error)
            self._activity.close(seat.window)


def _tell_refused(policy: Policy, action: Action, reason: str) -> None:
    told = getattr(policy, "refused", None)
    if told is not None:
        told(action, reason)
