"""How much memory this host can give this process: ever, and now.

Sources: proc_meminfo(5); Documentation/admin-guide/cgroup-v2.rst ("Memory"), cgroup-v1/memory.rst.
"""

from __future__ import annotations

import re
from typing import Final

import attrs

from ..files import Files

__all__ = ["Bound", "MemoryRoom", "memory_room"]

NO_LIMIT: Final = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2**63."""

VERSIONS: Final = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""The limit and the use of a cgroup, in versions 2 and 1."""


@attrs.frozen
class Bound:
    """Bytes, and who says so."""

    size: int
    by: str


@attrs.frozen
class MemoryRoom:
    """The tightest bounds; None: nothing is known.

    Attributes:
        most: what this process can have, if nobody else has any.
        free: what it can have now without swapping. Files in the page cache count as free.
    """

    most: Bound | None
    free: Bound | None


def memory_room(files: Files | None = None) -> MemoryRoom:
    """Look at the host, and at each cgroup that this process is in."""
    files = files or Files()
    meminfo = {name: int(kb) << 10 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", files.read("proc/meminfo"), re.M)}
    swap = meminfo.get("SwapTotal", 0)
    most, free = [], []
    if "MemTotal" in meminfo:
        most.append(Bound(meminfo["MemTotal"] + swap, "MemTotal and SwapTotal of /proc/meminfo"))
    if "MemAvailable" in meminfo:
        free.append(Bound(meminfo["MemAvailable"], "MemAvailable of /proc/meminfo"))
    for folder in files.cgroup_folders("memory"):
        for limit_file, used_file in VERSIONS:
            limit, used = files.number(f"{folder}/{limit_file}"), files.number(f"{folder}/{used_file}")
            if limit is None or limit >= NO_LIMIT:
                continue
            by = f"{limit_file} of {folder}"
            swapped = files.number(f"{folder}/memory.swap.max")
            most.append(Bound(limit + (swap if swapped is None else min(swap, swapped)), by))
            if used is not None:
                free.append(Bound(max(0, limit - used + _reclaimable(files.read(f"{folder}/memory.stat"))), by))
    return MemoryRoom(*(min(bounds, key=lambda bound: bound.size, default=None) for bounds in (most, free)))


def _reclaimable(statistics: str) -> int:
    """Pages of files that the kernel drops when a cgroup is full. Version 1 has sums over its children as well."""
    found = dict(re.findall(r"^(?:total_)?(inactive_file|active_file) (\d+)$", statistics, re.M))
    return sum(map(int, found.values()))
