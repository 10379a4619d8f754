"""The figures of a simulation: what each VM got, which VMs suffered, and how soon and how rightly the policies acted.

Who is *guilty* is worked out from what guests want, whatever the policies think: over a window of a second, a VM is
guilty when the VMs of its host together want more locks than the scenario's budget, and it wants more than its weighted
max-min share of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import attrs

from ..model.actions import CapCpu, Evict, Isolate, Kill, Pause, SetMemory, Stop, Throttle, Warn
from .arrays import Bools, Floats, Ints, np
from .enforcement import SimulatedEnforcement
from .engines import ActionRecord
from .fairness import fair_shares, jain
from .layout import Layout

__all__ = ["BINS", "EDGES", "Metrics", "Seen", "quantile"]

BINS: Final = 240
"""Points of a plot over time, at most."""

WINDOW: Final = 1.0
"""Seconds over which guilt and recovery are judged (or a tick, if that is longer)."""

MARGIN: Final = 1.1
"""Above its share, or above the budget, by less than this is no matter: bursts are a part of every limit."""

STEPS: Final = 400
EDGES: Final[list[float]] = [math.exp(i * math.log(100.0) / STEPS) for i in range(STEPS)]
"""Lower edges of the histogram of slow-downs, 1 to 100 times, 1.2 % apart."""

KEPT: Final = 1000
"""Actions that are kept one by one."""


def quantile(histogram: Floats, part: float) -> float:
    """The slow-down that `part` of all victims' time is not above (to 1.2 %)."""
    total = histogram.sum()
    if not total:
        return 1.0
    at = int(np.searchsorted(np.cumsum(histogram), part * total * (1 - 1e-12)))
    return 1.0 if at == 0 else EDGES[min(at, STEPS - 1)]


@attrs.frozen(eq=False)
class Seen:
    """What VMs did in a span of time: columns, with an entry for each of `vms`.

    Attributes:
        want, done: locks that they wanted to make, and made.
        waited: seconds for which their vCPUs waited for limits.
        held: whether anything held them.
    """

    start: float
    end: float
    vms: Ints
    want: Floats
    done: Floats
    waited: Floats
    held: Bools

    @property
    def seconds(self) -> float:
        return self.end - self.start


@attrs.define(eq=False)
class _Window:
    """Sums since the window began."""

    want: Floats
    done: Floats
    waited: Floats
    held: Bools
    seen: list[Ints] = attrs.field(factory=list)
    start: float = 0.0


class Metrics:
    """Counts along as a world goes on."""

    def __init__(self, layout: Layout, enforcement: SimulatedEnforcement) -> None:
        scenario = layout.scenario
        self.layout, self.enforcement = layout, enforcement
        groups, size, hosts = len(scenario.vms), layout.size, layout.hosts
        # A bin is some windows long, or figures of the one and of the other would beat against each other.
        tick, total = scenario.tick, scenario.ticks * scenario.tick
        self._length = tick * max(1, math.ceil(WINDOW / tick - 1e-9))
        windows = math.ceil(total / self._length - 1e-9)
        self._per_bin = self._length * math.ceil(windows / BINS)
        self.bins = math.ceil(total / self._per_bin - 1e-9)
        self._memory = scenario.budget.memory
        self._window = _Window(np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size, np.bool_))
        self._victims = float(layout.victims.sum())
        # By bin.
        self.seconds = np.zeros(self.bins)
        self.wanted, self.done, self.waited = (np.zeros((self.bins, groups)) for _ in range(3))
        self.bus_mean, self.bus_worst, self.over_budget = (np.zeros(self.bins) for _ in range(3))
        self.slow_sum = np.zeros(self.bins)
        self.slow = np.zeros((self.bins, STEPS))
        self.jain_sum, self.jain_count = np.zeros(self.bins), np.zeros(self.bins)
        self.actions = np.zeros(self.bins)
        self.slow_most = 1.0
        # By VM.
        self.fair, self.got = np.zeros(size), np.zeros(size)
        self.began = np.full(size, np.nan)
        self.last_guilty = np.full(size, -np.inf)
        self._detected = np.zeros(size, np.bool_)
        self._first = np.full(size, np.inf)
        self._wronged = np.zeros(size, np.bool_)
        self._culprit = np.zeros(size, np.bool_)
        # Of hosts.
        self._over_since = np.full(hosts, np.nan)
        # Findings.
        self.episodes = 0
        self.detect: list[float] = []
        self.recover: list[float] = []
        self.release: list[float] = []
        self.wrong_seconds = self.wrong_waited = self.guilty_waited = 0.0
        self.wrong_actions = 0
        self.kinds: Counter[str] = Counter()
        self.failed = self.refused = 0
        self.deeds: list[ActionRecord] = []

    def _bin(self, time: float) -> int:
        return min(self.bins - 1, max(0, int(time / self._per_bin + 1e-9)))

    # ---- each tick --------------------------------------------------------------------------------------------------

    def add(self, seen: Seen, share: Floats) -> None:
        """A tick. `share`: the part of each host's bus that locks took."""
        layout, at, seconds = self.layout, self._bin(seen.start), seen.seconds
        vms, wants, done, waited, held = seen.vms, seen.want, seen.done, seen.waited, seen.held
        groups = len(layout.scenario.vms)
        group = layout.group[vms]
        self.seconds[at] += seconds
        self.wanted[at] += np.bincount(group, wants, groups)
        self.done[at] += np.bincount(group, done, groups)
        self.waited[at] += np.bincount(group, waited, groups)
        busy = np.flatnonzero(share)
        self.bus_mean[at] += share.sum() / layout.hosts * seconds
        self.bus_worst[at] = max(self.bus_worst[at], share.max())
        self._suffer(at, seconds, busy, share)

        window = self._window
        new = vms[held]
        self._first[new] = np.minimum(self._first[new], seen.start)
        if layout.scenario.tick >= WINDOW:
            self._judge(seen)
            return
        window.want[vms] += wants
        window.done[vms] += done
        window.waited[vms] += waited
        window.held[vms] |= held
        window.seen.append(vms)
        if seen.end - window.start >= self._length - 1e-9:
            self._close(seen.end)

    def _close(self, end: float) -> None:
        window = self._window
        vms = np.unique(np.concatenate(window.seen))
        want, done, waited, held = window.want[vms], window.done[vms], window.waited[vms], window.held[vms]
        self._judge(Seen(window.start, end, vms, want, done, waited, held))
        for sums in (window.want, window.done, window.waited):
            sums[vms] = 0.0
        window.held[vms] = False
        window.seen, window.start = [], end

    def _suffer(self, at: int, seconds: float, busy: Ints, share: Floats) -> None:
        layout = self.layout
        affected = 0.0
        if len(busy):
            # Amdahl: the part of a victim's time that depends on the bus takes longer, the rest does not.
            slower = 1 + np.outer((layout.worst[busy] - 1) * share[busy], layout.sensitivity)
            victims = layout.victims[busy]
            affected = float(victims.sum())
            self.slow_sum[at] += float((slower * victims).sum()) * seconds
            place = np.minimum((np.log(slower) * (STEPS / math.log(100.0))).astype(np.int64), STEPS - 1)
            self.slow[at] += np.bincount(place.ravel(), victims.ravel(), STEPS) * seconds
            if affected:
                self.slow_most = max(self.slow_most, float(np.where(victims > 0, slower, 1.0).max()))
        self.slow_sum[at] += (self._victims - affected) * seconds
        self.slow[at, 0] += (self._victims - affected) * seconds

    # ---- each window ------------------------------------------------------------------------------------------------

    def _judge(self, seen: Seen) -> None:
        layout, seconds, at, start, end = self.layout, seen.seconds, self._bin(seen.start), seen.start, seen.end
        vms, want, done, waited, held = seen.vms, seen.want, seen.done, seen.waited, seen.held
        host = layout.host[vms]
        budget = layout.budget * seconds
        contended = np.bincount(host, want, layout.hosts) > budget
        over = np.bincount(host, done, layout.hosts) > MARGIN * budget
        self._recoveries(start, end, over)
        self.over_budget[at] += np.count_nonzero(over) * seconds

        some = np.flatnonzero(contended[host])
        guilty = np.zeros(len(vms), np.bool_)
        if len(some):
            fair = fair_shares(host[some], want[some], layout.weight[vms[some]], budget)
            guilty[some] = want[some] > MARGIN * fair
            self.fair[vms[some]] += fair
            self.got[vms[some]] += done[some]
            if len(some) > 1:
                self.jain_sum[at] += jain(done[some] / np.maximum(fair, 1e-300))
                self.jain_count[at] += 1
        culprits = vms[guilty]
        if len(culprits):
            new = culprits[~(self.last_guilty[culprits] >= start - self._memory)]
            self.began[new], self._detected[new] = start, False
            self.episodes += len(new)
            self.last_guilty[culprits] = end
            self._culprit[culprits] = True
            found = culprits[~self._detected[culprits] & np.isfinite(self._first[culprits])]
            self.detect += np.maximum(0.0, self._first[found] - self.began[found]).tolist()
            self._detected[found] = True
            self.guilty_waited += float(waited[guilty].sum())
        innocent = ~guilty & (self.last_guilty[vms] < start - self._memory)
        self.wrong_waited += float(waited[innocent].sum())
        wronged = vms[innocent & held]
        self.wrong_seconds += len(wronged) * seconds
        self._wronged[wronged] = True
        self._first[vms] = np.inf

    def _recoveries(self, start: float, end: float, over: Bools) -> None:
        since = self._over_since
        begun = ~np.isnan(since)
        ended = begun & ~over
        if ended.any():
            self.recover += (start - since[ended]).tolist()
            since[ended] = np.nan
        since[over & ~begun] = start

    # ---- what policies did ------------------------------------------------------------------------------------------

    def did(self, deeds: Sequence[ActionRecord]) -> None:
        for deed in deeds:
            if len(self.deeds) < KEPT:
                self.deeds.append(deed)
            if deed.refused:
                self.refused += 1
                continue
            self.actions[self._bin(deed.time - 1e-6)] += 1
            self.kinds[type(deed.action).__name__] += 1
            self.failed += deed.error is not None
            name = deed.action.vm
            vm = None if name is None else self.layout.number(name, deed.host)
            if vm is None or deed.error is not None:
                continue
            action = deed.action
            restrains = isinstance(action, Throttle | Warn | Isolate | Pause | Evict | Stop | Kill) or (
                isinstance(action, CapCpu) and action.share is not None
            )
            if restrains:
                self._restrained(vm, deed.time, harmless=isinstance(action, Warn))
            elif (
                not isinstance(action, SetMemory)
                and not self.enforcement.held[vm]
                and np.isfinite(self.last_guilty[vm])
            ):
                self.release.append(max(0.0, deed.time - float(self.last_guilty[vm])))

    def _restrained(self, vm: int, time: float, harmless: bool) -> None:
        recent = self.last_guilty[vm] >= time - self._memory - WINDOW
        if recent and not self._detected[vm]:
            self._detected[vm] = True
            self.detect.append(max(0.0, time - float(self.began[vm])))
        elif not recent:
            self._first[vm] = min(float(self._first[vm]), time)
            # Within a window that is not judged yet, it may turn out to have been guilty.
            self.wrong_actions += not harmless and not self._window.want[vm] > self.layout.budget[
                self.layout.host[vm]
            ] * (time - self._window.start)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def finish(self, end: float) -> None:
        """Judge what is left over; what is over budget still counts as long as it was."""
        if self._window.seen:
            self._close(end)
        left = ~np.isnan(self._over_since)
        self.unrecovered = int(np.count_nonzero(left))
        self.recover += (end - self._over_since[left]).tolist()
        held = self.enforcement.held & ~self.enforcement.gone
        self.unreleased = int(np.count_nonzero(held & (self.last_guilty < end - self._memory) & self._culprit))

    def facts(self) -> dict[str, Any]:
        """Figures for the report."""
        layout, seconds = self.layout, float(self.seconds.sum())
        fair = self.fair >= 1
        everything = self.slow.sum(axis=0)
        victim_seconds = max(self._victims * seconds, 1e-300)
        return {
            "bus_share": {
                "mean": float(self.bus_mean.sum()) / seconds,
                "worst": float(self.bus_worst.max()),
                "over_budget_host_seconds": float(self.over_budget.sum()),
            },
            "slowdown": {
                "mean": float(self.slow_sum.sum()) / victim_seconds if self._victims else None,
                "p50": quantile(everything, 0.50),
                "p90": quantile(everything, 0.90),
                "p99": quantile(everything, 0.99),
                "p99.9": quantile(everything, 0.999),
                "worst": self.slow_most,
            },
            "jain": jain(self.got[fair] / self.fair[fair]) if fair.any() else None,
            "guilty": {
                "vms": int(np.count_nonzero(self._culprit)),
                "episodes": self.episodes,
                "throttled_seconds": self.guilty_waited,
                "locks_per_fair_lock": _ratio(self.got[self._culprit], self.fair[self._culprit]),
            },
            "time_to_detect": {**_spread(self.detect), "missed": self.episodes - len(self.detect)},
            "time_to_recover": {**_spread(self.recover), "unfinished": self.unrecovered},
            "time_to_release": {**_spread(self.release), "unfinished": self.unreleased},
            "false_positives": {
                "vms": int(np.count_nonzero(self._wronged & ~self._culprit)),
                "vm_seconds": self.wrong_seconds,
                "throttled_seconds": self.wrong_waited,
                "actions": self.wrong_actions,
            },
            "actions": {
                "total": sum(self.kinds.values()),
                "failed": self.failed,
                "refused": self.refused,
                "kinds": dict(sorted(self.kinds.items())),
            },
            "groups": [
                {
                    "name": vms.name,
                    "vms": vms.count,
                    "wanted": float(self.wanted[:, i].sum()),
                    "done": float(self.done[:, i].sum()),
                    "throttled_seconds": float(self.waited[:, i].sum()),
                    "throttled_share": float(self.waited[:, i].sum()) / (vms.count * vms.vcpus * seconds),
                }
                for i, vms in enumerate(layout.scenario.vms)
            ],
        }

    def series(self) -> dict[str, Any]:
        """What is drawn over time: a list for each, with a value for each bin."""
        seconds = np.maximum(self.seconds, 1e-300)
        victims = np.maximum(self._victims * seconds, 1e-300)
        judged = np.maximum(self.jain_count, 1)
        return {
            "time": ((np.arange(self.bins) + 0.5) * self._per_bin).tolist(),
            "wanted": (self.wanted / seconds[:, None]).T.tolist(),
            "done": (self.done / seconds[:, None]).T.tolist(),
            "waited": (self.waited / seconds[:, None]).T.tolist(),
            "bus_mean": (self.bus_mean / seconds).tolist(),
            "bus_worst": self.bus_worst.tolist(),
            "over_budget_hosts": (self.over_budget / seconds).tolist(),
            "slowdown_mean": (self.slow_sum / victims).tolist() if self._victims else [1.0] * self.bins,
            "slowdown_p99": [quantile(row, 0.99) for row in self.slow],
            "slowdown_p999": [quantile(row, 0.999) for row in self.slow],
            "jain": [
                float(total) if count else None
                for total, count in zip(self.jain_sum / judged, self.jain_count, strict=True)
            ],
            "actions": self.actions.tolist(),
        }


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    if not values:
        return {"count": 0, "mean": None, "p50": None, "p90": None, "worst": None}
    array = np.asarray(values)
    return {
        "count": len(values),
        "mean": float(array.mean()),
        "p50": float(np.quantile(array, 0.5)),
        "p90": float(np.quantile(array, 0.9)),
        "worst": float(array.max()),
    }


def _ratio(some: Floats, of: Floats) -> float | None:
    total = float(of.sum())
    return float(some.sum()) / total if total else None
