"""KVM's first level: the system, /dev/kvm itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from ...model.errors import BackendUnavailable, KvmError, ResourceLimit
from ...native import ffi, lib
from ..registers import new_struct
from .cpuid import Cpuid
from .ioctl import call, failure
from .vm import KvmVm

__all__ = ["Kvm"]

# Without immediate_exit, a signal between the last look at the commands and KVM_RUN would be lost, and the kick with it
# (api.rst, 5: immediate_exit).
_NEEDED = ("KVM_CAP_USER_MEMORY", "KVM_CAP_IMMEDIATE_EXIT")


class Kvm:
    """/dev/kvm, opened and checked; make one with `Kvm.open`. A context manager that closes it.

    VMs live on after it is closed.

    Attributes:
        fd: the file descriptor; -1 once closed.
        vcpu_mmap_size: bytes of a vCPU's ``struct kvm_run`` with what follows it (KVM_GET_VCPU_MMAP_SIZE).
    """

    __slots__ = ("fd", "vcpu_mmap_size")

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        self.fd = fd
        self.vcpu_mmap_size = vcpu_mmap_size

    @classmethod
    def open(cls, path: str | os.PathLike[str] = "/dev/kvm") -> Kvm:
        """Open KVM and check that it is one that orchestra can work with.

        Raises:
            BackendUnavailable: there is none, it may not be opened, it is busy, `path` is something else, or its
                kernel is too old; the message says what to do.
            ResourceLimit: no file descriptor left.
        """
        name = os.fspath(path)
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _unavailable(name, error.errno or 0) from error
        try:
            return cls(fd, _check(fd, name))
        except BaseException:
            os.close(fd)
            raise

    def extension(self, number: int) -> int:
        """What KVM_CHECK_EXTENSION says of capability `number`: 0 for no, 1 for yes, or what the capability defines.

        Where a capability may differ from VM to VM, `KvmVm.extension` is the one to ask.
        """
        return call(self.fd, "KVM_CHECK_EXTENSION", number)

    def capabilities(self) -> dict[str, int]:
        """Every capability that the kernel headers of the build know, by the kernel's name, with its value."""
        values = {}
        index = 0
        while (entry := lib.orc_capabilities[index]).name:
            values[ffi.string(entry.name).decode()] = self.extension(entry.number)
            index += 1
        return values

    def supported_cpuid(self) -> Cpuid:
        """The CPUID that this host's KVM can give a guest (KVM_GET_SUPPORTED_CPUID). Costs some 100 us: ask once."""
        room = 128
        while True:
            buffer = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
            try:
                call(self.fd, "KVM_GET_SUPPORTED_CPUID", buffer)
            except KvmError as error:
                # E2BIG does not say how many entries there are (api.rst, 4.46), so the room is doubled, up to far more
                # than any CPU has.
                if error.errno != errno.E2BIG or room > 1 << 16:
                    raise
                room *= 2
            else:
                return Cpuid(buffer)

    def msr_indices(self) -> tuple[int, ...]:
        """The MSRs that a guest's state consists of (KVM_GET_MSR_INDEX_LIST)."""
        room = 0
        while True:
            msrs: Any = ffi.new("struct kvm_msr_list *", {"nmsrs": room, "indices": room})
            try:
                call(self.fd, "KVM_GET_MSR_INDEX_LIST", msrs)
            except KvmError as error:
                # The kernel wrote how many there are.
                if error.errno != errno.E2BIG or msrs.nmsrs <= room:
                    raise
                room = msrs.nmsrs
            else:
                return tuple(msrs.indices[i] for i in range(msrs.nmsrs))

    def feature_msrs(self, numbers: Iterable[int]) -> dict[int, int]:
        """Which of these MSRs KVM has for guests, with the values that it gives them (KVM_GET_MSRS of the system)."""
        found: dict[int, int] = {}
        if not self.extension(lib.KVM_CAP_GET_MSR_FEATURES):
            return found
        for number in numbers:
            msrs = new_struct("struct kvm_msrs *", {"nmsrs": 1, "entries": [{"index": number}]})
            try:
                if call(self.fd, "KVM_GET_MSRS", msrs):
                    found[number] = int(msrs.entries[0].data)
            except KvmError:
                pass  # EINVAL: it has no such
        return found

    def create_vm(self) -> KvmVm:
        """A VM without memory or vCPUs (KVM_CREATE_VM, of the default type).

        Raises ResourceLimit (no file descriptor or memory left), BackendUnavailable (another hypervisor holds the
        CPU), KvmError.
        """
        return KvmVm(call(self.fd, "KVM_CREATE_VM"), self.vcpu_mmap_size)

    def close(self) -> None:
        """Close /dev/kvm. Done at once if it is closed already."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Kvm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(fd: int, name: str) -> int:
    """Check version and needs; returns the size of a vCPU's mapping."""
    try:
        version = call(fd, "KVM_GET_API_VERSION")
    except KvmError as error:
        raise BackendUnavailable(
            f"{name} is not a KVM device ({os.strerror(error.errno or 0)}): use /dev/kvm (character device 10, 232)"
        ) from error
    # "Applications should refuse to run if KVM_GET_API_VERSION returns a value other than 12" (api.rst, 4.1)
    if version != lib.KVM_API_VERSION:
        raise BackendUnavailable(
            f"{name} speaks version {version} of the KVM API and orchestra needs {lib.KVM_API_VERSION}: "
            "use a Linux kernel from 2.6.22 on"
        )
    for capability in _NEEDED:
        if not call(fd, "KVM_CHECK_EXTENSION", getattr(lib, capability)):
            raise BackendUnavailable(
                f"{name} has no {capability}, which orchestra needs: use a Linux kernel from 4.12 on"
            )
    return call(fd, "KVM_GET_VCPU_MMAP_SIZE")


def _unavailable(name: str, number: int) -> BackendUnavailable | ResourceLimit:
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOTDIR):
        return BackendUnavailable(
            f"{name} does not exist or has no driver: load the kernel module (`modprobe kvm_amd` or `modprobe "
            "kvm_intel`) and enable virtualisation (AMD-V, VT-x) in the firmware; in a virtual machine, switch nested "
            "virtualisation on at its host; in a container, start it with `--device /dev/kvm`"
        )
    if number in (errno.EACCES, errno.EPERM):
        return BackendUnavailable(
            f"no permission to open {name} for reading and writing: join the group that owns it (`sudo usermod -aG kvm "
            "$USER`, then log in again); in a container, start it with `--device /dev/kvm`"
        )
    if number == errno.EBUSY:
        return BackendUnavailable(f"{name} is busy: end the other hypervisor that holds the CPU's virtualisation")
    error = failure(number, f"open {name}")
    if isinstance(error, ResourceLimit):
        return error
    return BackendUnavailable(f"{name} can't be opened ({os.strerror(number)}): check that it is the KVM device")
