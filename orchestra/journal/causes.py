"""What held a VM, and for how long, by the core's counters. The actions that were done say only what could have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

import attrs

from .holds import Hold, Span
from .reader import Aggregate, StateRow

__all__ = ["Cause", "Setter", "causes"]

SECOND: Final = 1_000_000_000

Kind: TypeAlias = Literal["limit", "cap", "pause", "waiting"]
STATES: Final[dict[str, Kind]] = {"paused": "pause", "waiting": "waiting"}
"""The states in which a VM runs no guest code, and the cause that each of them is."""


@attrs.frozen
class Setter:
    """A policy or caller that had put in force what held the VM. Times are nanoseconds since the epoch.

    Attributes:
        hold: what was in force, as it was last in the time looked at.
        since, until: when the hold began to count at its place, and when it ended. None: it still counts at the end.
        rates: for a limit, the lowest and the highest rate in that time, in events per second.
        seconds: for how long the hold counted, within intervals in which the VM was held.
    """

    hold: Hold
    since: int
    until: int | None
    rates: tuple[float, float] | None
    seconds: float


@attrs.frozen
class Cause:
    """Something that held the VM.

    Attributes:
        kind: "limit", "cap", "pause", or "waiting": the VM waited between two runs, for a restart's back-off or a
            reset's turn.
        where, meter: which limit held the VM: the place ("vcpu", "vm", "tenant", "fleet" or "host"), and the events
            that the limit counts. None: the journal does not have it.
        seconds: for how long, summed over the VM's vCPUs. Limits and caps go by the counters, the others by the VM's
            states.
        share: the same as a part of the time of the VM's vCPUs.
        setters: the policies and callers that had put it in force, the one that counted for longest first. Empty: the
            journal names none.
        state: for a VM that waited between two runs, the last row that says so; its reason says what the VM waited for.
    """

    kind: Kind
    where: str | None
    meter: str | None
    seconds: float
    share: float
    setters: tuple[Setter, ...]
    state: StateRow | None = None


def causes(
    rows: Sequence[Aggregate],
    states: Sequence[StateRow],
    counted: Mapping[str, list[Span]],
    begin: int,
    end: int,
    seconds: float,
    vcpus: int,
) -> tuple[Cause, ...]:
    """Everything that held a VM between two times, the longest first.

    Parameters:
        rows: the VM's intervals in that time.
        states: all states of the VM up to `end`.
        counted: the holds that counted, and when, as `spans` gives them.
        begin, end: the time, in nanoseconds since the epoch.
        seconds: how much of that time the journal's intervals cover.
        vcpus: the number of the VM's vCPUs.
    """
    held: dict[tuple[Kind, str], float] = {}
    when: dict[tuple[Kind, str], list[tuple[int, int]]] = {}

    def add(kind: Kind, name: str, much: float, since: int, until: int) -> None:
        held[kind, name] = held.get((kind, name), 0.0) + much
        when.setdefault((kind, name), []).append((since, until))

    for row in rows:
        since = row.time - round(row.interval * SECOND)
        known = 0.0
        for name, much in (row.throttled_by or {}).items():
            known += much
            if much > 0:
                add("limit", name, much, since, row.time)
        # A microsecond is the rounding of sums of floats. More than that is time whose limit the journal does not name.
        if row.throttled - known > 1e-6:
            add("limit", "", row.throttled - known, since, row.time)
        if row.capped:
            add("cap", "", row.capped, since, row.time)
    last: dict[Kind, StateRow] = {}
    for state, since, until in _idle(states, begin, end):
        last[STATES[state.state]] = state
        add(STATES[state.state], "", (until - since) / SECOND * vcpus, since, until)
    # Never 0, as the journal may cover none of the time.
    whole = max(seconds, 1e-9) * vcpus
    found = []
    for (kind, name), much in held.items():
        where, _, meter = name.partition(".")
        there = [span for of in counted.values() for span in of if span.hold.rate is not None]
        there = counted.get(name if kind == "limit" else kind, []) if name or kind != "limit" else there
        setters = _setters(there, when[kind, name], end)
        found.append(
            Cause(
                kind,
                where or None,
                meter or None,
                much,
                min(1.0, much / whole),
                setters,
                last.get(kind) if kind == "waiting" else None,
            )
        )
    return tuple(sorted(found, key=lambda cause: -cause.seconds))


def _idle(states: Sequence[StateRow], begin: int, end: int) -> list[tuple[StateRow, int, int]]:
    """The states between two times in which the VM ran no guest code, each with its begin and end."""
    found = []
    for i, row in enumerate(states):
        if row.state in STATES:
            until = min(end, states[i + 1].time) if i + 1 < len(states) else end
            if until > max(begin, row.time):
                found.append((row, max(begin, row.time), until))
    return found


def _setters(counted: Sequence[Span], when: Sequence[tuple[int, int]], end: int) -> tuple[Setter, ...]:
    """The holds that counted in some of these times, with the policy or caller that set them."""
    by: dict[tuple[object, ...], list[tuple[Span, float]]] = {}
    for span in counted:
        much = sum(max(0, min(span.end, until) - max(span.begin, since)) for since, until in when) / SECOND
        if much > 0:
            row = span.hold.action
            key = (span.hold.bucket, row.policy, row.given, row.kind, row.details.get("vcpu"))
            by.setdefault(key, []).append((span, much))
    made = []
    for of in by.values():
        last = of[-1][0]
        rates = [span.hold.rate for span, _ in of if span.hold.rate is not None]
        made.append(
            Setter(
                hold=last.hold,
                since=min(last.hold.since, of[0][0].hold.since),
                until=None if last.end >= end else last.end,
                rates=(min(rates), max(rates)) if rates else None,
                seconds=sum(much for _, much in of),
            )
        )
    return tuple(sorted(made, key=lambda one: -one.seconds))
