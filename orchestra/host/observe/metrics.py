"""All signals of the host as a whole, read together, and the facts about one interval."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import attrs

from ...model.errors import ResourceLimit
from ...policy import HostFacts
from .pressure import RESOURCES, Pressure, Trigger, open_triggers, path_of
from .probe import Probe
from .resctrl import SIGNALS as CACHE, CacheCounters, Resctrl, home_group

__all__ = ["HostReading", "HostSignals"]

PROBED: Final = ("lock_ns", "memory_ns")
SLOWDOWNS: Final = ("lock_slowdown", "memory_slowdown")
OFF: Final = "the host probe is off: open_fleet(probe=True) starts it"


@attrs.frozen
class HostReading:
    """The host's counters at one moment. Two readings make facts.

    Attributes:
        time: nanoseconds on CLOCK_MONOTONIC, which is what these counters run on, whatever the fleet's clock is.
        pressure: microseconds of stall so far, by signal.
        samples: of the probe, so far.
        cache: counters of the vCPU threads' monitoring group.
    """

    time: int = 0
    pressure: Mapping[str, int] = attrs.field(factory=dict)
    samples: int = 0
    cache: CacheCounters = attrs.field(factory=CacheCounters)


class HostSignals:
    """The signals of this host. `close` it at the end.

    Parameters:
        probe: run the host probe; None: only from when a signal needs it (`listen`).
        cgroup: a version-2 cgroup whose pressure counts as the host's.
        isolated: the resctrl control group that threads of isolated VMs are moved to.
        silent: the reason why the host's signals do not concern the fleet: then all are absent.
    """

    def __init__(
        self,
        *,
        probe: bool | None = False,
        cgroup: Path | None = None,
        isolated: Path | None = None,
        silent: str | None = None,
    ) -> None:
        self._silent = silent
        self._paths = {} if silent else {signal: path_of(signal, cgroup) for signal in RESOURCES}
        self._probe: Probe | None = None
        self._absent: dict[str, str] = dict.fromkeys((*RESOURCES, *PROBED, *CACHE), silent) if silent else {}
        self._pressure = Pressure(self._paths)
        self._resctrl = None if silent else Resctrl(home_group(), isolated=isolated)
        self._may_probe = probe is None and not silent
        if not silent:
            self._absent |= dict.fromkeys(PROBED, OFF)
            if probe:
                self._start_probe()

    def listen(self, signals: Iterable[str]) -> None:
        """Switch on what is needed for these signals, of `HostFacts` or of `orchestra.policy.harm`."""
        if self._may_probe and not {*PROBED, *SLOWDOWNS}.isdisjoint(signals):
            self._start_probe()

    def _start_probe(self) -> None:
        self._may_probe = False
        try:
            self._probe = Probe()
        except ResourceLimit as error:
            self._absent |= dict.fromkeys(PROBED, str(error))
        else:
            for signal in PROBED:
                del self._absent[signal]

    @property
    def probed(self) -> bool:
        """The host probe runs."""
        return self._probe is not None

    @property
    def absent(self) -> Mapping[str, str]:
        """Why a signal is missing here, by its name."""
        return self._absent | self._pressure.absent | (self._resctrl.absent if self._resctrl is not None else {})

    def add_thread(self, tid: int, isolated: bool = False) -> None:
        """Count a vCPU's thread, which is new or has changed its control group, in the cache counters."""
        if self._resctrl is not None:
            self._resctrl.add(tid, isolated)

    def read(self) -> HostReading:
        if self._silent:
            return HostReading()
        cache = self._resctrl.read() if self._resctrl is not None and self._resctrl.here else CacheCounters()
        samples = self._probe.take() if self._probe is not None else 0
        return HostReading(time.monotonic_ns(), self._pressure.read(), samples, cache)

    def facts(self, since: HostReading, until: HostReading, absent: Mapping[str, str]) -> HostFacts:
        """What the time between two readings was like. `absent`: other signals' reasons, to be named as well."""
        if self._silent:
            return HostFacts(absent={**self.absent, **absent})
        passed = max(1, until.time - since.time)
        pressure = {
            # Clipped to a share: clock and counters are not read at one instant.
            signal: min(1.0, max(0.0, (total - since.pressure[signal]) * 1000 / passed))
            for signal, total in until.pressure.items()
            if signal in since.pressure
        }
        probed = None if self._probe is None else self._probe.medians(since.samples, until.samples)
        before, after = since.cache.traffic, until.cache.traffic
        return HostFacts(
            # Asked each time: a cpuset may change while the fleet runs.
            cpus=len(os.sched_getaffinity(0)),
            lock_ns=None if probed is None else probed[0],
            memory_ns=None if probed is None else probed[1],
            llc_bytes=until.cache.llc_bytes,
            memory_bandwidth=None if before is None or after is None else max(0, after - before) * 1e9 / passed,
            absent={**self.absent, **absent},
            **pressure,
        )

    def triggers(self, signals: Iterable[str]) -> list[Trigger]:
        """The triggers for these pressures, as many as the host allows; `absent` has the reason for the others."""
        triggers, problem = open_triggers({name: self._paths[name] for name in signals if name in self._paths})
        if problem is not None:
            self._absent["pressure_triggers"] = problem
        return triggers

    def close(self) -> None:
        self._pressure.close()
        if self._probe is not None:
            self._probe.close()
        if self._resctrl is not None:
            self._resctrl.close()
