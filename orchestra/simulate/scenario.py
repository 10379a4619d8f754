"""What to simulate: hosts, guests, a budget and policies, as a TOML file says it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

import attrs

from .. import toml as tomlfile
from ..config.forms import dialect
from ..model.codec import CodecError, Wrong
from ..model.errors import SpecError
from ..model.spec import Tenant
from ..policy import Guard
from .behaviours import Behaviour, Quiet
from .cpus import CPUS, HostCpu, LimitSpec
from .policies import PolicySpec, check_policy

__all__ = ["Budget", "Hosts", "Placement", "Scenario", "Tenants", "Vms", "load_scenario", "read_scenario"]

MOST_VMS = 10_000_000
MOST_TICKS = 10_000_000


def _range(owner: object, field: str, low: float, high: float) -> None:
    value = getattr(owner, field)
    if not low <= value <= high:
        raise SpecError(f"{field}={value!r}: must be from {low:g} to {high:g}")


def _named(owner: object, field: str = "name") -> None:
    value = getattr(owner, field)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", value):
        raise SpecError(
            f"{field}={value!r}: must be 1 to 40 letters, digits, '.', '_' or '-', the first a letter or digit"
        )


class Placement(StrEnum):
    """Which host a VM is on: by chance (the hosts equally full), each group evenly over all hosts, or group by group
    with as few hosts as will do."""

    RANDOM = "random"
    SPREAD = "spread"
    PACKED = "packed"


@attrs.frozen(kw_only=True)
class Budget:
    """What the operator thinks right: the yardstick of the report, whatever the policies do.

    Parameters:
        bus_share: part of a host's bus time that all its guests together may take.
        memory: seconds for which a VM that took too much is still fairly held back.
    """

    bus_share: float = 0.05
    memory: float = 60.0

    def __attrs_post_init__(self) -> None:
        _range(self, "bus_share", 1e-9, 1.0)
        _range(self, "memory", 0.0, 1e9)


@attrs.frozen(kw_only=True)
class Hosts:
    """Hosts of one kind.

    Parameters:
        count: how many.
        cpu: its model: one of `CPUS`, or of the scenario's own.
        cpus: logical CPUs.
        quarantine: how many of them isolated VMs share.
        limit: the host's own limit, without any policy.
    """

    count: int
    cpu: str = "default"
    cpus: int = 64
    quarantine: int = 2
    limit: LimitSpec | None = None

    def __attrs_post_init__(self) -> None:
        _range(self, "count", 1, MOST_VMS)
        _range(self, "cpus", 1, 100_000)
        _range(self, "quarantine", 1, self.cpus)


@attrs.frozen(kw_only=True)
class Tenants:
    """A tenant that has a weight or a limit (for its VMs on one host). Others need no table."""

    name: str
    weight: float = 1.0
    limit: LimitSpec | None = None

    def __attrs_post_init__(self) -> None:
        Tenant(self.name, weight=self.weight)


@attrs.frozen(kw_only=True)
class Vms:
    """A group of VMs that are alike.

    Parameters:
        name: its VMs are called NAME-0, NAME-1, ...
        count: how many.
        behaviour: what their guests do.
        tenant: whose they are.
        tenants: if more than 1, that many tenants by turns: TENANT-0, TENANT-1, ...
        vcpus, weight: as in `VmSpec`.
        limit: its own limit, without any policy.
        cpu: part of the time that its vCPUs run, 0 to 1.
        memory_share: part of its running time that a VM spends on accesses that a bus lock delays (docs/simulate.md).
        victims: whether it counts among those whose slow-down is reported. Default: if its behaviour is innocent.
        reports_work: it reports its own work (`Vm.report_work`), so policies see it suffer.
    """

    name: str
    count: int
    behaviour: Behaviour = attrs.field(factory=Quiet)
    tenant: str = "tenant"
    tenants: int = 1
    vcpus: int = 1
    weight: float = 1.0
    limit: LimitSpec | None = None
    cpu: float = 0.3
    memory_share: float = 0.3
    victims: bool | None = None
    reports_work: bool = False

    def __attrs_post_init__(self) -> None:
        _named(self)
        _range(self, "count", 1, MOST_VMS)
        _range(self, "tenants", 1, MOST_VMS)
        _range(self, "vcpus", 1, 4096)
        _range(self, "cpu", 0.0, 1.0)
        _range(self, "memory_share", 0.0, 1.0)
        Tenant(self.tenant, weight=self.weight)

    @property
    def suffers(self) -> bool:
        return not self.behaviour.guilty if self.victims is None else self.victims


@attrs.frozen(kw_only=True)
class Scenario:
    """All of it.

    Parameters:
        name, about: for the report.
        duration: simulated seconds.
        tick: seconds; limits, damage and policies are worked out once in each.
        seed: the same seed gives the same run, bit by bit (with the same numpy on the same kind of CPU).
        budget: the report's yardstick.
        hosts, vms, tenants: the classes of hosts, the groups of VMs, and the tenants.
        placement: how VMs are distributed over hosts.
        policies: what each host runs; each host has instances of its own.
        guard: what no policy may do, as live; each host has one of its own.
        settle: ticks for which the policies of a host still look at it when nobody locks there any more.
        cpus: CPU models beside `CPUS`, or in the place of some.
    """

    name: str = "scenario"
    about: str = ""
    duration: float
    tick: float = 1.0
    seed: int = 1
    budget: Budget = Budget()
    hosts: tuple[Hosts, ...]
    vms: tuple[Vms, ...]
    tenants: tuple[Tenants, ...] = ()
    placement: Placement = Placement.RANDOM
    policies: tuple[PolicySpec, ...] = ()
    guard: Guard = attrs.field(factory=Guard, eq=False)
    settle: int = 5
    cpus: Mapping[str, HostCpu] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        mistakes = [*self._mistakes()]
        if mistakes:
            raise CodecError(mistakes)

    @property
    def ticks(self) -> int:
        return max(1, round(self.duration / self.tick))

    @property
    def size(self) -> int:
        """VMs in all."""
        return sum(vms.count for vms in self.vms)

    def cpu_of(self, hosts: Hosts) -> HostCpu:
        return self.cpus[hosts.cpu] if hosts.cpu in self.cpus else CPUS[hosts.cpu]

    def _mistakes(self) -> Sequence[Wrong]:
        """What can't be, of values that are right each for itself."""
        found: list[Wrong] = []

        def wrong(text: str, *at: str | int) -> None:
            found.append(Wrong(at, text))

        if not 1e-6 <= self.tick <= 3600:
            wrong(f"{self.tick!r}: must be from 1e-06 to 3600 seconds", "tick")
        elif not self.tick <= self.duration < math.inf:
            wrong(f"{self.duration!r}: must be at least a tick ({self.tick:g} s) and finite", "duration")
        elif self.duration / self.tick > MOST_TICKS:
            wrong(f"{self.duration!r}: makes more than {MOST_TICKS} ticks of {self.tick:g} s", "duration")
        if self.settle < 0:
            wrong(f"{self.settle!r}: must be 0 or more ticks", "settle")
        if self.seed < 0:
            wrong(f"{self.seed!r}: must be 0 or more", "seed")
        for field in ("hosts", "vms"):
            if not getattr(self, field):
                wrong("needs at least one table", field)
        if self.size > MOST_VMS:
            wrong(f"{self.size} VMs; at most {MOST_VMS}", "vms")
        if self.guard.dry_run:
            wrong(f"{self.guard.dry_run!r}: a simulation does nothing to anybody: leave it out", "guard", "dry_run")
        known = {*CPUS, *self.cpus}
        for i, hosts in enumerate(self.hosts):
            if hosts.cpu not in known:
                wrong(f"{hosts.cpu!r}: no such CPU model; there are: {', '.join(sorted(known))}", "hosts", i, "cpu")
        for field in ("vms", "tenants"):
            names: set[str] = set()
            for i, one in enumerate(getattr(self, field)):
                if one.name in names:
                    wrong(f"{one.name!r}: another has that name", field, i, "name")
                names.add(one.name)
        cpus = [self.cpu_of(hosts) for hosts in self.hosts if hosts.cpu in known] or [HostCpu()]
        seen: set[str] = set()
        for i, policy in enumerate(self.policies):
            try:
                name = check_policy(policy, cpus)
            except CodecError as error:
                found += [attrs.evolve(one, at=("policies", i, *one.at)) for one in error.mistakes]
                continue
            if name in seen:
                wrong(f"{name!r}: another policy has that name; give this one a `name` of its own", "policies", i)
            seen.add(name)
        return found


SCENARIO: Final = dialect()


def read_scenario(path: Path | str) -> Scenario:
    """A scenario from a TOML file.

    Raises:
        orchestra.toml.TomlError: it says what can't be; all mistakes at once, with line and key.
        OSError: it can't be read.
    """
    return tomlfile.read(Path(path), Scenario, SCENARIO)


def load_scenario(text: str, file: str = "scenario") -> Scenario:
    """The same for text that is there already."""
    return tomlfile.structure(text, Scenario, file, SCENARIO)
