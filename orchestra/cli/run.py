"""``orchestra run``: one guest, its console on the terminal, its end as the exit status."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from ..backend import Backend, choose
from ..backend.detection import Asked
from ..fleet.open import open_fleet
from ..machine.vm import Vm, VmStatistics
from ..model.actions import Failed, Outcome, Shutdown, Stopped
from ..model.chipset import AcpiRegisters
from ..model.codec import encode
from ..model.disk import Disk
from ..model.errors import FileError, SpecError, StateError
from ..model.journalspec import JournalSpec
from ..model.spec import VmSpec
from ..output.keys import key_name
from .interrupts import until_interrupted
from .terminal import Terminal, type_from

__all__ = ["GuestRun", "parse_disk", "read_image", "run"]

PATIENCE: Final = 0.02
"""Seconds that a write of console output may take before the guest is held until it is done: it must not outrun what is
kept for us (64 KiB)."""
AT_ONCE: Final = 256
"""A descriptor that polls as writable takes so many bytes without blocking. Terminals promise the fewest: WAKEUP_CHARS
(drivers/tty/n_tty.c)."""
GRACE: Final = 10.0
"""Seconds that a guest has to power off. A Linux that has little to save takes one or two."""
LAST_WORDS: Final = 1.0
"""Seconds in which the last output must be taken, if the end was asked for. A reader that lives takes it at once."""
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


def parse_disk(text: str) -> Disk:
    """A disk as ``--disk`` names it: FILE[,ro][,direct][,base=FILE]. A file whose name has a comma needs Python.

    Raises:
        SpecError: a word is none of these.
    """
    path, *words = text.split(",")
    given: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        match name, value:
            case ("ro", ""):
                given["readonly"] = True
            case ("direct", ""):
                given["direct"] = True
            case ("base", file) if file:
                given["base"] = file
            case _:
                raise SpecError(f"--disk {text}: {word!r}: must be ro, direct or base=FILE")
    return Disk(path, **given)


@attrs.frozen(kw_only=True)
class GuestRun:
    """What to run, and for how long.

    Attributes:
        input, output: the file descriptors that the console's input comes from, and its output goes to.
        escape: the key of a terminal that ends the guest; b"": none does.
        journal: the file of the fleet's journal.
    """

    spec: VmSpec
    backend: str | Backend = "auto"
    timeout: float | None = None
    input: int = 0
    output: int = 1
    escape: bytes = b"\x1d"
    journal: str | None = None


@attrs.define
class _Seen:
    backend: str = ""
    why: str = ""
    outcome: Outcome | None = None
    statistics: VmStatistics | None = None
    registers: Any = None
    console: str = ""
    timed_out: bool = False


class _End:
    """The end that a person asks for: first the guest is to power off, and asked once more it is stopped by force."""

    def __init__(self) -> None:
        self.asked = 0
        self._vm: Vm | None = None
        self._nursery: trio.Nursery

    def come(self, vm: Vm, nursery: trio.Nursery) -> None:
        """There is a VM, and a nursery to end it in."""
        self._vm, self._nursery = vm, nursery

    def gone(self) -> None:
        """The nursery is closed."""
        self._vm = None

    def ask(self) -> bool:
        """Returns whether the guest, or a stop, ends the run. False: there is no VM yet, or it was asked before."""
        self.asked += 1
        if self._vm is None or self.asked > 1:
            return False
        if any(isinstance(device, AcpiRegisters) for device in self._vm.spec.machine_devices):
            print("orchestra: the guest is asked to power off; once more stops it at once", file=sys.stderr)
        self._nursery.start_soon(partial(self._vm.shutdown, timeout=GRACE))
        return True

    def pressed(self) -> None:
        """As a key: the second time there is nobody who would cancel."""
        if not self.ask() and self._vm is not None:
            self._nursery.start_soon(self._vm.stop, "the escape key, twice")


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
    seen, end = _Seen(), _End()
    opened = choose(plan.backend, Asked.by(plan.spec))

    async def tell() -> None:
        await _run(attrs.evolve(plan, backend=opened), seen, end, says_why=plan.backend == "auto" and not as_json)

    try:
        number = trio.run(until_interrupted, tell, end.ask)
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


async def _run(plan: GuestRun, seen: _Seen, end: _End | None = None, *, says_why: bool = False) -> None:
    end = end or _End()
    journal = None if plan.journal is None else JournalSpec(plan.journal)
    async with open_fleet(backend=plan.backend, bus_locks="auto", journal=journal) as fleet:
        seen.backend, seen.why = fleet.backend.name, fleet.backend.why
        vm = await fleet.launch(plan.spec, paused=True)
        if says_why:
            print(f"orchestra: backend {seen.why}", file=sys.stderr)
        try:
            with trio.move_on_after(plan.timeout or float("inf")) as patience:
                async with trio.open_nursery() as nursery:
                    end.come(vm, nursery)
                    nursery.start_soon(_copy_console, vm, plan.output)
                    async with trio.open_nursery() as typing:
                        typing.start_soon(_type, vm, plan, end.pressed)
                        await vm.resume()
                        seen.outcome = await vm.wait()
                        typing.cancel_scope.cancel()
                    if end.asked:
                        nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS
            seen.timed_out = patience.cancelled_caught
        finally:
            end.gone()
            seen.statistics = vm.statistics()
            seen.console = vm.console.text
            try:
                seen.registers = vm.registers()
            except StateError:
                pass  # the guest was running, or ended before its registers could be read


async def _type(vm: Vm, plan: GuestRun, pressed: Callable[[], None]) -> None:
    """Type for the guest, if a device of its takes input."""
    try:
        await vm.console.write(b"")
    except StateError:
        return
    if not os.isatty(plan.input):
        await type_from(plan.input, vm.console, None, b"", pressed)
        return
    terminal = Terminal(plan.input)
    how = f"; {key_name(plan.escape)} ends it, pressed twice at once" if plan.escape else ""
    with terminal.raw():
        async with trio.open_nursery() as nursery:
            await nursery.start(terminal.follow, vm.console.resize)
            print(f"orchestra: what you type goes to the guest{how}", file=sys.stderr, flush=True)
            await type_from(plan.input, vm.console, terminal, plan.escape, pressed)
            nursery.cancel_scope.cancel()


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
        case Stopped(reason=reason) if reason.startswith("did not power off"):
            lines.append(f"the guest {reason}: it was stopped by force")
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
