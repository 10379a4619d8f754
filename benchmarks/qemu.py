"""The peer of Linux guests: Debian's QEMU on the same KVM, a process for each VM."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

__all__ = ["MACHINES", "PROGRAM", "Qemu", "Spent", "disk", "qemu", "version"]

PROGRAM = "qemu-system-x86_64"
MACHINES: dict[str, tuple[str, ...]] = {
    # Without an RTC, Linux asks the clock that isn't there 20,000 times: the fastest of its settings that we found.
    "microvm": ("-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on"),
    "q35": ("-M", "q35"),
}
TICKS = os.sysconf("SC_CLK_TCK")


def version() -> str:
    """Its first line; "not installed" without it."""
    if shutil.which(PROGRAM) is None:
        return "not installed"
    return subprocess.run([PROGRAM, "--version"], capture_output=True, text=True).stdout.split("\n")[0]


@attrs.frozen
class Spent:
    """CPU seconds of a process until now, and what tells how far its guest's may be trusted.

    The time in guest code is the guest's: what is left is the VMM's, and the kernel's for it. Linux counts the guest's
    by ticks and the sum by the clock, unless it was started to count both by the clock. On a slow host ticks
    are lost. So the guest's are scaled by the part of all busy time on the host that ticks were counted for.

    Attributes:
        total: user and kernel time of all its threads, those that have ended included.
        guest: by ticks.
        ticked: busy time of all CPUs, by ticks.
        busy: the same by the clock.
    """

    total: float
    guest: float
    ticked: float
    busy: float

    @staticmethod
    def by(pid: int) -> Spent:
        """Of that process, until now."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user, kernel, guest = (int(fields[number - 3]) / TICKS for number in (14, 15, 43))  # proc(5): numbers from 1
        cpus = [int(word) / TICKS for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        idle = cpus[3] + cpus[4]  # waiting for I/O included; the guests' are in `user`
        passed = time.clock_gettime(time.CLOCK_BOOTTIME) * (os.cpu_count() or 1)
        return Spent(user + kernel, guest, sum(cpus) - idle, passed - idle)

    def since(self, before: Spent) -> float:
        """Seconds without the guest's."""
        part = (self.ticked - before.ticked) / max(self.busy - before.busy, 1 / TICKS)
        guest = (self.guest - before.guest) / min(max(part, 0.1), 1.0)
        return max(self.total - before.total - guest, 0.0)


def disk(name: str, path: Path, cache: str, bus: str) -> tuple[str, ...]:
    """Options for a disk with an I/O thread of its own; `bus`: "device" (virtio-mmio) or "pci"."""
    drive = f"file={path},format=raw,if=none,id={name},cache={cache},aio=io_uring,file.locking=off"
    return (
        *("-object", f"iothread,id=thread-{name}", "-drive", drive),
        *("-device", f"virtio-blk-{bus},drive={name},iothread=thread-{name}"),
    )


class Qemu:
    """A running VM. `console` is what it wrote to its serial port."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.console = b""
        self._searched = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait_for(self, pattern: bytes) -> bytes:
        """What it wrote after what was waited for last, up to this.

        Raises:
            RuntimeError: it ended before.
        """
        assert self.process.stdout is not None
        while (found := self.console.find(pattern, self._searched)) < 0:
            more = await self.process.stdout.receive_some()
            if not more:
                raise RuntimeError(f"QEMU ended: {self.console[-500:].decode(errors='replace')}")
            self.console += bytes(more)
        begin, self._searched = self._searched, found + len(pattern)
        return self.console[begin : self._searched]

    async def write(self, text: bytes) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(text)


@asynccontextmanager
async def qemu(
    kernel: Path, initrd: Path, cmdline: str, machine: str, more: Sequence[str] = (), vcpus: int = 1
) -> AsyncIterator[Qemu]:
    """A VM of 256 MiB with a serial port and nothing that was not asked for."""
    command = [
        *(PROGRAM, "-accel", "kvm", "-cpu", "host", "-m", "256", "-smp", str(vcpus), *MACHINES[machine]),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline, *more),
    ]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Qemu(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                await trio.aclose_forcefully(stream)
