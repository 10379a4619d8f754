"""The emulated backend: machines of one vCPU, executed by unicorn on a thread each, outside the interpreter lock."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any, Final

from ...model.devices import unwired
from ...model.errors import BackendUnavailable, SpecError
from ...model.spec import VmSpec
from ...native import ffi, lib
from ...native.core import VcpuCore, monotonic_ns
from .. import Detection
from ..entry import EntryState
from ..memory import GuestMemory
from ..memory_layout import entries, memory_slots
from ..registers import Registers, SpecialRegisters
from ..threaded import ThreadedEngine
from . import library

__all__ = ["EmulatedBackend", "EmulatedEngine", "EmulatedMachine"]


class EmulatedEngine(ThreadedEngine):
    """One vCPU on unicorn."""

    in_core = ffi.addressof(lib, "orc_emulator_run")

    def __init__(self, core: VcpuCore, emulator: Any, detection: Detection, bus_locks: bool) -> None:
        super().__init__(core)
        self._emulator = emulator
        self._lock = Lock()  # memory outlives its CPU, and may be written while that is closed
        lib.orc_vcpu_bind_emulator(core.handle, emulator, detection == "trap-like", bus_locks)

    def run(self) -> int:
        return lib.orc_emulator_run(self._handle)  # type: ignore[no-any-return]  # a RunResult, without the cost of making one

    def error(self) -> str:
        return f"unicorn failed: {ffi.string(lib.orc_emulator_failed(self._emulator)).decode()}"

    def registers(self) -> Registers:
        struct = ffi.new("struct kvm_regs *")
        lib.orc_emulator_registers(self._emulator, struct)
        return Registers.from_struct(struct)

    def special_registers(self) -> SpecialRegisters:
        struct = ffi.new("struct kvm_sregs *")
        lib.orc_emulator_special_registers(self._emulator, struct)
        return SpecialRegisters.from_struct(struct)

    def guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """Debug the guest from outside, as `KvmVcpu.guest_debug`: its traps then come as KVM_EXIT_DEBUG.

        While it does not run. Of the hardware breakpoints only those on execution are known.
        """
        debug = ffi.new("struct kvm_guest_debug *", {"control": control, "arch": {"debugreg": tuple(debugreg)}})
        lib.orc_emulator_debug(self._emulator, debug)

    def written(self, address: int, size: int) -> None:
        """The host wrote guest memory. Any thread, at any time."""
        with self._lock:
            if self._emulator != ffi.NULL:
                lib.orc_emulator_written(self._emulator, address, size)

    def close(self) -> None:
        self.core.unbind()
        with self._lock:
            lib.orc_emulator_free(self._emulator)
            self._emulator = ffi.NULL


SEGMENTS: Final = {16: (0, 0), 32: (0x08, 0x18), 64: (0x10, 0x18)}
"""Selectors of the code and data segments with which library.py's ``enter.bin`` gets into each mode."""


def _check_entry(state: EntryState) -> None:
    """Raises SpecError: unicorn can't start a CPU like that."""
    mode, special = state.mode, state.mode.special
    code, data = SEGMENTS[mode.bits]
    found = [(special.cs.selector, special.cs.base)]
    found += [(one.selector, one.base) for one in (special.ds, special.es, special.fs, special.gs, special.ss)]
    if found != [(code, 0)] + [(data, 0)] * 5:
        raise SpecError(
            f"boot: the emulated backend starts {mode.bits}-bit guests with flat segments, code at selector {code:#x} "
            f"and data at {data:#x}, as FlatImage has them; backend='kvm' takes others"
        )
    if state.msrs:
        raise SpecError("boot: the emulated backend starts guests with MSRs as after reset; backend='kvm' can set them")


class EmulatedMachine:
    """One VM on unicorn."""

    dirty = None
    interrupts = None
    wires = None

    def __init__(
        self, unicorn: Any, memory: GuestMemory, core: VcpuCore, state: EntryState, how: tuple[Detection, bool]
    ) -> None:
        self.memory = memory
        self._unicorn = unicorn  # it must outlive its CPUs
        self.engines: list[EmulatedEngine] = []
        _check_entry(state)
        slots, (entry, _kept) = memory_slots(memory), entries([state])
        failed = ffi.new("char const **")
        emulator = lib.orc_emulator_new(unicorn, slots, len(slots), entry, failed)
        if emulator == ffi.NULL:
            raise BackendUnavailable(
                f"unicorn can't make a CPU: {ffi.string(failed[0]).decode()}; each takes 3 MiB and up: launch fewer"
            )
        self.engines.append(EmulatedEngine(core, emulator, *how))
        memory.on_write = self.engines[0].written

    def close(self) -> None:
        self.memory.on_write = None
        for engine in self.engines:
            engine.close()


class EmulatedBackend:
    """Guest code executed by unicorn: 16, 32 and 64-bit code of one vCPU, every split lock seen, no KVM needed.

    Parameters:
        detection: where bus locks are reported for VMs whose spec does not say (`VmSpec.bus_lock_detection`).

    Raises:
        BackendUnavailable: unicorn is missing or can't be loaded; the message says which command helps.
    """

    name = "emulated"
    blocking = True
    logs_dirty = False

    def __init__(self, *, detection: Detection = "fault-like") -> None:
        if detection not in ("fault-like", "trap-like"):
            raise SpecError(f'detection={detection!r}: must be "fault-like" (as on AMD) or "trap-like" (as on Intel)')
        self._unicorn = library.load()
        self.why = "emulated, as asked for"
        self._detection = detection

    def bus_lock_detection(self) -> Detection | None:
        return self._detection

    def now(self) -> int:
        return monotonic_ns()

    def refusal(self, spec: VmSpec) -> tuple[str, str] | None:
        """Why it can't run that VM, and what can; None: nothing is known to be in the way."""
        can = "backend='kvm' can"
        if spec.vcpus > 1:
            return (
                f"vcpus={spec.vcpus}: the emulated backend gives a VM one vCPU, as several would not see each other's "
                "atomic operations"
            ), can
        if what := unwired(spec.machine_devices, spec.irqchip_kind):
            return f"{what}: the emulated backend delivers no interrupts and has no ioeventfds", can
        if spec.cpu != "host":
            return "cpu: the emulated backend has one CPU, unicorn's, and shows it as it is", can
        ring = spec.backing.dirty_ring
        if ring is not None or spec.log_dirty or any(region.log_dirty for region in spec.regions):
            return (
                f"{'log_dirty=True' if ring is None else f'dirty_ring={ring}'}: the emulated backend does not see "
                "which pages a guest writes, as asking at each write would make it up to four times as slow"
            ), can
        return None

    def check(self, spec: VmSpec) -> None:
        if refusal := self.refusal(spec):
            raise SpecError(f"vm {spec.name!r}: {'; '.join(refusal)}")

    def create(
        self,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        states: Sequence[EntryState],
        *,
        bus_locks: bool,
    ) -> EmulatedMachine:
        how = (spec.bus_lock_detection or self._detection, bus_locks)
        return EmulatedMachine(self._unicorn, memory, cores[0], states[0], how)

    def limits_changed(self) -> None:
        """Nothing: the core wakes threads."""

    def close(self) -> None:
        """Nothing is held: the library stays for the next fleet."""
