"""One ioctl, with the kernel's answer checked once and turned into the error that fits."""

from __future__ import annotations

import errno
import os
import resource
from typing import Any

from ...model.errors import BackendUnavailable, KvmError, OrchestraError, ResourceLimit, SpecError
from ...native import lib

__all__ = ["call", "failure"]

_orc_ioctl, _orc_ioctl_value = lib.orc_ioctl, lib.orc_ioctl_value


def call(fd: int, name: str, argument: Any = 0) -> int:
    """Do the ioctl that the kernel calls `name`, such as ``"KVM_CREATE_VM"``.

    Parameters:
        fd: of the system, the VM or the vCPU, as the ioctl wants it.
        argument: a number, or a cffi pointer to the structure that the ioctl reads or fills.

    Returns the ioctl's value. Retries by itself what a signal interrupted (EINTR), so it never comes back from a
    KVM_RUN with ``immediate_exit`` set. Raises what `failure` makes of the error.
    """
    if type(argument) is int:
        try:
            result: int = _orc_ioctl_value(fd, getattr(lib, name), argument)
        except OverflowError:
            raise SpecError(f"{name}: {argument!r}: must be an unsigned 64-bit number") from None
    else:
        result = _orc_ioctl(fd, getattr(lib, name), argument)
    if result < 0:
        raise failure(-result, name)
    return result


def failure(number: int, what: str) -> OrchestraError:
    """The exception for errno `number` of the call named `what`: one by situation where there is one."""
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC):
        return ResourceLimit(number, f"{what}: {os.strerror(number)}: {_limit(number)}")
    if number == errno.EBUSY and what == "KVM_CREATE_VM":
        return BackendUnavailable(
            f"{what}: {os.strerror(number)}: another hypervisor holds the CPU's virtualisation (VirtualBox and VMware "
            "do): end its virtual machines or unload its kernel modules"
        )
    return KvmError(number, f"{what}: {os.strerror(number)}")


def _limit(number: int) -> str:
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"RLIMIT_NOFILE allows this process {soft} file descriptors (hard limit {hard}): raise it with `ulimit -n` "
            "or LimitNOFILE= in the systemd unit"
        )
    if number == errno.ENFILE:
        return "the host's fs.file-max is reached: raise it with `sysctl fs.file-max=N`"
    if number == errno.ENOSPC:
        return "KVM's own limit on devices of one kind in a VM (NR_IOBUS_DEVS for ioeventfds) is reached: use fewer"
    return (
        "the kernel is out of memory for this process: look at memory.max of its cgroup and at MemAvailable in "
        "/proc/meminfo"
    )
