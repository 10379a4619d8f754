"""A fleet: many VMs in one nursery, their exits merged, actions applied to any of them. `open_fleet` makes one.

fleet's nursery ── drain task (ring → channels)
                ├─ governor (policies, journal)
                └─ a task for each VM ── a task for each vCPU ── its thread
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, Final, Literal

import attrs
import trio

from ..backend import Backend, Detection
from ..host.control.bandwidth import CpuCgroup
from ..host.control.placement import Quarantine
from ..host.observe import HostSignals, ThreadTimes
from ..machine.budget import Budgets, limits_of, make_budgets
from ..machine.contain import contained
from ..machine.devices.bus import Device
from ..machine.inbox import Inbox
from ..machine.instance import Instance
from ..machine.vm import Vm, check_device
from ..machine.workers import Workers
from ..model.actions import Action, Applied, Outcome, Pause, SetLimit, State, Stopped, Throttle, Unthrottle
from ..model.effects import inverse
from ..model.errors import ResourceLimit, SpecError, StateError, UnknownTenant, UnknownVm, VmExists
from ..model.exits import Exit
from ..model.spec import Limit, Meter, Tenant, VmSpec, as_meter, optional_limit
from ..native.core import FleetCore, VcpuCore
from ..policy import Facts, Guard, Policy
from ..policy.state import check_policies
from .channels import Dispatcher, Exits
from .executor import Begun, FleetExecutor, OnEvict
from .observer import Observer
from .recorder import Recorder, Records
from .runner import PolicyRunner
from .statistics import FleetStatistics, TenantSeat, Totals, summarise
from .watch import Watch

__all__ = ["DEFAULT_TENANT", "Fleet"]

log: Final = logging.getLogger("orchestra")
DEFAULT_TENANT: Final = "default"


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
        guard: Guard,
        host: HostSignals,
        recorder: Recorder | None,
        on_evict: OnEvict | None,
        quarantine: Quarantine,
        cpu_cgroup: CpuCgroup | None,
    ) -> None:
        self.core = core
        self.backend = backend
        self.bus_lock_detection = detection
        self.bus_locks = detection is not None
        self.quarantine = quarantine
        self.cpu_cgroup = cpu_cgroup
        self.inbox = Inbox(self.post)
        self.workers = Workers(backend.blocking)
        self._activity = Observer(self, host, ThreadTimes() if backend.blocking else None)
        # It may refuse a policy.
        self._governor = PolicyRunner(self, policies, activity=self._activity, guard=guard, strict=strict)
        self._records = Records(recorder)
        self._applier = FleetExecutor(self, guard, self._records, on_evict)
        self._budgets = budgets
        now = backend.now()
        self._tenants = {
            name: TenantSeat(tenant, make_budgets(limits_of(tenant), now)) for name, tenant in tenants.items()
        }
        self._removed = Totals()  # by VMs of tenants that were removed
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._vms: dict[str, Vm] = {}
        self._ids = iter(range(1, 1 << 32))
        self._launched = self._live = 0
        self._closing = self._closed = False
        self._switchboard = Dispatcher(core, paced=backend.blocking)
        self._switchboard.on_change(self._retell)
        self._switchboard.on_talk(self._talked)
        self._guests: dict[int, Instance] = {}  # by the ids of their cores

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
            UnknownTenant: the fleet does not have that tenant.
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
        self._applier.check_seen(spec.limit, f"vm {spec.name!r}: limit")
        self._applier.check_seen(spec.vcpu_limit, f"vm {spec.name!r}: vcpu_limit")
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
                await vm.wait_parked()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):  # a kick and a millisecond
                    await vm.stop("its launch was cancelled")
                raise
        return vm

    async def _supervise(
        self, vm: Vm, devices: Iterable[tuple[range | None, range | None, Device]], paused: bool, *, task_status: Any
    ) -> None:
        seat = self._tenants[vm.tenant]
        seat.live += 1
        self._live += 1
        try:
            self.changed(vm, State.CREATED, "launched paused" if paused else "launched")
            self._applier.given(vm.budgets, "spec", vm=vm.name, launch=vm.launch)
            for index, budgets in enumerate(vm.vcpu_budgets):
                self._applier.given(budgets, "spec", vm=vm.name, vcpu=index, launch=vm.launch)
            if paused:  # before anybody else has a word
                self.did(Pause(vm=vm.name, reason="launch(paused=True)"))
            await vm.supervise(devices, paused, task_status=task_status)
        finally:
            seat.live -= 1
            self._live -= 1
            steps: list[Callable[[Vm], object]] = [self._activity.ended, self._forget, self._write_profile]
            if vm.guest is not None:  # else: a launch that failed may be tried again, and somebody waits for it
                steps.append(lambda vm: self._switchboard.vm_ended(vm.name))
            if vm.stopping:
                steps.append(Vm.release)
            for step in steps:
                with contained(f"vm {vm.name}: leaving the fleet"):
                    step(vm)
            if vm.outcome is not None:
                log.info("vm %s ended: %s", vm.name, vm.outcome)

    def _forget(self, vm: Vm) -> None:
        if self._vms.get(vm.name) is vm:
            self._governor.gone(vm.name)
            self._applier.holdings.forget(vm.name)

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
            kinds: types of `orchestra.model.exits`; none for all.
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
        if self._closed:
            raise StateError("the fleet is closed: there is nothing to watch")
        watch = Watch(self, self._activity, interval)
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
        applied = await self._applier.apply(action, policy)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return applied

    def actions(self) -> tuple[Applied, ...]:
        """The last 10,000 actions, oldest first, with reason, evidence and outcome. The limits that the fleet, its
        tenants and its VMs began with are none, though the journal has them."""
        return self._records.actions()

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
        self._applier.set_limit(limit, action.meter, tenant, vm, vcpu)
        self._applier.done(action, None)

    def _seat(self, tenant: str, vm: str | None = None) -> TenantSeat:
        try:
            return self._tenants[tenant]
        except (KeyError, TypeError):
            of = f"vm {vm!r}: " if vm else ""
            known = ", ".join(sorted(self._tenants))
            raise UnknownTenant(
                f"{of}tenant={tenant!r}: no such tenant; this fleet has: {known}. `await fleet.add_tenant(...)` adds "
                "one"
            ) from None

    # ---- tenants

    async def add_tenant(self, tenant: Tenant) -> None:
        """Have one more tenant from now on. It has no VMs yet.

        Raises:
            SpecError: not a `Tenant`.
            StateError: the fleet has a tenant of that name (see `change_tenant`), or is closing.
            BusLockUnsupported: it has a bus-lock limit, and this fleet does not see bus locks.
        """
        self._check_tenant(tenant, "add")
        if tenant.name in self._tenants:
            raise StateError(f"can't add tenant {tenant.name!r}: this fleet has it; `change_tenant` changes it")
        self._tenants[tenant.name] = TenantSeat(tenant, make_budgets(dict.fromkeys(Meter), self.backend.now()))
        self._put_limits(tenant, f"add_tenant({tenant.name!r})")
        await trio.lowlevel.checkpoint()

    async def change_tenant(self, tenant: Tenant) -> None:
        """Give the tenant of that name this weight and these limits; at once, also for waits in progress.

        Raises:
            SpecError, UnknownTenant, BusLockUnsupported, StateError: as `add_tenant`; there must be one.
        """
        self._check_tenant(tenant, "change")
        self._seat(tenant.name).tenant = tenant
        self._put_limits(tenant, f"change_tenant({tenant.name!r})")
        await trio.lowlevel.checkpoint()

    async def remove_tenant(self, name: str) -> None:
        """Forget a tenant all of whose VMs have ended; those leave the fleet. What they did stays in the fleet's sums.

        Raises:
            UnknownTenant: there is none of that name.
            StateError: it has VMs that have not ended, or it is the one for VMs that name none.
        """
        seat = self._seat(name)
        if name == DEFAULT_TENANT:
            raise StateError(f"can't remove tenant {name!r}: VMs whose spec names none belong to it")
        theirs = [vm for vm in self._vms.values() if vm.tenant == name]
        if seat.live or any(vm.outcome is None for vm in theirs):
            alive = ", ".join(sorted(vm.name for vm in theirs if vm.outcome is None)[:8])
            raise StateError(f"can't remove tenant {name!r}: it has VMs that have not ended ({alive}): stop them first")
        for vm in theirs:
            vm.release()
        self._end_limits(name)
        self._removed.join(seat.gone)
        del self._tenants[name]
        for budget in seat.budgets.values():
            budget.close()
        await trio.lowlevel.checkpoint()

    def _check_tenant(self, tenant: object, verb: str) -> None:
        if not isinstance(tenant, Tenant):
            raise SpecError(f"tenant={tenant!r}: must be a Tenant")
        if self._closing:
            raise StateError(f"can't {verb} tenant {tenant.name!r}: the fleet is closing")
        self._applier.check_seen(tenant.limit, f"tenant {tenant.name!r}: limit")

    def _end_limits(self, tenant: str) -> None:
        """What limits a tenant ends with it, for the journal as well: another of that name begins without."""
        reason = f"remove_tenant({tenant!r})"
        for meter, budget in self._tenants[tenant].budgets.items():
            if budget.base is not None:
                self._applier.done(SetLimit(limit=None, meter=meter, tenant=tenant, reason=reason), None)
        for key, held in list(self._applier.holdings):
            if key.tenant == tenant and (back := inverse(held.action)) is not None:
                self._applier.done(attrs.evolve(back, reason=reason), held.policy)

    def _put_limits(self, tenant: Tenant, reason: str) -> None:
        """Each that is another than before is journaled as a caller's `SetLimit`."""
        budgets = self._tenants[tenant.name].budgets
        for meter in Meter:
            limit = getattr(tenant, meter.field)
            if budgets[meter].base != limit:
                self._applier.set_limit(limit, meter, tenant.name, None, None)
                self._applier.done(SetLimit(limit=limit, meter=meter, tenant=tenant.name, reason=reason), None)

    async def set_policies(self, policies: Sequence[Policy], guard: Guard | None = None) -> None:
        """Have these policies decide from now on, in this order.

        One that is there already (the same object) keeps its seat, its next tick and what it holds. What one that is
        not there any more holds is let go before the others decide. Cancelled, all of that is done, or nothing.

        Parameters:
            guard: another one from now on; what was done so far counts under its rules. None: it stays.

        Raises:
            SpecError: as `open_fleet`, or a policy that is there already would be rehearsed from now on, or not any
                more; nothing has changed then.
            BusLockUnsupported: a policy limits bus locks, and this fleet does not see them.
        """
        checked = check_policies(policies)
        if guard is not None and not isinstance(guard, Guard):
            raise SpecError(f"guard={guard!r}: must be a Guard, or None to keep the one there is")
        for policy in checked:
            if getattr(policy, "meter", None) is Meter.BUS_LOCKS:
                self._applier.check_seen(Limit(rate=1), f"policy {policy.name!r}")
        await self._governor.set_policies(checked, guard, self._applier.holdings)
        if guard is not None:
            self._applier.guard = guard

    # ---- figures

    @property
    def limit(self) -> Limit | None:
        """The host's, on bus locks, as in force."""
        return self._budgets[Meter.BUS_LOCKS].limit

    @property
    def exit_limit(self) -> Limit | None:
        return self._budgets[Meter.EXITS].limit

    @property
    def answer_limit(self) -> Limit | None:
        return self._budgets[Meter.ANSWERS].limit

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """All tenants, with the limits that were set for them (throttles by actions are not told to policies)."""
        return {
            name: attrs.evolve(
                seat.tenant,
                limit=seat.budgets[Meter.BUS_LOCKS].base,
                exit_limit=seat.budgets[Meter.EXITS].base,
                answer_limit=seat.budgets[Meter.ANSWERS].base,
            )
            for name, seat in self._tenants.items()
        }

    def now(self) -> int:
        """Nanoseconds on the clock that exits and actions are stamped with."""
        return self.backend.now()

    def statistics(self) -> FleetStatistics:
        """What the fleet did so far."""
        return summarise(
            self._vms.values(),
            self._tenants,
            self._removed,
            backend=self.backend,
            detection=self.bus_lock_detection,
            launched=self._launched,
            missed=self._switchboard.missed(),
            limit=self.limit,
            exit_limit=self.exit_limit,
            answer_limit=self.answer_limit,
            policies=self._governor.statistics(),
            host=self._governor.host,
            journal=self._records.statistics(),
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

    def register(self, core: VcpuCore, guest: Instance, index: int) -> None:
        self._guests[core.id] = guest
        self._switchboard.reader.add(core.id, guest.name, index)
        self._activity.add(core.id, self._vms[guest.name], guest, index)

    def retire(self, cores: Iterable[VcpuCore]) -> None:
        cores = list(cores)
        self._switchboard.retire(cores)
        for core in cores:
            self._guests.pop(core.id, None)
            self._activity.forget(core.id)

    def _talked(self, id: int) -> None:
        if (guest := self._guests.get(id)) is not None:
            guest.talked()

    def released(self, vm: Vm) -> None:
        """The VM was stopped by its user: it leaves the fleet."""
        self._drop(vm)

    def did(self, action: Action, policy: str | None = None) -> None:
        """A caller did it directly, and not by `apply`; or what was desired ended, of a caller or a policy."""
        self._applier.done(action, policy)

    def changed(self, vm: Vm, state: State, reason: str) -> None:
        self._records.state(self.now(), vm.name, vm.launch, vm.tenant, state, reason)

    def worked(self, vm: Vm, units: float) -> None:
        self._activity.work(vm, units)

    def logged(self, guest: Instance) -> None:
        if guest.dirty is not None:
            self._activity.dirty(self._activity.logs.watch(self._vms[guest.name], guest.dirty, self.now()))
            self._governor.wake()

    def apply_nowait(self, action: Action, policy: str | None) -> Applied:
        """As `apply`, of what does not `takes_time`: nothing is waited for, and there is no checkpoint."""
        return self._applier.apply_nowait(action, policy)

    def check_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, tenant: str | None = None
    ) -> None:
        """Raise what `set_limit` would raise, and change nothing."""
        optional_limit("limit", limit)
        self._applier.check_limit(limit, as_meter(meter), tenant, None, None)

    def record(self, applied: Applied) -> Applied:
        return self._records.action(applied)

    def budgets(self, tenant: str | None) -> Budgets:
        return self._budgets if tenant is None else self._seat(tenant).budgets

    def takes_time(self, action: Action) -> bool:
        return self._applier.takes_time(action)

    def begin(self, action: Action, policy: str | None) -> Begun:
        return self._applier.begin(action, policy)

    async def finish(self, begun: Begun) -> Applied:
        return await self._applier.finish(begun)

    def below(self, action: Action) -> int:
        """How many VMs an action is about."""
        if action.vm is not None:
            return 1
        tenant = action.tenant if isinstance(action, Throttle | Unthrottle | SetLimit) else None
        if tenant is None:
            return self._live
        seat = self._tenants.get(tenant)
        return 0 if seat is None else seat.live

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        self._nursery.start_soon(function, *args)

    @property
    def closed(self) -> bool:
        return self._closed

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

    def _write_down(self, facts: Facts) -> None:
        """What was seen in an interval; where there is a probe and no journal, the statistics have the last one."""
        recorder = self._records.recorder
        if recorder is not None:
            recorder.aggregate(facts)
            for seen in facts.vms.values():
                vm = self._vms.get(seen.name)
                if seen.bus_locks and vm is not None and vm.launch == seen.launch:
                    self._write_profile(vm)

    def _write_profile(self, vm: Vm) -> None:
        recorder, guest = self._records.recorder, vm.guest
        if recorder is not None and guest is not None and (rows := guest.profile_rows()):
            recorder.profile(self.now(), vm.name, vm.launch, rows)

    def start(self, observed: float | None) -> None:
        """Start its own tasks. `observed`: seconds between two aggregates; None: nobody wants them."""
        self._applier.given(self._budgets, "open_fleet")
        for name, seat in self._tenants.items():
            self._applier.given(seat.budgets, "open_fleet", tenant=name)
        if observed is not None:
            self._governor.observe(self._write_down, observed)
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

    async def close(self) -> None:
        """No task is left."""
        self._closed = True
        self._governor.close()
        self._switchboard.close()
        for vm in list(self._vms.values()):
            self._drop(vm)
        await self.workers.idle()
        for seat in self._tenants.values():
            for budget in seat.budgets.values():
                budget.close()
