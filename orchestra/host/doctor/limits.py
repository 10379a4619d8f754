"""Checks how many VMs and vCPUs this process has room for: files, threads, memory, mappings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...model.spec import GiB, MiB
from .files import Host
from .report import Finding, Status

__all__ = ["mappings", "memory", "open_files", "threads"]

FDS_PER_VM = 4
"""Of a VM with one vCPU: the VM, the vCPU, and up to two eventfds."""
MAPPINGS_PER_VM = 6
"""Of a VM with one vCPU: its RAM, ``kvm_run``, the thread's stack with its guard, and two to spare."""
FDS_OF_THE_PROGRAM = 32


def _sized(check: str, value: str, room: int, unit: str, remedy: str) -> Finding:
    """A finding about a limit. `room`: the number of VMs with one vCPU, or of vCPUs, that the limit has room for."""
    status: Status = "problem" if room < 10 else "note" if room < 1000 else "ok"
    return Finding(check, status, value, f"room for about {max(room, 0)} {unit}", "" if status == "ok" else remedy)


_VMS = "VMs with one vCPU in this process"
_VCPUS = "vCPUs, each of which has a thread"


def open_files(host: Host) -> Iterator[Finding]:
    soft, hard = host.limit("Max open files")
    if soft is None:
        yield Finding(
            "RLIMIT_NOFILE", "ok", f"unlimited or unknown, hard limit {hard}", f"a VM takes about {FDS_PER_VM}"
        )
    else:
        room = (soft - FDS_OF_THE_PROGRAM) // FDS_PER_VM
        remedy = "raise it with `ulimit -n`, or LimitNOFILE= in the systemd unit"
        yield _sized("RLIMIT_NOFILE", f"{soft}, hard limit {hard}", room, _VMS, remedy)


def threads(host: Host) -> Iterator[Finding]:
    soft, hard = host.limit("Max processes")
    if soft is None:
        yield Finding("RLIMIT_NPROC", "ok", f"unlimited or unknown, hard limit {hard}", "a vCPU takes a thread")
    else:
        remedy = "raise it with `ulimit -u`, or LimitNPROC= in the systemd unit"
        yield _sized("RLIMIT_NPROC", f"{soft}, hard limit {hard}", soft, _VCPUS, remedy)
    most = host.number("proc/sys/kernel/threads-max")
    if most is None:
        yield Finding("kernel.threads-max", "note", "unknown", "could not be read")
    else:
        yield _sized("kernel.threads-max", str(most), most, _VCPUS, "raise it with `sysctl kernel.threads-max=N`")
    limits = host.cgroup_values("pids", "pids.max")
    if limits:
        remedy = "raise TasksMax= of the systemd unit, or pids.max of the cgroup"
        yield _sized("cgroup pids.max", str(min(limits)), min(limits), _VCPUS, remedy)
    else:
        yield Finding("cgroup pids.max", "ok", "no limit", "the cgroup does not bound the threads")


def memory(host: Host) -> Iterator[Finding]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", host.read("proc/meminfo"), re.MULTILINE)
    if not found:
        yield Finding("memory available", "note", "unknown", "could not be read")
    else:
        available = int(found[1]) * 1024
        low = available < 256 * MiB
        meaning = "guests take memory as they touch it, all of their size at most"
        remedy = "end other programs, or run fewer or smaller guests" if low else ""
        yield Finding("memory available", "problem" if low else "ok", f"{available / GiB:.1f} GiB", meaning, remedy)
    values = [value for file in ("memory.max", "memory.limit_in_bytes") for value in host.cgroup_values("memory", file)]
    limits = [value for value in values if value < 1 << 60]  # cgroup v1 writes "no limit" as a number near 2**63
    if limits:
        meaning = "guests beyond it are killed by the kernel, with this whole process"
        status: Status = "problem" if min(limits) < 256 * MiB else "note"
        yield Finding(
            "cgroup memory.max", status, f"{min(limits) / GiB:.1f} GiB", meaning, "raise MemoryMax= or memory.max"
        )
    else:
        yield Finding("cgroup memory.max", "ok", "no limit", "the cgroup does not bound the guests' memory")
    overcommit = host.number("proc/sys/vm/overcommit_memory")
    if overcommit == 2:
        meaning = (
            "strict accounting: a guest's whole memory is reserved when it starts, and starts fail when that runs out"
        )
        yield Finding(
            "vm.overcommit_memory", "note", "2", meaning, "`sysctl vm.overcommit_memory=0` to let guests share"
        )
    else:
        meaning = "guests may be promised more memory than there is, as long as they don't touch it all"
        yield Finding("vm.overcommit_memory", "ok", "unknown" if overcommit is None else str(overcommit), meaning)


def mappings(host: Host) -> Iterator[Finding]:
    most = host.number("proc/sys/vm/max_map_count")
    if most is None:
        yield Finding("vm.max_map_count", "note", "unknown", "could not be read")
    else:
        remedy = "raise it with `sysctl vm.max_map_count=N`"
        yield _sized("vm.max_map_count", str(most), most // MAPPINGS_PER_VM, _VMS, remedy)
