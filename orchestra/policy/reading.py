"""A ladder's view of one tick: the value of each signal for each VM."""

from __future__ import annotations

import functools

from ..spec import Meter
from .facts import Facts, VmFacts, count_of
from .signals import OWN, Signals
from .steps import Condition, Step

__all__ = ["Reading"]


class Reading:
    """One tick's signals."""

    def __init__(self, facts: Facts, meter: Meter, signals: Signals) -> None:
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
        seconds = self._facts.interval
        match signal:
            case "bus_locks":
                return None if vm.bus_locks is None else vm.bus_locks / seconds
            case "exits" | "answers":
                return float(getattr(vm, signal)) / seconds
            case "cpu":
                return None if vm.cpu is None else vm.cpu / seconds / vm.vcpus
            case "dirty_pages":
                return vm.dirty_rate
        # "share"
        count = count_of(vm, self._meter)
        return None if count is None else count / self._total if self._total else 0.0

    def value(self, signal: str, vm: VmFacts) -> float | None:
        if signal in OWN:
            return self.own(signal, vm)
        if signal in self._worst:
            return next((value for value, name in self._worst[signal] if name != vm.name), None)
        return self._signals.host(signal)

    def holds(self, step: Step, vm: VmFacts) -> bool:
        values = ((self.value(condition.signal, vm), condition.over) for condition in step.when)
        return all(value is not None and value > over for value, over in values)

    def clear(self, condition: Condition, vm: VmFacts, factor: float) -> bool:
        """`factor`: what a cap took from the VM's own figures. What is absent is no reason to hold anybody."""
        value = self.value(condition.signal, vm)
        if value is None:
            return True
        return value * (factor if condition.signal in OWN else 1.0) <= condition.clear_at
