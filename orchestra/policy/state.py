"""A policy in an engine: what it says of itself, checked, and where it is between two decisions."""

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
    """A policy's name, whether it is on, why it was switched off, and how many actions it asked for."""

    name: str
    on: bool
    error: str | None
    actions: int


@attrs.define(eq=False)
class PolicyState:
    """A policy between two decisions. Times are nanoseconds on the engine's clock.

    Attributes:
        name, signals: as it said at first: asked again, it might raise where nobody expects it.
        order: its place among the policies; lower goes first.
        since: when it decided last, or came.
        due: when it decides next.
        interval: between two decisions, as it said after the last; None: it decides no more.
        on: False once it raised, or has no interval any more.
        rehearsal: the fleet as a dry run shows it; None: what it decides is done.
        window: what the source of facts has opened for it.
    """

    policy: Policy
    name: str
    signals: tuple[str, ...]
    order: int
    since: int
    due: int
    interval: int | None
    rehearsal: DryRun | None = None
    window: Any = None
    on: bool = True
    error: str | None = None
    actions: int = 0

    @classmethod
    def of(cls, policy: Policy, order: int, now: int, rehearsal: DryRun | None) -> PolicyState:
        """A new one. Facts are about an interval, so one that ticks decides first when one has passed.

        Raises:
            SpecError: what it says of itself can't be.
        """
        interval = interval_of(policy)
        due = now + (interval or 0)
        return cls(policy, _name(policy), _signals(policy), order, now, due, interval, rehearsal)

    @property
    def status(self) -> PolicyStatus:
        return PolicyStatus(self.name, self.on, self.error, self.actions)


def check_policies(policies: Iterable[Policy]) -> list[Policy]:
    """Raises:
    SpecError: one is no policy, or two have one name, or one raises when it is asked what it is.
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
        if names.count(name) > 1:  # its limits and its entries in the journal go by its name
            raise SpecError(f"policies: two are named {name!r}; give each a name of its own (name=...)")
    return checked


def interval_of(policy: Policy) -> int | None:
    """A policy's interval in nanoseconds.

    Raises:
        SpecError: it is none.
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
    """What a policy says of itself. Out of a property anything may come."""
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
    """The host's signals that a policy says it listens to."""
    signals = _ask(policy, "signals", ())
    if not isinstance(signals, Collection) or isinstance(signals, str) or not all(isinstance(s, str) for s in signals):
        raise SpecError(f"policies: {type(policy).__name__}: signals={signals!r}: must be names of signals")
    return tuple(signals)
