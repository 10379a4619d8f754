"""``orchestra run``: one guest, its console on the terminal, its end as the exit status."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from ..backend import Backend, choose
from ..backend.detection import Asked
from ..fleet.open import open_fleet
from ..machine.vm import Vm, VmStatistics
from ..model.actions import Failed, Outcome, Shutdown
from ..model.codec import encode
from ..model.errors import FileError, SpecError, StateError
from ..model.spec import VmSpec
from .interrupts import until_interrupted

__all__ = ["GuestRun", "read_image", "run"]

PATIENCE: Final = 0.02
"""Seconds that a write of console output may take before the guest is held until it is done: it must not outrun what is
kept for us (64 KiB)."""
AT_ONCE: Final = 256
"""A descriptor that polls as writable takes so many bytes without blocking. Terminals promise the fewest: WAKEUP_CHARS
(drivers/tty/n_tty.c)."""
TIMED_OUT: Final = 124
PIECE: Final = 1 << 20
MOST_CODE: Final = 1 << 30


def read_image(path: Path, memory: int, load: int) -> bytes:
    """The file's bytes, if they fit between `load` and the end of `memory`.

    Raises:
        SpecError: `load` is beyond the memory.
        FileError: it can't be read, is empty or larger.
    """
    room = memory - load
    if room <= 0:
        raise SpecError(f"--load {load:#x}: must be below --memory {memory:#x}")
    code = bytearray()
    try:
        with path.open("rb") as file:
            # In pieces, and no more than fits: the file may be a device without an end.
            while len(code) <= min(room, MOST_CODE) and (piece := file.read(PIECE)):
                code += piece
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    if not code:
        raise FileError(f"{path}: is empty; it must hold the guest's code")
    if len(code) > room:
        raise FileError(f"{path}: is larger than the {room:#x} bytes of memory above --load; give it more --memory")
    if len(code) > MOST_CODE:
        raise FileError(f"{path}: is larger than {MOST_CODE >> 20} MiB, which no flat image should be")
    return bytes(code)


@attrs.frozen(kw_only=True)
class GuestRun:
    """What to run, and for how long. `output`: the file descriptor that the console goes to."""

    spec: VmSpec
    backend: str | Backend = "auto"
    timeout: float | None = None
    output: int = 1


@attrs.define
class _Seen:
    backend: str = ""
    why: str = ""
    outcome: Outcome | None = None
    statistics: VmStatistics | None = None
    registers: Any = None
    console: str = ""
    timed_out: bool = False


def run(plan: GuestRun, *, as_json: bool) -> int:
    """Run the guest until it ends, the timeout passes or Ctrl-C is pressed. Returns the exit status.

    Raises:
        OrchestraError: the guest could not be started.
    """
    if plan.backend == "scripted":
        raise SpecError(
            "--backend scripted: plays a list of exits and runs no guest: use auto, kvm or emulated "
            "(ScriptedBackend is for tests of Python programs; `orchestra demo --backend scripted` needs no guest)"
        )
    seen = _Seen()
    opened = choose(plan.backend, Asked.by(plan.spec))

    async def tell() -> None:
        await _run(attrs.evolve(plan, backend=opened), seen, says_why=plan.backend == "auto" and not as_json)

    try:
        number = trio.run(until_interrupted, tell)
    finally:
        if opened is not plan.backend:
            opened.close()
    if as_json:
        print(json.dumps(_document(seen, number)))
    for line in _complaints(seen, plan):
        print(f"orchestra: {line}", file=sys.stderr)
    if number:
        return 128 + number
    return TIMED_OUT if seen.timed_out else status(seen.outcome)


def status(outcome: Outcome | None) -> int:
    """The exit status for the shell."""
    match outcome:
        case Failed() | None:
            return 1
        case Shutdown(code=None, reason=reason):
            return 1 if reason == "triple fault" else 0
        case Shutdown(code=int(code)):
            return code & 0xFF
    return 0


async def _run(plan: GuestRun, seen: _Seen, *, says_why: bool = False) -> None:
    async with open_fleet(backend=plan.backend, bus_locks="auto") as fleet:
        seen.backend, seen.why = fleet.backend.name, fleet.backend.why
        vm = await fleet.launch(plan.spec, paused=True)
        if says_why:
            print(f"orchestra: backend {seen.why}", file=sys.stderr)
        try:
            with trio.move_on_after(plan.timeout or float("inf")) as patience:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_copy_console, vm, plan.output)
                    await vm.resume()
                    seen.outcome = await vm.wait()
            seen.timed_out = patience.cancelled_caught
        finally:
            seen.statistics = vm.statistics()
            seen.console = vm.console.text
            try:
                seen.registers = vm.registers()
            except StateError:
                pass  # the guest was running, or ended before its registers could be read


async def _copy_console(vm: Vm, output: int) -> None:
    """Write console output as it comes. While the reader takes none, the guest is held, and Ctrl-C still works."""
    async with aclosing(vm.console.follow()) as chunks:
        async for chunk in chunks:
            if _taken_at_once(output, chunk):
                continue
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_write, output, chunk, nursery.cancel_scope)
                await trio.sleep(PATIENCE)
                await _unless_ended(vm.pause)
            await _unless_ended(vm.resume)


def _taken_at_once(output: int, data: bytes) -> bool:
    """Write the bytes if the write is certain not to block."""
    if len(data) > AT_ONCE:
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(events & select.POLLOUT for _, events in poll.poll(0)):
        return False
    return os.write(output, data) == len(data)


async def _write(output: int, data: bytes, done: trio.CancelScope) -> None:
    left = memoryview(data)
    while left:
        left = left[await trio.to_thread.run_sync(os.write, output, left, abandon_on_cancel=True) :]
    done.cancel()


async def _unless_ended(change: Callable[[], Awaitable[None]]) -> None:
    try:
        await change()
    except StateError:
        await trio.lowlevel.checkpoint()


def _complaints(seen: _Seen, plan: GuestRun) -> list[str]:
    lines = []
    match seen.outcome:
        case Failed(reason=reason, registers=registers, vcpu=vcpu):
            lines.append(f"the guest failed: {'' if vcpu is None else f'vCPU {vcpu}: '}{reason}")
            cells = [f"{name}={value:#x}" for name, value in registers.items()]
            lines += ["  " + " ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
        case Shutdown(code=None, reason="triple fault"):
            rip = "" if seen.registers is None else f" at rip={seen.registers.rip:#x}"
            lines.append(f"the guest ended with a triple fault{rip}: an exception that it has no handler for")
    if seen.timed_out:
        lines.append(f"the guest was stopped after {plan.timeout:g} s")
    return lines


def _document(seen: _Seen, number: int) -> dict[str, Any]:
    told: dict[str, Any] | None = encode(seen.statistics)
    if told is not None:
        del told["outcome"]  # it is beside them
    return {
        "backend": seen.backend,
        "why": seen.why,
        "outcome": encode(seen.outcome),
        "timed_out": seen.timed_out,
        "interrupted": bool(number),
        "console": seen.console,
        "statistics": told,
    }
