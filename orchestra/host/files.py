"""Files of this host that say what it has: of /proc and /sys, and of the cgroups that this process is in."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

__all__ = ["Files"]


class Files:
    """A file that can't be read is empty.

    Parameters:
        root: where /proc and /sys are looked for.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def read(self, path: str) -> str:
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except (OSError, ValueError):
            return ""

    def number(self, path: str) -> int | None:
        text = self.read(path)
        # 20 digits hold every number of 64 bits.
        return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None

    @cached_property
    def cgroup_mounts(self) -> list[tuple[str, str, set[str]]]:
        """Each cgroup file system: mount point, type and options (/proc/self/mountinfo, proc(5))."""
        mounts = []
        for line in self.read("proc/self/mountinfo").splitlines():
            left, _, right = line.partition(" - ")
            before, after = left.split(), right.split()
            if len(before) > 5 and len(after) > 2 and after[0] in ("cgroup", "cgroup2"):
                mounts.append((before[4], after[0], {*before[5].split(","), *after[2].split(",")}))
        return mounts

    def cgroup_folders(self, controller: str) -> list[str]:
        """This process's cgroup for that controller, and those above it, the innermost first."""
        folders = []
        for line in self.read("proc/self/cgroup").splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            for mount, kind, options in self.cgroup_mounts:
                unified = kind == "cgroup2" and not controllers
                if unified or (controller in controllers.split(",") and controller in options):
                    parts = [part for part in path.split("/") if part]
                    folders += ["/".join((mount, *parts[:depth])) for depth in range(len(parts), -1, -1)]
        return folders

    def cgroup_values(self, controller: str, file: str) -> list[int]:
        """The numbers in `file` of this process's cgroup and of those above it ("max" is none)."""
        values = [self.number(f"{folder}/{file}") for folder in self.cgroup_folders(controller)]
        return [value for value in values if value is not None]
