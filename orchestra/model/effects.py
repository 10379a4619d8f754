"""What each action does, as data: one table, which every reader of actions uses.

Executor, guard, journal, replay and simulator must all know what an action puts in force, which action lets go of that
again, and whether each policy has one of its own. A new action needs one entry here, one method of the executor, and
tests.
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
    SetMemory,
    Stop,
    Throttle,
    Unthrottle,
    Warn,
)

__all__ = [
    "EFFECTS",
    "ActionInForce",
    "ActionsInForce",
    "Axis",
    "Effect",
    "Key",
    "What",
    "inverse",
    "key_of",
    "releases",
]


class What(StrEnum):
    """What an action puts in force, or takes out of it."""

    LIMIT = "limit"
    """The limit itself, as a spec or `SetLimit` says. There is one at each place."""
    THROTTLE = "throttle"
    """A limit on top of the limit itself, by a policy or a caller."""
    CAP = "cap"
    MEMORY = "memory"
    """What a VM's guest is asked to keep to of its memory."""
    PAUSE = "pause"
    ISOLATION = "isolation"


class Axis(StrEnum):
    """What two policies can contradict each other on. They can't contradict each other on what stacks, as there the
    tightest counts."""

    RUNNING = "running"
    PLACE = "place"


class Key(NamedTuple):
    """A place where something is in force.

    Attributes:
        what: what is in force.
        meter: the meter of a limit; empty: no meter.
        vm, tenant, vcpu: on which VM, tenant or vCPU. Neither VM nor tenant: on the host.
    """

    what: What
    meter: str
    vm: str | None
    tenant: str | None
    vcpu: int | None


@attrs.frozen
class Effect:
    """What a type of action does.

    Attributes:
        what: what the action puts in force, or lets go of. None: neither.
        stacks: True: each policy has one of its own, and all callers together have one, and the tightest counts. False:
            there is one for all, and any policy that lets go of it ends it.
        hard: the action interrupts the guest. Cool-downs are for such actions.
        ends: the VM is not on this host afterwards.
        axis: on what the action may contradict another policy.
        releases: whether an action of this type lets go of what is in force.
        inverse: makes the action that takes an action back. None: no action does.
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
        inverse=lambda it: Unthrottle(vm=it.vm, tenant=it.tenant, meter=it.meter, generation=it.generation),
    ),
    Unthrottle: Effect(What.THROTTLE, stacks=True, releases=_always),
    SetLimit: Effect(What.LIMIT, releases=lambda it: it.limit is None),
    CapCpu: Effect(
        What.CAP,
        stacks=True,
        releases=lambda it: it.share is None,
        inverse=lambda it: CapCpu(vm=it.vm, share=None, generation=it.generation),
    ),
    SetMemory: Effect(
        What.MEMORY,
        stacks=True,
        releases=lambda it: it.memory is None,
        inverse=lambda it: SetMemory(vm=it.vm, memory=None, generation=it.generation),
    ),
    Pause: Effect(
        What.PAUSE, hard=True, axis=Axis.RUNNING, inverse=lambda it: Resume(vm=it.vm, generation=it.generation)
    ),
    Resume: Effect(What.PAUSE, axis=Axis.RUNNING, releases=_always),
    Isolate: Effect(
        What.ISOLATION, hard=True, axis=Axis.PLACE, inverse=lambda it: Rejoin(vm=it.vm, generation=it.generation)
    ),
    Rejoin: Effect(What.ISOLATION, axis=Axis.PLACE, releases=_always),
    Evict: Effect(hard=True, ends=True, axis=Axis.RUNNING),
    Stop: Effect(hard=True, ends=True, axis=Axis.RUNNING),
    Kill: Effect(hard=True, ends=True, axis=Axis.RUNNING),
    Warn: Effect(),
    Reload: Effect(),
}


def releases(action: Action) -> bool:
    """Whether an action lets go of something that is in force, so that its VM, tenant or host is less restricted."""
    return EFFECTS[type(action)].releases(action)


def inverse(action: Action) -> Action | None:
    """The action that takes this action back. None: no action does."""
    how = EFFECTS[type(action)].inverse
    return None if how is None or releases(action) else how(action)


def key_of(action: Action) -> Key | None:
    """The place where an action puts something in force, or lets go of it. None: there is no such place."""
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
class ActionInForce:
    """Something that is in force.

    Attributes:
        action: the action that put it in force as it is.
        policy: the policy that holds it. None: a caller.
        since: since when the same policy has held something at this place, in nanoseconds. `action` may be a later
            change.
    """

    action: Action
    policy: str | None
    since: int


class ActionsInForce:
    """What is in force, read from the actions that were done, in their order. Its size is that of what is in force.

    Two generations of a VM have the same name. An action releases what was put in force on
    the same generation, or on any if the action names no generation. An action about an earlier generation does not
    release what is in force on a later one.
    """

    def __init__(self) -> None:
        self._held: dict[Key, dict[str | None, ActionInForce]] = {}
        self._of_vm: dict[str, set[Key]] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def __iter__(self) -> Iterator[tuple[Key, ActionInForce]]:
        for key, in_force in self._held.items():
            for holding in in_force.values():
                yield key, holding

    def note(self, action: Action, policy: str | None, time: int = 0) -> None:
        """Take in an action that was done at `time`, in nanoseconds."""
        effect = EFFECTS[type(action)]
        if effect.ends and action.vm is not None:
            self.forget(action.vm)
        key = key_of(action)
        if key is None:
            return
        if effect.releases(action):
            self._release(key, policy, effect, getattr(action, "generation", None))
            return
        in_force = self._held.setdefault(key, {})
        if key.vm is not None:
            self._of_vm.setdefault(key.vm, set()).add(key)
        before = in_force.get(policy)
        in_force[policy] = ActionInForce(action, policy, time if before is None else before.since)

    def _release(self, key: Key, policy: str | None, effect: Effect, generation: int | None) -> None:
        in_force = self._held.get(key, {})
        for name in [policy] if effect.stacks else list(in_force):
            held = in_force.get(name)
            if held is not None and len({generation, getattr(held.action, "generation", None)} - {None}) < 2:
                del in_force[name]
        if not in_force:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        if self._held.pop(key, None) is not None and key.vm is not None:
            keys = self._of_vm[key.vm]
            keys.discard(key)
            if not keys:
                del self._of_vm[key.vm]

    def at(self, key: Key) -> Mapping[str | None, ActionInForce]:
        """What is in force at a place, by the policy that holds it."""
        return self._held.get(key, {})

    def on(self, vm: str) -> Collection[Key]:
        """The places where something is in force on that VM alone."""
        return self._of_vm.get(vm, ())

    def undo(self, policy: str) -> list[Action]:
        """The actions that take back everything that a policy holds, the last one first."""
        held = [in_force[policy].action for in_force in self._held.values() if policy in in_force]
        return [back for action in reversed(held) if (back := inverse(action)) is not None]

    def forget(self, vm: str) -> None:
        """Forget what held a VM that is gone."""
        for key in self._of_vm.pop(vm, ()):
            del self._held[key]

    def withdraw(self, policy: str) -> list[Key]:
        """Let go of everything that a policy holds. Returns the places where that was."""
        keys = [key for key, in_force in self._held.items() if in_force.pop(policy, None) is not None]
        for key in keys:
            if not self._held[key]:
                self._drop(key)
        return keys
