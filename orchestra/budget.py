"""A limit as it is set in several places: by the spec or `set_limit`, and by those that throttle on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from .native.core import Bucket, VcpuCore
from .spec import Limit, Meter, tightest

__all__ = ["HOST", "TENANT", "VCPU", "VM", "Budget", "Budgets", "connect", "make_budgets", "tightest"]

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


def make_budgets(limit: Limit | None, exit_limit: Limit | None, now: int) -> Budgets:
    return {Meter.BUS_LOCKS: Budget(limit, now), Meter.EXITS: Budget(exit_limit, now)}


def connect(core: VcpuCore, levels: tuple[Budgets, Budgets, Budgets, Budgets]) -> None:
    """Stack the four levels' buckets on a vCPU. Before it runs."""
    core.set_buckets([budgets[meter].bucket for meter in Meter for budgets in levels])
