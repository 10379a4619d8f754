"""A limit on a Linux guest's bus locks: what it lets through, and what others in the guest and another VM keep."""

from __future__ import annotations

from statistics import median

import attrs
import trio

import orchestra as orc

from .linux import BOOTED, Guest, made, order, progress, skipped, spec
from .machine import sees_bus_locks
from .row import Options, Row

__all__ = ["linux_locks"]

LIMIT = orc.Limit(rate=50, burst=5)
"""A burst of some, so that a vCPU that gets its CPU late makes up for it."""
HELD, KEPT = 0.01, 0.98
SIDES = ("another process of the offender's guest", "another VM")


@attrs.define
class Taken:
    """Rounds of work a second, by who works; and bus locks a second."""

    alone: list[list[float]] = attrs.field(factory=lambda: [[], []])
    beside: list[list[float]] = attrs.field(factory=lambda: [[], []])
    locks: list[float] = attrs.field(factory=list)


async def _work(guests: list[Guest], milliseconds: int, into: list[list[float]]) -> None:
    """One after the other: a host of two CPUs has one for who works, and one for the offender."""
    for number, guest in enumerate(guests):
        rounds, nanoseconds = await order(guest, f"work {milliseconds}")
        into[number].append(rounds / nanoseconds * 1e9)


async def _beside(guests: list[Guest], milliseconds: int, taken: Taken) -> None:
    """The same, with a process in the first guest that makes split locks."""
    offender = guests[0]
    assert isinstance(offender, orc.Vm)
    await order(offender, "offend")
    await trio.sleep(0.5)  # until its first locks are behind it
    before, begun = offender.statistics().bus_locks or 0, trio.current_time()
    await _work(guests, milliseconds, taken.beside)
    counted = (offender.statistics().bus_locks or 0) - before
    taken.locks.append(counted / (trio.current_time() - begun))
    await order(offender, "desist")


async def linux_locks(options: Options) -> list[Row]:
    """A bound on the rate, and on what others lose. With the offender and without, in turns."""
    if skipped("linux-locks", peer=False):
        return []
    if not sees_bus_locks():
        print("linux-locks: skipped: this host's KVM reports no bus locks")
        return []
    files = made(options.build)
    milliseconds, rounds = options.pick(4000, 300), options.pick(6, 1)
    taken = Taken()
    async with orc.open_fleet(backend="kvm", bus_locks="require") as fleet:
        offender = await fleet.launch(spec("offender", files, vcpus=2, limit=LIMIT))
        other = await fleet.launch(spec("other", files))
        for vm in (offender, other):
            await vm.console.wait_for("ready\r\n", timeout=BOOTED)
        progress("both guests are up")
        guests: list[Guest] = [offender, other]
        for number in range(rounds):
            # Whatever else changes from one half of a round to the next, it does to both: the halves change places.
            if number % 2:
                await _beside(guests, milliseconds, taken)
            await _work(guests, milliseconds, taken.alone)
            if not number % 2:
                await _beside(guests, milliseconds, taken)
            shares = (f"{beside[-1] / alone[-1]:.3f}" for beside, alone in zip(taken.beside, taken.alone, strict=True))
            progress(f"round {number + 1} of {rounds}: {taken.locks[-1]:.2f} locks/s, kept {', '.join(shares)}")
    rate = sum(taken.locks) / len(taken.locks)
    rows = [
        Row(
            what=f"bus locks of a process in Linux, with a limit of {LIMIT.rate:g}/s",
            measured=f"{rate:.2f}/s",
            floor=f"{LIMIT.rate:g}/s",
            ratio=rate / LIMIT.rate,
            bound="1 %",
            ok=abs(rate / LIMIT.rate - 1) <= HELD,
            note="A process on the second vCPU makes split locks and nothing else. Who works beside it has a CPU of "
            "its own, and is compared with itself while there is no offender, in turns; the ratio is the median of the "
            "rounds'.",
            details=attrs.asdict(taken),
        )
    ]
    for number, who in enumerate(SIDES):
        beside, alone = median(taken.beside[number]), median(taken.alone[number])
        kept = median(one / other for one, other in zip(taken.beside[number], taken.alone[number], strict=True))
        rows.append(
            Row(
                what=f"work of {who}",
                measured=f"{beside:.0f} rounds/s",
                floor=f"{alone:.0f} rounds/s",
                ratio=kept,
                bound=f"{KEPT}x at least",
                ok=kept >= KEPT,
            )
        )
    return rows
