"""Statistics of a VM and its vCPUs as frozen data, and the sums over several runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from ..backend import Detection
from ..model.actions import Outcome, State
from ..model.spec import Limit
from ..native.core import BUCKETS, Counters
from .pause_levels import PendingIo

__all__ = [
    "ZERO",
    "GuestMemoryStatistics",
    "MemoryStatistics",
    "VcpuStatistics",
    "VmStatistics",
    "add",
    "add_names",
    "by_bucket",
    "of_vcpu",
    "sums",
]


@attrs.frozen
class VcpuStatistics:
    """What one vCPU did since its VM was launched, restarts included. Times in seconds.

    Attributes:
        state: as `Vm.state`, for this vCPU.
        throttled: a bucket holds the vCPU back right now.
        bus_locks: as many as the host reported; None: the host reports none.
        throttled_seconds: how long the vCPU was throttled, a wait in progress included.
        waits: how many times it waited.
        released: waits that ``max_delay`` ended before the turn came.
        exits: exits by the kernel's name of the reason, lower case ("io", "mmio", "hlt", "x86_bus_lock", ...).
        unclaimed: accesses to ports and MMIO of which at least a part belonged to no device and no task.
        answers: accesses that Python answered (a device or a task). Each element of a string instruction is one.
        missed: exits whose details were lost because the ring was full. All counters still include them.
        kicks: how many times KVM_RUN was interrupted.
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
class GuestMemoryStatistics:
    """What the guest told last of its memory. A hostile guest tells anything. None: it told no such thing.

    Source: virtio 1.2, 5.5.6.4, and drivers/virtio/virtio_balloon.c of Linux.

    Attributes:
        age: seconds since it told that.
        total, free, available, caches: bytes; `available` is what the guest could use without swapping.
        swap_in, swap_out: bytes that were swapped, ever.
        major_faults, minor_faults: page faults, ever.
        huge_page_allocations, huge_page_failures: of the guest's own pool of huge pages.
    """

    age: float
    total: int | None = None
    free: int | None = None
    available: int | None = None
    caches: int | None = None
    swap_in: int | None = None
    swap_out: int | None = None
    major_faults: int | None = None
    minor_faults: int | None = None
    huge_page_allocations: int | None = None
    huge_page_failures: int | None = None


@attrs.frozen
class MemoryStatistics:
    """The memory of a VM with a balloon, in the present run. All but `guest` in bytes.

    Attributes:
        size: of the spec.
        target: what the guest is asked to keep to.
        actual: what it keeps to, by its own account: `size` without what is in the balloon. None: it has no driver.
        given_back: how much memory the host had back so far, by the balloon and by free page reporting. The guest may
            have touched it again since: what it uses now is in the RSS of this process.
        reported: what the guest has reported as free so far.
        failed: what the host's kernel did not take back.
        guest: what the guest told of its memory. None: it told nothing.
    """

    size: int
    target: int
    actual: int | None
    given_back: int
    reported: int
    failed: int
    guest: GuestMemoryStatistics | None


@attrs.frozen
class VmStatistics:
    """What a VM did since it was launched: sums over its vCPUs (see `VcpuStatistics`), and the figures of each vCPU.

    Attributes:
        resets: how often the VM was reset, by its guest (`VmSpec.on_reset`) or by `Vm.reset`; not among `restarts`.
        dirty_pages: pages of 4 KiB that the guest wrote while they were logged (`Vm.log_dirty`), by the readings of the
            log so far: about one reading a second, and a page counts once in each. None: there was no reading.
        pending: while the VM pauses or is paused: the accesses that keep it from being quiesced (`Vm.pause`).
        throttled_by: `throttled_seconds` by the limit whose turn came last, such as "vm.exits", the VM's own limit on
            exits. The levels are "host", "tenant", "vm" and "vcpu". Limits that never made the VM wait are left out.
        memory: what its guest keeps to of its memory. None: it has no `Balloon`.
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
    memory: MemoryStatistics | None = None


def of_vcpu(index: int, state: State, counted: Counters, seen: bool) -> VcpuStatistics:
    """The statistics of one vCPU from its counters. `seen`: the fleet sees bus locks."""
    return VcpuStatistics(
        index=index,
        state=state,
        throttled=counted.throttled_since is not None,
        bus_locks=counted.bus_locks if seen else None,
        throttled_seconds=counted.throttled / 1e9,
        waits=counted.waits,
        released=counted.released,
        exits=counted.exits,
        unclaimed=counted.unclaimed,
        answers=counted.answers,
        missed=counted.missed,
        kicks=counted.kicks,
    )


def sums(vcpus: Sequence[VcpuStatistics], seen: bool) -> dict[str, Any]:
    """The fields of a `VmStatistics` that are sums over its vCPUs, by name. `seen`: the fleet sees bus locks."""
    numbers = ("throttled_seconds", "waits", "released", "unclaimed", "answers", "missed", "kicks")
    return {
        "throttled": any(vcpu.throttled for vcpu in vcpus),
        "bus_locks": sum(vcpu.bus_locks or 0 for vcpu in vcpus) if seen else None,
        "exits": add_names(vcpu.exits for vcpu in vcpus),
        **{name: sum(getattr(vcpu, name) for vcpu in vcpus) for name in numbers},
    }


def by_bucket(held: Iterable[Sequence[int]]) -> dict[str, float]:
    """Add up the nanoseconds that several vCPUs waited for each bucket: seconds by name; zeros are left out."""
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
    """The sum of the counters of two runs of a vCPU. `b`: of the later run."""
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
