"""Decides what follows a run of a VM: its end, a restart after a back-off, or a reset in its turn. Has no clock."""

from __future__ import annotations

from typing import Final, Literal, TypeGuard

import attrs

from ..model.actions import RESETS, Failed, Outcome, Shutdown
from ..model.spec import Limit, VmSpec
from ..native.core import Bucket

__all__ = ["Next", "Succession"]

RESET_LIMIT: Final = Limit(rate=1, burst=6, max_delay=None)
"""A burst of 6 allows 5 resets at once, as the last token of a burst is waited for: a firmware or a boot loader may
reset a machine a few times on its way. Then one reset a second: each costs the host a new machine, a few milliseconds,
so a guest that only resets itself costs below 1 % of a CPU."""


@attrs.frozen
class Next:
    """Another run. `delay`: seconds until it may start. `why`: for a reset, its reason."""

    kind: Literal["restart", "reset"]
    delay: float
    why: str = ""


class Succession:
    """The order of one VM's runs.

    Attributes:
        restarts, resets: how many restarts and resets there were so far.
    """

    def __init__(self, spec: VmSpec, now: int) -> None:
        self.restarts = 0
        self.resets = 0
        self._spec = spec
        self._resets = Bucket()
        self._resets.set(RESET_LIMIT, now)
        self._delay = spec.restart.backoff
        self._in_a_row = 0

    def after(self, outcome: Outcome, ran: float, now: int, asked: str | None) -> Next | None:
        """What follows a run that ended with this outcome; None: no other run.

        Parameters:
            ran: seconds that the run took. After a run longer than `backoff_max` the back-off begins anew.
            now: nanoseconds on the fleet's clock.
            asked: the reason of a caller's reset, which comes before anything else. None: no caller wants one.
        """
        if asked is not None:
            return self._reset(asked, now)
        if self.is_reset(outcome):
            return self._reset(outcome.reason, now)
        restart = self._spec.restart
        if restart.when == "never" or not isinstance(outcome, Failed):
            return None
        if ran > restart.backoff_max:
            self._delay, self._in_a_row = restart.backoff, 0
        self._in_a_row += 1
        if restart.most is not None and self._in_a_row > restart.most:
            return None
        delay, self._delay = self._delay, min(self._delay * 2, restart.backoff_max)
        return Next("restart", delay)

    def is_reset(self, outcome: Outcome) -> TypeGuard[Shutdown]:
        """Whether the guest reset itself, and its spec has `on_reset="reset"`."""
        return isinstance(outcome, Shutdown) and outcome.reason in RESETS and self._spec.on_reset == "reset"

    def _reset(self, why: str, now: int) -> Next:
        return Next("reset", max(0, self._resets.take(now) - now) / 1e9, why)

    def begin(self, following: Next) -> str:
        """The next run starts: count it. Returns a few words for the journal."""
        if following.kind == "restart":
            self.restarts += 1
            return f"restart {self.restarts}"
        self.resets += 1
        return f"reset {self.resets}: {following.why}"

    def close(self) -> None:
        self._resets.close()
