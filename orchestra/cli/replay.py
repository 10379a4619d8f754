"""``orchestra replay``: what other rules would have done on what a journal saw, side by side with what was done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from ..config import parse_rules
from ..journal import read_journal
from ..journal.export import iso
from ..model.codec import encode
from ..model.printable import printable
from ..output.numbers import shown
from ..output.target import check_target
from ..output.times import day_and_time, duration
from ..replay import Replay, Response, World, replay as run
from .simulate import audience

__all__ = ["document", "lines", "replay"]

LISTED: Final = 10
"""VMs in the table."""


def replay(
    journal: Path, rules: Path, *, since: int | None, until: int | None, as_json: bool, plot: Path | None
) -> int:
    """Replay the journal. Returns the exit status: 1 if a policy raised.

    Raises:
        OrchestraError: the rules or the journal can't be; the message says why.
    """
    draw = None
    if plot is not None:  # an error in its path is reported now, not after the replay
        draw = _artist()
        check_target("--plot", plot, ".svg")
    text = rules.read_bytes()
    parse_rules(text, str(rules))  # mistakes in the rules are reported before the replay begins
    with read_journal(journal) as reader, audience() as watching:
        result = run(reader, lambda: parse_rules(text, str(rules)), since=since, until=until, progress=watching.show)
    if plot is not None and draw is not None:
        draw(result, plot)
        print(f"orchestra: wrote {plot}", file=sys.stderr)
    if as_json:
        print(json.dumps(document(result)))
    else:
        print(*map(printable, lines(result)), sep="\n")
    return 1 if result.errors else 0


def _artist() -> Callable[[Replay, Path], None]:
    from .replayplot import draw

    return draw


def document(result: Replay) -> dict[str, Any]:
    """For JSON."""
    return {
        "since": iso(result.since),
        "until": iso(result.until),
        "seconds": result.seconds,
        "sessions": result.sessions,
        "as_it_was": encode(result.before),
        "replayed": encode(result.after),
        "actions": [
            {
                "time": iso(deed.time),
                "policy": deed.policy,
                "outcome": deed.outcome,
                **encode(deed.action, str),
            }
            for deed in result.deeds
        ],
        "errors": dict(result.errors),
        "budget": result.budget,
        "response": encode(result.response.lines),
    }


def lines(result: Replay) -> Iterator[str]:
    """A table for a person, and remarks on what its figures mean."""
    before, after = result.before, result.after
    fleets = "" if result.sessions == 1 else f", {result.sessions} fleets one after another"
    yield (
        f"{day_and_time(result.since)} to {day_and_time(result.until)}: "
        f"{duration(result.seconds)} of journal{fleets}, {len(before.vms)} VMs"
    )
    yield ""
    yield from _columns([("", "as it was", "replayed"), *_rows(result)])
    yield ""
    yield from _columns([("VM", "asked for", "made", "replayed", "held", "replayed"), *_vms(before, after)])
    left = len(before.vms) - LISTED
    if left > 0:
        yield f"and {left} more: --json has them all"
    yield ""
    yield from _notes(result.response, before)
    for policy, error in result.errors.items():
        yield f"Policy {policy} raised and was switched off: {error}"


def _rows(result: Replay) -> Iterator[tuple[str, str, str]]:
    before, after = result.before, result.after

    def row(name: str, show: Callable[[World], str]) -> tuple[str, str, str]:
        return name, show(before), show(after)

    yield row("actions", lambda world: str(sum(world.actions.values())))
    for kind in sorted({*before.actions, *after.actions}):
        yield row(f"  {kind}", lambda world, kind=kind: str(world.actions.get(kind, 0)))  # type: ignore[misc]  # its own
    for outcome in sorted({*before.not_done, *after.not_done}):
        yield row(f"  {outcome}", lambda world, outcome=outcome: str(world.not_done.get(outcome, 0)))  # type: ignore[misc]
    yield row("VMs touched", lambda world: str(len(world.touched)))
    yield row("bus locks", lambda world: shown(world.bus_locks))
    yield row("  of those asked for", lambda world: f"{world.bus_locks / world.wanted:.1%}" if world.wanted else "-")
    yield row("vCPU time held by limits", lambda world: duration(world.throttled))
    yield row("  by CPU caps", lambda world: duration(world.capped))
    yield row("  by pauses", lambda world: "?" if world.paused is None else duration(world.paused))
    yield row("victims without a CPU", lambda w: "?" if w.victims_delay is None else duration(w.victims_delay))
    yield row(
        "Jain's index, of fair shares" if result.budget else "Jain's index, of what was asked for",
        lambda world: "-" if world.jain is None else f"{world.jain:.3f}",
    )


def _vms(before: World, after: World) -> Iterator[tuple[str, ...]]:
    then = {one.vm: one for one in after.vms}
    for one in before.vms[:LISTED]:
        other = then[one.vm]
        held = [w.throttled + w.capped + w.paused for w in (one, other)]
        yield (one.vm, shown(one.wanted), shown(one.bus_locks), shown(other.bus_locks), *map(duration, held))


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]  # noqa: B905  # one line of a table
        yield "  ".join(cells).rstrip()


def _notes(response: Response, before: World) -> Iterator[str]:
    yield (
        "Asked for: the locks that a VM made, and those that it would have made in the time that it waited. What a VM "
        "would have done while it was paused or gone is unknown."
        + (" How long VMs were held, as it was, is without pauses." if before.paused is None else "")
    )
    if before.victims_delay is not None and "run_delay" not in response.lines:
        yield "This journal does not show how the victims' waiting depends on bus locks: replayed, it is as it was."
    for signal, line in response.lines.items():
        yield (
            f"{signal} follows the others' bus locks: r² {line.certainty:.2f} over {line.points} points; it is "
            "replayed along that line."
        )
