"""The policy engine: who is due, what the policies decide, what the guard makes of it, and who hears of a refusal.

Pure: the time and the facts go in, actions go to an executor. A live fleet, a replay, the simulator and the tests run
this object and no other, each with a source of facts and an executor of its own; so given the same facts they rule the
same.

    tick(now)   pauses that last too long  → executor
                each policy that is due    → source.facts → decide → guard → executor, or refused, or rehearsed
                                           → its interval, asked last: one that was refused may want another turn
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Any, Final, Literal, Protocol

import attrs

from ..model.actions import Action, Applied
from ..model.effects import Holdings
from ..model.errors import SpecError
from .dry_run import DryRun
from .facts import Facts, HostFacts, Policy
from .guard import Guard, Ruling, Verdict
from .state import PolicyState, PolicyStatus, interval_of

__all__ = ["PENDING", "Done", "Executor", "PolicyEngine", "Source"]


class _Pending(Enum):
    PENDING = "pending"


PENDING: Final = _Pending.PENDING
"""What came of an action is known later: `PolicyEngine.settle`."""

Done = str | None | Literal[_Pending.PENDING]
"""What came of an action: None: it was done; a text: why it could not be."""


class Source(Protocol):
    """Where facts come from. A window is whatever the source makes of it; the engine keeps one for each policy."""

    def open(self) -> Any:
        """What is done from the last look on."""

    def close(self, window: Any) -> None: ...
    def facts(self, window: Any) -> Facts:
        """What a window saw up to the last look."""


class Executor(Protocol):
    """What does what policies want done."""

    def below(self, action: Action) -> int:
        """How many VMs an action is about."""

    def do(
        self, action: Action, policy: str | None, verdict: Verdict | None, state: PolicyState | None, now: int
    ) -> Done:
        """Carry it out, and keep a record of it.

        Parameters:
            policy: whose word it is; None: the engine's own.
            verdict, state: for `settle`, if what comes of it is known later; None: nobody wants to know.
            now: nanoseconds on the engine's clock.
        """

    def record(self, applied: Applied, cause: Exception | None = None) -> object:
        """Keep a record of what was not even tried: refused, rehearsed, or a policy that was switched off since it
        raised `cause`."""


class PolicyEngine:
    """Of one fleet, or one host.

    Parameters:
        policies: in their order; see `check_policies`.
        guard: judges what they want.
        now: nanoseconds on the clock that `tick` is told.
        source: None: the facts are handed to `decide`.
        strict: what a policy raises comes out of `tick`; otherwise that policy is recorded and switched off.

    Raises:
        SpecError: a policy says of itself what can't be.
    """

    def __init__(
        self,
        policies: Iterable[Policy],
        guard: Guard,
        *,
        now: int,
        executor: Executor,
        source: Source | None = None,
        strict: bool = False,
    ) -> None:
        self.guard = guard
        self.host = HostFacts()
        self._executor = executor
        self._source = source
        self._strict = strict
        self._states: list[PolicyState] = []
        self._place(list(policies), guard, now)

    @property
    def states(self) -> Sequence[PolicyState]:
        """The policies, in their order."""
        return self._states

    def statistics(self) -> tuple[PolicyStatus, ...]:
        return tuple(state.status for state in self._states)

    @property
    def due(self) -> int | None:
        """When the next policy is; None: none ever is."""
        return min((state.due for state in self._states if state.on), default=None)

    @property
    def pausing(self) -> bool:
        """A policy holds a VM paused, or would in a dry run: `tick` has to see to it that this ends."""
        return self.guard.pauses

    # ---- deciding

    def tick(self, now: int) -> None:
        """End pauses that last too long, and let those decide that are due."""
        self.end_pauses(now)
        for state in self._states:
            if state.on and state.due <= now:
                self.decide(state, None, now)

    def end_pauses(self, now: int) -> None:
        """Let those VMs go on that a policy has held paused for longer than the guard allows."""
        for resume in self.guard.overdue(now):
            self._executor.do(resume, None, None, None, now)
        for resume in self.guard.overdue(now, dry=True):
            self._rehearse(resume, None, now, "a dry run")

    def decide(self, state: PolicyState, facts: Facts | None, now: int) -> None:
        """Let a policy decide. `facts`: None: those of the source."""
        if facts is None:
            facts = self._renew(state)
        self.host = facts.host
        state.since = now
        try:
            actions = list(state.policy.decide(facts if state.rehearsal is None else state.rehearsal.see(facts)))
            for action in actions:
                if not isinstance(action, Action):
                    raise SpecError(f"action={action!r}: must be one of orchestra's actions")
            for action in actions:
                state.actions += 1
                self._carry_out(state, action, now)
            state.interval = interval_of(state.policy)  # asked last: who was refused something may want another turn
            state.due = now + (state.interval or 0)
            if state.interval is None:
                self._retire(state)
        except Exception as error:
            if self._strict:
                raise
            self._switch_off(state, error, now)

    def _renew(self, state: PolicyState) -> Facts:
        """The facts since it decided last; those of the next time begin now."""
        assert self._source is not None
        facts = self._source.facts(state.window)
        self._source.close(state.window)
        state.window = self._source.open()
        return facts

    def _carry_out(self, state: PolicyState, action: Action, now: int) -> None:
        verdict = self.guard.judge(action, state.name, now, state.order, vms=self._executor.below(action))
        if verdict.outcome is Ruling.DRY_RUN:
            self._rehearse(verdict.judged, state.name, now, verdict.reason)
        elif verdict.action is None:
            self._refuse(verdict, state.name, now)
            _tell_refused(state.policy, action, verdict.reason)
        else:
            done = self._executor.do(verdict.action, state.name, verdict, state, now)
            if isinstance(done, str):
                self.guard.failed(verdict, now)
                _tell_refused(state.policy, action, done)

    def settle(self, state: PolicyState, verdict: Verdict, error: str | None, now: int) -> None:
        """What came of an action that was `PENDING`."""
        if error is None or verdict.action is None:
            return
        self.guard.failed(verdict, now)
        if not state.on:
            return
        try:
            _tell_refused(state.policy, verdict.action, error)
        except Exception as problem:
            if self._strict:
                raise
            self._switch_off(state, problem, now)

    def _refuse(self, verdict: Verdict, policy: str, now: int) -> None:
        self._executor.record(
            Applied(time=now, action=verdict.judged, policy=policy, error=verdict.reason, outcome="refused")
        )

    def _rehearse(self, action: Action, policy: str | None, now: int, why: str) -> None:
        """Do nothing, and have those that run dry see what it would have done."""
        self._executor.record(Applied(time=now, action=action, policy=policy, error=why, outcome="dry-run"))
        for rehearsal in self._rehearsals():
            rehearsal.apply(action, policy or "", now)

    def _switch_off(self, state: PolicyState, error: Exception, now: int) -> None:
        """What it holds stays in force."""
        state.error = f"{type(error).__name__}: {error}"
        self._retire(state)
        self._executor.record(Applied(time=now, action=None, policy=state.name, error=state.error), error)

    def _retire(self, state: PolicyState) -> None:
        if state.on and self._source is not None:
            self._source.close(state.window)
        state.on = False

    # ---- who there is

    def gone(self, vm: str) -> None:
        """A VM has ended for good."""
        self.guard.forget(vm)
        for rehearsal in self._rehearsals():
            rehearsal.forget(vm)

    def set_policies(self, policies: Sequence[Policy], guard: Guard | None, now: int, holdings: Holdings) -> None:
        """Have these policies decide from now on. One that is there already keeps its state. What one holds that is not
        there any more is let go, unless somebody holds it who goes first.

        Parameters:
            guard: another one from now on, which goes on where the present one was. None: it stays.
            holdings: what is in force.

        Raises:
            SpecError: a policy says of itself what can't be, or would be rehearsed from now on, or no more. Nothing
                has changed then.
        """
        guard = guard or self.guard
        self._check_rehearsals(policies, guard)
        for state in self._place(list(policies), guard, now):
            for action in holdings.undo(state.name):
                self._let_go(state, action, now)
        guard.succeed(self.guard, [state.name for state in self._states])
        self.guard = guard

    def _place(self, policies: list[Policy], guard: Guard, now: int) -> list[PolicyState]:
        """Returns those that are not there any more."""
        there = {id(state.policy): state for state in self._states}
        rehearsal = next(self._rehearsals(), None)
        states = []
        for order, policy in enumerate(policies):  # these may refuse one, before anything is changed
            state = there.pop(id(policy), None) or PolicyState.of(policy, order, now, None)
            states.append(state)
        for order, state in enumerate(states):
            state.order = order
            if state in self._states:
                continue
            if guard.is_dry(state.name):  # what others rehearse is in force for it as well
                state.rehearsal = DryRun() if rehearsal is None else copy.deepcopy(rehearsal)
            if self._source is not None:
                state.window = self._source.open()
        self._states = states
        for state in there.values():
            self._retire(state)
            for one in self._rehearsals():
                one.let_go(state.name)
        return list(there.values())

    def _rehearsals(self) -> Iterator[DryRun]:
        return (state.rehearsal for state in self._states if state.rehearsal is not None)

    def _check_rehearsals(self, policies: Iterable[Policy], guard: Guard) -> None:
        """A policy that rehearsed believes to be in force what is not, and the other way round."""
        there = {id(state.policy): state.name for state in self._states}
        for policy in policies:
            name = there.get(id(policy))
            if name is not None and self.guard.is_dry(name) != guard.is_dry(name):
                was = "only rehearsed" if self.guard.is_dry(name) else "was no rehearsal"
                raise SpecError(f"guard: policy {name!r} {was} so far, and remembers that: give a new one in its place")

    def _let_go(self, state: PolicyState, action: Action, now: int) -> None:
        action = attrs.evolve(action, reason=f"policy {state.name} was taken away")
        verdict = self.guard.judge(action, state.name, now, state.order)
        if verdict.action is None:
            self._refuse(verdict, state.name, now)
        elif isinstance(self._executor.do(action, state.name, None, None, now), str):
            self.guard.failed(verdict, now)


def _tell_refused(policy: Policy, action: Action, reason: str) -> None:
    told = getattr(policy, "refused", None)
    if told is not None:
        told(action, reason)
