"""A limit as it is set in several places: by the spec or `set_limit`, and by those that throttle on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from ..model.spec import Limit, Meter, tightest
from ..native.core import Bucket, VcpuCore

__all__ = ["HOST", "TENANT", "VCPU", "VM", "Budget", "Budgets", "connect", "limits_of", "make_budgets", "tightest"]

HOST, TENANT, VM, VCPU = range(4)
"""Levels, from the widest bucket to the narrowest."""


class Budget:
    """One bucket with its limits."""

    __slots__ = ("_throttles", "base", "bucket")

    def __init__(self, base: Limit | None, now: int) -> None:
        self.bucket = Bucket()
        self.base = base
        self._throttles: dict[str | None, Limit] = {}
        self.bucket.set(base, now)

    @property
    def limit(self) -> Limit | None:
        """What is in force."""
        return self.bucket.limit

    def set_base(self, limit: Limit | None, now: int) -> None:
        self.base = limit
        self._set(now)

    def set_throttle(self, by: str | None, limit: Limit | None, now: int) -> None:
        """`by`: who asks (a policy's name; None: a caller). Each has one throttle, and the tightest counts."""
        if limit is None:
            self._throttles.pop(by, None)
        else:
            self._throttles[by] = limit
        self._set(now)

    def _set(self, now: int) -> None:
        self.bucket.set(tightest(self.base, self._throttles.values()), now)

    def close(self) -> None:
        self.bucket.close()


Budgets: TypeAlias = Mapping[Meter, Budget]
"""One level's budgets, by meter."""


def make_budgets(limits: Mapping[Meter, Limit | None], now: int) -> Budgets:
    return {meter: Budget(limits[meter], now) for meter in Meter}


def limits_of(owner: object, prefix: str = "") -> Mapping[Meter, Limit | None]:
    """Those that a spec or a tenant asks for. `prefix`: of the fields' names."""
    return {meter: getattr(owner, prefix + meter.field) for meter in Meter}


def connect(core: VcpuCore, levels: tuple[Budgets, Budgets, Budgets, Budgets]) -> None:
    """Stack the four levels' buckets on a vCPU. Before it runs."""
    core.set_buckets([budgets[meter].bucket for meter in Meter for budgets in levels])
