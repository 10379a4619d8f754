"""Limits by name: what an operator would set by hand on each VM, tenant and the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from ..model.actions import Action, Throttle
from ..model.errors import SpecError
from ..model.spec import Limit, Meter, as_meter, optional_limit
from .facts import Facts
from .retry import Once
from .validation import within

__all__ = ["StaticLimits"]


class StaticLimits:
    """Hold VMs, tenants and the host to fixed limits, each from the moment it is first seen.

    Limits stack, and the tighter counts: this one never loosens what a spec says. One that was refused is asked for
    again, first after a second and then ever more seldom.

    Parameters:
        vms: a `Limit` by VM name, or by a pattern as in a shell (``"web-*"``). A name in full goes before patterns; of
            several patterns that fit, the first counts.
        tenants: the same for tenants, each limit for all VMs of the tenant together.
        host: for the whole fleet.
        meter: what the limits count.
        interval: seconds between two looks for new VMs. Without `vms` one look is enough.
        name: in the journal; each policy of a fleet has one of its own.

    Raises:
        SpecError: a limit is not a `Limit`, or the interval is out of its range.
    """

    def __init__(
        self,
        vms: Mapping[str, Limit] | None = None,
        tenants: Mapping[str, Limit] | None = None,
        host: Limit | None = None,
        *,
        meter: Meter | str = Meter.BUS_LOCKS,
        interval: float = 0.1,
        name: str | None = None,
    ) -> None:
        self._vms = _checked("vms", vms)
        self._tenants = _checked("tenants", tenants)
        self._host = optional_limit("host", host)
        self._meter = as_meter(meter)
        self._name = name or ("static-limits" if self._meter is Meter.BUS_LOCKS else f"static-limits-{self._meter}")
        self._interval = within("interval", interval, 1e-6, 1e6, "seconds")
        self._places, self._launches = Once(), Once()
        self._seen: dict[str, int] = {}  # launches, of those that were limited at the last tick
        self._time = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def meter(self) -> Meter:
        return self._meter

    @property
    def interval(self) -> float | None:
        return self._interval if self._vms or self._places.waiting else None

    def tenant_limit(self, tenant: str) -> Limit | None:
        """What a tenant of that name is held to."""
        found = _find(self._tenants, tenant)
        return None if found is None else found[1]

    def decide(self, facts: Facts) -> list[Throttle]:
        self._time, self._seen = facts.time, {}
        return list(self._new(facts))

    def refused(self, action: Action, reason: str) -> None:
        """It is not in force, so it is asked for again."""
        if action.vm is None:
            self._places.refused(action.tenant if isinstance(action, Throttle) else None, self._time)
        elif action.vm in self._seen:
            self._launches.refused((action.vm, self._seen[action.vm]), self._time)

    def _new(self, facts: Facts) -> Iterator[Throttle]:
        if self._host is not None and self._places.due(None, facts.time):
            yield Throttle(limit=self._host, meter=self._meter, reason="static limit of the host")
        for name in facts.tenants:
            if not self._places.due(name, facts.time):
                continue
            if (found := _find(self._tenants, name)) is not None:
                pattern, limit = found
                yield Throttle(
                    tenant=name,
                    limit=limit,
                    meter=self._meter,
                    reason=f"static limit of tenant {name}",
                    evidence={"pattern": pattern},
                )
        if not self._vms:
            return
        self._launches.forget(facts.gone)
        for name, vm in facts.vms.items():
            if not self._launches.due((name, vm.launch), facts.time):  # another VM of that name starts without limits
                continue
            self._seen[name] = vm.launch
            if (found := _find(self._vms, name)) is not None:
                pattern, limit = found
                yield Throttle(
                    vm=name,
                    launch=vm.launch,
                    limit=limit,
                    meter=self._meter,
                    reason=f"static limit of VMs named {pattern}",
                    evidence={"pattern": pattern},
                )


def _checked(field: str, limits: Mapping[str, Limit] | None) -> dict[str, Limit]:
    checked: dict[str, Limit] = {}
    for pattern, value in (limits or {}).items():
        limit = optional_limit(f"{field}[{pattern!r}]", value)
        if limit is None:
            raise SpecError(f"{field}[{pattern!r}]=None: must be a Limit; leave the name out for no limit")
        checked[pattern] = limit
    return checked


def _find(limits: Mapping[str, Limit], name: str) -> tuple[str, Limit] | None:
    if name in limits:
        return name, limits[name]
    return next(((pattern, limit) for pattern, limit in limits.items() if fnmatchcase(name, pattern)), None)
