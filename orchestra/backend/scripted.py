"""Guests that are a timed list of exits, without threads and without KVM: for tests of code that reacts to exits.

Exits are accounted by the same C core as real ones, so counters, budgets, statistics and subscriptions are the real
ones too. Time is trio's, so a test under `trio.testing.MockClock(autojump_threshold=0)` runs hours in milliseconds.

    script = [bus_lock(after=0.001)] * 1000 + [hlt()]
    async with open_fleet(backend=ScriptedBackend({"noisy": script}), limit=Limit(rate=100)) as fleet: ...
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import attrs
import trio

from ..model.devices import unwired
from ..model.errors import SpecError
from ..model.spec import VmSpec
from ..native import ffi, lib
from ..native.core import NEVER, REASON_NUMBERS, Command, VcpuCore
from ..native.records import BUS_LOCK, Fields, build, unpack
from . import Detection, RunResult
from .entry import EntryState
from .memory import GuestMemory
from .registers import Registers

__all__ = [
    "ScriptedBackend",
    "ScriptedExit",
    "bus_lock",
    "failed_run",
    "hlt",
    "io_read",
    "io_write",
    "mmio_read",
    "mmio_write",
    "triple_fault",
]

ARGUMENTS: Final = 5
ACCESS_ARGUMENTS: Final[Mapping[str | int, int]] = {"io": 4, "mmio": 3}
ACCESS_BYTES: Final = 4096


@attrs.frozen
class ScriptedExit:
    """One exit of a script.

    Attributes:
        reason: the kernel's name in lower case ("io", "hlt", "x86_bus_lock", ...) or any number.
        after: seconds that the guest runs before this exit, without the time in which it is throttled.
        flags: KVM_RUN_X86_*: 1 SMM, 2 bus lock, 4 guest mode.
        rip: the RIP of the sample.
        args, data: as `describe` in native/kvm.c fills them for the reason.
        errno: not 0: KVM_RUN fails with this error, and `flags` are left from an earlier run.

    Raises:
        SpecError: no guest could make this exit.
    """

    reason: str | int
    after: float = 0.0
    flags: int = 0
    rip: int | None = None
    args: tuple[int, ...] = ()
    data: bytes = b""
    errno: int = 0

    def __attrs_post_init__(self) -> None:
        reason, args, data = self.reason, self.args, self.data
        known = reason in REASON_NUMBERS if isinstance(reason, str) else isinstance(reason, int) and reason >> 16 == 0
        if not known:
            names = ", ".join(REASON_NUMBERS)
            raise SpecError(f"reason={reason!r}: must be a number from 0 to 65535 or one of {names}")
        if not 0 <= self.after < math.inf:
            raise SpecError(f"after={self.after!r}: must be seconds, at least 0 and finite")
        if len(args) > ARGUMENTS:
            raise SpecError(f"args={args!r}: a record has {ARGUMENTS} at most")
        if reason in ACCESS_ARGUMENTS and not self.errno:
            if len(args) != ACCESS_ARGUMENTS[reason]:
                what = "(port, size, count, write)" if reason == "io" else "(address, size, write)"
                raise SpecError(f"args={args!r}: {reason!r} takes {what}")
            size, count, write = args[1], args[2] if reason == "io" else 1, args[-1]
            sizes = (1, 2, 4, 8) if reason == "io" else range(1, 9)
            if size not in sizes or not 1 <= count <= ACCESS_BYTES // size or write not in (0, 1):
                raise SpecError(
                    f"args={args!r}: an access has a size of 1, 2, 4 or 8 bytes (mmio: 1 to 8, as KVM makes two of one "
                    f"over a page's end), up to {ACCESS_BYTES} bytes in all, and is a write (1) or a read (0)"
                )
            if len(data) != (size * count if write else 0):
                raise SpecError(f"data={data!r}: a write has size * count bytes of data, a read none")


Script: TypeAlias = Iterable[ScriptedExit]
Scripts: TypeAlias = Mapping[str, Script] | Callable[[VmSpec, int], Script]


def bus_lock(after: float = 0.0, rip: int | None = None) -> ScriptedExit:
    """A bus lock without any other exit at the same time."""
    return ScriptedExit("x86_bus_lock", after, BUS_LOCK, rip)


def io_write(port: int, data: bytes, after: float = 0.0, flags: int = 0) -> ScriptedExit:
    """OUT of 1, 2 or 4 bytes."""
    return ScriptedExit("io", after, flags, args=(port, len(data), 1, 1), data=data)


def io_read(port: int, size: int = 1, after: float = 0.0, flags: int = 0) -> ScriptedExit:
    """IN; the answer lands in `ScriptedEngine.answers`."""
    return ScriptedExit("io", after, flags, args=(port, size, 1, 0))


def mmio_write(address: int, data: bytes, after: float = 0.0, flags: int = 0) -> ScriptedExit:
    return ScriptedExit("mmio", after, flags, args=(address, len(data), 1), data=data)


def mmio_read(address: int, size: int, after: float = 0.0, flags: int = 0) -> ScriptedExit:
    return ScriptedExit("mmio", after, flags, args=(address, size, 0))


def hlt(after: float = 0.0) -> ScriptedExit:
    return ScriptedExit("hlt", after)


def triple_fault(after: float = 0.0) -> ScriptedExit:
    return ScriptedExit("shutdown", after)


def failed_run(errno: int, after: float = 0.0, flags: int = 0, reason: str | int = "unknown") -> ScriptedExit:
    """KVM_RUN fails with `errno`."""
    return ScriptedExit(reason, after, flags, errno=errno)


class ScriptedEngine:
    """One vCPU that plays a script. At the script's end it halts.

    Attributes:
        answers: what reads were answered, in order: (address, bytes).
    """

    threaded = False

    def __init__(
        self, core: VcpuCore, script: Script, backend: ScriptedBackend, state: EntryState, bus_locks: bool
    ) -> None:
        self.core = core
        self.answers: list[tuple[int, bytes]] = []
        self.access: Any = lib.orc_vcpu_access(core.handle)
        self._data = ffi.new("uint8_t[]", ACCESS_BYTES)
        self._script: Iterator[ScriptedExit] = iter(script)
        self._next: ScriptedExit | None = None
        self._left = 0.0
        self._backend = backend
        self._bus_locks = bus_locks
        self._kicked = trio.Event()
        self._record: Any = build("hlt")
        self._errno = 0
        self._read: tuple[int, int] | None = None
        self._registers = state.registers

    async def run(self) -> RunResult:
        await trio.lowlevel.checkpoint()
        handle, backend = self.core.handle, self._backend
        if self.access.count:  # elements that were answered since the last return
            lib.orc_vcpu_answered(handle, self.access.count, backend.now())
        while True:
            # Taken before the commands are read: a kick in between sets this event, so that no wait below misses it.
            kicked = self._kicked
            commands = self.core.commands()
            if lib.orc_access_next(handle):
                if commands & Command.STOP:
                    lib.orc_access_abandon(handle)
                    continue
                turn = lib.orc_vcpu_turn(handle)
                # Other commands come when all of it is answered, as in orc_access_resume.
                if commands or turn == NEVER or await self._wait_turn(turn, kicked):
                    return RunResult(lib.orc_access_up(handle))
                self.access.count = 0  # nobody was asked: the claim may have changed by now
                continue
            self._finish_read()
            if commands:
                return RunResult.COMMAND
            if (turn := lib.orc_vcpu_turn(handle)) != NEVER and not await self._wait_turn(turn, kicked):
                continue
            if self._next is None:
                self._next = next(self._script, ScriptedExit("hlt"))
                self._left = self._next.after
            if self._left > 0:
                begun = trio.current_time()
                with trio.move_on_after(self._left):
                    await kicked.wait()
                # A command interrupts the guest's time and does not shorten it: the rest is waited for at the next
                # entry.
                self._left -= trio.current_time() - begun
                if kicked.is_set() and self._left > 0:
                    continue
            step, self._next = self._next, None
            flags = step.flags
            if step.errno:
                self._errno = step.errno
                if step.errno != errno.EFAULT or step.reason != "memory_fault":
                    return RunResult.ERROR
                flags = 0  # the one failure that says more (api.rst, KVM_EXIT_MEMORY_FAULT); its flags are stale too
            if not self._bus_locks:  # what the host can't see does not exit, and sets no flag
                if step.reason == "x86_bus_lock":
                    await trio.lowlevel.checkpoint()  # an endless script of them can still be cancelled
                    continue
                flags &= ~BUS_LOCK
            self._record = build(step.reason, flags=flags, rip=step.rip, args=step.args, data=step.data)
            if step.reason == "io":
                lib.orc_vcpu_weigh(handle, step.args[2])
            lib.orc_vcpu_account(handle, self._record, backend.now())
            if step.reason not in ACCESS_ARGUMENTS or step.errno:
                return RunResult.EXIT
            if (why := self._access(step)) != RunResult.ANSWERED:
                return why
            await trio.lowlevel.checkpoint()  # an endless script of them can still be cancelled

    async def _wait_turn(self, turn: int, kicked: trio.Event) -> bool:
        handle, backend = self.core.handle, self._backend
        lib.orc_vcpu_wait_begin(handle, backend.now())
        served = False
        try:
            with trio.move_on_after(max(0, turn - backend.now()) / 1e9):
                await kicked.wait()
            # The limit, and the turn with it, may have changed by now. The clock is a float: a rest below its
            # resolution counts as waited.
            turn = lib.orc_vcpu_turn(handle)
            served = bool(turn <= backend.now() + 1000)
        finally:
            lib.orc_vcpu_wait_end(handle, max(backend.now(), turn) if served else backend.now(), served)
        return served

    def _access(self, step: ScriptedExit) -> RunResult:
        """Make the access. `RunResult.ANSWERED`: the core has answered it."""
        address, size, *rest = step.args
        count, write = rest if step.reason == "io" else (1, *rest)
        ffi.memmove(self._data, step.data, len(step.data))
        self._read = None if write else (address, size * count)
        bus = RunResult.IO if step.reason == "io" else RunResult.MMIO
        return RunResult(lib.orc_access_begin(self.core.handle, bus, address, size, count, bool(write), self._data))

    def _finish_read(self) -> None:
        if self._read is not None:
            address, size = self._read
            self.answers.append((address, bytes(ffi.buffer(self._data, size))))
            self._read = None

    async def sleep(self, seen: int) -> None:
        await trio.lowlevel.checkpoint()
        while self.core.wakes() == seen:
            kicked = self._kicked
            await kicked.wait()

    def attach(self) -> None:
        """Nothing: there is no thread."""

    def detach(self) -> None:
        """Nothing: there is no thread."""

    def kick(self) -> None:
        # A new event for the next wait, as an event stays set.
        self._kicked.set()
        self._kicked = trio.Event()

    def wake(self) -> None:
        if self.core.wake():
            self.kick()

    def resumed(self) -> None:
        """Nothing: a script has no clock."""

    def last_exit(self) -> Fields:
        return unpack(self._record)

    def error(self) -> str:
        return f"KVM_RUN failed: {errno.errorcode.get(self._errno, self._errno)} ({os.strerror(self._errno)})"

    def registers(self) -> Registers:
        """The registers at entry: a script changes none."""
        return self._registers

    def special_registers(self) -> Any:
        raise NotImplementedError("a script has no special registers")

    def close(self) -> None:
        self.kick()


class ScriptedMachine:
    """One scripted VM. It has guest memory like any other, and takes no interrupts."""

    dirty = None
    interrupts = None
    wires = None

    def __init__(self, engines: Sequence[ScriptedEngine], memory: GuestMemory) -> None:
        self.engines = engines
        self.memory = memory

    def close(self) -> None:
        """Nothing is held."""


class ScriptedBackend:
    """Plays scripts.

    Parameters:
        scripts: by VM name, or a function of the spec and the vCPU's number. A VM without a script halts at once. A
            script may be endless (`itertools.repeat(bus_lock(after=0.01))`). One given as a list is played from its
            start by each vCPU and after each restart.
        detection: how the pretended host reports bus locks; None: it does not.

    Attributes:
        machines: made so far, by VM name.
    """

    name = "scripted"
    why = "scripted, as asked for"
    blocking = False
    logs_dirty = False

    def __init__(self, scripts: Scripts | None = None, *, detection: Detection | None = "fault-like") -> None:
        self.machines: dict[str, ScriptedMachine] = {}
        self._scripts: Scripts = {} if scripts is None else scripts
        self._detection = detection

    def bus_lock_detection(self) -> Detection | None:
        return self._detection

    def now(self) -> int:
        return round(trio.current_time() * 1e9) + 1  # never 0, which the core reads as "not waiting"

    def check(self, spec: VmSpec) -> None:
        if what := unwired(spec.machine_devices, spec.irqchip_kind):
            raise SpecError(
                f"vm {spec.name!r}: {what} needs backend='kvm'; a script has no interrupts and no ioeventfds"
            )

    def create(
        self,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        states: Sequence[EntryState],
        *,
        bus_locks: bool,
    ) -> ScriptedMachine:
        scripts = self._scripts
        engines = [
            ScriptedEngine(
                core, scripts(spec, i) if callable(scripts) else scripts.get(spec.name, ()), self, state, bus_locks
            )
            for i, (core, state) in enumerate(zip(cores, states, strict=True))
        ]
        self.machines[spec.name] = ScriptedMachine(engines, memory)
        return self.machines[spec.name]

    def limits_changed(self) -> None:
        for machine in self.machines.values():
            for engine in machine.engines:
                engine.kick()

    def close(self) -> None:
        self.machines.clear()
