"""What no policy may do, whatever it decides: floors, cool-downs, bounds, the order of policies, dry runs."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import attrs

from ..model.actions import Action, CapCpu, Resume, SetLimit, Throttle
from ..model.effects import EFFECTS, Axis, What, releases
from ..model.errors import SpecError
from ..model.spec import Limit, Meter
from .guard_state import Claim, Failures, GuardState, Undo, is_limit
from .rates import LEAST_BURST
from .validation import within

__all__ = ["Guard", "Ruling", "Verdict"]


class Ruling(StrEnum):
    ALLOWED = "allowed"
    CHANGED = "changed"
    """Allowed, but raised to a floor or lowered to a bound first."""
    REFUSED = "refused"
    DRY_RUN = "dry-run"
    """The guard would have allowed the action."""


@attrs.frozen
class Verdict:
    """The guard's answer to an action that a policy asked for.

    Attributes:
        action: the action to carry out. None: nothing is to be carried out.
        outcome: the ruling in one word.
        reason: the ruling in a sentence. Empty: the action is allowed as it was asked for.
        judged: the action after the floors, also if it is not carried out. The journal keeps this action.
    """

    action: Action | None
    outcome: Ruling
    reason: str
    judged: Action
    _noted: Undo | None = attrs.field(default=None, eq=False, repr=False)


def _names(given: Any) -> Any:
    return given if isinstance(given, bool) else (given,) if isinstance(given, str) else tuple(given)


@attrs.define(eq=False, kw_only=True)
class Guard:
    """Judges each action of a policy before a fleet carries it out.

    The guard never refuses an action of a caller, which is an action that no policy asked for. The guard only notes it.

    Callers go first, then the policies in the order in which the fleet lists them.

    - Limits and CPU caps never contradict each other: each policy has its own at each place, and the tightest counts.
    - If a policy holds a VM (`Pause`, `Isolate`), then that policy, a policy before it or a caller may let the VM go
      (`Resume`, `Rejoin`). A later policy is refused.
    - If a policy let a VM go, a later policy may not hold, evict or stop that VM for the length of `vm_cool_down`.

    The guard refuses to let a VM go for no other reason, and counts letting go towards no bound.

    A cool-down begins when an action was done. An action that was allowed and then failed (`failed`) starts no
    cool-down, but still counts towards the bounds. The guard refuses the same action at the same place for a second
    after the failure, for twice as long after each further failure, and for 64 s at most.

    Parameters:
        floor, exit_floor: events per second below which no throttle may hold a VM: bus locks for `floor`, exits and
            answers for `exit_floor`. The guard raises a lower rate to the floor. The guard also raises the burst to 2:
            with less, a VM that keeps within the floor would still wait. For a tenant or the host the floor counts once
            for each VM below. The guard does not say how these VMs divide it, but `max_delay` holds for each of their
            vCPUs.
        cpu_floor: the same for CPU caps, as a part of the time.
        max_delay: the most seconds by which a throttle may delay one event. The guard lowers a longer `max_delay` to
            it, and None as well.
        vm_cool_down: seconds between two hard actions (pause, isolate, evict, stop, kill) on the same VM.
        host_cool_down: seconds between two hard actions on any VMs.
        actions_per_minute: the bound on the actions of all policies together, warnings included. Limits and letting go
            do not count. None: no bound.
        limits_per_minute: the bound on `Throttle` and `SetLimit`. It is apart from the other, as a sharing policy may
            change the limits of many VMs in a tick. None: no bound.
        max_pause: seconds after which `overdue` resumes a VM that a policy paused. None: never.
        most_paused: the part of the time for which policies may hold a VM paused. After a pause the VM must run until
            the pause is no more than this part of both times together. Without it a policy could pause a VM again and
            again, which no floor of a limit prevents.
        dry_run: True: every policy decides, and nothing is done. Or the names of the policies that run dry, or
            patterns.

    Raises:
        SpecError: a parameter is out of its range.
    """

    floor: float = 1.0
    exit_floor: float = 100.0
    cpu_floor: float = 0.05
    max_delay: float = 10.0
    vm_cool_down: float = 10.0
    host_cool_down: float = 1.0
    actions_per_minute: int | None = 600
    limits_per_minute: int | None = 60_000
    max_pause: float | None = 300.0
    most_paused: float = 0.75
    dry_run: bool | tuple[str, ...] = attrs.field(default=False, converter=_names)
    _records: GuardState = attrs.field(init=False, factory=GuardState, repr=False)
    _dry_records: GuardState = attrs.field(init=False, factory=lambda: GuardState(dry=True), repr=False)
    _failures: Failures = attrs.field(init=False, factory=Failures, repr=False)

    def __attrs_post_init__(self) -> None:
        within("floor", self.floor, 1e-9, 1e9, "bus locks/s")
        within("exit_floor", self.exit_floor, 1e-9, 1e9, "exits/s")
        within("cpu_floor", self.cpu_floor, 0.01, 1, "of the time")
        within("max_delay", self.max_delay, 1e-6, 1e6, "seconds")
        within("vm_cool_down", self.vm_cool_down, 0, 1e6, "seconds")
        within("host_cool_down", self.host_cool_down, 0, 1e6, "seconds")
        for field in ("actions_per_minute", "limits_per_minute"):
            if getattr(self, field) is not None:
                within(field, getattr(self, field), 0, 1e7, "a minute, or None for no bound")
        if self.max_pause is not None:
            within("max_pause", self.max_pause, 1e-3, 1e9, "seconds, or None for no bound")
        within("most_paused", self.most_paused, 0.001, 0.999, "of the time")
        if not isinstance(self.dry_run, bool) and not all(isinstance(name, str) for name in self.dry_run):
            raise SpecError(f"dry_run={self.dry_run!r}: must be True, False, or names of policies")

    def judge(self, action: Action, policy: str | None, time: int, order: int, *, vms: int = 1) -> Verdict:
        """Judge an action, and note it if it is allowed.

        Parameters:
            action: the action that was asked for.
            policy: the name of the policy that asked. None: a caller asked.
            time: nanoseconds on the fleet's clock.
            order: the policy's place, from 0 on; a lower one goes first. Ignored for a caller.
            vms: for a limit on a tenant or the host: the number of VMs that the limit holds.
        """
        if policy is None:
            self._note(self._records, action, Claim(-1, None, time))
            return Verdict(action, Ruling.ALLOWED, "", action)
        claim = Claim(order, policy, time)
        dry = self.is_dry(policy)
        records = self._dry_records if dry else self._records
        judged, changed = self._raised(action, vms)
        refused = self._contradicts(records, judged, claim)
        if not refused and not releases(judged):
            refused = (
                self._failures.why_not(judged, time)
                or self._too_soon(records, judged, time)
                or self._too_many(records, judged, time)
            )
        if refused:
            return Verdict(None, Ruling.REFUSED, refused, judged)
        noted = self._note(records, judged, claim)
        if dry:
            return Verdict(None, Ruling.DRY_RUN, "; ".join(filter(None, ["a dry run", changed])), judged)
        return Verdict(judged, Ruling.CHANGED if changed else Ruling.ALLOWED, changed, judged, noted)

    def failed(self, verdict: Verdict, time: int) -> None:
        """Strike out an action that was allowed and then failed: no cool-down starts, and no claim binds a policy.

        Parameters:
            verdict: the answer of `judge` to that action.
            time: nanoseconds on the fleet's clock.
        """
        if verdict.action is None or verdict._noted is None:
            return
        self._records.roll_back(verdict.action, verdict._noted)
        if not releases(verdict.action):
            self._failures.add(verdict.action, time)

    def overdue(self, time: int, *, dry: bool = False) -> list[Resume]:
        """Actions that resume the VMs which a policy has held paused for more than `max_pause`.

        Carry the actions out as a caller's. They also end the pauses of a policy that was switched off. The guard
        notes each VM as let go by a caller.

        Parameters:
            time: nanoseconds on the fleet's clock.
            dry: True: the VMs that are paused in a dry run only. Nothing is to be carried out for these.
        """
        if self.max_pause is None:
            return []
        records = self._dry_records if dry else self._records
        late = [
            (vm, claim)
            for (vm, axis), claim in records.held.items()
            if axis is Axis.RUNNING and claim.policy is not None and time - claim.time > self.max_pause * 1e9
        ]
        actions = []
        for vm, claim in late:
            evidence = {"policy": claim.policy, "paused": (time - claim.time) / 1e9, "max_pause": self.max_pause}
            reason = f"paused by policy {claim.policy} for more than {self.max_pause:g} s"
            action = Resume(vm=vm, reason=reason, evidence=evidence)
            self._note(records, action, Claim(-1, None, time))
            actions.append(action)
        return actions

    @property
    def pauses(self) -> bool:
        """Whether a policy holds a VM paused, or would in a dry run."""
        return any(
            axis is Axis.RUNNING and claim.policy is not None
            for records in (self._records, self._dry_records)
            for (_, axis), claim in records.held.items()
        )

    def forget(self, vm: str) -> None:
        """Forget the claims on a VM that is gone: they do not bind a new VM of the same name.

        The cool-down of the name still counts: a restart does not end a cool-down.
        """
        for records in (self._records, self._dry_records):
            records.forget(vm)
        self._failures.forget(vm)

    def succeed(self, before: Guard, policies: Iterable[str]) -> None:
        """Continue with the records of another guard: what was done still counts, by the rules of this guard.

        Parameters:
            before: the guard that judged so far. The same guard, if only the policies change.
            policies: the names of the policies, in their order. What a removed policy let go binds no other policy.
        """
        self._records, self._dry_records, self._failures = before._records, before._dry_records, before._failures
        orders = {name: order for order, name in enumerate(policies)}
        self._records.reorder(orders)
        self._dry_records.reorder({name: order for name, order in orders.items() if self.is_dry(name)})

    def is_dry(self, policy: str) -> bool:
        """Whether a policy's actions are only rehearsed."""
        if isinstance(self.dry_run, bool):
            return self.dry_run
        return any(fnmatchcase(policy, pattern) for pattern in self.dry_run)

    # ---- floors -----------------------------------------------------------------------------------------------------

    def _raised(self, action: Action, vms: int) -> tuple[Action, str]:
        """The action within the floors, and a sentence about what was changed; empty: nothing."""
        if isinstance(action, CapCpu) and action.share is not None and action.share < self.cpu_floor:
            why = f"a cap of {100 * action.share:g} % raised to the floor of {100 * self.cpu_floor:g} %"
            return attrs.evolve(
                action, share=self.cpu_floor, **_with_evidence(action, why, {"share": action.share})
            ), why
        if not isinstance(action, Throttle | SetLimit) or action.limit is None:
            return action, ""
        limit, why = self._least(action.limit, action.meter, 1 if action.vm is not None else max(1, vms))
        if not why:
            return action, ""
        was = action.limit
        asked = {"rate": was.rate, "burst": was.tokens, "max_delay": was.max_delay}
        return attrs.evolve(action, limit=limit, **_with_evidence(action, why, asked)), why

    def _least(self, limit: Limit, meter: Meter, vms: int) -> tuple[Limit, str]:
        why = []
        floor = min(1e9, vms * (self.floor if meter is Meter.BUS_LOCKS else self.exit_floor))
        if limit.rate < floor:
            of = f" ({vms} VMs)" if vms > 1 else ""
            why.append(f"{limit.rate:g}/s raised to the floor of {floor:g}/s{of}")
            limit = attrs.evolve(limit, rate=floor)
        if limit.tokens < LEAST_BURST:
            why.append(f"burst {limit.tokens:g} raised to {LEAST_BURST:g}")
            limit = attrs.evolve(limit, burst=LEAST_BURST)
        if limit.max_delay is None or limit.max_delay > self.max_delay:
            was = "none" if limit.max_delay is None else f"{limit.max_delay:g} s"
            why.append(f"max_delay {was} lowered to {self.max_delay:g} s")
            limit = attrs.evolve(limit, max_delay=self.max_delay)
        return limit, "; ".join(why)

    # ---- which claim counts, how soon, how often --------------------------------------------------------------------

    def _claims(self, records: GuardState, action: Action) -> Iterable[Claim | None]:
        """The claims that this action would contradict. The claims that are really in force bind a dry run too."""
        for each in (records, self._records):
            held, let = each.claims(action)
            yield held if releases(action) else let

    def _contradicts(self, records: GuardState, action: Action, claim: Claim) -> str:
        if EFFECTS[type(action)].axis is None:
            return ""
        for said in self._claims(records, action):
            if said is None or said.order >= claim.order:
                continue
            who = "a caller" if said.policy is None else f"policy {said.policy}, which goes first,"
            if releases(action):
                return f"{who} holds it"
            ago = (claim.time - said.time) / 1e9
            if ago < self.vm_cool_down:
                return f"{who} let it go {ago:.3g} s ago"
        return ""

    def _too_soon(self, records: GuardState, action: Action, time: int) -> str:
        effect = EFFECTS[type(action)]
        if not effect.hard:
            return ""
        last = records.hard.get(action.vm or "")
        if last is not None and time - last < self.vm_cool_down * 1e9:
            return f"cool-down: {(time - last) / 1e9:.3g} of {self.vm_cool_down:g} s since the last one on this VM"
        if effect.what is What.PAUSE and action.vm in records.paused:
            ended, lasted = records.paused[action.vm]
            due = lasted * (1 - self.most_paused) / self.most_paused
            if time - ended < due:
                ran = f"has run for {(time - ended) / 1e9:.3g} of {due / 1e9:.3g} s since"
                return f"it was paused for {lasted / 1e9:.3g} s and {ran}"
        if records.host is not None and time - records.host < self.host_cool_down * 1e9:
            ago = (time - records.host) / 1e9
            return f"cool-down: {ago:.3g} of {self.host_cool_down:g} s since the last one on this host"
        return ""

    def _too_many(self, records: GuardState, action: Action, time: int) -> str:
        limits = is_limit(action)
        most = self.limits_per_minute if limits else self.actions_per_minute
        if most is not None and len(records.lately(action, time)) >= most:
            return f"{most} {'limits' if limits else 'actions'} in the last minute: no more"
        return ""

    def _note(self, records: GuardState, action: Action, claim: Claim) -> Undo:
        return records.note(action, claim, self.vm_cool_down * 1e9)


def _with_evidence(action: Throttle | SetLimit | CapCpu, why: str, asked: dict[str, Any]) -> dict[str, Any]:
    reason = f"{action.reason} ({why})" if action.reason else why
    return {"reason": reason, "evidence": {**action.evidence, "asked": asked}}
