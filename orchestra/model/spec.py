"""What you want: limits, tenants, VMs and what they boot. Plain frozen data, checked when it is made.

Every check names the field, the value and the remedy, and is made here at the edge: the rooms below trust a spec.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs

from .errors import SpecError

if TYPE_CHECKING:
    from attrs import Attribute

__all__ = [
    "DebugConsole",
    "DeviceSpec",
    "ExitPort",
    "FlatImage",
    "GiB",
    "KiB",
    "Limit",
    "MemoryRegion",
    "Meter",
    "MiB",
    "Restart",
    "Serial",
    "Tenant",
    "VmSpec",
]

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

PAGE: Final = 4096
MAX_VCPUS: Final = 4096
MAX_MEMORY: Final = 1 << 46
PORTS: Final = 1 << 16
IRQS: Final = 24
STACKS: Final = 8
MMIO_HOLE: Final = range(0xC000_0000, 0x1_0000_0000)
"""Guest-physical addresses that hold no RAM: the local APIC, the I/O APIC and MMIO devices live there, as on a PC."""


class Meter(StrEnum):
    """What a limit counts."""

    BUS_LOCKS = "bus_locks"
    EXITS = "exits"
    """Accesses that leave the guest: an exit is one, that of a string instruction as many as it has elements."""
    ANSWERS = "answers"
    """Accesses that Python answers, a device or a task; by element."""

    @property
    def field(self) -> str:
        """What a spec, a tenant, a fleet and a file of rules call a limit on it."""
        return {Meter.BUS_LOCKS: "limit", Meter.EXITS: "exit_limit", Meter.ANSWERS: "answer_limit"}[self]


def _fail(field: str, value: object, remedy: str) -> SpecError:
    try:
        shown = repr(value)
    except ValueError:  # an int of more than 4300 digits has none
        shown = f"<{type(value).__name__}>"
    return SpecError(f"{field}={shown if len(shown) <= 200 else shown[:200] + '...'}: {remedy}")


def _number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(field, value, "must be a number")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the floats
        number = math.inf
    if not math.isfinite(number):
        raise _fail(field, value, "must be finite; leave the limit out (None) for no limit")
    return number


def _whole(field: str, value: object, low: int, high: int, unit: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _fail(field, value, f"must be a whole number{unit}")
    if not low <= value <= high:
        raise _fail(field, value, f"must be from {low} to {high}{unit}")
    return value


def _check_name(field: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise _fail(field, value, "must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
    return value


def as_meter(value: object) -> Meter:
    """Check an argument that names a meter."""
    try:
        return Meter(value)  # type: ignore[arg-type]  # it looks the value up, whatever it is
    except ValueError:
        raise _fail("meter", value, 'must be "bus_locks", "exits" or "answers"') from None


@attrs.frozen
class Limit:
    """A token-bucket limit (GCRA, ITU-T I.371): in any window of *t* seconds at most ``burst + rate * t`` events.

    Changing it, or taking it off and setting it again, gives no new burst: what was left is kept, and without a limit
    it grows at the old rate up to the old burst.

    Parameters:
        rate: events per second (bus locks; accesses for an ``exit_limit`` or ``answer_limit``, see `Meter`); more than
            0, at most 1e9.
        burst: events that may come at once after a rest; at least 1. Default: what `rate` gives in 50 ms, at least 1.
        max_delay: seconds. The longest that one event may be delayed: a guest slows and never hangs. An event let go
            by it although its turn had not come is counted as *released*. ``None``: no bound (a Linux guest reports
            soft lockups after about 20 s). Default: 10 s.
    """

    rate: float = attrs.field()
    burst: float | None = None
    max_delay: float | None = 10.0

    @rate.validator
    def _check_rate(self, _: Attribute[Any], value: object) -> None:
        number = _number("rate", value)
        if number <= 0:
            raise _fail("rate", value, "must be more than 0; pause() the VM to stop it altogether")
        if number > 1e9:
            raise _fail("rate", value, "must be at most 1e9 a second; leave the limit out (None) for no limit")

    def __attrs_post_init__(self) -> None:
        if self.burst is not None and not 1 <= _number("burst", self.burst) <= 1e9:
            raise _fail("burst", self.burst, "must be from 1 to 1e9 events")
        if self.max_delay is not None and not 0 < _number("max_delay", self.max_delay) <= 1e6:
            raise _fail(
                "max_delay", self.max_delay, "must be more than 0 and at most 1e6 seconds, or None for no bound"
            )

    @property
    def tokens(self) -> float:
        """The burst in force: as given, or the default for the rate."""
        return max(1.0, self.rate * 0.05) if self.burst is None else self.burst


ANSWER_LIMIT: Final = Limit(rate=2_000, burst=2_000)
"""What a VM's accesses that Python answers are limited to unless its spec says otherwise.

All VMs of a fleet share one interpreter. An access takes it for about 6 us, most of that to get in: at this rate eight
guests that do nothing else take a tenth of it, and the others keep the rest. A driver that sets a device up makes some
hundred accesses, and one that works with it some hundred a second.
"""


def optional_limit(field: str, value: object) -> Limit | None:
    """Check an argument that may be a `Limit` or ``None``."""
    if value is None or isinstance(value, Limit):
        return value
    raise _fail(field, value, "must be a Limit, such as Limit(rate=100), or None for no limit")


def tightest(base: Limit | None, throttles: Iterable[Limit] = ()) -> Limit | None:
    """What is in force: the lowest rate with the smallest burst, so that nobody loosens what another set.

    How long a guest may be delayed is for `base` to say, which is its owner's word: a throttle neither lets it go
    earlier nor holds it longer. Where there is no base, the most patient throttle says it.
    """
    throttles = list(throttles)
    given = throttles if base is None else [base, *throttles]
    if not given:
        return None
    delays = [limit.max_delay for limit in ([base] if base is not None else throttles)]
    patient = None if None in delays else max(delay for delay in delays if delay is not None)
    rate, burst = min(limit.rate for limit in given), min(limit.tokens for limit in given)
    exact = next(
        (limit for limit in given if (limit.rate, limit.tokens, limit.max_delay) == (rate, burst, patient)), None
    )
    return exact or Limit(rate=rate, burst=burst, max_delay=patient)


@attrs.frozen
class Tenant:
    """Who a VM belongs to. Tenants share the host's budget by weight and have limits of their own.

    Parameters:
        name: as specs name it.
        weight: the share of the host's budget relative to the other tenants', for the sharing policies; more than 0.
        limit: bus locks per second of all its VMs together; None: only counted.
        exit_limit: the same for exits of any kind.
        answer_limit: the same for accesses that Python answers.
    """

    name: str
    weight: float = 1.0
    limit: Limit | None = None
    exit_limit: Limit | None = None
    answer_limit: Limit | None = None

    def __attrs_post_init__(self) -> None:
        _check_name("tenant", self.name)
        _check_weight(self.weight)
        for meter in Meter:
            optional_limit(meter.field, getattr(self, meter.field))


def _check_weight(value: object) -> None:
    if not 0 < _number("weight", value) <= 1e6:
        raise _fail("weight", value, "must be more than 0 and at most 1e6")


@attrs.frozen
class MemoryRegion:
    """More guest memory, beside the RAM of `VmSpec.memory`.

    Parameters:
        address: guest-physical, a multiple of 4096.
        size: bytes, a multiple of 4096.
        readonly: a guest's write leaves KVM_RUN as MMIO (KVM_MEM_READONLY) instead of reaching the memory.
        log_dirty: written pages are logged and counted, whatever `VmSpec.log_dirty` says of the rest.
        contents: the first bytes of the region.
    """

    address: int
    size: int
    readonly: bool = False
    log_dirty: bool = False
    contents: bytes = attrs.field(default=b"", repr=lambda contents: f"<{len(contents)} bytes>")

    def __attrs_post_init__(self) -> None:
        _whole("region address", self.address, 0, MAX_MEMORY)
        _whole("region size", self.size, PAGE, MAX_MEMORY, " bytes")
        for field in ("address", "size"):
            if getattr(self, field) % PAGE:
                raise _fail(f"region {field}", getattr(self, field), f"must be a multiple of {PAGE}")
        check_flag("region log_dirty", self.log_dirty)
        if not isinstance(self.contents, bytes | bytearray | memoryview):
            raise _fail("region contents", self.contents, "must be bytes")
        object.__setattr__(self, "contents", bytes(self.contents))
        if len(self.contents) > self.size:
            raise _fail("region contents", f"{len(self.contents)} bytes", f"must fit the region's {self.size} bytes")

    @property
    def span(self) -> range:
        return range(self.address, self.address + self.size)


@attrs.frozen
class FlatImage:
    """A raw image in guest memory, entered directly in the given mode.

    Parameters:
        code: the image.
        load: guest-physical address of its first byte.
        entry: where execution starts (default: at `load`).
        mode: 16 (real mode, all segments at 0), 32 (protected mode, flat segments, no paging) or 64 (long mode, the
            first 4 GiB mapped one to one). For 32 and 64 a GDT, for 64 also page tables, are written into the last
            48 KiB of the first RAM region; the image must leave them alone unless it brings its own.

    Every vCPU starts at `entry` with interrupts off, its number in ``DI``/``EDI``/``RDI`` and, in modes 32 and 64, a
    stack of 4 KiB of its own below the tables (the first 8 vCPUs; others set up their own).
    """

    code: bytes = attrs.field(repr=lambda code: f"<{len(code)} bytes>")
    load: int = 0x1000
    entry: int | None = None
    mode: Literal[16, 32, 64] = 16

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.code, bytes | bytearray | memoryview) or not len(self.code):
            raise _fail("code", self.code, "must be the image's bytes, at least one")
        object.__setattr__(self, "code", bytes(self.code))
        if not isinstance(self.mode, int) or self.mode not in (16, 32, 64):
            raise _fail("mode", self.mode, "must be 16, 32 or 64")
        _whole("load", self.load, 0, MAX_MEMORY)
        if self.entry is None:
            object.__setattr__(self, "entry", self.load)
        _whole("entry", self.entry, 0, MAX_MEMORY)
        if self.mode == 16 and self.start > 0xFFFF:
            raise _fail("entry", hex(self.start), "must be below 64 KiB in 16-bit mode (CS starts at 0)")
        if self.mode != 16 and self.start > 0xFFFF_FFFF:
            raise _fail("entry", hex(self.start), "must be below 4 GiB, which is what a flat image has mapped")

    @property
    def start(self) -> int:
        assert self.entry is not None
        return self.entry

    @property
    def span(self) -> range:
        return range(self.load, self.load + len(self.code))


def _check_port(value: object, width: int) -> None:
    _whole("port", value, 0, PORTS - width, f", as the device has {width} of the {PORTS} ports" if width > 1 else "")


@attrs.frozen
class DebugConsole:
    """A write-only port whose bytes go to the VM's console (QEMU's ``isa-debugcon``). Reads give the port's number."""

    port: int = 0xE9

    def __attrs_post_init__(self) -> None:
        _check_port(self.port, 1)


@attrs.frozen
class ExitPort:
    """A port that ends the VM when written: outcome ``Shutdown`` with the value as its code (``isa-debug-exit``)."""

    port: int = 0xF4

    def __attrs_post_init__(self) -> None:
        _check_port(self.port, 4)


@attrs.frozen
class Serial:
    """A 16550A serial port; its output goes to the VM's console. COM1 is port 0x3f8, interrupt 4."""

    port: int = 0x3F8
    irq: int | None = 4

    def __attrs_post_init__(self) -> None:
        _check_port(self.port, 8)
        if self.irq is not None:
            _whole("irq", self.irq, 0, IRQS - 1)


DeviceSpec: TypeAlias = DebugConsole | ExitPort | Serial


@attrs.frozen
class Restart:
    """What to do when a VM ends.

    Parameters:
        when: "never", or "on-failure" (only after ``Failed``).
        backoff: seconds before the first restart; doubles with each, up to `backoff_max`; starts over once the VM ran
            for longer than `backoff_max`.
        most: give up after so many restarts in a row; None: never.
    """

    when: Literal["never", "on-failure"] = "never"
    backoff: float = 0.1
    backoff_max: float = 30.0
    most: int | None = None

    def __attrs_post_init__(self) -> None:
        if self.when not in ("never", "on-failure"):
            raise _fail("restart", self.when, 'must be "never" or "on-failure"')
        if not 0 < _number("backoff", self.backoff) <= _number("backoff_max", self.backoff_max):
            raise _fail("backoff", self.backoff, f"must be more than 0 and at most backoff_max={self.backoff_max!r}")
        if self.most is not None:
            _whole("most", self.most, 1, 1_000_000)


def check_sampling(name: str, every: int) -> None:
    """Check how many bus locks there are to a sample."""
    _whole(name, every, 0, 1_000_000_000, " bus locks; 0: none")


def check_flag(field: str, value: object) -> None:
    """Check what is either so or not."""
    if not isinstance(value, bool):
        raise _fail(field, value, "must be True or False")


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Iterable) else value  # what is none, VmSpec refuses


def _to_restart(value: object) -> object:
    return Restart(when=value) if isinstance(value, str) else value  # type: ignore[arg-type]  # Restart checks it


@attrs.frozen(kw_only=True)
class VmSpec:
    """One virtual machine.

    Parameters:
        name: unique in its fleet.
        boot: what to run.
        memory: bytes of RAM from address 0, a multiple of 4096. Above 3 GiB it continues at 4 GiB.
        vcpus: how many virtual CPUs.
        tenant: a tenant that the fleet was opened with; None: the tenant "default".
        weight: this VM's share relative to its tenant's other VMs.
        limit: bus locks per second; None: only counted.
        exit_limit: exits of any kind per second; a string instruction counts by its elements.
        answer_limit: accesses per second that Python answers: `Vm.attach`, `Vm.requests`, and devices of `devices` that
            are Python. All VMs share the interpreter, so there is a limit unless you say otherwise (None): 2,000 a
            second, and as many at once after a rest.
        vcpu_limit, vcpu_exit_limit, vcpu_answer_limit: the same for each vCPU by itself.
        regions: memory beside the RAM.
        devices: what the guest finds at which port.
        irqchip: give it in-kernel interrupt controllers and a timer (PIC, I/O APIC, local APICs, PIT). Then HLT waits
            for an interrupt in the kernel; without, a HLT on every vCPU ends the VM as ``Halted``.
        bus_lock_detection: where a bus lock is reported, for the emulated backend to choose: "fault-like" (before the
            instruction, as AMD does) or "trap-like" (behind it, as Intel does). None: as the host does.
        sample_every: one bus lock of so many, and each vCPU's first, is looked at closely, for `Vm.profile`; 0: none.
            Does nothing where the fleet sees no bus locks.
        log_dirty: have KVM log which pages of 4 KiB the guest writes, in all memory that it may write, and count them
            (`VmFacts.dirty_pages`; see `Vm.log_dirty` for what that costs). The emulated backend can't; a scripted
            guest writes nothing, and none are told.
        restart: a `Restart`, or just "never" or "on-failure".
        on_reset: what to do when the guest resets itself (a triple fault, a system event). "stop": it ends as
            `Shutdown`. "reset": it starts afresh from its boot spec, as `Vm.reset` does: at once, 5 times in a row, and
            then once a second, so that a guest that does nothing else costs its host little.
        labels: free text for your own use.
    """

    name: str
    boot: FlatImage
    memory: int = 1 * MiB
    vcpus: int = 1
    tenant: str | None = None
    weight: float = 1.0
    limit: Limit | None = None
    exit_limit: Limit | None = None
    vcpu_limit: Limit | None = None
    vcpu_exit_limit: Limit | None = None
    answer_limit: Limit | None = ANSWER_LIMIT
    vcpu_answer_limit: Limit | None = None
    regions: tuple[MemoryRegion, ...] = attrs.field(default=(), converter=_to_tuple)
    devices: tuple[DeviceSpec, ...] = attrs.field(default=(), converter=_to_tuple)
    irqchip: bool = False
    bus_lock_detection: Literal["fault-like", "trap-like"] | None = None
    sample_every: int = 100
    log_dirty: bool = False
    restart: Restart = attrs.field(default=Restart(), converter=_to_restart)
    on_reset: Literal["stop", "reset"] = "stop"
    labels: Mapping[str, str] = attrs.field(factory=dict, hash=False)

    def __attrs_post_init__(self) -> None:
        _check_name("name", self.name)
        if not isinstance(self.boot, FlatImage):
            raise _fail("boot", self.boot, "must be a FlatImage")
        _whole("memory", self.memory, PAGE, MAX_MEMORY, " bytes")
        if self.memory % PAGE:
            raise _fail("memory", self.memory, f"must be a multiple of {PAGE} bytes")
        _whole("vcpus", self.vcpus, 1, MAX_VCPUS)
        if self.tenant is not None:
            _check_name("tenant", self.tenant)
        _check_weight(self.weight)
        for field in (field for meter in Meter for field in (meter.field, f"vcpu_{meter.field}")):
            optional_limit(field, getattr(self, field))
        if self.bus_lock_detection not in (None, "fault-like", "trap-like"):
            raise _fail("bus_lock_detection", self.bus_lock_detection, 'must be "fault-like", "trap-like" or None')
        check_sampling("sample_every", self.sample_every)
        check_flag("log_dirty", self.log_dirty)
        if not isinstance(self.restart, Restart):
            raise _fail("restart", self.restart, 'must be a Restart, "never" or "on-failure"')
        if self.on_reset not in ("stop", "reset"):
            raise _fail("on_reset", self.on_reset, 'must be "stop" or "reset"')
        for field in ("regions", "devices"):
            if not isinstance(getattr(self, field), tuple):
                raise _fail(field, getattr(self, field), "must be a tuple or list of them")
        if not isinstance(self.labels, Mapping):
            raise _fail("labels", self.labels, "must be a mapping, such as a dict")
        for region in self.regions:
            if not isinstance(region, MemoryRegion):
                raise _fail("regions", region, "must be MemoryRegion objects")
        for device in self.devices:
            if not isinstance(device, DebugConsole | ExitPort | Serial):
                raise _fail("devices", device, "must be DebugConsole, ExitPort or Serial; attach your own to the Vm")
        self._check_layout()

    @property
    def ram(self) -> tuple[range, ...]:
        """Guest-physical ranges of the RAM, around the MMIO hole."""
        if self.memory <= MMIO_HOLE.start:
            return (range(self.memory),)
        return range(MMIO_HOLE.start), range(MMIO_HOLE.stop, MMIO_HOLE.stop + self.memory - MMIO_HOLE.start)

    def _check_layout(self) -> None:
        spans = sorted([*self.ram, *(region.span for region in self.regions)], key=lambda span: span.start)
        for low, high in itertools.pairwise(spans):
            if high.start < low.stop:
                raise SpecError(
                    f"regions: {high.start:#x}-{high.stop - 1:#x} overlaps {low.start:#x}-{low.stop - 1:#x}; "
                    "RAM starts at 0 and is `memory` bytes: move the region or make the memory smaller"
                )
        boot = self.boot
        if not any(boot.load in span and boot.span.stop <= span.stop for span in spans):
            raise SpecError(
                f"boot: the image needs {boot.span.start:#x}-{boot.span.stop - 1:#x}, which is not inside the guest's "
                f"memory of {self.memory:#x} bytes: give it more memory or another load address"
            )
        if not any(boot.start in span for span in spans):
            raise SpecError(f"entry={boot.start:#x}: lies outside the guest's memory of {self.memory:#x} bytes")
        if boot.mode != 16:
            ours = range(self.stacks.start, self.tables.stop)
            if ours.start < 0:
                raise _fail(
                    "memory",
                    self.memory,
                    f"{boot.mode}-bit mode needs at least {self.memory - ours.start} bytes, for its tables and stacks",
                )
            if boot.span.start < ours.stop and ours.start < boot.span.stop:
                raise SpecError(
                    f"boot: the image at {boot.span.start:#x}-{boot.span.stop - 1:#x} overlaps the stacks and the "
                    f"descriptor and page tables at {ours.start:#x}-{ours.stop - 1:#x}: give it more memory"
                )

    @property
    def tables(self) -> range:
        """Where descriptor and page tables of a 32 or 64-bit `FlatImage` go: the end of the first RAM region.

        8 KiB above them stay free, for guests that put a small stack at the very end of their memory.
        """
        end = self.ram[0].stop
        return range(end - 12 * PAGE, end - 2 * PAGE)

    @property
    def stacks(self) -> range:
        """Where the stacks of the first vCPUs of a 32 or 64-bit `FlatImage` are, from the top down."""
        top = self.tables.start
        return range(top - min(self.vcpus, STACKS) * PAGE, top)
