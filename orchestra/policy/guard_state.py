"""What a guard let through: cool-downs, what was done in the last minute, who holds what, and what failed lately."""

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
LAST: Final = 1 << 30
"""The order of a policy that is not there any more: everybody goes before it."""


def is_limit(action: Action) -> bool:
    """It is counted apart from the others: a policy may change very many limits a minute."""
    return EFFECTS[type(action)].what in (What.LIMIT, What.THROTTLE)


@attrs.frozen
class Claim:
    """What somebody said about a VM last."""

    order: int
    policy: str | None
    time: int


@attrs.frozen
class Undo:
    """What the books said of a VM before an action was noted, so that one that fails can be struck out."""

    word: Claim
    hard: int | None
    host: int | None
    before: tuple[Claim | None, Claim | None]  # held, let go
    after: tuple[Claim | None, Claim | None]


@attrs.define(eq=False)
class GuardState:
    """A dry run has books of its own: what it did not do must not stop what is done.

    Attributes:
        hard: when the last hard action on a VM was.
        host: and on any.
        recent, limits: when actions and limits of policies were, in the last minute.
        held, let: who holds a VM on an axis, and who let it go last.
        paused: when the last pause by a policy ended, and how long it had lasted.
        dry: these are a dry run's.
    """

    dry: bool = False
    hard: dict[str, int] = attrs.field(factory=dict)
    host: int | None = None
    recent: deque[int] = attrs.field(factory=deque)
    limits: deque[int] = attrs.field(factory=deque)
    held: dict[tuple[str, Axis], Claim] = attrs.field(factory=dict)
    let: dict[tuple[str, Axis], Claim] = attrs.field(factory=dict)
    paused: dict[str, tuple[int, int]] = attrs.field(factory=dict)

    def words(self, action: Action) -> tuple[Claim | None, Claim | None]:
        axis = EFFECTS[type(action)].axis
        if axis is None:
            return None, None
        key = (action.vm or "", axis)
        return self.held.get(key), self.let.get(key)

    def lately(self, action: Action, time: int) -> deque[int]:
        """When actions of this sort were in the last minute."""
        when = self.limits if is_limit(action) else self.recent
        while when and time - when[0] >= MINUTE:
            when.popleft()
        return when

    def note(self, action: Action, word: Claim, cool_down: float) -> Undo:
        """`cool_down`: nanoseconds for which a word counts."""
        vm = action.vm or ""
        effect = EFFECTS[type(action)]
        hard, host, before = self.hard.get(vm), self.host, self.words(action)
        if word.policy is not None and not releases(action):
            self.lately(action, word.time).append(word.time)
            if effect.hard:
                self.host = word.time
                self.hard[vm] = word.time
                if len(self.hard) > MOST_REMEMBERED:
                    self.hard = {vm: last for vm, last in self.hard.items() if last > word.time - cool_down}
        if effect.axis is not None:
            self._say(action, (vm, effect.axis), word, cool_down)
        return Undo(word, hard, host, before, self.words(action))

    def _say(self, action: Action, key: tuple[str, Axis], word: Claim, cool_down: float) -> None:
        effect = EFFECTS[type(action)]
        if releases(action):
            before = self.held.pop(key, None)
            if effect.what is What.PAUSE and before is not None and before.policy is not None:
                self.paused[key[0]] = word.time, word.time - before.time
            self.let[key] = word
            if len(self.let) > MOST_REMEMBERED:
                self.let = {at: said for at, said in self.let.items() if said.time > word.time - cool_down}
        elif not effect.ends:
            self.let.pop(key, None)
            before = self.held.get(key)
            if before is None or word.order < before.order:  # the strongest word counts, from when it was said
                self.held[key] = word
        elif word.policy is None or self.dry:  # a policy's may still fail: the VM's end is what counts
            self.forget(action.vm or "")

    def roll_back(self, action: Action, noted: Undo) -> None:
        """It failed: all is as before, but for what others said meanwhile."""
        vm = action.vm or ""
        effect = EFFECTS[type(action)]
        if effect.hard:
            if self.host == noted.word.time:
                self.host = noted.host
            if self.hard.get(vm) == noted.word.time:
                _put(self.hard, vm, noted.hard)
        if effect.axis is not None and self.words(action) == noted.after:
            for words, was in zip((self.held, self.let), noted.before, strict=True):
                _put(words, (vm, effect.axis), was)

    def forget(self, vm: str) -> None:
        for axis in Axis:
            self.held.pop((vm, axis), None)
            self.let.pop((vm, axis), None)
        self.paused.pop(vm, None)

    def reorder(self, orders: Mapping[str, int]) -> None:
        """Other policies, or in another order. What one that is not there any more let go binds nobody; what it
        still holds anybody may let go."""
        for words in (self.held, self.let):
            for key, word in list(words.items()):
                if word.policy is None or word.order == orders.get(word.policy):
                    continue
                if word.policy in orders:
                    words[key] = attrs.evolve(word, order=orders[word.policy])
                elif words is self.held and not self.dry:
                    words[key] = attrs.evolve(word, order=LAST)
                else:
                    del words[key]


@attrs.frozen
class _Failing:
    times: int
    until: int


class Failures:
    """What failed is not tried again at the same place at once, and ever more seldom."""

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
        # Long after the last one it is another matter.
        times = 0 if before is None or time - before.until > MOST_WAIT else before.times
        kinds[_kind(action)] = _Failing(times + 1, time + min(FIRST_WAIT << min(times, 30), MOST_WAIT))

    def why_not(self, action: Action, time: int) -> str:
        """Why it is not to be tried now; empty: it may be."""
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
    return type(action), getattr(action, "launch", None)


def _put(into: dict[Any, Any], key: Any, value: Any) -> None:
    if value is None:
        into.pop(key, None)
    else:
        into[key] = value
