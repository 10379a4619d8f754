"""What executes guests: the contract of the three backends, and the choice among them.

A backend makes a `Machine` for a spec; a machine has guest memory and an `Engine` for each vCPU. Engines only execute:
what an exit means is decided above, in `orchestra.machine.vcpu`, which is the same for all. All engines account their
exits through the C core (`VcpuCore`), so counters, buckets, ring and commands are the same as well.

It may import the C core and the words.
The one to copy: `kvm/system.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, runtime_checkable

from ..model.errors import NoSuchBackend
from ..model.mistakes import meant
from ..model.spec import VmSpec
from ..native import lib
from ..native.core import Runner, VcpuCore
from ..native.records import Fields
from .entry import EntryState
from .memory import GuestMemory
from .wiring import Wires

if TYPE_CHECKING:
    from .detection import Asked
    from .kvm.dirty import DirtyLog

__all__ = [
    "Backend",
    "Detection",
    "Engine",
    "EntryState",
    "Machine",
    "Plan",
    "Planner",
    "RunResult",
    "Threaded",
    "choose",
]


class RunResult(IntEnum):
    """Why an engine returned from `run`: `enum orc_why` of the core."""

    EXIT = int(lib.ORC_EXIT)
    IO = int(lib.ORC_IO)
    MMIO = int(lib.ORC_MMIO)
    COMMAND = int(lib.ORC_COMMAND)
    ERROR = int(lib.ORC_ERROR)
    ANSWERED = int(lib.ORC_ANSWERED)
    """Of an access: the core has answered it. No engine returns this."""
    ASKED = int(lib.ORC_ASKED)
    """Commands are pending while a task is asked. Only engines that block ask by themselves. The others return `IO` or
    `MMIO` for what a task has to answer."""


Detection = Literal["fault-like", "trap-like", "unknown"]
"""When a bus lock is reported: before the instruction (AMD: "fault-like"), after it (Intel: "trap-like"), or
unknown."""


class Engine(Protocol):
    """Executes one vCPU. Methods are for the runner, unless their docstring says otherwise."""

    @property
    def core(self) -> VcpuCore: ...
    @property
    def threaded(self) -> bool:
        """True: `run` blocks, and needs a thread of its own. False: `run` is awaited on the fleet's thread."""

    @property
    def access(self) -> Any:
        """`struct orc_access *`: what to answer after `RunResult.IO` and `RunResult.MMIO`, before the next `run`."""

    def run(self) -> Any:
        """Execute until something needs a decision: a `RunResult`, or an awaitable of one if not threaded."""

    def sleep(self, seen: int) -> Any:
        """Sleep until woken or kicked. Returns at once if that happened since `seen` was read."""

    def attach(self) -> None:
        """Prepare to run on this thread, as `Threaded.start` does on another."""

    def detach(self) -> None:
        """The engine will not run again."""

    def kick(self) -> None:
        """Tell an engine that is not threaded to look at its commands. Any time, fleet's thread."""

    def wake(self) -> None:
        """End `sleep`. Any time, fleet's thread."""

    def resumed(self) -> None:
        """The vCPU was paused and will be entered again: tell the guest that time has passed, if there is a way."""

    def last_exit(self) -> Fields:
        """The record of the exit that `run` returned with, for `records.decode`."""

    def error(self) -> str:
        """What failed, after `RunResult.ERROR`: a sentence for `Failed.reason`."""

    def registers(self) -> Any:
        """General registers, with an attribute for each. While it does not run; any thread."""

    def special_registers(self) -> Any: ...

    def close(self) -> None:
        """Give everything back, after the runner has ended. The owner of the core closes the core."""


class Threaded(Engine, Protocol):
    """An engine that is `threaded`."""

    def start(self, vm: str, index: int, proceed: Callable[[int], object]) -> Runner:
        """Start a thread, named after the vCPU, which waits while `Command.HOLD` is set, runs the engine, and calls
        `proceed` with the first `RunResult`. Any thread.

        Raises:
            ResourceLimit: the host has no thread left.
        """


class Machine(Protocol):
    """One VM as a backend made it."""

    @property
    def engines(self) -> Sequence[Engine]: ...

    @property
    def dirty(self) -> DirtyLog | None:
        """The log of the pages that the guest writes; None: the backend has none (`Backend.logs_dirty`)."""

    @property
    def interrupts(self) -> Any:
        """The lines of its irqchip for devices of the core: ``orc_interrupts *``, which outlives the machine. None: it
        has none."""

    @property
    def wires(self) -> Wires | None:
        """Interrupts and doorbells for devices; None: this backend has neither, and refuses specs that need them."""

    def close(self) -> None:
        """Release everything but the memory: the owner of the memory closes it."""


class Plan(Protocol):
    """A VM that the core can make without Python."""

    @property
    def raw(self) -> Any:
        """``struct orc_plan *``, for the fleet's builder."""

    def make(self) -> None:
        """Make the VM on this thread."""

    def machine(self) -> Machine:
        """The machine, once the VM is made. Once; any thread.

        Raises:
            OrchestraError: the VM could not be made. Everything is given back.
        """


@runtime_checkable
class Planner(Protocol):
    """A backend whose VMs the core can make without Python. `Backend.create` does the same on one thread."""

    def plan(
        self,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        states: Sequence[EntryState],
        *,
        bus_locks: bool,
    ) -> Plan:
        """Parameters as of `Backend.create`. Whoever calls this has the VM made, and then calls `Plan.machine`."""


class Backend(Protocol):
    """A way to execute guests."""

    @property
    def name(self) -> str: ...
    @property
    def why(self) -> str:
        """One line: what the backend is, and why it was picked."""

    @property
    def blocking(self) -> bool:
        """Whether `create` blocks, and needs a worker thread."""

    @property
    def logs_dirty(self) -> bool:
        """Whether the backend can log which pages a guest writes (`VmSpec.log_dirty`)."""

    def bus_lock_detection(self) -> Detection | None:
        """How this host reports bus locks; None: it reports none."""

    def now(self) -> int:
        """Nanoseconds on the clock that the times of exits come from."""

    def check(self, spec: VmSpec) -> None:
        """Check a spec before anything is made.

        Raises:
            SpecError: the spec asks for what this backend, or this host, can't do; the message says what can.
        """

    def create(
        self,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        states: Sequence[EntryState],
        *,
        bus_locks: bool,
    ) -> Machine:
        """Make a VM whose vCPUs start as `states` say. If that fails, everything it opened is closed."""

    def limits_changed(self) -> None:
        """Limits have changed: engines that wait by themselves look again. (The core wakes threads.)"""

    def close(self) -> None: ...


NAMES: Final = ("auto", "kvm", "emulated", "scripted")
"""The backends that have a name."""


def no_such(backend: str) -> NoSuchBackend:
    """The error for a name that is not among `NAMES`."""
    names = ", ".join(map(repr, NAMES))
    return NoSuchBackend(f"backend={backend!r}: must be {names} or a Backend object{meant(backend, NAMES)}")


def choose(backend: str | Backend, asked: Asked | None = None) -> Backend:
    """The backend of that name, opened; "auto": the best one that can do what is asked for (see `detection`).

    Parameters:
        backend: a name, or a Backend object, which is given back as it is.
        asked: what "auto" must be able to do. A backend that is named is opened in any case.

    Raises:
        NoSuchBackend: no backend has that name.
        BackendUnavailable: the backend can't work on this host; the message says what to do.
        BusLockUnsupported: with "auto", no backend that opens sees the bus locks that are asked for.
    """
    if not isinstance(backend, str):
        return backend
    if backend == "kvm":
        from .kvm.machine import KvmBackend

        return KvmBackend.open()
    if backend == "emulated":
        from .emulated.machine import EmulatedBackend

        return EmulatedBackend()
    if backend == "scripted":
        from .scripted import ScriptedBackend

        return ScriptedBackend()
    if backend == "auto":
        from .detection import Asked, open_best

        return open_best(asked or Asked())
    raise no_such(backend)
