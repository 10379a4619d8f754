"""A ladder's view of one tick: the value of each signal, for each VM."""

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
    """The signals of one tick.

    Parameters:
        facts: the facts of the tick.
        meter: the ladder's meter, for ``share``.
        signals: the signals of the host and of victims, which have looked at these facts already.
    """

    def __init__(self, facts: Facts, meter: Meter, signals: Signals) -> None:
        self.seconds = facts.interval
        self._facts, self._meter, self._signals = facts, meter, signals

    @functools.cached_property
    def _total(self) -> float:
        counts = (count_of(vm, self._meter) for vm in self._facts.vms.values())
        return sum(count for count in counts if count is not None)

    @functools.cached_property
    def _worst(self) -> dict[str, list[tuple[float, str]]]:
        """For each signal the two VMs that suffer most. Two are enough: a VM is never counted as its own victim."""
        victims = ((name, self._signals.victims(name)) for name in ("run_delay", "work_drop"))
        return {
            name: sorted(((value, vm) for vm, value in victims.items()), reverse=True)[:2] for name, victims in victims
        }

    def own(self, signal: str, vm: VmFacts) -> float | None:
        """The value of a signal of the VM itself. None: this host does not report it."""
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
        """Whether all conditions of a step hold for a VM. This runs for each active VM in each tick.

        A signal that is absent does not hold: the ladder acts on what was measured only.
        """
        for condition in step.when:
            value = self.value(condition.signal, vm)
            if value is None or value <= condition.over:
                return False
        return True

    def clear(self, condition: Condition, vm: VmFacts, factor: float) -> bool:
        """Whether a condition is in the clear for a VM.

        A signal that is absent is in the clear: it is no reason to hold a VM.

        Parameters:
            factor: by how much the VM's own figures would be larger without its CPU cap.
        """
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
"""How to read each signal of the VM itself."""
