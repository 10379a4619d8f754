"""What each action does, as data: the one table that every reader of actions goes by.

An executor that carries actions out, the guard, the journal, a replay and the simulator all have to know what an action
puts in force, what lets go of it again, and whether each policy has its own. Adding an action is one entry here, one
method of the executor, and its tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

import attrs

from .actions import (
    Action,
    CapCpu,
    Evict,
    Isolate,
    Kill,
    Pause,
    Rejoin,
    Reload,
    Resume,
    SetLimit,
    Stop,
    Throttle,
    Unthrottle,
    Warn,
)

__all__ = ["EFFECTS", "Axis", "Effect", "Holding", "Holdings", "Key", "What", "inverse", "key_of", "releases"]


class What(StrEnum):
    """What an action puts in force, or takes out of it."""

    LIMIT = "limit"
    """The limit itself, as a spec or `SetLimit` says it. There is one at each place."""
    THROTTLE = "throttle"
    """A limit on top of that one."""
    CAP = "cap"
    PAUSE = "pause"
    ISOLATION = "isolation"


class Axis(StrEnum):
    """What two policies can contradict each other on. They can't on what stacks: there the tightest counts."""

    RUNNING = "running"
    PLACE = "place"


class Key(NamedTuple):
    """Where something is in force: what, on which meter ("": none), and on whom (neither VM nor tenant: the host)."""

    what: What
    meter: str
    vm: str | None
    tenant: str | None
    vcpu: int | None


@attrs.frozen
class Effect:
    """What a type of action does.

    Attributes:
        what: it puts in force, or lets go of; None: neither.
        stacks: each policy, and all callers together, have one of their own, and the tightest counts. Otherwise there
            is one for all, and whoever lets go of it ends it.
        hard: the guest is interrupted for it: cool-downs are for these.
        ends: the VM is not on this host afterwards.
        axis: what it may contradict another policy on.
        releases: whether an action of this type lets go of what is in force.
        inverse: the action that takes an action back; None: nothing does.
    """

    what: What | None = None
    stacks: bool = False
    hard: bool = False
    ends: bool = False
    axis: Axis | None = None
    releases: Callable[[Any], bool] = lambda action: False
    inverse: Callable[[Any], Action] | None = None


def _always(action: Action) -> bool:
    return True


EFFECTS: Final[Mapping[type, Effect]] = {
    Throttle: Effect(
        What.THROTTLE,
        stacks=True,
        inverse=lambda it: Unthrottle(vm=it.vm, tenant=it.tenant, meter=it.meter, launch=it.launch),
    ),
    Unthrottle: Effect(What.THROTTLE, stacks=True, releases=_always),
    SetLimit: Effect(What.LIMIT, releases=lambda it: it.limit is None),
    CapCpu: Effect(
        What.CAP,
        stacks=True,
        releases=lambda it: it.share is None,
        inverse=lambda it: CapCpu(vm=it.vm, share=None, launch=it.launch),
    ),
    Pause: Effect(What.PAUSE, hard=True, axis=Axis.RUNNING, inverse=lambda it: Resume(vm=it.vm, launch=it.launch)),
    Resume: Effect(What.PAUSE, axis=Axis.RUNNING, releases=_always),
    Isolate: Effect(What.ISOLATION, hard=True, axis=Axis.PLACE, inverse=lambda it: Rejoin(vm=it.vm, launch=it.launch)),
    Rejoin: Effect(What.ISOLATION, axis=Axis.PLACE, releases=_always),
    Evict: Effect(hard=True, ends=True, axis=Axis.RUNNING),
    Stop: Effect(hard=True, ends=True, axis=Axis.RUNNING),
    Kill: Effect(hard=True, ends=True, axis=Axis.RUNNING),
    Warn: Effect(),
    Reload: Effect(),
}


def releases(action: Action) -> bool:
    """Whether it lets go of something that is in force, and so makes life easier for whoever it is about."""
    return EFFECTS[type(action)].releases(action)


def inverse(action: Action) -> Action | None:
    """The action that takes this one back; None: nothing does."""
    how = EFFECTS[type(action)].inverse
    return None if how is None or releases(action) else how(action)


def key_of(action: Action) -> Key | None:
    """Where it puts something in force, or lets go of it. None: nowhere."""
    what = EFFECTS[type(action)].what
    if what is None:
        return None
    meter = getattr(action, "meter", None)
    return Key(
        what,
        "" if meter is None else meter.value,
        action.vm,
        getattr(action, "tenant", None),
        getattr(action, "vcpu", None),
    )


@attrs.frozen
class Holding:
    """Something in force: the action that put it there as it is, whose it is (None: a caller's), and since when the
    same one has held something there; later actions may have changed it."""

    action: Action
    policy: str | None
    since: int


class Holdings:
    """What is in force, read from the actions that were done, in their order. Its size is that of what is in force.

    Two launches may have had one name: what names its launch is let go of by an action about that launch, or about
    whichever there is. What is done about an earlier launch does not let go of what holds a later one.
    """

    def __init__(self) -> None:
        self._held: dict[Key, dict[str | None, Holding]] = {}
        self._of_vm: dict[str, set[Key]] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def __iter__(self) -> Iterator[tuple[Key, Holding]]:
        for key, holdings in self._held.items():
            for holding in holdings.values():
                yield key, holding

    def note(self, action: Action, policy: str | None, time: int = 0) -> None:
        """An action was done, at that time (ns)."""
        effect = EFFECTS[type(action)]
        if effect.ends and action.vm is not None:
            self.forget(action.vm)
        key = key_of(action)
        if key is None:
            return
        if effect.releases(action):
            self._release(key, policy, effect, getattr(action, "launch", None))
            return
        holdings = self._held.setdefault(key, {})
        if key.vm is not None:
            self._of_vm.setdefault(key.vm, set()).add(key)
        before = holdings.get(policy)
        holdings[policy] = Holding(action, policy, time if before is None else before.since)

    def _release(self, key: Key, policy: str | None, effect: Effect, launch: int | None) -> None:
        holdings = self._held.get(key, {})
        for name in [policy] if effect.stacks else list(holdings):
            held = holdings.get(name)
            if held is not None and len({launch, getattr(held.action, "launch", None)} - {None}) < 2:
                del holdings[name]
        if not holdings:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        if self._held.pop(key, None) is not None and key.vm is not None:
            keys = self._of_vm[key.vm]
            keys.discard(key)
            if not keys:
                del self._of_vm[key.vm]

    def at(self, key: Key) -> Mapping[str | None, Holding]:
        """What is in force at a place, by whose it is."""
        return self._held.get(key, {})

    def on(self, vm: str) -> Collection[Key]:
        """Where something is in force for that VM alone."""
        return self._of_vm.get(vm, ())

    def undo(self, policy: str) -> list[Action]:
        """The actions that take back all that a policy has in force, the last one first."""
        held = [holdings[policy].action for holdings in self._held.values() if policy in holdings]
        return [back for action in reversed(held) if (back := inverse(action)) is not None]

    def forget(self, vm: str) -> None:
        """A VM is gone, and what held it as well."""
        for key in self._of_vm.pop(vm, ()):
            del self._held[key]

    def withdraw(self, policy: str) -> list[Key]:
        """Let go of all that a policy has in force; where that was."""
        keys = [key for key, holdings in self._held.items() if holdings.pop(policy, None) is not None]
        for key in keys:
            if not self._held[key]:
                self._drop(key)
        return keys
