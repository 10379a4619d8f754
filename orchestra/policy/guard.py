"""What no policy may do, whatever it decides: floors, cool-downs, a bound on actions, whose word counts, dry runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Final

import attrs

from ..actions import (
    Action,
    CapCpu,
    Evict,
    Isolate,
    Kill,
    Pause,
    Rejoin,
    Resume,
    SetLimit,
    Stop,
    Throttle,
    Unthrottle,
)
from ..errors import SpecError
from ..spec import Limit, Meter
from .ranges import within

__all__ = ["Guard", "Ruling", "Verdict"]

LEAST_BURST: Final = 2.0
"""With a burst of 1 a guest waits after each event until the next has been earned, and works only then: one that asks
for no more than the floor would get half of it."""

MINUTE: Final = 60_000_000_000
MOST_REMEMBERED: Final = 65536

RETRY: Final = 1_000_000_000
RETRY_MOST: Final = 64_000_000_000
"""Nanoseconds before what failed is tried again: doubled by each failure, up to the most."""

RUNNING: Final = "running"
PLACE: Final = "place"
AXIS: Final[dict[type, str]] = {
    Pause: RUNNING,
    Resume: RUNNING,
    Stop: RUNNING,
    Kill: RUNNING,
    Evict: RUNNING,
    Isolate: PLACE,
    Rejoin: PLACE,
}
"""What two policies can disagree on. Limits and caps are not among it: each policy has its own, the tightest counts."""

HARD: Final = (Pause, Isolate, Evict, Stop, Kill)
BACK: Final = (Resume, Rejoin)


class Ruling(StrEnum):
    ALLOWED = "allowed"
    CHANGED = "changed"
    """Allowed, but not as it was asked for."""
    REFUSED = "refused"
    DRY_RUN = "dry-run"
    """It would have been allowed."""


@attrs.frozen
class Verdict:
    """What comes of an action that a policy asked for.

    Attributes:
        action: what to carry out; None: nothing.
        outcome: why so, in a word.
        reason: and in a sentence; empty where there is nothing to say.
        judged: what the action is after the floors, also if it is not carried out: what the journal keeps.
    """

    action: Action | None
    outcome: Ruling
    reason: str
    judged: Action
    _noted: _Noted | None = attrs.field(default=None, eq=False, repr=False)


@attrs.frozen
class _Word:
    """What somebody said about a VM last."""

    order: int
    policy: str | None
    time: int


@attrs.frozen
class _Noted:
    """What the books said of a VM before an action was noted, so that one that fails can be struck out."""

    word: _Word
    hard: int | None
    host: int | None
    before: tuple[_Word | None, _Word | None]  # held, let go
    after: tuple[_Word | None, _Word | None]


@attrs.frozen
class _Failing:
    """What failed so many times in a row is not tried again before a time."""

    times: int
    until: int


@attrs.define(eq=False)
class _Books:
    """What was let through. A dry run has books of its own: what it did not do must not stop what is done."""

    hard: dict[str, int] = attrs.field(factory=dict)  # VM: when last
    host: int | None = None
    recent: deque[int] = attrs.field(factory=deque)
    limits: deque[int] = attrs.field(factory=deque)
    held: dict[tuple[str, str], _Word] = attrs.field(factory=dict)
    let: dict[tuple[str, str], _Word] = attrs.field(factory=dict)

    def words(self, action: Action) -> tuple[_Word | None, _Word | None]:
        key = (action.vm or "", AXIS.get(type(action), ""))
        return self.held.get(key), self.let.get(key)

    def forget(self, vm: str) -> None:
        for axis in (RUNNING, PLACE):
            self.held.pop((vm, axis), None)
            self.let.pop((vm, axis), None)


def _names(given: Any) -> Any:
    return given if isinstance(given, bool) else (given,) if isinstance(given, str) else tuple(given)


@attrs.define(eq=False, kw_only=True)
class Guard:
    """Judges each action of a policy before a fleet carries it out. Callers (no policy) are free; they are noted only.

    The order in which two policies' words count: callers first, then the policies as the fleet lists them.

    - Limits and CPU caps never contradict: each policy has its own at each place, and the tightest counts.
    - What one holds (`Pause`, `Isolate`), it, those before it and callers may let go (`Resume`, `Rejoin`); a later one
      is refused.
    - What one has let go, a later one may not hold, evict or stop for the length of `vm_cool_down`.

    Letting go is never refused for any other reason, and counts towards no bound.

    A cool-down begins when something was done. What was allowed and then failed (`failed`) is as if it had not been
    said, but it still counts towards the bounds, and the same is not tried again at the same place for a second, twice
    as long after each failure, up to 64 s.

    Parameters:
        floor, exit_floor: events per second below which no throttle may hold a VM: a lower one is raised to it, and its
            burst to 2, or a VM that keeps within the floor would still wait. For a tenant or the host it counts once
            for each VM below; how they divide it is not the guard's to say, but `max_delay` holds for each of their
            vCPUs.
        cpu_floor: the same for CPU caps: a part of the time.
        max_delay: seconds: the longest that a throttle may delay one event; forced on those that say more or None.
        vm_cool_down: seconds between two hard actions (pause, isolate, evict, stop, kill) on a VM.
        host_cool_down: the same on any two VMs.
        actions_per_minute: of all policies together, warnings included, but for limits and letting go; None: no bound.
        limits_per_minute: `Throttle` and `SetLimit`.
        max_pause: seconds after which `overdue` has a VM that a policy paused go on; None: never.
        dry_run: True: every policy decides, and nothing is done. Or names of policies, or patterns.

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
    dry_run: bool | tuple[str, ...] = attrs.field(default=False, converter=_names)
    _books: _Books = attrs.field(init=False, factory=_Books, repr=False)
    _rehearsed: _Books = attrs.field(init=False, factory=_Books, repr=False)
    _failing: dict[tuple[str | None, str | None], dict[type, _Failing]] = attrs.field(
        init=False, factory=dict, repr=False
    )

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
        if not isinstance(self.dry_run, bool) and not all(isinstance(name, str) for name in self.dry_run):
            raise SpecError(f"dry_run={self.dry_run!r}: must be True, False, or names of policies")

    def judge(self, action: Action, policy: str | None, time: int, order: int, *, vms: int = 1) -> Verdict:
        """Say what comes of an action.

        Parameters:
            action: that was asked for.
            policy: by which; None: by a caller.
            time: nanoseconds on the fleet's clock.
            order: the policy's place, from 0 on; lower goes first. A caller's is not looked at.
            vms: how many VMs are below the place of a limit on a tenant or the host.
        """
        if policy is None:
            self._note(self._books, action, _Word(-1, None, time))
            return Verdict(action, Ruling.ALLOWED, "", action)
        word = _Word(order, policy, time)
        dry = self.is_dry(policy)
        books = self._rehearsed if dry else self._books
        judged, changed = self._raised(action, vms)
        refused = self._contradicts(books, judged, word)
        if not refused and not _lets_go(judged):
            refused = (
                self._failed_lately(judged, time)
                or self._too_soon(books, judged, time)
                or self._too_many(books, judged, time)
            )
        if refused:
            return Verdict(None, Ruling.REFUSED, refused, judged)
        hard, host, before = books.hard.get(judged.vm or ""), books.host, books.words(judged)
        self._note(books, judged, word)
        if dry:
            return Verdict(None, Ruling.DRY_RUN, "; ".join(filter(None, ["a dry run", changed])), judged)
        noted = _Noted(word, hard, host, before, books.words(judged))
        return Verdict(judged, Ruling.CHANGED if changed else Ruling.ALLOWED, changed, judged, noted)

    def failed(self, verdict: Verdict, time: int) -> None:
        """What a policy was allowed to do could not be done: nobody has to cool down from it, nor is bound by it.

        Parameters:
            verdict: as `judge` gave it.
            time: nanoseconds on the fleet's clock.
        """
        action, noted, books = verdict.action, verdict._noted, self._books
        if action is None or noted is None:
            return
        vm = action.vm or ""
        if isinstance(action, HARD):
            if books.host == noted.word.time:
                books.host = noted.host
            if books.hard.get(vm) == noted.word.time:
                _put(books.hard, vm, noted.hard)
        if type(action) in AXIS and books.words(action) == noted.after:  # nobody said anything else meanwhile
            for words, was in zip((books.held, books.let), noted.before, strict=True):
                _put(words, (vm, AXIS[type(action)]), was)
        if not _lets_go(action):
            self._put_off(action, time)

    def _put_off(self, action: Action, time: int) -> None:
        if len(self._failing) > MOST_REMEMBERED:
            self._failing = {
                place: kinds
                for place, kinds in self._failing.items()
                if any(time < failing.until for failing in kinds.values())
            }
        kinds = self._failing.setdefault(_place(action), {})
        before = kinds.get(type(action))
        # Long after the last one it is another matter.
        times = 0 if before is None or time - before.until > RETRY_MOST else before.times
        wait = min(RETRY << min(times, 30), RETRY_MOST)
        kinds[type(action)] = _Failing(times + 1, time + wait)

    def _failed_lately(self, action: Action, time: int) -> str:
        failing = self._failing.get(_place(action), {}).get(type(action))
        if failing is None or time >= failing.until:
            return ""
        times = "" if failing.times == 1 else f" {failing.times} times in a row"
        return f"it failed{times}: not tried again for {(failing.until - time) / 1e9:.3g} s"

    def overdue(self, time: int) -> list[Resume]:
        """VMs that a policy has held paused for more than `max_pause`: its word no longer counts, they are to go on.

        Apply them as a caller's. It ends a pause also if the policy that made it was switched off.
        """
        if self.max_pause is None:
            return []
        late = [
            (vm, word)
            for (vm, axis), word in self._books.held.items()
            if axis == RUNNING and word.policy is not None and time - word.time > self.max_pause * 1e9
        ]
        actions = []
        for vm, word in late:
            del self._books.held[vm, RUNNING]
            evidence = {"policy": word.policy, "paused": (time - word.time) / 1e9, "max_pause": self.max_pause}
            reason = f"paused by policy {word.policy} for more than {self.max_pause:g} s"
            actions.append(Resume(vm=vm, reason=reason, evidence=evidence))
        return actions

    def forget(self, vm: str) -> None:
        """A VM is gone; what was said about it says nothing about another of its name. Its cool-down still counts."""
        for books in (self._books, self._rehearsed):
            books.forget(vm)
        self._failing.pop((vm, None), None)

    def is_dry(self, policy: str) -> bool:
        """Whether a policy's actions are only rehearsed."""
        if isinstance(self.dry_run, bool):
            return self.dry_run
        return any(fnmatchcase(policy, pattern) for pattern in self.dry_run)

    # ---- floors -----------------------------------------------------------------------------------------------------

    def _raised(self, action: Action, vms: int) -> tuple[Action, str]:
        """The action as it may be done, and what was changed."""
        if isinstance(action, CapCpu) and action.share is not None and action.share < self.cpu_floor:
            why = f"a cap of {100 * action.share:g} % raised to the floor of {100 * self.cpu_floor:g} %"
            return attrs.evolve(action, share=self.cpu_floor, **_told(action, why, {"share": action.share})), why
        if not isinstance(action, Throttle | SetLimit) or action.limit is None:
            return action, ""
        limit, why = self._least(action.limit, action.meter, 1 if action.vm is not None else max(1, vms))
        if not why:
            return action, ""
        was = action.limit
        asked = {"rate": was.rate, "burst": was.tokens, "max_delay": was.max_delay}
        return attrs.evolve(action, limit=limit, **_told(action, why, asked)), why

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

    # ---- whose word counts, how soon, how often ---------------------------------------------------------------------

    def _words(self, books: _Books, action: Action) -> Iterable[_Word | None]:
        """Those that this action would go against: a dry run is bound by what is really so as well."""
        key = (action.vm or "", AXIS[type(action)])
        for each in (books, self._books):
            yield (each.held if isinstance(action, BACK) else each.let).get(key)

    def _contradicts(self, books: _Books, action: Action, word: _Word) -> str:
        if type(action) not in AXIS:
            return ""
        for said in self._words(books, action):
            if said is None or said.order >= word.order:
                continue
            who = "a caller" if said.policy is None else f"policy {said.policy}, which goes first,"
            if isinstance(action, BACK):
                return f"{who} holds it"
            ago = (word.time - said.time) / 1e9
            if ago < self.vm_cool_down:
                return f"{who} let it go {ago:.3g} s ago"
        return ""

    def _too_soon(self, books: _Books, action: Action, time: int) -> str:
        if not isinstance(action, HARD):
            return ""
        last = books.hard.get(action.vm)
        if last is not None and time - last < self.vm_cool_down * 1e9:
            return f"cool-down: {(time - last) / 1e9:.3g} of {self.vm_cool_down:g} s since the last one on this VM"
        if books.host is not None and time - books.host < self.host_cool_down * 1e9:
            ago = (time - books.host) / 1e9
            return f"cool-down: {ago:.3g} of {self.host_cool_down:g} s since the last one on this host"
        return ""

    def _too_many(self, books: _Books, action: Action, time: int) -> str:
        limits = isinstance(action, Throttle | SetLimit)
        recent, most = (books.limits, self.limits_per_minute) if limits else (books.recent, self.actions_per_minute)
        while recent and time - recent[0] >= MINUTE:
            recent.popleft()
        if most is not None and len(recent) >= most:
            return f"{most} {'limits' if limits else 'actions'} in the last minute: no more"
        return ""

    def _note(self, books: _Books, action: Action, word: _Word) -> None:
        if word.policy is not None and not _lets_go(action):
            limits = isinstance(action, Throttle | SetLimit)
            if (self.limits_per_minute if limits else self.actions_per_minute) is not None:
                (books.limits if limits else books.recent).append(word.time)
            if isinstance(action, HARD):
                books.host = word.time
                books.hard[action.vm] = word.time
                if len(books.hard) > MOST_REMEMBERED:
                    since = word.time - self.vm_cool_down * 1e9
                    books.hard = {vm: last for vm, last in books.hard.items() if last > since}
        if type(action) not in AXIS:
            return
        key = (action.vm or "", AXIS[type(action)])
        if isinstance(action, BACK):
            books.held.pop(key, None)
            books.let[key] = word
            if len(books.let) > MOST_REMEMBERED:
                since = word.time - self.vm_cool_down * 1e9
                books.let = {at: said for at, said in books.let.items() if said.time > since}
        elif isinstance(action, Pause | Isolate):
            books.let.pop(key, None)
            before = books.held.get(key)
            if before is None or word.order < before.order:  # the strongest word counts, from when it was said
                books.held[key] = word
        elif word.policy is None or books is self._rehearsed:  # a policy's may still fail: its end is what counts
            books.forget(action.vm or "")


def _place(action: Action) -> tuple[str | None, str | None]:
    return action.vm, getattr(action, "tenant", None)


def _put(into: dict[Any, Any], key: Any, value: Any) -> None:
    if value is None:
        into.pop(key, None)
    else:
        into[key] = value


def _lets_go(action: Action) -> bool:
    match action:
        case Resume() | Rejoin() | Unthrottle() | CapCpu(share=None) | SetLimit(limit=None):
            return True
    return False


def _told(action: Throttle | SetLimit | CapCpu, why: str, asked: dict[str, Any]) -> dict[str, Any]:
    reason = f"{action.reason} ({why})" if action.reason else why
    return {"reason": reason, "evidence": {**action.evidence, "asked": asked}}
