"""One host's budget over two processes: its rate, fair shares, and what the death of one of them leaves behind."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE

import attrs
import trio
import trio.lowlevel

import orchestra as orc
from orchestra.backend.emulated import library
from orchestra.native.core import monotonic_ns

from .rate import jain
from .row import Options, Row
from .sharer import BURST, KINDS, RATE, Kind, counts, greedy, rates

__all__ = ["Left", "Survived", "budget", "survive"]

SETTLE = 0.5
PATIENCE = 60.0
"""Seconds after which something hangs."""


class Sharer:
    """Another process, see `sharer`. It answers each line with one."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._received = b""

    async def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(f"{line}\n".encode())
        return await self.answer()

    async def answer(self) -> str:
        assert self._process.stdout is not None
        with trio.fail_after(PATIENCE):
            while b"\n" not in self._received:
                more = await self._process.stdout.receive_some()
                if not more:
                    raise RuntimeError("a process that shares the budget has ended")
                self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()


@asynccontextmanager
async def sharer(budget: orc.HostBudget, kind: str, what: str) -> AsyncIterator[Sharer]:
    command = [sys.executable, "-m", "benchmarks.sharer", str(budget.fd), kind, what]
    process = await trio.lowlevel.open_process(command, stdin=PIPE, stdout=PIPE, pass_fds=[budget.fd])
    try:
        made = Sharer(process)
        await made.answer()  # it is ready
        yield made
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


async def two_processes(options: Options, name: str) -> Row:
    kind, seconds = KINDS[name], options.pick(10, 1)
    with kind.create() as shared:
        async with (
            sharer(shared, name, "steady") as one,
            sharer(shared, name, "steady") as other,
            trio.open_nursery() as nursery,
        ):
            begin = monotonic_ns() / 1e9 + SETTLE
            did: list[float] = []

            async def ask(process: Sharer) -> None:
                did.extend(json.loads(await process.ask(f"{begin} {begin + seconds}")))

            nursery.start_soon(ask, one)
            nursery.start_soon(ask, other)
    got, fair = sum(did), jain(did)
    return Row(
        what=f"rate held on one budget by two processes of {len(did) // 2} greedy vCPUs each, {name}, {seconds} s",
        measured=f"{got / RATE - 1:+.3%}, Jain {fair:.4f}",
        bound="1 %, Jain 0.99",
        ok=abs(got / RATE - 1) <= 0.01 and fair >= 0.99,
        note=f"{RATE:.0f}/s, burst {BURST:.0f}: exits of KVM guests, bus locks of emulated ones. Each process counts "
        "its own rate between the same two times.",
        details={"rate": got, "jain": fair, "vcpus": did},
    )


@attrs.frozen
class Left:
    """What a process has of the host. Of threads trio keeps some for a while, which are not counted."""

    descriptors: int
    threads: int
    mappings: int

    @classmethod
    def now(cls) -> Left:
        gc.collect()
        with open("/proc/self/maps") as maps:
            mapped = sum("orchestra-budget" in line or "kvm" in line for line in maps)
        threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        ours = sum(not name.startswith("Trio thread") for name in threads)
        return cls(len(os.listdir("/proc/self/fd")), ours, mapped)

    def is_within(self, before: Left) -> bool:
        """Nothing is left that was not there before. (What was there may have gone: threads of earlier work.)"""
        return all(now <= then for now, then in zip(attrs.astuple(self), attrs.astuple(before), strict=True))


@attrs.frozen
class Survived:
    """What one process found while another was killed again and again.

    Attributes:
        slowest: the longest that its guests went without a turn after a death, in seconds.
        rate: of all its vCPUs afterwards, as a part of the budget's.
        before, after: what it had of the host.
    """

    kills: int
    slowest: float
    rate: float
    jain: float
    before: Left
    after: Left


async def survive(name: str, kills: int, seconds: float, *, rate: float = RATE, windows: int = 1) -> Survived:
    """Kill a process that shares a budget with this one, so many times, wherever it is.

    Parameters:
        name: of the kind of guests.
        seconds: to measure the rate for, afterwards.
        rate: the budget.
        windows: how often, until it is within 1 %: for a machine that has much else to do.
    """
    kind, chance, slowest = KINDS[name], random.Random(1), 0.0
    before = Left.now()
    with kind.create(rate) as shared:
        async with greedy(kind, shared) as fleet, sharer(shared, name, "restless") as other:
            for _ in range(kills):
                pid = int(await other.ask("fork"))
                await trio.sleep(chance.random() * kind.life)
                os.kill(pid, signal.SIGKILL)
                assert int(await other.ask("reap")) == signal.SIGKILL
                slowest = max(slowest, await _turn(kind, shared, rate, fleet))
            did: list[float] = []
            for _ in range(windows):
                begin = monotonic_ns() / 1e9 + SETTLE
                did = await rates(kind, fleet, begin, begin + seconds)
                if abs(sum(did) / rate - 1) <= 0.01 and jain(did) >= 0.99:
                    break
    with trio.move_on_after(PATIENCE):  # a thread of trio's may still be on its way to those that it keeps
        while not Left.now().is_within(before):  # noqa: ASYNC110
            await trio.sleep(0.01)
    return Survived(kills, slowest, sum(did) / rate, jain(did), before, Left.now())


async def _turn(kind: Kind, shared: orc.HostBudget, rate: float, fleet: orc.Fleet) -> float:
    """Set the limit, whatever the dead one left; how long it takes until each vCPU of ours had a turn."""
    kind.limit(shared, rate)
    since, before = trio.current_time(), counts(kind, fleet)
    with trio.fail_after(PATIENCE):
        # Looked at again and again: what a vCPU does within its limit is told to nobody.
        while any(now == was for now, was in zip(counts(kind, fleet), before, strict=True)):  # noqa: ASYNC110
            await trio.sleep(0.001)
    return trio.current_time() - since


async def killed(options: Options, name: str) -> Row:
    found = await survive(name, options.pick(1000, 10), options.pick(10, 1))
    clean = found.after.is_within(found.before)
    return Row(
        what=f"one of two processes on one budget killed {found.kills} times, {name}",
        measured=f"{found.rate - 1:+.3%}, Jain {found.jain:.4f}, each vCPU's turn within {found.slowest * 1e3:.0f} ms, "
        f"{'nothing' if clean else 'something'} left",
        bound="1 %, Jain 0.99, nothing left",
        ok=abs(found.rate - 1) <= 0.01 and found.jain >= 0.99 and clean,
        note=f"SIGKILL within {KINDS[name].life} s of its start, while it attaches, launches, charges, waits, changes "
        "the limit, takes it off, stops and closes. The rate is the survivor's, afterwards; what is left is "
        "descriptors, threads and mappings.",
        details=attrs.asdict(found),
    )


async def budget(options: Options) -> list[Row]:
    names = ["kvm"]
    try:
        library.load()
        names.append("emulated")
    except orc.OrchestraError:
        pass  # unicorn is an extra
    return [await measure(options, name) for measure in (two_processes, killed) for name in names]
