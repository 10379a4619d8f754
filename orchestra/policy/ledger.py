"""What each policy holds, so that all of it can be let go when the policy is taken away."""

from __future__ import annotations

from typing import TypeAlias

from ..actions import (
    Action,
    Applied,
    CapCpu,
    Evict,
    Isolate,
    Kill,
    Pause,
    Rejoin,
    Reload,
    Resume,
    Stop,
    Throttle,
    Unthrottle,
)

__all__ = ["Ledger"]

_Key: TypeAlias = tuple[str, str | None, str | None]


class Ledger:
    """Reads along in what is applied. Its size is that of what is in force."""

    def __init__(self) -> None:
        self._held: dict[str, dict[_Key, Action]] = {}

    def note(self, applied: Applied) -> None:
        """An action was applied. Only what was done counts, and only what a policy asked for is kept."""
        action = applied.action
        if action is None or applied.outcome != "done":
            return
        match action:
            case Throttle(vm=vm, tenant=tenant, meter=meter, launch=launch):
                let_go: Action = Unthrottle(vm=vm, tenant=tenant, meter=meter, launch=launch)
                self._hold(applied.policy, (f"limit {meter}", vm, tenant), let_go)
            case Unthrottle(vm=vm, tenant=tenant, meter=meter, launch=launch):
                self._let_go(applied.policy, (f"limit {meter}", vm, tenant), launch)
            case CapCpu(vm=vm, share=None, launch=launch):
                self._let_go(applied.policy, ("cap", vm, None), launch)
            case CapCpu(vm=vm, launch=launch):
                self._hold(applied.policy, ("cap", vm, None), CapCpu(vm=vm, share=None, launch=launch))
            case Pause(vm=vm, launch=launch):
                self._hold(applied.policy, ("pause", vm, None), Resume(vm=vm, launch=launch))
            case Isolate(vm=vm, launch=launch):
                self._hold(applied.policy, ("isolate", vm, None), Rejoin(vm=vm, launch=launch))
            # Of these there is one for all: whoever ends it, it is over.
            case Resume(vm=vm):
                self._over(("pause", vm, None))
            case Rejoin(vm=vm):
                self._over(("isolate", vm, None))
            case Stop(vm=vm) | Kill(vm=vm) | Evict(vm=vm):
                self.forget(vm)

    def held(self, policy: str) -> list[Action]:
        """The actions that let go all that a policy holds, the last one first."""
        return list(reversed(self._held.get(policy, {}).values()))

    def forget(self, vm: str) -> None:
        """A VM is gone, and what held it as well."""
        for holds in self._held.values():
            for key in [key for key in holds if key[1] == vm]:
                del holds[key]

    def _hold(self, policy: str | None, key: _Key, let_go: Action) -> None:
        if policy is not None:
            self._held.setdefault(policy, {})[key] = let_go

    def _let_go(self, policy: str | None, key: _Key, launch: int | None) -> None:
        holds = self._held.get(policy or "", {})
        held = holds.get(key)
        # What is let go of an earlier launch holds the present one still.
        if held is not None and not isinstance(held, Reload) and (launch is None or held.launch in (None, launch)):
            del holds[key]

    def _over(self, key: _Key) -> None:
        for holds in self._held.values():
            holds.pop(key, None)
