"""The guard of each host: it judges what policies want, as live, and what it lets through is carried out."""

from __future__ import annotations

import attrs

from ..actions import Action, Pause, SetLimit, Throttle
from ..effects import EFFECTS
from ..policy import Guard
from .arrays import np
from .holds import Holds
from .layout import Layout

__all__ = ["Deed", "Guards"]


@attrs.frozen
class Deed:
    """An action that a host's policy asked for, as it was judged. `time` in seconds.

    Attributes:
        policy: its name; empty: nobody's, such as the end of a pause that lasted too long.
        error: why it was not done; None: it was.
        refused: by the guard, so it was not even tried.
    """

    time: float
    host: int
    policy: str
    action: Action
    error: str | None = None
    refused: bool = False


class Guards:
    """Made when a host's policies first want something done; their books are what a host's guard remembers."""

    def __init__(self, layout: Layout, holds: Holds, guard: Guard) -> None:
        self._layout, self._holds, self._settings = layout, holds, guard
        self._guards: dict[int, Guard] = {}
        self._pausing: set[int] = set()
        self._on_host = np.bincount(layout.host, minlength=layout.hosts)
        self._in_pair = np.bincount(layout.pair, minlength=layout.pairs)

    def ask(self, host: int, policy: str, order: int, action: Action, now: float) -> Deed:
        """Have an action judged and, if it may be, done. `order`: the policy's place, as of `Guard.judge`."""
        guard = self._guards.get(host)
        if guard is None:
            guard = self._guards[host] = attrs.evolve(self._settings)
        time = round(now * 1e9)
        verdict = guard.judge(action, policy, time, order, vms=self._below(host, action))
        if verdict.action is None:
            return Deed(now, host, policy, verdict.judged, verdict.reason, refused=True)
        error = self._holds.apply(host, policy, verdict.action, now)
        if error is not None:
            guard.failed(verdict, time)
        elif isinstance(action, Pause):
            self._pausing.add(host)
        elif EFFECTS[type(action)].ends and action.vm is not None:
            self._left(guard, host, action.vm)
        return Deed(now, host, policy, verdict.action, error)

    def overdue(self, now: float) -> list[Deed]:
        """Let those go on who were paused for longer than any may be."""
        deeds = []
        for host in sorted(self._pausing):
            for action in self._guards[host].overdue(round(now * 1e9)):
                deeds.append(Deed(now, host, "", action, self._holds.apply(host, "", action, now)))
            if not self._holds.pauses(host):
                self._pausing.discard(host)
        return deeds

    def _below(self, host: int, action: Action) -> int:
        """How many VMs a limit is for."""
        if action.vm is not None or not isinstance(action, Throttle | SetLimit):
            return 1
        if action.tenant is None:
            return int(self._on_host[host])
        pair = self._layout.pair_of(host, action.tenant)
        return 1 if pair is None else int(self._in_pair[pair])

    def _left(self, guard: Guard, host: int, name: str) -> None:
        guard.forget(name)
        vm = self._layout.number(name, host)
        if vm is not None:
            self._on_host[host] -= 1
            self._in_pair[self._layout.pair[vm]] -= 1
