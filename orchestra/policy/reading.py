"""A ladder's view of one tick: the value of each signal for each VM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Final

from ..model.spec import Meter
from .facts import Facts, VmFacts, count_of
from .harm import OWN, Signals
from .steps import Condition, Step

__all__ = ["Reading"]


class Reading:
    """One tick's signals."""

    def __init__(self, facts: Facts, meter: Meter, signals: Signals) -> None:
        self.seconds = facts.interval
        self._facts, self._meter, self._signals = facts, meter, signals

    @functools.cached_property
    def _total(self) -> float:
        counts = (count_of(vm, self._meter) for vm in self._facts.vms.values())
        return sum(count for count in counts if count is not None)

    @functools.cached_property
    def _worst(self) -> dict[str, list[tuple[float, str]]]:
        """The two VMs that suffer most: a VM is no victim of its own."""
        told = ((name, self._signals.victims(name)) for name in ("run_delay", "work_drop"))
        return {
            name: sorted(((value, vm) for vm, value in victims.items()), reverse=True)[:2] for name, victims in told
        }

    def own(self, signal: str, vm: VmFacts) -> float | None:
        """What the VM itself does."""
        return _OWN[signal](self, vm)

    def share(self, vm: VmFacts) -> float | None:
        """The VM's part of all events of the meter."""
        count = count_of(vm, self._meter)
        return None if count is None else count / self._total if self._total else 0.0

    def value(self, signal: str, vm: VmFacts) -> float | None:
        own = _OWN.get(signal)
        if own is not None:
            return own(self, vm)
        if signal in self._worst:
            return next((value for value, name in self._worst[signal] if name != vm.name), None)
        return self._signals.host(signal)

    def holds(self, step: Step, vm: VmFacts) -> bool:
        """Whether all that a step asks for is so. This runs for each active VM in each tick."""
        for condition in step.when:
            value = self.value(condition.signal, vm)
            if value is None or value <= condition.over:
                return False
        return True

    def clear(self, condition: Condition, vm: VmFacts, factor: float) -> bool:
        """`factor`: what a cap took from the VM's own figures. What is absent is no reason to hold anybody."""
        value = self.value(condition.signal, vm)
        if value is None:
            return True
        return value * (factor if condition.signal in OWN else 1.0) <= condition.clear_at


def _rate(name: str) -> Callable[[Reading, VmFacts], float | None]:
    count = attrgetter(name)

    def rate(reading: Reading, vm: VmFacts) -> float | None:
        events = count(vm)
        return None if events is None else float(events) / reading.seconds

    return rate


_OWN: Final[Mapping[str, Callable[[Reading, VmFacts], float | None]]] = {
    **{meter.value: _rate(meter.value) for meter in Meter},
    "cpu": lambda reading, vm: None if vm.cpu is None else vm.cpu / reading.seconds / vm.vcpus,
    "share": Reading.share,
    "dirty_pages": lambda reading, vm: vm.dirty_rate,
}
"""How each signal of the VM itself is read."""
