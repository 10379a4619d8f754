"""How exactly CPU time is capped, and how soon after the start of harm a ladder takes its first step."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any, Final

import trio

import orchestra as orc
from orchestra.host.observe import ThreadTimes

from .row import Options, Row

__all__ = ["cap", "react"]

SPIN: Final = bytes.fromhex("ebfe")  # jmp $
STORM: Final = bytes.fromhex("66f083063e2001ebf7")  # lock add dword [0x203e], 1 / jmp
SHARES: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
TICK: Final = 0.1


async def _capped(backend: str, share: float, seconds: float) -> float:
    """The part of a CPU that a guest got which asks for all of it."""
    times = ThreadTimes()
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(orc.VmSpec(name="spins", memory=orc.MiB, boot=orc.FlatImage(code=SPIN)))
        assert vm.guest is not None
        tid = vm.guest.vcpus[0].tid
        assert tid is not None
        vm.cap_cpu(share)
        await trio.sleep(0.2)  # what it had run before is paid back
        used, begun = times.cpu(tid), time.perf_counter()
        await trio.sleep(seconds)
        after, passed = times.cpu(tid), time.perf_counter() - begun
        assert used is not None
        assert after is not None
        return (after - used) / 1e9 / passed


async def cap(options: Options) -> list[Row]:
    """Shares of a CPU from 10 to 90 %, each over 5 s."""
    rows = []
    for backend in ("kvm", "emulated"):
        try:
            got = {share: await _capped(backend, share, options.pick(5, 1)) for share in SHARES}
        except orc.OrchestraError as error:
            rows.append(Row(what=f"CPU cap, {backend}", measured="", bound="", ok=None, note=str(error)))
            continue
        worst = max(abs(value - share) for share, value in got.items())
        rows.append(
            Row(
                what=f"CPU cap, {backend}: {', '.join(f'{share:.0%}' for share in SHARES)}",
                measured=", ".join(f"{value:.2%}" for value in got.values()),
                bound="within 2 points",
                ok=worst <= 0.02,
                note="Over 5 s, of a guest that spins. A machine that is busy with other things may not have as much "
                "as a high cap allows: a cap is the most that a vCPU gets.",
                details={"shares": {str(share): value for share, value in got.items()}, "worst": worst},
            )
        )
    return rows


async def _reaction(backend: str, rounds: int) -> list[float]:
    """Seconds from the first lock of a storm to the ladder's first step being carried out."""
    draw, took = random.Random(1), []
    async with orc.open_fleet(backend=backend, bus_locks="require", policies=[orc.Ladder(interval=TICK)]) as fleet:
        for number in range(rounds):
            name = f"storm-{number}"
            spec = orc.VmSpec(name=name, memory=orc.MiB, boot=orc.FlatImage(code=STORM))
            vm = await fleet.launch(spec, paused=True)
            await trio.sleep(TICK * (1 + draw.random()))  # anywhere between two ticks
            begun = fleet.now()
            await vm.resume()
            await trio.sleep(4 * TICK)
            took.append(
                (min(a.time for a in fleet.actions() if a.policy and a.action and a.action.vm == name) - begun) / 1e9
            )
            await vm.stop()
    return took


async def react(options: Options) -> list[Row]:
    """A guest begins to lock the bus as fast as it can: when is it warned?"""
    backend, rounds = "kvm", options.pick(40, 3)
    try:
        took = await _reaction(backend, rounds)
    except orc.OrchestraError:
        backend = "emulated"
        took = await _reaction(backend, rounds)
    found: dict[str, Any] = {"median": statistics.median(took), "most": max(took), "all": took}
    return [
        Row(
            what=f"from the start of harm to the ladder's first step, {backend}, {rounds} times",
            measured=f"median {found['median'] * 1e3:.0f} ms, at most {found['most'] * 1e3:.0f} ms",
            bound="tick + 100 ms",
            ok=found["most"] <= TICK + 0.1,
            note=f"The ladder ticks each {TICK * 1e3:.0f} ms; storms begin at random moments between two ticks.",
            details=found,
        )
    ]
