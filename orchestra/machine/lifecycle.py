"""The states of one run of a VM, and what a VM's users see of them. Pure: no trio, no clock, no I/O.

                                       ┌────────────── RESUME ─────────────┐
                                       ▼                                   │
    BUILDING ──── BUILT ──▶ RUNNING ── PAUSE ─▶ PAUSING ── PARKED ─▶ PAUSED ── SETTLED ─▶ QUIESCED
        │                     │                   │ │                   │                   ▲ │
        │                     │                   │ └───── SETTLED (both at once) ──────────┘ │
        └───────── END ───────┴─────── END ───────┴──────── END ────────┴──────── END ────────┘
                                                  ▼
                                              STOPPING ── GONE ──▶ CLOSING ── FREED ──▶ ENDED

RESUME leads back to RUNNING from PAUSING, PAUSED and QUIESCED.

- BUILDING: the machine is made. Nobody but its maker knows of it.
- RUNNING: its vCPUs run guest code, or may at any moment.
- PAUSING: it is told to pause; some vCPU may still run guest code.
- PAUSED: no vCPU runs guest code. One may be in the middle of an access that a device or a task is to answer: when the
  answer comes, registers and memory change.
- QUIESCED: nothing of an access is left either: registers and memory stay as they are, and may be saved. A run that
  starts paused is QUIESCED before its first instruction.
- STOPPING: it has its outcome (somebody ended it, a vCPU failed, or all vCPUs halted). Its vCPUs are told to end, and
  none that is outside the guest enters it again.
- CLOSING: all vCPUs have ended, and what the run holds of the host is given back.
- ENDED: no thread or descriptor is left. Its memory, last registers and last figures can be read. A run whose set-up
  failed comes here straight from STOPPING.

A VM lives over several runs. What its users see (`State`) is made of its own outcome, of its present run, and of what
is desired of it (`state_of`):

    CREATED ── first run BUILT ──▶ RUNNING ◀────────── pause, resume ──────────▶ PAUSED
                                    │   ▲                                         ▲
       run ENDED (failed, or reset),│   │ next run BUILT                          │
              and another is to come▼   │                                         │
                                   WAITING ◀─── pause, resume between two runs ───┘

    any of these ── it has an outcome, and no run is to come ──▶ STOPPED, or FAILED

A pause outlives the runs: the next one starts QUIESCED, and the VM is PAUSED all the while.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from threading import Lock
from typing import Final

from ..model.actions import Failed, Outcome, State

__all__ = ["TRANSITIONS", "Event", "Lifecycle", "Phase", "state_of"]


class Phase(StrEnum):
    """Where a run of a VM is."""

    BUILDING = "building"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    QUIESCED = "quiesced"
    STOPPING = "stopping"
    CLOSING = "closing"
    ENDED = "ended"


class Event(StrEnum):
    """What happens to a run."""

    BUILT = "built"
    PAUSE = "pause"
    PARKED = "parked"
    """No vCPU runs guest code for that pause."""
    SETTLED = "settled"
    """And nothing of an access is left to be done."""
    RESUME = "resume"
    END = "end"
    """It has its outcome."""
    GONE = "gone"
    """Its last vCPU has ended."""
    FREED = "freed"
    """All but the memory was given back."""


_LATE: Final = (Event.PAUSE, Event.PARKED, Event.SETTLED, Event.RESUME, Event.END, Event.GONE)
"""Commands and answers cross each other, and several people command one VM: these may come once a run is stopping or
has ended, and change nothing then."""

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
"""All that may happen, and where it leads. What is not here is a mistake in orchestra."""


_RUNS, _STILL, _SETTLED = range(3)
_CALM: Final = {
    Phase.PAUSED: _STILL,
    Phase.QUIESCED: _SETTLED,
    Phase.CLOSING: _SETTLED,
    Phase.ENDED: _SETTLED,
}
"""Whether guest code may run, or registers and memory may change; in all other states both may."""
_CALMS: Final = {Event.PARKED: _STILL, Event.SETTLED: _SETTLED}


class Lifecycle:
    """Of one run. All methods: any thread, as a vCPU may end the run while others pause it."""

    def __init__(self) -> None:
        # Held for a few instructions and never while something is waited for, so taking it can't deadlock.
        self._lock = Lock()
        self._phase = Phase.BUILDING
        self._calm = _RUNS
        self._outcome: Outcome | None = None

    def __repr__(self) -> str:
        return f"<Lifecycle {self._phase}>"

    def happen(self, event: Event) -> Phase:
        """That happened; where it is now.

        Raises:
            AssertionError: it can't happen there.
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
        else:  # no vCPU that is outside the guest enters it again, so what has come to rest stays so
            self._calm = max(self._calm, _CALMS.get(event, _RUNS))
        self._phase = after
        return after

    def end(self, outcome: Outcome) -> bool:
        """It ends with that outcome. False: it has one already, and the first one counts."""
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
        """How it ends. None: it goes on."""
        return self._outcome

    @property
    def has_ended(self) -> bool:
        """Nothing of it is left: its cores and its machine must not be touched any more."""
        return self._phase is Phase.ENDED

    @property
    def is_still(self) -> bool:
        """No guest code runs, and none will before somebody resumes it. One that is told to stop while it is paused
        stays so to its end."""
        return self._calm >= _STILL

    @property
    def is_quiesced(self) -> bool:
        """And its registers and its memory stay as they are."""
        return self._calm >= _SETTLED


def state_of(outcome: Outcome | None, run: Lifecycle | None, *, paused: bool, waits: bool) -> State:
    """What users see of a VM.

    Parameters:
        outcome: the VM's. None: it has not ended, or another run is to come.
        run: its present run, or the last one while the next is waited for. None: the first one is being built.
        paused: a pause is desired of it.
        waits: it waits for its next run.
    """
    if outcome is not None:
        return State.FAILED if isinstance(outcome, Failed) else State.STOPPED
    if run is None:
        return State.CREATED
    if paused and run.is_still:
        return State.PAUSED
    return State.WAITING if waits else State.RUNNING
