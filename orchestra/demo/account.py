"""The results of the demo as plain data: for the table while it runs, and for the summary and the files at its end."""

from __future__ import annotations

from typing import Any, Final

import attrs

from ..model.actions import Applied, Outcome
from ..model.codec import encode, encode_parts
from ..model.spec import Limit, Meter

__all__ = ["Act", "Result", "Row", "Sample", "Span", "VmSummary", "document"]


ENOUGH: Final = 1.0
"""Seconds from which an act that was cut short can be compared with others: four looks of the story."""


@attrs.frozen
class Act:
    number: int
    title: str
    text: str


@attrs.frozen
class Row:
    """One VM in one sample; rates per second over the last moments, `throttled_share` of its vCPUs' time.

    `gain` is how much more of its own work it does than in act 1 (0.5: half as much again); None where that is unknown.
    """

    name: str
    tenant: str
    noisy: bool
    state: str
    throttled: bool
    count: int
    rate: float
    work: int
    work_rate: float
    throttled_seconds: float
    throttled_share: float
    budget: float | None
    gain: float | None = None


@attrs.frozen
class Sample:
    """All VMs at one time, in seconds since they were let go; `gain` is that of the quiet VMs together."""

    time: float
    act: int
    rows: tuple[Row, ...]
    gain: float | None = None


@attrs.frozen
class Span:
    """One VM in one act: what it did in how many seconds, and the limit it had.

    `cut`: the act was cut short. `released`: waits that `Limit.max_delay` ended before their turn.
    """

    act: int
    seconds: float
    count: int
    work: int
    throttled_seconds: float
    limit: Limit | None
    cut: bool = False
    released: int = 0

    @property
    def rate(self) -> float:
        return self.count / self.seconds if self.seconds else 0.0

    @property
    def work_rate(self) -> float:
        return self.work / self.seconds if self.seconds else 0.0

    @property
    def held(self) -> bool:
        """Whether the VM stayed within its limit: at most burst + rate * t."""
        return self.limit is None or self.count <= self.limit.tokens + self.limit.rate * self.seconds


@attrs.frozen
class VmSummary:
    name: str
    tenant: str
    noisy: bool
    state: str
    outcome: Outcome | None
    count: int
    work: int
    throttled_seconds: float
    released: int
    spans: tuple[Span, ...]


@attrs.frozen
class Result:
    """The whole run.

    Attributes:
        complete: all acts were played to their end.
        began: when the VMs were let go, on the fleet's clock.
        backend, why: what executed the guests, and why it was picked.
        detection: how bus locks are reported here; None: they are not.
        ceiling: the host's limit at the end.
        cpus: how many of the host's CPUs the VMs shared; None: no matter.
        cpus_used: how many this program kept busy, in each act.
    """

    complete: bool
    meter: Meter
    backend: str
    why: str
    detection: str | None
    began: int
    seconds: float
    acts: tuple[Act, ...]
    samples: tuple[Sample, ...]
    actions: tuple[Applied, ...]
    ceiling: Limit | None
    vms: tuple[VmSummary, ...]
    cpus: int | None = None
    cpus_used: tuple[float, ...] = ()

    @property
    def noisy(self) -> tuple[VmSummary, ...]:
        return tuple(vm for vm in self.vms if vm.noisy)

    @property
    def quiet(self) -> tuple[VmSummary, ...]:
        return tuple(vm for vm in self.vms if not vm.noisy)

    @property
    def cut(self) -> Span | None:
        """A VM's part in the act that was cut short; None: every act that began was played to its end."""
        return next((span for vm in self.vms for span in vm.spans if span.cut), None)

    def compares(self, act: int) -> bool:
        """Whether that act was played to its end, or for long enough to be compared."""
        spans = [span for vm in self.vms for span in vm.spans if span.act == act]
        return bool(spans) and all(not span.cut or span.seconds >= ENOUGH for span in spans)

    def work_rate(self, act: int) -> float | None:
        """Work per second of all quiet VMs together in that act; None if it was not played, or there are none."""
        rates = [span.work_rate for vm in self.quiet for span in vm.spans if span.act == act]
        return sum(rates) if rates else None

    def relief_in(self, act: int) -> float | None:
        """By how much the quiet VMs' own work grew from act 1 to that one: 0.5 is half as much again; None: there is
        nothing to compare."""
        before, after = self.work_rate(1), self.work_rate(act)
        return after / before - 1 if self.compares(act) and before and after is not None else None

    @property
    def relief(self) -> float | None:
        """The same from act 1 to act 2, when the limits go on."""
        return self.relief_in(2)

    @property
    def taken(self) -> float:
        """The share of the CPUs' time that was not available in an act: other programs took it, or a quota.

        The quiet VMs alone would keep so many CPUs busy.
        """
        wanted = min(self.cpus or 0, len(self.quiet))
        used = [used for act, used in enumerate(self.cpus_used, 1) if self.compares(act)]
        return max(1 - one / wanted for one in used) if wanted and used else 0.0

    def time(self, applied: Applied) -> float:
        """The time of an action, in seconds since the VMs were let go."""
        return (applied.time - self.began) / 1e9


def document(result: Result) -> dict[str, Any]:
    """For JSON."""

    def action(applied: Applied) -> dict[str, Any]:
        kind, fields = (None, {}) if applied.action is None else encode_parts(applied.action, str)
        return {
            "time": result.time(applied),
            "action": kind,
            **fields,
            "policy": applied.policy,
            "error": applied.error,
        }

    def vm(summary: VmSummary) -> dict[str, Any]:
        fields: dict[str, Any] = encode(summary)
        fields["outcome"] = None if summary.outcome is None else str(summary.outcome)
        fields["acts"] = [
            {**one, "rate": span.rate, "work_rate": span.work_rate, "held": span.held}
            for one, span in zip(fields.pop("spans"), summary.spans, strict=True)
        ]
        return fields

    return {
        "program": "orchestra demo",
        "complete": result.complete,
        "backend": result.backend,
        "why": result.why,
        "bus_lock_detection": result.detection,
        "cpus": result.cpus,
        "cpus_used": result.cpus_used,
        "meter": str(result.meter),
        "seconds": result.seconds,
        "acts": encode(result.acts),
        "samples": encode(result.samples),
        "actions": [action(applied) for applied in result.actions],
        "summary": {
            "relief": result.relief,
            "ceiling": encode(result.ceiling),
            "vms": [vm(summary) for summary in result.vms],
        },
    }
