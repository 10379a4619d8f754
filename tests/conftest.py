"""What all tests share: guests, the backends a behaviour is tried over, and a check that nothing is left behind."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import struct
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from hypothesis import settings

from orchestra import ExitPort, FlatImage, Fleet, KvmError, OrchestraError, ScriptedBackend, VmSpec, open_fleet
from orchestra.backend.emulated import library
from orchestra.backend.kvm.system import Kvm
from orchestra.backend.memory import GuestMemory
from orchestra.backend.scripted import ScriptedExit, hlt, io_read, io_write, mmio_read, mmio_write, triple_fault
from orchestra.native import ffi, lib
from orchestra.native.core import FleetCore, VcpuCore

# How long an example takes is a matter of what else runs on this machine, and no property of the code.
settings.register_profile("orchestra", deadline=None)
settings.load_profile("orchestra")

GUESTS = Path(__file__).parent / "guests"
COUNT, ROUNDS = 0x8000, 0x8004
"""Where the lock guests keep their own count, and are told how many rounds to do (see guests/locks.inc)."""


def guest(name: str) -> bytes:
    """The bytes of tests/guests/NAME.asm."""
    return (GUESTS / f"{name}.bin").read_bytes()


def lock_spec(kind: str, mode: int, name: str = "guest", **more: object) -> VmSpec:
    """A guest that does locked instructions of that kind; write how many to ROUNDS."""
    return VmSpec(name=name, boot=FlatImage(code=guest(f"lock_{kind}_{mode}"), mode=mode), **more)  # type: ignore[arg-type]


def word(vm: object, address: int) -> int:
    """A 32-bit word of guest memory."""
    (value,) = struct.unpack("<I", vm.read_memory(address, 4))  # type: ignore[attr-defined]
    return int(value)


def kvm_problem() -> str | None:
    try:
        with Kvm.open():
            return None
    except (OrchestraError, KvmError) as error:
        return str(error)


def emulated_problem() -> str | None:
    try:
        library.load()
    except OrchestraError as error:
        return str(error)
    return None


def bus_lock_problem() -> str | None:
    problem = kvm_problem()
    if problem is not None:
        return problem
    with Kvm.open() as kvm:
        if kvm.extension(lib.KVM_CAP_X86_BUS_LOCK_EXIT) & lib.KVM_BUS_LOCK_DETECTION_EXIT:
            return None
    return "this host's KVM reports no bus locks (KVM_CAP_X86_BUS_LOCK_EXIT)"


def linux_problem() -> str | None:
    problem = kvm_problem()
    if problem is not None:
        return problem
    if not {"vmx", "svm"} & set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()):
        return "this host's KVM interprets guests, without vmx or svm: Linux would take minutes, if it runs at all"
    return None


def pytest_configure(config: pytest.Config) -> None:
    """What a shell runs in the background ignores Ctrl-C, and tests that interrupt themselves would wait for ever."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_bytecode(config)


def keep_bytecode(config: pytest.Config) -> None:
    """Where no bytecode may be written beside the sources (PYTHONDONTWRITEBYTECODE), it goes into pytest's cache.

    Without any, each worker compiles all tests anew, with their assertions rewritten (7 s of CPU), and each of many
    child processes all of orchestra (0.2 s). Workers and children are told by the environment.
    """
    if sys.dont_write_bytecode and hasattr(config, "cache"):
        sys.dont_write_bytecode = False
        sys.pycache_prefix = str(config.cache.mkdir("bytecode"))
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    problems = {
        "kvm": kvm_problem(),
        "emulated": emulated_problem(),
        "buslock": bus_lock_problem(),
        "linux": linux_problem(),
    }
    for item in items:
        if item.get_closest_marker("smp") and getattr(item, "callspec", None) and "emulated" in item.callspec.id:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.skip(reason="the emulated backend gives a VM one vCPU"))
        for marker, problem in problems.items():
            if problem is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=problem))
    # Long ones first: at the end one worker would wait for another that has only begun such a test.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What was collected stays to the end: the garbage collector need not look through it again and again."""
    gc.freeze()


_memories: weakref.WeakSet[GuestMemory] = weakref.WeakSet()


@pytest.fixture(scope="session", autouse=True)
def _memories_are_known() -> Iterator[None]:
    """Every guest memory that is made, so that nobody has to look for them among all objects there are."""
    make = GuestMemory.__init__

    def remember(self: GuestMemory, *args: object, **more: object) -> None:
        _memories.add(self)
        make(self, *args, **more)  # type: ignore[arg-type]

    GuestMemory.__init__ = remember  # type: ignore[method-assign]
    yield
    GuestMemory.__init__ = make  # type: ignore[method-assign]


def held() -> Counter[str]:
    """What orchestra holds of the host in this process. (Trio has descriptors and threads of its own.)"""
    targets = (_target(fd) for fd in os.listdir("/proc/self/fd"))
    things = Counter(target for target in targets if "kvm" in target or "eventfd" in target)
    with open("/proc/self/maps") as maps:
        things["mapping of a vCPU"] = sum("kvm-vcpu" in line for line in maps)
    things["guest memory"] = sum(not memory.released for memory in list(_memories))
    things["runner"] = sum(_is_of_a_vcpu(task) for task in Path("/proc/self/task").iterdir())
    return things


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _is_of_a_vcpu(task: Path) -> bool:
    """The core names its threads by VM and vCPU, "web-1/0"."""
    try:
        return "/" in (task / "comm").read_text()
    except OSError:  # it has just ended
        return False


@pytest.fixture
def nothing_left() -> Iterator[Callable[[], None]]:
    """Fails if the test leaves a descriptor, a mapping, guest memory or a vCPU's runner behind; call to check now."""
    before = held()

    def check() -> None:
        if held() - before:
            gc.collect()  # a traceback may hold on to what a failure left
        assert held() - before == Counter()

    yield check
    check()


def _string(port: int, data: bytes) -> list[ScriptedExit]:
    """OUTS: as many bytes at a time as KVM has room for."""
    pieces = [data[at : at + 1024] for at in range(0, len(data), 1024)]
    return [ScriptedExit("io", args=(port, 1, len(piece), 1), data=piece) for piece in pieces]


SCRIPTS: dict[str, Callable[[int], Iterable[ScriptedExit]]] = {
    "halt": lambda vcpu: [hlt()],
    "spin": lambda vcpu: [hlt(after=1e9)],
    "registers": lambda vcpu: [hlt(after=1e9)],
    "storm": lambda vcpu: itertools.repeat(io_write(0x80, b"\0", after=1e-4)),
    "first_spins": lambda vcpu: [hlt(after=0 if vcpu else 1e9)],
    "exit_port": lambda vcpu: [io_write(0xF4, b"\x2a")],
    "triple_fault": lambda vcpu: [triple_fault()],
    "ask_twice": lambda vcpu: [io_read(0x500 + vcpu, 4)],
    "ports": lambda vcpu: [
        *(io_read(0x500, size) for size in (1, 2, 4)),
        *(io_write(0x500, bytes.fromhex("11223344")[:size]) for size in (1, 2, 4)),
    ],
    "prints": lambda vcpu: [*_string(0x3F8, bytes(range(256)) * 16), *_string(0xE9, bytes(range(256)) * 16)],
    "reads_string": lambda vcpu: [ScriptedExit("io", args=(0x500, 1, 1024, 0))],
    "hangs_over_64": lambda vcpu: [
        mmio_read(0xD0000FFD, 3),
        mmio_read(0xD0001000, 5),
        mmio_write(0xD0000FFD, bytes.fromhex("112233")),
        mmio_write(0xD0001000, bytes.fromhex("4455667788")),
        io_read(0x503, 4),
        io_write(0x503, bytes.fromhex("11223344")),
    ],
    "floods_64": lambda vcpu: (
        [
            mmio_read(0xD0000000, 8),
            mmio_write(0xD0000000, b"\xff" * 4),
            io_read(0x80),
            io_write(0x80, b"\xff"),
            io_read(0x3FD),
            io_write(0x3F8, b"\x60"),
            io_write(0xE9, b"\x60"),
            io_read(0xE9),
            io_read(0xF4, 4),
        ]
        * 500
    ),
}
"""What some of the guests do, for the scripted backend."""


class Stage:
    """A backend to try a behaviour over, and guests that do the same on each."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._guests: dict[str, str] = {}

    @property
    def vcpus(self) -> int:
        """As many as show what several do, where there can be several."""
        return 1 if self.backend == "emulated" else 2

    @property
    def executes(self) -> bool:
        """It runs the guest's code, and does not play a script."""
        return self.backend != "scripted"

    def open(self, **options: object) -> AbstractAsyncContextManager[Fleet]:
        """A fleet on this backend."""
        backend = ScriptedBackend(self._script) if self.backend == "scripted" else self.backend
        return open_fleet(backend=backend, **options)  # type: ignore[arg-type]

    def _script(self, spec: VmSpec, vcpu: int) -> Iterable[ScriptedExit]:
        return SCRIPTS[self._guests[spec.name]](vcpu)

    def spec(self, source: str, name: str = "guest", mode: int = 16, **more: object) -> VmSpec:
        """tests/guests/SOURCE.asm, with an exit port."""
        self._guests[name] = source
        more.setdefault("devices", [ExitPort()])
        return VmSpec(name=name, boot=FlatImage(code=guest(source), mode=mode), **more)  # type: ignore[arg-type]


@pytest.fixture(
    params=[
        "scripted",
        pytest.param("emulated", marks=pytest.mark.emulated),
        pytest.param("kvm", marks=pytest.mark.kvm),
    ]
)
def stage(request: pytest.FixtureRequest, nothing_left: Callable[[], None]) -> Stage:
    """For behaviours that are the same over all backends."""
    return Stage(request.param)


def play(
    script: Iterable[ScriptedExit] | dict[str, Iterable[ScriptedExit]], **options: object
) -> AbstractAsyncContextManager[Fleet]:
    """A fleet whose VMs play scripts: by name, or one for all of them. Under `autojump_clock`."""
    scripts = script if isinstance(script, dict) else lambda spec, vcpu: script
    return open_fleet(backend=ScriptedBackend(scripts), **options)  # type: ignore[arg-type]


def drained(fleet: FleetCore, core: VcpuCore | None = None) -> list[object]:
    """What is in the rings of all, or of one: each record a ``struct orc_record *``."""
    most, found = 1024, []
    room = ffi.new("struct orc_record[]", most)
    while n := (
        lib.orc_fleet_drain(fleet.handle, room, most) if core is None else lib.orc_vcpu_drain(core.handle, room, most)
    ):
        found += [ffi.new("struct orc_record *", room[index]) for index in range(n)]
    return found


def blank(name: str = "guest", **more: object) -> VmSpec:
    """A VM whose image does not matter: for scripts."""
    return VmSpec(name=name, boot=FlatImage(code=b"\xf4"), **more)  # type: ignore[arg-type]
