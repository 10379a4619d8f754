"""The tenants of a fleet, its groups of disks, and its own limits: their budgets, and how they change while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs

from ..machine.budget import Budgets, limits_of, make_budgets
from ..machine.control import VmControl
from ..machine.desired import AskedIoLimit
from ..machine.iobudget import IoBudget
from ..model.actions import SetIoLimit, SetLimit
from ..model.effects import inverse
from ..model.errors import SpecError, StateError, UnknownTenant
from ..model.iolimit import IoLimit
from ..model.spec import Limit, Meter, Tenant
from .executor import FleetExecutor
from .spec import DEFAULT_TENANT, FleetSpec
from .statistics import TenantState, Totals

__all__ = ["Tenancy"]

NAMED: Final = 8
"""VMs that a message names at most: enough to recognise them."""


class Tenancy:
    """The tenants of one fleet; for the fleet's thread.

    Attributes:
        host: the budgets of all VMs together.
        states: the tenants by name.
        removed: what the VMs of removed tenants did.
        io_groups: the budgets of groups of disks, by name.
    """

    def __init__(self, spec: FleetSpec, now: int) -> None:
        self.host: Budgets = make_budgets(limits_of(spec), now)
        self.states = {
            name: TenantState(one, make_budgets(limits_of(one), now), _io_budget(one.io_limit))
            for name, one in spec.tenants.items()
        }
        self.io_groups = {name: _io_budget(limit) for name, limit in spec.io_groups.items()}
        self.removed = Totals()

    def limit(self, meter: Meter) -> Limit | None:
        """The host's limit in force on that meter."""
        return self.host[meter].limit

    def state_of(self, tenant: str, vm: str | None = None) -> TenantState:
        """The state of a tenant. `vm`: the VM whose spec names the tenant, for the message.

        Raises:
            UnknownTenant: there is no tenant of that name.
        """
        try:
            return self.states[tenant]
        except (KeyError, TypeError):
            of = f"vm {vm!r}: " if vm else ""
            known = ", ".join(sorted(self.states))
            raise UnknownTenant(
                f"{of}tenant={tenant!r}: no such tenant; this fleet has: {known}. `await fleet.add_tenant(...)` adds "
                "one"
            ) from None

    def budgets(self, tenant: str | None) -> Budgets:
        """The budgets of a tenant, or (None) of the host."""
        return self.host if tenant is None else self.state_of(tenant).budgets

    def io_budget(self, *, group: str | None = None, tenant: str | None = None) -> IoBudget:
        """What the disks of a group, or of a tenant, may do together.

        Raises:
            SpecError: there is no such group.
            UnknownTenant: there is no such tenant.
        """
        if group is None:
            return self.state_of(tenant or DEFAULT_TENANT).io
        if group not in self.io_groups:
            known = ", ".join(sorted(self.io_groups)) or "none"
            raise SpecError(f"io_group={group!r}: no such group of disks; there are: {known} (`io_groups`)")
        return self.io_groups[group]

    def tenants(self) -> dict[str, Tenant]:
        """All tenants, with the limits that were set, without throttles."""
        return {
            name: attrs.evolve(
                state.tenant,
                limit=state.budgets[Meter.BUS_LOCKS].base,
                exit_limit=state.budgets[Meter.EXITS].base,
                answer_limit=state.budgets[Meter.ANSWERS].base,
                io_limit=state.io.base,
            )
            for name, state in self.states.items()
        }

    # ---- while the fleet runs. Each limit that changes is journaled as a caller's `SetLimit`.

    def begin(self, executor: FleetExecutor) -> None:
        """Journal the limits that the fleet and its tenants begin with."""
        executor.given(self.host, "open_fleet")
        for name, state in self.states.items():
            executor.given(state.budgets, "open_fleet", tenant=name)
            executor.given_io(state.io, "open_fleet", tenant=name)
        for name, budget in self.io_groups.items():
            executor.given_io(budget, "open_fleet", group=name)

    def add(self, tenant: Tenant, executor: FleetExecutor, now: int) -> None:
        """As `Fleet.add_tenant`."""
        _check(tenant, executor)
        if tenant.name in self.states:
            raise StateError(f"can't add tenant {tenant.name!r}: this fleet has it; `change_tenant` changes it")
        # Without limits at first: `_put_limits` then sets each one and journals it, as for a tenant that changes.
        self.states[tenant.name] = TenantState(tenant, make_budgets(dict.fromkeys(Meter), now))
        self._put_limits(tenant, executor, f"add_tenant({tenant.name!r})")

    def change(self, tenant: Tenant, executor: FleetExecutor) -> None:
        """As `Fleet.change_tenant`."""
        _check(tenant, executor)
        self.state_of(tenant.name).tenant = tenant
        self._put_limits(tenant, executor, f"change_tenant({tenant.name!r})")

    def remove(self, name: str, vms: Iterable[VmControl], executor: FleetExecutor) -> None:
        """As `Fleet.remove_tenant`. `vms`: all VMs of the fleet."""
        state = self.state_of(name)
        if name == DEFAULT_TENANT:
            raise StateError(f"can't remove tenant {name!r}: VMs whose spec names none belong to it")
        theirs = [vm for vm in vms if vm.tenant == name]
        if state.live or any(vm.outcome is None for vm in theirs):
            alive = ", ".join(sorted(vm.name for vm in theirs if vm.outcome is None)[:NAMED])
            raise StateError(f"can't remove tenant {name!r}: it has VMs that have not ended ({alive}): stop them first")
        for vm in theirs:
            vm.release()
        # While the tenant's state is still there: it has the budgets whose limits end.
        self._end_limits(name, executor)
        self.removed.join(state.gone)
        del self.states[name]
        _close(state.budgets)
        state.io.close()

    def _put_limits(self, tenant: Tenant, executor: FleetExecutor, reason: str) -> None:
        for meter, budget in self.states[tenant.name].budgets.items():
            limit = getattr(tenant, meter.field)
            if budget.base != limit:
                executor.set_limit(limit, meter, tenant.name, None, None)
                executor.done(SetLimit(limit=limit, meter=meter, tenant=tenant.name, reason=reason), None)
        io = self.states[tenant.name].io
        if io.base != tenant.io_limit:
            io.ask(None, tenant.io_limit)
            executor.done(SetIoLimit(io_limit=tenant.io_limit, tenant=tenant.name, reason=reason), None)

    def _end_limits(self, tenant: str, executor: FleetExecutor) -> None:
        """Journal that the tenant's limits and throttles end: another tenant of that name begins without them."""
        reason = f"remove_tenant({tenant!r})"
        for meter, budget in self.states[tenant].budgets.items():
            if budget.base is not None:
                executor.done(SetLimit(limit=None, meter=meter, tenant=tenant, reason=reason), None)
        # A copy, as each release takes an entry out.
        for key, held in list(executor.in_force):
            if key.tenant == tenant and (back := inverse(held.action)) is not None:
                executor.done(attrs.evolve(back, reason=reason), held.policy)

    def close(self) -> None:
        """Free all budgets. No VM that has their buckets is left."""
        for state in self.states.values():
            _close(state.budgets)
            state.io.close()
        for budget in self.io_groups.values():
            budget.close()
        _close(self.host)


def _io_budget(limit: IoLimit | None) -> IoBudget:
    return IoBudget([] if limit is None else [AskedIoLimit(None, limit)])


def _check(tenant: object, executor: FleetExecutor) -> None:
    if not isinstance(tenant, Tenant):
        raise SpecError(f"tenant={tenant!r}: must be a Tenant")
    executor.check_seen(tenant.limit, f"tenant {tenant.name!r}: limit")
    executor.check_io(tenant.io_limit, tenant.name)


def _close(budgets: Budgets) -> None:
    for budget in budgets.values():
        budget.close()
