"""What this host can do for orchestra, and what to change where it could do more. Reads only, and never raises.

One check after the other, each a few lines: what was found, what follows, what to do.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs

from ..backend.detection import DETECTION, Asked, Found, Pick, pick
from ..backend.emulated import library
from ..backend.kvm.system import Kvm
from ..model.errors import OrchestraError
from ..model.extras import install
from ..model.spec import GiB, MiB
from ..native import lib
from .control.delegation import own_cgroup, why_not

__all__ = ["Finding", "Report", "Verdict", "examine"]

Status: TypeAlias = Literal["ok", "note", "problem"]

FDS_PER_VM = 4
"""Of a VM with one vCPU: the VM, the vCPU, and up to two eventfds."""
MAPPINGS_PER_VM = 6
"""Of a VM with one vCPU: its RAM, ``kvm_run``, the thread's stack with its guard, and two to spare."""
FDS_OF_THE_PROGRAM = 32

_EXTRAS = {
    "cli": ("cyclopts", "rich"),
    "emulated": ("unicorn",),
    "parquet": ("pyarrow",),
    "plot": ("matplotlib",),
    "profile": ("iced_x86", "elftools"),
    "rules": ("cattrs",),
    "simulate": ("numpy", "cattrs"),
    "testing": ("pytest", "pytest_trio"),
}
AUTO = 'backend="auto"'
"""The check that is a problem where no guest can run at all."""
BUS_LOCKS = Asked("bus_locks='require'")
_BUS_LOCK_FLAGS = ("split_lock_detect", "bus_lock_detect", "bus_lock_threshold")


@attrs.frozen
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what, such as "RLIMIT_NOFILE".
        status: "ok"; "note" (works, and you should know); "problem" (something will not work, or will hurt).
        value: what was found.
        meaning: what follows from it.
        remedy: what to do, empty where there is nothing to do.
    """

    check: str
    status: Status
    value: str
    meaning: str
    remedy: str = ""


@attrs.frozen
class Verdict:
    """The findings in three sentences.

    Attributes:
        can: what this host can do.
        auto: what `backend="auto"` takes where nobody needs bus locks, and why.
        auto_bus_locks: what it takes where somebody does.
        todo: the one most important thing to do.
    """

    can: str
    auto: Pick
    auto_bus_locks: Pick
    todo: str

    @property
    def lines(self) -> tuple[str, str, str]:
        """For a person."""
        plain, locks = self.auto, self.auto_bus_locks
        if plain.name is None:
            takes = f"takes none: {plain.why}"
        elif plain.name == locks.name:
            takes = f"takes {locks.why}"
        elif locks.name is None:
            takes = f"takes {plain.why}; where bus locks are needed, it takes none"
        else:
            takes = f"takes {plain.name}, and where bus locks are needed {locks.why}"
        return f"{self.can}.", f'backend="auto" {takes}.', f"{self.todo}."

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**attrs.asdict(self), "lines": list(self.lines)}


@attrs.frozen
class Report:
    """What `examine` found; `capabilities` has KVM's by the kernel's names (empty without /dev/kvm)."""

    findings: tuple[Finding, ...]
    capabilities: dict[str, int]
    verdict: Verdict | None = None

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == "problem")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "findings": [attrs.asdict(finding) for finding in self.findings],
            "capabilities": dict(self.capabilities),
        }


def examine(
    root: Path = Path("/"),
    *,
    open_kvm: Callable[[Path], Kvm] = Kvm.open,
    importable: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
    load_unicorn: Callable[[], object] = library.load,
) -> Report:
    """Look at everything that decides what orchestra can do on this host.

    Parameters:
        root: where /proc, /sys, /dev and /usr are looked for.
        open_kvm: how KVM is opened.
        importable: whether a Python module of that name can be imported.
        load_unicorn: how the emulated backend's library is loaded.
    """
    host = _Host(root, open_kvm, importable, load_unicorn)
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings += check(host)
        except Exception as error:  # a broken check must not hide what the others found
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(Finding(name, "note", "unknown", f"could not be looked at: {error!r}"))
    return Report(tuple(findings), host.capabilities, _verdict(host, findings))


def _verdict(host: _Host, findings: list[Finding]) -> Verdict:
    kvm, unicorn = host.found
    auto, locks = pick(host.found), pick(host.found, BUS_LOCKS)
    names = [name for name, one in (("on KVM", kvm), ("on the emulated backend", unicorn)) if one.opens]
    if not names:
        can = "This host can run no guest: neither KVM nor the emulated backend works"
    else:
        sees = "on both" if len(names) == 2 and kvm.bus_locks else "there" if len(names) == 1 else f"only {names[-1]}"
        seen = f"bus locks are seen {sees}" if locks.name else "bus locks can't be seen, exits can be limited"
        can = f"This host can run guests {' and '.join(names)}; {seen}"
    return Verdict(can, auto, locks, _todo(kvm, findings))


def _todo(kvm: Found, findings: list[Finding]) -> str:
    """The worst that has a remedy: what keeps all guests from running, the other problems, a KVM without bus locks."""
    first = [finding for finding in findings if finding.check == AUTO]
    for finding in (*first, *findings):
        if finding.status == "problem" and finding.remedy:
            return f"First of all, {finding.check}: {finding.remedy}"
    if not kvm.bus_locks:
        return f"Nothing has to be done. To see bus locks on KVM, {DETECTION}"
    return "Nothing has to be done"


class _Host:
    """The files that the checks read; what can't be read is empty."""

    def __init__(
        self,
        root: Path,
        open_kvm: Callable[[Path], Kvm],
        importable: Callable[[str], bool],
        load_unicorn: Callable[[], object],
    ) -> None:
        self.root = root
        self.open_kvm = open_kvm
        self.importable = importable
        self.load_unicorn = load_unicorn
        self.capabilities: dict[str, int] = {}
        self.bus_lock_bits: int | None = None
        self.no_kvm: str | None = "not looked at"
        self.no_unicorn: str | None = "not looked at"

    @property
    def found(self) -> tuple[Found, Found]:
        """The backends, for `pick`."""
        seen = bool((self.bus_lock_bits or 0) & lib.KVM_BUS_LOCK_DETECTION_EXIT)
        return (
            Found("kvm", bus_locks=seen) if self.no_kvm is None else Found.closed("kvm", self.no_kvm),
            Found("emulated") if self.no_unicorn is None else Found.closed("emulated", self.no_unicorn),
        )

    def read(self, path: str) -> str:
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except (OSError, ValueError):
            return ""

    def number(self, path: str) -> int | None:
        text = self.read(path)
        return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None

    @cached_property
    def cpu(self) -> dict[str, str]:
        """The first processor of /proc/cpuinfo."""
        pairs = (line.partition(":") for line in self.read("proc/cpuinfo").split("\n\n")[0].splitlines())
        return {key.strip(): value.strip() for key, _, value in pairs}

    @property
    def flags(self) -> frozenset[str]:
        return frozenset(self.cpu.get("flags", "").split())

    @property
    def vendor(self) -> str:
        names = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "HygonGenuine": "AMD"}
        return names.get(self.cpu.get("vendor_id", ""), "")

    @property
    def kernel(self) -> tuple[int, int] | None:
        found = re.match(r"(\d{1,9})\.(\d{1,9})", self.read("proc/sys/kernel/osrelease"))
        return (int(found[1]), int(found[2])) if found else None

    @cached_property
    def split_lock_mode(self) -> tuple[str, str]:
        """off, warn, fatal or ratelimit; and as it was set. Like the kernel, takes what it does not know for "warn"."""
        settings = re.findall(r"(?:^|\s)split_lock_detect=(\S+)", self.read("proc/cmdline"))
        if not self.flags & {"split_lock_detect", "bus_lock_detect"}:
            return "off", "off (the CPU has no detection for host programs)"
        mode = settings[-1].partition(":")[0] if settings else ""
        if mode in ("off", "warn", "fatal", "ratelimit"):
            return mode, settings[-1]
        return "warn", f"warn (default; {settings[-1]!r} is no setting)" if settings else "warn (default)"

    @property
    def acts_on_guests(self) -> bool:
        """Split locks of guests raise #AC in the host: only on Intel CPUs that detect split locks (not bus locks)."""
        return self.vendor == "Intel" and "split_lock_detect" in self.flags

    def limit(self, name: str) -> tuple[int | None, str]:
        """Soft limit (None: unlimited or unknown) and the hard one as text, from /proc/self/limits."""
        found = re.search(rf"^{name}\s+(\S+)\s+(\S+)", self.read("proc/self/limits"), re.MULTILINE)
        if not found:
            return None, "unknown"
        return (int(found[1]) if found[1].isdecimal() else None), found[2]

    @cached_property
    def cgroup_mounts(self) -> list[tuple[str, str, set[str]]]:
        """Of each cgroup file system: where, its type, its options (/proc/self/mountinfo, proc(5))."""
        mounts = []
        for line in self.read("proc/self/mountinfo").splitlines():
            left, _, right = line.partition(" - ")
            before, after = left.split(), right.split()
            if len(before) > 5 and len(after) > 2 and after[0] in ("cgroup", "cgroup2"):
                mounts.append((before[4], after[0], {*before[5].split(","), *after[2].split(",")}))
        return mounts

    @property
    def nx_huge_pages(self) -> str:
        return self.read("sys/module/kvm/parameters/nx_huge_pages")

    @property
    def favoured(self) -> bool:
        return any("favordynmods" in options for _, _, options in self.cgroup_mounts)

    @property
    def favour(self) -> str:
        """How to switch it on; the mount counts for the whole host, whichever it is."""
        mount = min(self.cgroup_mounts, key=lambda mount: mount[1] != "cgroup2")[0]
        return f"`mount -o remount,favordynmods {mount}`"

    def cgroup_values(self, controller: str, file: str) -> list[int]:
        """The numbers in `file` of this process's cgroup and of those above it ("max" is none)."""
        values = []
        for line in self.read("proc/self/cgroup").splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            for mount, kind, options in self.cgroup_mounts:
                unified = kind == "cgroup2" and not controllers
                if unified or (controller in controllers.split(",") and controller in options):
                    parts = [part for part in path.split("/") if part]
                    for depth in range(len(parts), -1, -1):
                        value = self.number("/".join((mount, *parts[:depth], file)))
                        if value is not None:
                            values.append(value)
        return values


# ---- KVM and the CPU


def _dev_kvm(host: _Host) -> Iterator[Finding]:
    try:
        with host.open_kvm(host.root / "dev/kvm") as kvm:
            host.capabilities = kvm.capabilities()
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


def _unicorn(host: _Host) -> Iterator[Finding]:
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


def _picked(host: _Host) -> Iterator[Finding]:
    """What runs if nobody chooses: where nobody needs bus locks, and where somebody does."""
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


def _kernel(host: _Host) -> Iterator[Finding]:
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


def _cpu(host: _Host) -> Iterator[Finding]:
    value = host.cpu.get("model name") or host.cpu.get("vendor_id") or "unknown"
    if not host.vendor:
        yield Finding(
            "CPU", "problem", value, "neither Intel nor AMD", "orchestra runs guests on x86-64 CPUs of those two"
        )
    else:
        yield Finding("CPU", "ok", f"{host.vendor}, {value}", "")


def _virtualised(host: _Host) -> Iterator[Finding]:
    if "hypervisor" in host.flags:
        meaning = (
            "this host is a virtual machine itself: exits cost more, and the CPU's features are those it was given"
        )
        yield Finding("virtualised", "note", "yes", meaning, "measure, and run production, on bare metal")
    else:
        yield Finding("virtualised", "ok", "no", "exits cost what the CPU makes them cost")


# ---- bus locks


def _bus_lock_exits(host: _Host) -> Iterator[Finding]:
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


def _bus_lock_flags(host: _Host) -> Iterator[Finding]:
    found = [flag for flag in _BUS_LOCK_FLAGS if flag in host.flags]
    if found:
        meaning = "the CPU can detect split or bus locks: the first two in host programs, the last in AMD guests"
        yield Finding("CPU flags", "ok", " ".join(found), meaning)
    else:
        meaning = (
            f"/proc/cpuinfo has none of {', '.join(_BUS_LOCK_FLAGS)}; Intel's detection in guests has no flag there"
        )
        yield Finding("CPU flags", "note", "none", meaning)


def _split_lock_detect(host: _Host) -> Iterator[Finding]:
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


def _split_lock_mitigate(host: _Host) -> Iterator[Finding]:
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


# ---- what launching costs


def _nx_huge_pages(host: _Host) -> Iterator[Finding]:
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


def _favordynmods(host: _Host) -> Iterator[Finding]:
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


def _cpu_caps(host: _Host) -> Iterator[Finding]:
    check, folder = "CPU caps by cgroup", own_cgroup(host.root)
    instead = 'the run loop keeps CPU caps (the default), and needs nothing for it; cap_by="cgroup" does not work'
    if folder is None:
        remedy = "systemd.unified_cgroup_hierarchy=1 on the kernel's command line gives one"
        yield Finding(check, "note", "no cgroup of version 2", instead, remedy)
    elif obstacle := why_not(folder):
        yield Finding(check, "note", obstacle.what, instead, obstacle.remedy)
    else:
        yield Finding(check, "ok", str(folder), 'cap_by="cgroup" can have the kernel keep CPU caps')


# ---- limits


def _sized(check: str, value: str, room: int, unit: str, remedy: str) -> Finding:
    """A finding about a limit that leaves room for so many VMs with one vCPU, or vCPUs."""
    status: Status = "problem" if room < 10 else "note" if room < 1000 else "ok"
    return Finding(check, status, value, f"room for about {max(room, 0)} {unit}", "" if status == "ok" else remedy)


_VMS = "VMs with one vCPU in this process"
_VCPUS = "vCPUs, each of which has a thread"


def _open_files(host: _Host) -> Iterator[Finding]:
    soft, hard = host.limit("Max open files")
    if soft is None:
        yield Finding(
            "RLIMIT_NOFILE", "ok", f"unlimited or unknown, hard limit {hard}", f"a VM takes about {FDS_PER_VM}"
        )
    else:
        room = (soft - FDS_OF_THE_PROGRAM) // FDS_PER_VM
        remedy = "raise it with `ulimit -n`, or LimitNOFILE= in the systemd unit"
        yield _sized("RLIMIT_NOFILE", f"{soft}, hard limit {hard}", room, _VMS, remedy)


def _threads(host: _Host) -> Iterator[Finding]:
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


def _memory(host: _Host) -> Iterator[Finding]:
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


def _mappings(host: _Host) -> Iterator[Finding]:
    most = host.number("proc/sys/vm/max_map_count")
    if most is None:
        yield Finding("vm.max_map_count", "note", "unknown", "could not be read")
    else:
        remedy = "raise it with `sysctl vm.max_map_count=N`"
        yield _sized("vm.max_map_count", str(most), most // MAPPINGS_PER_VM, _VMS, remedy)


# ---- software


def _headers(host: _Host) -> Iterator[Finding]:
    text = host.read("usr/include/linux/kvm.h")
    if not text:
        remedy = "install linux-libc-dev (Debian, Ubuntu) or kernel-headers (Fedora)"
        yield Finding("kernel headers", "note", "missing", "needed only to build orchestra from source", remedy)
    elif "KVM_CAP_X86_BUS_LOCK_EXIT" not in text:
        meaning = "orchestra can't be built from source with headers from before Linux 5.12"
        yield Finding("kernel headers", "note", "too old", meaning, "install those of a newer kernel")
    else:
        yield Finding("kernel headers", "ok", "/usr/include/linux/kvm.h", "orchestra can be built from source")


def _extras(host: _Host) -> Iterator[Finding]:
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if not host.importable(name)]
        if missing:
            remedy = f"`{install(extra)}`"
            yield Finding(
                f"extra {extra}", "note", f"{', '.join(missing)} missing", "that part is not available", remedy
            )
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(modules), "installed")


_CHECKS: tuple[Callable[[_Host], Iterator[Finding]], ...] = (
    _dev_kvm,
    _unicorn,
    _picked,
    _kernel,
    _cpu,
    _virtualised,
    _bus_lock_exits,
    _bus_lock_flags,
    _split_lock_detect,
    _split_lock_mitigate,
    _nx_huge_pages,
    _favordynmods,
    _cpu_caps,
    _open_files,
    _threads,
    _memory,
    _mappings,
    _headers,
    _extras,
)
