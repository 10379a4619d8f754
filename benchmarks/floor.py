"""Compiles and runs the floor, floor.c."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import trio

__all__ = ["compile_c", "exits", "exits_inside", "guest", "launch", "ping_pong", "ping_task"]

HERE = Path(__file__).parent


def compile_c(source: str, to: Path, *flags: str) -> Path:
    """Compile one of the C files here with ``cc -O2``, or what CC says.

    Raises:
        SystemExit: there is no compiler, or it fails; the message is on standard error then.
    """
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        print(f"{compiler}: not found; the floor is a C program: install a compiler or name one in CC", file=sys.stderr)
        raise SystemExit(2)
    command = [compiler, "-O2", "-Wall", "-Wextra", *flags, "-o", str(to), str(HERE / source), "-lpthread", "-ldl"]
    if subprocess.run(command).returncode:
        print(f"{' '.join(command)} failed", file=sys.stderr)
        raise SystemExit(2)
    return to


def guest(name: str) -> bytes:
    """The bytes of guests/NAME.asm."""
    return (HERE / "guests" / f"{name}.bin").read_bytes()


async def _run(floor: Path, what: str, name: str, amount: float, bus_locks: bool) -> list[int]:
    image = HERE / "guests" / f"{name}.bin"
    command = [str(floor), what, str(image), str(amount), str(int(bus_locks))]
    done = await trio.run_process(command, capture_stdout=True)
    return [int(word) for word in done.stdout.split()]


async def exits(floor: Path, name: str, seconds: float, bus_locks: bool = False) -> tuple[float, float]:
    """Nanoseconds for each exit of that guest in a bare KVM_RUN loop: of CPU time, and by the clock."""
    count, cpu, wall = await _run(floor, "exits", name, seconds, bus_locks)
    return cpu / count, wall / count


async def exits_inside(library: Path, name: str, seconds: float, bus_locks: bool = False) -> tuple[float, float]:
    """As `exits`, by the same loop on a thread of this process; `library`: floor.c compiled as one."""
    out, run = (ctypes.c_uint64 * 3)(), ctypes.CDLL(str(library)).floor_exits
    image = os.fsencode(HERE / "guests" / f"{name}.bin")
    # ctypes gives up the interpreter lock for the call.
    await trio.to_thread.run_sync(lambda: run(image, ctypes.c_double(seconds), int(bus_locks), out))
    count, cpu, wall = out
    return cpu / count, wall / count


async def ping_pong(library: Path, seconds: float) -> float:
    """Nanoseconds from one C thread to another and back, by an eventfd in an epoll and a futex."""
    ping = ctypes.CDLL(str(library)).floor_ping_pong
    ping.restype = ctypes.c_double
    return float(await trio.to_thread.run_sync(ping, ctypes.c_double(seconds)))


async def ping_task(library: Path, seconds: float) -> float:
    """As `ping_pong`, but it is a trio task that waits for the eventfd; it does nothing else."""
    ping = ctypes.CDLL(str(library)).floor_pings
    ping.restype = ctypes.c_double
    pong = ctypes.PyDLL(str(library)).floor_pong  # keeps the interpreter lock, as the core's calls do
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    async def answer() -> None:
        while True:
            await trio.lowlevel.wait_readable(fd)
            pong(fd)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            each = float(await trio.to_thread.run_sync(ping, fd, ctypes.c_double(seconds)))
            nursery.cancel_scope.cancel()
    finally:
        os.close(fd)
    return each


async def launch(floor: Path, name: str, vms: int, bus_locks: bool = False) -> tuple[float, float]:
    """Seconds from nothing to the first exit of all of so many one-vCPU VMs: by the clock, and of CPU time."""
    wall, cpu = await _run(floor, "launch", name, vms, bus_locks)
    return wall / 1e9, cpu / 1e9
