"""A limit as it is set in several places: by the spec or `set_limit`, and by those that throttle on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from ..model.spec import Limit, Meter, tightest
from ..native.core import Bucket, VcpuCore
from ..native.shared import SharedBucket
from .desired import LimitStack

__all__ = ["Budget", "Budgets", "connect", "limits_of", "make_budgets", "tightest"]


class Budget:
    """One bucket with its limits: `limits` is the one record of them (see `desired`), and the bucket enforces it."""

    __slots__ = ("bucket", "limits")

    def __init__(self, limits: LimitStack | Limit | None, now: int) -> None:
        self.bucket = Bucket()
        self.put(limits if isinstance(limits, LimitStack) else LimitStack(limits), now)

    @property
    def base(self) -> Limit | None:
        """The limit itself, without those that throttle on top of it."""
        return self.limits.base

    @property
    def limit(self) -> Limit | None:
        """What is in force."""
        return self.bucket.limit

    def put(self, limits: LimitStack, now: int) -> None:
        """Have these limits from now on."""
        self.limits = limits
        self.bucket.set(limits.in_force, now)

    def set_base(self, limit: Limit | None, now: int) -> None:
        self.put(self.limits.with_base(limit), now)

    def set_throttle(self, by: str | None, limit: Limit | None, now: int) -> None:
        """`by`: who asks (a policy's name; None: a caller). Each has one throttle, and the tightest counts."""
        self.put(self.limits.with_throttle(by, limit), now)

    def close(self) -> None:
        self.bucket.close()


Budgets: TypeAlias = Mapping[Meter, Budget]
"""One level's budgets, by meter."""


def make_budgets(limits: Mapping[Meter, LimitStack] | Mapping[Meter, Limit | None], now: int) -> Budgets:
    return {meter: Budget(limits[meter], now) for meter in Meter}


def limits_of(owner: object, prefix: str = "") -> Mapping[Meter, Limit | None]:
    """Those that a spec or a tenant asks for. `prefix`: of the fields' names."""
    return {meter: getattr(owner, prefix + meter.field) for meter in Meter}


def connect(core: VcpuCore, levels: tuple[Budgets, Budgets, Budgets, Budgets]) -> None:
    """Stack the buckets of its fleet, its tenant, its VM and its own on a vCPU, below those that the host's processes
    share. Where none are shared, the fleet's are the host's. Before it runs.
    """
    own, *narrower = levels
    shared = core.fleet.shared
    stack: list[Bucket | SharedBucket | None] = []
    for meter in Meter:
        fleet = own[meter].bucket
        stack += [fleet, None] if shared is None else [shared.buckets[meter], fleet]
        stack += [budgets[meter].bucket for budgets in narrower]
    core.set_buckets(stack)
