"""What a replay costs: 1,000 VMs of which all, or few, do something in each interval of the journal."""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from pathlib import Path

from .row import Options, Row

__all__ = ["replay"]

VMS = 1000
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
    from orchestra.journal import read_journal
    from orchestra.replay import replay
    from orchestra.rules import parse_rules

    start, cpu = time.perf_counter(), time.process_time()
    with read_journal(path) as journal:
        replay(journal, lambda: parse_rules(RULES))
    return time.perf_counter() - start, time.process_time() - cpu


def _write(path: Path, active: int, seconds: int) -> None:
    """A journal as a fleet would have written it, in one go."""
    from orchestra.journal import Journal

    empty = Journal(path)
    empty.begin(0, "benchmark", "trap-like")
    empty.end(0)
    chance = random.Random(1)
    session, begun = 1, 1_760_000_000
    connection = sqlite3.connect(path)
    with connection:
        for second in range(seconds):
            at = (begun + second) * 1_000_000_000
            rows = []
            for n in range(active):
                noisy = not n % 100 and second // 60 % 2
                locks = chance.randrange(3000, 9000) if noisy else chance.randrange(3)
                delay, work = 0.1 * chance.random(), 10 * chance.random()
                who = (f"vm-{n}", n, f"tenant-{n % 20}", 1.0, 2)
                rows.append((session, at, 1.0, *who, locks, locks + 50, 0.0, 0.5, delay, None, work, None, "{}"))
            connection.executemany(f"INSERT INTO aggregates VALUES ({','.join('?' * 17)})", rows)
            host = (session, at, 1.0, 64, 0.1, 0.0, 0.0, 10.0, 90.0, 20_000.0, None, None, None, None)
            connection.execute(f"INSERT INTO hosts VALUES ({','.join('?' * 14)})", host)
    connection.close()
