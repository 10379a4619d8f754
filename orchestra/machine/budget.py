"""Limits that come from several sources: a base from the spec or `set_limit`, and throttles on top of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ..model.spec import Limit, Meter, tightest
from ..native.core import Bucket, Charged, VcpuCore
from ..native.shared import SharedBucket, SharedBuckets
from .desired import LimitStack

__all__ = ["Budget", "Budgets", "above", "connect", "limits_of", "make_budgets", "tightest"]


class Budget:
    """One bucket with its limits: `limits` records them (see `desired`), and the bucket enforces the tightest."""

    __slots__ = ("bucket", "limits")

    def __init__(self, limits: LimitStack | Limit | None, now: int) -> None:
        self.bucket = Bucket()
        self.put(limits if isinstance(limits, LimitStack) else LimitStack(limits), now)

    @property
    def base(self) -> Limit | None:
        """The limit without the throttles on top of it."""
        return self.limits.base

    @property
    def limit(self) -> Limit | None:
        """The limit in force: the tightest of base and throttles."""
        return self.bucket.limit

    def put(self, limits: LimitStack, now: int) -> None:
        """Put these limits into force. `now`: nanoseconds on the fleet's clock."""
        self.limits = limits
        self.bucket.set(limits.in_force, now)

    def set_base(self, limit: Limit | None, now: int) -> None:
        self.put(self.limits.with_base(limit), now)

    def set_throttle(self, by: str | None, limit: Limit | None, now: int) -> None:
        """Set or (None) remove the throttle of one asker. Each asker has at most one, and the tightest counts.

        Parameters:
            by: the policy that asks; None: a caller.
        """
        self.put(self.limits.with_throttle(by, limit), now)

    def close(self) -> None:
        self.bucket.close()


Budgets: TypeAlias = Mapping[Meter, Budget]
"""The budgets of one level (fleet, tenant, VM or vCPU), by meter."""


def make_budgets(limits: Mapping[Meter, LimitStack] | Mapping[Meter, Limit | None], now: int) -> Budgets:
    return {meter: Budget(limits[meter], now) for meter in Meter}


def limits_of(owner: object, prefix: str = "") -> Mapping[Meter, Limit | None]:
    """The limits that a spec or a tenant asks for, by meter. `prefix`: the beginning of the fields' names."""
    return {meter: getattr(owner, prefix + meter.field) for meter in Meter}


def connect(core: VcpuCore, levels: tuple[Budgets, Budgets, Budgets, Budgets]) -> None:
    """Give a vCPU its buckets, from the widest to the narrowest: host, fleet, tenant, VM, vCPU. Before the vCPU runs.

    The host's buckets are those that several processes share (`HostBudget`). Where the fleet shares none, the fleet's
    own buckets take the host's place, so that statistics name them "host".

    Parameters:
        levels: budgets of the fleet, the tenant, the VM and the vCPU.
    """
    own, *narrower = levels
    shared = core.fleet.shared
    stack: list[Bucket | SharedBucket | None] = []
    for meter in Meter:
        fleet = own[meter].bucket
        stack += [fleet, None] if shared is None else [shared.buckets[meter], fleet]
        stack += [budgets[meter].bucket for budgets in narrower]
    core.set_buckets(stack)


def above(shared: SharedBuckets | None, levels: Sequence[Budgets], meter: Meter) -> list[Charged]:
    """The buckets of these levels on one meter, with the host's before them if the fleet shares it (see `connect`)."""
    own: list[Charged] = [budgets[meter].bucket for budgets in levels]
    return own if shared is None else [shared.buckets[meter], *own]
