"""Linux from launch to the guest's init, beside QEMU: the first VM of a program, and each further one of its fleet."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from statistics import median

import trio

from .linux import Files, made, peer, skipped
from .qemu import MACHINES, cpu
from .row import Options, Row

__all__ = ["linux_boot"]

Taken = tuple[float, float]  # seconds, CPU seconds without the guest's
NOTE = (
    "From launch to the guest's init, one vCPU and 256 MiB, the same kernel, initrd and command line, in turns. Ours "
    "in a fresh process each round; Python's own start and import are before it. QEMU: from the start of its process. "
    "CPU without what the guest's code took (guest_time), of all threads, and the kernel's for them."
)


async def ours(files: Files, vms: int) -> list[Taken]:
    command = [sys.executable, "-m", "benchmarks.booted", str(files.kernel), str(files.bare), str(vms)]
    done = await trio.run_process(command, capture_stdout=True)
    return [(seconds, used) for seconds, used in json.loads(done.stdout)]


async def theirs(files: Files, machine: str) -> Taken:
    begun = time.perf_counter()
    async with peer(files, machine) as guest:
        await guest.wait_for(b"init\r\n")
        return time.perf_counter() - begun, cpu(guest.pid)


async def linux_boot(options: Options) -> list[Row]:
    """A bound each on the first VM's time, its CPU time, and the further ones' time."""
    if skipped("linux-boot", peer=True):
        return []
    files = made(options.build)
    first: list[Taken] = []
    further: list[Taken] = []
    others: dict[str, list[Taken]] = {"microvm": []} if options.quick else {machine: [] for machine in MACHINES}
    for _ in range(options.pick(3, 1)):
        for machine, taken in others.items():
            taken.append(await theirs(files, machine))
        one, *rest = await ours(files, options.pick(3, 2))
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
