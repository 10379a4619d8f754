"""The VMs of a fleet: launched, supervised by a task each, and kept by name until their users let them go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, TypeAlias

import trio

from ..machine.contain import contained
from ..machine.devices.bus import Device
from ..machine.instance import InstanceContext
from ..machine.vm import Vm, check_device
from ..model.actions import Action, Outcome, Pause, SetLimit, State, Stopped, Throttle, Unthrottle
from ..model.errors import SpecError, StateError, UnknownVm, VmExists
from ..model.spec import VmSpec
from .executor import FleetExecutor
from .spec import DEFAULT_TENANT
from .tenancy import Tenancy

__all__ = ["Claims", "Context", "Supervisor"]

log: Final = logging.getLogger("orchestra")

Claims: TypeAlias = Iterable[tuple[range | None, range | None, Device]]
"""Devices of the user's own, each as (ports, mmio, device)."""

NAMED: Final = 8
"""VMs that a message names."""


class Context(InstanceContext, Protocol):
    """What this needs of its fleet."""

    executor: FleetExecutor
    tenancy: Tenancy

    def ended(self, vm: Vm) -> Iterable[Callable[[Vm], object]]:
        """What is to be done when a VM has ended for good, each whatever becomes of the others."""


class Supervisor:
    """Of one fleet.

    Attributes:
        vms: by name. One that ended by itself stays until it is stopped, or another is launched under its name.
        live: how many have not ended.
        launched: how many there were, ever.
        closing: nothing is launched any more.
    """

    def __init__(self, context: Context, nursery: trio.Nursery) -> None:
        self.vms: dict[str, Vm] = {}
        self.live = self.launched = 0
        self.closing = False
        self._context = context
        self._nursery = nursery

    def vm(self, name: str) -> Vm:
        """The VM of that name.

        Raises:
            UnknownVm: there is none.
        """
        try:
            return self.vms[name]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self.vms)[:NAMED]) or "none"
            raise UnknownVm(f"vm={name!r}: no such VM; there are: {known}") from None

    async def launch(self, spec: VmSpec, paused: bool, devices: Claims) -> Vm:
        """As `Fleet.launch`."""
        if not isinstance(spec, VmSpec):
            raise SpecError(f"spec={spec!r}: must be a VmSpec")
        self.check_open(f"launch {spec.name!r}")
        context = self._context
        seat = context.tenancy.seat(spec.tenant or DEFAULT_TENANT, spec.name)
        context.executor.check_seen(spec.limit, f"vm {spec.name!r}: limit")
        context.executor.check_seen(spec.vcpu_limit, f"vm {spec.name!r}: vcpu_limit")
        context.backend.check(spec)
        previous = self.vms.get(spec.name)
        if previous is not None and previous.outcome is None:
            raise VmExists(
                f"name={spec.name!r}: a VM of that name is {previous.state}; stop it, or choose another name"
            )
        devices = list(devices)
        for ports, mmio, device in devices:
            check_device(device, ports, mmio)

        vm = Vm(context, spec, seat.tenant.name, (context.tenancy.host, seat.budgets))
        if previous is not None:
            self.drop(previous)
        self.vms[spec.name] = vm  # the name is taken from now on, whoever launches meanwhile
        try:
            await self._nursery.start(self._supervise, vm, devices, paused)
        except BaseException:  # if we were cancelled, so was its task, and it is gone
            if self.vms.get(spec.name) is vm:
                del self.vms[spec.name]
            vm.close()
            raise
        self.launched += 1
        if paused and vm.guest is not None:
            try:
                await vm.wait_parked()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):  # a kick and a millisecond
                    await vm.stop("its launch was cancelled")
                raise
        return vm

    def check_open(self, what: str) -> None:
        """Raises:
        StateError: the fleet is closing, so it can't do that.
        """
        if self.closing:
            raise StateError(f"can't {what}: the fleet is closing")

    async def _supervise(self, vm: Vm, devices: Claims, paused: bool, *, task_status: Any) -> None:
        context = self._context
        seat = context.tenancy.seats[vm.tenant]
        seat.live += 1
        self.live += 1
        try:
            context.changed(vm, State.CREATED, "launched paused" if paused else "launched")
            context.executor.given(vm.budgets, "spec", vm=vm.name, launch=vm.launch)
            for index, budgets in enumerate(vm.vcpu_budgets):
                context.executor.given(budgets, "spec", vm=vm.name, vcpu=index, launch=vm.launch)
            if paused:  # before anybody else has a word
                context.did(Pause(vm=vm.name, reason="launch(paused=True)"))
            await vm.supervise(devices, paused, task_status=task_status)
        finally:
            seat.live -= 1
            self.live -= 1
            for step in context.ended(vm):
                with contained(f"vm {vm.name}: leaving the fleet"):
                    step(vm)
            if vm.outcome is not None:
                log.info("vm %s ended: %s", vm.name, vm.outcome)

    def drop(self, vm: Vm) -> None:
        """An ended VM leaves the fleet; its figures stay in the sums."""
        if self.vms.get(vm.name) is vm:
            del self.vms[vm.name]
        self._context.tenancy.seats[vm.tenant].gone.add(vm.statistics())
        vm.close()

    def below(self, action: Action) -> int:
        """How many VMs an action is about."""
        if action.vm is not None:
            return 1
        tenant = action.tenant if isinstance(action, Throttle | Unthrottle | SetLimit) else None
        if tenant is None:
            return self.live
        seat = self._context.tenancy.seats.get(tenant)
        return 0 if seat is None else seat.live

    async def stop(self, reason: str) -> dict[str, Outcome]:
        """Stop all VMs: all are told first, then awaited. Their outcomes by name."""
        vms = list(self.vms.values())
        for vm in vms:
            vm.stop_soon(Stopped(reason))
        return {vm.name: await vm.stop(reason) for vm in vms}
