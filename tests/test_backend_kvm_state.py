"""The parts of a machine's state: what is read can be written back, and what a host lacks is named."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import attrs
import pytest
from hypothesis import given, strategies as st

from orchestra.backend.kvm import part as part_module, state
from orchestra.backend.kvm.part import Part
from orchestra.backend.kvm.state import (
    CLOCK,
    IOAPIC,
    LAPIC,
    NESTED,
    PIC_MASTER,
    PIC_SLAVE,
    PIT,
    SPECIAL,
    SPECIAL2,
    TSC_KHZ,
    TSC_OFFSET,
    XCRS,
    Clock,
)
from orchestra.backend.kvm.system import Kvm
from orchestra.backend.kvm.vcpu import KvmVcpu
from orchestra.backend.kvm.vm import KvmVm
from orchestra.backend.registers import SpecialRegisters2
from orchestra.model.errors import BackendUnavailable, KvmError, KvmUnsupported, SpecError
from orchestra.native import ffi, lib

pytestmark = pytest.mark.kvm
U64 = st.integers(0, (1 << 64) - 1)
PARTS = [part for part in vars(state).values() if isinstance(part, Part)]


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
    """With an irqchip and a PIT."""
    with kvm.create_vm() as created:
        created.create_irqchip()
        created.create_pit()
        yield created


@pytest.fixture
def vcpu(vm) -> Iterator[KvmVcpu]:
    with vm.create_vcpu(0) as created:
        yield created


def supported(part: Part[object], owner: KvmVm | KvmVcpu) -> None:
    if not part.supported(owner):
        pytest.skip(f"{part.name}: this host's KVM has no {part.needs}")


# ---- all of them


def test_parts_are_all_listed_and_have_names_of_their_own():
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert {name for name, part in vars(state).items() if isinstance(part, Part)} <= set(state.__all__)


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_what_is_read_can_be_written_back_and_is_read_again(kvm, vm, vcpu, part):
    owner = vm if part in (CLOCK, PIT, PIC_MASTER, PIC_SLAVE, IOAPIC) else vcpu
    supported(part, owner)
    if part is state.CPUID:
        part.write(owner, kvm.supported_cpuid().entries())
    read = part.read(owner)
    part.write(owner, read)
    if part not in (CLOCK, PIT):  # they have times in them, which pass
        assert part.read(owner) == read


@pytest.mark.parametrize("part", [part for part in PARTS if part.needs], ids=repr)
def test_what_the_host_lacks_is_named(part):
    class Bare:
        fd = -1

        def extension(self, number: int) -> int:
            return 0

    with pytest.raises(KvmUnsupported, match=str(part.needs)) as caught:
        part.require(Bare())
    assert caught.value.errno == errno.EOPNOTSUPP
    assert not part.supported(Bare())


def test_what_the_kernel_refuses_is_explained_by_what_the_host_lacks(vcpu, monkeypatch):
    def refuse(_fd, name, _argument=0):
        raise KvmError(errno.EINVAL, name)

    monkeypatch.setattr(part_module, "call", refuse)
    with pytest.raises(KvmError, match="KVM_GET_XCRS") as caught:
        vcpu.read(XCRS)
    assert not isinstance(caught.value, KvmUnsupported)  # the host has it: it is the kernel's own error
    monkeypatch.setattr(KvmVm, "extension", lambda *_: 0)
    with pytest.raises(KvmUnsupported, match="XCRS: this host's KVM has no KVM_CAP_XCRS"):
        vcpu.read(XCRS)


@pytest.mark.parametrize(
    ("part", "struct"),
    [(LAPIC, "kvm_lapic_state"), (PIT, "kvm_pit_state2"), (PIC_SLAVE, "kvm_irqchip"), (IOAPIC, "kvm_irqchip")],
    ids=repr,
)
def test_opaque_parts_are_as_large_as_the_kernels_headers_say(vm, vcpu, part, struct):
    owner = vcpu if part is LAPIC else vm
    read = part.read(owner)
    assert len(read) == ffi.sizeof(f"struct {struct}")
    for wrong in (b"", read[:-1], read + b"\0"):
        with pytest.raises(SpecError, match=f"{part.name}: {len(wrong)} bytes, must be {len(read)}"):
            part.write(owner, wrong)


# ---- special registers with page-directory pointers


def test_both_ways_to_read_special_registers_agree(vcpu):
    supported(SPECIAL2, vcpu)
    one, two = vcpu.read(SPECIAL), vcpu.read(SPECIAL2)
    common = {field.name for field in attrs.fields(type(one))} & {field.name for field in attrs.fields(type(two))}
    assert {name: getattr(one, name) for name in common} == {name: getattr(two, name) for name in common}
    assert two.pdptrs is None  # it has no 32-bit PAE paging


@given(numbers=st.lists(U64, min_size=4, max_size=4), some=st.booleans())
def test_page_directory_pointers_survive_the_way_through_the_kernels_structure(numbers, some):
    blank = SpecialRegisters2.from_struct(ffi.new("struct kvm_sregs2 *"))
    registers = attrs.evolve(blank, cr3=numbers[0], pdptrs=tuple(numbers) if some else None)
    assert SpecialRegisters2.from_struct(registers.to_struct()) == registers


# ---- the irqchip


def test_the_local_apics_registers_are_at_their_offsets(vm):
    # 0x20: the id, in the upper byte; 0x30: the version, of an integrated APIC (Intel SDM vol. 3, table 11-1)
    with vm.create_vcpu(3) as vcpu:
        read = vcpu.read(LAPIC)
        assert int.from_bytes(read[0x20:0x24], "little") >> 24 == 3
        assert read[0x30] & 0xF0 == 0x10


def test_each_chip_takes_only_its_own_state(vm):
    master = vm.read(PIC_MASTER)
    with pytest.raises(SpecError, match="PIC_SLAVE: chip_id is 0, must be 1"):
        vm.write(PIC_SLAVE, master)


def test_without_an_irqchip_there_is_none_to_read(kvm):
    with kvm.create_vm() as bare, bare.create_vcpu(0) as vcpu:
        for part, owner in ((LAPIC, vcpu), (PIT, bare), (IOAPIC, bare)):
            with pytest.raises(KvmError, match=f"KVM_GET_.*: {'Invalid' if part is LAPIC else 'No such device'}"):
                part.read(owner)


# ---- clocks


def test_the_clock_goes_on_from_where_it_is_set(vm):
    before = vm.read(CLOCK)
    hour = 3_600_000_000_000
    vm.write(CLOCK, Clock(clock=before.clock + hour))
    after = vm.read(CLOCK)
    assert before.clock + hour <= after.clock < before.clock + 2 * hour


def test_a_clock_that_is_set_by_the_time_of_day_has_that_time_in_it(vm):
    before = vm.read(CLOCK)
    if before.realtime is None:
        pytest.skip("this host's KVM does not tell the time of day (KVM_CLOCK_REALTIME)")
    hour = 3_600_000_000_000
    vm.write(CLOCK, Clock(clock=before.clock, realtime=before.realtime - hour))
    assert before.clock + hour <= vm.read(CLOCK).clock < before.clock + 2 * hour


@given(clock=U64, realtime=st.none() | U64)
def test_clocks_survive_the_way_through_the_kernels_structure(clock, realtime):
    made = Clock(clock=clock, realtime=realtime)
    assert Clock.from_struct(made.to_struct()) == made


def test_the_time_stamp_counter_runs_as_fast_as_it_does(vcpu):
    supported(TSC_KHZ, vcpu)
    khz = vcpu.read(TSC_KHZ)
    assert 100_000 < khz < 20_000_000
    vcpu.write(TSC_KHZ, khz)  # what it has anyway, every host can


def test_a_host_that_can_not_scale_the_time_stamp_counter_says_so(vcpu):
    supported(TSC_KHZ, vcpu)
    khz = vcpu.read(TSC_KHZ)
    if vcpu.extension(lib.KVM_CAP_TSC_CONTROL):
        vcpu.write(TSC_KHZ, khz // 2)
        assert vcpu.read(TSC_KHZ) == khz // 2
    else:
        with pytest.raises(KvmUnsupported, match=f"can't scale a guest's clock to {khz // 2} kHz"):
            vcpu.write(TSC_KHZ, khz // 2)


def test_two_vcpus_can_be_given_one_offset(vm, vcpu):
    supported(TSC_OFFSET, vcpu)
    with vm.create_vcpu(1) as other:
        for each in (vcpu, other):
            try:
                each.write(TSC_OFFSET, (1 << 64) - 12345)
            except KvmUnsupported as error:
                pytest.skip(str(error))
            assert each.read(TSC_OFFSET) == (1 << 64) - 12345


def test_an_offset_is_an_unsigned_64_bit_number(vcpu):
    supported(TSC_OFFSET, vcpu)
    with pytest.raises(SpecError, match="must fit"):
        vcpu.write(TSC_OFFSET, -1)


# ---- nested guests


def test_nested_state_of_a_guest_without_one_is_as_short_as_its_header(vcpu):
    supported(NESTED, vcpu)
    assert len(vcpu.read(NESTED)) == ffi.sizeof("struct kvm_nested_state")


def test_a_host_that_can_not_nest_says_so(vcpu):
    if NESTED.supported(vcpu):
        pytest.skip("this host's KVM can nest")
    header = bytes(ffi.buffer(ffi.new("struct kvm_nested_state *", {"size": 128})))
    for access in (lambda: vcpu.read(NESTED), lambda: vcpu.write(NESTED, header)):
        with pytest.raises(KvmUnsupported, match="KVM_CAP_NESTED_STATE"):
            access()


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_nested_state_that_was_cut_short_never_reaches_the_kernel(data, size):
    class CanNest:
        fd = -1

        def extension(self, number: int) -> int:
            return 4096

    header = bytes(ffi.buffer(ffi.new("struct kvm_nested_state *", {"size": size})))
    cut = (header + data)[: len(data)]
    if len(cut) >= len(header) and size <= len(cut):
        with pytest.raises(KvmError, match="Bad file descriptor"):  # it would have been set
            NESTED.write(CanNest(), cut)
    else:
        with pytest.raises(SpecError, match="NESTED_STATE"):
            NESTED.write(CanNest(), cut)


# ---- MSRs


def test_every_msr_that_belongs_to_the_state_can_be_read(kvm, vcpu):
    vcpu.write(state.CPUID, kvm.supported_cpuid().entries())
    indices = kvm.msr_indices()
    assert set(vcpu.msrs(indices)) == set(indices)
