"""The kvm backend: machines made of KVM's three levels, and engines that run their vCPUs."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

from ...model.errors import BusLockUnsupported, OrchestraError, SpecError
from ...model.spec import VmSpec
from ...native import ffi, lib
from ...native.core import VcpuCore, install_signal, monotonic_ns
from .. import Detection, EntryState
from ..memory import GuestMemory
from ..memory_layout import entry_fields, memory_slots
from ..registers import Registers, SpecialRegisters
from ..threaded import ThreadedEngine
from .cpuid import Cpuid
from .dirty import DirtyLog
from .ioctl import failure
from .system import Kvm
from .vcpu import KvmVcpu
from .vm import KvmVm

__all__ = ["KvmBackend", "KvmEngine", "KvmMachine"]

# Three pages and one below 4 GiB and above the APICs, where every VMM has them (api.rst, KVM_SET_TSS_ADDR).
TSS_ADDRESS: Final = 0xFFFB_D000
IDENTITY_MAP_ADDRESS: Final = 0xFFFB_C000


class KvmEngine(ThreadedEngine):
    """One vCPU on KVM."""

    in_core = ffi.addressof(lib, "orc_kvm_run")

    def __init__(self, core: VcpuCore, vcpu: KvmVcpu, sync_regs: bool) -> None:
        super().__init__(core)
        self.vcpu = vcpu
        lib.orc_vcpu_bind_kvm(core.handle, vcpu.fd, vcpu.run, sync_regs)

    def run(self) -> int:
        return lib.orc_kvm_run(self._handle)  # type: ignore[no-any-return]  # a RunResult, without the cost of making one

    def resumed(self) -> None:
        try:
            self.vcpu.kvmclock_ctrl()
        except OrchestraError:
            pass  # a guest that is not told complains of a lockup at the worst

    def error(self) -> str:
        number = int(lib.orc_vcpu_errno(self._handle))
        return f"KVM_RUN failed: {errno.errorcode.get(number, number)} ({os.strerror(number)})"

    def registers(self) -> Registers:
        return self.vcpu.registers()

    def special_registers(self) -> SpecialRegisters:
        return self.vcpu.special_registers()

    def close(self) -> None:
        self.core.unbind()
        self.vcpu.close()


class KvmMachine:
    """One VM on KVM."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.engines: list[KvmEngine] = []
        self.vm: KvmVm | None = None
        self.dirty: DirtyLog | None = None
        self.interrupts: Any = None
        self._slots: Any = None

    def build(
        self, kvm: Kvm, spec: VmSpec, cores: Sequence[VcpuCore], states: Sequence[EntryState], cpuid: Cpuid, **how: bool
    ) -> None:
        """Make all of it in one call into the core. Raises what `failure` makes of the step that failed."""
        plan = ffi.new("struct orc_plan *")
        slots = memory_slots(self.memory)
        entries = ffi.new("struct orc_entry[]", [entry_fields(state) for state in states])
        fds, runs = ffi.new("int[]", len(cores)), ffi.new("struct kvm_run *[]", len(cores))
        plan.kvm, plan.bus_locks, plan.irqchip = kvm.fd, how["bus_locks"], spec.irqchip
        plan.identity_map, plan.tss, plan.run_size = IDENTITY_MAP_ADDRESS, TSS_ADDRESS, kvm.vcpu_mmap_size
        plan.slots, plan.slot, plan.vcpus, plan.entry = len(slots), slots, len(cores), entries
        plan.cpuid, plan.vcpu, plan.run = cpuid.buffer, fds, runs

        result = lib.orc_kvm_build(plan)
        if plan.vm >= 0:
            made = range(plan.vcpus_made)
            with ExitStack() as nobodys:
                for index in made:
                    nobodys.callback(os.close, fds[index])
                    nobodys.callback(lib.munmap, runs[index], kvm.vcpu_mmap_size)
                self.vm = KvmVm.adopt(plan.vm, kvm.vcpu_mmap_size, self.memory, bus_lock_exits=how["bus_locks"])
                vcpus = [KvmVcpu(self.vm, fds[index], runs[index], kvm.vcpu_mmap_size) for index in made]
                nobodys.pop_all()
            self.interrupts = self.vm.interrupts if spec.irqchip else None
            for index, vcpu in enumerate(vcpus):
                self.engines.append(KvmEngine(cores[index], vcpu, how["sync_regs"]))
                lib.orc_vcpu_profile_memory(cores[index].handle, slots, len(slots))
            self._slots = slots  # as long as the vCPUs that read code through it
            self.dirty = DirtyLog(plan.vm, slots)
        if result == -errno.EOPNOTSUPP:
            raise BusLockUnsupported(f"vm {spec.name!r}: this host's KVM can't report its bus locks")
        if result:
            raise failure(-result, ffi.string(plan.step).decode())

    def open_statistics(self, index: int) -> None:
        """Before `statistics`, for each vCPU that is alive: on its thread, as this waits until it leaves KVM_RUN.

        Raises:
            KvmError: this KVM has none.
        """
        self.engines[index].vcpu.open_statistics()

    def statistics(self) -> dict[str, float]:
        """KVM's own figures, in whole units, of the VM and ("vcpu0.exits") of each vCPU; without histograms.

        Raises:
            KvmError: this KVM has none (KVM_CAP_BINARY_STATS_FD).
        """
        assert self.vm is not None
        read = [("", self.vm.statistics())]
        read += [(f"vcpu{index}.", engine.vcpu.statistics()) for index, engine in enumerate(self.engines)]
        return {prefix + name: one.scaled for prefix, all in read for name, one in all.items() if len(one.values) == 1}

    def close(self) -> None:
        with ExitStack() as stack:  # from the last to the first, whatever becomes of one of them
            if self.vm is not None:
                stack.callback(self.vm.close)
            for engine in self.engines:
                stack.callback(engine.close)
            if self.dirty is not None:
                stack.callback(self.dirty.close)


class KvmBackend:
    """The host's KVM. Make one with `KvmBackend.open`."""

    name = "kvm"
    blocking = True
    logs_dirty = True

    def __init__(self, kvm: Kvm, why: str) -> None:
        self.kvm = kvm
        self.why = why
        self._cpuids: list[Cpuid] = []
        # api.rst 4.4: KVM_CAP_MAX_VCPUS; without it as many as recommended; without that, 4
        self._max_vcpus = kvm.extension(lib.KVM_CAP_MAX_VCPUS) or kvm.extension(lib.KVM_CAP_NR_VCPUS) or 4
        self._sync_regs = bool(kvm.extension(lib.KVM_CAP_SYNC_REGS) & lib.KVM_SYNC_X86_REGS)

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> KvmBackend:
        """Open the host's KVM.

        Raises:
            BackendUnavailable: there is none, or it may not be opened, or it is too old.
            ResourceLimit: the program uses the kick's signal otherwise.
        """
        install_signal()
        kvm = Kvm.open(path)
        try:
            return cls(kvm, "kvm, as asked for")
        except BaseException:
            kvm.close()
            raise

    def bus_lock_detection(self) -> Detection | None:
        if not self.kvm.extension(lib.KVM_CAP_X86_BUS_LOCK_EXIT) & lib.KVM_BUS_LOCK_DETECTION_EXIT:
            return None
        match cpu_vendor():
            case "GenuineIntel":
                return "trap-like"
            case "AuthenticAMD" | "HygonGenuine":
                return "fault-like"
        return "unknown"

    def now(self) -> int:
        return monotonic_ns()

    def create(
        self,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        states: Sequence[EntryState],
        *,
        bus_locks: bool,
    ) -> KvmMachine:
        machine = KvmMachine(memory)
        # A table belongs to one thread at a time, and making one takes as long as the rest.
        try:
            cpuid = self._cpuids.pop()
        except IndexError:
            cpuid = self.kvm.supported_cpuid()
        try:
            machine.build(self.kvm, spec, cores, states, cpuid, bus_locks=bus_locks, sync_regs=self._sync_regs)
        except BaseException:
            machine.close()
            raise
        finally:
            self._cpuids.append(cpuid)
        return machine

    def limits_changed(self) -> None:
        """Nothing: the core wakes threads."""

    def refusal(self, spec: VmSpec) -> tuple[str, str] | None:
        """Why this host's KVM can't run that VM, and what to do; None: nothing is known to be in the way."""
        if spec.vcpus > self._max_vcpus:
            return f"vcpus={spec.vcpus}: this host's KVM allows at most {self._max_vcpus} in a VM", "ask for fewer"
        wanted, given = spec.bus_lock_detection, self.bus_lock_detection()
        if wanted is not None and given is not None and wanted != given:
            what = f"bus_lock_detection={wanted!r}: this host's CPU reports them {given}"
            return what, "leave it out, or choose with backend='emulated'"
        return None

    def check(self, spec: VmSpec) -> None:
        if refusal := self.refusal(spec):
            raise SpecError(f"vm {spec.name!r}: {'; '.join(refusal)}")

    def close(self) -> None:
        self.kvm.close()


def cpu_vendor() -> str:
    """The CPU's vendor string, as /proc/cpuinfo has it; empty if it does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""
