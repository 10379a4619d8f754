"""Checks what makes launches slow on this host, and what can keep CPU caps."""

from __future__ import annotations

from collections.abc import Iterator

from ..control.delegation import own_cgroup, why_not
from .files import Host
from .report import Finding

__all__ = ["cpu_caps", "favordynmods", "nx_huge_pages"]


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
