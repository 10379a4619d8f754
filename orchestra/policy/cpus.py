"""What a bus lock costs, and how much it slows all others, by CPU model: for budgets and for simulations.

The cycles are those of the kernel's example, for all models: no figures by model are published. The damage is inferred
from measurements beside a core that does nothing but split locks. It is a coarse factor. docs/simulate.md has more.
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
        name: the name in `CPU_MODELS`.
        cycles: CPU cycles for which one lock holds the bus.
        damage: how many times worse the others fare than by those cycles alone. A budget (`BusTime`) counts one lock as
            so many. The damage is no property of the lock: two models with the same latency can differ by a factor of
            ten in what the neighbours feel.
        source: where the figures come from.
        worst: how many times longer an access of the affected kind takes while others hold the bus all the time (1: no
            effect). A simulation uses this figure, which comes from the same measurement.
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
        # Measured on whole applications. Budgets use the worst of them, 1 / (1 - 0.34). Simulations use the middle of
        # 16 to 34 %: 25 % slower is 1.33 times as long, and so is 1 + 0.3 * (2.11 - 1) for the reference victim, which
        # spends 0.3 of its time on such accesses.
        CpuModel("skylake", damage=1.5, worst=2.11, source=f"{LAM}: real applications -16 to -34 %"),
        # "Mild" is taken as 5 % for the reference victim: 1 + 0.3 * (1.17 - 1) = 1.05.
        CpuModel("alder-lake", damage=1.0, worst=1.17, source=f"{LAM}: mild"),
    )
}
"""The known models, by name. "default" is for a host whose model is not among them."""
