"""The disks of a VM: their limits, which outlive its runs, and what they did in all runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

import attrs

from ..model.actions import SetIoLimit
from ..model.disk import Disk
from ..model.errors import SpecError, StateError
from ..model.iolimit import IoLimit, optional_io_limit
from ..model.spec import VmSpec
from .context import InstanceContext
from .desired import Desired
from .iobudget import IoBudget

__all__ = ["DiskStatistics", "Disks", "VmDisk", "VmDisks", "check_held"]

LEVELS: Final = ("disk", "vm", "group", "tenant")
"""As `enum` ORC_BLK_OWN, and so on, of native/virtio.h has them, from the narrowest to the widest."""


@attrs.frozen
class DiskStatistics:
    """What a disk did since its VM was launched, restarts and resets included.

    Attributes:
        reads, writes, flushes, discards, zeroes: requests that were done.
        read_bytes, written_bytes: their data.
        errors: requests that the guest got an error for.
        no_space: those among them that the host had no room for.
        waits: requests that a limit has kept waiting.
        throttled_seconds: how long the requests of the guest have waited for a limit, a wait in progress included.
        throttled_by: the same by the limit that was the slowest: of the "disk", of all disks of the "vm", of its
            "group" or of its "tenant". Limits that kept nothing waiting are left out.
    """

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    zeroes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    errors: int = 0
    no_space: int = 0
    waits: int = 0
    throttled_seconds: float = 0.0
    throttled_by: Mapping[str, float] = attrs.field(factory=dict, hash=False)


COUNTS: Final = tuple(field.name for field in attrs.fields(DiskStatistics) if not field.name.startswith("throttled"))


def check_held(spec: VmSpec, limit: IoLimit | None, whose: str) -> None:
    """Check that a limit on all disks of a VM holds all of them.

    Raises:
        SpecError: another process serves one of them.
    """
    served = next((device for device in spec.devices if device.has_back_end), None)
    if limit is not None and served is not None:
        raise SpecError(
            f"io_limit of {whose}: it does not hold the process that serves {type(served).__name__} of vm "
            f"{spec.name!r}: use a raw Disk there, or no limit"
        )


class Counted(Protocol):
    """The device of a disk, as `DiskPort` needs it."""

    def counters(self) -> Any:
        """Its ``struct orc_blk_counters``."""

    def limit_changed(self) -> None:
        """A limit of it has changed: what waits looks again."""


class DiskPort:
    """What a disk has beside its runs: its budgets, and the sums of what its devices counted.

    Parameters:
        budgets: of the disk, of all disks of its VM, of its group (None: it has none) and of its tenant.
    """

    def __init__(self, name: str, spec: Disk, budgets: tuple[IoBudget, IoBudget, IoBudget | None, IoBudget]) -> None:
        self.name = name
        self.spec = spec
        self.budgets = budgets
        self._device: Counted | None = None
        self._counts = dict.fromkeys(COUNTS, 0)
        self._waited = [0] * len(LEVELS)

    def plugged(self, device: Counted) -> None:
        """A run has made its device. Any thread."""
        self._device = device
        for budget in self.budgets:
            if budget is not None:
                budget.watch(device, device.limit_changed)

    def unplugged(self, device: Counted) -> None:
        """The device stops: what it counted is kept. Any thread."""
        for budget in self.budgets:
            if budget is not None:
                budget.unwatch(device)
        if self._device is device:
            self._device = None
            self._add(device, self._counts, self._waited)

    @staticmethod
    def _add(device: Counted, counts: dict[str, int], waited: list[int]) -> None:
        raw = device.counters()
        for name in COUNTS:
            counts[name] += int(getattr(raw, name))
        for level in range(len(LEVELS)):
            waited[level] += int(raw.waited[level])

    def statistics(self) -> DiskStatistics:
        counts, waited, device = dict(self._counts), list(self._waited), self._device
        if device is not None:
            self._add(device, counts, waited)
        by = {level: time / 1e9 for level, time in zip(LEVELS, waited, strict=True) if time}
        return DiskStatistics(**counts, throttled_seconds=sum(waited) / 1e9, throttled_by=by)


class Control(Protocol):
    """The VM whose disks these are."""

    context: InstanceContext
    spec: VmSpec
    name: str
    wanted: Desired

    @property
    def outcome(self) -> Any: ...


class VmDisks:
    """The disks of one VM, for the fleet's own parts; for the fleet's thread.

    Attributes:
        ports: the disks by name.
    """

    def __init__(self, vm: Control, tenant: str) -> None:
        self._vm = vm
        found, desired = vm.spec.disks, vm.wanted
        self.ports: dict[str, DiskPort] = {}
        self._budgets: list[IoBudget] = []
        if found:
            self._all = self._budget(None, desired)
            above = vm.context.io_budget
            for name, spec in found.items():
                group = None if spec.io_group is None else above(group=spec.io_group)
                own = self._budget(name, desired)
                self.ports[name] = DiskPort(name, spec, (own, self._all, group, above(tenant=tenant)))

    def _budget(self, disk: str | None, desired: Desired) -> IoBudget:
        made = IoBudget(desired.io_limits_at(disk))
        self._budgets.append(made)
        return made

    def port(self, name: str) -> DiskPort:
        """The disk of that name.

        Raises:
            SpecError: there is none.
        """
        try:
            return self.ports[name]
        except (KeyError, TypeError):
            known = ", ".join(self.ports) or "none"
            raise SpecError(f"disk={name!r}: vm {self._vm.name!r} has no such disk; there are: {known}") from None

    def of_number(self, number: int) -> DiskPort:
        """The disk that is the VM's first, second or later one."""
        return list(self.ports.values())[number]

    def set_limit_nowait(self, by: str | None, disk: str | None, limit: IoLimit | None) -> None:
        """As `VmDisk.set_limit`. `by`: the policy that asks; None: a caller. `disk`: None: all together.

        Raises:
            SpecError: there is no such disk, or none at all.
            StateError: the VM has ended.
        """
        vm = self._vm
        if vm.outcome is not None:
            raise StateError(f"vm {vm.name!r} has ended: it has no limit to change")
        if not self.ports:
            raise SpecError(f"vm {vm.name!r} has no disk to limit")
        if disk is None:
            check_held(vm.spec, limit, f"vm {vm.name!r}")
        budget = self._all if disk is None else self.port(disk).budgets[0]
        vm.wanted = vm.wanted.with_io_limit(by, disk, limit)
        budget.put(vm.wanted.io_limits_at(disk))

    def close(self) -> None:
        """Free the buckets. No device has them any more."""
        for budget in self._budgets:
            budget.close()


class VmDisk:
    """A disk of a VM (`Vm.disks`). For the fleet's thread.

    Attributes:
        name: its name in its VM.
        spec: as the VM's spec has it. `limit` is how fast it may be now.
    """

    def __init__(self, disks: VmDisks, name: str, context: InstanceContext, vm: str) -> None:
        port = disks.port(name)
        self.name = name
        self.spec = port.spec
        self._disks = disks
        self._port = port
        self._context = context
        self._vm = vm

    @property
    def limit(self) -> IoLimit | None:
        """The disk's own limit in force: the tightest of what spec, callers and policies ask for. None: there is none.
        Those of its VM, group and tenant count as well."""
        return self._port.budgets[0].in_force

    def set_limit(self, limit: IoLimit | None) -> None:
        """Change how fast the disk may be. At once, also for requests that wait. The setting holds over restarts.

        Parameters:
            limit: None: no limit but those of policies.

        Raises:
            SpecError: not a limit.
            StateError: the VM has ended.
        """
        optional_io_limit("limit", limit)
        self._disks.set_limit_nowait(None, self.name, limit)
        action = SetIoLimit(vm=self._vm, disk=self.name, io_limit=limit, reason="set_limit()")
        self._context.did(action)

    def statistics(self) -> DiskStatistics:
        """What the disk did since its VM was launched, as frozen data."""
        return self._port.statistics()

    def __repr__(self) -> str:
        return f"<VmDisk {self.name!r} of {self._vm!r}: {self.spec.path}>"


class Disks(Mapping[str, VmDisk]):
    """`Vm.disks`: the VM's disks by name, in their order."""

    def __init__(self, disks: VmDisks, context: InstanceContext, vm: str) -> None:
        self._made = {name: VmDisk(disks, name, context, vm) for name in disks.ports}

    def __getitem__(self, name: str) -> VmDisk:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __repr__(self) -> str:
        return repr(self._made)
