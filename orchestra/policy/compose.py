"""Policies for some VMs only. That several policies act side by side needs nothing: their limits stack."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import attrs

from ..model.actions import Action, SetLimit, Throttle, Unthrottle
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
    """Let a policy act on those VMs only whose names and tenants fit.

    `Facts.vms` and `Facts.tenants` are these: so a `WeightedShare` shares its budget among them. The others are in
    `Facts.others`: so an `Adaptive` or a `Ladder` hears what they suffer, and holds its own VMs for it. The host's
    limits and signals are those of the host.

    Parameters:
        policy: not used anywhere else, as it remembers things.
        vms, tenants: patterns as in a shell, one or several; a VM has to fit one of each. None: all.
        name: in the journal. Default: the policy's, with the patterns.

    Raises:
        SpecError: neither is given, or one is empty.
    """
    return Only(policy, vms, tenants, name)


class Only:
    """What `only` makes."""

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
        """Raises:
        SpecError: the policy asked for something outside of what it was made for. (A fleet switches it off then.)
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
        """Passed on to a policy that wants to know."""
        if (told := getattr(self.policy, "refused", None)) is not None:
            told(action, reason)

    def _check(self, action: Action) -> None:
        if action.vm is not None:
            if not _fits(self.vms, action.vm):
                raise SpecError(f"action={action!r}: {self.name} is for VMs named {', '.join(self.vms or ())} only")
            return
        tenant = action.tenant if isinstance(action, Throttle | Unthrottle | SetLimit) else None
        # A tenant's limit holds all of its VMs.
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
