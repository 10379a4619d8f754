"""The C core's objects as Python ones: buckets, a fleet's ring and ready lists, a vCPU's counters and commands.

Lifetimes are explicit, as the core frees memory that threads may be reading: `close` each object, the vCPUs before
their buckets and their fleet. Methods are for the fleet's thread, unless their docstring says otherwise.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum, IntFlag
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import attrs

from ..model.errors import ResourceLimit
from ..model.spec import Limit, Meter
from . import ffi, lib

if TYPE_CHECKING:
    from .channels import Channel
    from .shared import SharedBucket, SharedBuckets

__all__ = [
    "BUCKETS",
    "NOT_HELD",
    "Bucket",
    "Charged",
    "Command",
    "Counters",
    "FleetCore",
    "Question",
    "Runner",
    "Sampled",
    "Settled",
    "Sleeper",
    "VcpuCore",
    "install_signal",
    "monotonic_ns",
    "put_limit",
    "reason_name",
]

METER_NUMBERS: Final = {
    Meter.BUS_LOCKS: int(lib.ORC_BUS_LOCKS),
    Meter.EXITS: int(lib.ORC_EXITS),
    Meter.ANSWERS: int(lib.ORC_ANSWERS),
}
LEVELS: Final = ("host", "fleet", "tenant", "vm", "vcpu")
"""The levels of buckets, from the widest to the narrowest. The fleet's own bucket is in the place of the host's, unless
fleets share the host's."""
BUCKETS: Final = tuple(
    f"{level}.{meter}" for meter in sorted(METER_NUMBERS, key=METER_NUMBERS.__getitem__) for level in LEVELS
)
"""The buckets that a vCPU may wait for, in the core's order: "host.bus_locks", ..., "vm.exits", ..."""

RING_RECORDS: Final = 4096
NEVER: Final = int(lib.ORC_NEVER)
NOT_HELD: Final = [0] * len(BUCKETS)
"""What `VcpuCore.look` returns for a vCPU that was never throttled. No code may change this list."""

THREAD_NAME: Final = 15  # bytes: TASK_COMM_LEN, less its end
_ENTER: Final = ffi.addressof(lib, "orc_enter")


def _reason_names() -> dict[int, str]:
    names, index = {}, 0
    while (entry := lib.orc_exit_reasons[index]).name != ffi.NULL:
        names[int(entry.number)] = ffi.string(entry.name).decode()
        index += 1
    return names


REASON_NAMES: Final = _reason_names()
"""KVM_EXIT_* number → the kernel's name in lower case."""

REASONS: Final = len(ffi.new("struct orc_counters *").exits)

REASON_NUMBERS: Final = {name: number for number, name in REASON_NAMES.items()}


def reason_name(number: int) -> str:
    """The kernel's name of an exit reason, lower case; "other": a reason that has no counter."""
    return REASON_NAMES.get(number) or (f"exit_{number}" if number < REASONS - 1 else "other")


def monotonic_ns() -> int:
    """Nanoseconds on CLOCK_MONOTONIC, the clock of the kvm backend."""
    return int(lib.orc_now())


def install_signal() -> None:
    """Install the empty handler of the kick's signal (SIGURG), the one thing that is global to the process.

    Raises:
        ResourceLimit: the program already uses that signal, or may not send it.
    """
    result = lib.orc_signal_install()
    if result:
        name = signal.Signals(lib.orc_signal_number()).name
        raise ResourceLimit(
            -result,
            f"{name} has another handler in this process; orchestra kicks vCPU threads with it: free it before the "
            "fleet is opened"
            if result == -errno.EBUSY
            else f"{name} can't be sent to a thread of this process: {os.strerror(-result)}: does a seccomp filter "
            "forbid tgkill? orchestra kicks vCPU threads with it",
        )


class Command(IntFlag):
    """Commands for a vCPU's runner. These are bits, so that a stop can come on top of a pause."""

    STOP = int(lib.ORC_STOP)
    PAUSE = int(lib.ORC_PAUSE)
    CALL = int(lib.ORC_CALL)
    HOLD = int(lib.ORC_HOLD)  # the vCPU was made and may not run yet
    CAP = int(lib.ORC_CAP)  # the vCPU has used its share of this period; only the C core waits for that


def put_limit(bucket: Any, limit: Limit | None, now: int) -> bool:
    """Put a limit into force for this ``orc_bucket *`` at `now` ns. False: other processes change its limit
    endlessly."""
    if limit is None:
        # The core has no None: rate 0 is no limit, and a delay of -1 is no `max_delay`.
        return not lib.orc_bucket_set(bucket, 0.0, 1.0, -1, now)
    delay = -1 if limit.max_delay is None else round(limit.max_delay * 1e9)
    return not lib.orc_bucket_set(bucket, float(limit.rate), float(limit.tokens), delay, now)


class Charged:
    """A bucket of the C core as those charge it who are no vCPU."""

    __slots__ = ("handle",)

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @property
    def limited(self) -> bool:
        return bool(lib.orc_bucket_limited(self.handle))

    def charge(self, now: int, count: int) -> Any:
        """Reserve `count` tokens, first come first served: a ticket for `turn`, which its owner has to `leave` once it
        has waited. None: there is nothing to wait for."""
        if not self.limited:
            return None
        ticket = ffi.new("struct orc_ticket *")
        return ticket if lib.orc_bucket_charge_many(self.handle, count, now, ticket) else None

    def turn(self, ticket: Any) -> int:
        """When the turn of a ticket is by the limit in force now; long ago, if there is none any more."""
        by_tokens, by_delay = ffi.new("int64_t *"), ffi.new("int64_t *")
        lib.orc_bucket_turn(self.handle, ticket, by_tokens, by_delay)
        return int(min(by_tokens[0], by_delay[0]))

    def leave(self, ticket: Any) -> None:
        """Wait no more."""
        lib.orc_bucket_leave(self.handle, ticket)


class Bucket(Charged):
    """A GCRA bucket of the C core with a limit that can change at any time."""

    __slots__ = ("limit",)

    def __init__(self) -> None:
        super().__init__(lib.orc_bucket_new())
        if self.handle == ffi.NULL:
            raise MemoryError("orc_bucket_new")
        self.limit: Limit | None = None

    def set(self, limit: Limit | None, now: int) -> None:
        """Put `limit` in force at `now` ns. Call `FleetCore.limits_changed` after the last of several."""
        if limit == self.limit:
            return
        self.limit = limit
        put_limit(self.handle, limit, now)  # never False: no other process sets this bucket

    def take(self, now: int, count: int = 1) -> int:
        """Reserve `count` tokens. Returns when the turn of the last comes; `now` or less: at once."""
        ticket = self.charge(now, count)
        return now if ticket is None else self.turn(ticket)

    def close(self) -> None:
        lib.orc_bucket_free(self.handle)
        self.handle = ffi.NULL


class Sleeper(IntEnum):
    """Which task is woken by a question: `enum orc_sleeper`."""

    MAIN = int(lib.ORC_MAIN)
    DEPUTY = int(lib.ORC_DEPUTY)


class FleetCore:
    """The core's part of a fleet: its vCPUs' rings, the lists of vCPUs that have something, and the eventfds."""

    BATCH: Final = 1024

    def __init__(self) -> None:
        self.handle: Any = lib.orc_fleet_new()
        if self.handle == ffi.NULL:
            raise ResourceLimit(
                ffi.errno, f"eventfd: {os.strerror(ffi.errno)}: raise the limit on open files (ulimit -n)"
            )
        self.eventfd = int(lib.orc_fleet_eventfd(self.handle))
        self.asked_eventfds = {who: int(lib.orc_fleet_asked_eventfd(self.handle, who)) for who in Sleeper}
        # Buffers are made once and used for all calls: the fleet's thread alone makes these calls, one at a time.
        self._questions = ffi.new("struct orc_question[]", self.BATCH)
        self._records = ffi.new("struct orc_record[]", self.BATCH)
        self.channels: set[Channel] = set()  # channels that were not ended: kept alive, as the core has their addresses
        self._ids = ffi.new("uint32_t[]", self.BATCH)
        self.sites: Any = ffi.new("struct orc_site[]", int(lib.ORC_SITES))
        self.sums: Any = ffi.new("struct orc_sums *")
        self.more: Any = ffi.new("struct orc_more[]", REASONS)
        self.shared: SharedBuckets | None = None

    def share(self, buckets: SharedBuckets) -> None:
        """Make all vCPUs charge the host's buckets, which other processes charge as well. Before there are vCPUs."""
        buckets.share_with(self.handle)
        self.shared = buckets

    def deliver(self, core: VcpuCore | None = None, *, most: int = BATCH) -> int:
        """Move the next records, `most` at most, from the rings to all channels that want them. Returns their number.

        Parameters:
            core: move the records of this vCPU only, in its order. None: of all.
        """
        vcpu = ffi.NULL if core is None else core.handle
        return int(lib.orc_fleet_deliver(self.handle, vcpu, self._records, most))

    def may_sleep(self) -> bool:
        """Before waiting for `eventfd`: False if records came meanwhile."""
        return bool(lib.orc_fleet_sleep(self.handle))

    def asked(self, most: int = BATCH) -> list[Question]:
        """Take the questions of vCPUs that wait, `most` at most."""
        questions = self._questions
        return [Question(questions[index]) for index in range(lib.orc_fleet_asked(self.handle, questions, most))]

    def may_sleep_unasked(self) -> bool:
        """The main task, before it waits for its eventfd: False if questions came meanwhile."""
        return bool(lib.orc_fleet_asked_sleep(self.handle))

    def stand_in_unasked(self) -> bool:
        """The deputy takes the place of the main task, which waits, before it waits for its own eventfd: False if
        questions came meanwhile, which are the deputy's then."""
        return bool(lib.orc_fleet_asked_stand_in(self.handle))

    def give_back_asked(self, more: bool) -> None:
        """The main task, which still waits, is woken from now on, and the deputy no more. It is woken at once if there
        are questions or `more` to do."""
        lib.orc_fleet_asked_give_back(self.handle, more)

    def ring_asked(self) -> None:
        """There is something to do beside questions: wake whoever sleeps for them."""
        lib.orc_fleet_asked_ring(self.handle)

    def active(self) -> list[int]:
        """Ids of the vCPUs that accounted an exit since the last call, and before this one."""
        ids: list[int] = []
        # This cuts the list off here. Otherwise vCPUs that go on accounting exits would join it, and keep the loop
        # below from ending.
        lib.orc_fleet_look(self.handle)
        while n := lib.orc_fleet_active(self.handle, self._ids, self.BATCH):
            ids += ffi.unpack(self._ids, n)
        return ids

    def talking(self) -> list[int]:
        """Ids of the vCPUs whose console has output that a task waits for, `BATCH` at most."""
        n = lib.orc_fleet_talking(self.handle, self._ids, self.BATCH)
        return ffi.unpack(self._ids, n) if n else []

    def limits_changed(self) -> None:
        """Wake all throttled vCPUs, so that each reads its limits again."""
        lib.orc_fleet_limits_changed(self.handle)

    @contextmanager
    def urgently(self) -> Iterator[None]:
        """Within the block the fleet waits for a vCPU: busy emulated guests give way to it, for 200 ms at most."""
        lib.orc_fleet_urgent(self.handle, True)
        try:
            yield
        finally:
            lib.orc_fleet_urgent(self.handle, False)

    def close(self) -> None:
        # First the channels: the core's fleet has their addresses. A copy, as `end` takes the channel out of the set.
        for channel in list(self.channels):
            channel.end()
        lib.orc_fleet_free(self.handle)
        self.handle = ffi.NULL
        if self.shared is not None:
            self.shared.leave()
            self.shared = None


class Question:
    """An access that a task has to answer: `struct orc_question`. `vcpu`: the core's id; `number`: of the question."""

    __slots__ = ("address", "bus", "claim", "data", "number", "since", "size", "vcpu", "write")

    def __init__(self, raw: Any) -> None:
        self.claim, self.address, self.since = raw.claim, raw.address, raw.since
        self.vcpu, self.number, self.bus, self.size = raw.vcpu, raw.number, raw.bus, raw.size
        self.write = raw.write != 0
        self.data = bytes(ffi.buffer(raw.data, self.size)) if self.write else b""


class Settled(IntEnum):
    """What becomes of a question: `enum orc_asked`."""

    ANSWERED = int(lib.ORC_ASK_ANSWERED)
    AGAIN = int(lib.ORC_ASK_AGAIN)
    """The claim is gone: the core looks the address up again."""
    NOBODY = int(lib.ORC_ASK_NOBODY)
    """The claim is there, but its task does not answer: the guest reads ones."""


@attrs.frozen
class Counters:
    """The counters of a vCPU. Times in nanoseconds. `throttled_since`: None unless the vCPU is throttled now.
    `held`: `throttled` by the bucket whose turn came last, in the order of `BUCKETS`."""

    exits: dict[str, int]
    bus_locks: int
    capped: int
    throttled: int
    waits: int
    released: int
    missed: int
    kicks: int
    unclaimed: int
    answers: int
    throttled_since: int | None
    held: tuple[int, ...]


@attrs.frozen
class Sampled:
    """Bus locks that were reported at one place of a guest's code: `struct orc_site`.

    Attributes:
        rip: linear, with the base of CS; on the instruction or after it, as the host reports locks.
        mode: 16, 32 or 64; 0 where the backend knows no more than `rip`.
        space: the address of the top page table, 0 without paging.
        rode: the locks were reported on exits for another reason.
        nested: a guest of the guest made them, whose registers these are.
        weight: how many bus locks the samples stand for; `error`: of these, how many may have been another place's.
        code: bytes around `rip`, the first `before` of them before it.
    """

    rip: int
    mode: int
    cpl: int
    space: int
    rode: bool
    nested: bool
    samples: int
    weight: int
    error: int
    before: int
    code: bytes


class VcpuCore:
    """A vCPU as the core knows it: counters, tickets, commands, its part of the ring. The same for all backends."""

    __slots__ = ("_buses", "_open", "_seen", "fleet", "handle", "id")

    def __init__(self, fleet: FleetCore, id: int) -> None:
        self.fleet = fleet
        self.id = id
        self._seen: Any = ffi.new("uint64_t[]", REASONS)
        self._buses: tuple[object, ...] = ()
        self._open = Lock()  # held against a wake that comes during `close`
        self.handle: Any = lib.orc_vcpu_new(fleet.handle, id, RING_RECORDS)
        if self.handle == ffi.NULL:
            raise MemoryError("orc_vcpu_new")

    def set_bucket(self, meter: Meter, level: int, bucket: Bucket | SharedBucket) -> None:
        """Set one bucket, before the vCPU runs. `level`: 0 host, 1 fleet, 2 tenant, 3 VM, 4 vCPU."""
        lib.orc_vcpu_set_bucket(self.handle, METER_NUMBERS[meter], level, bucket.handle)

    def set_buckets(self, buckets: Sequence[Bucket | SharedBucket | None]) -> None:
        """Set all buckets, before the vCPU runs: of the first `Meter` for each of `LEVELS`, then of the next
        `Meter`."""
        handles = [ffi.NULL if bucket is None else bucket.handle for bucket in buckets]
        lib.orc_vcpu_set_buckets(self.handle, ffi.new("orc_bucket *[]", handles))

    def set_name(self, vm: int, vcpu: int) -> None:
        """Set the numbers of VM and vCPU for the records, before the vCPU runs."""
        lib.orc_vcpu_name(self.handle, vm, vcpu)

    def set_buses(self, ports: Any, mmio: Any) -> None:
        """Set the core's tables of claims (``orc_bus *``), before the vCPU runs. Without a table nobody has claimed."""
        self._buses = (ports, mmio)  # they must outlive it
        lib.orc_vcpu_set_buses(self.handle, ports, mmio)

    def subscribe(self, mask: int) -> None:
        """Set the exit reasons that go to the ring. The first call with a reason maps the ring.

        Raises:
            ResourceLimit: the host has no memory for the ring.
        """
        result = lib.orc_vcpu_subscribe(self.handle, mask)
        if result:
            raise ResourceLimit(
                -result, f"ring of a vCPU: {os.strerror(-result)}: vm.max_map_count or memory is used up"
            )

    def hold(self) -> None:
        """Set `Command.HOLD`, before there is a runner: `attach` will wait."""
        lib.orc_vcpu_hold(self.handle)

    def command(self, set: int = 0, clear: int = 0) -> None:
        """Set and clear commands, and kick."""
        lib.orc_vcpu_command(self.handle, set, clear)

    def cap(self, share: float | None) -> None:
        """Let the vCPU's thread use this share of a CPU (0.01 to 1), by CPU time over periods of 50 ms; None: no cap.

        Takes effect at once. An engine without a thread is not held.

        Raises:
            ResourceLimit: the host has no thread or memory left.
        """
        result = lib.orc_vcpu_cap(self.handle, 1.0 if share is None else share)
        if result:
            raise ResourceLimit(-result, f"CPU cap: {os.strerror(-result)}: see ulimit -u and cgroup pids.max")

    def commands(self) -> int:
        """The commands that are set. Any thread."""
        return int(lib.orc_vcpu_commands(self.handle))

    def wakes(self) -> int:
        """The count for an engine's `sleep`. Read it before the check for work: a wake in between ends the sleep. Any
        thread."""
        return int(lib.orc_vcpu_wakes(self.handle))

    def wake(self) -> bool:
        """End `orc_vcpu_sleep` in the runner. Any thread, also once it is closed: then it does nothing and is False."""
        with self._open:
            if self.handle == ffi.NULL:
                return False
            lib.orc_vcpu_wake(self.handle)
            return True

    def ask(self, now: int) -> None:
        """Ask a task for the present access. Engines that block ask by themselves. Runner."""
        lib.orc_ask(self.handle, now)

    def question(self) -> Question:
        """The last question. Runner."""
        question = ffi.new("struct orc_question *")
        lib.orc_ask_question(self.handle, question)
        return Question(question)

    def is_asking(self) -> bool:
        """Whether the last question is not settled yet. Runner."""
        return bool(lib.orc_ask_open(self.handle))

    def settled(self) -> None:
        """Put the answer into the present access, or withdraw the question. Runner."""
        lib.orc_ask_settled(self.handle)

    def settle(self, number: int, how: int, answer: bytes = b"") -> bool:
        """Settle the question of that number, and wake the vCPU. False: the question is not open any more, or the core
        is closed. Any time, fleet's thread."""
        if self.handle == ffi.NULL:
            return False
        return bool(lib.orc_vcpu_settle(self.handle, number, how, answer, len(answer)))

    def unbind(self) -> None:
        """The runner has ended: release what an engine bound to this core, which may then be unmapped, closed and
        freed.

        Nothing reads it from then on, not even the thread that caps CPUs.
        """
        if self.handle != ffi.NULL:
            lib.orc_vcpu_unbind(self.handle)

    def counters(self, now: int) -> Counters:
        raw = ffi.new("struct orc_counters *")
        lib.orc_vcpu_counters(self.handle, raw, now)
        exits = {reason_name(number): int(count) for number, count in enumerate(raw.exits) if count}
        return Counters(
            exits=exits,
            bus_locks=int(raw.bus_locks),
            capped=int(raw.capped),
            throttled=int(raw.throttled),
            waits=int(raw.waits),
            released=int(raw.released),
            missed=int(raw.missed),
            kicks=int(raw.kicks),
            unclaimed=int(raw.unclaimed),
            answers=int(raw.answers),
            throttled_since=int(raw.throttled_since) or None,
            held=tuple(ffi.unpack(raw.held, len(BUCKETS))),
        )

    def look(self, now: int) -> tuple[dict[int, int], int, list[int], int]:
        """What a policy tick needs: exits since the last call by the kernel's number of the reason (see
        `REASON_NAMES`), bus locks so far, the throttled nanoseconds so far by `BUCKETS`, and accesses answered by
        Python so far."""
        sums, more = self.fleet.sums, self.fleet.more
        changed = lib.orc_vcpu_look(self.handle, sums, self._seen, more, now)
        # This runs for each active vCPU in each tick. cffi returns Python numbers: a second conversion would cost as
        # much as the reading.
        exits = {}
        for i in range(changed):
            one = more[i]
            exits[one.reason] = one.exits
        return exits, sums.bus_locks, ffi.unpack(sums.held, len(BUCKETS)) if sums.throttled else NOT_HELD, sums.answers

    def sample(self, every: int) -> None:
        """Sample one bus lock of each `every`, and the first; 0: none. At any time."""
        lib.orc_vcpu_sample(self.handle, every)

    def profile(self) -> tuple[list[Sampled], int, int]:
        """The samples since the last call: by place; locks without a place; places that were replaced by others."""
        sites = self.fleet.sites
        lost, replaced = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        used = lib.orc_vcpu_profile(self.handle, sites, lost, replaced)
        return (
            [
                Sampled(
                    rip=int(s.rip),
                    mode=int(s.mode),
                    cpl=int(s.cpl),
                    space=int(s.space),
                    rode=bool(s.rode),
                    nested=bool(s.nested),
                    samples=int(s.samples),
                    weight=int(s.weight),
                    error=int(s.error),
                    before=int(s.before),
                    code=bytes(ffi.buffer(s.code, int(s.size))),
                )
                for s in (sites[index] for index in range(used))
            ],
            int(lost[0]),
            int(replaced[0]),
        )

    def close(self) -> None:
        """Free the core, after the runner has ended."""
        with self._open:
            # Taken under the lock and freed after it: a wake that comes later finds no handle, and none is inside the
            # core.
            handle, self.handle = self.handle, ffi.NULL
        lib.orc_vcpu_free(handle)
        self._buses = ()


@ffi.def_extern()  # type: ignore[untyped-decorator]
def orc_proceed(context: Any, why: int) -> None:
    """A thread of the core enters Python."""
    # No `threading.Thread` has made this thread, so nobody else hands the trace functions over.
    sys.settrace(threading.gettrace())  # as `threading` does for its threads, for coverage and debuggers
    sys.setprofile(threading.getprofile())
    ffi.from_handle(context)(why)


class Runner:
    """A thread of the core that runs a vCPU. It enters Python when the guest needs that for the first time.

    Attributes:
        tid: the kernel's number of the thread. Once the thread has ended, another may have it.

    Parameters:
        run: the core's function that runs the vCPU (``enum orc_why (*)(orc_vcpu *)``).
        proceed: called on the thread then, with what `run` returned; must not raise.
        vm, index: the VM's name and the vCPU's number. The kernel knows the thread as "web-1/0", with as much of the
            VM's name as has room.

    Raises:
        ResourceLimit: the host has no thread left.
    """

    __slots__ = ("_context", "_handle", "tid")

    def __init__(self, core: VcpuCore, vm: str, index: int, run: Any, proceed: Callable[[int], object]) -> None:
        self._context = ffi.new_handle(proceed)
        # The kernel keeps 15 bytes of a thread's name (pthread_setname_np(3)). The VM's name is cut and the vCPU's
        # number is kept, as it tells the threads of one VM apart.
        number, out = b"/%d" % index, ffi.new("orc_runner **")
        name = vm.encode("utf-8", "replace")[: THREAD_NAME - len(number)] + number
        result = lib.orc_runner_start(core.handle, name, run, _ENTER, self._context, out)
        if result:
            raise ResourceLimit(-result, f"thread of a vCPU: {os.strerror(-result)}: see ulimit -u and cgroup pids.max")
        self._handle: Any = out[0]
        self.tid = int(lib.orc_runner_tid(self._handle))  # now, as another thread may be at `join` when it is read

    def join(self) -> None:
        """Wait until the thread is gone. Done at once if it was joined before."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.orc_runner_join(handle)
            self._context = None  # breaks a cycle: context → vCPU → this runner
