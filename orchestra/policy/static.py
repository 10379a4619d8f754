"""Limits by name, which an operator would else set by hand on each VM, each tenant and the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import ClassVar

import attrs

from ..model.actions import Action, Throttle
from ..model.errors import SpecError
from ..model.spec import Limit, optional_limit
from .facts import Facts
from .metered import Metered
from .retry import Once

__all__ = ["StaticLimits"]


@attrs.define(eq=False, slots=False)
class StaticLimits(Metered):
    """Hold VMs, tenants and the host to fixed limits, each from the moment at which the policy first sees it.

    Limits stack, and the tightest counts: this policy never loosens what a spec says. If a limit was refused, the
    policy asks for the limit again after a second, and then after twice as long each time, up to 64 s.

    Parameters:
        vms: a `Limit` by VM name, or by a pattern as in a shell (``"web-*"``). A full name goes before patterns. If
            several patterns fit, the first counts.
        tenants: the same for tenants. Each limit is for all VMs of the tenant together.
        host: the limit for the whole fleet.
        meter: the events that the limits count.
        interval: seconds between two looks for new VMs. Without `vms` one look is enough.
        name: the policy's name in the journal. Each policy of a fleet needs a name of its own.

    Raises:
        SpecError: a limit is not a `Limit`, or the interval is out of its range.
    """

    KIND: ClassVar[str] = "static-limits"
    INTERVALS: ClassVar[tuple[float, float]] = (1e-6, 1e6)

    _vms: Mapping[str, Limit] | None = None
    _tenants: Mapping[str, Limit] | None = None
    _host: Limit | None = None

    def __attrs_post_init__(self) -> None:
        self._by_vm = _checked("vms", self._vms)
        self._by_tenant = _checked("tenants", self._tenants)
        optional_limit("host", self._host)
        super().__attrs_post_init__()
        self._places, self._generations = Once(), Once()
        self._seen: dict[str, int] = {}  # generations of the VMs that were limited at the last tick
        self._time = 0

    @property
    def interval(self) -> float | None:
        return self._interval if self._by_vm or self._places.waiting else None

    def tenant_limit(self, tenant: str) -> Limit | None:
        """The limit of a tenant of that name. None: this policy has no limit for the tenant."""
        found = _find(self._by_tenant, tenant)
        return None if found is None else found[1]

    def decide(self, facts: Facts) -> list[Throttle]:
        self._time, self._seen = facts.time, {}
        return list(self._new(facts))

    def refused(self, action: Action, reason: str) -> None:
        """Note that a limit is not in force, so that the policy asks for it again."""
        if action.vm is None:
            self._places.refused(action.tenant if isinstance(action, Throttle) else None, self._time)
        elif action.vm in self._seen:
            self._generations.refused((action.vm, self._seen[action.vm]), self._time)

    def _new(self, facts: Facts) -> Iterator[Throttle]:
        if self._host is not None and self._places.due(None, facts.time):
            yield Throttle(limit=self._host, meter=self.meter, reason="static limit of the host")
        for name in facts.tenants:
            if not self._places.due(name, facts.time):
                continue
            if (found := _find(self._by_tenant, name)) is not None:
                pattern, limit = found
                yield Throttle(
                    tenant=name,
                    limit=limit,
                    meter=self.meter,
                    reason=f"static limit of tenant {name}",
                    evidence={"pattern": pattern},
                )
        if not self._by_vm:
            return
        self._generations.forget(facts.gone)
        for name, vm in facts.vms.items():
            if not self._generations.due(
                (name, vm.generation), facts.time
            ):  # a new VM of that name starts without limits
                continue
            self._seen[name] = vm.generation
            if (found := _find(self._by_vm, name)) is not None:
                pattern, limit = found
                yield Throttle(
                    vm=name,
                    generation=vm.generation,
                    limit=limit,
                    meter=self.meter,
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
