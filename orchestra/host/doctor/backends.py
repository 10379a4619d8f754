"""Checks which backends can run guests here, on which kernel and CPU."""

from __future__ import annotations

from collections.abc import Iterator

from ...backend.detection import Asked, pick
from ...backend.emulated import library
from ...backend.kvm.cpu import lacking, missing_features
from ...model.cpu import CPU_TEMPLATES
from ...model.errors import OrchestraError
from ...model.linux import LinuxBoot
from ...native import lib
from .files import Host
from .report import AUTO, Finding

__all__ = [
    "BUS_LOCKS",
    "LINUX",
    "TEMPLATES",
    "cpu",
    "cpu_templates",
    "dev_kvm",
    "kernel",
    "linux",
    "picked",
    "unicorn",
    "virtualised",
]

LINUX = "Linux guests"
TEMPLATES = "CPU templates"
BUS_LOCKS = Asked("bus_locks='require'")


def dev_kvm(host: Host) -> Iterator[Finding]:
    try:
        with host.open_kvm(host.root / "dev/kvm") as kvm:
            host.capabilities = kvm.capabilities()
            host.cpuid = kvm.supported_cpuid().entries()
            host.bus_lock_bits = kvm.extension(lib.KVM_CAP_X86_BUS_LOCK_EXIT)
        host.no_kvm = None
    except OrchestraError as error:
        host.no_kvm = str(error)
        what, _, remedy = str(error).partition(": ")
        meaning = "no VM can run on the kvm backend; the emulated and scripted ones do without"
        yield Finding("/dev/kvm", "problem", what, meaning, remedy)
        return
    modules = [name for name in ("kvm_intel", "kvm_amd") if (host.root / "sys/module" / name).is_dir()]
    value = f"KVM API {lib.KVM_API_VERSION}, {' and '.join(modules) or 'neither kvm_intel nor kvm_amd'}"
    yield Finding("/dev/kvm", "ok", value, "VMs can run on the kvm backend")


def linux(host: Host) -> Iterator[Finding]:
    """Whether `LinuxBoot` is accepted here."""
    if host.no_kvm is not None:
        meaning = "Linux kernels boot on the kvm backend alone"
        yield Finding(LINUX, "note", "no", meaning, "make /dev/kvm work, see there")
    elif missing := missing_features(host.cpuid, LinuxBoot.cpu_features):
        meaning = f"this host's KVM does not give guests the CPU features that Linux needs: {', '.join(missing)}"
        yield Finding(LINUX, "note", "no", meaning, "use a host whose CPU has VT-x or AMD-V, and lends it")
    elif not host.flags & {"vmx", "svm"}:
        meaning = "KVM interprets guests here, as the CPU has neither VT-x nor AMD-V: Linux takes minutes, or fails"
        yield Finding(LINUX, "note", "hardly", meaning, "use a host whose CPU has VT-x or AMD-V, and lends it")
    else:
        yield Finding(LINUX, "ok", "yes", "this host's KVM gives guests all that a Linux kernel needs: LinuxBoot works")


def cpu_templates(host: Host) -> Iterator[Finding]:
    """Which of the built-in CPU templates VMs can have here, and what the nearest that they can't have lacks."""
    if host.no_kvm is not None:
        return
    lost = {name: lacking(host.cpuid, {}, one, True) for name, one in CPU_TEMPLATES.items()}
    here = ", ".join(name for name, missing in lost.items() if not missing)
    others = {name: missing for name, missing in lost.items() if missing}
    if not others:
        yield Finding(TEMPLATES, "ok", here, "VMs can have each of the built-in CPU templates")
        return
    nearest = min(others, key=lambda name: len(others[name]))
    meaning = f"VMs can have these CPU templates; for {nearest} this host's KVM lacks {', '.join(others[nearest])}"
    yield Finding(TEMPLATES, "ok", here, meaning)


def unicorn(host: Host) -> Iterator[Finding]:
    try:
        host.load_unicorn()
        host.no_unicorn = None
    except OrchestraError as error:
        host.no_unicorn = str(error)
        what, _, remedy = str(error).removeprefix("backend='emulated': ").rpartition(": ")
        yield Finding("unicorn", "note", what, "no VM can run on the emulated backend", remedy)
        return
    meaning = "VMs of one vCPU can run on the emulated backend, with every bus lock seen, whatever the host"
    yield Finding("unicorn", "ok", f"{library.version() or 'unknown version'}, loads", meaning)


def picked(host: Host) -> Iterator[Finding]:
    """What `backend="auto"` takes: where bus locks need not be seen, and where they must be."""
    plain, locks = pick(host.found), pick(host.found, BUS_LOCKS)
    if plain.name is None:
        _, unicorn = host.found
        meaning = "neither KVM nor unicorn can be used: no guest can run here"
        yield Finding(AUTO, "problem", "none", meaning, unicorn.remedy)
        return
    yield Finding(AUTO, "ok", plain.name, plain.why.partition(": ")[2])
    check = f"{AUTO}, bus locks"
    if locks.name is None:
        remedy = host.found[1].remedy
        yield Finding(check, "note", "none", f"{locks.why}; orchestra demo shows an exit storm instead", remedy)
    else:
        yield Finding(check, "ok", locks.name, locks.why.partition(": ")[2])


def kernel(host: Host) -> Iterator[Finding]:
    release = host.read("proc/sys/kernel/osrelease") or "unknown"
    needed = {"Intel": (5, 12), "AMD": (6, 16)}.get(host.vendor)
    if host.kernel is None:
        yield Finding("kernel", "note", release, "not a release that can be compared")
    elif needed and host.kernel < needed:
        meaning = f"KVM reports bus locks on {host.vendor} CPUs from Linux {needed[0]}.{needed[1]} on"
        yield Finding(
            "kernel", "note", release, meaning, f"use Linux {needed[0]}.{needed[1]} or newer to limit bus locks"
        )
    else:
        yield Finding("kernel", "ok", release, "new enough to report bus locks where the CPU can")


def cpu(host: Host) -> Iterator[Finding]:
    value = host.cpu.get("model name") or host.cpu.get("vendor_id") or "unknown"
    if not host.vendor:
        yield Finding(
            "CPU", "problem", value, "neither Intel nor AMD", "orchestra runs guests on x86-64 CPUs of those two"
        )
    else:
        yield Finding("CPU", "ok", f"{host.vendor}, {value}", "")


def virtualised(host: Host) -> Iterator[Finding]:
    if "hypervisor" in host.flags:
        meaning = (
            "this host is a virtual machine itself: exits cost more, and the CPU's features are those it was given"
        )
        yield Finding("virtualised", "note", "yes", meaning, "measure, and run production, on bare metal")
    else:
        yield Finding("virtualised", "ok", "no", "exits cost what the CPU makes them cost")
