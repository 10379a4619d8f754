"""Cache occupancy and memory traffic of the vCPU threads, where the CPU counts them (Intel RDT, AMD QoS) and resctrl is
mounted.

All vCPU threads of a fleet are one monitoring group: a CPU has few of them (RMIDs), and VMs are many. A monitoring
group belongs to a control group, so there is one more where isolated VMs have one of their own.

Source: Documentation/filesystems/resctrl.rst.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import attrs

__all__ = ["CacheCounters", "Resctrl", "home_group"]

FOLDER: Final = Path("/sys/fs/resctrl")
GROUPS: Final = Path("/proc/self/cpu_resctrl_groups")
SIGNALS: Final = {"llc_bytes": "llc_occupancy", "memory_bandwidth": "mbm_total_bytes"}
"""The kernel's name of the file that each signal is read from."""


@attrs.frozen
class CacheCounters:
    """`llc_bytes`: of the last-level caches that are filled with the group's data. `traffic`: bytes from and to memory
    so far. None: not counted here."""

    llc_bytes: int | None = None
    traffic: int | None = None


def home_group(folder: Path = FOLDER, groups: Path = GROUPS) -> Path:
    """The control group that this process is in, and its threads are born in: the root, unless somebody moved it.

    Parameters:
        folder: where resctrl is mounted.
        groups: where the kernel names the groups of this process.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # a kernel without CONFIG_PROC_CPU_RESCTRL
        return folder
    return folder / next((line[4:].strip("/ ") for line in lines if line.startswith("res:")), "")


class Resctrl:
    """The monitoring group of this process's vCPU threads, and that of isolated ones. `close` it.

    Attributes:
        absent: why a signal is missing here, by its name.

    Parameters:
        folder: the control group that the threads are in; the root is where resctrl is mounted.
        name: of the groups; made and removed here.
        isolated: the control group that isolated threads are moved to, if there is one.
    """

    def __init__(self, folder: Path = FOLDER, name: str | None = None, isolated: Path | None = None) -> None:
        self.absent: dict[str, str] = {}
        name = name or f"orchestra-{os.getpid()}-{id(self):x}"
        self._groups = [group / "mon_groups" / name for group in (folder, isolated) if group is not None]
        self._files: dict[str, list[Path]] = {}
        problem = self._open(folder)
        for signal, file in SIGNALS.items():
            pattern = f"mon_data/mon_L3_*/{file}"
            found = [] if problem else [path for group in self._groups for path in sorted(group.glob(pattern))]
            if found:
                self._files[signal] = found
            else:
                self.absent[signal] = problem or f"resctrl: this CPU has no {file}"

    def _open(self, folder: Path) -> str | None:
        if not folder.is_dir():
            return f"{folder} is not there: this kernel, or this CPU, has no resctrl"
        if not (folder / "mon_groups").is_dir():
            mounted = (folder / "schemata").exists()
            return (
                "resctrl: this CPU does not monitor (RDT-M, PQM)"
                if mounted
                else f"resctrl is not mounted: mount -t resctrl resctrl {folder}"
            )
        for group in self._groups:
            try:
                group.mkdir()
            except OSError as error:  # ENOSPC: the CPU has no more groups; EACCES: not root
                # Without those that are isolated, the sum would lack just those that matter.
                self._remove()
                return f"resctrl: no monitoring group can be made ({error})"
        return None

    @property
    def here(self) -> bool:
        """There is something to be read."""
        return bool(self._files)

    def add(self, tid: int, isolated: bool = False) -> None:
        """Count a thread's as well, from now on. One that has ended is left out.

        Parameters:
            isolated: it is in that control group.
        """
        if self._files:
            try:
                (self._groups[isolated] / "tasks").write_text(f"{tid}\n")
            except OSError:
                pass  # it is gone, or in a control group that was made meanwhile

    def read(self) -> CacheCounters:
        values = {signal: self._sum(signal) for signal in SIGNALS}
        return CacheCounters(values["llc_bytes"], values["memory_bandwidth"])

    def _sum(self, signal: str) -> int | None:
        """Over all caches; one whose counter is "Unavailable" or "Error" makes the sum unknown."""
        try:
            return sum(int(path.read_text()) for path in self._files[signal])
        except (KeyError, OSError, ValueError):
            return None

    def close(self) -> None:
        if self._files:
            self._files = {}
            self._remove()

    def _remove(self) -> None:
        for group in self._groups:
            try:
                group.rmdir()
            except OSError:
                pass
