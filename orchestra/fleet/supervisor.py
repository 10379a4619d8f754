"""The VMs of a fleet. It launches each VM, supervises it in a task, and keeps it by name until its user releases it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, TypeAlias

import trio

from ..machine.claims import check_device
from ..machine.contain import contained
from ..machine.context import InstanceContext
from ..machine.control import VmControl
from ..machine.cpufile import with_cpu_read
from ..machine.desired import Desired
from ..machine.devices.bus import Device
from ..machine.disks import check_held
from ..machine.vm import make_vm
from ..model.actions import Action, Outcome, SetIoLimit, SetLimit, State, Stopped, Throttle, Unthrottle
from ..model.errors import SpecError, StateError, UnknownVm, VmExists
from ..model.spec import Meter, VmSpec
from .executor import FleetExecutor
from .spec import DEFAULT_TENANT
from .tenancy import Tenancy

__all__ = ["Claims", "Context", "Supervisor"]

log: Final = logging.getLogger("orchestra")

Claims: TypeAlias = Iterable[tuple[range | None, range | None, Device]]
"""Devices of the user's own, each as (ports, mmio, device)."""

NAMED: Final = 8
"""VMs that a message names at most."""


class Context(InstanceContext, Protocol):
    """The fleet, as the supervisor needs it."""

    executor: FleetExecutor
    tenancy: Tenancy

    def ended(self, vm: VmControl) -> Iterable[Callable[[VmControl], object]]:
        """The steps after a VM has ended for good. Each is done even if another fails."""


class Supervisor:
    """Supervises the VMs of one fleet; for the fleet's thread.

    Attributes:
        controls: the VMs by name. A VM that ended by itself stays until it is stopped, or another VM is launched under
            its name.
        live: the number of VMs that have not ended.
        launched: the number of VMs that were ever launched.
        closing: the fleet is closing, so nothing is launched any more.
    """

    def __init__(self, context: Context, nursery: trio.Nursery) -> None:
        self.controls: dict[str, VmControl] = {}
        self.live = self.launched = 0
        self.closing = False
        self._context = context
        self._nursery = nursery

    def control(self, name: str) -> VmControl:
        """The VM of that name.

        Raises:
            UnknownVm: there is no VM of that name.
        """
        try:
            return self.controls[name]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self.controls)[:NAMED]) or "none"
            raise UnknownVm(f"vm={name!r}: no such VM; there are: {known}") from None

    async def launch(self, spec: VmSpec, paused: bool, devices: Claims) -> VmControl:
        """As `Fleet.launch`."""
        if not isinstance(spec, VmSpec):
            raise SpecError(f"spec={spec!r}: must be a VmSpec")
        self.check_open(f"launch {spec.name!r}")
        spec = await with_cpu_read(spec)
        return await self.admit(spec, Desired.of(spec, paused=paused), devices, "launch(paused=True)")

    async def admit(
        self, spec: VmSpec, desired: Desired, devices: Claims = (), reason: str = "it arrived"
    ) -> VmControl:
        """Set a VM up and run it as desired: a launch from a spec, or a VM that ran before, or elsewhere.

        If this call is cancelled, the VM is given back.

        Parameters:
            desired: what is desired of the VM from its first moment on.
            devices: the user's own devices, each as (ports, mmio, device).
            reason: why caps, pauses and throttles hold the VM from its first moment on, for the journal.

        Raises:
            SpecError: the record does not fit the spec.
            VmExists, UnknownTenant, BusLockUnsupported, ResourceLimit, KvmError, StateError: as `Fleet.launch`.
        """
        self.check_open(f"launch {spec.name!r}")
        context = self._context
        state = context.tenancy.state_of(spec.tenant or DEFAULT_TENANT, spec.name)
        # Every check comes before anything is made or dropped: what is refused leaves the fleet as it was.
        for placed in desired.limits:
            if placed.meter is Meter.BUS_LOCKS:
                field = "limit" if placed.vcpu is None else "vcpu_limit"
                context.executor.check_seen(placed.limits.in_force, f"vm {spec.name!r}: {field}")
        self._check_groups(spec)
        check_held(spec, state.io.in_force, f"tenant {state.tenant.name!r}")
        context.backend.check(desired.spec(spec))
        previous = self.controls.get(spec.name)
        if previous is not None and previous.outcome is None:
            raise VmExists(
                f"name={spec.name!r}: a VM of that name is {previous.state}; stop it, or choose another name"
            )
        devices = list(devices)
        for ports, mmio, device in devices:
            check_device(device, ports, mmio)

        vm = make_vm(context, spec, state.tenant.name, (context.tenancy.host, state.budgets), desired, devices)
        # Only now, as making the new VM may fail: then the ended VM keeps its name and its figures.
        if previous is not None:
            self.drop(previous)
        self.controls[spec.name] = vm  # before the first checkpoint: another launch finds the name taken
        try:
            await self._nursery.start(self._supervise, vm, desired.actions(vm.name, reason))
        except BaseException:  # also if cancelled: then the VM's task has ended as well
            if self.controls.get(spec.name) is vm:
                del self.controls[spec.name]
            vm.close()
            raise
        self.launched += 1
        if desired.paused and vm.guest is not None:
            try:
                await vm.wait_paused()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):  # short: a kick, and about a millisecond
                    vm.stop_nowait(Stopped("its launch was cancelled"), journal=True)
                    await vm.wait_released()
                raise
        return vm

    def _check_groups(self, spec: VmSpec) -> None:
        """The groups of disks that it names must be there."""
        groups = self._context.tenancy.io_groups
        for name, disk in spec.disks.items():
            if disk.io_group is not None and disk.io_group not in groups:
                known = ", ".join(sorted(groups)) or "none"
                raise SpecError(
                    f"vm {spec.name!r}, disk {name!r}: io_group={disk.io_group!r}: this fleet has no such group; there "
                    f"are: {known} (`io_groups` of open_fleet)"
                )

    def check_open(self, what: str) -> None:
        """Raises:
        StateError: the fleet is closing.
        """
        if self.closing:
            raise StateError(f"can't {what}: the fleet is closing")

    async def _supervise(self, vm: VmControl, held: Iterable[tuple[Action, str | None]], *, task_status: Any) -> None:
        context = self._context
        state = context.tenancy.states[vm.tenant]
        state.live += 1
        self.live += 1
        try:
            context.changed(vm, State.CREATED, "launched paused" if vm.wanted.paused else "launched")
            context.executor.given(vm.budgets, "spec", vm=vm.name, generation=vm.generation)
            for index, budgets in enumerate(vm.vcpu_budgets):
                context.executor.given(budgets, "spec", vm=vm.name, vcpu=index, generation=vm.generation)
            for disk, port in vm.disks.ports.items():
                own = port.budgets[0]
                context.executor.given_io(own, "spec", vm=vm.name, disk=disk, generation=vm.generation)
            for action, by in held:  # before any other action about this VM is journaled
                context.did(action, by)
            await vm.runs.supervise(task_status=task_status)
        finally:
            state.live -= 1
            self.live -= 1
            # Each step alone: one that fails must not keep the others from giving back what they hold.
            for step in context.ended(vm):
                with contained(f"vm {vm.name}: leaving the fleet"):
                    step(vm)
            if vm.outcome is not None:
                log.info("vm %s ended: %s", vm.name, vm.outcome)

    def drop(self, vm: VmControl) -> None:
        """Remove an ended VM from the fleet. Its figures stay in the sums."""
        if self.controls.get(vm.name) is vm:
            del self.controls[vm.name]
        self._context.tenancy.states[vm.tenant].gone.add(vm.inspection.statistics())
        vm.close()

    def below(self, action: Action) -> int:
        """How many VMs an action affects: one, those of a tenant, or all."""
        if action.vm is not None:
            return 1
        tenant = action.tenant if isinstance(action, Throttle | Unthrottle | SetLimit | SetIoLimit) else None
        if tenant is None:
            return self.live
        state = self._context.tenancy.states.get(tenant)
        return 0 if state is None else state.live

    async def stop(self, reason: str) -> dict[str, Outcome]:
        """Command all VMs to stop, then wait for each: so they stop side by side. Returns the outcomes by name."""
        vms = list(self.controls.values())
        for vm in vms:
            vm.stop_nowait(Stopped(reason), journal=True)
        return {vm.name: await vm.wait_released() for vm in vms}
