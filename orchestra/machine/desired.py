"""What is desired of a VM: one frozen record, which outlives its runs.

Whatever holds a VM back, or is switched on for it, is in this record and in no other place. A launch makes the record
from the spec (`Desired.of`). Each start of a run puts the record into force, so a restart and a reset need nothing
else. A restore, or an arrival from another host, gives the old VM's record to the new VM, and the same start puts it
into force. The record is plain data for `codec`. Constructors check it, as it may come from a file or another host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeVar

import attrs

from ..model.actions import Action, CapCpu, Isolate, Pause, SetIoLimit, SetMemory, Throttle
from ..model.errors import SpecError
from ..model.iolimit import IoLimit
from ..model.memory import check_size
from ..model.spec import Limit, Meter, VmSpec, as_meter, check_flag, check_sampling, optional_limit, tightest

__all__ = [
    "UNLIMITED",
    "AskedCap",
    "AskedIoLimit",
    "AskedLimit",
    "AskedMemory",
    "Desired",
    "LimitStack",
    "PlacedLimits",
    "check_memory",
]

T = TypeVar("T")


def _check_by(_: object, field: attrs.Attribute[Any], by: object) -> None:
    if by is not None and not isinstance(by, str):
        raise SpecError(f"{field.name}={by!r:.200}: must be a policy's name, or None for callers")


def _check_share(_: object, field: attrs.Attribute[Any], share: object) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.01 <= share <= 1:
        raise SpecError(f"{field.name}={share!r:.200}: must be from 0.01 to 1")


def _check_memory(_: object, field: attrs.Attribute[Any], memory: object) -> None:
    check_size(field.name, memory)


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _all_are(kind: type) -> Any:
    def check(_: object, field: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, tuple) or not all(isinstance(one, kind) for one in value):
            raise SpecError(f"{field.name}={value!r:.200}: must be of {kind.__name__} only")

    return check


def _each_once(what: str, keys: Iterable[object]) -> None:
    keys = list(keys)
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise SpecError(f"{what}: {twice[0]!r} is there twice; leave one of them out")


def _flag(_: object, field: attrs.Attribute[Any], value: object) -> None:
    check_flag(field.name, value)


def _is_limit(_: object, field: attrs.Attribute[Any], value: object) -> None:
    optional_limit(field.name, value)


@attrs.frozen
class AskedCap:
    """A CPU cap: each vCPU may use `share` of a CPU, from 0.01 to 1. `by`: the policy that asks; None: a caller."""

    by: str | None = attrs.field(validator=_check_by)
    share: float = attrs.field(validator=_check_share)


@attrs.frozen
class AskedMemory:
    """The memory that the guest is asked to keep to, in bytes. `by`: the policy that asks; None: a caller."""

    by: str | None = attrs.field(validator=_check_by)
    memory: int = attrs.field(validator=_check_memory)


@attrs.frozen
class AskedLimit:
    """A throttle. `by`: the policy that asks for it; None: a caller."""

    by: str | None = attrs.field(validator=_check_by)
    limit: Limit = attrs.field(validator=attrs.validators.instance_of(Limit))


@attrs.frozen
class AskedIoLimit:
    """How fast disks may be together.

    Attributes:
        by: the policy that asks for it; None: the spec, or a caller.
        disk: the name of the disk; None: all disks of the VM.
    """

    by: str | None = attrs.field(validator=_check_by)
    io_limit: IoLimit = attrs.field(validator=attrs.validators.instance_of(IoLimit))
    disk: str | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.instance_of(str)))


@attrs.frozen
class LimitStack:
    """The limits on one meter of a VM, a vCPU, a tenant or a fleet.

    Attributes:
        base: the limit that a spec, a tenant or `set_limit` gives. None: none.
        throttles: limits on top of `base`, at most one of each asker. The tightest of all counts.
    """

    base: Limit | None = attrs.field(default=None, validator=_is_limit)
    throttles: tuple[AskedLimit, ...] = attrs.field(default=(), converter=_to_tuple, validator=_all_are(AskedLimit))

    def __attrs_post_init__(self) -> None:
        if len(self.throttles) > 1:
            _each_once("throttles: by", (one.by for one in self.throttles))

    @property
    def in_force(self) -> Limit | None:
        """The tightest limit of all. None: there is no limit."""
        return tightest(self.base, (one.limit for one in self.throttles)) if self.throttles else self.base

    def with_base(self, limit: Limit | None) -> LimitStack:
        return attrs.evolve(self, base=limit)

    def with_throttle(self, by: str | None, limit: Limit | None) -> LimitStack:
        """This stack, after `by` asks for that limit. None: `by` takes its limit back."""
        asked = None if limit is None else AskedLimit(by, limit)
        return attrs.evolve(self, throttles=_replaced(self.throttles, by, asked))


UNLIMITED: Final = LimitStack()


@attrs.frozen
class PlacedLimits:
    """The limits of a VM, or of one of its vCPUs, on one meter.

    Attributes:
        vcpu: the number of the vCPU. None: the limits of the whole VM.
    """

    meter: Meter = attrs.field(converter=as_meter)
    vcpu: int | None = attrs.field()
    limits: LimitStack = attrs.field(validator=attrs.validators.instance_of(LimitStack))

    @vcpu.validator
    def _check_vcpu(self, _: object, vcpu: object) -> None:
        if vcpu is not None and (isinstance(vcpu, bool) or not isinstance(vcpu, int) or vcpu < 0):
            raise SpecError(f"vcpu={vcpu!r:.200}: must be the number of a vCPU, or None for all of the VM together")

    def __attrs_post_init__(self) -> None:
        if self.vcpu is not None and self.limits.throttles:
            raise SpecError(f"vcpu={self.vcpu}, limits: throttles are on a whole VM: name no vCPU")


@attrs.frozen(kw_only=True)
class Desired:
    """What is desired of one VM. A change of the record while a run is on must be put into force as well; between two
    runs a change of the record is enough. If the host refuses a part at a start, that part is logged and taken out of
    the record, so that the record never claims what is not in force.

    Attributes:
        paused: the vCPUs run no guest code.
        caps: CPU caps, at most one of each asker. The tightest counts.
        memory: what the guest is asked to keep to of its memory, at most one request of each asker. The smallest
            counts.
        isolated: the vCPUs run on the quarantine CPUs only.
        log_dirty: KVM logs the pages that the guest writes; None: as the spec says.
        sample_every: one bus lock of each `sample_every` is sampled; 0: none.
        limits: of the VM and of its vCPUs, by meter. A pair (meter, vcpu) that is not here has no limit.
        io_limits: of the VM's disks, at most one of each asker for each disk, and for all. The tightest counts.
    """

    paused: bool = attrs.field(default=False, validator=_flag)
    caps: tuple[AskedCap, ...] = attrs.field(default=(), converter=_to_tuple, validator=_all_are(AskedCap))
    memory: tuple[AskedMemory, ...] = attrs.field(default=(), converter=_to_tuple, validator=_all_are(AskedMemory))
    isolated: bool = attrs.field(default=False, validator=_flag)
    log_dirty: bool | None = attrs.field(default=None, validator=attrs.validators.optional(_flag))
    sample_every: int = attrs.field(default=0)
    limits: tuple[PlacedLimits, ...] = attrs.field(default=(), converter=_to_tuple, validator=_all_are(PlacedLimits))
    io_limits: tuple[AskedIoLimit, ...] = attrs.field(default=(), converter=_to_tuple, validator=_all_are(AskedIoLimit))

    def __attrs_post_init__(self) -> None:
        check_sampling("sample_every", self.sample_every)
        if len(self.caps) > 1:
            _each_once("caps: by", (cap.by for cap in self.caps))
        if len(self.memory) > 1:
            _each_once("memory: by", (one.by for one in self.memory))
        if len(self.limits) > 1:
            _each_once("limits: (meter, vcpu)", ((str(one.meter), one.vcpu) for one in self.limits))
        if len(self.io_limits) > 1:
            _each_once("io_limits: (by, disk)", ((one.by, one.disk) for one in self.io_limits))

    @classmethod
    def of(cls, spec: VmSpec, *, paused: bool = False) -> Desired:
        """The record of a VM that is launched from that spec."""
        places: list[tuple[str, int | None]] = [("", None), *(("vcpu_", index) for index in range(spec.vcpus))]
        limits = [
            PlacedLimits(meter, vcpu, LimitStack(limit))
            for prefix, vcpu in places
            for meter in Meter
            if (limit := getattr(spec, prefix + meter.field)) is not None
        ]
        io = [AskedIoLimit(None, disk.io_limit, name) for name, disk in spec.disks.items() if disk.io_limit is not None]
        return cls(paused=paused, sample_every=spec.sample_every, limits=limits, io_limits=io)

    # ---- caps

    @property
    def cap(self) -> float | None:
        """The tightest cap; None: none."""
        return min((cap.share for cap in self.caps), default=None)

    def cap_of(self, by: str | None) -> float | None:
        """The cap that one asker has in the record; None: none."""
        return next((cap.share for cap in self.caps if cap.by == by), None)

    def with_cap(self, by: str | None, share: float | None) -> Desired:
        """This record, after `by` asks for that cap. None: `by` takes its cap back."""
        asked = None if share is None else AskedCap(by, share)
        return attrs.evolve(self, caps=_replaced(self.caps, by, asked))

    # ---- memory that the guest is asked to keep to

    @property
    def memory_target(self) -> int | None:
        """The smallest that is asked for, in bytes; None: nothing is asked for."""
        return min((one.memory for one in self.memory), default=None)

    def memory_of(self, by: str | None) -> int | None:
        """What one asker asks for in the record; None: nothing."""
        return next((one.memory for one in self.memory if one.by == by), None)

    def with_memory(self, by: str | None, memory: int | None) -> Desired:
        """This record, after `by` asks for that. None: `by` takes its request back."""
        asked = None if memory is None else AskedMemory(by, memory)
        return attrs.evolve(self, memory=_replaced(self.memory, by, asked))

    # ---- limits

    def limits_at(self, meter: Meter, vcpu: int | None = None) -> LimitStack:
        return next((one.limits for one in self.limits if (one.meter, one.vcpu) == (meter, vcpu)), UNLIMITED)

    def io_limits_at(self, disk: str | None) -> tuple[AskedIoLimit, ...]:
        """The limits of a disk, or (None) of all disks together."""
        return tuple(one for one in self.io_limits if one.disk == disk)

    def with_io_limit(self, by: str | None, disk: str | None, io_limit: IoLimit | None) -> Desired:
        """This record, after `by` asks for that limit. None: `by` takes its limit back."""
        others = tuple(one for one in self.io_limits if (one.by, one.disk) != (by, disk))
        return attrs.evolve(self, io_limits=others if io_limit is None else (*others, AskedIoLimit(by, io_limit, disk)))

    def check_for(self, spec: VmSpec) -> None:
        """Check that a VM of that spec can be as this record says.

        Raises:
            SpecError: the record limits a vCPU or a disk that the VM does not have, or asks for memory that it can't
                have.
        """
        for io in self.io_limits:
            if io.disk is not None and io.disk not in spec.disks:
                raise SpecError(f"io_limits: disk={io.disk!r}: vm {spec.name!r} has {', '.join(spec.disks) or 'none'}")
        for asked in self.memory:
            check_memory(spec, asked.memory)
        for one in self.limits:
            if one.vcpu is not None and one.vcpu >= spec.vcpus:
                raise SpecError(f"limits: vcpu={one.vcpu}: vm {spec.name!r} has vCPUs 0 to {spec.vcpus - 1}")

    # ---- the actions behind the record

    def actions(self, vm: str, reason: str) -> Iterator[tuple[Action, str | None]]:
        """The actions that lead to this record, each with the policy that asked for it (None: a caller).

        A VM that arrives is journaled with them, so the same policies hold it as before. Base limits are not among
        them: the journal has these as given with the VM, and not as actions.
        """
        if self.paused:
            yield Pause(vm=vm, reason=reason), None
        for cap in self.caps:
            yield CapCpu(vm=vm, share=cap.share, reason=reason), cap.by
        for wish in self.memory:
            yield SetMemory(vm=vm, memory=wish.memory, reason=reason), wish.by
        if self.isolated:
            yield Isolate(vm=vm, reason=reason), None
        for placed in self.limits:
            for asked in placed.limits.throttles:
                yield Throttle(vm=vm, limit=asked.limit, meter=placed.meter, reason=reason), asked.by
        for io in self.io_limits:
            if io.by is not None:
                yield SetIoLimit(vm=vm, disk=io.disk, io_limit=io.io_limit, reason=reason), io.by

    # ---- the dirty log

    def spec(self, spec: VmSpec) -> VmSpec:
        """The spec that the next run is made from: the VM's own, with `log_dirty` as desired."""
        if self.log_dirty is None:
            return spec
        regions = [attrs.evolve(region, log_dirty=False) for region in spec.regions]
        return attrs.evolve(spec, log_dirty=self.log_dirty, regions=regions)

    def logs_dirty(self, spec: VmSpec) -> bool:
        """Whether KVM will log any of the next run's memory."""
        spec = self.spec(spec)
        return spec.log_dirty or any(region.log_dirty for region in spec.regions)


def _replaced(asked: tuple[T, ...], by: str | None, one: T | None) -> tuple[T, ...]:
    """`asked`, with `one` at the end in place of the entry of `by`. None: without an entry of `by`."""
    others = tuple(other for other in asked if other.by != by)  # type: ignore[attr-defined]  # both kinds have it
    return others if one is None else (*others, one)


def check_memory(spec: VmSpec, memory: int) -> None:
    """Check what the guest of such a VM is asked to keep to, in bytes.

    Raises:
        SpecError: the VM has no balloon, or that is more than its memory or less than the balloon's floor.
    """
    check_size("memory", memory)
    least, most = spec.memory_floor, spec.backing.size
    if least is None:
        raise SpecError(f"memory={memory}: vm {spec.name!r} has no balloon: add orc.Balloon() to its devices")
    if memory > most:
        raise SpecError(f"memory={memory}: vm {spec.name!r} has {most} bytes: it can't have more than its spec says")
    if memory < min(least, most):
        raise SpecError(f"memory={memory}: must be at least {min(least, most)} bytes, the floor of the VM's balloon")
