"""Where a VM stands on a ladder: its states, the events, and the move that follows from both.

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

A caller or another policy may resume a VM that this ladder paused (*released*). The VM then stands one step lower, and
the ladder asks for no action.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import attrs

__all__ = ["TRANSITIONS", "Event", "LadderState", "Move", "Standing"]

PATIENCE: Final = 16
"""The most by which relapses multiply the time in the clear that a step asks for. With 16, a VM that relapses again and
again waits some minutes on the default ladder, and not days."""


class Standing(StrEnum):
    """The state of a VM on a ladder."""

    OBSERVED = "observed"
    """The VM is on no step."""
    HELD = "held"
    """The VM came up to its step."""
    RETURNING = "returning"
    """The VM came down to its step."""
    STOPPED = "stopped"
    """The VM is on the step that ends it."""


class Event(StrEnum):
    """What happened to a VM between two ticks."""

    WORSE = "worse"
    """The condition of the next step held for its dwell; or for one tick, if the VM is on probation for that step."""
    BETTER = "better"
    """The VM was in the clear for as long as its step asks for."""
    RELEASED = "released"
    """The VM runs although this ladder paused it: a caller or another policy resumed it."""
    CALM = "calm"
    """The VM is not bad, has no bad time left to forget, and is not on probation."""


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
"""A pair of state and event that is not in this table leaves the VM where it is. `Move.UP` leads to HELD, or to STOPPED
on the step that ends the VM. `Move.DOWN` leads to RETURNING, or to OBSERVED below the lowest step. A stopped VM that
still runs does not go up: there is no step above."""


@attrs.define(eq=False)
class LadderState:
    """One VM on a ladder. Durations are seconds; points in time are nanoseconds on the fleet's clock.

    Attributes:
        at: how many steps are in force.
        since: when the VM came to its step.
        bad: for how long the condition of the next step held. This time is forgotten more slowly than it grows.
        good: for how long the VM was in the clear without a break.
        absent: for how long the VM was in no facts.
        busy: for how many ticks in a row the VM ran although the ladder paused it.
        relapses: how often the VM came back to a step while on probation.
        probation: by the number of a step, from 1 on: until when one bad tick is enough to be on that step again.
        visits: how often the VM came up to each step since it was last forgotten.
        asked: the type of the action that this tick's move asked for. None: no move, or a move without an action.
        before: the step and the state before that move.
    """

    name: str
    generation: int
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
        """By how much the VM's relapses multiply the time in the clear that its step asks for."""
        return min(PATIENCE, 1 << min(self.relapses, 30))

    def on_probation(self, step: int, time: int) -> bool:
        return time < self.probation.get(step, 0)

    def rise(self, time: int, standing: Standing) -> None:
        self._move(self.at + 1, standing, time)
        self.visits[self.at] = self.visits.get(self.at, 0) + 1

    def fall(self, time: int, tail: float) -> None:
        """Go one step down. `tail` is the probation after leaving the step, in seconds, before relapses lengthen it."""
        self.probation[self.at] = time + round(tail * self.patience * 1e9)
        self._move(self.at - 1, Standing.RETURNING if self.at > 1 else Standing.OBSERVED, time)
        self.busy = 0

    def _move(self, to: int, standing: Standing, time: int) -> None:
        self.before = self.at, self.standing
        self.at, self.standing, self.since = to, standing, time
        self.bad = self.good = 0.0

    def stay(self) -> None:
        """Take back this tick's move, which was refused. The VM is where it was, and its times start anew at 0.

        If the times went on, the ladder would ask for the same move, and be refused, in every tick.
        """
        was, standing = self.before
        if was < self.at:
            self.visits[self.at] -= 1
        else:
            self.probation.pop(was, None)
        self.at, self.standing, self.asked = was, standing, None
        self.bad = self.good = 0.0
