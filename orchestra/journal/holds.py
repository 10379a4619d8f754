"""What held a VM: read from what was done, in the order in which it was."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from .reader import ActionRow

__all__ = ["Held", "Hold", "in_force"]


@attrs.frozen
class Hold:
    """Something that held the VM at that time.

    Attributes:
        action: that put it in force as it is, with reason and evidence.
        since: when the same policy began to hold it in that way; the action may have changed it later.
        where: "vm", "tenant" or "host".
    """

    action: ActionRow
    since: int
    where: str

    @property
    def rate(self) -> float | None:
        """Of a limit, events a second."""
        limit = self.action.details.get("limit")
        return None if limit is None else float(limit["rate"])


class Held:
    """Reads along in what was done, and knows what is in force. Its size is that of what is."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, ...], Hold] = {}

    def note(self, row: ActionRow) -> None:
        if row.outcome != "done":
            return
        key: tuple[str, ...]
        where = "vm" if row.vm is not None else "tenant" if row.tenant is not None else "host"
        who, meter = row.policy or "", str(row.details.get("meter", ""))
        match row.kind:
            case "Throttle" | "Unthrottle":
                key, on = ("throttle", where, meter, who), row.kind == "Throttle"
            case "SetLimit":
                key = ("limit", where, meter, str(row.details.get("vcpu")))
                on = row.details.get("limit") is not None
            case "CapCpu":
                key, on = ("cap", where, who), row.details.get("share") is not None
            case "Pause" | "Resume":  # there is one for all
                key, on = ("pause", where), row.kind == "Pause"
            case "Isolate" | "Rejoin":
                key, on = ("isolate", where), row.kind == "Isolate"
            case _:
                return
        if on:
            since = self._held[key].since if key in self._held else row.time
            self._held[key] = Hold(row, since, where)
        elif key in self._held:
            launches = {row.details.get("launch"), self._held[key].action.details.get("launch")} - {None}
            if len(launches) < 2:  # what is let go of an earlier launch holds the present one still
                del self._held[key]

    def holds(self) -> list[Hold]:
        """The tightest limit first."""
        return sorted(self._held.values(), key=lambda hold: -1.0 if hold.rate is None else hold.rate)


def in_force(actions: Iterable[ActionRow]) -> list[Hold]:
    """What holds after these actions, the tightest limit first."""
    held = Held()
    for row in actions:
        held.note(row)
    return held.holds()
