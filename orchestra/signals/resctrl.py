"""Cache occupancy and memory traffic of the vCPU threads, where the CPU counts them (Intel RDT, AMD QoS) and resctrl is
mounted.

All vCPU threads of a fleet are one monitoring group: a CPU has few of them (RMIDs), and VMs are many.

Source: Documentation/filesystems/resctrl.rst.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import attrs

__all__ = ["CacheCounters", "Resctrl"]

FOLDER: Final = Path("/sys/fs/resctrl")
SIGNALS: Final = {"llc_bytes": "llc_occupancy", "memory_bandwidth": "mbm_total_bytes"}
"""The kernel's name of the file that each signal is read from."""


@attrs.frozen
class CacheCounters:
    """`llc_bytes`: of the last-level caches that are filled with the group's data. `traffic`: bytes from and to memory
    so far. None: not counted here."""

    llc_bytes: int | None = None
    traffic: int | None = None


class Resctrl:
    """The monitoring group of this process's vCPU threads. `close` it.

    Attributes:
        absent: why a signal is missing here, by its name.

    Parameters:
        folder: where resctrl is mounted.
        name: of the group; made and removed here.
    """

    def __init__(self, folder: Path = FOLDER, name: str | None = None) -> None:
        self.absent: dict[str, str] = {}
        self._group = folder / "mon_groups" / (name or f"orchestra-{os.getpid()}-{id(self):x}")
        self._files: dict[str, list[Path]] = {}
        problem = self._open(folder)
        for signal, file in SIGNALS.items():
            found = [] if problem else sorted(self._group.glob(f"mon_data/mon_L3_*/{file}"))
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
        try:
            self._group.mkdir()
        except OSError as error:  # ENOSPC: the CPU has no more groups; EACCES: not root
            return f"resctrl: no monitoring group can be made ({error})"
        return None

    @property
    def here(self) -> bool:
        """There is something to be read."""
        return bool(self._files)

    def add(self, tid: int) -> None:
        """Count a thread's as well, from now on. One that has ended is left out."""
        if self._files:
            try:
                (self._group / "tasks").write_text(f"{tid}\n")
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
            try:
                self._group.rmdir()
            except OSError:
                pass
