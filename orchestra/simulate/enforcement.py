"""What is in force on the hosts: limits, CPU caps, isolation, pauses, and the VMs that are gone. Applies actions."""

from __future__ import annotations

from collections.abc import Iterator

from ..model.actions import Action, CapCpu, SetLimit, Throttle, Unthrottle
from ..model.effects import EFFECTS, ActionsInForce, Key, What, key_of
from ..model.spec import Limit, Meter, tightest
from .arrays import Ints, np
from .buckets import Buckets
from .layout import Layout

__all__ = ["SimulatedEnforcement"]


class SimulatedEnforcement:
    """What is in force on all hosts of one simulated world, as arrays. `policy.Enforcement` is that of one fleet.

    Attributes:
        vm, pair, host: the buckets by level.
        duty: the part of the time that each VM may run: 1, a cap, its part of the quarantine CPUs, or 0.
        held: for each VM, whether a policy holds it in any way.
        gone: for each VM, whether it left its host or was stopped.
        engaged: for each host, how many limits on VMs are in force that policies asked for.
        hindering: for each host, how many caps, isolations and pauses are in force.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.vm, self.pair, self.host = (Buckets(n) for n in (layout.size, layout.pairs, layout.hosts))
        self.duty = np.ones(layout.size)
        self.held = np.zeros(layout.size, np.bool_)
        self.gone = np.zeros(layout.size, np.bool_)
        self.engaged: Ints = np.zeros(layout.hosts, np.int64)
        self.hindering: Ints = np.zeros(layout.hosts, np.int64)
        self.hindered = 0  # VMs whose duty was ever less than 1
        self._levels = {"vm": self.vm, "pair": self.pair, "host": self.host}
        self._base: dict[tuple[str, int], Limit | None] = {}
        self._in_force: dict[int, ActionsInForce] = {}  # by host
        self._isolated: dict[int, set[int]] = {}  # these two follow from it
        self._paused: dict[int, int] = {}  # VM: its host
        self._own_limits()

    def _own_limits(self) -> None:
        layout = self.layout
        scenario = layout.scenario
        for i, hosts in enumerate(scenario.hosts):
            if hosts.limit is not None:
                self.host.fill(hosts.limit.on(layout.models[i]), np.flatnonzero(layout.host_class == i))
        for i, vms in enumerate(scenario.vms):
            if vms.limit is not None:
                members = np.arange(layout.first[i], layout.first[i] + vms.count)
                for kind, model in enumerate(layout.models):
                    self.vm.fill(vms.limit.on(model), members[layout.host_class[layout.host[members]] == kind])
        for one in scenario.tenants:
            if one.limit is not None:
                places, where = layout.of_tenant(one.name)
                for kind, model in enumerate(layout.models):
                    self.pair.fill(one.limit.on(model), places[layout.host_class[where] == kind])

    def own_limit(self, level: str, place: int) -> Limit | None:
        """The limit itself of a place, which throttles only tighten."""
        if (level, place) in self._base:
            return self._base[level, place]
        layout, scenario = self.layout, self.layout.scenario
        match level:
            case "vm":
                said, host = layout.group_of(place).limit, int(layout.host[place])
            case "host":
                said, host = scenario.hosts[layout.host_class[place]].limit, place
            case _:
                host, name = layout.tenant_at(place)
                said = next((one.limit for one in scenario.tenants if one.name == name), None)
        return None if said is None else said.on(layout.models[layout.host_class[host]])

    # ---- actions ----------------------------------------------------------------------------------------------------

    def apply(self, host: int, policy: str, action: Action, now: float) -> str | None:
        """Carry out an action of a host's policy. Returns why it can't be done, or None."""
        if isinstance(action, Throttle | Unthrottle | SetLimit):
            return self._limit(host, policy, action, now)
        vm = None if action.vm is None else self.layout.number(action.vm, host)
        if vm is None or self.gone[vm]:
            return f"{action.vm}: no such VM on this host"
        if EFFECTS[type(action)].ends:
            self._leave(vm, host, action.vm or "")
        elif (key := self._note(host, policy, action)) is not None:
            self._follow(host, vm, key)
        self._run(vm)
        for other in self._isolated.get(host, ()):  # isolated VMs share the quarantine CPUs
            self._run(other)
        return None

    def _note(self, host: int, policy: str, action: Action) -> Key | None:
        """Note an action in the holdings of its host. Returns the place."""
        held = self._in_force.setdefault(host, ActionsInForce())
        if (key := key_of(action)) is None:
            return None
        before = len(held.at(key))
        held.note(action, policy)
        self._count(host, key, len(held.at(key)) - before)
        return key

    def _count(self, host: int, key: Key, more: int) -> None:
        if key.what is What.MEMORY:
            return  # a guest that gives memory back runs as before: the simulator has no memory
        if key.what is not What.THROTTLE:
            self.hindering[host] += more
        elif key.vm is not None:  # a limit of a host or a tenant may stand for ever: no reason to look at an idle host
            self.engaged[host] += more

    def _follow(self, host: int, vm: int, key: Key) -> None:
        held = bool(self._in_force[host].at(key))
        if key.what is What.PAUSE:
            if held:
                self._paused[vm] = host
            else:
                self._paused.pop(vm, None)
        elif key.what is What.ISOLATION:
            inside = self._isolated.setdefault(host, set())
            (inside.add if held else inside.discard)(vm)

    def _limit(self, host: int, policy: str, action: Throttle | Unthrottle | SetLimit, now: float) -> str | None:
        if action.meter is not Meter.BUS_LOCKS:
            return "only bus locks are simulated"
        level, place = "host", host
        if action.vm is not None:
            vm = self.layout.number(action.vm, host)
            if vm is None or self.gone[vm]:
                return None if isinstance(action, Unthrottle) else f"{action.vm}: no such VM on this host"
            level, place = "vm", vm
        elif action.tenant is not None:
            pair = self.layout.pair_of(host, action.tenant)
            if pair is None:
                return None  # no VM of it here
            level, place = "pair", pair
        if isinstance(action, SetLimit):
            self._base[level, place] = action.limit
        else:
            self._note(host, policy, action)
        throttles = [
            one.limit
            for one in self._actions(host, action.vm, What.THROTTLE, action.tenant, action.meter)
            if isinstance(one, Throttle)
        ]
        self._levels[level].set(place, tightest(self.own_limit(level, place), throttles), now)
        if level == "vm":
            self._mark(place)
        return None

    def _actions(
        self, host: int, vm: str | None, what: What, tenant: str | None = None, meter: Meter | None = None
    ) -> Iterator[Action]:
        """What is in force at a place."""
        held = self._in_force.get(host)
        if held is not None:
            key = Key(what, "" if meter is None else meter.value, vm, tenant, None)
            yield from (one.action for one in held.at(key).values())

    def _leave(self, vm: int, host: int, name: str) -> None:
        held = self._in_force.get(host)
        if held is not None:
            for key in held.on(name):
                self._count(host, key, -len(held.at(key)))
            held.forget(name)
        self._isolated.get(host, set()).discard(vm)
        self._paused.pop(vm, None)
        self.gone[vm] = True

    def _run(self, vm: int) -> None:
        """Compute the part of the time that a VM may run."""
        layout = self.layout
        host = int(layout.host[vm])
        caps = [one.share for one in self._actions(host, layout.name(vm), What.CAP) if isinstance(one, CapCpu)]
        duty = min((share for share in caps if share is not None), default=1.0)
        inside = self._isolated.get(host, ())
        if vm in inside:
            duty = min(duty, float(layout.quarantine[host] / max(1.0, sum(layout.vcpus[one] for one in inside))))
        if vm in self._paused or self.gone[vm]:
            duty = 0.0
        self.hindered += duty < 1
        self.duty[vm] = duty
        self._mark(vm)

    def _mark(self, vm: int) -> None:
        host = int(self.layout.host[vm])
        throttled = any(self._actions(host, self.layout.name(vm), What.THROTTLE, meter=Meter.BUS_LOCKS))
        self.held[vm] = self.duty[vm] < 1 or throttled
