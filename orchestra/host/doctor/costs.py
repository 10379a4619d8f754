"""Checks what makes launches and event loops slow on this host, and what can keep CPU caps."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...native import lib
from ..control.delegation import own_cgroup, why_not
from .files import Host
from .report import Finding

__all__ = ["cpu_caps", "favordynmods", "loop_priority", "nx_huge_pages"]


def nx_huge_pages(host: Host) -> Iterator[Finding]:
    check, value = "kvm.nx_huge_pages", host.nx_huge_pages
    if value == "never":
        yield Finding(check, "ok", value, "a VM starts without a recovery thread of its own")
    elif host.favoured or not host.cgroup_mounts:
        yield Finding(check, "ok", value or "unknown", "a VM's recovery thread starts fast here")
    else:
        meaning = (
            "each VM starts a recovery thread and moves it into a cgroup: KVM_CREATE_VM can take 27 ms instead of 0.35"
        )
        remedy = (
            f"{host.favour}, or the module parameter kvm.nx_huge_pages=never where the CPU has no iTLB multihit bug"
        )
        yield Finding(check, "note", value or "unknown", meaning, remedy)


def favordynmods(host: Host) -> Iterator[Finding]:
    check = "cgroup favordynmods"
    if not host.cgroup_mounts:
        yield Finding(check, "ok", "no cgroups", "nothing slows the start of a VM")
    elif host.favoured:
        yield Finding(check, "ok", "on", "moving a thread into a cgroup is fast, and so is starting a VM")
    elif host.nx_huge_pages == "never":
        yield Finding(check, "ok", "off", "no matter: with kvm.nx_huge_pages=never a VM starts no thread of KVM's")
    else:
        meaning = "moving a thread into a cgroup waits for RCU, and KVM does that for each VM"
        yield Finding(check, "note", "off", meaning, host.favour)


def cpu_caps(host: Host) -> Iterator[Finding]:
    check, folder = "CPU caps by cgroup", own_cgroup(host.root)
    instead = 'the run loop keeps CPU caps (the default), and needs nothing for it; cap_by="cgroup" does not work'
    if folder is None:
        remedy = "systemd.unified_cgroup_hierarchy=1 on the kernel's command line gives one"
        yield Finding(check, "note", "no cgroup of version 2", instead, remedy)
    elif obstacle := why_not(folder):
        yield Finding(check, "note", obstacle.what, instead, obstacle.remedy)
    else:
        yield Finding(check, "ok", str(folder), 'cap_by="cgroup" can have the kernel keep CPU caps')


def loop_priority(host: Host) -> Iterator[Finding]:
    """Whether the thread of a fleet may have its nice value (`host.control.priority`; setrlimit(2), RLIMIT_NICE)."""
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)", host.read("proc/self/status"), re.MULTILINE)
    capable = found is not None and bool(int(found[1], 16) >> lib.CAP_SYS_NICE & 1)
    soft, hard = host.limit("Max nice priority")
    check, wanted = "event loop's priority", lib.ORC_LOOP_NICE
    least = 20 - wanted  # RLIMIT_NICE counts the other way round
    if capable or (soft or 0) >= least:
        why = "CAP_SYS_NICE" if capable else f"RLIMIT_NICE {soft}"
        meaning = "the event loop runs before guests that keep all CPUs busy"
        yield Finding(check, "ok", f"nice {wanted} ({why})", meaning)
    else:
        value = f"nice 0 (no CAP_SYS_NICE; RLIMIT_NICE {soft or 0}, hard limit {hard})"
        meaning = "beside guests that keep all CPUs busy the event loop waits for each of them, 3 to 20 ms"
        remedy = f"`ulimit -e {least}`, or LimitNICE={wanted} in the systemd unit"
        yield Finding(check, "note", value, meaning, remedy)
