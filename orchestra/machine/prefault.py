"""Whether the host can give a VM its memory, before anything is made; and taking it all at launch.

Guests may be promised more than the host has: a page is taken when it is first touched. So of a VM that takes its
memory as it needs it, only what can't ever be is refused: more than the host's memory and swap, or than a cgroup's, for
this VM alone. (The kernel's own heuristic refuses the same, but not of memory that is mapped with MAP_NORESERVE.) A VM
that takes its memory at launch (`Memory.prefault`) is refused if that much is not free then. Huge pages are reserved
when they are mapped, and refused there (`backend/memory`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from ..backend.memory import GuestMemory, Part
from ..host.observe.room import MemoryRoom, memory_room
from ..model.errors import ResourceLimit
from ..model.memory import MiB
from ..model.spec import VmSpec
from .workers import Workers

__all__ = ["Claim", "check_room", "claim", "is_small", "populate"]

SMALL: Final = 64 * MiB
"""No host lacks that for one VM, so that launches of small VMs need not read the host's files."""

STEP: Final = 32 * MiB
"""Bytes that a worker thread takes at once, about 10 ms: as long as that a launch that is cancelled waits."""


def size_of(spec: VmSpec) -> int:
    return spec.backing.size + sum(region.size for region in spec.regions)


class Claim:
    """What a launch is about to take of the host's memory, in bytes, so that other launches don't count on it.

    Parameters:
        workers: of the fleet, with the sum of all claims.
    """

    def __init__(self, workers: Workers, size: int) -> None:
        self.left = size
        self._workers = workers
        workers.claimed += size

    @property
    def others(self) -> int:
        """What other launches are about to take."""
        return self._workers.claimed - self.left

    @property
    def room(self) -> MemoryRoom:
        """What the host has. Any thread."""
        return memory_room(self._workers.host)

    def taken(self, size: int) -> None:
        """The host has given that much."""
        size = min(size, self.left)
        self.left -= size
        self._workers.claimed -= size


@contextmanager
def claim(workers: Workers, spec: VmSpec) -> Iterator[Claim]:
    """For the time of a launch. Fleet's thread."""
    upfront = spec.backing.prefault and not spec.backing.huge_pages  # huge pages are not of the free memory
    made = Claim(workers, size_of(spec) if upfront else 0)
    try:
        yield made
    finally:
        made.taken(made.left)


def is_small(spec: VmSpec) -> bool:
    """Whether `check_room` has nothing to read, as every host has room for the VM; and its memory is no file."""
    backing = spec.backing
    return backing.backing == "anonymous" and not backing.huge_pages and not backing.prefault and size_of(spec) <= SMALL


def check_room(spec: VmSpec, mine: Claim) -> None:
    """Refuse a VM that the host can't have room for. Any thread.

    Raises:
        ResourceLimit: it can't; the message says how much is needed and who has too little.
    """
    backing, needed = spec.backing, size_of(spec)
    if backing.huge_pages or (needed <= SMALL and not backing.prefault):
        return
    room, others = mine.room, mine.others
    if backing.prefault and room.free is not None and needed > room.free.size - others:
        also = f", of which other launches take {others} bytes now" if others else ""
        raise ResourceLimit(
            errno.ENOMEM,
            f"memory: prefault=True: vm {spec.name!r} takes {needed} bytes at launch, and {room.free.by} leaves "
            f"{room.free.size} bytes{also}: give it less, end other programs, or leave prefault out",
        )
    if backing.backing != "file" and room.most is not None and needed > room.most.size:
        raise ResourceLimit(
            errno.ENOMEM,
            f"memory: vm {spec.name!r} has {needed} bytes, and {room.most.by} is {room.most.size} bytes: the guest "
            "could never have all of its memory: give it less",
        )


async def populate(memory: GuestMemory, workers: Workers, mine: Claim) -> None:
    """Have the host give all of a memory now, on worker threads. Can be cancelled; what was taken stays then.

    Raises:
        ResourceLimit: the host has no more.
    """
    parts = memory.parts(STEP)
    failed: list[Exception] = []

    async def work(scope: trio.CancelScope) -> None:
        for part in parts:
            await _take(part, workers, failed)
            mine.taken(part.size)
            if failed:
                scope.cancel()
                return

    async with trio.open_nursery() as nursery:
        for _ in range(min(int(workers.populate.total_tokens), os.cpu_count() or 1)):
            nursery.start_soon(work, nursery.cancel_scope)
    if failed:
        raise failed[0]


async def _take(part: Part, workers: Workers, failed: list[Exception]) -> None:
    try:
        await workers.run(part.populate, workers.populate)
    except ResourceLimit as error:
        failed.append(error)
