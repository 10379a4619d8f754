"""``orchestra why``: reads a fleet's journal and says what held a VM at a time, why, and what would end the hold."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ..journal import ActionRow, read_journal
from ..journal.explain import ENDED, Explanation, Fared, explain
from ..journal.export import iso
from ..journal.holds import Hold
from ..journal.series import Bin, series
from ..model.codec import encode
from ..model.printable import printable
from ..output.numbers import shown
from ..output.target import check_target
from ..output.times import day_and_time, duration, time_of_day
from .whyblame import suspicion_document, verdict
from .whyheld import capital, figure, held, in_force, per_second, unknown, window

__all__ = ["sentences", "sparklines", "why"]

WIDE: Final = 72
BARS: Final = " ▁▂▃▄▅▆▇█"
PLAIN: Final = " .:-=+*#@"
"""Likewise, where the terminal has no blocks."""

MOST_DONE: Final = 5
SECOND: Final = 1_000_000_000


def why(vm: str, journal: Path, *, at: int | None, window: float, as_json: bool, plot: Path | None) -> int:
    """Answer; the exit status.

    Raises:
        OrchestraError: the journal can't be read, or has nothing of that VM.
    """
    draw = None
    if plot is not None:  # a missing library is reported before any other work
        draw = _artist()
        check_target("--plot", plot, ".svg")
    with read_journal(journal) as reader:
        explained = explain(reader, vm, at, seconds=window)
        from_ = max(explained.since, explained.launched or explained.since)
        if (span := reader.span()) is not None:
            from_ = max(from_, span[0])
        # A VM that is gone has no idle time to show. Its last interval ends a moment after the VM.
        end = min(explained.at, max(explained.until, explained.covered.end)) if explained.gone else explained.at
        from_ = min(from_, end)
        until = max(end, from_ + WIDE)
        bins = series(reader, vm, from_, until, WIDE)
        if plot is not None and draw is not None:
            draw(explained, series(reader, vm, from_, until, 300), plot)
            print(f"orchestra: wrote {plot}", file=sys.stderr)
    if as_json:
        print(json.dumps(document(explained, bins)))
        return 0
    print(textwrap.fill(printable(" ".join(sentences(explained))), 100))
    print()
    blocks = (sys.stdout.encoding or "").lower().startswith("utf")
    print(*sparklines(bins, from_, end, BARS if blocks else PLAIN), sep="\n")
    return 0


def _artist() -> Callable[[Explanation, Sequence[Bin], Path], None]:
    from .whyplot import draw

    return draw


def document(explained: Explanation, bins: Sequence[Bin]) -> dict[str, Any]:
    """For JSON."""
    known: dict[str, Any] = encode(explained)
    known["covered"].pop("hosts")  # the figures of these rows are in `host`
    return {
        **known,
        "suspicion": suspicion_document(explained.suspicion),
        "text": " ".join(sentences(explained)),
        "time": iso(explained.at),
        "series": encode(bins),
    }


# ---- the paragraph --------------------------------------------------------------------------------------------------


def sentences(explained: Explanation) -> Iterator[str]:
    """The answer. What held the VM by the counters comes first. An inference comes after that, or not at all."""
    yield from _state(explained)
    yield from unknown(explained)
    yield from held(explained)
    if explained.seconds and not explained.causes:
        dry = [row for row in explained.done if row.outcome == "dry-run"]
        if not explained.holds or explained.gone:
            yield (
                f"Nothing held it{'' if explained.done else ', and nothing was done to it'}{_when_partial(explained)}."
                + (" What was decided about it was a dry run." if dry and len(dry) == len(explained.done) else "")
            )
        elif all(hold.rate is not None for hold in explained.holds):
            yield f"Nothing held it{_when_partial(explained)}."
    yield from in_force(explained)
    yield from _fared(explained)
    yield from _host(explained)
    waits = [one.hold for cause in explained.causes for one in cause.setters]
    for hold in explained.holds if explained.ends is None else ():
        if hold.rate is None or hold in waits:
            yield _ending(hold, explained)
    yield from _done(explained)
    if explained.seconds and not any(hold.rate is None for hold in explained.holds):
        yield from verdict(explained)


def _when_partial(explained: Explanation) -> str:
    when = window(explained)
    return "" if when.startswith("in its last") else f" {when}"


def _state(explained: Explanation) -> Iterator[str]:
    of = f"{explained.vm} of tenant {explained.tenant}" if explained.tenant else explained.vm
    when = day_and_time(explained.at)
    state = explained.state
    if state is None:
        if explained.begins is None:
            yield f"{of} at {when}:"
    elif explained.over is not None:
        latest = (
            " at the latest" if explained.until < explained.over else ""
        )  # it was killed, and another one has begun
        over = f"at {time_of_day(explained.over, explained.at)}{latest}"
        yield f"{of} was {state.state} before {when}; its fleet had gone by then, {over}."
    elif state.state in ENDED:
        why = f": {state.reason}" if state.reason else ""
        yield f"{of} had ended at {when}: it {state.state} at {time_of_day(state.time, explained.at)}{why}."
    elif explained.ends is not None:
        since = time_of_day(state.time, explained.at)
        yield f"{of} was {state.state} since {since} when the journal told of it last; of {when} it does not tell."
    else:
        why = f": it {state.reason}" if state.state == "waiting" else ""
        yield f"{of} was {state.state} at {when}, since {time_of_day(state.time, explained.at)}{why}."


def _fared(explained: Explanation) -> Iterator[str]:
    fared = explained.fared
    if fared is None:
        if explained.seconds:
            yield f"{capital(window(explained))}, it did nothing that is counted."
        return
    parts = [
        f"{_rate(fared)} and used {_known(fared.cpu)} s of CPU a second" if fared.cpu is not None else _rate(fared)
    ]
    if fared.work is not None:
        parts.append(f"got {per_second(fared.work)} of its own work done a second")
    if fared.throttled >= 0.005:
        parts.append(f"was throttled {fared.throttled:.0%} of its vCPUs' time")
    if fared.capped is not None and fared.capped >= 0.005:
        parts.append(f"was held by its CPU cap {fared.capped:.0%} of it")
    if fared.delayed is not None:
        parts.append(f"had to wait for a CPU {fared.delayed:.0%} of the time that it could have run")
    listed = ", ".join(parts[:-1]) + ", and " + parts[-1] if len(parts) > 1 else parts[0]
    yield f"{capital(window(explained))} it {listed}."
    if explained.before is not None and explained.before.bus_locks and fared.bus_locks is not None:
        yield f"Before it was held it did up to {per_second(explained.before.bus_locks)} bus locks/s."


def _rate(fared: Fared) -> str:
    exits = f"{per_second(fared.exits)} exits/s"
    locks = (
        "an unknown number of bus locks" if fared.bus_locks is None else f"{per_second(fared.bus_locks)} bus locks/s"
    )
    return f"did {locks} and {exits}"


def _known(value: float) -> str:
    return f"{value:.2g}"


def _host(explained: Explanation) -> Iterator[str]:
    host = explained.host
    if host is None:
        return
    parts = []
    if host.bus_locks:
        share = f", {host.share:.0%} of them by {explained.vm}" if host.share is not None else ""
        loudest = ""
        if host.loudest is not None and host.loudest[0] != explained.vm:
            loudest = f", most by {host.loudest[0]} ({per_second(host.loudest[1])}/s)"
        parts.append(f"all its VMs together made {per_second(host.bus_locks)} bus locks/s{share}{loudest}")
    if host.lock_ns is not None:
        times = f", {host.lock_times:.2g} times what it takes in the calm" if host.lock_times is not None else ""
        parts.append(f"a locked operation of its own took {host.lock_ns:.3g} ns{times}")
    if host.cpu_pressure is not None:
        parts.append(f"some task waited for a CPU {host.cpu_pressure:.0%} of the time")
    if parts:
        yield f"On the host, {'; '.join(parts)}."


def _ending(hold: Hold, explained: Explanation) -> str:
    """What would end the hold, as far as the evidence shows how the policy decides."""
    row = hold.action
    kinds = {"Pause": "pause", "CapCpu": "cap", "SetMemory": "request for memory", "Isolate": "isolation"}
    what = kinds.get(row.kind, "limit")
    evidence = row.evidence
    if row.given == "spec":
        return "That limit is in its spec, and stays until somebody sets another."
    if row.given == "default":
        return "That limit is what a spec has that says nothing of its own (`answer_limit`); `set_limit` changes it."
    if row.given == "host_budget":
        return "That limit is the host's budget, which several processes share; `HostBudget.set_limit` changes it."
    if row.given is not None:
        return "That limit was there from the fleet's beginning, and stays until somebody sets another."
    if row.policy is None or row.kind == "SetLimit":
        return f"That {what} stays until somebody takes it away."
    if (error := next((one for one in explained.off if one.policy == row.policy), None)) is not None:
        since = time_of_day(error.time, explained.at)
        why = f"is switched off since {since} ({error.error})"
        return f"Policy {row.policy} {why}: that {what} stays until somebody ends it."
    if "step" in evidence:
        return (
            f"The {evidence['step']} ends when it has been in the clear for as long as the ladder's step asks for"
            f"{', which its relapses have doubled' if evidence.get('relapses') else ''}."
        )
    if "level" in evidence:
        hurts = (
            f"{evidence['hurts']} is well below {figure(evidence['threshold'])}"
            if "hurts" in evidence
            else "it is calm"
        )
        return f"That {what} rises while {hurts}, and ends when the level is back at {figure(evidence.get('start'))}/s."
    if "baseline" in evidence:
        return (
            f"It may do more again when it has saved credits, by doing less than {figure(evidence['baseline'])}/s: "
            "what it leaves of that comes back to its balance."
        )
    if "budget" in evidence or "weight" in evidence:
        return f"That {what} ends when the budget has room for what it asks for, or it asks for less than its share."
    if "pattern" in evidence or "frequency" in evidence or row.reason.startswith("static limit"):
        return f"That {what} goes by name and stays while policy {row.policy} is in force."
    return f"Policy {row.policy} will end that {what} when it sees fit."


def _done(explained: Explanation) -> Iterator[str]:
    held = {(hold.action.time, hold.action.kind) for hold in explained.holds}
    others = [row for row in explained.done if (row.time, row.kind) not in held]
    if not others:
        return
    back = duration((explained.at - explained.since) / SECOND)
    listed = "; ".join(_short(row, explained.at) for row in others[-MOST_DONE:])
    more = f" ({len(others)} times in all; `orchestra journal` has them)" if len(others) > MOST_DONE else ""
    yield f"Besides, in the {back} before: {listed}{more}."


def _short(row: ActionRow, at: int) -> str:
    by = f" by {row.policy}" if row.policy else ""
    came = {"done": "", "dry-run": " (a dry run)", "refused": " (refused)", "failed": " (failed)"}.get(row.outcome, "")
    error = f" ({row.error})" if row.error else ""
    return f"{time_of_day(row.time, at)} {row.kind}{by}{came}{error}" + (f", {row.reason}" if row.reason else "")


# ---- the picture in a terminal --------------------------------------------------------------------------------------


def sparklines(bins: Sequence[Bin], since: int, at: int, bars: str) -> Iterator[str]:
    """A line for each signal that is known: its values over time, and the highest value."""
    for name, key, unit in (
        ("bus locks", "bus_locks", "/s"),
        ("exits", "exits", "/s"),
        ("throttled", "throttled", "%"),
        ("waits for a CPU", "queued", "%"),
        ("lock on the host", "lock_ns", " ns"),
    ):
        values = [getattr(one, key) for one in bins]
        known = [value for value in values if value is not None]
        if known:
            most = max(known)
            top = f"{most:.0%}" if unit == "%" else f"{shown(most)}{unit}"
            yield f"{name:<19}{_bars(values, 1.0 if unit == '%' else most, bars)}  at most {top}"
    begin, end = time_of_day(since, at), time_of_day(at)
    yield f"{'':<19}{begin}{end:>{max(len(end), WIDE - len(begin))}}"


def _bars(values: Sequence[float | None], most: float, bars: str) -> str:
    steps = len(bars) - 1
    return "".join(
        " " if value is None else bars[max(1, min(steps, round(value / most * steps)))] if value and most else bars[1]
        for value in values
    )
