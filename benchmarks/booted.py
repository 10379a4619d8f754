"""``python -m benchmarks.booted KERNEL INITRD N``: boots Linux VMs, one after the other, in a fresh process.

Prints a JSON array of [seconds, CPU seconds without the guest's] from each launch to the guest's init.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import trio

import orchestra as orc

from .linux import BOOTED, Files, spec
from .qemu import cpu

__all__ = ["boot"]


async def boot(kernel: Path, initrd: Path, vms: int) -> list[tuple[float, float]]:
    """Each VM of a fleet goes on when the next one is launched, and has nothing to do."""
    files = Files(kernel, initrd, initrd)
    taken = []
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        for n in range(vms):
            begun, before = time.perf_counter(), cpu(os.getpid())
            vm = await fleet.launch(spec(f"linux-{n}", files))
            await vm.console.wait_for("init\r\n", timeout=BOOTED)
            taken.append((time.perf_counter() - begun, cpu(os.getpid()) - before))
    return taken


if __name__ == "__main__":
    print(json.dumps(trio.run(boot, Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
