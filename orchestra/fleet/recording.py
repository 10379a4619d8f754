"""What a fleet records in each interval: what its VMs did, where they locked the bus, and the host's budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..machine.control import VmControl
from ..policy import Facts

if TYPE_CHECKING:
    from .context import FleetContext

__all__ = ["Recording"]


class Recording:
    """Writes into the journal of one fleet."""

    def __init__(self, fleet: FleetContext) -> None:
        self._fleet = fleet
        self._host_changes = -1  # the changes of the host's budget that the journal has; -1: none yet

    def write(self, facts: Facts) -> None:
        """Record what was seen in an interval. Without a journal this does nothing."""
        recorder = self._fleet.records.recorder
        if recorder is None:
            return
        self.host_budget()
        recorder.aggregate(facts)
        for seen in facts.vms.values():
            vm = self._fleet.controls.get(seen.name)
            if seen.bus_locks and vm is not None and vm.generation == seen.generation:
                self.profile(vm)

    def host_budget(self) -> None:
        """Record the limits of the host's budget, if this process or another has changed them."""
        shared = self._fleet.core.shared
        if shared is not None and (changes := shared.changes()) != self._host_changes:
            self._host_changes = changes  # first: a change during the reading makes the next call read again
            self._fleet.executor.given_host(shared)

    def profile(self, vm: VmControl) -> None:
        """Record where a VM locked the bus since the last call."""
        recorder, guest = self._fleet.records.recorder, vm.guest
        if recorder is not None and guest is not None and (rows := guest.cores.profile_rows()):
            recorder.profile(self._fleet.now(), vm.name, vm.generation, rows)
