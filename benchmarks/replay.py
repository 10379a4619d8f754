"""What a replay costs: 1,000 VMs of which all, or few, do something in each interval of the journal."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import orchestra as orc
from orchestra.policy.facts import Facts, HostFacts, VmFacts

from .row import Options, Row

__all__ = ["replay"]

VMS = 1000
WAITING = 50_000
"""Rows that wait to be written at most: it drops them from 200,000 on."""
RULES = """
[[policies]]
kind = "weighted-share"
limit = 3000
interval = 1.0

[[policies]]
kind = "ladder"
interval = 1.0
"""


async def replay(options: Options) -> list[Row]:
    """One VM in a hundred locks by the thousand, every other minute."""
    rows = []
    for active in (VMS, VMS // 20):
        seconds = options.pick(600, 20)
        with tempfile.TemporaryDirectory(dir=options.build) as folder:
            path = Path(folder) / "fleet.db"
            _write(path, active, seconds)
            took, cpu = _replay(path)
        each = cpu / seconds / active
        rows.append(
            Row(
                what=f"replay: {VMS} VMs, {active} of them active",
                measured=f"{each * 1e6:.1f} us for each active VM and interval",
                bound="20 us",
                ok=each <= 20e-6,
                note=f"CPU time, with two policies. A day at an interval of 1 s: {cpu / seconds * 1440:.1f} min",
                details={
                    "seconds": took,
                    "cpu_seconds": cpu,
                    "intervals": seconds,
                    "day_seconds": cpu / seconds * 86400,
                },
            )
        )
    return rows


def _replay(path: Path) -> tuple[float, float]:
    from orchestra.config import parse_rules
    from orchestra.journal import read_journal
    from orchestra.replay import replay

    start, cpu = time.perf_counter(), time.process_time()
    with read_journal(path) as journal:
        replay(journal, lambda: parse_rules(RULES))
    return time.perf_counter() - start, time.process_time() - cpu


def _write(path: Path, active: int, seconds: int) -> None:
    """A journal as a fleet would have written it, as fast as it takes it."""
    from orchestra.journal import Journal

    journal, chance = Journal(path), random.Random(1)
    journal.begin(0, "benchmark", "trap-like")
    for second in range(1, seconds + 1):
        vms = {}
        for n in range(active):
            noisy = not n % 100 and second // 60 % 2
            locks = chance.randrange(3000, 9000) if noisy else chance.randrange(3)
            name, delay, work = f"vm-{n}", 0.1 * chance.random(), 10 * chance.random()
            who = (name, f"tenant-{n % 20}", 1.0, 2)
            vms[name] = VmFacts(*who, locks, locks + 50, 0.0, generation=n, cpu=0.5, run_delay=delay, work=work)
        host = HostFacts(64, 0.1, 0.0, 0.0, lock_ns=10.0, memory_ns=90.0)
        journal.aggregate(Facts(second * 10**9, 1.0, orc.Limit(rate=20_000), None, {}, vms, host))
        while journal.statistics().waiting > WAITING:
            time.sleep(0.01)
    journal.end(seconds * 10**9)
    assert not journal.statistics().dropped
