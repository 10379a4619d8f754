"""Linux from launch to the guest's init, beside QEMU: the first VM of a program, and each further one of its fleet."""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import attrs
import trio

import orchestra as orc

from .linux import Files, made, peer, skipped
from .qemu import MACHINES, Spent
from .row import Options, Row

__all__ = ["linux_boot"]

Taken = tuple[float, float]  # seconds, CPU seconds without the guest's
CLEARED = 4 * orc.GiB
"""At most; a boot takes about 110 MiB."""
NOTE = (
    "From launch to the guest's init, one vCPU and 256 MiB, the same kernel, initrd and command line, in turns. Ours "
    "in a fresh process each round; Python's own start and import are before it. QEMU: from the start of its process. "
    "CPU without what the guest's code took (guest_time), of all threads, and the kernel's for them. Each was booted "
    "once before, and the host's free memory is cleared before each process."
)


def clear_memory(options: Options) -> None:
    """Have the host clear its free memory, before what is measured and not in it.

    An emulated host translates the code of a guest, and drops that when the memory it lies in is written again: a guest
    that gets the memory of one before it waits more than a second for this.
    """
    if options.quick:  # which says nothing about speed
        return
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, min(free * 19 // 20, CLEARED), flags=flags).close()


def installed(build: Path) -> dict[str, str]:
    """The environment of a process that finds its modules compiled, as an installation leaves them: it keeps them."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(build / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


async def ours(files: Files, vms: int, environment: dict[str, str]) -> list[Taken]:
    command = [sys.executable, "-m", "benchmarks.booted", str(files.kernel), str(files.bare), str(vms)]
    done = await trio.run_process(command, capture_stdout=True, env=environment)
    return [(seconds, used) for seconds, used in json.loads(done.stdout)]


async def theirs(files: Files, machine: str) -> Taken:
    begun, host = time.perf_counter(), Spent.by(os.getpid())
    before = attrs.evolve(host, total=0.0, guest=0.0)  # of a process that is not there yet
    async with peer(files, machine) as guest:
        await guest.wait_for(b"init\r\n")
        return time.perf_counter() - begun, Spent.by(guest.pid).since(before)


async def linux_boot(options: Options) -> list[Row]:
    """A bound each on the first VM's time, its CPU time, and the further ones' time."""
    if skipped("linux-boot", peer=True):
        return []
    files = made(options.build)
    first: list[Taken] = []
    further: list[Taken] = []
    others: dict[str, list[Taken]] = {"microvm": []} if options.quick else {machine: [] for machine in MACHINES}
    environment = installed(options.build)
    if not options.quick:
        await ours(files, 1, environment)
        for machine in others:
            await theirs(files, machine)
    for _ in range(options.pick(3, 1)):
        for machine, taken in others.items():
            clear_memory(options)
            taken.append(await theirs(files, machine))
        clear_memory(options)
        one, *rest = await ours(files, options.pick(3, 2), environment)
        first.append(one)
        further += rest
    rows = []
    for machine, taken in others.items():
        bounded = machine == "microvm"
        rows += [
            _row(f"first Linux VM, {machine}", first, taken, 0, 0.9 if bounded else None),
            _row(f"first Linux VM, CPU of the VMM, {machine}", first, taken, 1, 0.8 if bounded else None),
            _row(f"each further Linux VM, {machine}", further, taken, 0, 0.7 if bounded else None),
            _row(f"each further Linux VM, CPU of the VMM, {machine}", further, taken, 1, 0.7 if bounded else None),
        ]
    return rows


def _row(what: str, mine: Sequence[Taken], other: Sequence[Taken], column: int, bound: float | None) -> Row:
    measured, against = (median(taken[column] for taken in column_of) for column_of in (mine, other))
    ratio = measured / against
    return Row(
        what=what,
        measured=f"{measured:.2f} s",
        floor=f"{against:.2f} s",
        ratio=ratio,
        bound="" if bound is None else f"{bound}x",
        ok=None if bound is None else ratio <= bound,
        note=NOTE,
        details={"seconds_and_cpu": list(mine), "peer_seconds_and_cpu": list(other)},
    )
