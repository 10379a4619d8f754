"""A limit as it is set in two places: by the spec or `set_limit`, and by an action that throttles on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from .native.core import Bucket, VcpuCore
from .spec import Limit, Meter

__all__ = ["HOST", "TENANT", "VCPU", "VM", "Budget", "Budgets", "effective", "make_budgets"]

HOST, TENANT, VM, VCPU = range(4)
"""Levels, from the widest bucket to the narrowest."""


def effective(base: Limit | None, throttle: Limit | None) -> Limit | None:
    """The tighter one: an action never loosens what was set."""
    if base is None or throttle is None:
        return throttle if base is None else base
    return throttle if throttle.rate < base.rate else base


class Budget:
    """One bucket with its limits."""

    __slots__ = ("base", "bucket", "throttle")

    def __init__(self, base: Limit | None, now: int) -> None:
        self.bucket = Bucket()
        self.base = base
        self.throttle: Limit | None = None
        self.bucket.set(base, now)

    @property
    def limit(self) -> Limit | None:
        """What is in force."""
        return self.bucket.limit

    def set_base(self, limit: Limit | None, now: int) -> None:
        self.base = limit
        self.bucket.set(effective(self.base, self.throttle), now)

    def set_throttle(self, limit: Limit | None, now: int) -> None:
        self.throttle = limit
        self.bucket.set(effective(self.base, self.throttle), now)

    def close(self) -> None:
        self.bucket.close()


Budgets: TypeAlias = Mapping[Meter, Budget]
"""One level's budgets, by meter."""


def make_budgets(limit: Limit | None, exit_limit: Limit | None, now: int) -> Budgets:
    return {Meter.BUS_LOCKS: Budget(limit, now), Meter.EXITS: Budget(exit_limit, now)}


def connect(core: VcpuCore, levels: tuple[Budgets, Budgets, Budgets, Budgets]) -> None:
    """Stack the four levels' buckets on a vCPU. Before it runs."""
    for level, budgets in enumerate(levels):
        for meter, budget in budgets.items():
            core.set_bucket(meter, level, budget.bucket)
