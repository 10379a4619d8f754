"""The states of one run of a VM, and the state that the VM's users see. Pure: no trio, no clock, no I/O.

                                       ┌────────────── RESUME ─────────────┐
                                       ▼                                   │
    BUILDING ──── BUILT ──▶ RUNNING ── PAUSE ─▶ PAUSING ── PARKED ─▶ PAUSED ── SETTLED ─▶ QUIESCED
        │                     │                   │ │                   │                   ▲ │
        │                     │                   │ └───── SETTLED (both at once) ──────────┘ │
        └───────── END ───────┴─────── END ───────┴──────── END ────────┴──────── END ────────┘
                                                  ▼
                                              STOPPING ── GONE ──▶ CLOSING ── FREED ──▶ ENDED

RESUME leads back to RUNNING from PAUSING, PAUSED and QUIESCED.

- BUILDING: the machine is being made. Only the task that makes it knows of it.
- RUNNING: the vCPUs run guest code, or may at any moment.
- PAUSING: the run is told to pause; a vCPU may still run guest code.
- PAUSED: no vCPU runs guest code. A vCPU may be in the middle of an access that a device or a task has to answer: when
  the answer comes, registers and memory change.
- QUIESCED: no access is pending either, and no request to a device is in flight: registers and memory stay as they are,
  and may be saved. A run that starts paused is QUIESCED before its first instruction.
- STOPPING: the run has its outcome (a caller or an action ended it, a vCPU failed, or all vCPUs halted). The vCPUs are
  told to end, and a vCPU outside the guest does not enter it again.
- CLOSING: all vCPUs have ended, and what the run holds of the host is given back.
- ENDED: no thread or descriptor is left. Its memory, last registers and last figures can be read. A run whose set-up
  failed comes here straight from STOPPING.

A VM lives over several runs. `state_of` makes the state that its users see (`State`) from three things: the outcome of
the VM, its present run, and what is desired of it:

    CREATED ── first run BUILT ──▶ RUNNING ◀────────── pause, resume ──────────▶ PAUSED
                                    │   ▲                                         ▲
       run ENDED (failed, or reset),│   │ next run BUILT                          │
              and another is to come▼   │                                         │
                                   WAITING ◀─── pause, resume between two runs ───┘

    any of these ── it has an outcome, and no run is to come ──▶ STOPPED, or FAILED

A pause outlives the runs: the next run starts QUIESCED, and the VM is PAUSED all the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from threading import Lock
from typing import Final

from ..model.actions import Failed, Outcome, State

__all__ = ["TRANSITIONS", "Event", "Lifecycle", "Phase", "state_of"]


class Phase(StrEnum):
    """The state of one run of a VM; see the drawing above."""

    BUILDING = "building"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    QUIESCED = "quiesced"
    STOPPING = "stopping"
    CLOSING = "closing"
    ENDED = "ended"


class Event(StrEnum):
    """What happens to a run, and moves it from phase to phase."""

    BUILT = "built"
    PAUSE = "pause"
    PARKED = "parked"
    """No vCPU runs guest code for that pause."""
    SETTLED = "settled"
    """And no access is pending."""
    RESUME = "resume"
    END = "end"
    """The run has its outcome."""
    GONE = "gone"
    """The last vCPU has ended."""
    FREED = "freed"
    """Everything but the memory was given back."""


_LATE: Final = (Event.PAUSE, Event.PARKED, Event.SETTLED, Event.RESUME, Event.END, Event.GONE)
"""Events that may come late. Commands and reports of vCPUs cross each other, and several callers command one VM. In a
run that is stopping or has ended these events change nothing."""

TRANSITIONS: Final[Mapping[Phase, Mapping[Event, Phase]]] = {
    Phase.BUILDING: {Event.BUILT: Phase.RUNNING, Event.END: Phase.STOPPING},
    Phase.RUNNING: {
        Event.PAUSE: Phase.PAUSING,
        Event.RESUME: Phase.RUNNING,
        Event.END: Phase.STOPPING,
    },
    Phase.PAUSING: {
        Event.PAUSE: Phase.PAUSING,
        Event.PARKED: Phase.PAUSED,
        Event.SETTLED: Phase.QUIESCED,
        Event.RESUME: Phase.RUNNING,
        Event.END: Phase.STOPPING,
    },
    Phase.PAUSED: {
        Event.PAUSE: Phase.PAUSED,
        Event.PARKED: Phase.PAUSED,
        Event.SETTLED: Phase.QUIESCED,
        Event.RESUME: Phase.RUNNING,
        Event.END: Phase.STOPPING,
    },
    Phase.QUIESCED: {
        Event.PAUSE: Phase.QUIESCED,
        Event.PARKED: Phase.QUIESCED,
        Event.SETTLED: Phase.QUIESCED,
        Event.RESUME: Phase.RUNNING,
        Event.END: Phase.STOPPING,
    },
    Phase.STOPPING: dict.fromkeys(_LATE, Phase.STOPPING) | {Event.GONE: Phase.CLOSING, Event.FREED: Phase.ENDED},
    Phase.CLOSING: dict.fromkeys(_LATE, Phase.CLOSING) | {Event.FREED: Phase.ENDED},
    Phase.ENDED: dict.fromkeys(_LATE, Phase.ENDED),
}
"""Every event that may happen in a phase, and the phase after it. Any other event is a mistake in orchestra."""


_RUNS, _STILL, _SETTLED = range(3)
_CALM: Final = {
    Phase.PAUSED: _STILL,
    Phase.QUIESCED: _SETTLED,
    Phase.CLOSING: _SETTLED,
    Phase.ENDED: _SETTLED,
}
"""Phases in which no guest code runs (`_STILL`), or registers and memory do not change either (`_SETTLED`). In all
other phases both may happen."""
_CALMS: Final = {Event.PARKED: _STILL, Event.SETTLED: _SETTLED}


class Lifecycle:
    """The state of one run. All methods: any thread, as a vCPU may end the run while the fleet pauses it."""

    def __init__(self) -> None:
        # Held for a few instructions, and nothing is waited for under it: so the lock can't deadlock.
        self._lock = Lock()
        self._phase = Phase.BUILDING
        self._calm = _RUNS
        self._outcome: Outcome | None = None

    def __repr__(self) -> str:
        return f"<Lifecycle {self._phase}>"

    def happen(self, event: Event) -> Phase:
        """Note an event, and return the phase after it.

        Raises:
            AssertionError: this event can't happen in the present phase.
        """
        with self._lock:
            return self._happen(event)

    def _happen(self, event: Event) -> Phase:
        before = self._phase
        after = TRANSITIONS[before].get(event)
        if after is None:
            raise AssertionError(f"a run that is {before} can't be {event}")
        if after is not Phase.STOPPING:
            self._calm = _CALM.get(after, _RUNS)
        else:  # a vCPU outside the guest does not enter it again: what is at rest stays at rest
            self._calm = max(self._calm, _CALMS.get(event, _RUNS))
        self._phase = after
        return after

    def end(self, outcome: Outcome) -> bool:
        """The run ends with that outcome. False: the run has an outcome already, and the first one counts."""
        with self._lock:
            first = self._outcome is None
            if first:
                self._outcome = outcome
            self._happen(Event.END)
            return first

    # ---- questions

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def outcome(self) -> Outcome | None:
        """How the run ends. None: it goes on."""
        return self._outcome

    @property
    def has_ended(self) -> bool:
        """The run has given everything back but its memory: nobody may touch its cores and its machine any more."""
        return self._phase is Phase.ENDED

    @property
    def is_still(self) -> bool:
        """No guest code runs, and none will before a resume. A run that is told to stop while it is paused stays still
        until its end."""
        return self._calm >= _STILL

    @property
    def is_quiesced(self) -> bool:
        """No guest code runs, and registers and memory stay as they are."""
        return self._calm >= _SETTLED


def state_of(outcome: Outcome | None, run: Lifecycle | None, *, paused: bool, waits: bool) -> State:
    """The state that users see of a VM.

    Parameters:
        outcome: the outcome of the VM. None: it has not ended, or another run is to come.
        run: the present run, or the last run while the VM waits for the next. None: the first run is being built.
        paused: a pause is desired of the VM.
        waits: the VM waits for its next run.
    """
    if outcome is not None:
        return State.FAILED if isinstance(outcome, Failed) else State.STOPPED
    if run is None:
        return State.CREATED
    if paused and run.is_still:
        return State.PAUSED
    return State.WAITING if waits else State.RUNNING
