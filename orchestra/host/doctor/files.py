"""The files of this host that the checks read: of /proc, /sys, /dev and /usr. A file that can't be read is empty."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from ...backend.detection import Found
from ...backend.kvm.cpuid import CpuidEntry
from ...backend.kvm.system import Kvm
from ...native import lib
from ..files import Files

__all__ = ["Host"]


class Host(Files):
    """The files that the checks read; a file that can't be read is empty."""

    def __init__(
        self,
        root: Path,
        open_kvm: Callable[[Path], Kvm],
        importable: Callable[[str], bool],
        load_unicorn: Callable[[], object],
    ) -> None:
        super().__init__(root)
        self.open_kvm = open_kvm
        self.importable = importable
        self.load_unicorn = load_unicorn
        self.capabilities: dict[str, int] = {}
        self.cpuid: list[CpuidEntry] = []  # what KVM can give guests
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
        """The mode (off, warn, fatal or ratelimit), and its text as set. An unknown text counts as "warn", as in the
        kernel."""
        settings = re.findall(r"(?:^|\s)split_lock_detect=(\S+)", self.read("proc/cmdline"))
        if not self.flags & {"split_lock_detect", "bus_lock_detect"}:
            return "off", "off (the CPU has no detection for host programs)"
        # Of several the last counts (cmdline_find_option in arch/x86/lib/cmdline.c).
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

    @property
    def nx_huge_pages(self) -> str:
        return self.read("sys/module/kvm/parameters/nx_huge_pages")

    @property
    def favoured(self) -> bool:
        return any("favordynmods" in options for _, _, options in self.cgroup_mounts)

    @property
    def favour(self) -> str:
        """The command that switches favordynmods on; any mount counts for the whole host."""
        mount = min(self.cgroup_mounts, key=lambda mount: mount[1] != "cgroup2")[0]
        return f"`mount -o remount,favordynmods {mount}`"
