"""The VMs that a fleet had at a time, idle ones included: the intervals have only the VMs that were active."""

from __future__ import annotations

from collections import Counter

from ..journal import JournalReader
from ..model.actions import Action, SetIoLimit, SetLimit, Throttle, Unthrottle
from ..policy import VmFacts

__all__ = ["Living"]

ENDED = ("stopped", "failed")


class Living:
    """Reads the states of one fleet's VMs, as time goes on."""

    def __init__(self, journal: JournalReader, session: int) -> None:
        self._rows = journal.lives(session)
        self._next = next(self._rows, None)
        self._tenants: dict[tuple[str, int], str] = {}
        self._of: Counter[str] = Counter()

    def until(self, time: int) -> None:
        """Go on to a time. States of that very time came after the look, such as the end of a VM that a policy
        stopped."""
        while self._next is not None and self._next.time < time:
            row, self._next = self._next, next(self._rows, None)
            if row.state in ENDED:
                self.gone(row.vm, row.generation)
            else:
                self._add(row.vm, row.generation, row.tenant)

    def seen(self, vm: VmFacts) -> None:
        """Add a VM that was active: its states may have been removed from the journal."""
        self._add(vm.name, vm.generation, vm.tenant)

    def _add(self, vm: str, generation: int, tenant: str) -> None:
        if (vm, generation) not in self._tenants:
            self._tenants[vm, generation] = tenant
            self._of[tenant] += 1

    def gone(self, vm: str, generation: int) -> None:
        tenant = self._tenants.pop((vm, generation), None)
        if tenant is not None:
            self._of[tenant] -= 1

    def below(self, action: Action) -> int:
        """How many VMs an action affects; as `Fleet.below`."""
        if action.vm is not None:
            return 1
        tenant = action.tenant if isinstance(action, Throttle | Unthrottle | SetLimit | SetIoLimit) else None
        return len(self._tenants) if tenant is None else self._of[tenant]
