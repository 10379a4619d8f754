"""The policy engine: finds the policies that are due, lets them decide, asks the guard, and reports refusals.

The engine is pure: the time and the facts go in, actions go to an executor. A live fleet, a replay, the simulator and
the tests all run this engine. Each of them brings its own source of facts and its own executor. So the same facts give
the same rulings in all of them.

    tick(now)   pauses that last too long  → executor
                each policy that is due    → source.facts → decide → guard → executor, or refused, or rehearsed
                                           → its interval, asked last: a policy that was refused may want another turn
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Any, Final, Literal, Protocol

import attrs

from ..model.actions import Action, Applied
from ..model.effects import ActionsInForce
from ..model.errors import SpecError
from .dry_run import DryRun
from .facts import Facts, HostFacts, Policy
from .guard import Guard, Ruling, Verdict
from .state import PolicyState, PolicyStatus, interval_of

__all__ = ["PENDING", "Done", "Executor", "PolicyEngine", "Source"]


class _Pending(Enum):
    PENDING = "pending"


PENDING: Final = _Pending.PENDING
"""The executor does not know yet what came of an action, and calls `PolicyEngine.settle` later."""

Done = str | None | Literal[_Pending.PENDING]
"""What came of an action. None: the action was done. A text: why the action could not be done."""


class Source(Protocol):
    """Where facts come from. The engine keeps one window for each policy and never looks inside a window."""

    def open(self) -> Any:
        """Open a window that begins at the source's last look."""

    def close(self, window: Any) -> None: ...
    def facts(self, window: Any) -> Facts:
        """The facts of a window, up to the source's last look."""


class Executor(Protocol):
    """Carries out the actions that policies ask for, and records them."""

    def below(self, action: Action) -> int:
        """How many VMs an action affects."""

    def do(
        self, action: Action, policy: str | None, verdict: Verdict | None, state: PolicyState | None, now: int
    ) -> Done:
        """Carry out an action, and keep a record of it.

        Parameters:
            policy: the policy that asked for the action. None: the engine itself did.
            verdict, state: what the executor passes to `settle` if it returns `PENDING`. None: the engine needs no
                report.
            now: nanoseconds on the engine's clock.
        """

    def record(self, applied: Applied, cause: Exception | None = None) -> object:
        """Keep a record of what was not tried: an action that was refused or rehearsed, or a policy that was switched
        off because it raised `cause`."""


class PolicyEngine:
    """The policies of one fleet or of one host.

    Parameters:
        policies: the policies in their order; see `check_policies`.
        guard: judges the actions that the policies ask for.
        now: nanoseconds on the clock whose time `tick` gets.
        executor: carries out the actions that the guard allows.
        source: gives the facts. None: the caller hands the facts to `decide`.
        strict: True: an error of a policy comes out of `tick`. False: the engine records the error and switches the
            policy off.

    Raises:
        SpecError: a policy has a name, an interval or signals that are not valid.
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
        """The time at which the next policy is due. None: no policy will ever be due."""
        return min((state.due for state in self._states if state.on), default=None)

    @property
    def pausing(self) -> bool:
        """Whether a policy holds a VM paused, or would in a dry run. `tick` must then be called to end the pause."""
        return self.guard.pauses

    # ---- deciding

    def tick(self, now: int) -> None:
        """End the pauses that last too long, then let each policy decide that is due.

        Pauses end first: what a policy asks for in this tick is judged by what is still held.
        """
        self.end_pauses(now)
        for state in self._states:
            if state.on and state.due <= now:
                self.decide(state, None, now)

    def end_pauses(self, now: int) -> None:
        """Resume the VMs that a policy has held paused for longer than the guard allows."""
        for resume in self.guard.overdue(now):
            self._executor.do(resume, None, None, None, now)
        for resume in self.guard.overdue(now, dry=True):
            self._record_dry(resume, None, now, "a dry run")

    def decide(self, state: PolicyState, facts: Facts | None, now: int) -> None:
        """Let a policy decide, and carry out what the guard allows.

        Parameters:
            facts: None: the engine takes the facts from its source.
            now: nanoseconds on the engine's clock.

        Raises:
            Exception: the policy's own error, in strict mode only.
        """
        if facts is None:
            facts = self._renew(state)
        self.host = facts.host
        state.since = now
        try:
            actions = list(state.policy.decide(facts if state.dry_run is None else state.dry_run.see(facts)))
            # All actions are checked before the first one is carried out: one that is wrong leaves no half decision.
            for action in actions:
                if not isinstance(action, Action):
                    raise SpecError(f"action={action!r}: must be one of orchestra's actions")
            for action in actions:
                state.actions += 1
                self._carry_out(state, action, now)
            state.interval = interval_of(state.policy)  # asked last: a policy that was refused may want another turn
            state.due = now + (state.interval or 0)
            if state.interval is None:
                self._retire(state)
        except Exception as error:
            if self._strict:
                raise
            self._switch_off(state, error, now)

    def _renew(self, state: PolicyState) -> Facts:
        """The facts since the policy decided last. The window of its next decision begins now."""
        assert self._source is not None
        facts = self._source.facts(state.window)
        self._source.close(state.window)
        state.window = self._source.open()
        return facts

    def _carry_out(self, state: PolicyState, action: Action, now: int) -> None:
        verdict = self.guard.judge(action, state.name, now, state.order, vms=self._executor.below(action))
        if verdict.outcome is Ruling.DRY_RUN:
            self._record_dry(verdict.judged, state.name, now, verdict.reason)
        elif verdict.action is None:
            self._refuse(verdict, state.name, now)
            _notify_refused(state.policy, action, verdict.reason)
        else:
            done = self._executor.do(verdict.action, state.name, verdict, state, now)
            if isinstance(done, str):
                self.guard.failed(verdict, now)
                _notify_refused(state.policy, action, done)

    def settle(self, state: PolicyState, verdict: Verdict, error: str | None, now: int) -> None:
        """Report what came of an action that was `PENDING`.

        Parameters:
            error: why the action could not be done. None: the action was done.
            now: nanoseconds on the engine's clock.

        Raises:
            Exception: the policy's own error, in strict mode only.
        """
        if error is None or verdict.action is None:
            return
        self.guard.failed(verdict, now)
        if not state.on:
            return
        try:
            _notify_refused(state.policy, verdict.action, error)
        except Exception as problem:
            if self._strict:
                raise
            self._switch_off(state, problem, now)

    def _refuse(self, verdict: Verdict, policy: str, now: int) -> None:
        self._executor.record(
            Applied(time=now, action=verdict.judged, policy=policy, error=verdict.reason, outcome="refused")
        )

    def _record_dry(self, action: Action, policy: str | None, now: int, why: str) -> None:
        """Carry out nothing. Show the action's effect to each policy that runs dry: the same dry run holds for all."""
        self._executor.record(Applied(time=now, action=action, policy=policy, error=why, outcome="dry-run"))
        for dry_run in self._dry_runs():
            dry_run.apply(action, policy or "", now)

    def _switch_off(self, state: PolicyState, error: Exception, now: int) -> None:
        """Switch a policy off after an error. The limits and holds that it set stay in force (rule 15)."""
        state.error = f"{type(error).__name__}: {error}"
        self._retire(state)
        self._executor.record(Applied(time=now, action=None, policy=state.name, error=state.error), error)

    def _retire(self, state: PolicyState) -> None:
        if state.on and self._source is not None:
            self._source.close(state.window)
        state.on = False

    # ---- the VMs and the policies that are there

    def gone(self, vm: str) -> None:
        """Forget a VM that has ended for good."""
        self.guard.forget(vm)
        for dry_run in self._dry_runs():
            dry_run.forget(vm)

    def set_policies(self, policies: Sequence[Policy], guard: Guard | None, now: int, in_force: ActionsInForce) -> None:
        """Replace the policies.

        A policy that is in the old and the new list keeps its state. What a removed policy holds is let go, unless a
        policy that goes first, or a caller, holds it too.

        Parameters:
            policies: the new policies, in their order.
            guard: the new guard, which continues with the records of the present one. None: the present guard stays.
            now: nanoseconds on the engine's clock.
            in_force: what is in force.

        Raises:
            SpecError: a policy has a name, an interval or signals that are not valid; or a policy that stays would
                begin or end a dry run. Nothing has changed then.
        """
        guard = guard or self.guard
        self._check_dry_runs(policies, guard)
        # Before `succeed`: until then the claims have the orders in which the policies made them.
        for state in self._place(list(policies), guard, now):
            for action in in_force.undo(state.name):
                self._let_go(state, action, now)
        guard.succeed(self.guard, [state.name for state in self._states])
        self.guard = guard

    def _place(self, policies: list[Policy], guard: Guard, now: int) -> list[PolicyState]:
        """Install the policies in their order, and return the states of those that were removed."""
        there = {id(state.policy): state for state in self._states}
        dry_run = next(self._dry_runs(), None)
        states = []
        for order, policy in enumerate(policies):  # `PolicyState.of` may raise: before anything is changed
            state = there.pop(id(policy), None) or PolicyState.of(policy, order, now, None)
            states.append(state)
        for order, state in enumerate(states):
            state.order = order
            if state in self._states:
                continue
            if guard.is_dry(state.name):  # a new dry policy also sees what the other policies have rehearsed so far
                state.dry_run = DryRun() if dry_run is None else copy.deepcopy(dry_run)
            if self._source is not None:
                state.window = self._source.open()
        self._states = states
        for state in there.values():
            self._retire(state)
            for one in self._dry_runs():
                one.let_go(state.name)
        return list(there.values())

    def _dry_runs(self) -> Iterator[DryRun]:
        return (state.dry_run for state in self._states if state.dry_run is not None)

    def _check_dry_runs(self, policies: Iterable[Policy], guard: Guard) -> None:
        """Refuse a policy that would begin or end a dry run.

        A policy remembers what it asked for. After a dry run it would take actions for done that never were.
        """
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


def _notify_refused(policy: Policy, action: Action, reason: str) -> None:
    refused = getattr(policy, "refused", None)
    if refused is not None:
        refused(action, reason)
