"""What follows a run of a VM: its end, another run after a back-off, or another in its turn. No clock of its own."""

from __future__ import annotations

from typing import Final, Literal, TypeGuard

import attrs

from ..model.actions import Failed, Outcome, Shutdown
from ..model.spec import Limit, VmSpec
from ..native.core import Bucket
from .vcpu import RESETS

__all__ = ["Next", "Succession"]

RESET_LIMIT: Final = Limit(rate=1, burst=6, max_delay=None)
"""5 at once, as a burst's last token is waited for: a firmware or a boot loader may reset a machine a few times on its
way. A guest that does nothing else costs its host a machine each time, a few milliseconds: below 1 % of a CPU."""


@attrs.frozen
class Next:
    """Another run. `delay`: seconds until it may start. `why`: of a reset, who wanted it."""

    kind: Literal["restart", "reset"]
    delay: float
    why: str = ""


class Succession:
    """Of one VM.

    Attributes:
        restarts, resets: how many of its runs were which, so far.
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
        """What follows a run that ended so; None: nothing.

        Parameters:
            ran: seconds that it took.
            now: nanoseconds on the fleet's clock.
            asked: why somebody outside wants it reset, whatever else is to come.
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
        """The guest reset itself, and its spec wants that to be no end."""
        return isinstance(outcome, Shutdown) and outcome.reason in RESETS and self._spec.on_reset == "reset"

    def _reset(self, why: str, now: int) -> Next:
        return Next("reset", max(0, self._resets.take(now) - now) / 1e9, why)

    def begin(self, following: Next) -> str:
        """It starts. In some words, for the journal."""
        if following.kind == "restart":
            self.restarts += 1
            return f"restart {self.restarts}"
        self.resets += 1
        return f"reset {self.resets}: {following.why}"

    def close(self) -> None:
        self._resets.close()
