"""The interfaces that a run needs from its VM, and that both need from their fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from ..backend import Backend, Detection, Planner
from ..backend.files import Opener
from ..host.control.bandwidth import CpuCgroup
from ..host.control.placement import Quarantine
from ..model.actions import Action, State
from ..model.errors import OrchestraError
from ..model.spec import Limit, Meter
from ..native.core import FleetCore, VcpuCore
from ..profile import Samples
from .builder import Builder
from .claims import Claims
from .debt import Owed
from .desired import Desired
from .devices.console import Console
from .devices.consoleport import Ports
from .inbox import Inbox
from .iobudget import IoBudget
from .pacer import Pacer
from .pause_levels import Level
from .workers import Workers

__all__ = ["REFUSED", "InstanceContext", "Owner"]

REFUSED: Final = "the host can't put it into force"


class InstanceContext(Protocol):
    """One fleet, as its VMs see it. All methods are for the fleet's thread, unless their docstring says otherwise."""

    backend: Backend
    planner: Planner | None
    """The backend, if the core can make its VMs (`builder`)."""
    core: FleetCore
    bus_locks: bool
    bus_lock_detection: Detection | None
    workers: Workers
    builder: Builder
    quarantine: Quarantine
    inbox: Inbox
    pacer: Pacer
    open_file: Opener
    cpu_cgroup: CpuCgroup | None
    """The cgroup that keeps CPU caps. None: the run loop keeps them."""

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Run a function soon on the fleet's thread. Any thread; nothing happens once the fleet is gone."""

    def next_id(self) -> int: ...
    def event_mask(self, vm: str) -> int: ...
    def register(self, core: VcpuCore, guest: Any, index: int) -> None:
        """Note that the exits of this core belong to that vCPU."""

    def retire(self, cores: Iterable[VcpuCore]) -> None:
        """Deliver the records that are left in these cores' rings. None of the cores runs any more."""

    def released(self, vm: Any) -> None:
        """The VM was stopped: remove it from the fleet."""

    def io_budget(self, *, group: str | None = None, tenant: str | None = None) -> IoBudget:
        """What the disks of a group, or of a tenant, may do together."""

    def did(self, action: Action, policy: str | None = None) -> None:
        """Journal what was done without `apply`. `policy`: the policy whose request it ends; None: a caller's."""

    def changed(self, vm: Any, state: State, reason: str) -> None:
        """Journal that a VM came into a state."""

    def worked(self, vm: Any, units: float) -> None:
        """Note the work that a guest says it has done (`Vm.report_work`)."""

    def logged(self, guest: Any) -> None:
        """The log of the pages that a guest writes was switched on or off."""

    def set_limit_nowait(
        self, limit: Limit | None, *, meter: Meter | str, tenant: str | None = None, vm: str | None, vcpu: int | None
    ) -> None: ...


class Owner(Protocol):
    """The VM, as its runs see it."""

    console: Console
    ports: Ports
    samples: Samples
    owed: Owed

    @property
    def wanted(self) -> Desired:
        """What is desired of the VM now, without limits: these are in its budgets, which outlive its runs."""

    @property
    def claims(self) -> Claims:
        """The addresses that the user's devices and tasks have claimed."""

    @property
    def disks(self) -> Any:
        """The VM's disks, as a run's devices see them (`DisksOfVm`)."""

    def on_pause_level(self, level: Level) -> None:
        """The run has reached that level of a pause."""

    def on_cap_failed(self, error: OrchestraError) -> None:
        """The host refused the CPU cap that is desired: no cap is in force."""

    def on_isolation_failed(self, error: OrchestraError) -> None:
        """The host refused to isolate the VM: it is not isolated."""
