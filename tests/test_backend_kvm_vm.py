"""The VM level: memory, in-kernel devices, capabilities; above all the order in which bus-lock exits can be enabled."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.backend.kvm import vm as vm_module
from orchestra.backend.kvm.system import Kvm
from orchestra.backend.kvm.vm import KvmVm
from orchestra.backend.registers import Registers
from orchestra.model.errors import (
    BackendUnavailable,
    BusLockUnsupported,
    KvmError,
    ResourceLimit,
    SpecError,
    StateError,
)
from orchestra.native import ffi, lib

OFF, EXIT, BUS_LOCK = lib.KVM_BUS_LOCK_DETECTION_OFF, lib.KVM_BUS_LOCK_DETECTION_EXIT, lib.KVM_CAP_X86_BUS_LOCK_EXIT
EXIT_IO, EXIT_HLT, EXIT_MMIO, EXIT_BUS_LOCK = 2, 5, 6, 33
HLT = b"\xf4"


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


class Memory:
    """Anonymous pages with their address."""

    def __init__(self, size: int) -> None:
        self.pages = mmap.mmap(-1, size)
        self.pointer = ffi.from_buffer(self.pages)

    def close(self) -> None:
        ffi.release(self.pointer)
        self.pages.close()


@pytest.fixture
def memory() -> Iterator[Memory]:
    pages = Memory(0x10000)
    yield pages
    pages.close()


def start(vm, memory, code, address=0x1000):
    """A vCPU about to execute 16-bit `code`."""
    memory.pages[address : address + len(code)] = code
    vm.set_memory(0, 0, len(memory.pages), memory.pointer)
    vcpu = vm.create_vcpu(0)

    def real_mode(sregs):
        sregs.cs.base = sregs.cs.selector = 0

    vcpu.update_special(real_mode)
    vcpu.set_registers(Registers(rip=address))
    return vcpu


def run(vcpu):
    assert lib.orc_ioctl_value(vcpu.fd, lib.KVM_RUN, 0) == 0
    return vcpu.run.exit_reason


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def signalled(fd):
    os.set_blocking(fd, False)
    try:
        return int.from_bytes(os.read(fd, 8), "little")
    except BlockingIOError:
        return 0


# ---- bus-lock exits: rules that hold before the kernel is asked


class FakeKernel:
    """Answers KVM_CHECK_EXTENSION with `bits` and remembers what was enabled."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.enabled: list[tuple[int, ...]] = []

    def __call__(self, _fd, name, argument=0):
        if name == "KVM_CHECK_EXTENSION":
            return self.bits if argument == BUS_LOCK else 0
        if name == "KVM_ENABLE_CAP":
            self.enabled.append((argument.cap, *argument.args))
        return 0


@pytest.fixture
def kernel(monkeypatch) -> FakeKernel:
    fake = FakeKernel(OFF | EXIT)
    monkeypatch.setattr(vm_module, "call", fake)
    return fake


@pytest.fixture
def bare() -> KvmVm:
    return KvmVm(-1, 4096)


def test_bus_lock_exits_are_enabled_once_and_remembered(kernel, bare):
    assert not bare.bus_lock_exits
    bare.enable_bus_lock_exit()
    bare.enable_bus_lock_exit()
    assert bare.bus_lock_exits
    assert kernel.enabled == [(BUS_LOCK, EXIT, 0, 0, 0)]


@pytest.mark.parametrize("bits", [0, OFF])
def test_a_host_without_the_exit_bit_is_told_although_the_kernel_would_accept(kernel, bare, bits):
    kernel.bits = bits
    with pytest.raises(BusLockUnsupported, match=f"KVM_CAP_X86_BUS_LOCK_EXIT is {bits}"):
        bare.enable_bus_lock_exit()
    assert not bare.bus_lock_exits
    assert kernel.enabled == []


def test_off_and_exit_together_are_refused_by_name(kernel, bare):
    with pytest.raises(SpecError, match=r"bits=0x3: both of KVM_BUS_LOCK_DETECTION_OFF \(1\) and _EXIT \(2\)"):
        bare.set_bus_lock_detection(OFF | EXIT)
    assert kernel.enabled == []


@pytest.mark.parametrize(("bits", "unknown"), [(4, "0x4"), (EXIT | 0x10, "0x10"), (1 << 63, "0x8000000000000000")])
def test_unknown_bits_are_refused_by_value(kernel, bare, bits, unknown):
    with pytest.raises(SpecError, match=f"{unknown} is not known"):
        bare.set_bus_lock_detection(bits)
    assert kernel.enabled == []


@pytest.mark.parametrize("bits", [0, -1, True, "exit", None])
def test_bits_that_name_no_mode_are_refused(kernel, bare, bits):
    with pytest.raises(SpecError, match="bits="):
        bare.set_bus_lock_detection(bits)
    assert kernel.enabled == []


def test_off_is_how_a_vm_starts(kernel, bare):
    bare.set_bus_lock_detection(OFF)
    assert kernel.enabled == []


def test_there_is_no_way_back_to_off(kernel, bare):
    bare.set_bus_lock_detection(EXIT)
    with pytest.raises(StateError, match="no way to switch them off"):
        bare.set_bus_lock_detection(OFF)
    assert bare.bus_lock_exits


def test_the_general_way_to_enable_capabilities_keeps_to_the_same_rules(kernel, bare):
    with pytest.raises(SpecError, match="both"):
        bare.enable_cap(BUS_LOCK, OFF | EXIT)
    kernel.bits = 0
    with pytest.raises(BusLockUnsupported):
        bare.enable_cap(BUS_LOCK, EXIT)
    for wrong in [(), (EXIT, 0)]:
        with pytest.raises(SpecError, match="one argument"):
            bare.enable_cap(BUS_LOCK, *wrong)
    assert kernel.enabled == []


# ---- bus-lock exits on a kernel


@pytest.mark.kvm
def test_bus_lock_exits_are_refused_once_a_vcpu_exists(vm):
    with vm.create_vcpu(0):
        with pytest.raises(StateError, match="before the VM's first vCPU"):
            vm.enable_bus_lock_exit()
    with pytest.raises(StateError):
        vm.set_bus_lock_detection(EXIT)
    assert not vm.bus_lock_exits


@pytest.mark.kvm
def test_a_host_that_cannot_report_bus_locks_says_so(vm):
    if vm.extension(BUS_LOCK) & EXIT:
        pytest.skip("this host reports bus locks")
    with pytest.raises(BusLockUnsupported, match="this host can't report bus locks"):
        vm.enable_bus_lock_exit()


SPLIT = b"\xf0\x66\xff\x06\x3e\x20" + HLT  # lock inc dword [0x203e]: crosses the line at 0x2040


def bus_locks(vcpu):
    """Run to HLT; how many runs reported a bus lock, by the flag."""
    count = 0
    for _ in range(10):
        reason = run(vcpu)
        count += bool(vcpu.run.flags & lib.KVM_RUN_X86_BUS_LOCK)
        if reason == EXIT_HLT:
            return count
    raise AssertionError("never came to HLT")


@pytest.fixture
def reporting(vm) -> KvmVm:
    if not vm.extension(BUS_LOCK) & EXIT:
        pytest.skip("this host reports no bus locks")
    return vm


@pytest.mark.kvm
@pytest.mark.buslock
def test_a_split_lock_is_reported_once_enabled(reporting, memory):
    reporting.enable_bus_lock_exit()
    reporting.enable_bus_lock_exit()
    assert reporting.bus_lock_exits
    # Twice, since a page's first touch may report one more or one less.
    with start(reporting, memory, SPLIT[:-1] * 2 + HLT) as vcpu:
        assert 1 <= bus_locks(vcpu) <= 3
    assert memory.pages[0x203E] == 2


@pytest.mark.kvm
@pytest.mark.buslock
def test_a_split_lock_is_not_reported_unless_enabled(reporting, memory):
    reporting.set_bus_lock_detection(OFF)
    with start(reporting, memory, SPLIT) as vcpu:
        assert bus_locks(vcpu) == 0
        with pytest.raises(StateError, match="before the VM's first vCPU"):
            reporting.enable_bus_lock_exit()
    assert memory.pages[0x203E] == 1


@pytest.mark.kvm
@pytest.mark.buslock
def test_bus_lock_exits_stay_on_and_cover_each_vcpu_made_later(reporting):
    reporting.enable_bus_lock_exit()
    with pytest.raises(StateError, match="no way to switch them off"):
        reporting.set_bus_lock_detection(OFF)
    with reporting.create_vcpu(0):
        reporting.enable_bus_lock_exit()
    assert reporting.bus_lock_exits


# ---- other capabilities


@pytest.mark.kvm
def test_an_unknown_capability_is_an_error_with_the_ioctls_name(vm):
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP: Invalid argument") as caught:
        vm.enable_cap(99999, 1)
    assert caught.value.errno == errno.EINVAL


def test_too_many_or_unfit_arguments_of_a_capability_are_refused(kernel, bare):
    with pytest.raises(SpecError, match="args"):
        bare.enable_cap(1, 1, 2, 3, 4, 5)
    with pytest.raises(SpecError, match="args"):
        bare.enable_cap(1, -1)
    assert kernel.enabled == []


# ---- memory


@pytest.mark.kvm
def test_a_guest_runs_in_the_memory_it_was_given(vm, memory):
    with start(vm, memory, b"\xb0\x2a\xa2\x00\x30" + HLT) as vcpu:  # mov al, 42; mov [0x3000], al
        assert run(vcpu) == EXIT_HLT
    assert memory.pages[0x3000] == 42


@pytest.mark.kvm
def test_memory_can_be_given_by_its_address_as_a_number(vm, memory):
    vm.set_memory(0, 0, 0x10000, int(ffi.cast("uintptr_t", memory.pointer)))


@pytest.mark.kvm
def test_overlapping_slots_are_refused_and_deleting_one_makes_room(vm, memory):
    vm.set_memory(0, 0, 0x2000, memory.pointer)
    with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION: File exists"):
        vm.set_memory(1, 0x1000, 0x1000, memory.pointer + 0x2000)
    vm.set_memory(0, 0, 0, 0)
    vm.set_memory(1, 0x1000, 0x1000, memory.pointer + 0x2000)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("slot", "address", "size"), [(-1, 0, 4096), (0, -4096, 4096), (0, 0, 1 << 64), (0, "0", 4096)]
)
def test_a_slot_that_is_no_set_of_unsigned_numbers_is_refused(vm, memory, slot, address, size):
    with pytest.raises(SpecError, match="memory slot"):
        vm.set_memory(slot, address, size, memory.pointer)


@pytest.mark.kvm
def test_a_write_to_readonly_memory_comes_as_mmio_and_leaves_it_alone(vm, memory):
    other = Memory(0x1000)
    vm.set_memory(1, 0x10000, 0x1000, other.pointer, readonly=True)
    # mov ax, 0x1000; mov ds, ax; mov byte [0], 7
    with start(vm, memory, b"\xb8\x00\x10\x8e\xd8\xc6\x06\x00\x00\x07" + HLT) as vcpu:
        assert run(vcpu) == EXIT_MMIO
    assert other.pages[0] == 0
    vm.close()
    other.close()


@pytest.mark.kvm
def test_the_dirty_log_has_the_pages_written_since_the_last_look(vm, memory):
    vcpu = start(vm, memory, b"\xa2\x00\x30\xa2\x00\x90" + HLT)  # mov [0x3000], al; mov [0x9000], al
    vm.set_memory(0, 0, 0x10000, memory.pointer, log_dirty=True)
    vm.dirty_log(0)
    assert run(vcpu) == EXIT_HLT
    dirty = int.from_bytes(vm.dirty_log(0), "little")
    assert dirty & (1 << 3 | 1 << 9 | 1 << 4) == 1 << 3 | 1 << 9
    assert vm.dirty_log(0) == bytes(8)
    vcpu.close()


@pytest.mark.kvm
def test_the_dirty_log_of_a_slot_that_was_deleted_or_never_was_is_refused(vm, memory):
    vm.set_memory(0, 0, 0x10000, memory.pointer, log_dirty=True)
    vm.set_memory(0, 0, 0, 0)
    for slot in (0, 5):
        with pytest.raises(SpecError, match=f"slot={slot}"):
            vm.dirty_log(slot)


@pytest.mark.kvm
def test_the_dirty_log_of_a_slot_without_one_is_the_kernels_error(vm, memory):
    vm.set_memory(0, 0, 0x10000, memory.pointer)
    with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG"):
        vm.dirty_log(0)


@pytest.mark.kvm
def test_the_pages_that_intel_hosts_need_can_be_placed(vm):
    vm.set_identity_map_address(0xFFFBC000)
    vm.set_tss_address(0xFFFBD000)
    with pytest.raises(SpecError, match="-1"):
        vm.set_identity_map_address(-1)


# ---- in-kernel devices


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.mark.kvm
def test_a_port_write_signals_its_ioeventfd_without_an_exit(vm, memory, eventfd):
    code = b"\xb0\x07\xba\x00\x06\xee\xb0\x08\xee" + HLT  # al=7, out 0x600; al=8, out 0x600
    vm.ioeventfd(eventfd, 0x600, 1, datamatch=7, pio=True)
    with start(vm, memory, code) as vcpu:
        assert run(vcpu) == EXIT_IO  # the 8 does not match
        assert signalled(eventfd) == 1
        assert run(vcpu) == EXIT_HLT


@pytest.mark.kvm
def test_an_ioeventfd_is_taken_once_and_can_be_given_back(vm, eventfd):
    vm.ioeventfd(eventfd, 0xD0000000, 4)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD: File exists"):
        vm.ioeventfd(eventfd, 0xD0000000, 4)
    vm.ioeventfd(eventfd, 0xD0000000, 4, deassign=True)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD"):
        vm.ioeventfd(eventfd, 0xD0000000, 4, deassign=True)


@pytest.mark.kvm
def test_irqs_need_an_irqchip(vm, eventfd):
    with pytest.raises(KvmError, match="KVM_IRQ_LINE"):
        vm.irq_line(4, True)
    with pytest.raises(KvmError, match="KVM_IRQFD"):
        vm.irqfd(eventfd, 4)
    with pytest.raises(KvmError, match="KVM_CREATE_PIT2"):
        vm.create_pit()


@pytest.mark.kvm
def test_a_line_that_a_thread_sets_while_the_vm_is_closed_reaches_no_other_descriptor():
    with Kvm.open() as kvm:
        for _ in range(20):
            vm = kvm.create_vm()
            vm.create_irqchip()
            begun, failed = threading.Event(), []

            def set_lines(vm: KvmVm = vm, begun: threading.Event = begun, failed: list[object] = failed) -> None:
                try:
                    for i in range(2000):
                        vm.irq_line(4, bool(i & 1))
                        begun.set()
                except KvmError as error:  # of a descriptor that is closed, or somebody else's by now
                    failed.append(error)

            thread = threading.Thread(target=set_lines)
            thread.start()
            assert begun.wait(20)
            vm.close()
            reused = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(3)]
            thread.join()
            for fd in reused:
                os.close(fd)
            assert failed == []


@pytest.mark.kvm
def test_a_line_has_a_number(vm):
    with pytest.raises(SpecError, match="gsi=-1"):
        vm.irq_line(-1, True)


@pytest.mark.kvm
def test_an_irqchip_takes_a_timer_lines_and_irqfds(vm, eventfd):
    resample = os.eventfd(0, os.EFD_CLOEXEC)
    vm.create_irqchip()
    vm.create_pit()
    vm.irq_line(4, True)
    vm.irq_line(4, False)
    vm.irqfd(eventfd, 5)
    vm.irqfd(eventfd, 5, deassign=True)
    vm.irqfd(eventfd, 6, resample_fd=resample)
    vm.irqfd(eventfd, 6, resample_fd=resample, deassign=True)
    os.close(resample)
    with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP: File exists"):
        vm.create_irqchip()


# ---- life and death


@pytest.mark.kvm
def test_statistics_come_from_one_descriptor_that_close_takes_along(vm):
    if not vm.extension(lib.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this kernel has no binary statistics")
    before = open_fds()
    assert vm.statistics()
    assert vm.statistics()
    assert len(open_fds() - before) == 1
    vm.close()
    assert open_fds() < before


@pytest.mark.kvm
def test_two_vcpus_of_one_number_are_refused(vm):
    with vm.create_vcpu(0):
        with pytest.raises(KvmError, match="KVM_CREATE_VCPU"):
            vm.create_vcpu(0)


@pytest.mark.kvm
def test_a_vcpu_that_cannot_be_mapped_is_rolled_back(kvm):
    before = open_fds()
    with KvmVm(kvm.create_vm().fd, 1 << 62) as vm:
        with pytest.raises(ResourceLimit, match="mmap"):
            vm.create_vcpu(0)
    assert open_fds() == before


@pytest.mark.kvm
def test_a_vcpu_beyond_the_descriptor_limit_is_rolled_back(vm):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(ResourceLimit, match=f"KVM_CREATE_VCPU: .*RLIMIT_NOFILE allows this process {lowest_free} "):
            vm.create_vcpu(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    vm.create_vcpu(0).close()


@pytest.mark.kvm
def test_closing_leaves_no_descriptor_and_no_mapping(kvm):
    before, mappings = open_fds(), Path("/proc/self/maps").read_text().count("kvm")
    vm = kvm.create_vm()
    vcpus = [vm.create_vcpu(index) for index in range(2)]
    assert Path("/proc/self/maps").read_text().count("kvm-vcpu") == 2
    assert len(open_fds() - before) == 3
    for opened in (*vcpus, vm, *vcpus, vm):
        opened.close()
    assert open_fds() == before
    assert Path("/proc/self/maps").read_text().count("kvm") == mappings
