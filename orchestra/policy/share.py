"""Weighted max-min sharing of the host's budget: who asks for little gets it, the greedy share the rest by weight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from ..model.actions import Throttle, Unthrottle
from ..model.spec import Limit, Meter, as_meter, optional_limit
from .facts import Facts, count_of
from .maxmin import max_min
from .rates import paced
from .validation import within

__all__ = ["WeightedShare"]

WAITED: Final = 0.05
"""Share of a tick that one vCPU may wait for its turn without its VM being taken for greedy. Such a VM would do at most
1/(1 - WAITED) of what was seen, which the headroom covers."""

ROOM: Final = 0.98
"""A budget that is used for less than this held nobody back."""

PAROLE: Final = 60.0
"""Seconds of its fair share: the most that a VM is remembered to have had beyond it."""


@attrs.define(eq=False)
class _Vm:
    """What is remembered of a VM: only of those that were active during the last few ticks."""

    name: str
    launch: int
    tenant: str
    weight: float
    vcpus: int
    asked: deque[float]  # events per second, a tick each; inf: it waited, so it wants more than it got
    limit: Limit | None = None  # what we set
    lost: bool = False  # it ran faster than that allows
    rate: float = 0.0
    throttled: float = 0.0
    tick: int = 0  # in which it was in the facts last
    absent: float = 0.0  # seconds since then
    held: int = 0  # ticks in a row that something other than us held it back
    ceiling: float | None = None  # the rate at which it is held, once we are sure
    ahead: float = 0.0  # events that it did beyond its fair share and has not rested for yet
    demand: float = 0.0  # the most of what it asked for
    want: float = 0.0  # and the headroom: what is set aside for it


class WeightedShare:
    """Share the host's budget among tenants by weight and, inside each, among its VMs by weight (weighted max-min).

    At each tick it looks at what each VM asked for. A VM that hardly waited got all it wanted: that much and a headroom
    is set aside for it, and it needs no limit. A VM that waited is greedy: the greedy share what is left, each held to
    its share by a limit of its own. So nobody gets less than what it asks for or its weighted fair share, whichever is
    less, and what one does not use is lent to the others. A tenant's own limit caps what its VMs get together.

    A VM that comes back after a rest starts without a limit, under the host's alone, and is found at the next tick.
    That is as much as it can have beyond its fair share: it keeps its limit until it has rested for that, so coming and
    going gains nothing. A VM that something else holds back all the time (a limit of its own) is found after some
    ticks, and its idle share lent as well.

    Parameters:
        limit: the budget; None: the host's limit, as the facts tell it. Without either, only the tenants' limits are
            shared.
        interval: seconds between two ticks.
        meter: what is shared.
        headroom: how much more than it asked for is set aside for a VM that did not wait; from 0.06 up, as a part.
        tolerance: a limit is left alone while it is off by no more than this part of itself.
        memory: ticks for which what a VM asked for counts: the largest one does. It keeps a VM that comes and goes
            from moving everybody's limit, and is how long it takes to lend what an idle one leaves.

    Raises:
        SpecError: a parameter is out of its range.
    """

    def __init__(
        self,
        limit: Limit | None = None,
        *,
        interval: float = 0.1,
        meter: Meter | str = Meter.BUS_LOCKS,
        headroom: float = 0.1,
        tolerance: float = 0.02,
        memory: int = 3,
        name: str | None = None,
    ) -> None:
        self._limit = optional_limit("limit", limit)
        self._interval = within("interval", interval, 1e-4, 3600, "seconds")
        self._headroom = within("headroom", headroom, 0.06, 10, "of the demand")
        self._tolerance = within("tolerance", tolerance, 0, 0.5, "of the limit")
        self._memory = int(within("memory", memory, 1, 1000, "ticks"))
        self._meter = as_meter(meter)
        self._name = name or ("weighted-share" if self._meter is Meter.BUS_LOCKS else f"weighted-share-{self._meter}")
        self._vms: dict[str, _Vm] = {}
        self._tick = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def limit(self) -> Limit | None:
        """The budget that it shares; None: the host's limit."""
        return self._limit

    @property
    def meter(self) -> Meter:
        return self._meter

    @property
    def interval(self) -> float | None:
        return self._interval

    def decide(self, facts: Facts) -> list[Throttle | Unthrottle]:
        host = self._limit or getattr(facts, self._meter.field)
        budget = math.inf if host is None else host.rate
        for name, launch in facts.gone:
            if name in self._vms and self._vms[name].launch == launch:
                del self._vms[name]
        self._look(facts, budget)
        tenants: dict[str, list[_Vm]] = {}
        for vm in self._vms.values():
            tenants.setdefault(vm.tenant, []).append(vm)
        shares = self._shares(facts, budget, tenants)
        self._settle(facts, budget, tenants, shares)
        return [*self._idle(), *self._changes(facts, host, shares)]

    # ---- what each asked for --------------------------------------------------------------------------------------

    def _cap(self, facts: Facts, tenant: str) -> float:
        known = facts.tenants.get(tenant)
        limit = None if known is None else getattr(known, self._meter.field)
        return math.inf if limit is None else limit.rate

    def _look(self, facts: Facts, budget: float) -> None:
        """Runs for each active VM in each tick: it does no more than it has to."""
        self._tick += 1
        interval, meter, vms = facts.interval, self._meter, self._vms
        total = 0.0
        by_tenant: dict[str, float] = {}
        waited: list[_Vm] = []
        for told in facts.vms.values():
            count = count_of(told, meter)
            if count is None:
                continue
            rate = count / interval
            total += rate
            by_tenant[told.tenant] = by_tenant.get(told.tenant, 0.0) + rate
            vm = vms.get(told.name)
            if vm is None or vm.launch != told.launch:  # another of that name starts without limits
                vm = vms[told.name] = _Vm(
                    told.name, told.launch, told.tenant, told.weight, told.vcpus, deque(maxlen=self._memory)
                )
            vm.tick, vm.rate, vm.throttled = self._tick, rate, told.throttled
            if vm.limit is not None:
                vm.lost = rate > 1.5 * (vm.limit.rate + vm.limit.tokens / interval)
            if told.throttled > WAITED * interval:
                waited.append(vm)
            else:
                vm.held, vm.ceiling = 0, None
                vm.asked.append(rate)
        for vm in waited:
            used_up = total >= ROOM * budget or by_tenant[vm.tenant] >= ROOM * self._cap(facts, vm.tenant)
            vm.asked.append(self._asked(vm, interval, not used_up))
        headroom = 1 + self._headroom
        for vm in vms.values():
            if vm.tick != self._tick:
                vm.absent += interval
                vm.rate = vm.throttled = 0.0
                vm.asked.append(math.inf if _may_be_waiting(vm) else 0.0)
            elif vm.absent:
                vm.absent = 0.0
            vm.demand = max(vm.asked)
            vm.want = vm.demand * headroom

    def _asked(self, vm: _Vm, interval: float, room: bool) -> float:
        """Of one that waited."""
        # Two events more or less in a tick say nothing about a rate.
        if vm.ceiling is not None and abs(vm.rate - vm.ceiling) <= max(0.1 * vm.ceiling, 2 / interval):
            return vm.ceiling
        vm.ceiling = None
        # It waits, though not for us, and neither host nor tenant is used up: so for a limit of its own. That is sure
        # only after some ticks: a limit that was lowered first makes its VM pay back the larger burst.
        if room and vm.limit is not None and vm.rate + 2 / interval < 0.9 * vm.limit.rate:
            vm.held += 1
            if vm.held > self._memory:
                vm.asked.clear()
                vm.ceiling = vm.rate
                return vm.rate
        else:
            vm.held = 0
        return math.inf

    # ---- what each gets -------------------------------------------------------------------------------------------

    @staticmethod
    def _weights(facts: Facts, tenants: Mapping[str, list[_Vm]]) -> list[float]:
        return [facts.tenants[tenant].weight if tenant in facts.tenants else 1.0 for tenant in tenants]

    def _shares(self, facts: Facts, budget: float, tenants: Mapping[str, list[_Vm]]) -> dict[str, float]:
        demands = [min(sum([vm.want for vm in vms]), self._cap(facts, tenant)) for tenant, vms in tenants.items()]
        shares: dict[str, float] = {}
        for part, vms in zip(max_min(budget, demands, self._weights(facts, tenants)), tenants.values(), strict=True):
            parts = max_min(part, [vm.want for vm in vms], [vm.weight for vm in vms])
            shares.update(zip([vm.name for vm in vms], parts, strict=True))
        return shares

    def _settle(
        self, facts: Facts, budget: float, tenants: Mapping[str, list[_Vm]], shares: Mapping[str, float]
    ) -> None:
        """Keep book of what each did beyond its share. It rests for that by what it would have if all were greedy."""
        caps = [self._cap(facts, tenant) for tenant in tenants]
        for part, vms in zip(max_min(budget, caps, self._weights(facts, tenants)), tenants.values(), strict=True):
            whole = sum([vm.weight for vm in vms])
            for vm in vms:
                fair = part * vm.weight / whole
                if math.isinf(fair):
                    vm.ahead = 0.0
                elif vm.ahead or vm.rate > fair:  # who keeps within it and owes nothing goes on like that
                    ahead = vm.ahead + (vm.rate - max(fair, shares[vm.name])) * facts.interval
                    vm.ahead = min(max(0.0, ahead), PAROLE * fair)

    # ---- what to do about it --------------------------------------------------------------------------------------

    def _idle(self) -> Iterator[Unthrottle]:
        for vm in [vm for vm in self._vms.values() if not vm.demand]:
            if vm.limit is not None and vm.ahead:
                continue
            del self._vms[vm.name]
            if vm.limit is not None:
                yield self._release(vm, f"idle for {self._memory} ticks")

    def _changes(self, facts: Facts, host: Limit | None, shares: dict[str, float]) -> Iterator[Throttle | Unthrottle]:
        max_delay = Limit(rate=1).max_delay if host is None else host.max_delay
        limits: list[tuple[_Vm, Limit]] = []
        moved = False
        for vm in self._vms.values():
            share = shares[vm.name]
            # Set when it takes or wants more than its share now, taken away only once its share has the headroom too.
            if share < (vm.asked[-1] if vm.limit is None else vm.want):
                limit = paced(share, max_delay)
                limits.append((vm, limit))
                off = 0.0 if vm.limit is None else abs(limit.rate - vm.limit.rate) / vm.limit.rate
                moved = moved or off > self._tolerance
            elif vm.limit is not None and not vm.ahead:
                yield self._release(vm, "the budget has room for what it asks for")
        # When one has to move, all that are off do, so that they keep their ratios and add up.
        least = self._tolerance / 4 if moved else self._tolerance
        for vm, limit in limits:
            old = vm.limit
            near = old is not None and abs(limit.rate - old.rate) <= least * old.rate
            if old is None or vm.lost or not near or old.max_delay != max_delay:
                vm.limit, vm.lost = limit, False
                yield self._throttle(vm, limit, facts, host)

    def _throttle(self, vm: _Vm, limit: Limit, facts: Facts, host: Limit | None) -> Throttle:
        tenant = facts.tenants.get(vm.tenant)
        whole = "its tenant's limit" if host is None else f"the budget of {host.rate:g}/s"
        evidence: dict[str, Any] = {
            "rate": round(vm.rate, 3),
            "demand": None if math.isinf(vm.demand) else round(vm.demand, 3),  # None: more than it got
            "throttled": round(vm.throttled, 6),
            "interval": facts.interval,
            "share": limit.rate,
            "weight": vm.weight,
            "tenant": vm.tenant,
            "tenant_weight": 1.0 if tenant is None else tenant.weight,
            "budget": None if host is None else host.rate,
        }
        reason = f"fair share: {limit.rate:.6g} {self._meter.replace('_', ' ')}/s of {whole}"
        return Throttle(vm=vm.name, launch=vm.launch, limit=limit, meter=self._meter, reason=reason, evidence=evidence)

    def _release(self, vm: _Vm, reason: str) -> Unthrottle:
        evidence = {"rate": round(vm.rate, 3), "demand": round(vm.demand, 3)} if vm.demand < math.inf else {}
        vm.limit = None
        return Unthrottle(vm=vm.name, launch=vm.launch, meter=self._meter, reason=reason, evidence=evidence)


def _may_be_waiting(vm: _Vm) -> bool:
    """A VM with a low limit can be silent for some ticks because every one of its vCPUs waits for its turn."""
    if vm.limit is None or not math.isinf(vm.demand):
        return False
    longest = 2 * vm.vcpus / vm.limit.rate
    if vm.limit.max_delay is not None:
        longest = min(longest, 2 * vm.limit.max_delay)
    return vm.absent <= longest
