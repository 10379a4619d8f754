"""What the parts of one fleet share, and how they reach each other. `Fleet` and `Vm` hold the context, and hide it.

FleetContext ─┬─ resources     what it was opened on: backend, core, signals, quarantine, recorder
              ├─ tenancy       budgets of host and tenants
              ├─ supervisor    the VMs, a task for each
              ├─ dispatcher    exits, from the ring to channels
              ├─ executor      carries actions out, and journals them
              └─ runner        runs the policies, on the facts of `observer`
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import trio

from ..backend import Backend, Detection, Planner
from ..backend.files import open_path
from ..host.control.bandwidth import CpuCgroup
from ..host.control.placement import Quarantine
from ..host.observe import HostSignals, ThreadTimes
from ..machine.budget import Budgets
from ..machine.builder import Builder
from ..machine.control import VmControl
from ..machine.inbox import Inbox
from ..machine.instance import Instance
from ..machine.iobudget import IoBudget
from ..machine.pacer import Pacer
from ..machine.workers import Workers
from ..model.actions import Action, SetLimit, State
from ..model.errors import ResourceLimit
from ..model.spec import Limit, Meter, Tenant, as_meter
from ..native.core import FleetCore, VcpuCore
from ..policy import Guard, Policy
from .channels import Dispatcher
from .executor import FleetExecutor
from .observer import Observer
from .recorder import Recorder, Records
from .recording import Recording
from .runner import PolicyRunner
from .spec import FleetSpec
from .statistics import Figures, TenantState
from .supervisor import Supervisor
from .tenancy import Tenancy

__all__ = ["FleetContext", "FleetResources"]


@attrs.frozen(eq=False)
class FleetResources:
    """What a fleet is opened on. `open_fleet` makes it and closes it.

    Attributes:
        detection: how bus locks are reported; None: they are not seen.
        cpu_cgroup: the cgroup that keeps CPU caps; None: the run loop keeps them.
        recorder: the journal; None: there is none.
    """

    backend: Backend
    core: FleetCore
    detection: Detection | None
    host: HostSignals
    quarantine: Quarantine
    cpu_cgroup: CpuCgroup | None
    recorder: Recorder | None


class FleetContext:
    """Made by `open_fleet`. All methods but `post` are for the fleet's thread."""

    def __init__(
        self, resources: FleetResources, spec: FleetSpec, policies: Sequence[Policy], nursery: trio.Nursery
    ) -> None:
        backend = resources.backend
        # A copy of the guard without history, as one spec may open several fleets.
        guard = Guard() if spec.guard is None else attrs.evolve(spec.guard)
        self.core = resources.core
        self.backend = backend
        self.planner: Planner | None = backend if isinstance(backend, Planner) else None
        self.bus_lock_detection = resources.detection
        self.bus_locks = resources.detection is not None
        self.quarantine = resources.quarantine
        self.cpu_cgroup = resources.cpu_cgroup
        self.open_file = spec.open_file or open_path
        self.inbox = Inbox(resources.core)
        threads = ThreadTimes() if backend.blocking else None
        self.workers = Workers(backend.blocking)
        self.builder = Builder()
        self.tenancy = Tenancy(spec, backend.now())
        self.records = Records(resources.recorder)
        self.supervisor = Supervisor(self, nursery)
        self.executor = FleetExecutor(self, guard, self.records, spec.on_evict)
        self.observer = Observer(self, resources.host, threads)
        # Raises if a policy is refused.
        self.runner = PolicyRunner(self.executor, policies, activity=self.observer, guard=guard, strict=spec.strict)
        # After it: this opens a file of `threads`, which only the observer's end closes.
        cpu = time.thread_time_ns if backend.blocking else _no_time
        self.pacer = Pacer(backend.now, partial(_times, backend.now, threads, threading.get_native_id()), cpu)
        self.dispatcher = Dispatcher(resources.core, paced=backend.blocking)
        self.dispatcher.on_change(self._update_event_masks)
        self.dispatcher.on_talk(self._talked)
        self.recording = Recording(self)
        self.closed = False
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._ids = iter(range(1, 1 << 32))
        self._guests: dict[int, Instance] = {}  # by the ids of their cores

    # ---- start and end

    def start(self, observed: float | None) -> None:
        """Start the tasks. `observed`: seconds between two aggregates; None: nothing needs aggregates."""
        self.recording.host_budget()
        self.tenancy.begin(self.executor)
        if observed is not None:
            self.runner.observe(self.recording.write, observed)
        if self.core.shared is not None and not self.bus_locks:
            self._nursery.start_soon(self.recording.watch_host_budget)
        self._nursery.start_soon(self.dispatcher.run)
        self._nursery.start_soon(self.inbox.run)
        self._nursery.start_soon(self.pacer.run)
        self._nursery.start_soon(self.runner.run)

    async def close(self) -> None:
        """Give everything back, after the last task has ended.

        Order: the runner looks a last time before the VMs leave. Budgets are freed last, as VMs charge them.
        """
        self.closed = True
        self.runner.close()
        self.dispatcher.close()
        for vm in list(self.supervisor.controls.values()):
            self.supervisor.drop(vm)
        await self.workers.idle()
        self.builder.close()
        self.tenancy.close()

    def start_soon(self, function: Callable[..., Any], *args: Any) -> None:
        self._nursery.start_soon(function, *args)

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Run a function soon on the fleet's thread. Any thread; nothing happens once the fleet is gone."""
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            pass  # nobody is left to be told

    # ---- what parts ask

    @property
    def controls(self) -> Mapping[str, VmControl]:
        return self.supervisor.controls

    def control(self, name: str) -> VmControl:
        return self.supervisor.control(name)

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        return self.tenancy.tenants()

    def now(self) -> int:
        return self.backend.now()

    @property
    def tenant_states(self) -> Mapping[str, TenantState]:
        return self.tenancy.states

    def figures(self) -> Figures:
        """The figures that the fleet's parts keep."""
        return Figures(
            removed=self.tenancy.removed,
            launched=self.supervisor.launched,
            missed=self.dispatcher.missed(),
            policies=self.runner.statistics(),
            host=self.runner.host,
            journal=self.records.statistics(),
        )

    def host_limit(self, meter: Meter) -> Limit | None:
        """The host's limit in force on that meter."""
        return self.tenancy.limit(meter)

    def budgets(self, tenant: str | None) -> Budgets:
        return self.tenancy.budgets(tenant)

    def io_budget(self, *, group: str | None = None, tenant: str | None = None) -> IoBudget:
        return self.tenancy.io_budget(group=group, tenant=tenant)

    def below(self, action: Action) -> int:
        return self.supervisor.below(action)

    def next_id(self) -> int:
        return next(self._ids)

    def event_mask(self, vm: str) -> int:
        return self.dispatcher.event_mask(vm)

    def set_limit_nowait(
        self,
        limit: Limit | None,
        *,
        meter: Meter | str = Meter.BUS_LOCKS,
        tenant: str | None = None,
        vm: str | None = None,
        vcpu: int | None = None,
    ) -> None:
        """As `Fleet.set_limit_nowait`."""
        action = SetLimit(limit=limit, meter=as_meter(meter), tenant=tenant, vm=vm, vcpu=vcpu, reason="set_limit()")
        self.executor.set_limit(limit, action.meter, tenant, vm, vcpu)
        self.executor.done(action, None)

    # ---- what parts report

    def register(self, core: VcpuCore, guest: Instance, index: int) -> None:
        self._guests[core.id] = guest
        vm = self.controls[guest.name]
        self.dispatcher.register(core, vm.name, vm.generation, index)
        of, failed = (vm.tenant, vm.name), partial(guest.fail, "its turn")
        self.inbox.add(core, guest.vcpus[index].engine, index, of, (guest.ports, guest.mmio), failed)
        self.observer.add(core.id, vm, guest, index)

    def retire(self, cores: Iterable[VcpuCore]) -> None:
        cores = list(cores)
        self.dispatcher.retire(cores)
        for core in cores:
            self._guests.pop(core.id, None)
            self.inbox.remove(core.id)
            self.observer.forget(core.id)

    def ended(self, vm: VmControl) -> Iterable[Callable[[VmControl], object]]:
        """The steps after a VM has ended for good. The caller does each step even if another fails.

        Release comes last: after it the fleet does not have the VM any more.
        """
        yield self.observer.ended
        yield self._forget
        yield self.recording.profile
        if vm.guest is not None:  # otherwise a launch failed: it may be tried again, so its channels stay open
            yield lambda vm: self.dispatcher.vm_ended(vm.name)
        yield lambda vm: self.dispatcher.vm_left(vm.name, vm.generation)
        if vm.stopping:
            yield VmControl.release

    def released(self, vm: VmControl) -> None:
        """The VM was stopped: remove it from the fleet."""
        self.supervisor.drop(vm)

    def did(self, action: Action, policy: str | None = None) -> None:
        """Journal what a caller did directly and not by `apply`, or the end of what a caller or a policy desired."""
        self.executor.done(action, policy)

    def changed(self, vm: VmControl, state: State, reason: str) -> None:
        self.records.state(self.now(), vm.name, vm.generation, vm.tenant, state, reason)

    def worked(self, vm: VmControl, units: float) -> None:
        self.observer.work(vm, units)

    def logged(self, guest: Instance) -> None:
        if guest.dirty is not None:
            self.observer.dirty(self.observer.logs.watch(self.controls[guest.name], guest.dirty, self.now()))
            self.runner.wake()

    def _talked(self, id: int) -> None:
        if (guest := self._guests.get(id)) is not None:
            guest.talked()

    def _update_event_masks(self) -> None:
        failure: ResourceLimit | None = None
        for vm in self.controls.values():
            if vm.guest is not None:
                try:
                    vm.guest.cores.subscribe(self.event_mask(vm.name))
                except ResourceLimit as error:
                    failure = error
        if failure is not None:
            raise failure

    def _forget(self, vm: VmControl) -> None:
        if self.controls.get(vm.name) is vm:
            self.runner.gone(vm.name)
            self.executor.in_force.forget(vm.name)


def _no_time() -> int:
    """The CPU time of a thread in virtual time."""
    return 0


def _times(now: Callable[[], int], threads: ThreadTimes | None, tid: int) -> tuple[int, int, int]:
    """Nanoseconds that passed, that this thread ran, and that it waited for a CPU (0 where that can't be known)."""
    waited = None if threads is None else threads.run_delay(tid)
    return now(), 0 if threads is None else time.thread_time_ns(), waited or 0
