"""The cgroup that this process lives in, and whether single threads can be capped below it. Reads only.

Sources: Documentation/admin-guide/cgroup-v2.rst ("Threads", "Delegation"); proc_pid_cgroup(5), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import attrs

__all__ = ["Obstacle", "own_cgroup", "why_not"]

ROOT: Final = Path("/")


@attrs.frozen
class Obstacle:
    """Why something can't be done, and what to do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def own_cgroup(root: Path = ROOT) -> Path | None:
    """This process's version-2 cgroup; None: there is none, or its file system is not mounted.

    Parameters:
        root: where /proc and the mount are looked for.
    """
    named = (line[3:] for line in _read(root / "proc/self/cgroup").splitlines() if line.startswith("0::"))
    inside = next(named, None)
    if inside is None:
        return None
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) > 4 and right.split(" ")[0] == "cgroup2":
            top = fields[3].rstrip("/")  # what of the hierarchy is mounted there
            if f"{inside}/".startswith(f"{top}/"):
                return root / f"{fields[4]}{inside[len(top) :]}".lstrip("/")
    return None


def why_not(folder: Path, tid: int | None = None) -> Obstacle | None:
    """What keeps threads of this process from being capped by cgroups below this one; None: nothing that can be seen.

    Parameters:
        folder: of the cgroup that this process lives in.
        tid: one of its threads, to make sure; None: it is known.
    """
    threads = folder / "cgroup.threads"
    enabled = _read(folder / "cgroup.subtree_control").split()
    offered = _read(folder / "cgroup.controllers")
    if not (folder / "cgroup.controllers").exists():
        remedy = "name the version-2 cgroup that this process lives in (/proc/self/cgroup), below /sys/fs/cgroup"
        return Obstacle(f"{folder} is no cgroup of version 2", remedy)
    if tid is not None and str(tid) not in _read(threads).split():
        remedy = "start it there, as threads move only within the domain of their process; or leave cgroup= out"
        return Obstacle(f"this process does not live in {folder}", remedy)
    if not (os.access(folder, os.W_OK | os.X_OK) and os.access(threads, os.W_OK)):
        remedy = "have it delegated (Delegate=cpu in the systemd unit, `systemd-run --user --scope -p Delegate=cpu`)"
        return Obstacle(f"this process may not make cgroups in {folder}", remedy)
    if "cpu" not in enabled and "cpu" in offered.split():
        remedy = f"`echo +cpu > {folder}/cgroup.subtree_control` before the fleet is opened"
        return Obstacle(f"{folder} does not hand on the cpu controller", remedy)
    if "cpu" not in enabled:
        remedy = "enable it in those above (+cpu in cgroup.subtree_control, Delegate=cpu); version 1 must not have it"
        return Obstacle(f"{folder} has no cpu controller", remedy)
    return None
