"""Runs the policies: looks, lets each decide when it is due, has the guard judge what it wants, and hands that on."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import attrs
import trio

from .actions import Action, Applied, Evict, Pause
from .activity import Activity, Window
from .errors import SpecError
from .policy import Facts, Guard, HostFacts, Policy, Ruling
from .policy.ledger import Ledger
from .signals import Trigger

__all__ = ["Governor", "PolicyStatus", "check_policies"]

log: Final = logging.getLogger("orchestra.policy")

SOON: Final = 100_000_000
"""Nanoseconds: pressure that comes up brings a tick forward only if it would be later than that, and only for a policy
that decided longer ago."""

OVERDUE: Final = 1_000_000_000
"""Nanoseconds between two looks for VMs that were held for too long, where no policy ticks more often."""

LOGS: Final = 0.005
"""Seconds that a tick waits at most for dirty logs to be read: what takes longer is told at the next."""


class Fleet(Protocol):
    """What the governor needs of its fleet."""

    def now(self) -> int: ...
    def below(self, action: Action) -> int:
        """How many VMs an action is about."""

    async def carry_out(self, action: Action, policy: str | None) -> Applied:
        """Apply it, and journal it."""

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
    policy: Policy
    order: int
    window: Window
    due: int
    interval: int | None
    on: bool = True
    error: str | None = None
    actions: int = 0


@attrs.define(eq=False)
class _Observer:
    """Takes the facts of each interval, and decides nothing."""

    take: Callable[[Facts], object]
    interval: int
    window: Window
    due: int


def check_policies(policies: Iterable[Policy]) -> list[Policy]:
    """Raises:
    SpecError: one is no policy, or two have one name.
    """
    checked = list(policies)
    for policy in checked:
        if not isinstance(policy, Policy):
            raise SpecError(f"policies: {policy!r} must have a name, an interval and decide(facts)")
    names = [policy.name for policy in checked]
    for name in names:
        if names.count(name) > 1:  # its limits and its entries in the journal go by its name
            raise SpecError(f"policies: two are named {name!r}; give each a name of its own (name=...)")
    return checked


def _interval(policy: Policy) -> int | None:
    """A policy's interval in nanoseconds."""
    interval = policy.interval
    if interval is None:
        return None
    if isinstance(interval, bool) or not isinstance(interval, int | float) or not 1e-6 <= interval < math.inf:
        raise SpecError(
            f"policy {policy.name!r}: interval={interval!r}: must be seconds, at least 1e-6, or None for only once"
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
        self._holds = False
        self._host = HostFacts()
        self._seat(policies)

    def _seat(self, policies: Iterable[Policy]) -> None:
        """Have these policies decide from now on. One that is there already keeps its seat."""
        policies, now = list(policies), self._fleet.now()
        intervals = [_interval(policy) for policy in policies]  # it may refuse one, before anything is changed
        there = {id(seat.policy): seat for seat in self._seats}
        self._seats = []
        for order, policy in enumerate(policies):
            seat = there.pop(id(policy), None)
            if seat is None:
                # Facts are about an interval: a policy that ticks decides first when one has passed.
                interval = intervals[order]
                seat = _Seat(policy, order, self._activity.open(), now + (interval or 0), interval)
                self._activity.host.listen(_signals(policy))
            seat.order = order
            self._seats.append(seat)
        for seat in there.values():
            if seat.on:
                self._activity.close(seat.window)
            seat.on = False

    async def set_policies(self, policies: Sequence[Policy], guard: Guard | None, ledger: Ledger) -> None:
        """As `Fleet.set_policies`. `ledger`: what each policy holds."""
        async with self._lock:  # no tick meanwhile
            before = {id(seat.policy): seat.policy for seat in self._seats}
            self._activity.look(self._fleet.now())  # what was before is no new policy's affair
            self._seat(policies)
            for policy in policies:
                before.pop(id(policy), None)
            for policy in before.values():
                for action in ledger.held(policy.name):
                    reason = f"policy {policy.name} was taken away"
                    await self._fleet.carry_out(attrs.evolve(action, reason=reason), policy.name)
            if guard is not None:
                self._guard = guard
        self._hurry.set()

    def observe(self, take: Callable[[Facts], object], interval: float) -> None:
        """Have the facts of each interval (seconds) taken as well, before the policies decide."""
        every = round(interval * 1e9)
        self._observer = _Observer(take, every, self._activity.open(), self._fleet.now() + every)

    def statistics(self) -> tuple[PolicyStatus, ...]:
        return tuple(PolicyStatus(seat.policy.name, seat.on, seat.error, seat.actions) for seat in self._seats)

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
        slow = (seat.policy for seat in self._seats if seat.on and (seat.interval or 0) > 2 * SOON)
        return {signal for policy in slow for signal in _signals(policy) if signal.endswith("_pressure")}

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
            if seat.on and not recent and seat.due - now > SOON and signal in _signals(seat.policy):
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
        if self._observer is not None and self._observer.due <= now:
            self._observe(self._observer, now)
        for resume in self._guard.overdue(now):
            await self._fleet.carry_out(resume, None)
        for seat in self._seats:
            if seat.on and seat.due <= now:
                await self._decide(seat, now)
        dues = [seat.due for seat in self._seats if seat.on]
        if self._observer is not None:
            dues.append(self._observer.due)
        if self._holds:
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
        if self._observer is not None:
            self._observe(self._observer, now)

    # ---- deciding

    def _observe(self, observer: _Observer, now: int) -> None:
        facts = self._activity.facts(observer.window, ended=True)
        self._host = facts.host
        observer.take(facts)
        self._activity.close(observer.window)
        observer.window = self._activity.open()
        observer.due = now + observer.interval

    async def _decide(self, seat: _Seat, now: int) -> None:
        policy = seat.policy
        facts = self._activity.facts(seat.window)
        self._host = facts.host
        self._activity.close(seat.window)
        seat.window = self._activity.open()
        try:
            interval = seat.interval = _interval(policy)
            seat.due = now + (interval or 0)
            actions = list(policy.decide(facts))
            for action in actions:
                if not isinstance(action, Action):
                    raise SpecError(f"action={action!r}: must be one of orchestra's actions")
            seat.on = interval is not None
            for action in actions:
                seat.actions += 1
                await self._carry_out(seat, action)
        except Exception as error:
            if self._strict:
                raise
            self._switch_off(seat, error)
        if not seat.on:
            self._activity.close(seat.window)

    def _switch_off(self, seat: _Seat, error: Exception) -> None:
        seat.on = False
        seat.error = f"{type(error).__name__}: {error}"
        name = seat.policy.name
        log.error("policy %r raised and is switched off; its limits stay in force", name, exc_info=error)
        self._fleet.record(Applied(time=self._fleet.now(), action=None, policy=name, error=seat.error))

    async def _carry_out(self, seat: _Seat, action: Action) -> None:
        fleet, name = self._fleet, seat.policy.name
        now = fleet.now()
        verdict = self._guard.judge(action, name, now, seat.order, vms=fleet.below(action))
        if verdict.action is None:
            dry = verdict.outcome is Ruling.DRY_RUN
            fleet.record(
                Applied(
                    time=now,
                    action=verdict.judged,
                    policy=name,
                    error=verdict.reason,
                    outcome="dry-run" if dry else "refused",
                )
            )
            if not dry:
                _tell_refused(seat.policy, action, verdict.reason)
            return
        self._holds = self._holds or isinstance(verdict.action, Pause)
        if isinstance(verdict.action, Evict):  # takes its time, and the others' ticks don't wait for it
            fleet.start_soon(self._evict, seat, verdict.action)
            return
        applied = await fleet.carry_out(verdict.action, name)
        if applied.error is not None:
            _tell_refused(seat.policy, action, applied.error)

    async def _evict(self, seat: _Seat, action: Evict) -> None:
        applied = await self._fleet.carry_out(action, seat.policy.name)
        if applied.error is None or not seat.on:
            return
        try:
            _tell_refused(seat.policy, action, applied.error)
        except Exception as error:
            if self._strict:
                raise
            self._switch_off(seat, error)
            self._activity.close(seat.window)


def _signals(policy: Policy) -> tuple[str, ...]:
    """The host's signals that a policy says it listens to."""
    return tuple(getattr(policy, "signals", ()))


def _tell_refused(policy: Policy, action: Action, reason: str) -> None:
    told = getattr(policy, "refused", None)
    if told is not None:
        told(action, reason)
