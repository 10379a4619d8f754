"""The kvm backend: machines made of KVM's three levels, and engines that run their vCPUs."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final, TypeAlias

import attrs

from ...model.cpu import MSRS, CpuTemplate
from ...model.devices import Irqchip
from ...model.errors import BusLockUnsupported, OrchestraError, SpecError
from ...model.memory import MMIO_HOLE, PAGE
from ...model.spec import VmSpec
from ...model.topology import Topology
from ...native import ffi, lib
from ...native.core import VcpuCore, install_signal, monotonic_ns
from .. import Detection
from ..entry import EntryState
from ..memory import GuestMemory
from ..memory_layout import entries, memory_slots
from ..registers import Registers, SpecialRegisters
from ..threaded import ThreadedEngine
from . import state
from .cpu import lacking, make_cpuid, msr_values, tells_threads
from .cpuid import Cpuid
from .dirty import DirtyLog
from .ioctl import failure
from .masks import features_of, missing_features
from .system import Kvm
from .vcpu import KvmVcpu
from .vm import KvmVm
from .wires import KvmWires

__all__ = ["KvmBackend", "KvmEngine", "KvmMachine", "KvmPlan"]

# Three pages and one below 4 GiB and above the APICs, where every VMM has them (api.rst, KVM_SET_TSS_ADDR).
TSS_ADDRESS: Final = 0xFFFB_D000
IDENTITY_MAP_ADDRESS: Final = 0xFFFB_C000

SLOT: Final = ((1 << 31) - 1) * PAGE
"""Bytes of a memory slot at most (include/linux/kvm_host.h, KVM_MEM_MAX_NR_PAGES: its bitmap of pages must fit)."""

MOST_KINDS: Final = 256
"""Kinds of CPUs that are remembered. A table takes 2 KiB, and users may bring any number of templates."""

IRQCHIPS: Final = {"none": lib.ORC_NO_IRQCHIP, "full": lib.ORC_FULL_IRQCHIP, "split": lib.ORC_SPLIT_IRQCHIP}


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
            pass  # at worst, a guest that does not learn of the pause reports a lockup

    def error(self) -> str:
        number = int(lib.orc_vcpu_errno(self._handle))
        return f"KVM_RUN failed: {errno.errorcode.get(number, number)} ({os.strerror(number)})"

    def registers(self) -> Registers:
        return self.vcpu.read(state.REGISTERS)

    def special_registers(self) -> SpecialRegisters:
        return self.vcpu.read(state.SPECIAL)

    def close(self) -> None:
        self.core.unbind()
        self.vcpu.close()


class KvmPlan:
    """All that the core needs to make a VM without Python, and the machine that comes of it.

    Attributes:
        raw: ``struct orc_plan *``, for ``orc_kvm_build`` or a fleet's builder.

    Parameters:
        tables: where the CPUID table goes once the VM is made.
    """

    def __init__(
        self,
        backend: KvmBackend,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        states: Sequence[EntryState],
        cpuid: Cpuid,
        tables: list[Cpuid],
        bus_locks: bool,
    ) -> None:
        self._backend, self._spec, self._cores, self._memory = backend, spec, cores, memory
        self._cpuid, self._tables = cpuid, tables
        self._slots = slots = memory_slots(memory)
        entry, self._kept = entries(states)
        self._entry = entry
        self._fds, self._runs = ffi.new("int[]", len(cores)), ffi.new("struct kvm_run *[]", len(cores))
        self.raw = plan = ffi.new("struct orc_plan *")
        kvm = backend.kvm
        plan.kvm, plan.bus_locks, plan.irqchip = kvm.fd, bus_locks, IRQCHIPS[spec.irqchip_kind]
        plan.pit = spec.pit
        plan.identity_map, plan.tss, plan.run_size = IDENTITY_MAP_ADDRESS, TSS_ADDRESS, kvm.vcpu_mmap_size
        plan.dirty_ring = spec.backing.dirty_ring or 0
        plan.slots, plan.slot, plan.vcpus, plan.entry = len(slots), slots, len(cores), entry
        plan.cpuid, plan.vcpu, plan.run, plan.vm = cpuid.buffer, self._fds, self._runs, -1

    def make(self) -> None:
        """Make the VM on this thread: `machine` has it."""
        self.raw.result = lib.orc_kvm_build(self.raw)

    def machine(self) -> KvmMachine:
        """The machine, once the VM is made. Once; any thread.

        Raises:
            OrchestraError: what `failure` makes of the step that failed. Everything is given back.
        """
        self._tables.append(self._cpuid)
        machine = KvmMachine(self._memory)
        try:
            self._adopt(machine)
        except BaseException:
            machine.close()
            raise
        return machine

    def _adopt(self, machine: KvmMachine) -> None:
        plan, kvm, slots, fds = self.raw, self._backend.kvm, self._slots, self._fds
        result = int(plan.result)
        if plan.vm >= 0:
            made = range(plan.vcpus_made)
            # Until a `KvmVcpu` has taken them over, nothing else would close these if a step in between raises.
            with ExitStack() as nobodys:
                for index in made:
                    nobodys.callback(os.close, fds[index])
                    nobodys.callback(lib.munmap, self._runs[index], kvm.vcpu_mmap_size)
                vm = KvmVm.adopt(plan.vm, kvm.vcpu_mmap_size, self._memory, bus_lock_exits=bool(plan.bus_locks))
                machine.vm = vm
                vcpus = [KvmVcpu(vm, fds[index], self._runs[index], kvm.vcpu_mmap_size) for index in made]
                nobodys.pop_all()
            # Also after a step that failed: what was made by then gets its owners, so that `close` gives all of it
            # back.
            machine.take(vm, vcpus, self._cores, slots, self._spec.irqchip_kind, self._backend.sync_regs)
            if not result:
                machine.log_dirty(slots, plan.dirty_ring, [fds[index] for index in made])
        if result == -errno.EOPNOTSUPP:
            raise BusLockUnsupported(f"vm {self._spec.name!r}: this host's KVM can't report its bus locks")
        if result:
            step = ffi.string(plan.step).decode()
            raise failure(-result, f"{step} {plan.msr:#x}" if step.endswith("MSR") else step)


class KvmMachine:
    """One VM on KVM."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.engines: list[KvmEngine] = []
        self.vm: KvmVm | None = None
        self.dirty: DirtyLog | None = None
        self.interrupts: Any = None
        self.wires: KvmWires | None = None
        self._slots: Any = None

    def take(
        self,
        vm: KvmVm,
        vcpus: Sequence[KvmVcpu],
        cores: Sequence[VcpuCore],
        slots: Any,
        irqchip: Irqchip,
        sync_regs: bool,
    ) -> None:
        """Take over what the core has made."""
        self.interrupts = vm.interrupts if irqchip == "full" else None
        self.wires = KvmWires(vm, irqchip)
        for core, vcpu in zip(cores, vcpus, strict=False):  # after a step that failed, there may be fewer vCPUs
            self.engines.append(KvmEngine(core, vcpu, sync_regs))
            lib.orc_vcpu_profile_memory(core.handle, slots, len(slots))
        self._slots = slots  # as long as the vCPUs that read code through it

    def log_dirty(self, slots: Any, ring: int, vcpus: Sequence[int]) -> None:
        """Keep the log of the pages that the guest writes."""
        assert self.vm is not None
        self.dirty = DirtyLog(self.vm.fd, slots, ring, vcpus)
        self.memory.on_write = self.dirty.written
        if ring:
            for index, engine in enumerate(self.engines):
                lib.orc_vcpu_set_dirty(engine.core.handle, self.dirty.handle, index)

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
            if self.wires is not None:
                stack.callback(self.wires.close)
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
        self._cpuids: dict[_Kind, list[Cpuid]] = {}
        self._shown: dict[_Kind, frozenset[str]] = {}
        self._supported = kvm.supported_cpuid().entries()
        self._msrs = kvm.feature_msrs(MSRS)
        # api.rst 4.4: KVM_CAP_MAX_VCPUS; without it as many as recommended; without that, 4
        # CPUID 0x80000008, EAX bits 7:0; a CPU without that leaf has 36 (Intel SDM vol. 3, 4.1.4)
        leaf = next((entry for entry in self._supported if entry.function == 0x80000008), None)
        self._address_bits = 36 if leaf is None else leaf.eax & 0xFF
        self._max_vcpus = kvm.extension(lib.KVM_CAP_MAX_VCPUS) or kvm.extension(lib.KVM_CAP_NR_VCPUS) or 4
        # KVM_CHECK_EXTENSION gives the largest ring in bytes, for either capability; a host may have only one of them.
        rings = (lib.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, lib.KVM_CAP_DIRTY_LOG_RING)
        self._most_ring = max(map(kvm.extension, rings)) // ffi.sizeof("struct kvm_dirty_gfn")
        self.sync_regs = bool(kvm.extension(lib.KVM_CAP_SYNC_REGS) & lib.KVM_SYNC_X86_REGS)

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

    def plan(
        self,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        states: Sequence[EntryState],
        *,
        bus_locks: bool,
    ) -> KvmPlan:
        """What the core needs to make that VM. Its owner has to call `KvmPlan.machine` once it is made."""
        # A table belongs to one thread at a time, and making one takes as long as the rest. There is one kind of them
        # for each template and number of vCPUs, and those of a fleet are few.
        kind = _kind(spec)
        tables = self._cpuids.setdefault(kind, [])
        try:
            cpuid = tables.pop()
        except IndexError:
            cpuid = Cpuid.from_entries(make_cpuid(self._supported, *kind))
        if msrs := msr_values(self._msrs, kind[2]):
            states = [attrs.evolve(state, msrs=(*msrs, *state.msrs)) for state in states]
        try:
            return KvmPlan(self, spec, cores, memory, states, cpuid, tables, bus_locks)
        except BaseException:
            tables.append(cpuid)
            raise

    def create(
        self,
        spec: VmSpec,
        cores: Sequence[VcpuCore],
        memory: GuestMemory,
        states: Sequence[EntryState],
        *,
        bus_locks: bool,
    ) -> KvmMachine:
        plan = self.plan(spec, cores, memory, states, bus_locks=bus_locks)
        plan.make()
        return plan.machine()

    def limits_changed(self) -> None:
        """Nothing: the core wakes threads."""

    def refusal(self, spec: VmSpec) -> tuple[str, str] | None:
        """Why this host's KVM can't run that VM, and what to do; None: no reason is known."""
        if spec.vcpus > self._max_vcpus:
            return f"vcpus={spec.vcpus}: this host's KVM allows at most {self._max_vcpus} in a VM", "ask for fewer"
        if refusal := self._no_room(spec):
            return refusal
        if refusal := self._no_such_cpu(spec):
            return refusal
        ring, most = spec.backing.dirty_ring, self._most_ring
        if ring is not None and ring > most:
            what = (
                f"dirty_ring={ring}: this host's KVM allows at most {most} entries"
                if most
                else (f"dirty_ring={ring}: this host's KVM keeps no rings of written pages (Linux 5.11)")
            )
            return what, "leave it out: written pages are then logged in bitmaps"
        wanted = spec.bus_lock_detection
        if wanted is not None and (given := self.bus_lock_detection()) is not None and wanted != given:
            what = f"bus_lock_detection={wanted!r}: this host's CPU reports them {given}"
            return what, "leave it out, or choose with backend='emulated'"
        for capability, needed in _kernel_parts(spec):
            if needed and not self.kvm.extension(getattr(lib, capability)):
                return f"{needed}: this host's KVM has no {capability}", "use Linux 4.5 or newer, on x86-64"
        return None

    def _no_such_cpu(self, spec: VmSpec) -> tuple[str, str] | None:
        """As `refusal`, of the CPU that the guest is to find."""
        needed, kind = spec.boot.cpu_features, _kind(spec)
        template = kind[2]
        if needed and (missing := missing_features(self._supported, needed)):
            what = f"boot: a {type(spec.boot).__name__} needs CPU features that this host's KVM does not give"
            return f"{what}: {', '.join(missing)}", "use a host with them, or a guest that needs less"
        if kind not in self._shown:
            if missing := lacking(self._supported, self._msrs, template, kind[1]):
                what = f"cpu: this host's KVM lacks {', '.join(missing)}, which template {template.name!r} has"
                return what, "use a host with them, or a template that every host of the fleet can show"
            if len(self._shown) >= MOST_KINDS:
                self._shown.clear()
                self._cpuids.clear()
            made = make_cpuid(self._supported, *kind)
            if spec.topology.threads > 1 and not tells_threads(made):
                what = f"topology: threads={spec.topology.threads}: an AMD guest looks for threads if it finds topoext"
                return f"{what}, which this host's KVM lacks or the template hides", "leave threads out"
            self._shown[kind] = features_of(made)
        if missing := [name for name in needed if name not in self._shown[kind]]:
            what = f"boot: a {type(spec.boot).__name__} needs CPU features that template {template.name!r} hides"
            return f"{what}: {', '.join(missing)}", "show them"
        return None

    def _no_room(self, spec: VmSpec) -> tuple[str, str] | None:
        """As `refusal`, of the memory."""
        bits, end = self._address_bits, 1 << self._address_bits
        most = MMIO_HOLE.start + min(SLOT, end - MMIO_HOLE.stop)
        pieces = [(f"memory={spec.backing.size}", span, f"ask for at most {most} bytes") for span in spec.ram]
        for region in spec.regions:
            pieces.append((f"region size={region.size}", region.span, f"put all of the region below {end:#x}"))
        for field, span, remedy in pieces:
            if span.stop > end:
                return f"{field}: would end at {span.stop:#x}, and this host's CPU has {bits} bits of address", remedy
            if len(span) > SLOT:
                what = f"{field}: has {len(span)} bytes in one piece, and KVM takes at most {SLOT}"
                return what, remedy if span in spec.ram else "make it several regions"
        return None

    def check(self, spec: VmSpec) -> None:
        if refusal := self.refusal(spec):
            raise SpecError(f"vm {spec.name!r}: {'; '.join(refusal)}")

    def close(self) -> None:
        self.kvm.close()


_Kind: TypeAlias = tuple[int, bool, CpuTemplate, Topology]
"""What a CPUID table depends on, as `make_cpuid` takes it."""


def _kind(spec: VmSpec) -> _Kind:
    return spec.vcpus, spec.irqchip_kind != "none", spec.cpu_template, spec.topology


def _kernel_parts(spec: VmSpec) -> tuple[tuple[str, str], ...]:
    """Capabilities beyond those that each VM needs, each with what needs it; empty if nothing of this spec does."""
    irqchip, wirings = spec.irqchip_kind, [(type(one).__name__, one.wiring()) for one in spec.machine_devices]
    interrupts = next((name for name, wiring in wirings if wiring.vectors), "")
    bells = next((name for name, wiring in wirings if wiring.doorbells or wiring.pci), "")
    moving = next((name for name, wiring in wirings if wiring.pci), "")
    return (
        ("KVM_CAP_SPLIT_IRQCHIP", 'irqchip="split"' * (irqchip == "split")),
        ("KVM_CAP_IRQ_ROUTING", interrupts and f"the interrupts of {interrupts}"),
        ("KVM_CAP_IRQFD", interrupts and f"the interrupts of {interrupts}"),
        ("KVM_CAP_IOEVENTFD", bells and f"the doorbells of {bells}"),
        ("KVM_CAP_IOEVENTFD_ANY_LENGTH", moving and f"the doorbells of {moving}"),
    )


def cpu_vendor() -> str:
    """The CPU's vendor string, as /proc/cpuinfo has it; empty if it does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""
