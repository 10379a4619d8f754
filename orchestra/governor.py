"""Runs the policies: gathers facts, lets each decide when it is due, hands its actions to the fleet."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import attrs
import trio

from .actions import Action
from .errors import SpecError
from .native.core import FleetCore
from .policy import Facts, Policy, VmFacts
from .spec import Limit, Tenant
from .vm import Vm

__all__ = ["Governor", "PolicyStatus"]

log: Final = logging.getLogger("orchestra.policy")


class Fleet(Protocol):
    """What the governor needs of its fleet."""

    core: FleetCore
    bus_locks: bool

    @property
    def tenants(self) -> Mapping[str, Tenant]: ...
    @property
    def limit(self) -> Limit | None: ...
    @property
    def exit_limit(self) -> Limit | None: ...
    def now(self) -> int: ...
    def owner(self, id: int) -> tuple[Vm, int] | None:
        """The VM and vCPU index of a core's id."""

    async def apply(self, action: Action, *, policy: str | None = None) -> Any: ...
    def journal_policy_error(self, policy: str, error: BaseException) -> None: ...


@attrs.frozen
class PolicyStatus:
    """A policy's name, whether it is on, why it was switched off, and how many actions it asked for."""

    name: str
    on: bool
    error: str | None
    actions: int


@attrs.define
class _Sum:
    """What a VM did since a policy last looked."""

    exits: int = 0
    bus_locks: int = 0
    throttled: int = 0


@attrs.define(eq=False)
class _Seat:
    policy: Policy
    last: int
    due: int
    sums: dict[Vm, _Sum] = attrs.field(factory=dict)
    on: bool = True
    error: str | None = None
    actions: int = 0


def _interval(policy: Policy) -> int | None:
    """A policy's interval in nanoseconds."""
    interval = policy.interval
    if interval is None:
        return None
    if isinstance(interval, bool) or not isinstance(interval, int | float) or not 1e-6 <= interval < math.inf:
        raise SpecError(
            f"policy {policy.name!r}: interval={interval!r}: must be seconds, at least 1e-6, or None for only once"
        )
    return round(interval * 1e9)


class Governor:
    """One tick serves all policies. Its cost grows with the vCPUs that did something, not with those that exist."""

    def __init__(self, fleet: Fleet, policies: Iterable[Policy], strict: bool) -> None:
        now = fleet.now()
        self._fleet = fleet
        self._strict = strict
        # Facts are about an interval: a policy that ticks decides first when one has passed.
        self._seats = [_Seat(policy, now, now + (_interval(policy) or 0)) for policy in policies]
        self._seen: dict[int, tuple[int, int, int]] = {}
        self._waiting: set[int] = set()

    def statistics(self) -> tuple[PolicyStatus, ...]:
        return tuple(PolicyStatus(seat.policy.name, seat.on, seat.error, seat.actions) for seat in self._seats)

    def forget(self, id: int) -> None:
        """A vCPU is gone: what it did last still counts, as its VM may be restarted."""
        self._look(id, self._fleet.now())
        self._seen.pop(id, None)
        self._waiting.discard(id)

    async def run(self) -> None:
        """Tick until no policy is left that wants to."""
        while True:
            now = self._fleet.now()
            self._gather(now)
            for seat in self._seats:
                if seat.on and seat.due <= now:
                    await self._decide(seat, now)
            dues = [seat.due for seat in self._seats if seat.on]
            if not dues:
                return
            await trio.sleep(max(0.0, (min(dues) - self._fleet.now()) / 1e9))

    def _gather(self, now: int) -> None:
        """Add what the active vCPUs did to each policy's sums."""
        # One that waits for its turn accounts nothing meanwhile, but it is not idle: it is looked at until it did not
        # wait any more.
        ids = self._waiting.union(self._fleet.core.active())
        self._waiting.clear()
        for id in ids:
            self._look(id, now)

    def _look(self, id: int, now: int) -> None:
        owner = self._fleet.owner(id)
        if owner is None:
            return
        vm, index = owner
        guest = vm.guest
        if guest is None:
            return
        sums = guest.sums(index, now)
        before = self._seen.get(id, (0, 0, 0))
        self._seen[id] = sums
        # Clamped: runner and governor read the clock each for itself, so a wait may end "before" it was looked at.
        exits, bus_locks, throttled = (max(0, new - old) for new, old in zip(sums, before, strict=True))
        if throttled:
            self._waiting.add(id)
        if not (exits or bus_locks or throttled):
            return
        for seat in self._seats:
            if seat.on:
                total = seat.sums.setdefault(vm, _Sum())
                total.exits += exits
                total.bus_locks += bus_locks
                total.throttled += throttled

    async def _decide(self, seat: _Seat, now: int) -> None:
        fleet, policy = self._fleet, seat.policy
        facts = Facts(
            time=now,
            interval=max((now - seat.last) / 1e9, 1e-9),
            limit=fleet.limit,
            exit_limit=fleet.exit_limit,
            tenants=fleet.tenants,
            vms={
                vm.name: VmFacts(
                    name=vm.name,
                    tenant=vm.tenant,
                    weight=vm.spec.weight,
                    vcpus=vm.spec.vcpus,
                    bus_locks=total.bus_locks if fleet.bus_locks else None,
                    exits=total.exits,
                    throttled=total.throttled / 1e9,
                    launch=vm.launch,
                )
                for vm, total in seat.sums.items()
                if vm.outcome is None
            },
        )
        seat.sums = {}
        seat.last = now
        try:
            interval = _interval(policy)
            seat.due = now + (interval or 0)
            actions = list(policy.decide(facts))
            for action in actions:
                if not isinstance(action, Action):
                    raise SpecError(f"action={action!r}: must be one of orchestra's actions")
        except Exception as error:
            if self._strict:
                raise
            seat.on = False
            seat.error = f"{type(error).__name__}: {error}"
            log.exception("policy %r raised and is switched off; the limits that it set stay in force", policy.name)
            fleet.journal_policy_error(policy.name, error)
            return
        seat.on = interval is not None
        for action in actions:
            seat.actions += 1
            await fleet.apply(action, policy=policy.name)
