"""A simulated host's CPU, and limits as parts of its bus. Sources and limits: docs/simulate.md."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Final

import attrs

from ..model.errors import SpecError
from ..model.spec import Limit
from ..policy import CPU_MODELS

__all__ = ["CPUS", "HostCpu", "LimitSpec"]


@attrs.frozen(kw_only=True)
class HostCpu:
    """A host's CPU, as far as bus locks are concerned.

    Attributes:
        hertz: core frequency.
        cycles: for which one lock holds the bus. Source of 7000: Documentation/arch/x86/buslock.rst.
        worst: how many times longer an access of the affected kind takes others while the bus is held all the time
            (1: no effect). A victim says by its `memory_share` how much of its time it spends on such accesses.
        lock_ns, memory_ns: what the host's probe reads when nobody locks.
        about: where the figures are from.
    """

    hertz: float = 2e9
    cycles: float = 7000.0
    worst: float = 2.0
    lock_ns: float = 10.0
    memory_ns: float = 90.0
    about: str = ""

    def __attrs_post_init__(self) -> None:
        for name, low, high in (("hertz", 1e6, 1e11), ("cycles", 1, 1e9), ("worst", 1, 1e4)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise SpecError(f"{name}={value!r}: must be from {low:g} to {high:g}")
        for name in ("lock_ns", "memory_ns"):
            if not 0 < getattr(self, name) < math.inf:
                raise SpecError(f"{name}={getattr(self, name)!r}: must be more than 0")

    @property
    def capacity(self) -> float:
        """Locks a second that hold the bus all the time."""
        return self.hertz / self.cycles


CPUS: Final = MappingProxyType(
    {model.name: HostCpu(cycles=model.cycles, worst=model.worst, about=model.source) for model in CPU_MODELS.values()}
)
"""Known models: those of `orchestra.policy.CPU_MODELS`, at 2 GHz."""


@attrs.frozen
class LimitSpec:
    """A limit as a scenario says it: by a rate, or by a part of the bus, which each CPU model makes a rate of its own.

    Parameters:
        rate: locks per second.
        bus_share: part of the bus' time, instead of `rate`: share * frequency / cycles per lock.
        burst, max_delay: as `Limit` has them.
    """

    rate: float | None = None
    bus_share: float | None = None
    burst: float | None = None
    max_delay: float | None = 10.0

    def __attrs_post_init__(self) -> None:
        if (self.rate is None) == (self.bus_share is None):
            raise SpecError("a limit has either rate or bus_share")
        if self.bus_share is not None and not 0 < self.bus_share <= 1:
            raise SpecError(f"bus_share={self.bus_share!r}: must be more than 0 and at most 1")
        self.on(HostCpu())  # what Limit says to its values

    def on(self, cpu: HostCpu) -> Limit:
        """The limit on a host with that CPU."""
        rate = self.rate if self.bus_share is None else self.bus_share * cpu.capacity
        assert rate is not None
        return Limit(rate=rate, burst=self.burst, max_delay=self.max_delay)
