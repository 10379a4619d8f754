"""A fleet: many VMs in one nursery, their exits merged, actions applied to any of them.

fleet's nursery ── drain task (ring → channels)
                ├─ governor (policies)
                └─ a task for each VM ── a task for each vCPU ── its thread
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, Final, Literal

import attrs
import trio

from .actions import Action, Applied, Kill, Outcome, Pause, Resume, Stop, Stopped, Throttle, Unthrottle
from .backend import Backend, Detection, choose
from .budget import Budget, Budgets, make_budgets
from .devices.bus import Device
from .errors import (
    BusLockUnsupported,
    OrchestraError,
    SpecError,
    StateError,
    UnknownTenant,
    UnknownVm,
    VmExists,
)
from .exits import Exit
from .governor import Governor, PolicyStatus
from .native.core import FleetCore, VcpuCore
from .policy import Policy
from .spec import Limit, Meter, Tenant, VmSpec, optional_limit
from .subscription import Exits, Switchboard
from .vm import Vm, VmStatistics

__all__ = ["DEFAULT_TENANT", "Fleet", "FleetStatistics", "TenantStatistics", "open_fleet"]

log: Final = logging.getLogger("orchestra")
DEFAULT_TENANT: Final = "default"
JOURNAL: Final = 10_000
SETUP_THREADS: Final = 4


@attrs.frozen
class TenantStatistics:
    """What a tenant's VMs did, those that are gone included."""

    name: str
    weight: float
    vms: int
    bus_locks: int | None
    exits: int
    throttled_seconds: float
    released: int
    limit: Limit | None
    exit_limit: Limit | None


@attrs.frozen
class FleetStatistics:
    """What the fleet did since it was opened, VMs that are gone included. Times in seconds.

    Attributes:
        backend, why: what executes the guests, and why it was picked.
        bus_lock_detection: "fault-like" (AMD: reported before the instruction, counts approximate), "trap-like" (Intel:
            behind it), "unknown", or None: bus locks are not seen here, and `bus_locks` is None as well.
        vms, vcpus: that have not ended.
        launched: VMs, ever. states: how many of `Fleet.vms` are in each state.
        released: waits that ``max_delay`` ended before the turn came.
        missed: exits whose details were lost in a full ring or channel; they are counted in everything else.
    """

    backend: str
    why: str
    bus_lock_detection: Detection | None
    vms: int
    vcpus: int
    launched: int
    states: Mapping[str, int]
    bus_locks: int | None
    exits: Mapping[str, int]
    throttled_seconds: float
    waits: int
    released: int
    missed: int
    limit: Limit | None
    exit_limit: Limit | None
    tenants: Mapping[str, TenantStatistics]
    policies: tuple[PolicyStatus, ...]


@attrs.define
class _Totals:
    """Sums over VMs that are gone, for one tenant."""

    bus_locks: int = 0
    throttled: float = 0.0
    waits: int = 0
    released: int = 0
    missed: int = 0
    exits: dict[str, int] = attrs.field(factory=dict)

    def add(self, statistics: VmStatistics) -> None:
        self.bus_locks += statistics.bus_locks or 0
        self.throttled += statistics.throttled_seconds
        self.waits += statistics.waits
        self.released += statistics.released
        self.missed += statistics.missed
        for name, count in statistics.exits.items():
            self.exits[name] = self.exits.get(name, 0) + count


@attrs.frozen
class _TenantSeat:
    tenant: Tenant
    budgets: Budgets
    gone: _Totals


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
        self.vcpu_threads = trio.CapacityLimiter(1_000_000)  # a thread each: the host's limits are the limit
        self.setup_threads = trio.CapacityLimiter(SETUP_THREADS)
        self._budgets = budgets
        now = backend.now()
        self._tenants = {
            name: _TenantSeat(tenant, make_budgets(tenant.limit, tenant.exit_limit, now), _Totals())
            for name, tenant in tenants.items()
        }
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._vms: dict[str, Vm] = {}
        self._owners: dict[int, tuple[Vm, int]] = {}
        self._ids = iter(range(1, 1 << 32))
        self._launched = 0
        self._closing = False
        self._journal: deque[Applied] = deque(maxlen=JOURNAL)
        self._switchboard = Switchboard(core)
        self._switchboard.on_change(self._retell)
        self._governor = Governor(self, policies, strict)

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
        if spec.vcpus > (most := self.backend.max_vcpus()):
            raise SpecError(f"vm {spec.name!r}: vcpus={spec.vcpus}: this host's KVM allows at most {most} in a VM")
        previous = self._vms.get(spec.name)
        if previous is not None and previous.outcome is None:
            raise VmExists(
                f"name={spec.name!r}: a VM of that name is {previous.state}; stop it, or choose another name"
            )

        vm = Vm(self, spec, seat.tenant.name, (self._budgets, seat.budgets))
        if previous is not None:
            self._drop(previous)
        self._vms[spec.name] = vm  # the name is taken from now on, whoever launches meanwhile
        try:
            await self._nursery.start(self._supervise, vm, devices, paused)
        except BaseException:  # if we were cancelled, so was its task, and it is gone
            self._vms.pop(spec.name, None)
            vm.close()
            raise
        self._launched += 1
        if paused and vm.guest is not None:
            await vm.guest.parked.wait()
        return vm

    async def _supervise(
        self, vm: Vm, devices: Iterable[tuple[range | None, range | None, Device]], paused: bool, *, task_status: Any
    ) -> None:
        try:
            await vm.supervise(devices, paused, task_status=task_status)
        finally:
            self._switchboard.vm_ended(vm.name)
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
        return self._record(action, policy, error)

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
                await trio.lowlevel.cancel_shielded_checkpoint()
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
        try:
            which = Meter(meter)
        except ValueError:
            raise SpecError(f'meter={meter!r}: must be "bus_locks" or "exits"') from None
        optional_limit("limit", limit)
        if which is Meter.BUS_LOCKS:
            self._check_seen(limit, "limit")
        budget = self._budget(which, tenant, vm, vcpu)
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
        before = budget.limit
        change(self.now())
        if budget.limit != before:
            self.core.limits_changed()
            self.backend.limits_changed()

    def _check_seen(self, limit: Limit | None, what: str) -> None:
        if limit is not None and not self.bus_locks:
            raise BusLockUnsupported(
                f"{what}: this fleet does not see bus locks, so they can't be limited; leave it out, limit exits "
                "(exit_limit) instead, or run on a host that `orchestra doctor` says can report them"
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
        """All tenants, with the limits that are in force."""
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
        sums = {name: attrs.evolve(seat.gone, exits=dict(seat.gone.exits)) for name, seat in self._tenants.items()}
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
        total = _Totals()
        for tenant in sums.values():
            for field in ("bus_locks", "throttled", "waits", "released", "missed"):
                setattr(total, field, getattr(total, field) + getattr(tenant, field))
            for name, count in tenant.exits.items():
                total.exits[name] = total.exits.get(name, 0) + count
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
            self._owners.pop(core.id, None)
            self._governor.forget(core.id)

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
        for vm in self._vms.values():
            if vm.guest is not None:
                vm.guest.tell(self.told(vm.name))

    async def _run(self) -> None:
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

    def _close(self) -> None:
        """No task is left."""
        self._switchboard.close()
        for vm in list(self._vms.values()):
            self._drop(vm)
        for seat in self._tenants.values():
            for budget in seat.budgets.values():
                budget.close()


def _as_tenants(tenants: Mapping[str, Limit | Tenant | None] | Iterable[Tenant]) -> dict[str, Tenant]:
    """All the ways to name tenants, and the default one."""
    made: dict[str, Tenant] = {}
    items: Iterator[tuple[Any, Any]]
    items = iter(tenants.items()) if isinstance(tenants, Mapping) else ((getattr(t, "name", None), t) for t in tenants)
    for name, value in items:
        if isinstance(value, Tenant):
            if value.name != name:
                raise SpecError(f"tenants[{name!r}]: its name is {value.name!r}: they must be the same")
            made[name] = value
        elif value is None or isinstance(value, Limit):
            made[name] = Tenant(name, limit=value)
        else:
            raise SpecError(f"tenants[{name!r}]={value!r}: must be a Tenant, a Limit, or None for no limit")
    made.setdefault(DEFAULT_TENANT, Tenant(DEFAULT_TENANT))
    return made


def _detection(backend: Backend, bus_locks: str, limits: Mapping[str, Limit | None]) -> Detection | None:
    """How bus locks are seen in this fleet; None: not at all. Design rule 3: asked for and impossible is an error."""
    asked = next((what for what, limit in limits.items() if limit is not None), None)
    if bus_locks == "off":
        if asked:
            raise SpecError(f"{asked} limits bus locks, but bus_locks='off': leave one of them out")
        return None
    detection = backend.bus_lock_detection()
    if detection is not None:
        return detection
    if bus_locks == "require" or asked:
        raise BusLockUnsupported(
            f"{asked or 'bus_locks=require'}: this host's KVM can't report bus locks "
            "(KVM_CAP_X86_BUS_LOCK_EXIT lacks KVM_BUS_LOCK_DETECTION_EXIT). They need an Intel CPU with bus-lock "
            "detection and Linux 5.12, or an AMD one with Bus Lock Threshold and Linux 6.16; see `orchestra doctor`. "
            'Without limits on bus locks, bus_locks="auto" runs and only can\'t see them; exit_limit works anywhere'
        )
    log.warning("bus locks can't be seen on this host (backend %s); everything else works", backend.name)
    return None


@asynccontextmanager
async def open_fleet(
    *,
    backend: str | Backend = "auto",
    limit: Limit | None = None,
    exit_limit: Limit | None = None,
    tenants: Mapping[str, Limit | Tenant | None] | Iterable[Tenant] = (),
    policies: Iterable[Policy] = (),
    bus_locks: Literal["require", "auto", "off"] = "auto",
    strict: bool = False,
) -> AsyncIterator[Fleet]:
    """Open a fleet; leaving the block stops its VMs and leaves no thread, descriptor or mapping behind.

    Parameters:
        backend: "auto" (KVM where /dev/kvm opens), "kvm", "scripted", or a Backend object.
        limit: the host's: bus locks per second of all VMs together; None: only counted.
        exit_limit: the same for exits of any kind.
        tenants: by name, each a `Tenant`, a `Limit`, or None; or `Tenant` objects. VMs that name none belong to
            "default", which may be given here as well.
        policies: asked at each of their ticks; see `orchestra.policy`.
        bus_locks: "require" (fail where they can't be seen), "auto" (see them if they can be), "off".
        strict: a policy that raises ends the fleet instead of being switched off.

    Raises:
        BusLockUnsupported: bus locks are required or limited, and can't be seen here. No guest has run then.
        BackendUnavailable, NoSuchBackend, SpecError: the message says what to do.
    """
    if bus_locks not in ("require", "auto", "off"):
        raise SpecError(f'bus_locks={bus_locks!r}: must be "require", "auto" or "off"')
    optional_limit("limit", limit)
    optional_limit("exit_limit", exit_limit)
    named = _as_tenants(tenants)
    seats = list(policies)
    for policy in seats:
        if not isinstance(policy, Policy):
            raise SpecError(f"policies: {policy!r} must have a name, an interval and decide(facts)")

    opened = choose(backend)
    core: FleetCore | None = None
    try:
        asked = {"limit": limit, **{f"tenants[{name!r}]": tenant.limit for name, tenant in named.items()}}
        detection = _detection(opened, bus_locks, asked)
        core = FleetCore()
        budgets = make_budgets(limit, exit_limit, opened.now())
        fleet: Fleet | None = None
        try:
            async with trio.open_nursery() as nursery:
                fleet = Fleet(
                    core=core,
                    backend=opened,
                    detection=detection,
                    budgets=budgets,
                    tenants=named,
                    policies=seats,
                    strict=strict,
                    nursery=nursery,
                )
                try:
                    await fleet._run()
                    yield fleet
                finally:
                    fleet._closing = True
                    nursery.cancel_scope.cancel()
        finally:
            if fleet is not None:
                fleet._close()
            for budget in budgets.values():
                budget.close()
    finally:
        if core is not None:
            core.close()
        if isinstance(backend, str):
            opened.close()
