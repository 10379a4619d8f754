"""Who is where: a scenario's hosts and VMs as arrays. Nothing here changes while it runs."""

from __future__ import annotations

from ..model.spec import Limit, Tenant
from .arrays import Floats, Ints, generator, np
from .cpus import HostCpu
from .scenario import Placement, Scenario, Vms

__all__ = ["Layout"]

PLACES = 0
"""The key of the random numbers that place VMs on hosts; groups have the keys from 1 up."""


class Layout:
    """VMs are numbered group by group. Arrays with an entry for each VM are named in the singular.

    Attributes:
        first: number of each group's first VM.
        host: each VM's host. group, tenant, vcpus, weight: as the scenario says.
        pair: each VM's tenant on its host, by a number of its own; `pair_of` finds it.
        capacity, worst, budget: of each host: locks a second that take the whole bus; how much the affected accesses
            suffer by it; locks a second that the scenario allows.
        victims: how many of each group's VMs are on each host, of groups that count as victims.
        load: vCPUs that run on each host on the average.
    """

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        groups = scenario.vms
        counts = [vms.count for vms in groups]
        self.size = sum(counts)
        self.first = [sum(counts[:i]) for i in range(len(counts))]
        self.group = np.repeat(np.arange(len(groups), dtype=np.int16), counts)
        self.vcpus = np.repeat([float(vms.vcpus) for vms in groups], counts)
        self.weight = np.repeat([float(vms.weight) for vms in groups], counts)
        self.utilisation = [vms.cpu for vms in groups]

        self.models: list[HostCpu] = [scenario.cpu_of(hosts) for hosts in scenario.hosts]
        self.host_class = np.repeat(np.arange(len(scenario.hosts)), [hosts.count for hosts in scenario.hosts])
        self.hosts = len(self.host_class)
        self.capacity = np.array([model.capacity for model in self.models])[self.host_class]
        self.worst = np.array([model.worst for model in self.models])[self.host_class]
        self.cpus = np.array([float(hosts.cpus) for hosts in scenario.hosts])[self.host_class]
        self.quarantine = np.array([float(hosts.quarantine) for hosts in scenario.hosts])[self.host_class]
        self.budget = scenario.budget.bus_share * self.capacity
        self.host = self._place(seed, counts)

        self.tenants: list[str] = []
        numbers: dict[str, int] = {}
        tenant = np.empty(self.size, np.int32)
        for vms, start in zip(groups, self.first, strict=True):
            names = [vms.tenant] if vms.tenants == 1 else [f"{vms.tenant}-{i}" for i in range(vms.tenants)]
            ids = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
            tenant[start : start + vms.count] = ids[np.arange(vms.count) % len(ids)]
        self.tenant = tenant
        self.tenants = list(numbers)
        self._pairs, pair = np.unique(self.host.astype(np.int64) * len(self.tenants) + tenant, return_inverse=True)
        self.pair = pair.astype(np.int32)
        self._numbers = numbers

        self.victims = np.zeros((self.hosts, len(groups)))
        for i, vms in enumerate(groups):
            if vms.suffers:
                self.victims[:, i] = np.bincount(self._members(i, self.host), minlength=self.hosts)
        self.memory_share = np.array([vms.memory_share for vms in groups])
        self.sensitivity = np.array([vms.memory_share if vms.suffers else 0.0 for vms in groups])
        self.load = np.zeros(self.hosts)
        for i, vms in enumerate(groups):
            self.load += np.bincount(self._members(i, self.host), minlength=self.hosts) * (vms.vcpus * vms.cpu)

    def _members(self, group: int, of: Ints) -> Ints:
        return of[self.first[group] : self.first[group] + self.scenario.vms[group].count]

    def _place(self, seed: int, counts: list[int]) -> Ints:
        place = self.scenario.placement
        if place is Placement.SPREAD:
            return np.concatenate([np.arange(count) % self.hosts for count in counts]).astype(np.int32)
        if place is Placement.PACKED:
            return (np.arange(self.size) * self.hosts // self.size).astype(np.int32)
        return generator(seed, PLACES).permutation(np.arange(self.size, dtype=np.int32) % self.hosts)

    def name(self, vm: int) -> str:
        """A VM's name."""
        group = self.group[vm]
        return f"{self.scenario.vms[group].name}-{vm - self.first[group]}"

    def number(self, name: str, host: int) -> int | None:
        """The VM of that name, if it is on that host."""
        group_name, _, index = name.rpartition("-")
        for i, vms in enumerate(self.scenario.vms):
            if vms.name == group_name and index.isdecimal() and int(index) < vms.count:
                vm = self.first[i] + int(index)
                return vm if self.host[vm] == host and index == str(int(index)) else None
        return None

    def group_of(self, vm: int) -> Vms:
        return self.scenario.vms[int(self.group[vm])]

    def pair_of(self, host: int, tenant: str) -> int | None:
        """The number of a tenant on a host; None: it has no VM there."""
        if tenant not in self._numbers:
            return None
        key = host * len(self.tenants) + self._numbers[tenant]
        at = int(np.searchsorted(self._pairs, key))
        return at if at < len(self._pairs) and self._pairs[at] == key else None

    def tenant_at(self, pair: int) -> tuple[int, str]:
        """The host and the tenant that a pair's number stands for."""
        host, tenant = divmod(int(self._pairs[pair]), len(self.tenants))
        return host, self.tenants[tenant]

    @property
    def pairs(self) -> int:
        return len(self._pairs)

    def tenant_tables(self) -> list[dict[str, Tenant]]:
        """What facts say of the tenants, for each kind of host."""
        said = {one.name: one for one in self.scenario.tenants}
        tables = []
        for model in self.models:
            table: dict[str, Tenant] = {}
            for name in {**dict.fromkeys(self.tenants), **said}:
                one = said.get(name)
                limit: Limit | None = None if one is None or one.limit is None else one.limit.on(model)
                table[name] = Tenant(name, weight=1.0 if one is None else one.weight, limit=limit)
            tables.append(table)
        return tables

    def of_tenant(self, name: str) -> Floats | Ints:
        """Numbers of that tenant on all hosts where it has VMs, and the hosts: a row each."""
        if name not in self._numbers:
            return np.empty((2, 0), np.int64)
        at = np.flatnonzero(self._pairs % len(self.tenants) == self._numbers[name])
        return np.stack([at, self._pairs[at] // len(self.tenants)])
