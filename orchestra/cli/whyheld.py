"""What ``orchestra why`` says of what held a VM, and of the time that its answer is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from ..journal import ActionRow
from ..journal.causes import Cause, Setter
from ..journal.explain import LATELY, Explanation
from ..journal.holds import Hold
from ..model.memory import MiB
from ..output.numbers import shown
from ..output.times import day_and_time, duration, time_of_day

__all__ = ["capital", "figure", "held", "in_force", "per_second", "unknown", "window"]

SECOND: Final = 1_000_000_000

EVENTS: Final = {"bus_locks": "bus locks"}
"""What a meter counts, where the meter's name does not say so."""


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---- what is known -----------------------------------------------------------------------------------------------


def window(explained: Explanation) -> str:
    """Names the time for which the figures hold."""
    until = explained.until if explained.gone else explained.at
    if abs(explained.end - until) < SECOND and not inner_gaps(explained):
        whole = abs(explained.seconds * SECOND - LATELY) < 1.5 * SECOND
        return f"in its last {'minute' if whole else duration(explained.seconds)}"
    return f"from {_from_to(explained)}"


def _from_to(explained: Explanation) -> str:
    known = f", of which {duration(explained.seconds)} are known," if inner_gaps(explained) else ""
    return f"{time_of_day(explained.begin, explained.at)} to {time_of_day(explained.end, explained.at)}{known}"


def inner_gaps(explained: Explanation) -> list[tuple[int, int]]:
    """The gaps between two known times."""
    return [(begin, end) for begin, end in explained.covered.gaps if begin > explained.begin and end < explained.end]


def unknown(explained: Explanation) -> Iterator[str]:
    """Says which parts of the time are not in the journal. The answer says nothing about these parts."""
    at = time_of_day(explained.at)
    if explained.begins is not None:
        begins = day_and_time(explained.begins)
        yield f"Of {explained.vm} the journal begins at {begins}: it has nothing of it at {day_and_time(explained.at)}."
        return
    if explained.state is None and not explained.covered.hosts:
        yield "By then the journal has no state and no interval of it: what held it is not known."
        return
    if explained.ends is not None:
        if not explained.seconds:
            rest = f": it has nothing of the minute before {at}"
        elif explained.at - explained.ends >= SECOND:
            rest = f": of the minute before {at} it has that from {_from_to(explained)}"
        else:
            rest = ""
        yield f"The journal ends at {day_and_time(explained.ends)}{rest}."
    elif explained.gone and explained.over is not None and explained.until < explained.over:
        yield f"The journal of that fleet ends at {day_and_time(explained.until)}, without a word of its end."
    begin, end = explained.covered.asked
    for since, until in explained.covered.gaps:
        first, last = time_of_day(since, explained.at), time_of_day(until, explained.at)
        if until == end and explained.ends is not None:
            continue  # an earlier sentence says this
        if since == begin and until == end:
            yield f"The journal has no interval of the time from {first} to {last}: what held it then is not known."
        elif since == begin:
            yield f"Of the minute in question, the journal's intervals begin at {last}."
        elif until == end:
            yield f"Of the minute in question, the journal's intervals end at {first}."
        else:
            yield f"The journal has a gap from {first} to {last}."


# ---- what held it -------------------------------------------------------------------------------------------------


def held(explained: Explanation) -> Iterator[str]:
    """What held the VM, the longest hold first."""
    for cause in explained.causes:
        made_wait = f"{_part(cause.share)} of its vCPUs' time {window(explained)}"
        if cause.kind == "waiting":
            yield _between_runs(cause, explained, made_wait)
        elif cause.where is None and cause.kind == "limit":
            there = _several([_limit(one.hold) for one in cause.setters])
            there = f"; those that are in the journal: {there}" if there else ""
            yield f"It was throttled {made_wait}; by which limit, the journal does not tell{there}."
        elif not cause.setters:
            yield f"{_nobodys(cause)} {made_wait}; who did that is not in the journal."
        else:
            yield _by(cause, cause.setters[0], explained, made_wait)


def _between_runs(cause: Cause, explained: Explanation, made_wait: str) -> str:
    row = cause.state
    last = (
        "" if row is None or row == explained.state else f", as at {time_of_day(row.time, explained.at)}: {row.reason}"
    )
    return f"Between two runs it waited {made_wait}{last}."


def _by(cause: Cause, first: Setter, explained: Explanation, made_wait: str) -> str:
    row, until = first.hold.action, max(explained.until, explained.end)
    over = (
        first.until
        if first.until is not None
        else explained.until
        if explained.gone or explained.ends is not None
        else None
    )
    if over is None:
        since = f"For {duration(max(0, until - first.since) / SECOND)}, since {time_of_day(first.since, explained.at)},"
        has = "has "
    else:
        since = f"From {time_of_day(first.since, explained.at)} to {time_of_day(over, explained.at)},"
        if cause.kind == "pause" and over - first.since < 10 * SECOND:  # so short that whole seconds would say nothing
            long = duration((over - first.since) / SECOND)
            since = (
                f"For {long if long != '0 s' else 'less than 0.1 s'}, from {time_of_day(first.since, explained.at)} on,"
            )
        has = ""
    later = (
        f", as it is since {time_of_day(row.time, explained.at)}" if row.time != first.since and over is None else ""
    )
    waits = {"limit": f"; it waited for that {made_wait}", "cap": f"; that held it {made_wait}"}.get(cause.kind, "")
    others = [one for one in cause.setters[1:] if one.seconds > 0]
    also = f"; and in part of that time {_several([_other(one) for one in others])}" if others else ""
    return f"{since} {_who(first.hold)} {has}{_does(first.hold, first.rates)}{later}{_reason(row)}{waits}{also}."


def _part(share: float) -> str:
    if 0 < share < 0.005:
        return "less than 1%"
    return "more than 99%" if 0.995 <= share < 1 - 1e-9 else f"{share:.0%}"


def per_second(rate: float) -> str:
    """As `shown`, but a small value is not shown as 0."""
    return f"{rate:.3g}" if rate < 9.95 else shown(rate)


def _nobodys(cause: Cause) -> str:
    if cause.kind == "limit":
        return f"A limit on {_events(cause.meter)} of {_WHOSE[cause.where or '']} held it"
    return "It was paused" if cause.kind == "pause" else "A CPU cap held it"


_WHOSE: Final = {
    "vcpu": "one of its vCPUs",
    "vm": "its own",
    "tenant": "its tenant",
    "fleet": "its fleet",
    "host": "the whole host",
}


def _who(hold: Hold) -> str:
    row = hold.action
    if row.given == "spec":
        return "its spec"
    if row.given == "default":
        return "orchestra's default"
    if row.given == "host_budget":
        return "the budget that the host's processes share"
    if row.given is not None:
        return "what its fleet was opened with"
    return f"policy {row.policy}" if row.policy else "a caller"


def _does(hold: Hold, rates: tuple[float, float] | None = None) -> str:
    row = hold.action
    match row.kind:
        case "CapCpu":
            return f"let it run for at most {float(row.details['share']):.0%} of the time"
        case "SetMemory":
            return f"asked it to keep to {float(row.details['memory']) / MiB:,.6g} MiB of its memory"
        case "Pause":
            return "held it paused"
        case "Isolate":
            return "kept it on the quarantine CPUs"
    lowest, highest = rates or (hold.rate or 0.0, hold.rate or 0.0)
    rate = per_second(highest) if lowest == highest else f"between {per_second(lowest)} and {per_second(highest)}"
    return f"held {_whom(hold)} to {rate} {_events(row.details.get('meter'))}/s"


def _whom(hold: Hold) -> str:
    row = hold.action
    if hold.where == "vcpu":
        return f"its vCPU {row.details.get('vcpu')}"
    whom = {"vm": "it", "tenant": f"its tenant {row.tenant}", "fleet": "its fleet", "host": "the whole host"}
    return whom[hold.where]


def _other(setter: Setter) -> str:
    return f"{_who(setter.hold)} {_does(setter.hold, setter.rates)}"


def _events(meter: Any) -> str:
    return EVENTS.get(str(meter), str(meter))


def _limit(hold: Hold) -> str:
    return (
        f"{per_second(hold.rate or 0.0)} {_events(hold.action.details.get('meter'))}/s for {_whom(hold)} ({_who(hold)})"
    )


def _several(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def in_force(explained: Explanation) -> Iterator[str]:
    """What was in force and did not hold the VM, as far as is known."""
    if explained.ends is not None and not explained.seconds:
        return  # the journal does not know the present
    waits = [one.hold for cause in explained.causes for one in cause.setters]
    if waits and not explained.holds and not explained.gone and explained.ends is None:
        yield "By then nothing was in force any more."
    idle = [hold for hold in explained.holds if hold.rate is not None and hold not in waits]
    if idle:
        when = f"; by the counters it did not wait for {'that' if len(idle) == 1 else 'these'} {window(explained)}"
        yield f"In force: {_several([_limit(hold) for hold in idle])}{when if explained.seconds else ''}."
    for hold in explained.holds:
        if hold.rate is None and hold not in waits:
            row, known = hold.action, explained.ends is None
            begun = time_of_day(hold.since, explained.at)
            lasted = duration(max(0, explained.until - hold.since) / SECOND)
            since = f"For {lasted}, since {begun}," if known else f"Since {begun}, until the journal ends,"
            later = f", as it is since {time_of_day(row.time, explained.at)}" if row.time != hold.since else ""
            yield f"{since} {_who(hold)} has {_does(hold)}{later}{_reason(row)}."


def _reason(row: ActionRow) -> str:
    if row.given is not None:
        return ""
    reason = f": {row.reason}" if row.reason else ""
    facts = [
        f"{name.replace('_', ' ')} {figure(value)}"
        for name, value in row.evidence.items()
        if name not in ("interval", "generation", "source")
        and value is not None
        and str(figure(value)) not in row.reason
    ]
    return reason + (f" (evidence: {', '.join(facts)})" if facts else "")


def figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.6g}"
