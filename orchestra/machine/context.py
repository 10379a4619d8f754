"""What a run needs of its VM, and what both need of their fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from ..backend import Backend, Detection
from ..host.control.bandwidth import CpuCgroup
from ..host.control.placement import Quarantine
from ..model.actions import Action, State
from ..model.errors import OrchestraError
from ..model.spec import Limit, Meter
from ..native.core import FleetCore, VcpuCore
from ..profile import Samples
from .claims import Claims
from .desired import Desired
from .devices.console import Console
from .holding import Level
from .inbox import Inbox
from .workers import Workers

__all__ = ["REFUSED", "InstanceContext", "Owner"]

REFUSED: Final = "the host can't put it into force"


class InstanceContext(Protocol):
    """Of one fleet; for its thread, unless it says otherwise."""

    backend: Backend
    core: FleetCore
    bus_locks: bool
    bus_lock_detection: Detection | None
    workers: Workers
    quarantine: Quarantine
    inbox: Inbox
    cpu_cgroup: CpuCgroup | None
    """Where CPU caps are kept; None: in the run loop."""

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Run it soon on the fleet's thread. Any thread; nothing happens once the fleet is gone."""

    def next_id(self) -> int: ...
    def told(self, vm: str) -> int: ...
    def register(self, core: VcpuCore, guest: Any, index: int) -> None:
        """Exits of this core belong to that vCPU."""

    def retire(self, cores: Iterable[VcpuCore]) -> None:
        """Deliver what these cores still have to tell; none of them runs any more."""

    def released(self, vm: Any) -> None:
        """A VM was stopped and leaves the fleet."""

    def did(self, action: Action, policy: str | None = None) -> None:
        """It was done, and not by an action: journal it. `policy`: whose word it ends; None: a caller's."""

    def changed(self, vm: Any, state: State, reason: str) -> None:
        """A VM came into a state: journal it."""

    def worked(self, vm: Any, units: float) -> None:
        """A guest got something done, by its own account."""

    def logged(self, guest: Any) -> None:
        """The log of the pages that a guest writes was switched on or off."""

    def set_limit_nowait(
        self, limit: Limit | None, *, meter: Meter | str, tenant: str | None = None, vm: str | None, vcpu: int | None
    ) -> None: ...


class Owner(Protocol):
    """What a run needs of its VM."""

    console: Console
    samples: Samples

    @property
    def wanted(self) -> Desired:
        """What is desired of it now. Its limits are its budgets', which outlive its runs."""

    @property
    def claims(self) -> Claims:
        """Of devices and tasks of the user's."""

    def on_held(self, level: Level) -> None:
        """It has come to that level of a pause."""

    def on_cap_failed(self, error: OrchestraError) -> None:
        """What it is to be capped to can't be put into force: nothing is."""

    def on_isolation_failed(self, error: OrchestraError) -> None:
        """It can't be isolated, and is not."""
