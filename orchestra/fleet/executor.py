"""Carries actions out. There is one place for each action, whoever asks, and one row in the journal for each.

If an action fails, its outcome says so and nothing is raised: a policy goes on.

Guarantees: an action is commanded, journaled, and noted by guard and holdings without a checkpoint between. So all of
them have the same order, and a cancelled caller leaves no action that is not recorded. A VM that was told to pause or
to stop may need time for that; only callers that want to wait for it do. An eviction is journaled when it is over, as
its outcome is not known before. So is a cap that a cgroup keeps: the kernel may refuse it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import attrs
import trio

from ..backend import Backend
from ..host.control.bandwidth import CpuCgroup
from ..machine.budget import Budget, Budgets
from ..machine.control import VmControl
from ..machine.disks import check_held
from ..machine.iobudget import IoBudget
from ..model.actions import (
    Action,
    Applied,
    CapCpu,
    Evict,
    Isolate,
    Kill,
    Pause,
    Rejoin,
    Reload,
    Resume,
    SetIoLimit,
    SetLimit,
    SetMemory,
    Stop,
    Stopped,
    Throttle,
    Unthrottle,
    Warn,
)
from ..model.effects import ActionsInForce, releases
from ..model.errors import BusLockUnsupported, OrchestraError, SpecError, StateError
from ..model.iolimit import IoLimit
from ..model.spec import ANSWER_LIMIT, Limit, Meter
from ..native.core import FleetCore
from ..native.shared import SharedBuckets
from ..policy import Guard
from .recorder import Records
from .spec import OnEvict

__all__ = ["Begun", "FleetExecutor"]

log: Final = logging.getLogger("orchestra")

GIVERS: Final = {"open_fleet": "open_fleet()", "spec": "its spec", "default": "default (answer_limit)"}
DEFAULTS: Final = {Meter.ANSWERS: ANSWER_LIMIT}

UNSEEN: Final = "this fleet does not see bus locks, so they are not limited; see `orchestra doctor`"

_Effect = Callable[[], Awaitable[object]]


class Fleet(Protocol):
    """The fleet, as the executor needs it."""

    core: FleetCore
    backend: Backend
    bus_locks: bool
    cpu_cgroup: CpuCgroup | None

    @property
    def controls(self) -> Mapping[str, VmControl]: ...
    @property
    def closed(self) -> bool: ...
    def control(self, name: str) -> VmControl: ...
    def budgets(self, tenant: str | None) -> Budgets:
        """The budgets of a tenant, or (None) of the host."""

    def io_budget(self, *, group: str | None = None, tenant: str | None = None) -> IoBudget: ...

    def now(self) -> int: ...
    def below(self, action: Action) -> int:
        """How many VMs an action affects."""

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run a function in a task of the fleet."""


@attrs.define(eq=False)
class Begun:
    """An action that was commanded. `effect`: await it until the action has taken effect; None: it has already.
    `error`: why the action could not be done; None: no error so far."""

    action: Action
    policy: str | None
    effect: _Effect | None = None
    error: str | None = None


def _why(action: Action, failure: Exception) -> str:
    """Why an action could not be done, for its outcome."""
    if isinstance(failure, OrchestraError):
        return str(failure)
    log.error("%r failed", action, exc_info=failure)  # a mistake in orchestra, which must not end a fleet
    return f"{type(failure).__name__}: {failure}"


class FleetExecutor:
    """Carries out the actions of one fleet; for the fleet's thread.

    Attributes:
        guard: notes what callers do, and judges policies by it.
        in_force: what is in force, and which policy or caller asked for it.
    """

    def __init__(self, fleet: Fleet, guard: Guard, records: Records, on_evict: OnEvict | None) -> None:
        self._fleet = fleet
        self.guard = guard
        self.in_force = ActionsInForce()
        self._records = records
        self._not_kept: Limit | None = None  # the host's limit on bus locks, in a fleet that does not see them
        self._on_evict = on_evict
        self._leaving: set[VmControl] = set()
        self.now = fleet.now
        self.below = fleet.below
        self.start_soon = fleet.start_soon
        self.record = records.action  # for actions that were refused and not tried

    async def apply(self, action: Action, policy: str | None) -> Applied:
        """As `Fleet.apply`."""
        return await self.finish(self.begin(action, policy), wait=True)

    def apply_nowait(self, action: Action, policy: str | None) -> Applied:
        """Command and journal an action that does not `takes_time`. Its effect is not waited for."""
        begun = self.begin(action, policy)
        return self.done(action, policy, begun.error)

    def begin(self, action: Action, policy: str | None) -> Begun:
        """Command an action at once, so that a later action counts more even if this one `takes_time`.

        Raises:
            SpecError: not an action.
        """
        if not isinstance(action, Action):
            raise SpecError(f"action={action!r}: must be one of orchestra's actions")
        begun = Begun(action, policy)
        try:
            # An eviction has no command: `on_evict` does it, which `finish` awaits.
            if not self._is_replaced(action) and not isinstance(action, Evict):
                begun.effect = self._do(action, policy)
                if self.takes_time(action):  # if its policy is removed meanwhile, this cap must be found
                    self.in_force.note(action, policy, self._fleet.now())
        except Exception as failure:
            begun.error = _why(action, failure)
        return begun

    async def finish(self, begun: Begun, *, wait: bool = False) -> Applied:
        """Wait for an action that takes time, and journal its outcome.

        Parameters:
            wait: wait for the effect as well (a VM is paused, or gone).

        Cancelled, the action is journaled all the same.
        """
        action, policy = begun.action, begun.policy
        if begun.error is None:
            try:
                if isinstance(action, Evict):
                    await self._evict(self._fleet.control(action.vm), action)
                elif isinstance(action, CapCpu) and self.takes_time(action):
                    await self._settle(action, policy)
            except trio.Cancelled:  # a cap that was commanded comes all the same, so it counts as done
                self.done(action, policy, "cancelled while on_evict was at it" if isinstance(action, Evict) else None)
                raise
            except Exception as failure:
                begun.error = _why(action, failure)
        applied = self.done(action, policy, begun.error)
        if wait and begun.effect is not None:
            await begun.effect()
        return applied

    async def _settle(self, action: CapCpu, policy: str | None) -> None:
        """Wait until a cap is in force.

        Raises:
            ResourceLimit: the kernel refuses it.
            StateError: the cap was taken back, or changed, meanwhile.
        """
        vm = self._fleet.control(action.vm)
        try:
            await vm.wait_capped()
        except OrchestraError:
            self.in_force.note(attrs.evolve(action, share=None), policy, self._fleet.now())
            raise
        if vm.wanted.cap_of(policy) != action.share:
            raise StateError(f"vm {vm.name!r}: the cap was taken back or changed before it was in force")

    def takes_time(self, action: Action) -> bool:
        """Whether the outcome is known only later: an eviction, or a cap whose threads move to a cgroup by
        themselves."""
        capped = isinstance(action, CapCpu) and action.share is not None
        return isinstance(action, Evict) or (capped and self._fleet.cpu_cgroup is not None)

    def done(self, action: Action, policy: str | None, error: str | None = None) -> Applied:
        """Journal an action with its outcome. The guard notes what callers do, as it judges policies by that."""
        now = self._fleet.now()
        if policy is None and error is None:
            # Only what was done: an action that failed for a caller binds no policy.
            self.guard.judge(action, None, now, 0)
        applied = Applied(time=now, action=action, policy=policy, error=error)
        if applied.outcome == "done":
            self.in_force.note(action, policy, now)
        return self._records.action(applied)

    def _do(self, action: Action, policy: str | None) -> _Effect | None:
        """Command an action. Returns what to await until it has taken effect; None: it has already."""
        vm = self._fleet.control
        match action:
            case Throttle() | Unthrottle():
                self._throttle(action, policy)
            case SetLimit(limit=limit, meter=meter, tenant=tenant, vm=name, vcpu=vcpu):
                self.set_limit(limit, meter, tenant, name, vcpu)
            case SetIoLimit():
                self._set_io_limit(action, policy)
            case Warn(vm=name):
                log.warning("vm %s: %s: %s", vm(name).name, policy or "a caller", action.reason or "a warning")
            case Reload():
                pass  # this action only records that rules were read again
            case CapCpu(vm=name, share=share):
                if share is not None or not self._is_gone(name):  # an ended VM has no caps left to take off
                    vm(name).cap_nowait(policy, share)
            case SetMemory(vm=name, memory=memory):
                if memory is not None or not self._is_gone(name):  # an ended VM has no request left to take back
                    vm(name).memory.ask_nowait(policy, memory)
            case Isolate(vm=name):
                vm(name).isolate_nowait(True)
            case Rejoin(vm=name):
                vm(name).isolate_nowait(False)
            case Pause(vm=name):
                vm(name).pause_nowait()
                return vm(name).wait_paused
            case Resume(vm=name):
                vm(name).resume_nowait()
            case Stop(vm=name):
                return self._end(vm(name), action.reason or "stopped by an action")
            case Kill(vm=name):
                return self._end(vm(name), action.reason or "killed by an action")
        return None

    def _end(self, vm: VmControl, reason: str) -> _Effect | None:
        vm.stop_nowait(Stopped(reason))
        if vm.outcome is None:
            return vm.wait_released
        vm.release()  # the VM had ended by itself, and kept its memory
        return None

    def _is_replaced(self, action: Action) -> bool:
        """Whether the action would take back something of a VM whose name another VM has by now: nothing is left to do.

        Raises:
            StateError: the action would do anything else to that other VM.
        """
        generation = None if isinstance(action, Reload) else action.generation
        found = None if generation is None or action.vm is None else self._fleet.controls.get(action.vm)
        if found is None or found.generation == generation:
            return False
        if releases(action) and isinstance(action, Unthrottle | CapCpu | SetMemory | SetIoLimit):
            return True
        raise StateError(f"vm {action.vm!r} is of another generation now: {found.generation}, not {generation}")

    def _is_gone(self, name: str) -> bool:
        vm = self._fleet.controls.get(name)
        return vm is None or vm.outcome is not None

    async def _evict(self, vm: VmControl, action: Evict) -> None:
        if self._on_evict is None:
            raise StateError("nobody to move it: open the fleet with on_evict=..., which says where VMs go")
        if vm.outcome is not None:
            raise StateError(f"can't evict vm {vm.name!r}: it is {vm.state}")
        if vm in self._leaving:
            raise StateError(f"vm {vm.name!r} is being evicted already")
        # Before the first checkpoint, so that a second eviction finds it.
        self._leaving.add(vm)
        try:
            await self._on_evict(vm.handle, action)
        except Exception as error:  # any error is the reason why the VM is still here
            raise StateError(f"on_evict: {type(error).__name__}: {error}") from error
        finally:
            self._leaving.discard(vm)

    # ---- limits

    def _throttle(self, action: Throttle | Unthrottle, policy: str | None) -> None:
        limit = action.limit if isinstance(action, Throttle) else None
        if limit is None and action.vm is not None and self._is_gone(action.vm):
            return  # an ended VM has no throttle left to take off
        if limit is not None and action.meter is Meter.BUS_LOCKS:
            self.check_seen(limit, "limit")
        budget = self._budget(action.meter, action.tenant, action.vm, None)
        self._change(budget, lambda now: budget.set_throttle(policy, limit, now))

    def set_limit(
        self, limit: Limit | None, meter: Meter, tenant: str | None, vm: str | None, vcpu: int | None
    ) -> None:
        """As `Fleet.set_limit`, without a row in the journal."""
        budget = self.check_limit(limit, meter, tenant, vm, vcpu)
        self._change(budget, lambda now: budget.set_base(limit, now))

    def _set_io_limit(self, action: SetIoLimit, policy: str | None) -> None:
        if action.vm is not None:
            if action.io_limit is not None or not self._is_gone(action.vm):  # an ended VM has no limit left to take off
                self._fleet.control(action.vm).disks.set_limit_nowait(policy, action.disk, action.io_limit)
            return
        self._check_open()
        if action.tenant is not None:
            self.check_io(action.io_limit, action.tenant)
        self._fleet.io_budget(group=action.group, tenant=action.tenant).ask(policy, action.io_limit)

    def check_io(self, limit: IoLimit | None, tenant: str) -> None:
        """Check that a limit on all disks of a tenant holds all of them.

        Raises:
            SpecError: another process serves one of them.
        """
        for vm in self._fleet.controls.values():
            if vm.tenant == tenant and vm.outcome is None:
                check_held(vm.spec, limit, f"tenant {tenant!r}")

    def given_io(self, budget: IoBudget, by: str, **where: Any) -> None:
        """As `given`, of how fast disks may be. `where`: fields of `SetIoLimit`."""
        if self._records.recorder is not None and budget.base is not None:
            given = SetIoLimit(io_limit=budget.base, reason=f"given by {GIVERS[by]}", evidence={"given": by}, **where)
            self._records.given(self._fleet.now(), given)

    def given(self, budgets: Budgets, by: str, **where: Any) -> None:
        """Journal the limits with which a fleet, a tenant, a VM or a vCPU begins, as those that are set later.

        Parameters:
            by: the source of the limits: "open_fleet" or "spec".
            where: fields of `SetLimit` that say whose limits these are.
        """
        if self._records.recorder is None:
            return  # only the journal has these rows
        now = self._fleet.now()
        for meter, budget in budgets.items():
            if budget.base is not None:
                whose = "default" if budget.base == DEFAULTS.get(meter) else by
                reason = f"given by {GIVERS[whose]}"
                given = SetLimit(limit=budget.base, meter=meter, reason=reason, evidence={"given": whose}, **where)
                self._records.given(now, given)

    def given_host(self, shared: SharedBuckets) -> None:
        """Journal the limits of the host's shared budget, as they are now, also where there is no limit: by these rows
        a reader knows that the limits of the whole fleet are not the host's."""
        for meter in Meter:
            try:
                limit, _ = shared.look(meter)
            except StateError as error:  # another process may cause this, which must not end a fleet
                log.warning("%s", error)
                continue
            reason = "given by the host's budget"
            given = SetLimit(limit=limit, meter=meter, reason=reason, evidence={"given": "host_budget"})
            kept = limit is None or meter is not Meter.BUS_LOCKS or self._fleet.bus_locks
            if meter is Meter.BUS_LOCKS:
                before, self._not_kept = self._not_kept, None if kept else limit
                if not kept and limit != before:
                    self._cannot_keep(given)
            if kept:
                self._records.given(self._fleet.now(), given)

    def _cannot_keep(self, given: SetLimit) -> None:
        """The host's budget limits bus locks, which this fleet does not see. Any process may set that at any time, so
        it can't be refused. But it is never ignored in silence (design rule 3)."""
        log.warning("host budget: limit=%s: %s", given.limit, UNSEEN)
        self._records.action(Applied(time=self._fleet.now(), action=given, error=UNSEEN))

    def check_limit(
        self, limit: Limit | None, meter: Meter, tenant: str | None, vm: str | None, vcpu: int | None
    ) -> Budget:
        """Raise what `set_limit` would raise. Returns the budget that the limit would be in."""
        if meter is Meter.BUS_LOCKS:
            self.check_seen(limit, "limit")
        self._check_open()
        return self._budget(meter, tenant, vm, vcpu)

    def check_seen(self, limit: Limit | None, what: str) -> None:
        """Raises:
        BusLockUnsupported: there is a limit on bus locks, and this fleet does not see them.
        """
        if limit is not None and not self._fleet.bus_locks:
            raise BusLockUnsupported(
                f"{what}: this fleet does not see bus locks, so they can't be limited; leave it out, limit exits "
                "(exit_limit) instead, or run on backend='emulated', or on a host that `orchestra doctor` says can "
                "report them"
            )

    def _budget(self, meter: Meter, tenant: str | None, vm: str | None, vcpu: int | None) -> Budget:
        if vm is not None:
            if tenant is not None:
                raise SpecError(f"vm={vm!r}, tenant={tenant!r}: name one of them, or neither for the host")
            found = self._fleet.control(vm)
            if found.outcome is not None:
                raise StateError(f"vm {vm!r} has ended: it has no limit to change")
            return found.budget(meter, vcpu)
        if vcpu is not None:
            raise SpecError(f"vcpu={vcpu!r}: name its vm as well")
        return self._fleet.budgets(tenant)[meter]

    def _change(self, budget: Budget, change: Callable[[int], Any]) -> None:
        fleet = self._fleet
        self._check_open()
        before = budget.limit
        change(fleet.now())
        if budget.limit != before:
            # Only if the limit in force has changed: this wakes every throttled vCPU. The core wakes threads, the
            # backend wakes engines that are awaited.
            fleet.core.limits_changed()
            fleet.backend.limits_changed()

    def _check_open(self) -> None:
        if self._fleet.closed:
            raise StateError("the fleet is closed: it has no limits any more")
