"""The cores of one run's vCPUs: which exits they report, and what they counted."""

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
    """The cores of one run. Once the run has ended, the cores are freed: their last figures are kept, and no method
    touches a core any more.

    Parameters:
        cores: a list that the instance fills while it builds the machine.
        samples: the bus locks that were sampled in all runs of the VM.
        detection: how the VM's bus locks are reported.
    """

    def __init__(
        self,
        context: InstanceContext,
        life: Lifecycle,
        cores: Sequence[VcpuCore],
        samples: Samples,
        detection: Detection | None,
    ) -> None:
        self._context = context
        self._life = life
        self._cores = cores
        self._samples = samples
        self._detection = detection
        self._final: list[Counters] = []

    def counters(self) -> list[Counters]:
        if self._life.has_ended:
            return self._final
        now = self._context.backend.now()
        return [core.counters(now) for core in self._cores]

    def look(self, index: int, now: int) -> tuple[dict[int, int], int, list[int], int]:
        """As `VcpuCore.look`."""
        return ({}, 0, NOT_HELD, 0) if self._life.has_ended else self._cores[index].look(now)

    def subscribe(self, mask: int) -> None:
        """Make the cores put exits of these reasons into their rings."""
        if not self._life.has_ended:
            for core in self._cores:
                core.subscribe(mask)

    def sample(self, every: int) -> None:
        """Sample one bus lock of each `every`; 0: none."""
        if self._context.bus_locks and not self._life.has_ended:
            for core in self._cores:
                core.sample(every)

    def gather(self) -> Samples:
        """Take the samples out of the cores, and return those of all runs of the VM."""
        if not self._life.has_ended:
            for core in self._cores:
                sampled, lost, _ = core.profile()
                self._samples.add(sampled, lost, self._detection)
        return self._samples

    def profile_rows(self) -> list[Row]:
        """The samples since the last call, for the `rows` of `Journal.profile`. Empty: none are new.

        The fleet calls this in each interval of its journal, and once more when the VM has ended.
        """
        return self.gather().rows()

    def finish(self, name: str, problems: list[str]) -> None:
        """Keep the last figures and deliver the last records: after the last runner has gone, before `Phase.ENDED`."""
        final = [attrs.evolve(ZERO) for _ in self._cores]
        with contained(f"vm {name}: counters", problems):
            final = self.counters()
        with contained(f"vm {name}: samples", problems):
            self.gather()
        with contained(f"vm {name}: last exits", problems):
            self._context.retire(self._cores)
        self._final = final

    def close(self, name: str, problems: list[str]) -> None:
        """Free the cores. On the fleet's thread only: the drain task there looks for cores that have records."""
        for core in self._cores:
            with contained(f"vm {name}: core", problems):
                core.close()
