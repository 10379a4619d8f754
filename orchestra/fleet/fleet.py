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
    """`Fleet.vms`, as it is whenever it is looked at."""

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
    """Opened by `open_fleet`. All methods are for the thread that opened it."""

    def __init__(self, context: FleetContext) -> None:
        self._context = context

    # ---- VMs

    @property
    def vms(self) -> Mapping[str, Vm]:
        """The VMs by name. One that ended by itself stays, with its outcome and memory, until it is stopped or another
        is launched under its name."""
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
            paused: set everything up, but run nothing before `Vm.resume`.
            devices: your own, each as (ports, mmio, device); see `Vm.attach`.

        Raises:
            VmExists: a VM of that name has not ended yet.
            UnknownTenant: the fleet does not have that tenant.
            BusLockUnsupported: the spec has a bus-lock limit, and this fleet does not see bus locks.
            ResourceLimit, KvmError: the host can't give it what it needs. All of it is given back.
            StateError: the fleet is closing.

        Cancelled, the VM is given back.
        """
        control = await self._context.supervisor.launch(spec, paused, devices)
        handle: Vm = control.handle
        return handle

    def vm(self, name: str) -> Vm:
        """The VM of that name.

        Raises:
            UnknownVm: there is none.
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
            kinds: types of `orchestra.model.exits`; none for all.
            vm: only this VM's (an object or a name, also of one that is not launched yet).
            capacity: how many may wait to be received.
            drop: which are dropped, and counted as missed, when more come.

        The channel ends when that VM or the fleet does.
        """
        exits = self._context.dispatcher.subscribe(kinds, vm.name if isinstance(vm, Vm) else vm, capacity, drop)
        try:
            await trio.lowlevel.checkpoint()
            yield exits
        finally:
            exits.close()

    @asynccontextmanager
    async def watch(self, interval: float = 1.0) -> AsyncIterator[Watch]:
        """Look at what the VMs and the host do, from here on: ``async for facts in watch``, each a `Facts` about the
        time since the one before.

        Parameters:
            interval: seconds between two, at least 0.001.

        Raises:
            SpecError: no such interval.
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
        """Do it, and journal it with its reason, evidence and what came of it.

        Returns when a VM that it pauses, stops or kills is paused, or gone. Cancelled, that comes all the same.
        That it could not be done (the VM is gone, its state does not allow it) is told in `Applied.error`, not raised.

        Raises:
            SpecError: not an action.
        """
        applied = await self._context.executor.apply(action, policy)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return applied

    def actions(self) -> tuple[Applied, ...]:
        """The last 10,000 actions, oldest first, with reason, evidence and outcome. The limits that the fleet, its
        tenants and its VMs began with are none, though the journal has them."""
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
        """Change the limit of the host (nothing named), a tenant, a VM or a vCPU: at once, also for waits in progress.
        Where the host's is a `HostBudget`, nothing named is this fleet.

        Raises:
            SpecError, UnknownTenant, UnknownVm: it can't be meant.
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
        """Have one more tenant from now on. It has no VMs yet.

        Raises:
            SpecError: not a `Tenant`.
            StateError: the fleet has a tenant of that name (see `change_tenant`), or is closing.
            BusLockUnsupported: it has a bus-lock limit, and this fleet does not see bus locks.
        """
        context = self._context
        context.supervisor.check_open("add a tenant")
        context.tenancy.add(tenant, context.executor, context.now())
        await trio.lowlevel.checkpoint()

    async def change_tenant(self, tenant: Tenant) -> None:
        """Give the tenant of that name this weight and these limits; at once, also for waits in progress.

        Raises:
            SpecError, UnknownTenant, BusLockUnsupported, StateError: as `add_tenant`; there must be one.
        """
        context = self._context
        context.supervisor.check_open("change a tenant")
        context.tenancy.change(tenant, context.executor)
        await trio.lowlevel.checkpoint()

    async def remove_tenant(self, name: str) -> None:
        """Forget a tenant all of whose VMs have ended; those leave the fleet. What they did stays in the fleet's sums.

        Raises:
            UnknownTenant: there is none of that name.
            StateError: it has VMs that have not ended, or it is the one for VMs that name none.
        """
        context = self._context
        context.tenancy.remove(name, context.controls.values(), context.executor)
        await trio.lowlevel.checkpoint()

    async def set_policies(self, policies: Sequence[Policy | PolicySpec], guard: Guard | None = None) -> None:
        """Have these policies decide from now on, in this order.

        One that is there already (the same object) keeps its seat, its next tick and what it holds. What one that is
        not there any more holds is let go before the others decide. Cancelled, all of that is done, or nothing.

        Parameters:
            policies: a `PolicySpec` makes one that has seen nothing yet.
            guard: another one from now on; what was done so far counts under its rules. None: it stays.

        Raises:
            SpecError: as `open_fleet`, or a policy that is there already would be rehearsed from now on, or not any
                more; nothing has changed then.
            BusLockUnsupported: a policy limits bus locks, and this fleet does not see them.
        """
        context = self._context
        checked = make_policies(policies)
        if guard is not None and not isinstance(guard, Guard):
            raise SpecError(f"guard={guard!r}: must be a Guard, or None to keep the one there is")
        for policy in checked:
            if getattr(policy, "meter", None) is Meter.BUS_LOCKS:
                context.executor.check_seen(Limit(rate=1), f"policy {policy.name!r}")
        await context.runner.set_policies(checked, guard, context.executor.holdings)
        if guard is not None:
            context.executor.guard = guard

    # ---- figures

    @property
    def backend(self) -> Backend:
        """What executes the guests; its `why` says why it was picked."""
        return self._context.backend

    @property
    def bus_locks(self) -> bool:
        """Bus locks are seen here."""
        return self._context.bus_locks

    @property
    def bus_lock_detection(self) -> Detection | None:
        """How bus locks are reported here; None: they are not."""
        return self._context.bus_lock_detection

    @property
    def limit(self) -> Limit | None:
        """The host's, on bus locks, as in force; this fleet's, if it was opened with a `HostBudget`."""
        return self._context.host_limit(Meter.BUS_LOCKS)

    @property
    def exit_limit(self) -> Limit | None:
        """The host's, on exits of any kind, as in force."""
        return self._context.host_limit(Meter.EXITS)

    @property
    def answer_limit(self) -> Limit | None:
        """The host's, on accesses that Python answers, as in force."""
        return self._context.host_limit(Meter.ANSWERS)

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """All tenants, with the limits that were set for them (throttles by actions are not told to policies)."""
        return self._context.tenants

    def now(self) -> int:
        """Nanoseconds on the clock that exits and actions are stamped with."""
        return self._context.now()

    def statistics(self) -> FleetStatistics:
        """What the fleet did so far."""
        return summarise(self._context)

    async def stop(self, reason: str = "the fleet was stopped") -> Mapping[str, Outcome]:
        """Stop all VMs in an orderly way: all are told first, then awaited. Their outcomes by name.

        `open_fleet`'s block does this when it is left, so it is only needed for the outcomes.
        """
        return await self._context.supervisor.stop(reason)
