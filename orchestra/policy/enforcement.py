"""What would be in force, and which part of the VMs' demand it would let through: a fluid model of token buckets.

A replay and a dry run use this model. Its cost grows with the number of VMs that are held, not of all VMs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter
from typing import Final, Protocol, TypeAlias

import attrs

from ..model.actions import Action, CapCpu, SetLimit, Throttle
from ..model.effects import EFFECTS, ActionsInForce, Key, What, key_of
from ..model.spec import Limit, Meter, Tenant, tightest
from .buckets import Bucket

__all__ = ["FREE", "Asked", "Enforcement", "Passed"]

Place: TypeAlias = tuple[str, str]
"""("vm", name), ("tenant", name) or ("host", "")."""

HOST: Final[Place] = ("host", "")


class Asked(Protocol):
    """What a VM wants to do in an interval. The `VmFacts` of a VM that nothing held have these fields.

    `cpu` is the seconds of CPU time that the VM would use. None: not known.
    """

    @property
    def tenant(self) -> str: ...
    @property
    def vcpus(self) -> int: ...
    @property
    def bus_locks(self) -> float | None: ...
    @property
    def exits(self) -> float: ...
    @property
    def answers(self) -> float: ...
    @property
    def cpu(self) -> float | None: ...


@attrs.frozen
class Passed:
    """What became of a VM's demand in an interval.

    Attributes:
        part: the part of the demand that went ahead, 0 to 1.
        throttled, capped, paused: vCPU seconds for which limits, CPU caps and pauses held the VM.
    """

    part: float
    throttled: float = 0.0
    capped: float = 0.0
    paused: float = 0.0


FREE: Final = Passed(1.0)


class Enforcement:
    """Limits, caps and pauses in force, and the VMs that are gone.

    Parameters:
        limit, exit_limit, answer_limit: the host's limits. None: no limit.
        tenants: the tenants with their limits, by name.
    """

    def __init__(
        self,
        limit: Limit | None = None,
        exit_limit: Limit | None = None,
        tenants: Mapping[str, Tenant] | None = None,
        answer_limit: Limit | None = None,
    ) -> None:
        self._buckets: dict[Meter, dict[Place, Bucket]] = {meter: {} for meter in Meter}
        self._off: dict[Meter, dict[Place, Bucket]] = {meter: {} for meter in Meter}  # no limit; kept for tokens
        self._bases: dict[tuple[Meter, Place], Limit] = {}
        self._in_force = ActionsInForce()
        self._caps: dict[str, float] = {}  # `_caps` and `_paused` are derived from `_in_force`, by `_follow`
        self._paused: set[str] = set()
        self._gone: set[str] = set()
        self._generations: dict[str, int] = {}
        self._now = 0.0
        bases = [(HOST, Meter.BUS_LOCKS, limit), (HOST, Meter.EXITS, exit_limit), (HOST, Meter.ANSWERS, answer_limit)]
        for name, tenant in (tenants or {}).items():
            bases += [(("tenant", name), meter, getattr(tenant, meter.field)) for meter in Meter]
        for place, meter, base in bases:
            self.set_base(place, meter, base)

    def __bool__(self) -> bool:
        """Whether anything is held at all."""
        return bool(self._paused or self._gone or self._caps or any(self._buckets.values()))

    def set_base(self, place: Place, meter: Meter, limit: Limit | None) -> None:
        """Set the limit of a place itself, which throttles only tighten."""
        if self._bases.get((meter, place)) == limit:
            return
        if limit is None:
            del self._bases[meter, place]
        else:
            self._bases[meter, place] = limit
        self._set(meter, place)

    def host_limit(self, meter: Meter) -> Limit | None:
        """The host's limit in force: the tightest of its own limit and all throttles. None: no limit."""
        bucket = self._buckets[meter].get(HOST)
        return None if bucket is None else bucket.limit

    def limit_of(self, vm: str, meter: Meter = Meter.BUS_LOCKS) -> Limit | None:
        bucket = self._buckets[meter].get(("vm", vm))
        return None if bucket is None else bucket.limit

    def is_out(self, vm: str) -> bool:
        """Whether a VM is paused or gone."""
        return vm in self._paused or vm in self._gone

    def seen(self, vm: str, generation: int) -> bool:
        """Note that a VM was seen. Returns whether it is another VM of that name than before.

        A new VM starts without what held the earlier VM of the same name.
        """
        before = self._generations.get(vm)
        if before == generation:
            return False
        self._generations[vm] = generation
        if before is None:
            return False
        self._free(vm)
        self._gone.discard(vm)
        return True

    def is_another(self, vm: str, generation: int) -> bool:
        """Whether the VM of that name that was seen last is of another generation."""
        return self._generations.get(vm, generation) != generation

    def forget(self, vm: str) -> None:
        """Forget a VM that is gone, and what held it."""
        self._free(vm)
        self._gone.discard(vm)
        self._generations.pop(vm, None)

    def apply(self, action: Action, policy: str) -> None:
        """Put an action in force, unless the action is about another generation of that VM."""
        generation = getattr(action, "generation", None)
        if generation is not None and self._generations.get(action.vm or "", generation) != generation:
            return
        if EFFECTS[type(action)].ends:
            self._free(action.vm or "")
            self._gone.add(action.vm or "")
        elif isinstance(action, SetLimit):
            if action.vcpu is None:  # the limit of one vCPU is not the VM's; this model has no vCPUs
                self.set_base(_place(action.vm, action.tenant), action.meter, action.limit)
        else:
            self._in_force.note(action, policy)
            key = key_of(action)
            if key is not None:
                self._follow(key)

    def let_go(self, policy: str) -> None:
        """Undo everything that a policy holds."""
        for key in self._in_force.withdraw(policy):
            self._follow(key)

    def _follow(self, key: Key) -> None:
        """Derive the buckets, caps and pauses anew of a place where the holdings changed."""
        held, vm = self._in_force.at(key).values(), key.vm or ""
        match key.what:
            case What.THROTTLE:
                self._set(Meter(key.meter), _place(key.vm, key.tenant))
            case What.CAP:
                shares = [one.action.share for one in held if isinstance(one.action, CapCpu)]
                self._caps[vm] = min((share for share in shares if share is not None), default=1.0)
                if not shares:
                    del self._caps[vm]
            case What.PAUSE:
                (self._paused.add if held else self._paused.discard)(vm)

    def _set(self, meter: Meter, place: Place) -> None:
        """Set the bucket of a place to the tightest limit that is set or held there.

        A bucket that is there is used again, with or without a limit: a new bucket would be full, so taking a limit off
        and setting it again would give tokens away.
        """
        vm, tenant = (place[1] if place[0] == kind else None for kind in ("vm", "tenant"))
        held = self._in_force.at(Key(What.THROTTLE, meter.value, vm, tenant, None)).values()
        throttles = [one.action.limit for one in held if isinstance(one.action, Throttle)]
        buckets, off = self._buckets[meter], self._off[meter]
        bucket = buckets.pop(place, None) or off.pop(place, None) or Bucket()
        bucket.put(tightest(self._bases.get((meter, place)), throttles), self._now)
        (off if bucket.limit is None else buckets)[place] = bucket

    def _free(self, vm: str) -> None:
        self._in_force.forget(vm)
        for buckets in (*self._buckets.values(), *self._off.values()):
            buckets.pop(("vm", vm), None)
        for meter in Meter:
            self._bases.pop((meter, ("vm", vm)), None)
        self._caps.pop(vm, None)
        self._paused.discard(vm)

    # ---- an interval ------------------------------------------------------------------------------------------------

    def let_through(self, asked: Mapping[str, Asked], interval: float) -> dict[str, Passed]:
        """The part of the demand that goes ahead, for each VM that anything holds. All other VMs are free.

        CPU caps and pauses come first, then the limits of the VM, the tenant and the host, in this order: each limit
        sees only what the narrower limits let through. Within a tenant, and on the host, the model takes the excess
        from all VMs in the same proportion, as the bucket serves its vCPUs in the order of their requests.

        Parameters:
            asked: the demand of each active VM, by name.
            interval: seconds.
        """
        now, self._now = self._now, self._now + interval
        runs: dict[str, float] = {}
        for held in (self._caps, self._paused, self._gone):
            for name in _both(held, asked):
                runs[name] = self._may_run(name, asked[name], interval)
        parts = dict(runs)
        charged = []
        for place, buckets in self._limited(asked).items():
            names = self._below(place, asked)
            for meter, bucket in buckets:
                self._hold(meter, bucket, names, asked, parts, interval, now)
                charged.append((meter, bucket, names))
        # Buckets are charged only now: an event that a wider limit holds back costs the narrower bucket nothing.
        for meter, bucket, names in charged:
            bucket.take(_through(meter, names, asked, parts), now, interval)
        return {name: self._passed(name, asked[name], runs.get(name, 1.0), parts[name], interval) for name in parts}

    def _limited(self, asked: Mapping[str, Asked]) -> dict[Place, list[tuple[Meter, Bucket]]]:
        """The buckets that hold any of these VMs, from the narrowest place to the widest."""
        found: dict[Place, list[tuple[Meter, Bucket]]] = {}
        for meter, buckets in self._buckets.items():
            # Walk over whichever is smaller, the VMs that ask or the buckets: a fleet may hold many VMs that are idle.
            if len(buckets) > len(asked) + 1:
                tenants = {one.tenant for one in asked.values()}
                places: Iterable[Place] = [("vm", name) for name in asked]
                places = [*places, *(("tenant", tenant) for tenant in tenants), HOST]
                places = [place for place in places if place in buckets]
            else:
                places = [place for place in buckets if place[0] != "vm" or place[1] in asked]
            for place in places:
                found.setdefault(place, []).append((meter, buckets[place]))
        order = ("vm", "tenant", "host")
        return dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))

    @staticmethod
    def _below(place: Place, asked: Mapping[str, Asked]) -> Collection[str]:
        kind, name = place
        if kind == "vm":
            return [name]
        return asked.keys() if kind == "host" else [vm for vm, one in asked.items() if one.tenant == name]

    def _may_run(self, name: str, one: Asked, interval: float) -> float:
        if self.is_out(name):
            return 0.0
        cap = self._caps.get(name, 1.0)
        used = 1.0 if one.cpu is None else one.cpu / (one.vcpus * interval)
        return min(1.0, cap / used) if used > 0 else 1.0

    def _hold(
        self,
        meter: Meter,
        bucket: Bucket,
        names: Collection[str],
        asked: Mapping[str, Asked],
        parts: dict[str, float],
        interval: float,
        now: float,
    ) -> None:
        assert bucket.limit is not None
        room = bucket.room(now, interval)
        total = _through(meter, names, asked, parts)
        if total <= room:
            return
        count = _COUNT[meter]
        wanted = {name: (count(asked[name]) or 0.0) * parts.get(name, 1.0) for name in names}
        for name, events in wanted.items():
            if not events:
                continue
            let = events * room / total
            if bucket.limit.max_delay is not None:  # no vCPU waits longer for one event
                let = max(let, min(events, asked[name].vcpus * interval / bucket.limit.max_delay))
            parts[name] = parts.get(name, 1.0) * (let / events)

    def _passed(self, name: str, one: Asked, run: float, part: float, interval: float) -> Passed:
        seconds = one.vcpus * interval
        if name in self._gone:
            return Passed(0.0)
        if name in self._paused:
            return Passed(0.0, paused=seconds)
        used = 1.0 if one.cpu is None else min(1.0, one.cpu / seconds)
        return Passed(part, throttled=(run - part) * seconds, capped=(1.0 - run) * used * seconds)


def _place(vm: str | None, tenant: str | None) -> Place:
    return ("vm", vm) if vm is not None else ("tenant", tenant) if tenant is not None else HOST


_COUNT: Final = {meter: attrgetter(meter.value) for meter in Meter}


def _through(meter: Meter, names: Collection[str], asked: Mapping[str, Asked], parts: Mapping[str, float]) -> float:
    """The events of these VMs that go ahead."""
    count = _COUNT[meter]
    if len(names) < len(asked):
        return sum((count(asked[name]) or 0.0) * parts.get(name, 1.0) for name in names)
    total: float = sum(count or 0.0 for count in map(count, asked.values()))
    return total - sum((count(asked[name]) or 0.0) * (1.0 - part) for name, part in parts.items())


def _both(some: Iterable[str], asked: Mapping[str, Asked]) -> list[str]:
    return [name for name in some if name in asked]
