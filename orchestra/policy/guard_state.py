"""A guard's records: cool-downs, the actions of the last minute, who holds which VM, and what failed lately."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import attrs

from ..model.actions import Action
from ..model.effects import EFFECTS, Axis, What, releases
from .retry import FIRST_WAIT, MOST_WAIT

__all__ = ["LAST", "Claim", "Failures", "GuardState", "Undo", "is_limit"]

MINUTE: Final = 60_000_000_000
MOST_REMEMBERED: Final = 65536
"""Entries of one table. Beyond it the entries that no longer count are dropped, so that the names of VMs which come and
go do not pile up. Below it nothing is swept, which would cost time in every action."""

LAST: Final = 1 << 30
"""The order of a policy that was removed: every policy and every caller goes before it."""


def is_limit(action: Action) -> bool:
    """Whether an action sets a limit. Limits have a bound of their own: a policy may change very many in a minute."""
    return EFFECTS[type(action)].what in (What.LIMIT, What.THROTTLE, What.IO_LIMIT)


@attrs.frozen
class Claim:
    """A policy's or a caller's last action on one axis of a VM.

    Attributes:
        order: the place of the policy among the policies; a lower one goes first. -1: a caller.
        policy: the policy's name. None: a caller.
        time: nanoseconds on the fleet's clock.
    """

    order: int
    policy: str | None
    time: int


@attrs.frozen
class Undo:
    """The records of a VM before an action was noted. They are kept so that an action that fails can be struck out."""

    claim: Claim
    hard: int | None
    host: int | None
    before: tuple[Claim | None, Claim | None]  # held, let go
    after: tuple[Claim | None, Claim | None]


@attrs.define(eq=False)
class GuardState:
    """The records of the real actions, or of a dry run. Times are nanoseconds on the fleet's clock.

    A dry run has records of its own: an action of a dry run must not stop an action that is done.

    Attributes:
        hard: the time of the last hard action on each VM.
        host: the time of the last hard action on any VM.
        recent, limits: the times of the policies' actions and limits in the last minute.
        held, let: by VM and axis: the claim of the policy or caller that holds the VM, and of the last that let it go.
        paused: by VM: when the last pause by a policy ended, and how long that pause had lasted.
        dry: these are the records of a dry run.
    """

    dry: bool = False
    hard: dict[str, int] = attrs.field(factory=dict)
    host: int | None = None
    recent: deque[int] = attrs.field(factory=deque)
    limits: deque[int] = attrs.field(factory=deque)
    held: dict[tuple[str, Axis], Claim] = attrs.field(factory=dict)
    let: dict[tuple[str, Axis], Claim] = attrs.field(factory=dict)
    paused: dict[str, tuple[int, int]] = attrs.field(factory=dict)

    def claims(self, action: Action) -> tuple[Claim | None, Claim | None]:
        axis = EFFECTS[type(action)].axis
        if axis is None:
            return None, None
        key = (action.vm or "", axis)
        return self.held.get(key), self.let.get(key)

    def lately(self, action: Action, time: int) -> deque[int]:
        """The times of actions of this sort in the last minute. Older times are dropped here."""
        when = self.limits if is_limit(action) else self.recent
        # Times are added in their order, so old ones are at the left end only.
        while when and time - when[0] >= MINUTE:
            when.popleft()
        return when

    def note(self, action: Action, claim: Claim, cool_down: float) -> Undo:
        """Record an action that is allowed, and return what `roll_back` needs.

        Parameters:
            claim: the policy or caller, and the time.
            cool_down: nanoseconds for which a claim that let a VM go counts.
        """
        vm = action.vm or ""
        effect = EFFECTS[type(action)]
        hard, host, before = self.hard.get(vm), self.host, self.claims(action)
        if claim.policy is not None and not releases(action):
            self.lately(action, claim.time).append(claim.time)
            if effect.hard:
                self.host = claim.time
                self.hard[vm] = claim.time
                if len(self.hard) > MOST_REMEMBERED:
                    self.hard = {vm: last for vm, last in self.hard.items() if last > claim.time - cool_down}
        if effect.axis is not None:
            self._note_claim(action, (vm, effect.axis), claim, cool_down)
        return Undo(claim, hard, host, before, self.claims(action))

    def _note_claim(self, action: Action, key: tuple[str, Axis], claim: Claim, cool_down: float) -> None:
        effect = EFFECTS[type(action)]
        if releases(action):
            before = self.held.pop(key, None)
            if effect.what is What.PAUSE and before is not None and before.policy is not None:
                self.paused[key[0]] = claim.time, claim.time - before.time
            self.let[key] = claim
            if len(self.let) > MOST_REMEMBERED:
                self.let = {at: said for at, said in self.let.items() if said.time > claim.time - cool_down}
        elif not effect.ends:
            # The last release binds later policies only until somebody holds the VM again.
            self.let.pop(key, None)
            before = self.held.get(key)
            if before is None or claim.order < before.order:  # the claim that goes first counts
                self.held[key] = claim
        elif claim.policy is None or self.dry:  # a policy's stop may still fail, so the VM's end counts
            self.forget(action.vm or "")

    def roll_back(self, action: Action, noted: Undo) -> None:
        """Undo the record of an action that failed. A record that was changed since, by a later action, stays."""
        vm = action.vm or ""
        effect = EFFECTS[type(action)]
        if effect.hard:
            # Times identify the note: if a later action has been noted since, its time counts and is not touched.
            if self.host == noted.claim.time:
                self.host = noted.host
            if self.hard.get(vm) == noted.claim.time:
                _put(self.hard, vm, noted.hard)
        if effect.axis is not None and self.claims(action) == noted.after:
            for claims, was in zip((self.held, self.let), noted.before, strict=True):
                _put(claims, (vm, effect.axis), was)

    def forget(self, vm: str) -> None:
        for axis in Axis:
            self.held.pop((vm, axis), None)
            self.let.pop((vm, axis), None)
        self.paused.pop(vm, None)

    def reorder(self, orders: Mapping[str, int]) -> None:
        """Give the claims the orders of the new policies.

        A removed policy binds no other policy with what it let go. What it still holds, every policy may let go.
        """
        for claims in (self.held, self.let):
            for key, claim in list(claims.items()):
                if claim.policy is None or claim.order == orders.get(claim.policy):
                    continue
                if claim.policy in orders:
                    claims[key] = attrs.evolve(claim, order=orders[claim.policy])
                elif claims is self.held and not self.dry:
                    claims[key] = attrs.evolve(claim, order=LAST)
                else:
                    del claims[key]


@attrs.frozen
class _Failing:
    times: int
    until: int


class Failures:
    """The actions that failed lately. Each further failure at the same place doubles the wait before the next try."""

    def __init__(self) -> None:
        self._places: dict[tuple[str | None, str | None], dict[tuple[type, int | None], _Failing]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(self, action: Action, time: int) -> None:
        if len(self._places) > MOST_REMEMBERED:
            places = self._places.items()
            self._places = {at: kinds for at, kinds in places if any(time < one.until for one in kinds.values())}
        kinds = self._places.setdefault(_place(action), {})
        before = kinds.get(_kind(action))
        # A failure long after the last wait has another cause, so the count begins anew.
        times = 0 if before is None or time - before.until > MOST_WAIT else before.times
        # 30 only bounds the shift, which would grow without end with the failures; MOST_WAIT is reached long before.
        kinds[_kind(action)] = _Failing(times + 1, time + min(FIRST_WAIT << min(times, 30), MOST_WAIT))

    def why_not(self, action: Action, time: int) -> str:
        """Why the action is not to be tried now. Empty: it may be tried."""
        failing = self._places.get(_place(action), {}).get(_kind(action))
        if failing is None or time >= failing.until:
            return ""
        times = "" if failing.times == 1 else f" {failing.times} times in a row"
        return f"it failed{times}: not tried again for {(failing.until - time) / 1e9:.3g} s"

    def forget(self, vm: str) -> None:
        self._places.pop((vm, None), None)


def _place(action: Action) -> tuple[str | None, str | None]:
    return action.vm, getattr(action, "tenant", None)


def _kind(action: Action) -> tuple[type, int | None]:
    return type(action), getattr(action, "generation", None)


def _put(into: dict[Any, Any], key: Any, value: Any) -> None:
    if value is None:
        into.pop(key, None)
    else:
        into[key] = value
