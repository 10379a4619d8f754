"""Policies for some VMs only. Several policies can act side by side without any help, as their limits stack."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import attrs

from ..model.actions import Action, SetIoLimit, SetLimit, Throttle, Unthrottle
from ..model.errors import SpecError
from ..model.spec import Meter
from .facts import Facts, Policy, VmFacts

__all__ = ["Only", "only"]


def only(
    policy: Policy,
    vms: str | Iterable[str] | None = None,
    tenants: str | Iterable[str] | None = None,
    name: str | None = None,
) -> Only:
    """Let a policy act only on the VMs whose names and tenants fit.

    The policy finds these VMs and their tenants in `Facts.vms` and `Facts.tenants`. So a `WeightedShare` shares its
    budget among them. The other VMs are in `Facts.others`. So an `Adaptive` or a `Ladder` sees what they suffer, and
    holds its own VMs for it. The host's limits and signals stay those of the whole host.

    Parameters:
        policy: a policy that is used nowhere else, as it remembers the VMs that it saw.
        vms, tenants: patterns as in a shell, one or several. A VM must fit one pattern of each. None: all fit.
        name: the name in the journal. Default: the policy's name with the patterns.

    Raises:
        SpecError: neither is given, or one is empty.
    """
    return Only(policy, vms, tenants, name)


class Only:
    """A policy that acts on some VMs only; made by `only`."""

    def __init__(
        self,
        policy: Policy,
        vms: str | Iterable[str] | None = None,
        tenants: str | Iterable[str] | None = None,
        name: str | None = None,
    ) -> None:
        if vms is None and tenants is None:
            raise SpecError("vms=None, tenants=None: say which, or take the policy as it is")
        self.policy = policy
        self.vms, self.tenants = _patterns("vms", vms), _patterns("tenants", tenants)
        chosen = [*(self.vms or ()), *(f"{tenant}/" for tenant in self.tenants or ())]
        self._name = name or f"{policy.name}[{','.join(chosen)}]"

    @property
    def name(self) -> str:
        return self._name

    @property
    def interval(self) -> float | None:
        return self.policy.interval

    @property
    def meter(self) -> Meter | None:
        return getattr(self.policy, "meter", None)

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(getattr(self.policy, "signals", ()))

    def decide(self, facts: Facts) -> list[Action]:
        """Let the policy decide on its own VMs.

        Raises:
            SpecError: the policy asked for an action on other VMs. A fleet then switches the policy off.
        """
        vms: dict[str, VmFacts] = {}
        others = dict(facts.others)
        for name, vm in facts.vms.items():
            (vms if _fits(self.vms, name) and _fits(self.tenants, vm.tenant) else others)[name] = vm
        tenants = {name: tenant for name, tenant in facts.tenants.items() if _fits(self.tenants, name)}
        seen = attrs.evolve(facts, vms=vms, others=others, tenants=tenants)
        actions = list(self.policy.decide(seen))
        for action in actions:
            self._check(action)
        return actions

    def refused(self, action: Action, reason: str) -> None:
        """Tell the policy of a refusal, if the policy has a method for it."""
        if (refused := getattr(self.policy, "refused", None)) is not None:
            refused(action, reason)

    def _check(self, action: Action) -> None:
        if action.vm is not None:
            if not _fits(self.vms, action.vm):
                raise SpecError(f"action={action!r}: {self.name} is for VMs named {', '.join(self.vms or ())} only")
            return
        tenant = action.tenant if isinstance(action, Throttle | Unthrottle | SetLimit | SetIoLimit) else None
        # A tenant's limit holds all VMs of that tenant, so patterns of VM names rule it out.
        if tenant is None or self.vms is not None or not _fits(self.tenants, tenant):
            raise SpecError(f"action={action!r}: {self.name} acts on some VMs only, and this holds others as well")


def _patterns(field: str, given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else tuple(given)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise SpecError(f"{field}={given!r}: must be a pattern such as 'web-*', or several")
    return patterns


def _fits(patterns: tuple[str, ...] | None, name: str) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
