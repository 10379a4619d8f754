"""Whether a limit holds: the mean, every window, and a fair share for each vCPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import trio

import orchestra as orc

from . import floor
from .row import Options, Row

__all__ = ["excess", "jain", "rate"]

RATE, BURST = 2000.0, 20.0
SETTLE = 0.5


@attrs.frozen
class Event:
    who: tuple[str, int]
    time: float  # seconds
    waited: bool


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1/n if one has all."""
    total = sum(shares)
    return total * total / (len(shares) * sum(share * share for share in shares)) if total else 0.0


def excess(times: list[float], rate: float, burst: float) -> float:
    """How far any window [t1, t2] between two events goes over burst + rate * (t2 - t1); not above 0: none does."""
    lowest, worst = float("inf"), -burst
    for number, time in enumerate(sorted(times)):
        lowest = min(lowest, number - rate * time)
        worst = max(worst, number + 1 - rate * time - lowest - burst)
    return worst


def _second_round(events: list[Event]) -> list[float]:
    """Without the first event of each vCPU that had to wait: the one that was in flight when the burst was used up."""
    first: set[tuple[str, int]] = set()
    kept = []
    for event in events:
        if event.waited and event.who not in first:
            first.add(event.who)
        else:
            kept.append(event.time)
    return kept


async def _measure(options: Options, vms: int, vcpus: int) -> Row:
    seconds, events = options.pick(10, 1), []
    limit = orc.Limit(rate=RATE, burst=BURST, max_delay=None)
    async with orc.open_fleet(backend="kvm", exit_limit=limit) as fleet:
        boot = orc.FlatImage(code=floor.guest("write"))
        fleets = [
            await fleet.launch(orc.VmSpec(name=f"vm-{n}", boot=boot, vcpus=vcpus), paused=True) for n in range(vms)
        ]

        async def listen(exits: orc.Exits) -> None:
            async for exit in exits:
                events.append(Event((exit.vm, exit.vcpu), exit.time / 1e9, exit.wait > 0))

        async with fleet.exits(orc.Io) as exits, trio.open_nursery() as nursery:
            nursery.start_soon(listen, exits)
            for vm in fleets:
                await vm.resume()
            await trio.sleep(seconds + 2 * SETTLE)
            nursery.cancel_scope.cancel()
        missed = fleet.statistics().missed
    n = vms * vcpus
    events.sort(key=lambda event: event.time)
    start = events[0].time + SETTLE
    inside = [event for event in events if start <= event.time < start + seconds]
    got = len(inside) / seconds
    counts = Counter(event.who for event in inside)
    fair = jain([*counts.values(), *[0] * (n - len(counts))])
    strict = excess([event.time for event in events], RATE, BURST)
    later = excess(_second_round(events), RATE, BURST)
    return Row(
        what=f"rate held on one bucket, {vms} VM{'s' if vms > 1 else ''} of {vcpus} vCPU{'s' if vcpus > 1 else ''}, "
        f"{seconds} s",
        measured=f"{got / RATE - 1:+.3%}, window {strict:+.1f} / {later:+.1f}, Jain {fair:.4f}",
        bound=f"1 %, window {n - 1:+d} / +0, Jain 0.99",
        ok=abs(got / RATE - 1) <= 0.01 and strict <= n - 1 + 1e-6 and later <= 1e-6 and fair >= 0.99 and not missed,
        note=f"Exit meter, {RATE:.0f}/s, burst {BURST:.0f}, on the host's bucket. Window: events over burst + rate*t "
        "in the worst window between any two events, all / without the one event of each vCPU that was in flight when "
        "the burst was used up (an event is charged when it is seen, and its vCPU waits).",
        details={"rate": got, "excess": strict, "excess_second_round": later, "jain": fair, "missed": missed},
    )


async def rate(options: Options) -> list[Row]:
    shapes = [(1, 1), (8, 1)] if options.quick else [(1, 1), (8, 1), (64, 1), (1, 8)]
    return [await _measure(options, vms, vcpus) for vms, vcpus in shapes]
