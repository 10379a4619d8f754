"""Shows a policy that runs dry the fleet as it would be if the decided actions were done."""

from __future__ import annotations

from typing import Any

import attrs

from ..model.actions import Action
from ..model.spec import Meter, tightest
from .enforcement import Enforcement, Passed
from .facts import Facts, VmFacts

__all__ = ["DryRun"]


class DryRun:
    """One policy's view of a dry run.

    A VM whose pause, eviction or stop was decided is in no facts. A VM that would be throttled or capped is shown with
    the events that the limits would let through, and with the time that it would have waited (`Enforcement`: buckets as
    a fluid model). What isolation would change, and how the other VMs would fare, is not known. So the signals of the
    host and of victims are shown as they are.
    """

    def __init__(self) -> None:
        self._force = Enforcement()
        self._coming: list[tuple[int, Action, str]] = []

    def apply(self, action: Action, policy: str, time: int) -> None:
        """Take in an action that was decided and not done.

        Parameters:
            time: nanoseconds on the fleet's clock. The action shows in facts of a later time: facts of this time are
                about the interval before it.
        """
        self._coming.append((time, action, policy))

    def let_go(self, policy: str) -> None:
        """Undo what a policy that was removed asked for."""
        self._coming = [one for one in self._coming if one[2] != policy]
        self._force.let_go(policy)

    def forget(self, vm: str) -> None:
        """Forget a VM that is really gone."""
        self._coming = [one for one in self._coming if one[1].vm != vm]
        self._force.forget(vm)

    def see(self, facts: Facts) -> Facts:
        """The facts of an interval as the policy is to see them. Call this once for each interval, as time passes."""
        coming, self._coming = self._coming, []
        for one in coming:
            time, action, policy = one
            if time < facts.time:
                self._force.apply(action, policy)
            else:
                self._coming.append(one)
        if not self._force:
            return facts
        # What a VM did is taken for its demand: only the limits that are really in force held it.
        passed = self._force.let_through(facts.vms, facts.interval)
        vms = dict(facts.vms)
        for name, came in passed.items():
            if self._force.is_out(name):
                del vms[name]
            else:
                vms[name] = _shown(vms[name], came, facts.interval)
        limits: dict[str, Any] = {}
        for meter in Meter:
            decided = self._force.host_limit(meter)
            if decided is not None:
                limits[meter.field] = tightest(getattr(facts, meter.field), [decided])
        return attrs.evolve(facts, vms=vms, **limits)


def _shown(vm: VmFacts, came: Passed, interval: float) -> VmFacts:
    part, seconds = came.part, vm.vcpus * interval
    if part == 1.0 and not (came.throttled or came.capped):
        return vm
    return attrs.evolve(
        vm,
        bus_locks=None if vm.bus_locks is None else round(vm.bus_locks * part),
        exits=round(vm.exits * part),
        answers=round(vm.answers * part),
        throttled=min(seconds, vm.throttled + came.throttled),
        cpu=None if vm.cpu is None else vm.cpu * part,
        run_delay=None if vm.run_delay is None else vm.run_delay * part,
        capped=min(seconds, (vm.capped or 0.0) + came.capped) if came.capped else vm.capped,
        work=None if vm.work is None else vm.work * part,
        dirty_pages=None if vm.dirty_pages is None else round(vm.dirty_pages * part),
        dirty_rate=None if vm.dirty_rate is None else vm.dirty_rate * part,
        by_reason={reason: round(count * part) for reason, count in vm.by_reason.items()},
        by_vcpu=tuple(
            attrs.evolve(
                vcpu,
                bus_locks=None if vcpu.bus_locks is None else round(vcpu.bus_locks * part),
                exits=round(vcpu.exits * part),
                answers=round(vcpu.answers * part),
                cpu=None if vcpu.cpu is None else vcpu.cpu * part,
                run_delay=None if vcpu.run_delay is None else vcpu.run_delay * part,
            )
            for vcpu in vm.by_vcpu
        ),
    )
