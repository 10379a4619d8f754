"""The peer of Linux guests: Debian's QEMU on the same KVM, a process for each VM."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

__all__ = ["MACHINES", "PROGRAM", "Qemu", "cpu", "disk", "qemu", "version"]

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


def cpu(pid: int) -> float:
    """CPU seconds of all threads of a process, ended ones included, without the time that they ran guest code.

    The guest's time is the guest's, not of the program that runs it: the rest is the VMM's, and the kernel's for it.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, kernel, guest = (int(fields[number - 3]) for number in (14, 15, 43))  # proc(5): numbers from 1
    return (user + kernel - guest) / TICKS


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
