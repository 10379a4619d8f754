"""A policy in an engine: its checked name, interval and signals, and its state between two decisions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import attrs

from ..model.errors import SpecError
from .dry_run import DryRun
from .facts import Policy

__all__ = ["PolicyState", "PolicyStatus", "check_policies", "interval_of"]


@attrs.frozen
class PolicyStatus:
    """How a policy does.

    Attributes:
        name: the policy's name.
        on: False once the policy raised, or has no interval any more.
        error: why the policy was switched off. None: it raised nothing.
        actions: how many actions the policy asked for.
    """

    name: str
    on: bool
    error: str | None
    actions: int


@attrs.define(eq=False)
class PolicyState:
    """A policy between two decisions. Times are nanoseconds on the engine's clock.

    Attributes:
        name, signals: as the policy gave them at first. They are kept, as a property that is read again might raise in
            a place where nobody expects an error.
        order: the policy's place among the policies; a lower one goes first.
        since: when the policy decided last, or was added.
        due: when the policy decides next.
        interval: time between two decisions, as read after the last decision. None: the policy decides no more.
        on: False once the policy raised, or has no interval any more.
        dry_run: the fleet as a dry run shows it. None: what the policy decides is done.
        window: what the source of facts has opened for the policy.
    """

    policy: Policy
    name: str
    signals: tuple[str, ...]
    order: int
    since: int
    due: int
    interval: int | None
    dry_run: DryRun | None = None
    window: Any = None
    on: bool = True
    error: str | None = None
    actions: int = 0

    @classmethod
    def of(cls, policy: Policy, order: int, now: int, dry_run: DryRun | None) -> PolicyState:
        """The state of a policy that is new.

        Facts are about an interval, so a policy with an interval decides first when one interval has passed.

        Raises:
            SpecError: the policy's name, interval or signals are not valid.
        """
        interval = interval_of(policy)
        due = now + (interval or 0)
        return cls(policy, _name(policy), _signals(policy), order, now, due, interval, dry_run)

    @property
    def status(self) -> PolicyStatus:
        return PolicyStatus(self.name, self.on, self.error, self.actions)


def check_policies(policies: Iterable[Policy]) -> list[Policy]:
    """Check policies alone and together, and return them as a list.

    Raises:
        SpecError: an object is no policy, two policies have the same name, or an attribute of a policy raises.
    """
    checked = list(policies)
    for policy in checked:
        for what in ("name", "interval", "meter"):
            _ask(policy, what)
        if not isinstance(policy, Policy):
            raise SpecError(f"policies: {policy!r} must have a name, an interval and decide(facts)")
        _signals(policy)
    names = [_name(policy) for policy in checked]
    for name in names:
        if names.count(name) > 1:  # limits, and rows of the journal, name the policy that they belong to
            raise SpecError(f"policies: two are named {name!r}; give each a name of its own (name=...)")
    return checked


def interval_of(policy: Policy) -> int | None:
    """A policy's interval in nanoseconds.

    Raises:
        SpecError: the interval is neither None nor at least a microsecond, or reading it raises.
    """
    interval = _ask(policy, "interval")
    if interval is None:
        return None
    if isinstance(interval, bool) or not isinstance(interval, int | float) or not 1e-6 <= interval < math.inf:
        raise SpecError(
            f"policy {_name(policy)!r}: interval={interval!r}: must be seconds, at least 1e-6, or None for only once"
        )
    return round(interval * 1e9)


def _ask(policy: Policy, what: str, default: Any = None) -> Any:
    """Read an attribute of a policy. A property is the policy's code, so it may raise anything."""
    try:
        return getattr(policy, what, default)
    except Exception as error:
        raise SpecError(f"policies: {type(policy).__name__}: {what}: {type(error).__name__}: {error}") from error


def _name(policy: Policy) -> str:
    name = _ask(policy, "name")
    if not isinstance(name, str) or not name:
        raise SpecError(f"policies: {type(policy).__name__}: name={name!r}: must be a text")
    return name


def _signals(policy: Policy) -> tuple[str, ...]:
    """The names of the host's signals that a policy needs."""
    signals = _ask(policy, "signals", ())
    if not isinstance(signals, Collection) or isinstance(signals, str) or not all(isinstance(s, str) for s in signals):
        raise SpecError(f"policies: {type(policy).__name__}: signals={signals!r}: must be names of signals")
    return tuple(signals)
