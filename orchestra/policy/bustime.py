"""A budget as a part of the bus's time: an operator says "5 % of the bus", and not a number of locks a second."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from ..model.actions import Throttle, Unthrottle
from ..model.errors import SpecError
from ..model.spec import Limit, Meter, Tenant
from .cpus import CPU_MODELS, CpuModel
from .facts import Facts
from .rates import FASTEST, LEAST_BURST
from .share import WeightedShare
from .static import StaticLimits
from .validation import within

__all__ = ["CPU_MODELS", "BusTime", "CpuModel"]


@attrs.define(eq=False, slots=False)
class BusTime:
    """Hold the host to a part of its memory bus's time and tenants to parts of their own, and share the budget fairly.

    For a part *B* of the time, a bus of *f* Hz, *c* cycles for each lock and a damage of *d*, the host may do
    ``B * f / (c * d)`` locks per second (`limit`).

    Parameters:
        share: the part of the bus that all guests together may lock, more than 0 and at most 1: 0.05 for 5 %.
        frequency: the frequency of the bus, in Hz. Default: 2 GHz, as in the example of the kernel's documentation. If
            the host is faster than this, its guests get less than `share`, which is the safe side.
        model: the model of the host's CPU: a name in `CPU_MODELS`, or a `CpuModel` of your own.
        tenants: the most that a tenant may have, as a part of the bus, by the tenant's name or a pattern.
        fair: share the budget among tenants and VMs by weight, as `WeightedShare` does. If it is False, the host's
            bucket serves the vCPUs in the order of their locks.
        burst: seconds of the budget that may come at once after a rest.
        max_delay: as of `Limit`, in seconds.
        interval: seconds between two ticks.
        name: the policy's name in the journal.

    Raises:
        SpecError: a parameter is out of its range, or the budget comes to less than a lock in 1000 s.
    """

    share: float
    frequency: float = attrs.field(default=2e9, kw_only=True)
    _model: str | CpuModel = attrs.field(default="default", kw_only=True)
    _tenants: Mapping[str, float] | None = attrs.field(default=None, kw_only=True)
    _fair: bool = attrs.field(default=True, kw_only=True)
    _burst: float = attrs.field(default=0.05, kw_only=True)
    _max_delay: float | None = attrs.field(default=1.0, kw_only=True)
    _interval: float = attrs.field(default=0.1, kw_only=True)
    name: str = attrs.field(default="bus-time", kw_only=True)

    def __attrs_post_init__(self) -> None:
        within("share", self.share, 1e-9, 1, "of the bus, such as 0.05 for 5 %")
        within("frequency", self.frequency, 1e6, 1e11, "Hz")
        within("burst", self._burst, 0, 3600, "seconds")
        self.model = _checked(self._model)
        self.limit = self._limit("share", self.share)
        self.tenants = {
            pattern: self._limit(f"tenants[{pattern!r}]", within(f"tenants[{pattern!r}]", part, 1e-9, 1, "of the bus"))
            for pattern, part in (self._tenants or {}).items()
        }
        self._static = StaticLimits(tenants=self.tenants, host=self.limit)
        self._sharing = WeightedShare(self.limit, interval=self._interval) if self._fair else None

    def _limit(self, field: str, share: float) -> Limit:
        rate = share * self.frequency / (self.model.cycles * self.model.damage)
        if not 1e-3 <= rate <= 1e9:
            raise SpecError(f"{field}={share!r}: comes to {rate:g} locks/s; must come to 0.001 to 1e9")
        burst = min(LEAST_BURST + rate * self._burst, FASTEST)
        return Limit(rate=rate, burst=burst, max_delay=self._max_delay)

    @property
    def meter(self) -> Meter:
        return Meter.BUS_LOCKS

    @property
    def interval(self) -> float | None:
        return None if self._sharing is None else self._sharing.interval

    def decide(self, facts: Facts) -> list[Throttle | Unthrottle]:
        actions: list[Throttle | Unthrottle] = [self._explained(action) for action in self._static.decide(facts)]
        if self._sharing is None:
            return actions
        # The sharing must know the tenants' limits: else it would set aside for a tenant what that tenant can't have.
        tenants = (
            {name: self._capped(tenant) for name, tenant in facts.tenants.items()} if self.tenants else facts.tenants
        )
        return actions + self._sharing.decide(attrs.evolve(facts, tenants=tenants))

    def _capped(self, tenant: Tenant) -> Tenant:
        cap = self._static.tenant_limit(tenant.name)
        if cap is None or (tenant.limit is not None and tenant.limit.rate <= cap.rate):
            return tenant
        return attrs.evolve(tenant, limit=cap)

    def _explained(self, action: Throttle) -> Throttle:
        part = action.limit.rate / self.limit.rate * self.share
        model = self.model
        evidence = {
            **action.evidence,
            "share": part,
            "frequency": self.frequency,
            "cycles": model.cycles,
            "damage": model.damage,
            "model": model.name,
            "source": model.source,
        }
        whose = "the host" if action.tenant is None else f"tenant {action.tenant}"
        reason = (
            f"{100 * part:.4g} % of the bus for {whose}: {action.limit.rate:.6g} locks/s "
            f"at {self.frequency / 1e9:g} GHz, {model.cycles * model.damage:g} cycles each"
        )
        return attrs.evolve(action, evidence=evidence, reason=reason)


def _checked(model: str | CpuModel) -> CpuModel:
    if isinstance(model, CpuModel):
        return model
    if model not in CPU_MODELS:
        raise SpecError(f"model={model!r}: must be a CpuModel or one of {', '.join(CPU_MODELS)}")
    return CPU_MODELS[model]
