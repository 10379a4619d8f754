"""What is desired of a VM: one record, which outlives its runs and is put into force at the start of each."""

from __future__ import annotations

import attrs

from ..model.spec import VmSpec

__all__ = ["Desired"]


@attrs.define
class Desired:
    """Of one VM. While a run is on, whoever changes it puts the change into force as well; between two runs changing it
    is enough. What a start can't put into force, as the host refuses it, is logged and taken out: the record never says
    what is not so.

    Its limits are not here: buckets live as long as their VM (`Budget`, which has both what was set and who throttles).

    Attributes:
        paused: its vCPUs run no guest code.
        caps: the part of a CPU that each vCPU may use, by who asks (a policy's name; None: callers).
        isolated: its vCPUs run on the quarantine CPUs.
        log_dirty: the pages that it writes are logged; None: as its spec says.
        sample_every: one bus lock of so many is sampled; 0: none.
    """

    paused: bool = False
    caps: dict[str | None, float] = attrs.field(factory=dict)
    isolated: bool = False
    log_dirty: bool | None = None
    sample_every: int = 0

    @property
    def cap(self) -> float | None:
        """The tightest; None: none."""
        return min(self.caps.values(), default=None)

    def caps_with(self, by: str | None, share: float | None) -> dict[str | None, float]:
        """What `caps` are once `by` asks for that."""
        caps = {name: cap for name, cap in self.caps.items() if name != by}
        return caps if share is None else {**caps, by: share}

    def spec(self, spec: VmSpec) -> VmSpec:
        """What the next run is made from."""
        if self.log_dirty is None:
            return spec
        regions = [attrs.evolve(region, log_dirty=False) for region in spec.regions]
        return attrs.evolve(spec, log_dirty=self.log_dirty, regions=regions)

    def logs_dirty(self, spec: VmSpec) -> bool:
        """Some of the next run's memory will be logged."""
        spec = self.spec(spec)
        return spec.log_dirty or any(region.log_dirty for region in spec.regions)
