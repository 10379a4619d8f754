"""A fleet: many VMs in one nursery, their exits merged, actions applied to any of them. `open_fleet` makes one.

fleet's nursery ── drain task (ring → channels)
                ├─ governor (policies)
                └─ a task for each VM ── a task for each vCPU ── its thread
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, Final, Literal

import attrs
import trio

from .actions import Action, Applied, Kill, Outcome, Pause, Resume, SetLimit, Stop, Stopped, Throttle, Unthrottle
from .backend import Backend, Detection
from .budget import Budget, Budgets, make_budgets
from .devices.bus import Device
from .errors import (
    BusLockUnsupported,
    OrchestraError,
    ResourceLimit,
    SpecError,
    StateError,
    UnknownTenant,
    UnknownVm,
    VmExists,
)
from .exits import Exit
from .governor import Governor
from .native.core import FleetCore, VcpuCore
from .policy import Policy
from .spec import Limit, Meter, Tenant, VmSpec, as_meter
from .statistics import FleetStatistics, TenantStatistics, Totals
from .subscription import Exits, Switchboard
from .vm import Vm, check_device

__all__ = ["DEFAULT_TENANT", "Fleet"]

log: Final = logging.getLogger("orchestra")
DEFAULT_TENANT: Final = "default"
JOURNAL: Final = 10_000
SETUP_THREADS: Final = 4


@attrs.frozen
class _TenantSeat:
    tenant: Tenant
    budgets: Budgets
    gone: Totals


class Fleet:
    """Opened by `open_fleet`. All methods are for the thread that opened it."""

    def __init__(
        self,
        *,
        core: FleetCore,
        backend: Backend,
        detection: Detection | None,
        budgets: Budgets,
        tenants: Mapping[str, Tenant],
        policies: Sequence[Policy],
        strict: bool,
        nursery: trio.Nursery,
    ) -> None:
        self.core = core
        self.backend = backend
        self.bus_lock_detection = detection
        self.bus_locks = detection is not None
        self.setup_threads = trio.CapacityLimiter(SETUP_THREADS)
        self._governor = Governor(self, policies, strict)  # first: it may refuse a policy
        self._budgets = budgets
        now = backend.now()
        self._tenants = {
            name: _TenantSeat(tenant, make_budgets(tenant.limit, tenant.exit_limit, now), Totals())
            for name, tenant in tenants.items()
        }
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._vms: dict[str, Vm] = {}
        self._owners: dict[int, tuple[Vm, int]] = {}
        self._ids = iter(range(1, 1 << 32))
        self._launched = 0
        self._closing = self._closed = False
        self._journal: deque[Applied] = deque(maxlen=JOURNAL)
        self._switchboard = Switchboard(core, paced=backend.blocking)
        self._switchboard.on_change(self._retell)

    # ---- VMs

    @property
    def vms(self) -> Mapping[str, Vm]:
        """The VMs by name. One that ended by itself stays, with its outcome and memory, until it is stopped or another
        is launched under its name."""
        return MappingProxyType(self._vms)

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
            UnknownTenant: the fleet was not opened with that tenant.
            BusLockUnsupported: the spec has a bus-lock limit, and this fleet does not see bus locks.
            ResourceLimit, KvmError: the host can't give it what it needs. All of it is given back.
            StateError: the fleet is closing.

        Cancelled, the VM is given back.
        """
        if not isinstance(spec, VmSpec):
            raise SpecError(f"spec={spec!r}: must be a VmSpec")
        if self._closing:
            raise StateError(f"can't launch {spec.name!r}: the fleet is closing")
        seat = self._seat(spec.tenant or DEFAULT_TENANT, spec.name)
        self._check_seen(spec.limit, f"vm {spec.name!r}: limit")
        self._check_seen(spec.vcpu_limit, f"vm {spec.name!r}: vcpu_limit")
        self.backend.check(spec)
        previous = self._vms.get(spec.name)
        if previous is not None and previous.outcome is None:
            raise VmExists(
                f"name={spec.name!r}: a VM of that name is {previous.state}; stop it, or choose another name"
            )

        devices = list(devices)
        for ports, mmio, device in devices:
            check_device(device, ports, mmio)

        vm = Vm(self, spec, seat.tenant.name, (self._budgets, seat.budgets))
        if previous is not None:
            self._drop(previous)
        self._vms[spec.name] = vm  # the name is taken from now on, whoever launches meanwhile
        try:
            await self._nursery.start(self._supervise, vm, devices, paused)
        except BaseException:  # if we were cancelled, so was its task, and it is gone
            if self._vms.get(spec.name) is vm:
                del self._vms[spec.name]
            vm.close()
            raise
        self._launched += 1
        if paused and vm.guest is not None:
            try:
                await vm.guest.parked.wait()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):  # a kick and a millisecond
                    await vm.stop("its launch was cancelled")
                raise
        return vm

    async def _supervise(
        self, vm: Vm, devices: Iterable[tuple[range | None, range | None, Device]], paused: bool, *, task_status: Any
    ) -> None:
        try:
            await vm.supervise(devices, paused, task_status=task_status)
        finally:
            if vm.guest is not None:  # a launch that failed may be tried again, and somebody waits for it
                self._switchboard.vm_ended(vm.name)
            if vm.stopping:
                vm.release()
            if vm.outcome is not None:
                log.info("vm %s ended: %s", vm.name, vm.outcome)

    def _drop(self, vm: Vm) -> None:
        """An ended VM leaves the fleet; its figures stay in the sums."""
        if self._vms.get(vm.name) is vm:
            del self._vms[vm.name]
        self._tenants[vm.tenant].gone.add(vm.statistics())
        vm.close()

    def vm(self, name: str) -> Vm:
        """The VM of that name.

        Raises:
            UnknownVm: there is none.
        """
        try:
            return self._vms[name]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self._vms)[:8]) or "none"
            raise UnknownVm(f"vm={name!r}: no such VM; there are: {known}") from None

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
            kinds: types of `orchestra.exits`; none for all.
            vm: only this VM's (an object or a name, also of one that is not launched yet).
            capacity: how many may wait to be received.
            drop: which are dropped, and counted as missed, when more come.

        The channel ends when that VM or the fleet does.
        """
        exits = self._switchboard.subscribe(kinds, vm.name if isinstance(vm, Vm) else vm, capacity, drop)
        try:
            await trio.lowlevel.checkpoint()
            yield exits
        finally:
            exits.close()

    # ---- actions

    async def apply(self, action: Action, *, policy: str | None = None) -> Applied:
        """Do it, and journal it with its reason, evidence and what came of it.

        That it could not be done (the VM is gone, its state does not allow it) is told in `Applied.error`, not raised.

        Raises:
            SpecError: not an action.
        """
        error: str | None = None
        if not isinstance(action, Action):
            raise SpecError(f"action={action!r}: must be one of orchestra's actions")
        try:
            await self._do(action, policy)
        except OrchestraError as failure:
            error = str(failure)
        except trio.Cancelled:
            self._record(action, policy, "cancelled while it was waited for; it takes effect all the same")
            raise
        applied = self._record(action, policy, error)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return applied

    async def _do(self, action: Action, policy: str | None) -> None:
        match action:
            case Throttle() | Unthrottle():
                limit = action.limit if isinstance(action, Throttle) else None
                if limit is None and action.vm is not None and self._is_gone(action.vm):
                    return  # with the VM went its limits
                if limit is not None and action.meter is Meter.BUS_LOCKS:
                    self._check_seen(limit, "limit")
                budget = self._budget(action.meter, action.tenant, action.vm, None)
                self._change(budget, lambda now: budget.set_throttle(policy, limit, now))
            case SetLimit(limit=limit, meter=meter, tenant=tenant, vm=name, vcpu=vcpu):
                self._set_limit(limit, meter, tenant, name, vcpu)
            case Pause(vm=name):
                await self.vm(name).pause()
            case Resume(vm=name):
                await self.vm(name).resume()
            case Stop(vm=name):
                await self.vm(name).stop(action.reason or "stopped by an action")
            case Kill(vm=name):
                await self.vm(name).stop(action.reason or "killed by an action")

    def _is_gone(self, name: str) -> bool:
        vm = self._vms.get(name)
        return vm is None or vm.outcome is not None

    def _record(self, action: Action, policy: str | None, error: str | None) -> Applied:
        applied = Applied(time=self.now(), action=action, policy=policy, error=error)
        self._journal.append(applied)
        return applied

    def actions(self) -> tuple[Applied, ...]:
        """The last 10,000 actions, oldest first, with reason, evidence and outcome."""
        return tuple(self._journal)

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
        action = SetLimit(limit=limit, meter=as_meter(meter), tenant=tenant, vm=vm, vcpu=vcpu, reason="set_limit()")
        self._set_limit(limit, action.meter, tenant, vm, vcpu)
        self._record(action, None, None)

    def _set_limit(
        self, limit: Limit | None, meter: Meter, tenant: str | None, vm: str | None, vcpu: int | None
    ) -> None:
        if meter is Meter.BUS_LOCKS:
            self._check_seen(limit, "limit")
        budget = self._budget(meter, tenant, vm, vcpu)
        self._change(budget, lambda now: budget.set_base(limit, now))

    def _budget(self, meter: Meter, tenant: str | None, vm: str | None, vcpu: int | None) -> Budget:
        if vm is not None:
            if tenant is not None:
                raise SpecError(f"vm={vm!r}, tenant={tenant!r}: name one of them, or neither for the host")
            found = self.vm(vm)
            if found.outcome is not None:
                raise StateError(f"vm {vm!r} has ended: it has no limit to change")
            budget: Budget = found.budget(meter, vcpu)
            return budget
        if vcpu is not None:
            raise SpecError(f"vcpu={vcpu!r}: name its vm as well")
        return self._budgets[meter] if tenant is None else self._seat(tenant).budgets[meter]

    def _change(self, budget: Budget, change: Callable[[int], None]) -> None:
        if self._closed:
            raise StateError("the fleet is closed: it has no limits any more")
        before = budget.limit
        change(self.now())
        if budget.limit != before:
            self.core.limits_changed()
            self.backend.limits_changed()

    def _check_seen(self, limit: Limit | None, what: str) -> None:
        if limit is not None and not self.bus_locks:
            raise BusLockUnsupported(
                f"{what}: this fleet does not see bus locks, so they can't be limited; leave it out, limit exits "
                "(exit_limit) instead, or run on backend='emulated', or on a host that `orchestra doctor` says can "
                "report them"
            )

    def _seat(self, tenant: str, vm: str | None = None) -> _TenantSeat:
        try:
            return self._tenants[tenant]
        except (KeyError, TypeError):
            of = f"vm {vm!r}: " if vm else ""
            known = ", ".join(sorted(self._tenants))
            raise UnknownTenant(f"{of}tenant={tenant!r}: this fleet was opened with: {known}") from None

    # ---- figures

    @property
    def limit(self) -> Limit | None:
        """The host's, on bus locks, as in force."""
        return self._budgets[Meter.BUS_LOCKS].limit

    @property
    def exit_limit(self) -> Limit | None:
        return self._budgets[Meter.EXITS].limit

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """All tenants, with the limits that were set for them (throttles by actions are not told to policies)."""
        return {
            name: attrs.evolve(
                seat.tenant, limit=seat.budgets[Meter.BUS_LOCKS].base, exit_limit=seat.budgets[Meter.EXITS].base
            )
            for name, seat in self._tenants.items()
        }

    def now(self) -> int:
        """Nanoseconds on the clock that exits and actions are stamped with."""
        return self.backend.now()

    def statistics(self) -> FleetStatistics:
        """What the fleet did so far."""
        sums = {name: seat.gone.copy() for name, seat in self._tenants.items()}
        states: dict[str, int] = {}
        live: dict[str, int] = dict.fromkeys(self._tenants, 0)
        vcpus = 0
        for vm in self._vms.values():
            statistics = vm.statistics()
            sums[vm.tenant].add(statistics)
            states[statistics.state] = states.get(statistics.state, 0) + 1
            if vm.outcome is None:
                live[vm.tenant] += 1
                vcpus += vm.spec.vcpus
        total = Totals()
        for tenant in sums.values():
            total.join(tenant)
        return FleetStatistics(
            backend=self.backend.name,
            why=self.backend.why,
            bus_lock_detection=self.bus_lock_detection,
            vms=sum(live.values()),
            vcpus=vcpus,
            launched=self._launched,
            states=states,
            bus_locks=total.bus_locks if self.bus_locks else None,
            exits=total.exits,
            throttled_seconds=total.throttled,
            waits=total.waits,
            released=total.released,
            missed=total.missed + self._switchboard.missed(),
            limit=self.limit,
            exit_limit=self.exit_limit,
            tenants={
                name: TenantStatistics(
                    name=name,
                    weight=seat.tenant.weight,
                    vms=live[name],
                    bus_locks=sums[name].bus_locks if self.bus_locks else None,
                    exits=sum(sums[name].exits.values()),
                    throttled_seconds=sums[name].throttled,
                    released=sums[name].released,
                    limit=seat.budgets[Meter.BUS_LOCKS].limit,
                    exit_limit=seat.budgets[Meter.EXITS].limit,
                )
                for name, seat in self._tenants.items()
            },
            policies=self._governor.statistics(),
        )

    # ---- for its parts

    def post(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            pass  # nobody is left to be told

    def next_id(self) -> int:
        return next(self._ids)

    def told(self, vm: str) -> int:
        return self._switchboard.told(vm)

    def register(self, core: VcpuCore, vm: str, index: int) -> None:
        self._switchboard.reader.add(core.id, vm, index)
        self._owners[core.id] = (self._vms[vm], index)

    def retire(self, cores: Iterable[VcpuCore]) -> None:
        cores = list(cores)
        self._switchboard.retire(cores)
        for core in cores:
            self._governor.forget(core.id)
            self._owners.pop(core.id, None)

    def released(self, vm: Vm) -> None:
        """The VM was stopped by its user: it leaves the fleet."""
        self._drop(vm)

    def owner(self, id: int) -> tuple[Vm, int] | None:
        return self._owners.get(id)

    def journal_policy_error(self, policy: str, error: BaseException) -> None:
        self._journal.append(
            Applied(time=self.now(), action=None, policy=policy, error=f"{type(error).__name__}: {error}")
        )

    def _retell(self) -> None:
        failure: ResourceLimit | None = None
        for vm in self._vms.values():
            if vm.guest is not None:
                try:
                    vm.guest.tell(self.told(vm.name))
                except ResourceLimit as error:
                    failure = error
        if failure is not None:
            raise failure

    def start(self) -> None:
        """Start its own tasks."""
        self._nursery.start_soon(self._switchboard.run)
        self._nursery.start_soon(self._governor.run)

    async def stop(self, reason: str = "the fleet was stopped") -> Mapping[str, Outcome]:
        """Stop all VMs in an orderly way: all are told first, then awaited. Their outcomes by name.

        `open_fleet`'s block does this when it is left, so it is only needed for the outcomes.
        """
        vms = list(self._vms.values())
        for vm in vms:
            vm.stop_soon(Stopped(reason))
        outcomes = {}
        for vm in vms:
            outcomes[vm.name] = await vm.stop(reason)
        return outcomes

    def closing(self) -> None:
        """The block is being left: nothing is launched any more."""
        self._closing = True

    def close(self) -> None:
        """No task is left."""
        self._closed = True
        self._switchboard.close()
        for vm in list(self._vms.values()):
            self._drop(vm)
        for seat in self._tenants.values():
            for budget in seat.budgets.values():
                budget.close()
