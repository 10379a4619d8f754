"""Weighted max-min sharing of the host's budget: a VM that asks for less than its share gets what it asks for, and the
others divide the rest by weight.

    what a VM did     if the VM hardly waited, it asked for what it got; if it waited, it asked for more (inf)
    its demand        the most that it asked for in the last `memory` ticks
    set aside for it  its demand and the headroom
    its share         weighted max-min: the budget among the tenants, and each tenant's part among its VMs
    its limit         its share, if that is less than what is set aside for it; else no limit

A worked timeline, of ``WeightedShare(Limit(rate=1000))`` and three VMs of the same weight that want 2000, 900 and 100
bus locks a second. `c` ends its work at 0.6 s:

    time  did: a    b    c  asked for: a    b    c  limits: a    b
   0.1 s      667  300   33        inf  inf  inf     333  333  set
   0.2 s      333  333  100        inf  inf  inf     333  333
   0.3 s      333  333  100        inf  inf  inf     333  333
   0.4 s      333  333  100        inf  inf  100     445  445  set
   0.5 s      445  445  100        inf  inf  100     445  445
   0.6 s      445  445  100        inf  inf  100     445  445
   0.7 s      445  445    0        inf  inf  100     445  445
   0.8 s      445  445    0        inf  inf  100     445  445
   0.9 s      445  445    0        inf  inf    -     500  500  set
   1.0 s      500  500    0        inf  inf    -     500  500

- 0.1 s: the host's bucket slowed all three, so each seems to want more than it got, and each has a third.
- 0.4 s: `c` did 100/s for three ticks without waiting. So 110/s, with the headroom, are set aside for `c`, which has no
  limit any more. `a` and `b` divide the other 890/s.
- 0.9 s: `c` was idle for three ticks. What was set aside for `c` is lent to the others.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

import attrs

from ..model.actions import Throttle, Unthrottle
from ..model.spec import Limit, optional_limit
from .facts import Facts
from .maxmin import divide
from .metered import WAITED, Memory, Metered, longest_wait
from .rates import paced, within_reach
from .validation import within

__all__ = ["WeightedShare"]

ROOM: Final = 0.98
"""Part of a budget. A budget of which less than this part was used held no VM back."""

PAROLE: Final = 60.0
"""Seconds of a VM's fair share: the most that is remembered of what the VM had beyond it. So no VM rests for longer
than a minute before its limit goes."""


@attrs.define(eq=False)
class _Vm:
    """What is remembered of a VM that was active during the last few ticks. Rates are events per second."""

    name: str
    generation: int
    tenant: str
    weight: float
    vcpus: int
    asked: deque[float]  # events per second in each tick; inf: the VM waited, so it wants more than it got
    limit: Limit | None = None  # the limit that this policy set
    lost: bool = False  # the VM ran faster than `limit` allows, so that limit is not in force
    rate: float = 0.0
    throttled: float = 0.0
    tick: int = 0  # the tick in which the VM was in the facts last
    absent: float = 0.0  # seconds since that tick
    held: int = 0  # ticks in a row in which another limit than ours held the VM back
    ceiling: float | None = None  # the rate at which that limit holds the VM, once this is sure
    ahead: float = 0.0  # events that the VM did beyond its fair share and has not rested for yet
    demand: float = 0.0  # the most that the VM asked for
    want: float = 0.0  # the demand and the headroom: what is set aside for the VM


@attrs.define(eq=False, slots=False)
class WeightedShare(Metered):
    """Share the host's budget among tenants by weight and, inside each, among its VMs by weight (weighted max-min).

    At each tick the policy looks at what each VM asked for. A VM that hardly waited got all that it wanted. So much and
    a headroom is set aside for the VM, which needs no limit. A VM that waited is greedy. The greedy VMs share what is
    left, and a limit of its own holds each of them to its share. So each VM gets what it asks for or its weighted fair
    share, whichever is less. What a VM does not use is lent to the others. A tenant's own limit caps what its VMs get
    together.

    A VM that comes back after a rest starts without a limit of this policy, under the host's limit alone, and gets its
    limit at the next tick. What it did by then is all that it can have beyond its fair share: the VM keeps its limit
    until it has rested for that, so coming and going gains nothing. If something else holds a VM back all the time
    (a limit of the VM's own), the policy finds that after some ticks, and lends the unused share as well.

    Parameters:
        limit: the budget. None: the host's limit, as in the facts. If there is neither, only the tenants' limits are
            shared.
        interval: seconds between two ticks.
        meter: the events that are shared.
        headroom: how much more than its demand is set aside for a VM that did not wait, as a part of the demand; 0.06
            or more. A VM that waits for up to 0.05 of the time counts as one that did not, and may want as much more.
        tolerance: a limit stays as it is while it is off by no more than this part of itself.
        memory: ticks for which what a VM asked for is remembered. The largest value counts. So a VM that comes and goes
            does not move the limits of all others, and what an idle VM leaves is lent after so many ticks.
        name: the policy's name in the journal.

    Raises:
        SpecError: a parameter is out of its range.
    """

    KIND: ClassVar[str] = "weighted-share"

    _limit: Limit | None = None
    _headroom: float = attrs.field(default=0.1, kw_only=True)
    _tolerance: float = attrs.field(default=0.02, kw_only=True)
    _memory: int = attrs.field(default=3, kw_only=True)

    def __attrs_post_init__(self) -> None:
        optional_limit("limit", self._limit)
        super().__attrs_post_init__()
        within("headroom", self._headroom, 0.06, 10, "of the demand")
        within("tolerance", self._tolerance, 0, 0.5, "of the limit")
        self._ticks = int(within("memory", self._memory, 1, 1000, "ticks"))
        self._vms: Memory[_Vm] = Memory()
        self._tick = 0

    @property
    def limit(self) -> Limit | None:
        """The budget that the policy shares. None: the host's limit."""
        return self._limit

    def decide(self, facts: Facts) -> list[Throttle | Unthrottle]:
        host = self._limit or getattr(facts, self.meter.field)
        budget = math.inf if host is None else host.rate
        self._vms.end(facts.gone)
        self._look(facts, budget)
        tenants: dict[str, list[_Vm]] = {}
        for vm in self._vms.values():
            tenants.setdefault(vm.tenant, []).append(vm)
        shares = self._shares(facts, budget, tenants)
        self._settle(facts, budget, tenants, shares)
        return [*self._idle(), *self._changes(facts, host, shares)]

    # ---- what each VM asked for -----------------------------------------------------------------------------------

    def _cap(self, facts: Facts, tenant: str) -> float:
        known = facts.tenants.get(tenant)
        limit = None if known is None else getattr(known, self.meter.field)
        return math.inf if limit is None else limit.rate

    def _look(self, facts: Facts, budget: float) -> None:
        """Note what each VM asked for. This runs for each active VM in each tick, so it does no more than it has to.

        VMs that waited come last: whether the budget was used up is known only once all events are summed.
        """
        self._tick += 1
        tick, interval, count_of, vms = self._tick, facts.interval, self._count, self._vms
        most = WAITED * interval
        headroom = 1 + self._headroom
        total = 0.0
        by_tenant: dict[str, float] = {}
        waited: list[_Vm] = []
        for seen in facts.vms.values():
            count = count_of(seen)
            if count is None:
                continue
            rate = count / interval
            total += rate
            tenant = seen.tenant
            by_tenant[tenant] = by_tenant.get(tenant, 0.0) + rate
            vm = vms.get(seen.name)
            if vm is None or vm.generation != seen.generation:  # a new VM of that name starts without limits
                asked: deque[float] = deque(maxlen=self._ticks)
                vm = vms[seen.name] = _Vm(seen.name, seen.generation, tenant, seen.weight, seen.vcpus, asked)
            vm.tick, vm.rate, vm.throttled, vm.absent = tick, rate, seen.throttled, 0.0
            # The rate and a whole burst is the most that a limit allows in a tick: one that the VM is clearly above is
            # not in force.
            if vm.limit is not None:
                vm.lost = rate > 1.5 * (vm.limit.rate + vm.limit.tokens / interval)
            if seen.throttled > most:  # as `presses`
                waited.append(vm)
            else:
                vm.held, vm.ceiling = 0, None
                vm.asked.append(rate)
                vm.demand = max(vm.asked)
                vm.want = vm.demand * headroom
        for vm in waited:
            used_up = total >= ROOM * budget or by_tenant[vm.tenant] >= ROOM * self._cap(facts, vm.tenant)
            vm.asked.append(self._asked(vm, interval, not used_up))
            vm.demand = max(vm.asked)
            vm.want = vm.demand * headroom
        for vm in vms.values():
            if vm.tick != tick:
                vm.absent += interval
                vm.rate = vm.throttled = 0.0
                vm.asked.append(math.inf if _may_be_waiting(vm) else 0.0)
                vm.demand = max(vm.asked)
                vm.want = vm.demand * headroom

    def _asked(self, vm: _Vm, interval: float, room: bool) -> float:
        """What a VM that waited asked for, in events per second. `room`: neither its host nor its tenant is used up."""
        # Two events more or less in a tick say nothing about a rate.
        if vm.ceiling is not None and abs(vm.rate - vm.ceiling) <= max(0.1 * vm.ceiling, 2 / interval):
            return vm.ceiling
        vm.ceiling = None
        # The VM waits at less than our limit, and neither host nor tenant is used up: so it waits for a limit of its
        # own. That is sure only after some ticks: after a limit is lowered, the VM pays back the larger burst first.
        if room and vm.limit is not None and vm.rate + 2 / interval < 0.9 * vm.limit.rate:
            vm.held += 1
            if vm.held > self._ticks:
                vm.asked.clear()
                vm.ceiling = vm.rate
                return vm.rate
        else:
            vm.held = 0
        return math.inf

    # ---- what each VM gets ----------------------------------------------------------------------------------------

    @staticmethod
    def _weights(facts: Facts, tenants: Mapping[str, list[_Vm]]) -> list[float]:
        return [facts.tenants[tenant].weight if tenant in facts.tenants else 1.0 for tenant in tenants]

    def _shares(self, facts: Facts, budget: float, tenants: Mapping[str, list[_Vm]]) -> dict[str, float]:
        demands = [min(sum([vm.want for vm in vms]), self._cap(facts, tenant)) for tenant, vms in tenants.items()]
        shares: dict[str, float] = {}
        for part, vms in zip(divide(budget, demands, self._weights(facts, tenants)), tenants.values(), strict=True):
            parts = divide(part, [vm.want for vm in vms], [vm.weight for vm in vms])
            shares.update(zip([vm.name for vm in vms], parts, strict=True))
        return shares

    def _settle(
        self, facts: Facts, budget: float, tenants: Mapping[str, list[_Vm]], shares: Mapping[str, float]
    ) -> None:
        """Record what each VM did beyond its share. A VM works that off at the rate of its fair share.

        The fair share here is what the VM would get if all VMs were greedy.
        """
        caps = [self._cap(facts, tenant) for tenant in tenants]
        for part, vms in zip(divide(budget, caps, self._weights(facts, tenants)), tenants.values(), strict=True):
            whole = sum([vm.weight for vm in vms])
            for vm in vms:
                fair = part * vm.weight / whole
                if math.isinf(fair):
                    vm.ahead = 0.0
                elif vm.ahead or vm.rate > fair:  # a VM within its fair share that owes nothing needs no record
                    ahead = vm.ahead + (vm.rate - max(fair, shares[vm.name])) * facts.interval
                    vm.ahead = min(max(0.0, ahead), PAROLE * fair)

    # ---- what to do about it --------------------------------------------------------------------------------------

    def _idle(self) -> Iterator[Unthrottle]:
        for vm in [vm for vm in self._vms.values() if not vm.demand]:
            if vm.limit is not None and vm.ahead:
                continue
            del self._vms[vm.name]
            if vm.limit is not None:
                yield self._release(vm, f"idle for {self._ticks} ticks")

    def _changes(self, facts: Facts, host: Limit | None, shares: dict[str, float]) -> Iterator[Throttle | Unthrottle]:
        max_delay = Limit(rate=1).max_delay if host is None else host.max_delay
        rates: list[tuple[_Vm, float, float]] = []  # and by which part it is off
        moved = False
        for vm in self._vms.values():
            share, old = shares[vm.name], vm.limit
            # A limit is set when the VM takes or wants more than its share now. The limit is taken away only once the
            # share has the headroom too: else a VM near its share would gain and lose its limit in turn.
            if share < (vm.asked[-1] if old is None else vm.want):
                rate = within_reach(share)
                off = math.inf if old is None else abs(rate - old.rate) / old.rate
                rates.append((vm, rate, off))
                moved = moved or self._tolerance < off < math.inf
            elif old is not None and not vm.ahead:
                yield self._release(vm, "the budget has room for what it asks for")
        # When one limit has to move, all that are off move with it, so that the limits keep their ratios and add up to
        # the budget. A limit that is off by less than a quarter of the tolerance is not worth an action.
        least = self._tolerance / 4 if moved else self._tolerance
        for vm, rate, off in rates:
            old = vm.limit
            if old is None or vm.lost or off > least or old.max_delay != max_delay:
                vm.limit, vm.lost = paced(rate, max_delay), False
                yield self._throttle(vm, vm.limit, facts, host)

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
        reason = f"fair share: {limit.rate:.6g} {self.meter.replace('_', ' ')}/s of {whole}"
        return Throttle(
            vm=vm.name, generation=vm.generation, limit=limit, meter=self.meter, reason=reason, evidence=evidence
        )

    def _release(self, vm: _Vm, reason: str) -> Unthrottle:
        evidence = {"rate": round(vm.rate, 3), "demand": round(vm.demand, 3)} if vm.demand < math.inf else {}
        vm.limit = None
        return Unthrottle(vm=vm.name, generation=vm.generation, meter=self.meter, reason=reason, evidence=evidence)


def _may_be_waiting(vm: _Vm) -> bool:
    if vm.limit is None or not math.isinf(vm.demand):
        return False
    return vm.absent <= longest_wait(vm.limit, vm.vcpus)
