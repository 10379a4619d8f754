"""Runs the policy engine live: looks at what the VMs did, and ticks when a policy or the journal's observer is due."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

import attrs
import trio

from ..host.observe import Trigger
from ..model.actions import Action, Applied
from ..model.effects import ActionsInForce
from ..policy import Facts, Guard, HostFacts, Policy, Verdict
from ..policy.engine import PENDING, Done, PolicyEngine
from ..policy.state import PolicyState, PolicyStatus
from .executor import Begun
from .observer import Observer, Window

__all__ = ["PolicyRunner"]

log: Final = logging.getLogger("orchestra.policy")

SOON: Final = 100_000_000
"""Nanoseconds. Pressure that comes up brings a policy's tick forward only if the tick is further away than this, and if
the policy decided longer ago than this."""

REST: Final = 0.1
"""Part of an observer's interval. A rest at the end that is shorter than this joins the interval before, as a rate over
so little time says nothing. So the observer gets an interval only after this much more time has passed."""

OVERDUE: Final = 1_000_000_000
"""Nanoseconds between two checks for VMs that are paused for too long, where no policy ticks more often."""

LOGS: Final = 0.005
"""The most seconds that a tick waits for dirty logs to be read. What takes longer is in the facts of the next tick."""


class Fleet(Protocol):
    """The fleet, as the policy runner needs it."""

    def now(self) -> int: ...
    def below(self, action: Action) -> int:
        """How many VMs an action affects."""

    def takes_time(self, action: Action) -> bool:
        """Whether the outcome is known only later: then `begin` the action, and `finish` it in a task."""

    def begin(self, action: Action, policy: str | None) -> Begun: ...
    async def finish(self, begun: Begun) -> Applied: ...

    def apply_nowait(self, action: Action, policy: str | None) -> Applied:
        """Apply an action that takes no time, and journal it. No tick waits for a VM."""

    def record(self, applied: Applied) -> Applied:
        """Journal an action that was not tried."""

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run a function in a task of the fleet."""


@attrs.define(eq=False)
class _Observer:
    """Takes the facts of each interval, and decides nothing. `passed`: the interval before, until `take` gets it."""

    take: Callable[[Facts], object]
    interval: int
    window: Window
    due: int
    passed: _Passed | None = None


@attrs.frozen(eq=False)
class _Passed:
    facts: Facts
    window: Window
    due: int


class _Executor:
    """Carries out what policies ask for."""

    def __init__(self, fleet: Fleet, settle: Callable[[PolicyState, Verdict, str | None, int], None]) -> None:
        self._fleet = fleet
        self._settle = settle
        self.below = fleet.below

    def do(
        self, action: Action, policy: str | None, verdict: Verdict | None, state: PolicyState | None, now: int
    ) -> Done:
        if not self._fleet.takes_time(action):
            return self._fleet.apply_nowait(action, policy).error
        self._fleet.start_soon(self._finish, self._fleet.begin(action, policy), verdict, state)
        return PENDING

    async def _finish(self, begun: Begun, verdict: Verdict | None, state: PolicyState | None) -> None:
        applied = await self._fleet.finish(begun)
        if verdict is not None and state is not None:
            self._settle(state, verdict, applied.error, self._fleet.now())

    def record(self, applied: Applied, cause: Exception | None = None) -> None:
        if cause is not None:
            log.error("policy %r raised and is switched off; its limits stay in force", applied.policy, exc_info=cause)
        self._fleet.record(applied)


class PolicyRunner:
    """Runs the policies of one fleet. One tick serves all policies and the observer; fleet's thread."""

    def __init__(
        self, fleet: Fleet, policies: Sequence[Policy], *, activity: Observer, guard: Guard, strict: bool
    ) -> None:
        self._fleet = fleet
        self._activity = activity
        self._engine = PolicyEngine(
            policies,
            guard,
            now=fleet.now(),
            executor=_Executor(fleet, lambda *told: self._engine.settle(*told)),
            source=activity,
            strict=strict,
        )
        self._observer: _Observer | None = None
        self._hurry = trio.Event()
        self._lock = trio.Lock()
        self._watched: set[str] = set()
        self._host = HostFacts()
        self._listen()

    def _listen(self) -> None:
        for state in self._engine.states:
            self._activity.host.listen(state.signals)

    async def set_policies(self, policies: Sequence[Policy], guard: Guard | None, in_force: ActionsInForce) -> None:
        """As `Fleet.set_policies`. `in_force`: what is in force."""
        async with self._lock:  # no tick meanwhile. No checkpoint from here on, so a cancellation can't stop half way
            now = self._fleet.now()
            self._activity.look(now)  # a new policy gets no facts from before
            self._engine.set_policies(policies, guard, now, in_force)
            self._listen()
        self._hurry.set()

    def observe(self, take: Callable[[Facts], object], interval: float) -> None:
        """Pass the facts of each interval (seconds) to `take` as well, before the policies decide."""
        every = round(interval * 1e9)
        self._observer = _Observer(take, every, self._activity.open(), self._fleet.now() + every)

    def statistics(self) -> tuple[PolicyStatus, ...]:
        return self._engine.statistics()

    @property
    def host(self) -> HostFacts:
        """The host as the last tick saw it."""
        return self._host

    def wake(self) -> None:
        """Tick now: there is more to look at than before."""
        self._hurry.set()

    def gone(self, vm: str) -> None:
        """A VM has ended for good."""
        self._engine.gone(vm)

    # ---- the task

    async def run(self) -> None:
        """Tick whenever a policy or the observer is due, until cancelled."""
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
        """The pressures that wake the runner: those of policies whose interval is so long that a wake helps."""
        slow = (state for state in self._engine.states if state.on and (state.interval or 0) > 2 * SOON)
        return {signal for state in slow for signal in state.signals if signal.endswith("_pressure")}

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
        """Pressure came up: policies that listen to it decide now, unless they have just decided or will at once."""
        now = self._fleet.now()
        for state in self._engine.states:
            recent = now - state.since < SOON
            if state.on and not recent and state.due - now > SOON and signal in state.signals:
                state.due = now
                self._hurry.set()

    async def tick(self) -> int | None:
        """Look, and let each policy decide that is due. Returns the next due time on the fleet's clock; None: never."""
        async with self._lock:
            return await self._tick()

    async def _tick(self) -> int | None:
        now = self._fleet.now()
        self._activity.look(now)
        await self._read_logs(now)
        if self._observer is not None:
            self._observe(self._observer, now)
        before = self._engine.host
        self._engine.tick(now)
        if self._engine.host is not before:
            self._host = self._engine.host
        dues = [] if self._engine.due is None else [self._engine.due]
        if self._observer is not None:
            passed = self._observer.passed
            dues.append(self._observer.due if passed is None else passed.due)
        if self._engine.pausing:
            dues.append(now + OVERDUE)
        if (due := self._activity.logs.next(now)) is not None:
            dues.append(due)
        return min(dues, default=None)

    async def _read_logs(self, now: int) -> None:
        logs = self._activity.logs
        # First the readings that the last tick did not wait for: these logs are then not due again.
        self._activity.dirty(logs.take())
        if due := logs.due(now):
            done = trio.Event()
            self._fleet.start_soon(logs.read, due, done)
            with trio.move_on_after(LOGS):
                await done.wait()
            self._activity.dirty(logs.take())

    def close(self) -> None:
        """All VMs have ended: pass the last facts to the observer."""
        now = self._fleet.now()
        self._activity.look(now)
        self._activity.end()
        self._activity.dirty(self._activity.logs.take())
        observer = self._observer
        if observer is None:
            return
        last = observer.window
        if observer.passed is not None and now - last.since < REST * observer.interval:
            last = observer.passed.window  # this window was not closed, so it has the rest as well
        else:
            self._hand_over_passed(observer)
        observer.take(self._activity.facts(last, ended=True))

    def _observe(self, observer: _Observer, now: int) -> None:
        if observer.passed is not None and (observer.passed.due <= now or observer.due <= now):
            self._hand_over_passed(observer)
        if observer.due <= now:
            facts = self._activity.facts(observer.window, ended=True)
            self._host = facts.host
            observer.passed = _Passed(facts, observer.window, now + round(REST * observer.interval))
            observer.window = self._activity.open()
            observer.due = now + observer.interval

    def _hand_over_passed(self, observer: _Observer) -> None:
        if observer.passed is not None:
            observer.take(observer.passed.facts)
            self._activity.close(observer.passed.window)
            observer.passed = None
