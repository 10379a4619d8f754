"""Guests under policies, in a model that is the same at each run: its limits are the core's buckets, time is injected.

Each guest has one vCPU for each of `vcpus`, which does an event, waits until its turn has come, and works for a while.
What a policy (or several, through a guard) decides at the end of a tick is in force from then on.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import attrs

from orchestra.machine.budget import Budget
from orchestra.model.actions import (
    Action,
    CapCpu,
    Evict,
    Isolate,
    Pause,
    Rejoin,
    Resume,
    Stop,
    Throttle,
    Unthrottle,
    Warn,
)
from orchestra.model.spec import Limit, Tenant
from orchestra.native import ffi, lib
from orchestra.native.core import NEVER
from orchestra.policy import Facts, Guard, HostFacts, Policy, Ruling, VmFacts
from orchestra.policy.dry_run import DryRun

SECOND = 1_000_000_000


@attrs.define(eq=False)
class Guest:
    """`rate(now, seen)`: events per second and vCPU that it tries; 0: it is idle. `seen`: events of its last ticks."""

    name: str
    rate: Callable[[float, list[int]], float]
    tenant: str = "default"
    weight: float = 1.0
    vcpus: int = 1
    own: Limit | None = None
    generation: int = 1
    budget: Budget = attrs.field(init=False)
    events: int = 0
    throttled: float = 0.0
    longest: float = 0.0
    seen: list[int] = attrs.field(factory=list)
    times: list[int] = attrs.field(factory=list)
    cap: dict[str, float] = attrs.field(factory=dict)
    paused: bool = False
    gone: bool = False
    isolated: bool = False

    def __attrs_post_init__(self) -> None:
        self.budget = Budget(self.own, 0)


@attrs.define(eq=False)
class _Vcpu:
    guest: Guest
    tickets: list[tuple[Budget, object]] = attrs.field(factory=list)
    since: int = 0
    counted: int = 0

    def turn(self) -> int:
        at = NEVER
        tokens, delay = ffi.new("int64_t *"), ffi.new("int64_t *")
        for budget, ticket in self.tickets:
            lib.orc_bucket_turn(budget.bucket.handle, ticket, tokens, delay)
            at = max(at, min(tokens[0], delay[0]))
        return at


def steady(rate: float) -> Callable[[float, list[int]], float]:
    return lambda now, seen: rate


def during(rate: float, *spans: tuple[float, float]) -> Callable[[float, list[int]], float]:
    return lambda now, seen: rate if any(start <= now < end for start, end in spans) else 0.0


class World:
    """`host(total)`: the host's signals, from the events per second that all did in the tick before."""

    def __init__(
        self,
        policies: Sequence[Policy] | Policy,
        guests: Iterable[Guest],
        *,
        tenants: Iterable[Tenant] = (),
        limit: Limit | None = None,
        host: Callable[[float], HostFacts] = lambda total: HostFacts(),
        guard: Guard | None = None,
        interval: float = 0.1,
    ) -> None:
        self.policies = [policies] if isinstance(policies, Policy) else list(policies)
        self.guests = {guest.name: guest for guest in guests}
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self.limit, self.signals, self.guard, self.interval = limit, host, guard, interval
        self.host = Budget(limit, 0)
        self.budgets = {name: Budget(tenant.limit, 0) for name, tenant in self.tenants.items()}
        self.now = 0
        self.actions: list[tuple[float, Action]] = []
        self.dry_actions: list[tuple[float, Action]] = []
        dry = [guard is not None and guard.is_dry(policy.name) for policy in self.policies]
        self._dry_runs = [DryRun() if one else None for one in dry]
        self.totals: list[float] = []
        self._order = count()
        self._ready: list[tuple[int, int, _Vcpu]] = []
        self._waiting: list[_Vcpu] = []
        for guest in self.guests.values():
            for _ in range(guest.vcpus):
                heapq.heappush(self._ready, (0, next(self._order), _Vcpu(guest)))

    def run(self, seconds: float) -> World:
        for _ in range(round(seconds / self.interval)):
            self.tick()
        return self

    def rate(self, name: str, seconds: float) -> float:
        ticks = round(seconds / self.interval)
        return sum(self.guests[name].seen[-ticks:]) / (ticks * self.interval)

    def taken(self, kind: type) -> list[Action]:
        return [action for _, action in self.actions if isinstance(action, kind)]

    def _push(self, at: int, vcpu: _Vcpu) -> None:
        heapq.heappush(self._ready, (at, next(self._order), vcpu))

    def _work(self, vcpu: _Vcpu) -> None:
        guest = vcpu.guest
        rate = guest.rate(self.now / SECOND, guest.seen) * min(guest.cap.values(), default=1.0)
        self._push(self.now + (round(SECOND / rate) if rate else SECOND // 100), vcpu)

    def _event(self, vcpu: _Vcpu) -> None:
        guest = vcpu.guest
        if guest.gone:
            return
        if guest.paused or not guest.rate(self.now / SECOND, guest.seen):
            self._push(self.now + SECOND // 100, vcpu)
            return
        guest.events += 1
        guest.times.append(self.now)
        vcpu.tickets = []
        for budget in filter(None, [self.host, self.budgets.get(guest.tenant), guest.budget]):
            ticket = ffi.new("struct orc_ticket *")
            lib.orc_bucket_charge(budget.bucket.handle, self.now, ticket)
            vcpu.tickets.append((budget, ticket))
        vcpu.since = vcpu.counted = self.now
        if vcpu.turn() <= self.now:
            self._work(vcpu)
        else:
            self._waiting.append(vcpu)

    def tick(self) -> None:
        end = self.now + round(self.interval * SECOND)
        while True:
            first = min(((vcpu.turn(), n) for n, vcpu in enumerate(self._waiting)), default=(math.inf, -1))
            ready = self._ready[0][0] if self._ready else math.inf
            if min(first[0], ready) >= end:
                break
            if first[0] <= ready:
                vcpu = self._waiting.pop(first[1])
                self.now = max(self.now, int(first[0]))
                vcpu.guest.throttled += (self.now - vcpu.counted) / SECOND
                vcpu.guest.longest = max(vcpu.guest.longest, (self.now - vcpu.since) / SECOND)
                self._work(vcpu)
            else:
                at, _, vcpu = heapq.heappop(self._ready)
                self.now = max(self.now, at)
                self._event(vcpu)
        self.now = end
        for vcpu in self._waiting:
            vcpu.guest.throttled += (end - vcpu.counted) / SECOND
            vcpu.counted = end
        self._decide()

    def _decide(self) -> None:
        total = sum(guest.events for guest in self.guests.values()) / self.interval
        self.totals.append(total)
        facts = Facts(
            time=self.now,
            interval=self.interval,
            limit=self.limit,
            exit_limit=None,
            tenants=self.tenants,
            vms={
                g.name: VmFacts(g.name, g.tenant, g.weight, g.vcpus, g.events, g.events, g.throttled, g.generation)
                for g in self.guests.values()
                if g.events or g.throttled
            },
            host=self.signals(total),
        )
        for guest in self.guests.values():
            guest.seen.append(guest.events)
            guest.events, guest.throttled = 0, 0.0
        for order, (policy, dry_run) in enumerate(zip(self.policies, self._dry_runs, strict=True)):
            for action in policy.decide(facts if dry_run is None else dry_run.see(facts)):
                self._apply(action, policy, order)

    def _apply(self, action: Action, policy: Policy, order: int) -> None:
        if self.guard is not None:
            verdict = self.guard.judge(action, policy.name, self.now, order, vms=len(self.guests))
            if verdict.outcome is Ruling.DRY_RUN:
                self.dry_actions.append((self.now / SECOND, verdict.judged))
                for dry_run in filter(None, self._dry_runs):
                    dry_run.apply(verdict.judged, policy.name, self.now)
            if verdict.action is None:
                if verdict.outcome == "refused" and hasattr(policy, "refused"):
                    policy.refused(action, verdict.reason)
                return
            action = verdict.action
        self.actions.append((self.now / SECOND, action))
        by = policy.name
        if isinstance(action, Throttle | Unthrottle):
            place = self.host if action.vm is action.tenant is None else self.budgets.get(action.tenant or "")
            budget = place or self.guests[action.vm or ""].budget
            budget.set_throttle(by, action.limit if isinstance(action, Throttle) else None, self.now)
            return
        guest = self.guests[action.vm or ""]
        match action:
            case CapCpu(share=None):
                guest.cap.pop(by, None)
            case CapCpu(share=share):
                guest.cap[by] = share
            case Pause() | Resume():
                guest.paused = isinstance(action, Pause)
            case Isolate() | Rejoin():
                guest.isolated = isinstance(action, Isolate)
            case Evict() | Stop():
                guest.gone = True
            case _:
                assert isinstance(action, Warn)


def worst_window(times: list[int], rate: float) -> float:
    """The least burst with which these events keep to ``burst + rate * t`` in every window of t seconds."""
    level, worst, before = 0.0, 0.0, None
    for at in times:
        if before is not None:
            level = max(0.0, level - (at - before) / SECOND * rate)
        level += 1
        worst, before = max(worst, level), at
    return worst
