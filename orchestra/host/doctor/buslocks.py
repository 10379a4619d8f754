"""Checks whether bus locks of guests are reported here, and what the kernel does about them before orchestra can."""

from __future__ import annotations

from collections.abc import Iterator

from ...native import lib
from .files import Host
from .report import Finding

__all__ = ["bus_lock_exits", "bus_lock_flags", "split_lock_detect", "split_lock_mitigate"]

_BUS_LOCK_FLAGS = ("split_lock_detect", "bus_lock_detect", "bus_lock_threshold")


def bus_lock_exits(host: Host) -> Iterator[Finding]:
    bits, check = host.bus_lock_bits, "KVM_CAP_X86_BUS_LOCK_EXIT"
    if bits is None:
        yield Finding(check, "note", "unknown", "KVM could not be asked", "see /dev/kvm above")
    elif not bits & lib.KVM_BUS_LOCK_DETECTION_EXIT:
        yield Finding(
            check,
            "note",
            str(bits),
            'KVM can\'t see bus locks here: with backend="kvm", bus_locks="require" refuses to start and "auto" runs '
            "without seeing them; exits can be limited",
            "use an Intel CPU with bus-lock detection (Linux 5.12) or an AMD CPU with Bus Lock Threshold (Linux 6.16); "
            'in a virtual machine, its host must pass the feature on; backend="emulated" sees them on any host',
        )
    else:
        meanings = {
            "AMD": "fault-like: reported before the lock, RIP on the instruction, counts approximate by design",
            "Intel": "trap-like: reported after the lock, RIP on the next instruction, and it may ride on another exit",
        }
        yield Finding(check, "ok", str(bits), f"bus locks are reported; {meanings.get(host.vendor, 'vendor unknown')}")


def bus_lock_flags(host: Host) -> Iterator[Finding]:
    found = [flag for flag in _BUS_LOCK_FLAGS if flag in host.flags]
    if found:
        meaning = "the CPU can detect split or bus locks: the first two in host programs, the last in AMD guests"
        yield Finding("CPU flags", "ok", " ".join(found), meaning)
    else:
        meaning = (
            f"/proc/cpuinfo has none of {', '.join(_BUS_LOCK_FLAGS)}; Intel's detection in guests has no flag there"
        )
        yield Finding("CPU flags", "note", "none", meaning)


def split_lock_detect(host: Host) -> Iterator[Finding]:
    """Documentation/arch/x86/buslock.rst; for guests, handle_guest_split_lock in arch/x86/kernel/cpu/bus_lock.c."""
    check, off = "split_lock_detect", "boot with split_lock_detect=off and let orchestra's limits act"
    mode, value = host.split_lock_mode
    if mode == "off":
        yield Finding(
            check, "ok", value, "the host lets guests' split locks be: orchestra's limits are what acts on them"
        )
    elif not host.acts_on_guests:
        meaning = "acts on host programs at most: this CPU raises nothing for a guest's split lock"
        yield Finding(check, "ok", value, meaning)
    elif mode == "fatal":
        meaning = "a guest's split lock sends SIGBUS to its vCPU thread, which kills the process with every VM in it"
        yield Finding(check, "problem", value, meaning, off)
    elif mode == "ratelimit":
        meaning = (
            "the kernel means to leave guests' split locks alone in this mode, but one that it does notice sends "
            "SIGBUS to the vCPU thread, which kills the process with every VM in it; host programs are slowed"
        )
        yield Finding(check, "note", value, meaning, off)
    elif host.number("proc/sys/kernel/split_lock_mitigate") == 0:
        yield Finding(
            check, "ok", value, "a guest's split lock is logged once and goes on (kernel.split_lock_mitigate=0)"
        )
    else:
        meaning = (
            "each split lock of a guest puts its vCPU thread to sleep for 10 ms, and offenders of the whole host take "
            "turns; a vCPU that is kicked more often than that never gets past the instruction"
        )
        yield Finding(check, "problem", value, meaning, f"`sysctl kernel.split_lock_mitigate=0`, or {off}")


def split_lock_mitigate(host: Host) -> Iterator[Finding]:
    check, value = "kernel.split_lock_mitigate", host.number("proc/sys/kernel/split_lock_mitigate")
    if value is None:
        yield Finding(check, "ok", "absent", "this kernel has no such switch")
    elif value == 0:
        yield Finding(check, "ok", "0", "split_lock_detect=warn only logs")
    elif host.split_lock_mode[0] != "warn" or not host.acts_on_guests:
        yield Finding(check, "ok", str(value), "would act with split_lock_detect=warn, which acts on no guest here")
    else:
        meaning = "split_lock_detect=warn makes the offender sleep for 10 ms per split lock, before orchestra sees it"
        yield Finding(check, "problem", str(value), meaning, "`sysctl kernel.split_lock_mitigate=0`")
