"""A vCPU: what its exits mean, and its life between run, wait for an answer, pause and end.

`Vcpu.life` is a generator. It yields what it needs next (run the engine, or sleep until woken) and receives the result.
A thread of the vCPU drives it for engines that block; the fleet's thread drives it for engines that are awaited. So an
exit means the same on all backends.

      ┌──────── answered ──────── using / asked ◀─┐ an access for Python
      ▼                                           │
    RUN ────────────────────────────────────────▶ why? ── an exit that ends it ─▶ outcome
      ▲                                           │
      └──────── resumed ─────── parked ◀──────────┘ PAUSE is commanded (STOP: the end)
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Generator
from typing import Any, Final, Protocol, cast

from ..backend import Engine, RunResult, Threaded
from ..model import exits
from ..model.actions import TRIPLE_FAULT, Failed, Halted, Outcome, Shutdown, Stopped
from ..native import ffi
from ..native.core import Command, Question, Runner
from ..native.records import decode
from .devices.bus import Bus, Claim, Device

__all__ = ["Vcpu"]


RUN: Final = -1
"""What `life` yields to have the engine run. Any other number is a count of wakes: sleep, unless woken since it was
read."""

# Exits after which the guest simply goes on: user space asked for these exits, or nothing has to be done.
_GO_ON: Final = (
    exits.BusLock,
    exits.Interrupted,
    exits.IrqWindowOpen,
    exits.SetTpr,
    exits.TprAccess,
    exits.IoapicEoi,
)
NOTIFY_CONTEXT_INVALID: Final = 1
SYSTEM_EVENTS: Final = {1: "shutdown", 2: "reset", 3: "crash"}
_ACCESS: Final = struct.Struct("=4Q4I")
"""The begin of `struct orc_access`, unpacked in one call: address, offset, claim, value, size, count, write, task."""
_MASKS: Final = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}
_SHOWN: Final = ("rip", "rflags", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")


class Living:
    """What `Vcpu.living` returns. A class, as each tick opens one for each active vCPU: a generator would cost three
    times as much."""

    __slots__ = ("_lock", "_vcpu")

    def __init__(self, vcpu: Vcpu, lock: threading.Lock) -> None:
        self._vcpu, self._lock = vcpu, lock

    def __enter__(self) -> int | None:
        self._lock.acquire()
        return self._vcpu.tid

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Host(Protocol):
    """The run, as its vCPUs need it."""

    name: str
    ports: Bus
    mmio: Bus

    @property
    def pause_number(self) -> int:
        """Counts pauses, so that a vCPU that was resumed and paused again reports again."""

    def on_parked(self, index: int, number: int) -> None:
        """The vCPU runs no guest code for that pause, but is in the middle of an access. Runner's thread."""

    def on_quiesced(self, index: int, number: int) -> None:
        """The vCPU runs no guest code for that pause, and no access is pending. Runner's thread."""

    def now(self) -> int:
        """Nanoseconds on the fleet's clock. Any thread."""

    def on_ended(self, index: int, outcome: Outcome) -> None:
        """The vCPU will never run again. Runner's thread."""

    def commanded(self, index: int) -> list[Callable[[], None]]:
        """The functions to call between two entries of the guest. Runner's thread."""


class Vcpu:
    """One vCPU of a VM, for its runner.

    Attributes:
        pausing: set by the fleet's thread once it has commanded a pause.
        using: the claim of the device that answers an access right now. If it is seen after a pause was commanded, no
            guest code runs until the pause is taken back.
        asked: the question that a task has to answer. None: no task was asked.
    """

    def __init__(self, host: Host, index: int, engine: Engine) -> None:
        self.host = host
        self.index = index
        self.engine = engine
        self.core = engine.core
        self.pausing = False
        self.using: Claim | None = None
        self.asked: Question | None = None
        self.final_registers: Any = None
        self._parked_for = self._quiesced_for = 0
        self._was_held = False
        self._runner: Runner | None = None
        self._over = False
        self._living = threading.Lock()

    # ---- drivers

    def drive(self) -> None:
        """Run to the end on this thread. `attach` waits until `Command.HOLD` is cleared."""
        self.engine.attach()
        self.proceed(self.engine.run())

    def spawn(self) -> None:
        """Drive the vCPU on a thread of its own, held until `Command.HOLD` is cleared.

        The thread is the core's. It enters Python when its guest needs that for the first time. Until then it never
        waits for the interpreter's lock.

        Raises:
            ResourceLimit: the host has no thread left.
        """
        self.core.hold()
        self._runner = cast(Threaded, self.engine).start(self.host.name, self.index, self.proceed)

    def proceed(self, why: int) -> None:
        """Go on to the end, after the engine ran for the first time on this thread and returned `why`."""
        engine, life = self.engine, self.life()
        run, sleep, send = engine.run, engine.sleep, life.send
        outcome: Outcome
        try:
            next(life)  # a life begins with a run
            while True:
                wanted = send(why)
                why = run() if wanted == RUN else sleep(wanted)
        except StopIteration as end:
            outcome = end.value
        except BaseException as error:  # a device may raise SystemExit: that ends this VM only
            outcome = self._failed(f"{type(error).__name__}: {error}")
        try:
            engine.detach()
        except Exception as error:
            outcome = self._failed(f"{type(error).__name__}: {error}")
        try:
            self._end(outcome)
        finally:
            with self._living:  # from now on the kernel may give this thread's number to another thread
                self._over = True

    @property
    def tid(self) -> int | None:
        """The kernel's number of the vCPU's thread; None: there is no thread, or no thread any more. The thread may end
        at any moment: use `living` to do something to it."""
        return None if self._runner is None or self._over else self._runner.tid

    def living(self) -> Living:
        """A block that gives `tid`. The thread does not end within the block, so the number is no other thread's."""
        return Living(self, self._living)

    def join(self) -> None:
        """Wait until the thread is gone: microseconds, as `on_ended` was called already."""
        if self._runner is not None:
            self._runner.join()

    async def drive_async(self) -> None:
        """Run to the end on the fleet's thread. Cancelling ends the vCPU where it is."""
        engine, life = self.engine, self.life()
        outcome: Outcome
        try:
            wanted = next(life)
            while True:
                wanted = life.send(await (engine.run() if wanted == RUN else engine.sleep(wanted)))
        except StopIteration as end:
            outcome = end.value
        except Exception as error:
            outcome = self._failed(f"{type(error).__name__}: {error}")
        self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        self.using = self.asked = None
        self.keep_registers()
        self.host.on_ended(self.index, outcome)

    def keep_registers(self) -> None:
        """Keep the registers, unless they are kept already: the vCPU will not run again."""
        if self.final_registers is None:
            try:
                self.final_registers = self.engine.registers()
            except Exception as error:  # the outcome matters more than the registers
                self.final_registers = error

    # ---- life

    def life(self) -> Generator[int, Any, Outcome]:
        """From the first entry to the end. Returns the outcome.

        While `using` is set or a task is asked, the kernel has an access to complete at the next entry. If a pause is
        commanded by then, that entry completes the access and runs no guest code (`unfinished` in native/kvm.c).
        """
        host, access, parts = self.host, self.engine.access, _ACCESS.unpack_from
        fields = memoryview(ffi.buffer(access))
        io, mmio = RunResult.IO, RunResult.MMIO
        while True:
            why = yield RUN
            if why in (io, mmio):
                bus = host.ports if why == io else host.mmio
                asked = parts(fields)
                claim = bus.claimed.get(asked[2])
                if claim is None:
                    access.count = 0  # the claim was released meanwhile: the core looks the address up again
                elif claim.device is not None:
                    self.using = claim
                    if self.pausing:  # read after `using` is set: `Pausing.pause` has the other order
                        self._say_parked()
                    try:
                        self._use(claim, claim.device, asked)
                    except (Exception, SystemExit) as error:  # a device has no say in whether the program ends
                        direction = "write to" if access.write else "read of"
                        name = type(claim.handler).__name__
                        return self._failed(
                            f"device {name} failed at a {direction} {bus.name} {access.address:#x}: {error!r}"
                        )
                    self.using = None
                    if self._was_held:
                        self._resumed()
                else:  # a task answers; an engine that blocks asks in the core and returns ASKED
                    self.core.ask(host.now())
                    yield from self._answered()
            elif why == RunResult.ASKED:
                yield from self._answered()
            elif why == RunResult.COMMAND:
                commands = self.core.commands()
                if commands & Command.STOP:
                    return Stopped()
                if commands & Command.CALL:
                    for call in host.commanded(self.index):
                        call()
                if commands & Command.PAUSE:
                    yield from self._park()
            elif why == RunResult.EXIT:
                outcome = self._judge(decode(self.engine.last_exit(), host.name, self.index))
                if outcome is not None:
                    return outcome
            else:
                return self._failed(self.engine.error())

    def _use(self, claim: Claim, device: Device, access: tuple[int, ...]) -> None:
        """Let a device answer one chunk of the guest's access: several elements, if a string instruction makes it."""
        _, offset, _, value, size, count, write, _ = access
        raw = self.engine.access
        with claim.lock:
            if not claim.live:
                raw.count = 0
            elif count > 1:
                self._use_many(claim, device, raw)
            elif write:
                device.write(offset, size, value)
            else:
                raw.value = device.read(offset, size) & _MASKS[size]

    def _use_many(self, claim: Claim, device: Device, access: Any) -> None:
        data, offset, size, write = access.data, access.offset, access.size, access.write
        for start in range(0, size * access.count, size):
            if not claim.live:  # the device itself released the claim, at the element before
                access.count = start // size
                return
            if write:
                device.write(offset, size, int.from_bytes(ffi.buffer(data + start, size), "little"))
            else:
                value = device.read(offset, size) & _MASKS[size]
                ffi.memmove(data + start, value.to_bytes(size, "little"), size)

    def _answered(self) -> Generator[int, Any, None]:
        """Wait until the question to a task is settled. Pauses, stops and calls are served meanwhile.

        A question without an answer (the vCPU is stopped, or the claim is gone) goes back to the core.
        """
        self.asked = self.core.question()
        while self.core.is_asking():
            seen = self.core.wakes()
            commands = self.core.commands()
            if commands & Command.STOP:
                break
            if commands & Command.CALL:
                for call in self.host.commanded(self.index):
                    call()
                continue
            if commands & Command.PAUSE:
                self._say_parked()
            if self.core.is_asking():
                yield seen
        self.core.settled()
        self.asked = None
        if self._was_held:
            self._resumed()

    def _park(self) -> Generator[int, Any, None]:
        while True:
            seen = self.core.wakes()
            commands = self.core.commands()
            if not commands & Command.PAUSE or commands & Command.STOP:
                if self._was_held:
                    self._resumed()
                return
            if commands & Command.CALL:
                for call in self.host.commanded(self.index):
                    call()
                continue
            self._was_held = True
            number = self.host.pause_number
            if self._quiesced_for != number:
                self._quiesced_for = number
                self.host.on_quiesced(self.index, number)
            yield seen

    def _say_parked(self) -> None:
        self._was_held = True
        number = self.host.pause_number
        if self._parked_for != number:
            self._parked_for = number
            self.host.on_parked(self.index, number)

    def _resumed(self) -> None:
        """If the pause is over: tell the engine, so that the guest learns that it was not running for a while."""
        if not self.core.commands() & (Command.PAUSE | Command.STOP):
            self._was_held = False
            self.engine.resumed()

    # ---- what exits mean

    def _judge(self, exit: exits.Exit) -> Outcome | None:
        """The outcome with which an exit ends the vCPU; None: the guest goes on."""
        match exit:
            case exits.Hlt():
                return Halted()
            case exits.ShutdownExit():
                return Shutdown(reason=TRIPLE_FAULT)
            case exits.SystemEvent(type=1 | 2 as number):
                return Shutdown(reason=f"system event: {SYSTEM_EVENTS[number]}")
            case exits.SystemEvent():
                return self._failed(f"system event {exit.type} ({SYSTEM_EVENTS.get(exit.type, 'unknown')})")
            case exits.Notify() if not exit.flags & NOTIFY_CONTEXT_INVALID:
                return None
            case exits.InternalError():
                what = {1: "can't emulate an instruction", 3: "an exit during event delivery"}.get(exit.suberror)
                bytes_ = f", bytes {exit.instruction.hex(' ')}" if exit.instruction else ""
                return self._failed(f"internal error {exit.suberror}" + (f": {what}" if what else "") + bytes_)
            case exits.FailEntry():
                reason = exit.hardware_entry_failure_reason
                return self._failed(f"the CPU refused to enter the guest: hardware reason {reason:#x}")
            case exits.MemoryFault():
                return self._failed(f"memory fault at {exit.address:#x}, {exit.size} bytes, flags {exit.flags:#x}")
            case exits.ExceptionExit():
                return self._failed(
                    f"exception {exit.exception} at {exit.address:#x}, which the guest has a handler for: the emulated "
                    "backend can't enter it; backend='kvm' can"
                )
            case exits.OtherExit():
                return self._failed(f"exit reason {exit.reason}, which this version of orchestra does not know")
            case _ if isinstance(exit, _GO_ON):
                return None
        return self._failed(f"exit {exit.kernel_name} that nobody handles: {exit}")

    def _failed(self, reason: str) -> Failed:
        registers: dict[str, int] = {}
        try:
            general, special = self.engine.registers(), self.engine.special_registers()
            registers = {name: getattr(general, name) for name in _SHOWN}
            registers |= {name: getattr(special, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer")}
            registers["cs"] = special.cs.selector
        except Exception:  # the reason matters more than the registers
            pass
        return Failed(reason, registers, self.index)
