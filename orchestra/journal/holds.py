"""What held a VM, read from the actions that were done, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from ..model.effects import EFFECTS, Key, key_of, releases
from .reader import ActionRow

__all__ = ["Hold", "HoldTracker", "Span", "in_force", "spans"]


@attrs.frozen
class Hold:
    """Something that is in force and holds a VM.

    Attributes:
        action: the row of the action that put it in force as it is, with reason and evidence.
        since: when the same policy began to hold the VM in this way, in nanoseconds since the epoch. `action` may be a
            later change.
        where: "vcpu", "vm", "tenant", "fleet" or "host". A limit of a fleet as a whole is at "host", unless the fleet
            shares its host's budget with other fleets; then the limit is at "fleet".
    """

    action: ActionRow
    since: int
    where: str

    @property
    def rate(self) -> float | None:
        """The rate of a limit, in events per second. None: this is no limit."""
        limit = self.action.details.get("limit")
        return None if limit is None else float(limit["rate"])

    @property
    def bucket(self) -> str | None:
        """The bucket of a limit, as in `VmFacts.throttled_by`: "vm.exits". None: this is no limit."""
        return None if self.rate is None else f"{self.where}.{self.action.details.get('meter', '')}"


@attrs.frozen
class Span:
    """A time in which a hold counted at its place: of several limits or caps at one place the tightest counts."""

    begin: int
    end: int
    hold: Hold


class HoldTracker:
    """Reads the rows of actions in their order, and has the holds in force after the last one.

    `model.effects.ActionsInForce` does the same for actions of a live fleet. A tracker also distinguishes a limit that
    was given at the start from a limit that was set later, as the journal does. Its size is that of what is in force.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[Key, str | None], Hold] = {}
        self._sharing: set[int] = set()  # fleets with a host's budget

    def note(self, row: ActionRow) -> None:
        action = row.action if row.outcome == "done" else None
        key = None if action is None else key_of(action)
        if action is None or key is None:
            return
        shared = row.given == "host_budget"
        if shared:
            self._sharing.add(row.session)
        at = key, row.policy if EFFECTS[type(action)].stacks else row.given if shared else None
        before = self._held.get(at)
        if not releases(action):
            # A limit that was given at the start and one that is set later are two holds: the later one begins when it
            # is set.
            same = before is not None and before.action.given == row.given
            whole = "fleet" if row.session in self._sharing and not shared else "host"
            where = "vcpu" if key.vcpu is not None else "vm" if key.vm else "tenant" if key.tenant else whole
            self._held[at] = Hold(row, before.since if before is not None and same else row.time, where)
        elif before is not None:
            generations = {row.details.get("generation"), before.action.details.get("generation")} - {None}
            if len(generations) < 2:  # an action about an earlier generation does not release the present one
                del self._held[at]

    def holds(self) -> list[Hold]:
        """The tightest limit first."""
        return sorted(self._held.values(), key=lambda hold: -1.0 if hold.rate is None else hold.rate)

    def tightest(self) -> dict[tuple[str, str], Hold]:
        """The hold that counts at each place. A place is a bucket (with its vCPU, if it is a vCPU's), "cap" or
        "pause"."""
        found: dict[tuple[str, str], Hold] = {}
        for (key, _), hold in self._held.items():
            place = (hold.bucket or key.what.value, str(hold.action.details.get("vcpu")))
            if place not in found or _tightness(hold) < _tightness(found[place]):
                found[place] = hold
        return found


def _tightness(hold: Hold) -> tuple[float, int]:
    details = hold.action.details
    much = details.get("share", details.get("memory"))  # of a cap, or of a request for memory
    return (hold.rate if hold.rate is not None else 0.0 if much is None else float(much)), hold.since


def in_force(actions: Iterable[ActionRow]) -> list[Hold]:
    """What is in force after these actions, the tightest limit first."""
    held = HoldTracker()
    for row in actions:
        held.note(row)
    return held.holds()


def spans(actions: Iterable[ActionRow], begin: int, end: int) -> Mapping[str, list[Span]]:
    """The holds that counted between two times, by bucket (the vCPUs' together), "cap", "memory",
    "pause" and "isolation".

    Parameters:
        actions: from the first one of the fleet on, in their order: an early one may still be in force.
        begin, end: nanoseconds since the epoch.
    """
    held = HoldTracker()
    found: dict[str, list[Span]] = {}
    counts: dict[tuple[str, str], tuple[int, Hold]] = {}

    def close(place: tuple[str, str], until: int) -> None:
        since, hold = counts.pop(place)
        if until > max(since, begin):
            found.setdefault(place[0], []).append(Span(max(since, begin), until, hold))

    def look(time: int) -> None:
        now = held.tightest()
        for place in [place for place, (_, hold) in counts.items() if now.get(place) is not hold]:
            close(place, time)
        for place, hold in now.items():
            counts.setdefault(place, (time, hold))

    begun = False
    for row in actions:
        if row.time > end:
            break
        if row.time > begin and not begun:  # of the actions before `begin` only the outcome counts
            begun = True
            look(begin)
        held.note(row)
        if begun:
            look(row.time)
    look(begin if not begun else end)
    for place in list(counts):
        close(place, end)
    return found
