"""What a fleet writes down in each interval: what its VMs did, where they locked the bus, and the host's budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..machine.control import VmControl
from ..policy import Facts

if TYPE_CHECKING:
    from .context import FleetContext

__all__ = ["Recording"]


class Recording:
    """Of one fleet, into its journal."""

    def __init__(self, fleet: FleetContext) -> None:
        self._fleet = fleet
        self._host_changes = -1  # of the host's budget, as far as the journal has them

    def write(self, facts: Facts) -> None:
        """What was seen in an interval. Without a journal nothing: the statistics keep the last look at the host."""
        recorder = self._fleet.records.recorder
        if recorder is None:
            return
        self.host_budget()
        recorder.aggregate(facts)
        for seen in facts.vms.values():
            vm = self._fleet.controls.get(seen.name)
            if seen.bus_locks and vm is not None and vm.launch == seen.launch:
                self.profile(vm)

    def host_budget(self) -> None:
        """Its limits, if another process, or this one, has changed them."""
        shared = self._fleet.core.shared
        if shared is not None and (changes := shared.changes()) != self._host_changes:
            self._host_changes = changes  # first: what changes while it is read is read once more
            self._fleet.executor.given_host(shared)

    def profile(self, vm: VmControl) -> None:
        """Where it locked the bus since the last time."""
        recorder, guest = self._fleet.records.recorder, vm.guest
        if recorder is not None and guest is not None and (rows := guest.cores.profile_rows()):
            recorder.profile(self._fleet.now(), vm.name, vm.launch, rows)
