"""What one tenant's guests can take from another's: floods of each kind of exit, beside an innocent VM.

Eight guests of one tenant flood. Beside them runs one VM of another tenant, whose port a task answers in a closed loop.
Two figures for each kind of flood: how late the event loop wakes, and what the innocent VM gets, as a part of what it
gets beside eight guests that only spin. And how long it takes to stop another VM meanwhile.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from statistics import fmean, median, stdev
from typing import Literal

import attrs
import trio

import orchestra as orc

from . import floor
from .answered import Register, answer_all
from .row import Options, Row

__all__ = ["hostile"]

GUESTS = 8
PORT = 0x80
PORTS = range(PORT, PORT + 1)
MMIO = range(0x2_0000, 0x2_1000)  # behind the end of a guest's 64 KiB
LATE = 0.005
"""Bound on the event loop's lateness, p99: about what guests that spin make it with twice as many of them as cores."""
KEPT = 0.9
"""Bound on what is left to the innocent tenant."""
WINDOWS = 40
"""Of each kind. What the innocent gets depends most on who shares a CPU with whom. The scheduler decides that anew when
the guests are resumed, and it makes a threefold difference. So many short windows say more than a few long ones."""
SEED = 9


@attrs.frozen
class Flood:
    """A kind of flood. `device`, `task`: who answers its port and its MMIO; neither: nobody.

    Attributes:
        heard: somebody subscribed to its exits.
        followed: somebody follows its console.
    """

    guest: str
    mode: Literal[16, 32] = 16
    device: bool = False
    task: bool = False
    heard: bool = False
    followed: bool = False
    more: dict[str, object] = attrs.field(factory=dict)


RINGS = {"irqchip": "full", "devices": (orc.Digest(base=MMIO.start),)}
TALKS = {"devices": (orc.Serial(), orc.DebugConsole())}
FLOODS = {
    "string reads, a device answers": Flood("insb", device=True),
    "string writes, a device answers": Flood("outsb", device=True),
    "string reads, a task answers": Flood("insb", task=True),
    "single reads, a device answers": Flood("read", device=True),
    "single reads, a task answers": Flood("read", task=True),
    "single reads, 4 vCPUs each, a task answers": Flood("read", task=True, more={"vcpus": 4}),
    "MMIO, a device answers": Flood("mmio", device=True),
    "MMIO, nobody answers": Flood("mmio"),
    "port writes, nobody answers": Flood("write"),
    "port writes, told to a subscriber": Flood("write", heard=True),
    "serial port and debug console": Flood("talk", more=TALKS),
    "serial port and debug console, followed": Flood("talk", followed=True, more=TALKS),
    "CPUID and MSRs": Flood("cpuid"),
    "halts and timer interrupts": Flood("tick", more={"irqchip": True}),
    "interrupts of a PIT": Flood("pit", more={"irqchip": True, "pit": True}),
    "rings of a doorbell": Flood("rings", more=RINGS),
    "failures, restarted": Flood("crash", more={"restart": "on-failure"}),
    "resets": Flood("reset", mode=32, more={"on_reset": "reset"}),
}


class Innocent:
    """Another tenant's VM, whose port a task answers; `answered` counts."""

    def __init__(self) -> None:
        self.answered = 0

    async def answer(self, requests: object) -> None:
        async for request in requests:  # type: ignore[attr-defined]
            request.answer(b"\x2a")
            self.answered += 1


class Lateness:
    """How late a task that sleeps a millisecond wakes: the event loop's lateness, and the timer's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def run(self) -> None:
        while True:
            begun = time.perf_counter()
            await trio.sleep(0.001)
            self.seconds.append(time.perf_counter() - begun - 0.001)


def percentile(values: list[float], part: float) -> float:
    """The smallest value that `part` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


async def _hear(exits: object) -> None:
    async for _ in exits:  # type: ignore[attr-defined]
        pass


async def _follow(console: object) -> None:
    async for _ in console.follow():  # type: ignore[attr-defined]
        pass


@attrs.define
class Taken:
    """What was measured beside one kind of guests."""

    rates: list[float] = attrs.field(factory=list)
    late: list[float] = attrs.field(factory=list)
    stops: list[float] = attrs.field(factory=list)


async def _measure(floods: list[Flood], options: Options) -> tuple[Taken, Taken, float]:
    """Beside guests that spin, and beside these floods: they take turns. And what the flooding guests were answered."""
    spun, flooded = Taken(), Taken()
    async with (
        orc.open_fleet(tenants={"hostile": None, "innocent": None}, bus_locks="off") as fleet,
        AsyncExitStack() as stack,
    ):
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)

        async def launch(
            name: str, guest: str, tenant: str = "hostile", mode: Literal[16, 32] = 16, **more: object
        ) -> orc.Vm:
            boot = orc.FlatImage(code=floor.guest(guest), mode=mode)
            spec = orc.VmSpec(name=name, boot=boot, tenant=tenant, memory=64 * orc.KiB, **more)  # type: ignore[arg-type]
            return await fleet.launch(spec, paused=True)

        spinning = [await launch(f"spin-{n}", "spin") for n in range(GUESTS)]
        flooding = []
        for n, flood in enumerate(floods):
            vm = await launch(f"flood-{n}", flood.guest, mode=flood.mode, **flood.more)
            flooding.append(vm)
            if flood.device:
                vm.attach(Register(), ports=PORTS, mmio=MMIO)
            if flood.task:
                requests = await stack.enter_async_context(vm.requests(ports=PORTS))
                nursery.start_soon(answer_all, requests)
            if flood.heard:
                nursery.start_soon(_hear, await stack.enter_async_context(fleet.exits(vm=vm)))
            if flood.followed:
                nursery.start_soon(_follow, vm.console)
        innocent, lateness = Innocent(), Lateness()
        # Its owner knows that it does nothing else: no budget holds it, whatever it gets is what is left to it.
        victim = await launch("innocent", "read", "innocent", answer_limit=None)
        nursery.start_soon(innocent.answer, await stack.enter_async_context(victim.requests(ports=PORTS)))
        nursery.start_soon(lateness.run)
        await victim.resume()

        async def window(vms: list[orc.Vm], taken: Taken, seconds: float) -> None:
            for vm in vms:
                await vm.resume()
            other = await launch("other", "spin")
            await other.resume()
            await trio.sleep(seconds / 10)
            lateness.seconds.clear()
            before, begun = innocent.answered, time.perf_counter()
            await trio.sleep(seconds)
            taken.rates.append((innocent.answered - before) / (time.perf_counter() - begun))
            taken.late += lateness.seconds
            begun = time.perf_counter()
            await other.stop()
            taken.stops.append(time.perf_counter() - begun)
            for vm in vms:
                if vm.outcome is None:
                    await vm.pause()

        for _ in range(options.pick(WINDOWS, 1)):
            seconds = options.pick(25, 10) / 100
            await window(spinning, spun, seconds)
            await window(flooding, flooded, seconds)
        statistics = [vm.statistics() for vm in flooding]
        answered = sum(one.answers for one in statistics)
    return spun, flooded, answered


def _error(values: list[float]) -> float:
    """Of their mean: the standard error, as a part of it."""
    mean = fmean(values)
    return stdev(values) / math.sqrt(len(values)) / mean if len(values) > 1 and mean else 0.0


def judge(what: str, spun: Taken, flooded: Taken, answered: float) -> list[Row]:
    """The figures of one kind against their bounds."""
    late, got, floor_got = percentile(flooded.late, 0.99), fmean(flooded.rates), fmean(spun.rates)
    kept = got / max(floor_got, 1.0)  # nothing at all, in the one short window of --quick on a busy host
    spinning = percentile(spun.late, 0.99)
    details = {
        "late_p50_s": median(flooded.late),
        "late_p99_s": late,
        "late_most_s": max(flooded.late),
        "late_p99_beside_spinning_s": spinning,
        "kept_error": kept * math.hypot(_error(flooded.rates), _error(spun.rates)),
        "round_trips": flooded.rates,
        "round_trips_beside_spinning": spun.rates,
        "stop_s": flooded.stops,
        "stop_beside_spinning_s": spun.stops,
        "elements_answered": answered,
    }
    return [
        Row(
            what=f"{what}: the event loop's lateness",
            measured=f"{late * 1e3:.1f} ms",
            floor=f"{spinning * 1e3:.1f} ms",
            bound=f"p99 {LATE * 1e3:.0f} ms",
            ok=late <= LATE,
            note=NOTE,
            details=details,
        ),
        Row(
            what=f"{what}: another tenant's round trips",
            measured=f"{got:,.0f}/s",
            floor=f"{floor_got:,.0f}/s",
            ratio=kept,
            bound=f"{KEPT}x at least",
            ok=kept >= KEPT,
            note=NOTE,
        ),
        Row(
            what=f"{what}: stopping another VM",
            measured=f"{max(flooded.stops) * 1e3:.0f} ms",
            floor=f"{max(spun.stops) * 1e3:.0f} ms",
            bound="",
            ok=None,
            note=NOTE,
        ),
    ]


NOTE = (
    f"{GUESTS} guests of one tenant flood, with the default limits; the floor is the same beside {GUESTS} guests that "
    "only spin, taken in turns. Lateness: of a task that sleeps 1 ms. Stopping: the worst of them."
)


async def hostile(options: Options) -> list[Row]:
    """Each kind of flood by itself, and then eight kinds at once, drawn at random."""
    rows: list[Row] = []
    drawn = random.Random(SEED)
    kinds: dict[str, Callable[[], list[Flood]]] = {
        what: lambda flood=flood: [flood] * GUESTS  # type: ignore[misc]
        for what, flood in FLOODS.items()
    }
    for number in range(options.pick(3, 1)):
        kinds[f"mixed floods {number + 1}"] = lambda: drawn.choices(list(FLOODS.values()), k=GUESTS)
    for what, floods in kinds.items():
        rows += judge(what, *await _measure(floods(), options))
    return rows
