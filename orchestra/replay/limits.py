"""What is in force in a replay, and how much of what is wanted it lets through: a fluid model of token buckets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

import attrs

from ..actions import (
    Action,
    CapCpu,
    Evict,
    Isolate,
    Kill,
    Pause,
    Rejoin,
    Resume,
    SetLimit,
    Stop,
    Throttle,
    Unthrottle,
)
from ..budget import tightest
from ..spec import Limit, Meter, Tenant
from .demand import Want

__all__ = ["InForce", "Passed"]

Place: TypeAlias = tuple[str, str]
"""("vm", name), ("tenant", name) or ("host", "")."""

HOST: Final[Place] = ("host", "")


@attrs.frozen
class Passed:
    """What became of a VM's demand: the part of it that went ahead, and the vCPU seconds that it was held for."""

    part: float
    throttled: float = 0.0
    capped: float = 0.0
    paused: float = 0.0


@attrs.define(eq=False)
class _Bucket:
    base: Limit | None = None
    throttles: dict[str, Limit] = attrs.field(factory=dict)
    limit: Limit | None = None
    tokens: float = 0.0

    def set(self) -> None:
        old, self.limit = self.limit, tightest(self.base, self.throttles.values())
        if self.limit is not None:  # a new bucket is full; one that grows later fills up as time goes
            self.tokens = self.limit.tokens if old is None else min(self.tokens, self.limit.tokens)

    def room(self, seconds: float) -> float:
        assert self.limit is not None
        return self.tokens + self.limit.rate * seconds

    def take(self, events: float, seconds: float) -> None:
        assert self.limit is not None
        self.tokens = min(self.limit.tokens, max(0.0, self.room(seconds) - events))


class InForce:
    """Limits, caps, pauses, isolation, and who is gone."""

    def __init__(self, limit: Limit | None, exit_limit: Limit | None, tenants: Mapping[str, Tenant]) -> None:
        self._buckets: dict[tuple[Meter, Place], _Bucket] = {}
        self._caps: dict[str, dict[str, float]] = {}
        self._paused: set[str] = set()
        self._isolated: set[str] = set()
        self._gone: set[str] = set()
        self._launches: dict[str, int] = {}
        bases = [(HOST, Meter.BUS_LOCKS, limit), (HOST, Meter.EXITS, exit_limit)]
        for name, tenant in tenants.items():
            bases += [
                (("tenant", name), Meter.BUS_LOCKS, tenant.limit),
                (("tenant", name), Meter.EXITS, tenant.exit_limit),
            ]
        for place, meter, base in bases:
            self.set_base(place, meter, base)

    def set_base(self, place: Place, meter: Meter, limit: Limit | None) -> None:
        """Set the limit itself, apart from throttles."""
        bucket = self._buckets.get((meter, place))
        if bucket is None:
            if limit is None:
                return
            bucket = self._buckets[meter, place] = _Bucket()
        if bucket.base != limit:
            bucket.base = limit
            bucket.set()

    def host_limit(self, meter: Meter) -> Limit | None:
        """As in force."""
        bucket = self._buckets.get((meter, HOST))
        return None if bucket is None else bucket.limit

    def limit_of(self, vm: str, meter: Meter = Meter.BUS_LOCKS) -> Limit | None:
        bucket = self._buckets.get((meter, ("vm", vm)))
        return None if bucket is None else bucket.limit

    def seen(self, vm: str, launch: int) -> None:
        """Another VM of that name starts without what held the one before."""
        if self._launches.get(vm, launch) != launch:
            self._forget(vm)
            self._gone.discard(vm)
        self._launches[vm] = launch

    def apply(self, action: Action, policy: str) -> None:
        """Carry it out."""
        match action:
            case Throttle(vm=vm, tenant=tenant, meter=meter, limit=limit):
                bucket = self._buckets.setdefault((meter, _place(vm, tenant)), _Bucket())
                bucket.throttles[policy] = limit
                bucket.set()
            case Unthrottle(vm=vm, tenant=tenant, meter=meter):
                known = self._buckets.get((meter, _place(vm, tenant)))
                if known is not None and known.throttles.pop(policy, None) is not None:
                    known.set()
            case SetLimit(vm=vm, tenant=tenant, meter=meter, limit=base):
                self.set_base(_place(vm, tenant), meter, base)
            case CapCpu(vm=vm, share=None):
                self._caps.get(vm, {}).pop(policy, None)
            case CapCpu(vm=vm, share=float() | int() as share):
                self._caps.setdefault(vm, {})[policy] = share
            case Pause(vm=vm):
                self._paused.add(vm)
            case Resume(vm=vm):
                self._paused.discard(vm)
            case Isolate(vm=vm):
                self._isolated.add(vm)
            case Rejoin(vm=vm):
                self._isolated.discard(vm)
            case Evict(vm=vm) | Stop(vm=vm) | Kill(vm=vm):
                self._forget(vm)
                self._gone.add(vm)

    def _forget(self, vm: str) -> None:
        for meter in Meter:
            self._buckets.pop((meter, ("vm", vm)), None)
        self._caps.pop(vm, None)
        self._paused.discard(vm)
        self._isolated.discard(vm)

    # ---- an interval ------------------------------------------------------------------------------------------------

    def let_through(self, wants: Mapping[str, Want], interval: float) -> dict[str, Passed]:
        """How much of each VM's demand goes ahead: first what it may run, then its limit, its tenant's, the host's.

        Within a tenant, and on the host, what is too much is taken from all in the same proportion: their bucket serves
        whoever comes first.
        """
        runs = {name: self._may_run(name, want) for name, want in wants.items()}
        parts = dict(runs)
        for name in wants:
            self._hold(("vm", name), [name], wants, parts, interval)
        by_tenant: dict[str, list[str]] = {}
        for name, want in wants.items():
            by_tenant.setdefault(want.seen.tenant, []).append(name)
        for tenant, names in by_tenant.items():
            self._hold(("tenant", tenant), names, wants, parts, interval)
        self._hold(HOST, list(wants), wants, parts, interval)
        for (meter, place), bucket in self._buckets.items():
            if bucket.limit is not None:
                names = self._below(place, by_tenant, wants)
                bucket.take(sum(wants[name].events.get(meter, 0.0) * parts[name] for name in names), interval)
        return {name: self._passed(name, want, runs[name], parts[name]) for name, want in wants.items()}

    @staticmethod
    def _below(place: Place, by_tenant: Mapping[str, list[str]], wants: Mapping[str, Want]) -> list[str]:
        kind, name = place
        if kind == "host":
            return list(wants)
        return by_tenant.get(name, []) if kind == "tenant" else [name] if name in wants else []

    def _may_run(self, name: str, want: Want) -> float:
        if name in self._paused or name in self._gone:
            return 0.0
        cap = min(self._caps.get(name, {}).values(), default=1.0)
        used = 1.0 if want.seen.cpu is None else want.seen.cpu / want.ran / want.vcpu_seconds
        return min(1.0, cap / used) if used > 0 else 1.0

    def _hold(
        self, place: Place, names: list[str], wants: Mapping[str, Want], parts: dict[str, float], interval: float
    ) -> None:
        for meter in Meter:
            bucket = self._buckets.get((meter, place))
            if bucket is None or bucket.limit is None:
                continue
            asked = {name: wants[name].events.get(meter, 0.0) * parts[name] for name in names}
            total, room = sum(asked.values()), bucket.room(interval)
            if total <= room:
                continue
            for name, events in asked.items():
                if not events:
                    continue
                let = events * room / total
                if bucket.limit.max_delay is not None:  # nothing waits for longer
                    let = max(let, min(events, wants[name].seen.vcpus * interval / bucket.limit.max_delay))
                parts[name] *= let / events

    def _passed(self, name: str, want: Want, run: float, part: float) -> Passed:
        seconds = want.vcpu_seconds
        if name in self._gone:
            return Passed(0.0)
        if name in self._paused:
            return Passed(0.0, paused=seconds)
        used = 1.0 if want.seen.cpu is None else min(1.0, want.seen.cpu / want.ran / seconds)
        return Passed(part, throttled=(run - part) * seconds, capped=(1.0 - run) * used * seconds)


def _place(vm: str | None, tenant: str | None) -> Place:
    return ("vm", vm) if vm is not None else ("tenant", tenant) if tenant is not None else HOST
