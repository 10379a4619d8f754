"""What held a VM: read from what was done, in the order in which it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from ..model.effects import EFFECTS, Key, key_of, releases
from .reader import ActionRow

__all__ = ["Held", "Hold", "Span", "in_force", "spans"]


@attrs.frozen
class Hold:
    """Something that held the VM at that time.

    Attributes:
        action: that put it in force as it is, with reason and evidence.
        since: when the same policy began to hold it in that way; the action may have changed it later.
        where: "vcpu", "vm", "tenant" or "host".
    """

    action: ActionRow
    since: int
    where: str

    @property
    def rate(self) -> float | None:
        """Of a limit, events a second."""
        limit = self.action.details.get("limit")
        return None if limit is None else float(limit["rate"])

    @property
    def bucket(self) -> str | None:
        """Of a limit, the bucket that it is a limit of, as in `VmFacts.throttled_by`: "vm.exits"."""
        return None if self.rate is None else f"{self.where}.{self.action.details.get('meter', '')}"


@attrs.frozen
class Span:
    """A time in which something was what counts at its place: of several limits there the tightest, of caps too."""

    begin: int
    end: int
    hold: Hold


class Held:
    """Reads along in what was done, and knows what is in force. Its size is that of what is."""

    def __init__(self) -> None:
        self._held: dict[tuple[Key, str | None], Hold] = {}

    def note(self, row: ActionRow) -> None:
        action = row.action if row.outcome == "done" else None
        key = None if action is None else key_of(action)
        if action is None or key is None:
            return
        at = key, row.policy if EFFECTS[type(action)].stacks else None
        before = self._held.get(at)
        if not releases(action):
            # What was given and what is set later are two things: whoever sets it began to hold it then.
            same = before is not None and before.action.given == row.given
            where = "vcpu" if key.vcpu is not None else "vm" if key.vm else "tenant" if key.tenant else "host"
            self._held[at] = Hold(row, before.since if before is not None and same else row.time, where)
        elif before is not None:
            launches = {row.details.get("launch"), before.action.details.get("launch")} - {None}
            if len(launches) < 2:  # what is let go of an earlier launch holds the present one still
                del self._held[at]

    def holds(self) -> list[Hold]:
        """The tightest limit first."""
        return sorted(self._held.values(), key=lambda hold: -1.0 if hold.rate is None else hold.rate)

    def tightest(self) -> dict[tuple[str, str], Hold]:
        """What counts, by its place: a bucket (with the vCPU, where it is one's), "cap" or "pause"."""
        found: dict[tuple[str, str], Hold] = {}
        for (key, _), hold in self._held.items():
            place = (hold.bucket or key.what.value, str(hold.action.details.get("vcpu")))
            if place not in found or _tightness(hold) < _tightness(found[place]):
                found[place] = hold
        return found


def _tightness(hold: Hold) -> tuple[float, int]:
    share = hold.action.details.get("share")
    return (hold.rate if hold.rate is not None else 0.0 if share is None else float(share)), hold.since


def in_force(actions: Iterable[ActionRow]) -> list[Hold]:
    """What holds after these actions, the tightest limit first."""
    held = Held()
    for row in actions:
        held.note(row)
    return held.holds()


def spans(actions: Iterable[ActionRow], begin: int, end: int) -> Mapping[str, list[Span]]:
    """What counted between two times, by bucket (those of the vCPUs together), "cap", "pause" and "isolation"."""
    held = Held()
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
        if row.time > begin and not begun:  # of what was before only the outcome counts
            begun = True
            look(begin)
        held.note(row)
        if begun:
            look(row.time)
    look(begin if not begun else end)
    for place in list(counts):
        close(place, end)
    return found
