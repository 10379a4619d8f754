"""A fleet: many VMs in one nursery, their exits merged, actions applied to any of them. `open_fleet` makes one.

fleet's nursery ── drain task (ring → channels)
                ├─ policy runner (policies, journal)
                └─ a task for each VM ── a task for each vCPU ── its thread
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import trio

from ..backend import Backend, Detection
from ..machine.control import VmControl
from ..machine.devices.bus import Device
from ..machine.vm import Vm
from ..model.actions import Action, Applied, Outcome
from ..model.errors import SpecError, StateError
from ..model.exits import Exit
from ..model.spec import Limit, Meter, Tenant, VmSpec, as_meter, optional_limit
from ..policy import Guard, Policy, PolicySpec
from .channels import Exits
from .context import FleetContext
from .spec import make_policies
from .statistics import FleetStatistics, summarise
from .watch import Watch

__all__ = ["Fleet"]


class _Handles(Mapping[str, Vm]):
    """`Fleet.vms`: a live view of the fleet's VMs."""

    def __init__(self, controls: Mapping[str, VmControl]) -> None:
        self._controls = controls

    def __getitem__(self, name: str) -> Vm:
        handle: Vm = self._controls[name].handle
        return handle

    def __iter__(self) -> Iterator[str]:
        return iter(self._controls)

    def __len__(self) -> int:
        return len(self._controls)

    def __repr__(self) -> str:
        return repr(dict(self))


class Fleet:
    """Opened by `open_fleet`. All methods are for the thread that opened the fleet."""

    def __init__(self, context: FleetContext) -> None:
        self._context = context

    # ---- VMs

    @property
    def vms(self) -> Mapping[str, Vm]:
        """The VMs by name. A VM that ended by itself stays, with its outcome and memory, until it is stopped or another
        VM is launched under its name."""
        return _Handles(self._context.controls)

    async def launch(
        self,
        spec: VmSpec,
        *,
        paused: bool = False,
        devices: Iterable[tuple[range | None, range | None, Device]] = (),
    ) -> Vm:
        """Set a VM up and run it.

        Parameters:
            spec: what to run.
            paused: set everything up, but run no guest code before `Vm.resume`.
            devices: your own devices, each as (ports, mmio, device); see `Vm.attach`.

        Raises:
            VmExists: a VM of that name has not ended yet.
            UnknownTenant: the fleet does not have that tenant.
            BusLockUnsupported: the spec has a bus-lock limit, and this fleet does not see bus locks.
            ResourceLimit, KvmError: the host can't give the VM what it needs. Everything is given back.
            StateError: the fleet is closing.

        If this call is cancelled, the VM is given back.
        """
        control = await self._context.supervisor.launch(spec, paused, devices)
        handle: Vm = control.handle
        return handle

    def vm(self, name: str) -> Vm:
        """The VM of that name.

        Raises:
            UnknownVm: there is no VM of that name.
        """
        handle: Vm = self._context.control(name).handle
        return handle

    # ---- exits

    @asynccontextmanager
    async def exits(
        self,
        *kinds: type[Exit],
        vm: Vm | str | None = None,
        capacity: int = 65536,
        drop: Literal["oldest", "newest"] = "oldest",
    ) -> AsyncIterator[Exits]:
        """Subscribe to exits from here on.

        Parameters:
            kinds: types of `orchestra.model.exits`; no type means all exits.
            vm: only exits of this VM (a `Vm`, or a name, also of a VM that is not launched yet). None: of all VMs.
            capacity: how many exits may wait to be received, from 1 to 10,000,000.
            drop: "oldest" or "newest": which exits are dropped, and counted as missed, when more come.

        The channel ends when that VM or the fleet ends.

        Raises:
            SpecError: not an exit type, or a capacity or `drop` that can't be.
        """
        exits = self._context.dispatcher.subscribe(kinds, vm.name if isinstance(vm, Vm) else vm, capacity, drop)
        try:
            await trio.lowlevel.checkpoint()
            yield exits
        finally:
            exits.close()

    @asynccontextmanager
    async def watch(self, interval: float = 1.0) -> AsyncIterator[Watch]:
        """Watch what the VMs and the host do, from here on: ``async for facts in watch``. Each `Facts` is about the
        time since the one before.

        Parameters:
            interval: seconds between two `Facts`, at least 0.001.

        Raises:
            SpecError: `interval` is out of range.
            StateError: the fleet is closed.
        """
        if self._context.closed:
            raise StateError("the fleet is closed: there is nothing to watch")
        watch = Watch(self._context, self._context.observer, interval)
        try:
            await trio.lowlevel.checkpoint()
            yield watch
        finally:
            watch.close()

    # ---- actions

    async def apply(self, action: Action, *, policy: str | None = None) -> Applied:
        """Do an action, and journal it with its reason, evidence and outcome.

        Returns when a VM that the action pauses, stops or kills is paused, or gone. If this call is cancelled, that
        happens all the same. If the action can't be done (the VM is gone, its state does not allow the action),
        `Applied.error` says why, and nothing is raised.

        Parameters:
            policy: the name of the policy that asks; None: a caller.

        Raises:
            SpecError: not an action.
        """
        applied = await self._context.executor.apply(action, policy)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return applied

    def actions(self) -> tuple[Applied, ...]:
        """The last 10,000 actions, oldest first, with reason, evidence and outcome. The limits that the fleet, its
        tenants and its VMs began with are not among them, but in the journal."""
        return self._context.records.actions()

    async def set_limit(
        self,
        limit: Limit | None,
        *,
        meter: Meter | str = Meter.BUS_LOCKS,
        tenant: str | None = None,
        vm: str | None = None,
        vcpu: int | None = None,
    ) -> None:
        """Change the limit of a tenant, a VM, a vCPU, or (if none is named) the host. The change takes effect at once,
        also for waits in progress. In a fleet with a `HostBudget`, the limit changed without a name is the fleet's own.

        Raises:
            SpecError: not a limit, not a meter, or names that don't fit together.
            UnknownTenant, UnknownVm: the fleet does not have it.
            StateError: the VM has ended, or the fleet is closed.
            BusLockUnsupported: a bus-lock limit where bus locks are not seen.
        """
        self.set_limit_nowait(limit, meter=meter, tenant=tenant, vm=vm, vcpu=vcpu)
        await trio.lowlevel.checkpoint()

    def set_limit_nowait(
        self,
        limit: Limit | None,
        *,
        meter: Meter | str = Meter.BUS_LOCKS,
        tenant: str | None = None,
        vm: str | None = None,
        vcpu: int | None = None,
    ) -> None:
        """As `set_limit`, without a checkpoint."""
        self._context.set_limit_nowait(limit, meter=meter, tenant=tenant, vm=vm, vcpu=vcpu)

    def check_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, tenant: str | None = None
    ) -> None:
        """Raise what `set_limit` would raise, and change nothing."""
        optional_limit("limit", limit)
        self._context.executor.check_limit(limit, as_meter(meter), tenant, None, None)

    # ---- tenants

    async def add_tenant(self, tenant: Tenant) -> None:
        """Add a tenant, which has no VMs yet.

        Raises:
            SpecError: not a `Tenant`.
            StateError: the fleet has a tenant of that name (see `change_tenant`), or is closing.
            BusLockUnsupported: the tenant has a bus-lock limit, and this fleet does not see bus locks.
        """
        context = self._context
        context.supervisor.check_open("add a tenant")
        context.tenancy.add(tenant, context.executor, context.now())
        await trio.lowlevel.checkpoint()

    async def change_tenant(self, tenant: Tenant) -> None:
        """Give the tenant of that name this weight and these limits. The change takes effect at once, also for waits in
        progress.

        Raises:
            UnknownTenant: there is no tenant of that name.
            SpecError, BusLockUnsupported, StateError: as in `add_tenant`.
        """
        context = self._context
        context.supervisor.check_open("change a tenant")
        context.tenancy.change(tenant, context.executor)
        await trio.lowlevel.checkpoint()

    async def remove_tenant(self, name: str) -> None:
        """Forget a tenant all of whose VMs have ended. These VMs leave the fleet; the fleet's sums keep what they did.

        Raises:
            UnknownTenant: there is no tenant of that name.
            StateError: the tenant has VMs that have not ended, or is the default tenant.
        """
        context = self._context
        context.tenancy.remove(name, context.controls.values(), context.executor)
        await trio.lowlevel.checkpoint()

    async def set_policies(self, policies: Sequence[Policy | PolicySpec], guard: Guard | None = None) -> None:
        """Let these policies decide from now on, in this order.

        A policy that is there already (the same object) keeps its state, its next tick and what it holds. What a
        removed policy holds is taken back before the others decide. If this call is cancelled, either all of this is
        done or nothing.

        Parameters:
            policies: policies, or `PolicySpec` objects: each makes a policy that has seen nothing yet.
            guard: the guard from now on; what was done so far counts under its rules. None: the guard stays.

        Raises:
            SpecError: as in `open_fleet`, or a policy that is there already would change into a dry run or out of it.
                Nothing has changed then.
            BusLockUnsupported: a policy limits bus locks, and this fleet does not see them.
        """
        context = self._context
        checked = make_policies(policies)
        if guard is not None and not isinstance(guard, Guard):
            raise SpecError(f"guard={guard!r}: must be a Guard, or None to keep the one there is")
        for policy in checked:
            if getattr(policy, "meter", None) is Meter.BUS_LOCKS:
                context.executor.check_seen(Limit(rate=1), f"policy {policy.name!r}")
        await context.runner.set_policies(checked, guard, context.executor.in_force)
        if guard is not None:
            context.executor.guard = guard

    # ---- figures

    @property
    def backend(self) -> Backend:
        """The backend that executes the guests; its `why` says why it was picked."""
        return self._context.backend

    @property
    def bus_locks(self) -> bool:
        """Whether this fleet sees bus locks."""
        return self._context.bus_locks

    @property
    def bus_lock_detection(self) -> Detection | None:
        """How bus locks are reported here; None: they are not seen."""
        return self._context.bus_lock_detection

    @property
    def limit(self) -> Limit | None:
        """The host's limit on bus locks in force; the fleet's own, if it was opened with a `HostBudget`."""
        return self._context.host_limit(Meter.BUS_LOCKS)

    @property
    def exit_limit(self) -> Limit | None:
        """The host's limit on exits of any kind in force; the fleet's own, if it was opened with a `HostBudget`."""
        return self._context.host_limit(Meter.EXITS)

    @property
    def answer_limit(self) -> Limit | None:
        """The host's limit in force on accesses that Python answers; as `limit`."""
        return self._context.host_limit(Meter.ANSWERS)

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """All tenants, with the limits that were set for them (throttles by actions are not among them)."""
        return self._context.tenants

    def now(self) -> int:
        """Nanoseconds on the fleet's clock, which exits and actions have their times from."""
        return self._context.now()

    def statistics(self) -> FleetStatistics:
        """What the fleet did since it was opened, as frozen data."""
        return summarise(self._context)

    async def stop(self, reason: str = "the fleet was stopped") -> Mapping[str, Outcome]:
        """Stop all VMs: first all are told, then all are awaited. Returns their outcomes by name.

        The block of `open_fleet` stops all VMs when it is left, so call this only for the outcomes.
        """
        return await self._context.supervisor.stop(reason)
