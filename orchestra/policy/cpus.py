"""What a bus lock costs, and what it does to everybody else, by CPU model: for budgets and for simulations.

The cycles are the kernel's example for all models: nobody has published them by model. The damage is what was measured
beside a core that does nothing but split locks, read as a factor; an inference, and coarse. docs/simulate.md has more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from .validation import within

__all__ = ["CPU_MODELS", "CpuModel"]

KERNEL: Final = "Linux kernel, Documentation/arch/x86/buslock.rst"
LAM: Final = "C. Lam, Investigating Split Locks on x86-64, chipsandcheese.com, April 2026"


@attrs.frozen
class CpuModel:
    """What a bus lock costs on one model of CPU.

    Attributes:
        name: as in `CPU_MODELS`.
        cycles: that one lock holds the bus.
        damage: how much worse than by those cycles alone the others fare: in a budget (`BusTime`) a lock is counted as
            so many. It is no property of the lock: two models with the same latency can differ by ten in what the
            neighbours feel.
        source: where the figures are from.
        worst: how many times longer an access of the affected kind takes others while the bus is held all the time
            (1: no effect): what a simulation makes of the same measurement.
    """

    name: str
    cycles: float = 7000.0
    damage: float = 1.0
    source: str = KERNEL
    worst: float = 2.0

    def __attrs_post_init__(self) -> None:
        within("cycles", self.cycles, 1, 1e9, "cycles")
        within("damage", self.damage, 0.01, 1e4, "times")
        within("worst", self.worst, 1, 1e4, "times")


CPU_MODELS: Final[Mapping[str, CpuModel]] = {
    model.name: model
    for model in (
        CpuModel("default", source=f"{KERNEL}: its example reckons with 7000 cycles; 'over 1000' is the least"),
        CpuModel("zen-2", damage=10.0, worst=10.0, source=f"{LAM}: memory past L1D about 10 times worse"),
        CpuModel("zen-5", damage=10.0, worst=10.0, source=f"{LAM}: memory past L1D about 10 times worse"),
        CpuModel("arrow-lake", damage=2.0, worst=2.0, source=f"{LAM}: half the bandwidth past L2"),
        # Measured on whole applications. Budgets go by the worst of them, 1 / (1 - 0.34). Simulations by the middle
        # of 16 to 34 %: 25 % slower is 1.33 times as long, and so is 1 + 0.3 * (2.11 - 1) for the reference victim,
        # which spends 0.3 of its time on such accesses.
        CpuModel("skylake", damage=1.5, worst=2.11, source=f"{LAM}: real applications -16 to -34 %"),
        # Taken as 5 % for the reference victim.
        CpuModel("alder-lake", damage=1.0, worst=1.17, source=f"{LAM}: mild"),
    )
}
"""By name."""
