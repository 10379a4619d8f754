"""The kvm backend: machines made of KVM's three levels, and engines that run their vCPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ...errors import BusLockUnsupported
from ...memory import GuestMemory
from ...native import ffi, lib
from ...native.core import VcpuCore, install_signal, monotonic_ns
from ...native.records import Fields, unpack
from ...spec import VmSpec
from .. import Detection, EntryState
from .cpuid import Cpuid
from .registers import MpState, Registers, SpecialRegisters
from .system import Kvm
from .vcpu import KvmVcpu
from .vm import KvmVm

__all__ = ["KvmBackend", "KvmEngine", "KvmMachine"]

# Three pages and one below 4 GiB and above the APICs, where every VMM has them (api.rst, KVM_SET_TSS_ADDR).
TSS_ADDRESS: Final = 0xFFFB_D000
IDENTITY_MAP_ADDRESS: Final = 0xFFFB_C000
TYPE_CODE, TYPE_DATA = 0xB, 0x3  # accessed, and readable or writable


class KvmEngine:
    """One vCPU on KVM."""

    threaded = True

    def __init__(self, core: VcpuCore, vcpu: KvmVcpu, ports: Any, sync_regs: bool, irqchip: bool) -> None:
        self.core = core
        self.vcpu = vcpu
        self._irqchip = irqchip
        self.access = lib.orc_vcpu_access(core.handle)
        self._handle = core.handle
        lib.orc_vcpu_bind_kvm(core.handle, vcpu.fd, vcpu.run, ports, sync_regs)

    def run(self) -> int:
        return lib.orc_kvm_run(self._handle)  # type: ignore[no-any-return]  # a Why, without the cost of making one

    def sleep(self, seen: int) -> None:
        lib.orc_vcpu_sleep(self._handle, seen)

    def attach(self) -> None:
        lib.orc_vcpu_attach(self._handle)

    def detach(self) -> None:
        lib.orc_vcpu_detach(self._handle)

    def kick(self) -> None:
        """Nothing: the core kicks threads."""

    def wake(self) -> None:
        if self.core.handle != ffi.NULL:  # an answer may come after the VM has ended
            self.core.wake()

    def last_exit(self) -> Fields:
        return unpack(lib.orc_vcpu_record(self._handle))

    def error(self) -> int:
        return int(lib.orc_vcpu_errno(self._handle))

    def enter_at(self, state: EntryState) -> None:
        sregs = self.vcpu.read_sregs()
        if state.mode == 16:
            sregs.cs.base = 0
            sregs.cs.selector = 0
        else:
            for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
                segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, state.data_selector
                segment.type, segment.present, segment.s, segment.g, segment.db = TYPE_DATA, 1, 1, 1, 1
            sregs.cs.type, sregs.cs.selector = TYPE_CODE, state.code_selector
            if state.mode == 64:
                sregs.cs.l, sregs.cs.db = 1, 0
            if state.gdt is not None:
                sregs.gdt.base, sregs.gdt.limit = state.gdt
            sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = state.cr0, state.cr3, state.cr4, state.efer
        self.vcpu.write_sregs(sregs)
        self.vcpu.write_regs(
            ffi.new("struct kvm_regs *", {"rip": state.rip, "rsp": state.rsp, "rdi": state.rdi, "rflags": 2})
        )
        if self._irqchip:  # with one, all vCPUs but the first would wait for INIT and SIPI
            self.vcpu.set_mp_state(MpState.RUNNABLE)

    def registers(self) -> Registers:
        return self.vcpu.registers()

    def special_registers(self) -> SpecialRegisters:
        return self.vcpu.special_registers()

    def close(self) -> None:
        self.vcpu.close()


class KvmMachine:
    """One VM on KVM."""

    def __init__(
        self,
        kvm: Kvm,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        bus_locks: bool,
        cpuids: list[Cpuid],
    ) -> None:
        self.memory = memory
        self.engines: list[KvmEngine] = []
        self._ports = lib.orc_ports_new()
        if self._ports == ffi.NULL:
            raise MemoryError("orc_ports_new")
        try:
            self.vm: KvmVm = kvm.create_vm()
        except BaseException:
            lib.orc_ports_free(self._ports)
            raise
        try:
            self._set_up(kvm, spec, cores, bus_locks, cpuids)
        except BaseException:
            self.close()
            raise

    def _set_up(self, kvm: Kvm, spec: VmSpec, cores: Sequence[VcpuCore], bus_locks: bool, cpuids: list[Cpuid]) -> None:
        vm = self.vm
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
        vm.set_tss_address(TSS_ADDRESS)
        if bus_locks:
            vm.enable_bus_lock_exit()  # before the first vCPU: later ones only would be covered
        if spec.irqchip:
            vm.create_irqchip()
            vm.create_pit()
        for slot, region in enumerate(self.memory.regions):
            span = region.span
            vm.set_memory(slot, span.start, len(span), region.host, region.readonly, region.log_dirty)
        sync_regs = bool(vm.extension(lib.KVM_CAP_SYNC_REGS) & lib.KVM_SYNC_X86_REGS)
        cpuid = cpuids.pop() if cpuids else kvm.supported_cpuid()  # a table belongs to one thread at a time
        try:
            for index, core in enumerate(cores):
                vcpu = vm.create_vcpu(index)
                self.engines.append(KvmEngine(core, vcpu, self._ports, sync_regs, spec.irqchip))
                vcpu.set_cpuid(cpuid.with_apic_id(index))
        finally:
            cpuids.append(cpuid)

    def claim_ports(self, ports: range, claimed: bool) -> None:
        lib.orc_ports_claim(self._ports, ports.start, len(ports), claimed)

    def irq_line(self, gsi: int, level: bool) -> None:
        self.vm.irq_line(gsi, level)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.vm.close()
        lib.orc_ports_free(self._ports)
        self._ports = ffi.NULL


class KvmBackend:
    """The host's KVM. Make one with `KvmBackend.open`."""

    name = "kvm"
    blocking = True

    def __init__(self, kvm: Kvm, why: str) -> None:
        self.kvm = kvm
        self.why = why
        self._cpuids: list[Cpuid] = []

    @classmethod
    def open(cls, path: str = "/dev/kvm", *, picked: bool = False) -> KvmBackend:
        """Open the host's KVM.

        Raises:
            BackendUnavailable: there is none, or it may not be opened, or it is too old.
            ResourceLimit: the program uses the kick's signal otherwise.
        """
        install_signal()
        kvm = Kvm.open(path)
        return cls(kvm, f"kvm, since {path} opens" if picked else "kvm, as asked for")

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

    def create(self, spec: VmSpec, cores: Sequence[VcpuCore], memory: GuestMemory, *, bus_locks: bool) -> KvmMachine:
        try:
            return KvmMachine(self.kvm, spec, cores, memory, bus_locks, self._cpuids)
        except BusLockUnsupported as error:
            raise BusLockUnsupported(f"vm {spec.name!r}: {error}") from None

    def limits_changed(self) -> None:
        """Nothing: the core wakes threads."""

    def max_vcpus(self) -> int:
        return self.kvm.extension(lib.KVM_CAP_MAX_VCPUS) or self.kvm.extension(lib.KVM_CAP_NR_VCPUS) or 4

    def close(self) -> None:
        self.kvm.close()


def cpu_vendor() -> str:
    """The CPU's vendor string, as /proc/cpuinfo has it; empty if it does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""
