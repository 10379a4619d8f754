"""The policy engines of all hosts. An engine is made when its host's policies first have something to decide, so that a
quiet host costs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs

from ..model.actions import Action, Applied, Pause
from ..model.effects import EFFECTS
from ..policy import Guard, Verdict
from ..policy.engine import Done, PolicyEngine
from ..policy.state import PolicyState
from .arrays import np
from .enforcement import SimulatedEnforcement
from .layout import Layout
from .policies import Factory

__all__ = ["ActionRecord", "Engines"]


@attrs.frozen
class ActionRecord:
    """An action that a host's policy asked for, as the guard judged it. `time` is in seconds.

    Attributes:
        policy: the policy's name. Empty: no policy asked, as for the end of a pause that lasted too long.
        error: why the action was not done. None: it was done.
        refused: the guard refused the action, or it was only rehearsed. So it was not tried.
    """

    time: float
    host: int
    policy: str
    action: Action
    error: str | None = None
    refused: bool = False


class Engines:
    """The policy engines of all hosts.

    Attributes:
        left: the VMs that an action ended since the last `take_left`, with their hosts.
        errors: why policies were switched off, and on how many hosts.
    """

    def __init__(
        self, layout: Layout, enforcement: SimulatedEnforcement, guard: Guard, factories: Sequence[Factory]
    ) -> None:
        self.errors: Counter[str] = Counter()
        self.left: list[tuple[int, str]] = []
        self._layout, self._enforcement, self._guard, self._factories = layout, enforcement, guard, factories
        self._engines: dict[int, PolicyEngine] = {}
        self._deeds: list[ActionRecord] = []
        self._pausing: set[int] = set()
        self._on_host = np.bincount(layout.host, minlength=layout.hosts)
        self._in_pair = np.bincount(layout.pair, minlength=layout.pairs)

    def of(self, host: int, now: float) -> PolicyEngine:
        engine = self._engines.get(host)
        if engine is None:
            model = self._layout.models[int(self._layout.host_class[host])]
            engine = self._engines[host] = PolicyEngine(
                [factory(model) for factory in self._factories],
                attrs.evolve(self._guard),
                now=round(now * 1e9),
                executor=_Executor(self, host),
            )
        return engine

    def end_pauses(self, now: float) -> None:
        """Resume the VMs that were paused for longer than the guard allows."""
        for host in sorted(self._pausing):
            self._engines[host].end_pauses(round(now * 1e9))
            if not self._engines[host].pausing:
                self._pausing.discard(host)

    def take(self) -> list[ActionRecord]:
        deeds, self._deeds = self._deeds, []
        return deeds

    def take_left(self) -> list[tuple[int, str]]:
        left, self.left = self.left, []
        return left

    # ---- the executor of the engines

    def below(self, host: int, action: Action) -> int:
        """How many VMs an action affects."""
        tenant = getattr(action, "tenant", None)
        if action.vm is not None:
            return 1
        if tenant is None:
            return int(self._on_host[host])
        pair = self._layout.pair_of(host, tenant)
        return 1 if pair is None else int(self._in_pair[pair])

    def do(self, host: int, action: Action, policy: str, time: float) -> str | None:
        error = self._enforcement.apply(host, policy, action, time)
        self._deeds.append(ActionRecord(time, host, policy, action, error))
        if error is None:
            self._watch(host, action)
            if EFFECTS[type(action)].ends and action.vm is not None:
                self._left(host, action.vm)
        return error

    def _watch(self, host: int, action: Action) -> None:
        """Remember a host with a pause, also one that is only rehearsed: the pause may last too long."""
        if isinstance(action, Pause):
            self._pausing.add(host)

    def record(self, host: int, applied: Applied) -> None:
        policy = applied.policy or ""
        if applied.action is None:
            self.errors[f"{policy}: {applied.error}"] += 1
        else:
            if applied.outcome == "dry-run":
                self._watch(host, applied.action)
            self._deeds.append(
                ActionRecord(applied.time / 1e9, host, policy, applied.action, applied.error, refused=True)
            )

    def _left(self, host: int, name: str) -> None:
        self._engines[host].gone(name)
        self.left.append((host, name))
        vm = self._layout.number(name, host)
        if vm is not None:
            self._on_host[host] -= 1
            self._in_pair[self._layout.pair[vm]] -= 1


@attrs.frozen(eq=False)
class _Executor:
    """The executor of one host."""

    engines: Engines
    host: int

    def below(self, action: Action) -> int:
        return self.engines.below(self.host, action)

    def do(
        self, action: Action, policy: str | None, verdict: Verdict | None, state: PolicyState | None, now: int
    ) -> Done:
        return self.engines.do(self.host, action, policy or "", now / 1e9)

    def record(self, applied: Applied, cause: Exception | None = None) -> None:
        self.engines.record(self.host, applied)
