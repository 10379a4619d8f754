"""The vCPU level: each part of its state can be read and written, and close leaves nothing."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator

import attrs
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from orchestra.backend.kvm import state, vcpu as vcpu_module
from orchestra.backend.kvm.cpuid import CpuidEntry
from orchestra.backend.kvm.ioctl import call
from orchestra.backend.kvm.state import CPUID, DEBUG, EVENTS, FPU, MP_STATE, REGISTERS, SPECIAL, XCRS, XSAVE
from orchestra.backend.kvm.system import Kvm
from orchestra.backend.kvm.vcpu import KvmVcpu
from orchestra.backend.kvm.vm import KvmVm
from orchestra.backend.registers import DebugRegisters, DescriptorTable, MpState, Registers, Segment, SpecialRegisters
from orchestra.model.errors import BackendUnavailable, KvmError, SpecError, StateError
from orchestra.native import ffi, lib

pytestmark = pytest.mark.kvm

EXIT_DEBUG, EXIT_HLT = 4, 5
U64 = st.integers(0, (1 << 64) - 1)


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    try:
        opened = Kvm.open()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture
def vm(kvm) -> Iterator[KvmVm]:
    with kvm.create_vm() as created:
        yield created


@pytest.fixture
def vcpu(vm) -> Iterator[KvmVcpu]:
    with vm.create_vcpu(0) as created:
        yield created


@pytest.fixture
def guest(vm, vcpu) -> Iterator[mmap.mmap]:
    """64 KiB for the vCPU, which starts at 0x1000 in real mode."""
    pages = mmap.mmap(-1, 0x10000)
    pointer = ffi.from_buffer(pages)
    vm.set_memory(0, 0, len(pages), pointer)
    enter_real_mode(vcpu, 0x1000)
    yield pages
    vm.set_memory(0, 0, 0, 0)
    ffi.release(pointer)
    pages.close()


def enter_real_mode(vcpu, rip):
    special = vcpu.read(SPECIAL)
    vcpu.write(SPECIAL, attrs.evolve(special, cs=attrs.evolve(special.cs, base=0, selector=0)))
    vcpu.write(REGISTERS, Registers(rip=rip))


def run(vcpu):
    assert lib.orc_ioctl_value(vcpu.fd, lib.KVM_RUN, 0) == 0
    return vcpu.run.exit_reason


# ---- registers


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(U64, min_size=17, max_size=17))
def test_general_registers_come_back_as_they_were_set(vcpu, values):
    names = [field.name for field in attrs.fields(Registers) if field.name != "rflags"]
    registers = Registers(**dict(zip(names, values, strict=True)))
    vcpu.write(REGISTERS, registers)
    assert vcpu.read(REGISTERS) == registers


@pytest.mark.parametrize("value", [-1, 1 << 64, "1", None])
def test_a_register_that_is_no_unsigned_64_bit_number_is_named(vcpu, value):
    with pytest.raises(SpecError, match="r9="):
        vcpu.write(REGISTERS, Registers(r9=value))


def test_special_registers_come_back_as_they_were_set(vcpu):
    read = vcpu.read(SPECIAL)
    changed = attrs.evolve(
        read,
        ds=attrs.evolve(read.ds, base=0x12340, selector=0x1234),
        gdt=DescriptorTable(base=0x5000, limit=0x17),
        cr2=0xABC000,
    )
    assert changed != read
    vcpu.write(SPECIAL, changed)
    assert vcpu.read(SPECIAL) == changed


def test_a_special_register_that_does_not_fit_is_named(vcpu):
    read = vcpu.read(SPECIAL)
    with pytest.raises(SpecError, match="gdt="):
        vcpu.write(SPECIAL, attrs.evolve(read, gdt=DescriptorTable(limit=1 << 16)))
    with pytest.raises(SpecError, match="cs="):
        vcpu.write(SPECIAL, attrs.evolve(read, cs=Segment(type=-1)))
    with pytest.raises(SpecError, match="interrupt_bitmap="):
        vcpu.write(SPECIAL, attrs.evolve(read, interrupt_bitmap=(0,) * 5))


def test_a_state_that_no_cpu_can_be_in_is_the_kernels_error(vcpu):
    impossible = attrs.evolve(vcpu.read(SPECIAL), cr0=0x8000_0000, cr4=0)  # paging without protection
    with pytest.raises(KvmError, match="KVM_SET_SREGS: Invalid argument"):
        vcpu.write(SPECIAL, impossible)


@given(numbers=st.lists(U64, min_size=7, max_size=7), bits=st.integers(0, 255), base=U64)
def test_special_registers_survive_the_way_through_the_kernels_structure(numbers, bits, base):
    segment = Segment(base=base, limit=base & 0xFFFFFFFF, selector=base & 0xFFFF, type=bits, g=1, l=1)
    names = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
    registers = SpecialRegisters(
        **dict.fromkeys(("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"), segment),
        gdt=DescriptorTable(base=base, limit=bits),
        idt=DescriptorTable(base=base, limit=bits),
        **dict(zip(names, numbers, strict=True)),
        interrupt_bitmap=(1, 2, 3, base),
    )
    assert SpecialRegisters.from_struct(registers.to_struct()) == registers


def test_debug_registers_come_back_as_they_were_set(vcpu):
    registers = DebugRegisters(db=(0x1000, 0x2000, 0, 0xFFFF_FFFF), dr6=0xFFFF0FF1, dr7=0x401)
    vcpu.write(DEBUG, registers)
    assert vcpu.read(DEBUG) == registers
    with pytest.raises(SpecError, match="db="):
        vcpu.write(DEBUG, DebugRegisters(db=(0, 0, 0, -1)))


# ---- CPUID and MSRs


def test_cpuid_comes_back_as_it_was_set(kvm, vcpu):
    table = kvm.supported_cpuid()
    vcpu.write(CPUID, table.entries())
    got = {(entry.function, entry.index): entry for entry in vcpu.read(CPUID)}
    assert got[(0, 0)] == table.find(0)
    lost = [entry for entry in table.entries() if (entry.function, entry.index) not in got]
    assert not any(entry.eax | entry.ebx | entry.ecx | entry.edx for entry in lost)  # some hosts keep no empty leaf
    assert len(got) == len(table) - len(lost)


def test_a_guest_reads_its_number_from_cpuid(kvm, vm, vcpu, guest):
    guest[0x1000:0x1009] = b"\x66\xb8\x01\x00\x00\x00\x0f\xa2\xf4"  # mov eax, 1; cpuid; hlt
    table = kvm.supported_cpuid()
    table.with_apic_id(0x2A)
    vcpu.write(CPUID, table.entries())
    assert run(vcpu) == EXIT_HLT
    assert vcpu.read(REGISTERS).rbx >> 24 == 0x2A


def test_too_many_cpuid_entries_are_the_kernels_error(vcpu):
    with pytest.raises(KvmError, match="KVM_SET_CPUID2: Argument list too long"):
        vcpu.write(CPUID, [CpuidEntry(function=0)] * 300)


SYSENTER_CS, SYSENTER_ESP, NO_MSR = 0x174, 0x175, 0xDEAD


def test_msrs_come_back_as_they_were_set(vcpu):
    values = {SYSENTER_ESP: 0x7777, SYSENTER_CS: 0x10}
    vcpu.set_msrs(values)
    assert vcpu.msrs(values) == values
    assert vcpu.msrs([]) == {}


def test_the_first_msr_that_is_refused_is_named(vcpu):
    with pytest.raises(KvmError, match="KVM_SET_MSRS: MSR 0xdead refused, number 2 of 3") as caught:
        vcpu.set_msrs({SYSENTER_CS: 0x20, NO_MSR: 1, SYSENTER_ESP: 0x99})
    assert caught.value.errno == errno.EINVAL
    assert vcpu.msrs([SYSENTER_CS, SYSENTER_ESP]) == {SYSENTER_CS: 0x20, SYSENTER_ESP: 0}
    with pytest.raises(KvmError, match="KVM_GET_MSRS: MSR 0xdead"):
        vcpu.msrs([NO_MSR])


def test_more_msrs_than_one_call_takes_are_split(vcpu):
    vcpu.set_msrs({SYSENTER_CS: 0x30})
    assert vcpu.msrs([SYSENTER_CS] * 600) == {SYSENTER_CS: 0x30}
    with pytest.raises(KvmError, match="number 601 of 601"):
        vcpu.msrs([SYSENTER_CS] * 600 + [NO_MSR])


def test_an_msr_value_that_does_not_fit_is_refused(vcpu):
    with pytest.raises(SpecError, match="entries="):
        vcpu.set_msrs({SYSENTER_CS: 1 << 64})


# ---- opaque state


@pytest.mark.parametrize("part", [FPU, XSAVE, EVENTS], ids=repr)
def test_opaque_state_can_be_read_and_written_back(vcpu, part):
    read = vcpu.read(part)
    assert isinstance(read, bytes)
    vcpu.write(part, read)
    assert vcpu.read(part) == read


@pytest.mark.parametrize("part", [FPU, XSAVE, EVENTS], ids=repr)
def test_opaque_state_of_another_size_is_refused(vcpu, part):
    read = vcpu.read(part)
    for wrong in (b"", read[:-1], read + b"\0"):
        with pytest.raises(SpecError, match=f"{len(wrong)} bytes, must be {len(read)}"):
            vcpu.write(part, wrong)


def test_the_extended_state_is_as_large_as_the_kernel_says(vm, vcpu):
    assert len(vcpu.read(XSAVE)) == max(4096, vm.extension(lib.KVM_CAP_XSAVE2))


@pytest.mark.parametrize(("says", "size", "ioctl"), [(0, 4096, "KVM_GET_XSAVE"), (11008, 11008, "KVM_GET_XSAVE2")])
def test_a_larger_extended_state_is_read_by_the_newer_ioctl(vcpu, monkeypatch, says, size, ioctl):
    monkeypatch.setattr(KvmVm, "extension", lambda *_: says)
    asked = []
    monkeypatch.setattr(state, "call", lambda _fd, name, area: asked.append((name, ffi.sizeof(area))))
    assert len(vcpu.read(XSAVE)) == size
    assert asked == [(ioctl, size)]


def test_xcr0_comes_back_as_it_was_set(vcpu):
    xcrs = vcpu.read(XCRS)
    assert xcrs[0] & 1
    vcpu.write(XCRS, xcrs)
    assert vcpu.read(XCRS) == xcrs
    with pytest.raises(KvmError, match="KVM_SET_XCRS"):
        vcpu.write(XCRS, {0: 1 << 62 | 1})
    with pytest.raises(SpecError, match="xcrs="):
        vcpu.write(XCRS, dict.fromkeys(range(17), 1))


# ---- state, debugging, the clock


def test_a_vcpu_without_an_irqchip_is_runnable_and_cannot_be_halted_from_outside(vcpu):
    assert vcpu.read(MP_STATE) is MpState.RUNNABLE
    vcpu.write(MP_STATE, MpState.RUNNABLE)
    with pytest.raises(KvmError, match="KVM_SET_MP_STATE"):
        vcpu.write(MP_STATE, MpState.SIPI_RECEIVED)


def test_with_an_irqchip_the_second_vcpu_waits_to_be_started(vm):
    vm.create_irqchip()
    with vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
        assert first.read(MP_STATE) is MpState.RUNNABLE
        assert second.read(MP_STATE) is MpState.UNINITIALIZED
        second.write(MP_STATE, MpState.HALTED)
        assert second.read(MP_STATE) is MpState.HALTED


def test_a_single_stepped_guest_stops_after_each_instruction(vcpu, guest):
    guest[0x1000:0x1003] = b"\x90\x90\xf4"
    vcpu.guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
    assert run(vcpu) == EXIT_DEBUG
    assert vcpu.read(REGISTERS).rip == 0x1001
    vcpu.guest_debug(0)
    assert run(vcpu) == EXIT_HLT
    with pytest.raises(SpecError, match="debugreg"):
        vcpu.guest_debug(0, [0] * 9)


def test_a_guest_without_kvmclock_is_not_told_of_the_pause(vcpu):
    assert vcpu.kvmclock_ctrl() is False


def test_a_guest_with_kvmclock_is_told_of_the_pause(vcpu, monkeypatch):
    asked = []
    monkeypatch.setattr(vcpu_module, "call", lambda _fd, name: asked.append(name))
    assert vcpu.kvmclock_ctrl() is True
    assert asked == ["KVM_KVMCLOCK_CTRL"]


def test_the_clocks_other_errors_are_errors(vm):
    closed = vm.create_vcpu(0)
    closed.close()
    with pytest.raises(KvmError, match="KVM_KVMCLOCK_CTRL: Bad file descriptor"):
        closed.kvmclock_ctrl()


def test_statistics_count_what_the_guest_did(vm, vcpu, guest):
    if not vm.extension(lib.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this kernel has no binary statistics")
    guest[0x1000] = 0xF4
    before = vcpu.statistics()["exits"].value
    assert run(vcpu) == EXIT_HLT
    assert vcpu.statistics()["exits"].value > before


# ---- the shared page and the end


def test_the_run_structure_shows_the_last_exit(vcpu, guest):
    guest[0x1000] = 0xF4
    assert vcpu.run.immediate_exit == 0
    assert run(vcpu) == EXIT_HLT
    assert vcpu.run.exit_reason == EXIT_HLT


def test_after_close_there_is_no_run_structure_to_touch(vm):
    vcpu = vm.create_vcpu(0)
    vcpu.close()
    vcpu.close()
    with pytest.raises(StateError, match="closed"):
        _ = vcpu.run
    with pytest.raises(KvmError) as caught:
        vcpu.read(REGISTERS)
    assert caught.value.errno == errno.EBADF


def test_a_vcpu_outlives_the_descriptors_it_came_from(kvm):
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
    with vcpu:
        assert vcpu.read(REGISTERS).rip == 0xFFF0
        assert call(vcpu.fd, "KVM_GET_REGS", Registers().to_struct()) == 0
