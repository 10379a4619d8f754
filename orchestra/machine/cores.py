"""The cores of one run's vCPUs: what they are to tell, and what they counted."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from ..backend import Detection
from ..native.core import NOT_HELD, Counters, VcpuCore
from ..profile import Row, Samples
from .contain import contained
from .context import InstanceContext
from .lifecycle import Lifecycle
from .statistics import ZERO

__all__ = ["Cores"]


class Cores:
    """Of one run. Once it has ended, the cores are gone: their last figures are kept, and they are told nothing more.

    Parameters:
        cores: filled while the machine is built.
        samples: of all runs of the VM.
        detection: how its bus locks are reported.
    """

    def __init__(
        self,
        house: InstanceContext,
        life: Lifecycle,
        cores: Sequence[VcpuCore],
        samples: Samples,
        detection: Detection | None,
    ) -> None:
        self._house = house
        self._life = life
        self._cores = cores
        self._samples = samples
        self._detection = detection
        self._final: list[Counters] = []

    def counters(self) -> list[Counters]:
        if self._life.has_ended:
            return self._final
        now = self._house.backend.now()
        return [core.counters(now) for core in self._cores]

    def look(self, index: int, now: int) -> tuple[dict[int, int], int, list[int], int]:
        """As `VcpuCore.look`."""
        return ({}, 0, NOT_HELD, 0) if self._life.has_ended else self._cores[index].look(now)

    def tell(self, mask: int) -> None:
        """Have exits of these kinds told to subscribers."""
        if not self._life.has_ended:
            for core in self._cores:
                core.tell(mask)

    def sample(self, every: int) -> None:
        """Look at one bus lock of so many more closely; 0: at none."""
        if self._house.bus_locks and not self._life.has_ended:
            for core in self._cores:
                core.sample(every)

    def gather(self) -> Samples:
        """What was sampled so far, of all runs of the VM."""
        if not self._life.has_ended:
            for core in self._cores:
                sampled, lost, _ = core.profile()
                self._samples.add(sampled, lost, self._detection)
        return self._samples

    def profile_rows(self) -> list[Row]:
        """What was sampled since this was asked last, for `Journal.profile(now, vm.name, vm.launch, rows)`.

        The fleet asks at each interval of its journal, and once more when the VM has ended. Empty if nothing is new.
        """
        return self.gather().rows()

    def finish(self, name: str, problems: list[str]) -> None:
        """No runner is left: keep the last figures and deliver the last records, before the run has ended."""
        final = [attrs.evolve(ZERO) for _ in self._cores]
        with contained(f"vm {name}: counters", problems):
            final = self.counters()
        with contained(f"vm {name}: samples", problems):
            self.gather()
        with contained(f"vm {name}: last exits", problems):
            self._house.retire(self._cores)
        self._final = final

    def close(self, name: str, problems: list[str]) -> None:
        """Fleet's thread, as that looks for cores that have something to tell."""
        for core in self._cores:
            with contained(f"vm {name}: core", problems):
                core.close()
