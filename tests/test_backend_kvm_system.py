"""The system level: opening /dev/kvm, what it can do, and which error says what when it can't."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator

import pytest

from orchestra.backend.kvm import system
from orchestra.backend.kvm.cpuid import Cpuid, CpuidEntry
from orchestra.backend.kvm.ioctl import call, failure
from orchestra.backend.kvm.system import Kvm
from orchestra.model.errors import BackendUnavailable, KvmError, ResourceLimit, SpecError
from orchestra.native import lib


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    try:
        opened = Kvm.open()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with opened:
        yield opened


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# ---- opening


def test_a_missing_device_says_how_to_get_one(tmp_path):
    with pytest.raises(BackendUnavailable, match="does not exist") as caught:
        Kvm.open(tmp_path / "kvm")
    for remedy in ("modprobe kvm_amd", "firmware", "nested", "--device /dev/kvm"):
        assert remedy in str(caught.value)


def fail_open(monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(system.os, "open", fails)


def test_a_device_without_permission_names_the_group(monkeypatch):
    fail_open(monkeypatch, errno.EACCES)
    with pytest.raises(BackendUnavailable, match="no permission") as caught:
        Kvm.open()
    assert "usermod -aG kvm" in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take a file's permissions away from itself")
def test_a_real_file_without_permission_is_told_apart_from_a_missing_one(tmp_path):
    node = tmp_path / "kvm"
    node.touch(mode=0o600)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(BackendUnavailable, match="no permission"):
            Kvm.open(node)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.ENODEV, BackendUnavailable, "no driver"),
        (errno.EBUSY, BackendUnavailable, "busy"),
        (errno.EISDIR, BackendUnavailable, "can't be opened"),
        (errno.EMFILE, ResourceLimit, "RLIMIT_NOFILE"),
    ],
)
def test_each_failure_to_open_has_its_own_error(monkeypatch, number, error, words):
    fail_open(monkeypatch, number)
    with pytest.raises(error, match=words):
        Kvm.open()


@pytest.mark.parametrize("path", ["/dev/null", __file__])
def test_something_else_is_not_a_kvm_device_and_is_closed_again(path):
    before = open_fds()
    with pytest.raises(BackendUnavailable, match="not a KVM device"):
        Kvm.open(path)
    assert open_fds() == before


def answer(monkeypatch, answers):
    def fake(_fd, name, argument=0):
        return answers.get((name, argument), answers.get(name, 1))

    monkeypatch.setattr(system, "call", fake)


def test_another_api_version_is_refused(monkeypatch):
    answer(monkeypatch, {"KVM_GET_API_VERSION": 11})
    with pytest.raises(BackendUnavailable, match="version 11 of the KVM API and orchestra needs 12"):
        Kvm.open("/dev/null")


def test_a_kernel_without_immediate_exit_is_refused(monkeypatch):
    answer(monkeypatch, {"KVM_GET_API_VERSION": 12, ("KVM_CHECK_EXTENSION", lib.KVM_CAP_IMMEDIATE_EXIT): 0})
    with pytest.raises(BackendUnavailable, match="KVM_CAP_IMMEDIATE_EXIT"):
        Kvm.open("/dev/null")


# ---- errors of ioctls


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, r"RLIMIT_NOFILE allows this process \d+ .*`ulimit -n`"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOMEM, "out of memory"),
        (errno.ENOSPC, "KVM's own limit"),
    ],
)
def test_an_exhausted_resource_is_named_with_its_limit(number, words):
    error = failure(number, "KVM_CREATE_VCPU")
    assert isinstance(error, ResourceLimit)
    assert error.errno == number
    with pytest.raises(ResourceLimit, match=words):
        raise error


def test_any_other_error_carries_the_ioctls_name_and_errno():
    with pytest.raises(KvmError, match="KVM_GET_API_VERSION: Bad file descriptor") as caught:
        call(-1, "KVM_GET_API_VERSION")
    assert caught.value.errno == errno.EBADF
    assert not isinstance(caught.value, ResourceLimit)


def test_another_hypervisor_in_the_way_is_named():
    error = failure(errno.EBUSY, "KVM_CREATE_VM")
    assert isinstance(error, BackendUnavailable)
    assert "another hypervisor" in str(error)


def test_an_argument_that_is_no_unsigned_number_is_named():
    with pytest.raises(SpecError, match="KVM_CREATE_VCPU: -1"):
        call(0, "KVM_CREATE_VCPU", -1)


# ---- the real one


@pytest.mark.kvm
def test_capabilities_have_the_kernels_names_and_values(kvm):
    capabilities = kvm.capabilities()
    assert capabilities["KVM_CAP_USER_MEMORY"] == 1
    assert capabilities["KVM_CAP_NR_MEMSLOTS"] == kvm.extension(lib.KVM_CAP_NR_MEMSLOTS) > 1
    assert "KVM_CAP_X86_BUS_LOCK_EXIT" in capabilities
    assert len(capabilities) > 100


@pytest.mark.kvm
def test_a_vcpus_mapping_is_whole_pages(kvm):
    assert kvm.vcpu_mmap_size >= 4096
    assert kvm.vcpu_mmap_size % 4096 == 0


@pytest.mark.kvm
def test_the_msr_list_has_the_time_stamp_counter(kvm):
    assert 0x10 in kvm.msr_indices()


@pytest.mark.kvm
def test_supported_cpuid_names_the_vendor(kvm):
    leaf = kvm.supported_cpuid().find(0)
    assert leaf is not None
    vendor = b"".join(word.to_bytes(4, "little") for word in (leaf.ebx, leaf.edx, leaf.ecx))
    assert vendor.isascii()
    assert vendor.strip()


@pytest.mark.kvm
def test_the_cpuid_buffer_grows_until_the_kernel_is_content(kvm, monkeypatch):
    rooms = []

    def stingy(fd, name, argument=0):
        if name == "KVM_GET_SUPPORTED_CPUID":
            rooms.append(argument.nent)
            if argument.nent < 512:
                raise KvmError(errno.E2BIG, name)
        return call(fd, name, argument)

    monkeypatch.setattr(system, "call", stingy)
    assert len(kvm.supported_cpuid()) > 1
    assert rooms == [128, 256, 512]


@pytest.mark.kvm
def test_other_errors_of_the_cpuid_list_are_not_retried(kvm, monkeypatch):
    def fails(_fd, name, _argument=0):
        raise KvmError(errno.EFAULT, name)

    monkeypatch.setattr(system, "call", fails)
    with pytest.raises(KvmError):
        kvm.supported_cpuid()
    with pytest.raises(KvmError):
        kvm.msr_indices()


@pytest.mark.kvm
def test_descriptors_do_not_leak_into_child_processes(kvm):
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        for opened in (kvm, vm, vcpu):
            assert not os.get_inheritable(opened.fd)


@pytest.mark.kvm
def test_closing_twice_is_closing_once(kvm):
    before = open_fds()
    other = Kvm.open()
    other.close()
    other.close()
    assert open_fds() == before
    with pytest.raises(KvmError, match="Bad file descriptor"):
        other.create_vm()


@pytest.mark.kvm
def test_out_of_file_descriptors_names_the_limit_and_leaves_nothing_behind(kvm):
    before = open_fds()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 4, limits[1]))
    opened = []
    try:
        with pytest.raises(ResourceLimit, match=r"KVM_CREATE_VM: .*RLIMIT_NOFILE .*ulimit -n"):
            opened.extend(kvm.create_vm() for _ in range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for vm in opened:
        vm.close()
    assert open_fds() == before


# ---- CPUID


def test_a_cpuid_table_keeps_its_entries():
    entries = [CpuidEntry(function=0, eax=1, ebx=2, ecx=3, edx=4), CpuidEntry(function=7, index=1, flags=1)]
    table = Cpuid.from_entries(entries)
    assert len(table) == 2
    assert table.entries() == entries
    assert table.find(0) == entries[0]
    assert table.find(7, 1) == entries[1]
    assert table.find(7, 0) is None


def test_the_apic_id_is_patched_wherever_a_guest_reads_it_and_nowhere_else():
    table = Cpuid.from_entries(
        [
            CpuidEntry(function=1, ebx=0xAA123456),
            CpuidEntry(function=2, eax=1, ebx=1, ecx=1, edx=1),
            CpuidEntry(function=0xB, index=0, flags=1, edx=9),
            CpuidEntry(function=0xB, index=1, flags=1, edx=9),
            CpuidEntry(function=0x1F, edx=9),
            CpuidEntry(function=0x8000001E, eax=9, ebx=7),
        ]
    )
    assert table.with_apic_id(0x105) is table.buffer  # its low byte is the number of the core as well
    assert table.entries() == [
        CpuidEntry(function=1, ebx=0x05123456),
        CpuidEntry(function=2, eax=1, ebx=1, ecx=1, edx=1),
        CpuidEntry(function=0xB, index=0, flags=1, edx=0x105),
        CpuidEntry(function=0xB, index=1, flags=1, edx=0x105),
        CpuidEntry(function=0x1F, edx=0x105),
        CpuidEntry(function=0x8000001E, eax=0x105, ebx=5),
    ]
    table.with_apic_id(0)
    assert table.find(1).ebx == 0x00123456


def test_a_vcpu_number_below_zero_is_refused():
    with pytest.raises(SpecError, match="index=-1"):
        Cpuid.from_entries([]).with_apic_id(-1)


def test_a_cpuid_value_that_does_not_fit_is_named():
    with pytest.raises(SpecError, match="eax=4294967296"):
        Cpuid.from_entries([CpuidEntry(function=0, eax=1 << 32)])
