"""Specs of limits, tenants and VMs. Plain frozen data, which is checked when it is made.

Each error names the field, the value and the remedy. All checks are made here, so the code that uses a spec trusts it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from .boot import BootSpec, FlatImage, Layout
from .checks import fail as _fail, number as _number, whole as _whole
from .cpu import CPU_TEMPLATES, CpuTemplate, check_cpu
from .devices import DeviceSpec, Irqchip, check_wiring, irqchip_kind
from .disk import Disk, disks_of
from .errors import SpecError
from .iolimit import IoLimit, optional_io_limit
from .memory import GiB, KiB, Memory, MemoryRegion, MiB, check_size, ram_ranges
from .topology import ONE_SOCKET, Topology

if TYPE_CHECKING:
    from attrs import Attribute

__all__ = [
    "BootSpec",
    "FlatImage",
    "GiB",
    "KiB",
    "Layout",
    "Limit",
    "Memory",
    "MemoryRegion",
    "Meter",
    "MiB",
    "Restart",
    "Tenant",
    "VmSpec",
]

MAX_VCPUS: Final = 4096


class Meter(StrEnum):
    """What a limit counts."""

    BUS_LOCKS = "bus_locks"
    EXITS = "exits"
    """Accesses that leave the guest: an exit is one, that of a string instruction as many as it has elements."""
    ANSWERS = "answers"
    """Accesses that Python answers, by a device or by a task. Each element of a string instruction counts."""

    __hash__ = str.__hash__  # in C: Enum's is a function in Python, and most of a launch is looked up by meter

    @property
    def field(self) -> str:
        """What a spec, a tenant, a fleet and a file of rules call a limit on it."""
        return _FIELDS[self]


_FIELDS: Final = {Meter.BUS_LOCKS: "limit", Meter.EXITS: "exit_limit", Meter.ANSWERS: "answer_limit"}
_LIMIT_FIELDS: Final = (*_FIELDS.values(), *(f"vcpu_{field}" for field in _FIELDS.values()))


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

    A change of the limit, or taking it off and setting it again, gives no new burst. The tokens that were left are
    kept, and without a limit they grow at the old rate up to the old burst.

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
    """The limit in force: the lowest rate with the smallest burst, so that no throttle loosens another limit.

    The `max_delay` is that of `base`, as the owner set it: a throttle neither releases a guest earlier nor holds it
    longer. If there is no base, the longest `max_delay` of the throttles counts.
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
        io_limit: how fast the disks of all its VMs may be together.
    """

    name: str
    weight: float = 1.0
    limit: Limit | None = None
    exit_limit: Limit | None = None
    answer_limit: Limit | None = None
    io_limit: IoLimit | None = None

    def __attrs_post_init__(self) -> None:
        _check_name("tenant", self.name)
        _check_weight(self.weight)
        for meter in Meter:
            optional_limit(meter.field, getattr(self, meter.field))
        optional_io_limit("io_limit", self.io_limit)


def _check_weight(value: object) -> None:
    if not 0 < _number("weight", value) <= 1e6:
        raise _fail("weight", value, "must be more than 0 and at most 1e6")


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
        boot: what to run: a `LinuxBoot`, a `FlatImage`, or another `BootSpec`.
        memory: bytes of RAM from address 0, a multiple of 4096. Above 3 GiB it continues at 4 GiB. Or a `Memory`, which
            says as well what it is made of.
        vcpus: how many virtual CPUs.
        tenant: a tenant that the fleet was opened with; None: the tenant "default".
        weight: this VM's share relative to its tenant's other VMs.
        limit: bus locks per second; None: only counted.
        exit_limit: exits of any kind per second; a string instruction counts by its elements. A notification of a
            queue is one, though the kernel takes it: the VM's I/O thread waits for it, and not the guest.
        answer_limit: accesses per second that Python answers: `Vm.attach`, `Vm.requests`, and devices of `devices` that
            are Python. All VMs share the interpreter, so there is a limit unless you say otherwise (None): 2,000 a
            second, and as many at once after a rest.
        vcpu_limit, vcpu_exit_limit, vcpu_answer_limit: the same for each vCPU by itself.
        regions: memory beside the RAM.
        devices: what the guest finds on its buses: `DeviceSpec` objects, ours or your own.
        irqchip: give it in-kernel interrupt controllers. True or "full": PIC, I/O APIC, local APICs.
            "split": the local APICs alone, for guests whose devices have MSIs and no interrupt lines. Then HLT waits
            for an interrupt in the kernel; without (False), a HLT on every vCPU ends the VM as ``Halted``. None: what
            the guest needs (`BootSpec.irqchip`): "full" for Linux, none for a flat image.
        pit: give it an i8254 timer (PIT) beside the "full" controllers, for old guests. A thread of the kernel makes
            its ticks, 5,000 a second if the guest wants so many, also while the VM is paused. No limit and no CPU cap
            holds that thread: give none to guests that you don't trust. Linux uses the local APIC's timer.
        cpu: which CPU the guest finds: a `CpuTemplate`, the name of one of `CPU_TEMPLATES`, or a TOML file of one, read
            at launch. "host": all that the host's KVM can give, but for its detection of bus locks. A host that
            lacks a feature of the template refuses the VM.
        topology: how the vCPUs are grouped: by default one socket, and a core for each.
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
    boot: BootSpec
    memory: int | Memory = 1 * MiB
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
    irqchip: bool | Literal["full", "split"] | None = None
    pit: bool = False
    cpu: str | CpuTemplate = "host"
    topology: Topology = ONE_SOCKET
    bus_lock_detection: Literal["fault-like", "trap-like"] | None = None
    sample_every: int = 100
    log_dirty: bool = False
    restart: Restart = attrs.field(default=Restart(), converter=_to_restart)
    on_reset: Literal["stop", "reset"] = "stop"
    labels: Mapping[str, str] = attrs.field(factory=dict, hash=False)

    def __attrs_post_init__(self) -> None:
        _check_name("name", self.name)
        if not isinstance(self.boot, BootSpec):
            raise _fail("boot", self.boot, "must be a BootSpec, such as FlatImage(code=...)")
        if not isinstance(self.memory, Memory):
            check_size("memory", self.memory)
        _whole("vcpus", self.vcpus, 1, MAX_VCPUS)
        if self.tenant is not None:
            _check_name("tenant", self.tenant)
        _check_weight(self.weight)
        for field in _LIMIT_FIELDS:
            optional_limit(field, getattr(self, field))
        if self.bus_lock_detection not in (None, "fault-like", "trap-like"):
            raise _fail("bus_lock_detection", self.bus_lock_detection, 'must be "fault-like", "trap-like" or None')
        check_cpu(self.cpu)
        if not isinstance(self.topology, Topology):
            raise _fail("topology", self.topology, "must be a Topology, such as Topology(sockets=2)")
        self.topology.check(self.vcpus)
        check_sampling("sample_every", self.sample_every)
        check_flag("pit", self.pit)
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
            if not isinstance(device, DeviceSpec):
                raise _fail("devices", device, "must be DeviceSpec objects, such as Serial(); `Vm.attach` takes others")
        disks_of(self.devices)
        self._check_layout()

    # Each launch asks for these a dozen times. A spec never changes, so each is worked out once.

    @functools.cached_property
    def disks(self) -> Mapping[str, Disk]:
        """The disks by name."""
        return disks_of(self.devices)

    @functools.cached_property
    def ram(self) -> tuple[range, ...]:
        """Guest-physical ranges of the RAM, around the MMIO hole."""
        return ram_ranges(self.backing.size)

    @functools.cached_property
    def backing(self) -> Memory:
        """What the RAM is made of, also where `memory` is just a number. Anonymous memory is shared instead if another
        process serves a device: it must map the memory."""
        memory = self.memory if isinstance(self.memory, Memory) else Memory(self.memory)
        if memory.backing == "anonymous" and self.has_back_ends:
            return attrs.evolve(memory, backing="shared")
        return memory

    @functools.cached_property
    def has_back_ends(self) -> bool:
        """Whether other processes serve devices of it, and have its memory."""
        return any(device.has_back_end for device in self.devices)

    @functools.cached_property
    def layout(self) -> Layout:
        """What it has for what it boots."""
        ram = self.ram
        spans = sorted([*ram, *(region.span for region in self.regions)], key=lambda span: span.start)
        return Layout(
            ram=ram,
            memory=tuple(spans),
            vcpus=self.vcpus,
            irqchip=self.irqchip_kind,
            devices=self.machine_devices,
        )

    @functools.cached_property
    def irqchip_kind(self) -> Irqchip:
        """The interrupt controllers that it has: as `irqchip` says, or as what it boots needs."""
        return self.boot.irqchip if self.irqchip is None else irqchip_kind(self.irqchip)

    @property
    def cpu_template(self) -> CpuTemplate:
        """The template that `cpu` is or names.

        Raises:
            SpecError: `cpu` is a file, which a launch reads.
        """
        if isinstance(self.cpu, CpuTemplate):
            return self.cpu
        if self.cpu not in CPU_TEMPLATES:
            raise _fail("cpu", self.cpu, "is a file: launch the VM, which reads it, or use load_cpu_template")
        return CPU_TEMPLATES[self.cpu]

    @functools.cached_property
    def machine_devices(self) -> tuple[DeviceSpec, ...]:
        """All devices, in the order in which they are plugged in: those of the platform before `devices`."""
        return *self.boot.platform(), *self.devices

    @property
    def memory_floor(self) -> int | None:
        """The least RAM that `Vm.set_memory` may leave the guest, in bytes. None: it has no device for that."""
        return next((least for device in self.devices if (least := device.memory_floor) is not None), None)

    def _check_layout(self) -> None:
        layout = self.layout
        for low, high in itertools.pairwise(layout.memory):
            if high.start < low.stop:
                raise SpecError(
                    f"regions: {high.start:#x}-{high.stop - 1:#x} overlaps {low.start:#x}-{low.stop - 1:#x}; "
                    "RAM starts at 0 and is `memory` bytes: move the region or make the memory smaller"
                )
        if self.pit and layout.irqchip != "full":
            raise _fail("pit", self.pit, f'needs irqchip="full" (it is "{layout.irqchip}"), or must be False')
        self.boot.check(layout)  # first, as what comes with it may need what it explains
        check_wiring(layout.devices, layout.irqchip, list(layout.memory))
        takers = [type(device).__name__ for device in self.devices if device.memory_floor is not None]
        if len(takers) > 1:
            raise SpecError(f"devices: {' and '.join(takers)}: a VM has one balloon")
        if takers and self.backing.huge_pages:
            raise SpecError(
                f"devices: {takers[0]}: with huge_pages=True the pages of the host's pool stay the VM's: leave one of "
                "them out, or use transparent huge pages"
            )
        self._check_back_ends()

    def _check_back_ends(self) -> None:
        """Another process that serves a device has the RAM, and writes it unseen."""
        served = next((device for device in self.devices if device.has_back_end), None)
        if served is None:
            return
        name = type(served).__name__
        if self.backing.backing != "shared":
            raise SpecError(
                f"memory: backing={self.backing.backing!r}: another process serves {name} and maps the memory: use "
                'backing="shared", or give the number of bytes alone'
            )
        if self.log_dirty:
            raise SpecError(
                f"log_dirty=True: another process serves {name}, and what it writes is not logged: leave one out"
            )
