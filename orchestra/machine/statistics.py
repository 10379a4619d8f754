"""What a VM and its vCPUs did, as frozen figures; how those of one run are added to those before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import attrs

from ..backend import Detection
from ..model.actions import Outcome, State
from ..model.spec import Limit
from ..native.core import BUCKETS, Counters
from .holding import PendingIo

__all__ = ["ZERO", "VcpuStatistics", "VmStatistics", "add", "add_names", "by_bucket"]


@attrs.frozen
class VcpuStatistics:
    """What one vCPU did since its VM was launched, restarts included. Times in seconds.

    Attributes:
        state: as `Vm.state`, for this vCPU.
        throttled: it waits for its turn right now.
        bus_locks: exactly as many as the host reported; None where it reports none.
        throttled_seconds: how long it waited for its turn, a wait in progress included.
        waits: how many waits.
        released: waits that ``max_delay`` ended before the turn came.
        exits: exits by the kernel's name of the reason, lower case ("io", "mmio", "hlt", "x86_bus_lock", ...).
        unclaimed: accesses to ports and MMIO that found nobody, or of which a part did.
        answers: accesses that Python answered, a device or a task; by element for string instructions.
        missed: exits whose details were lost because the ring was full; they are counted all the same.
        kicks: times that KVM_RUN was interrupted.
    """

    index: int
    state: State
    throttled: bool
    bus_locks: int | None
    throttled_seconds: float
    waits: int
    released: int
    exits: Mapping[str, int]
    unclaimed: int
    answers: int
    missed: int
    kicks: int


@attrs.frozen
class VmStatistics:
    """What a VM did since it was launched: sums over its vCPUs (see `VcpuStatistics`), and each of them.

    Attributes:
        resets: how often it started afresh, by itself (`VmSpec.on_reset`) or by `Vm.reset`; not among `restarts`.
        dirty_pages: pages of 4 KiB that it wrote while it was logged (`Vm.log_dirty`), by the readings of the log so
            far: about one a second, and a page counts once in each. None: there was none.
        pending: while it pauses, or is paused: what keeps it from being quiesced (`Vm.pause`).
        throttled_by: `throttled_seconds` by the limit whose turn was the last: "vm.exits" is the VM's own on exits; the
            levels are "host", "tenant", "vm" and "vcpu". Those for which it never waited are left out.
    """

    name: str
    tenant: str
    state: State
    throttled: bool
    outcome: Outcome | None
    restarts: int
    resets: int
    bus_locks: int | None
    throttled_seconds: float
    waits: int
    released: int
    exits: Mapping[str, int]
    unclaimed: int
    answers: int
    missed: int
    kicks: int
    dirty_pages: int | None
    limit: Limit | None
    exit_limit: Limit | None
    answer_limit: Limit | None
    bus_lock_detection: Detection | None
    vcpus: tuple[VcpuStatistics, ...]
    pending: tuple[PendingIo, ...] = ()
    throttled_by: Mapping[str, float] = attrs.field(factory=dict, hash=False)


def by_bucket(held: Iterable[Sequence[int]]) -> dict[str, float]:
    """Nanoseconds by bucket of several vCPUs as seconds of all of them, by name; zeros are left out."""
    sums = (sum(of) for of in zip(*held, strict=True))
    return {name: total / 1e9 for name, total in zip(BUCKETS, sums, strict=False) if total}


def add_names(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by name."""
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def add(a: Counters, b: Counters) -> Counters:
    """What two runs of a vCPU did, `b` being the later one."""
    fields = ("bus_locks", "capped", "throttled", "waits", "released", "missed", "kicks", "unclaimed", "answers")
    return Counters(
        exits=add_names([a.exits, b.exits]),
        throttled_since=b.throttled_since,
        held=tuple(one + other for one, other in zip(a.held, b.held, strict=True)),
        **{f: getattr(a, f) + getattr(b, f) for f in fields},
    )


ZERO: Final = Counters(
    exits={},
    bus_locks=0,
    capped=0,
    throttled=0,
    waits=0,
    released=0,
    missed=0,
    kicks=0,
    unclaimed=0,
    answers=0,
    throttled_since=None,
    held=(0,) * len(BUCKETS),
)
