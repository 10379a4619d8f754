"""Where a VM stands on a ladder: states, events, and what follows from them.

                   worse                        worse: one step higher
    OBSERVED ──────────────────▶ HELD ──────────────────────────▶ HELD, or STOPPED on the step that ends the VM
     │    ▲                       │                                         │
     │    │                       │ better: one step lower                  │ better
     │    │ better, from          ▼                                         ▼
     │    └──────────────── RETURNING ──▶ HELD                          forgotten
     │      the lowest step   │   ▲       worse; at once on probation
     │                        └───┘
     │ calm                   better: one step lower
     ▼
    forgotten

Somebody else may let a paused VM go on (*released*). That is a step down as well, with nothing left to be done.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import attrs

__all__ = ["TRANSITIONS", "Event", "LadderState", "Move", "Standing"]

PATIENCE: Final = 16
"""The most by which relapses multiply the time in the clear that is asked for: a VM that relapses for ever waits some
minutes on the default ladder, and not days."""


class Standing(StrEnum):
    """The state of a VM on a ladder."""

    OBSERVED = "observed"
    """On no step."""
    HELD = "held"
    """On a step that it came up to."""
    RETURNING = "returning"
    """On a step that it came down to."""
    STOPPED = "stopped"
    """On the step that ends it."""


class Event(StrEnum):
    """What happens to a VM between two ticks."""

    WORSE = "worse"
    """What calls for the next step was so for its dwell; or for one tick, if the VM left that step a short time ago."""
    BETTER = "better"
    """It was in the clear for long enough."""
    RELEASED = "released"
    """It is paused by this ladder, and runs: somebody else let it go on."""
    CALM = "calm"
    """It did nothing bad, and there is no bad time left to forget and no probation."""


class Move(StrEnum):
    """What the ladder does."""

    UP = "up"
    DOWN = "down"
    FORGET = "forget"


TRANSITIONS: Final[Mapping[tuple[Standing, Event], Move]] = {
    (Standing.OBSERVED, Event.WORSE): Move.UP,
    (Standing.OBSERVED, Event.CALM): Move.FORGET,
    (Standing.HELD, Event.WORSE): Move.UP,
    (Standing.HELD, Event.BETTER): Move.DOWN,
    (Standing.HELD, Event.RELEASED): Move.DOWN,
    (Standing.RETURNING, Event.WORSE): Move.UP,
    (Standing.RETURNING, Event.BETTER): Move.DOWN,
    (Standing.RETURNING, Event.RELEASED): Move.DOWN,
    (Standing.STOPPED, Event.BETTER): Move.FORGET,
    (Standing.STOPPED, Event.RELEASED): Move.DOWN,
}
"""What is not in it leaves the VM where it is. `Move.UP` leads to HELD, or to STOPPED on the step that ends the VM;
`Move.DOWN` to RETURNING, or to OBSERVED below the lowest step."""


@attrs.define(eq=False)
class LadderState:
    """One VM on a ladder. Times in seconds, moments in nanoseconds.

    Attributes:
        at: how many steps are in force.
        since: when it came there.
        bad: for how long what calls for the next step was so; it is forgotten more slowly than it grows.
        good: for how long the VM was in the clear without a break.
        absent: for how long it was in no facts.
        busy: for how many ticks in a row it ran although it is paused.
        relapses: how often it came back to a step on probation.
        probation: until when one bad tick is enough to be on a step again, by the step's number from 1 on.
        visits: how often it came up to each step since it was last forgotten.
        asked: the type of the action that this tick's move asked for; None: no move, or nothing to do.
        before: where it stood before that move.
    """

    name: str
    launch: int
    vcpus: int
    since: int
    at: int = 0
    standing: Standing = Standing.OBSERVED
    bad: float = 0.0
    good: float = 0.0
    absent: float = 0.0
    busy: int = 0
    relapses: int = 0
    probation: dict[int, int] = attrs.field(factory=dict)
    visits: dict[int, int] = attrs.field(factory=dict)
    asked: type | None = None
    before: tuple[int, Standing] = (0, Standing.OBSERVED)

    @property
    def patience(self) -> int:
        """By how much its relapses multiply the time in the clear that is asked for."""
        return min(PATIENCE, 1 << min(self.relapses, 30))

    def on_probation(self, step: int, time: int) -> bool:
        return time < self.probation.get(step, 0)

    def rise(self, time: int, standing: Standing) -> None:
        self._move(self.at + 1, standing, time)
        self.visits[self.at] = self.visits.get(self.at, 0) + 1

    def fall(self, time: int, tail: float) -> None:
        """`tail`: seconds of probation after leaving the step."""
        self.probation[self.at] = time + round(tail * self.patience * 1e9)
        self._move(self.at - 1, Standing.RETURNING if self.at > 1 else Standing.OBSERVED, time)
        self.busy = 0

    def _move(self, to: int, standing: Standing, time: int) -> None:
        self.before = self.at, self.standing
        self.at, self.standing, self.since = to, standing, time
        self.bad = self.good = 0.0

    def stay(self) -> None:
        """This tick's move was refused: it is where it was, and the time starts anew."""
        was, standing = self.before
        if was < self.at:
            self.visits[self.at] -= 1
        else:
            self.probation.pop(was, None)
        self.at, self.standing, self.asked = was, standing, None
        self.bad = self.good = 0.0
