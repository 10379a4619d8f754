"""Puts new rules in force in a fleet that runs. What did not change in the rules keeps its memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import attrs
import trio

from ..model.actions import Reload
from ..model.checks import number
from ..model.codec import encode
from ..model.errors import OrchestraError, SpecError
from ..model.spec import Limit, Meter, Tenant
from ..policy import Guard, Policy
from ..toml import TomlError
from .file import Rules, load_rules, stamp_of

__all__ = ["Change", "Reloadable", "compare", "reload", "watch_rules"]

log: Final = logging.getLogger("orchestra.policy")


@runtime_checkable
class Reloadable(Protocol):
    """The methods of a fleet that a reload needs."""

    async def set_policies(self, policies: Sequence[Policy], guard: Guard | None = None) -> None:
        """Replace the policies by these, in this order.

        A policy that is there already (the same object) keeps its state, its next tick and what it holds. What a
        removed policy holds is released before the others decide. If `guard` is None, the guard stays. A new guard
        continues with the records of the old guard.
        """

    def check_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, tenant: str | None = None
    ) -> None:
        """Raise what `set_limit` would raise, and change nothing."""

    async def set_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, tenant: str | None = None
    ) -> None: ...
    async def apply(self, action: Reload) -> Any: ...


@attrs.frozen
class Change:
    """The difference between two sets of rules.

    Attributes:
        policies: for each policy, by name, whether it is "new", "changed", "gone" or "kept".
        order: the policies that stay have another order.
        guard: the guard has other settings.
        limits: the limits that differ, as (meter, tenant or None for the host, limit).
        later: differences that need a new fleet: tenants that come, go, or have another weight.
    """

    policies: Mapping[str, str]
    order: bool = False
    guard: bool = False
    limits: tuple[tuple[Meter, str | None, Limit | None], ...] = ()
    later: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.order or self.guard or self.limits or self.later or {*self.policies.values()} - {"kept"})

    def __str__(self) -> str:
        parts = []
        for what in ("new", "changed", "gone", "kept"):
            names = [name for name, became in self.policies.items() if became == what]
            if names:
                parts.append(f"{what}: {', '.join(names)}")
        if self.order:
            parts.append("in another order")
        if self.guard:
            parts.append("another guard")
        for meter, tenant, limit in self.limits:
            where = "the host" if tenant is None else f"tenant {tenant}"
            to = "none" if limit is None else f"{limit.rate:g}/s"
            parts.append(f"limit of {where} on {meter.replace('_', ' ')}: {to}")
        if self.later:
            parts.append(f"not before the fleet is opened anew: {', '.join(self.later)}")
        return "; ".join(parts) or "nothing has changed"


def compare(old: Rules, new: Rules) -> Change:
    """Find the difference between two sets of rules."""
    before = {entry.name: entry for entry in old.entries}
    after = {entry.name: entry for entry in new.entries}
    became = {
        name: "new" if name not in before else "kept" if before[name] == entry else "changed"
        for name, entry in after.items()
    }
    # A policy remembers what it asked for. So a policy that begins or ends a dry run is made anew: else it would take
    # actions for done that never were, or the other way round.
    was_guard, guard = (rules.guard or Guard() for rules in (old, new))
    became |= {
        name: "changed"
        for name, what in became.items()
        if what == "kept" and was_guard.is_dry(name) != guard.is_dry(name)
    }
    became |= {name: "gone" for name in before if name not in after}
    limits: list[tuple[Meter, str | None, Limit | None]] = []
    for meter in Meter:
        if getattr(old, meter.field) != (now := getattr(new, meter.field)):
            limits.append((meter, None, now))
    later = [f"tenant {name}" for name in sorted({*old.tenants} ^ {*new.tenants})]
    for name in sorted({*old.tenants} & {*new.tenants}):
        one, other = old.tenants[name], new.tenants[name]
        for meter in Meter:
            if getattr(one, meter.field) != (now := getattr(other, meter.field)):
                limits.append((meter, name, now))
        if one.weight != other.weight:
            later.append(f"weight of tenant {name}")
    return Change(
        policies=became,
        order=[name for name in before if name in after] != [name for name in after if name in before],
        guard=encode(old.guard) != encode(new.guard),
        limits=tuple(limits),
        later=tuple(later),
    )


async def reload(fleet: Reloadable, old: Rules, new: Rules) -> Rules:
    """Put new rules in force. Policies whose rules are the same keep their memory and what they hold.

    The journal gets a `Reload`, with what has changed. If the call is cancelled, either everything is done or nothing.

    Parameters:
        fleet: the fleet that runs.
        old: the rules in force: those that the fleet was opened with, or those that the last reload returned.
        new: the new rules.

    Returns:
        The rules in force now: `new`, with the policies that were kept, and the tenants that the fleet was opened with.

    Raises:
        OrchestraError: the fleet refuses a change, such as a limit on bus locks that it can't see. Nothing has changed
            then.
    """
    await trio.lowlevel.checkpoint()
    change = compare(old, new)
    there = {entry.name: entry for entry in old.entries}
    entries = tuple(there[entry.name] if change.policies[entry.name] == "kept" else entry for entry in new.entries)
    kept = attrs.evolve(
        new,
        entries=entries,
        guard=new.guard if change.guard else old.guard,
        tenants={name: _in_force(tenant, new.tenants.get(name)) for name, tenant in old.tenants.items()},
    )
    if not change:
        return kept
    # All checks come before the first change: a fleet that refuses one of them keeps its old rules as a whole.
    for meter, tenant, limit in change.limits:
        fleet.check_limit(limit, meter=meter, tenant=tenant)
    with trio.CancelScope(shield=True):  # nothing here waits for anything but a tick
        if change.order or change.guard or {*change.policies.values()} - {"kept"}:
            guard = (kept.guard or Guard()) if change.guard else None
            await fleet.set_policies(kept.policies, guard)
        for meter, tenant, limit in change.limits:
            await fleet.set_limit(limit, meter=meter, tenant=tenant)
        reason = f"{new.file}: {change}"
        log.info("other rules: %s", reason)
        await fleet.apply(Reload(policies=change.policies, reason=reason))
    return kept


def _in_force(old: Tenant, new: Tenant | None) -> Tenant:
    """A tenant with its new limits. Its weight, and the set of tenants, stay until the fleet is opened anew."""
    return old if new is None else attrs.evolve(new, weight=old.weight)


async def watch_rules(fleet: Reloadable, rules: Rules, path: Path | str | None = None, *, every: float = 1.0) -> None:
    """Reload a file whenever it has changed since `rules` were read. Runs until it is cancelled.

    Rules that are not valid, or that the fleet refuses, are not put in force. The journal and the log say why.

    Parameters:
        fleet: the fleet that runs.
        rules: the rules that the fleet was opened with.
        path: the file. Default: the file of `rules`.
        every: seconds between two looks at the file.

    Raises:
        SpecError: an argument is of another kind, or `every` is not more than 0.
    """
    if not isinstance(fleet, Reloadable):
        raise SpecError(f"fleet={fleet!r}: must be a fleet that runs")
    if not isinstance(rules, Rules):
        raise SpecError(
            f"rules={rules!r}: must be the rules that the fleet was opened with, as `load_rules` returns them"
        )
    if not isinstance(path, str | Path | None):
        raise SpecError(f"path={path!r}: must be the name of a file, or None for that of the rules")
    if number("every", every) <= 0:
        raise SpecError(f"every={every!r}: must be seconds, more than 0")
    file = Path(rules.file if path is None else path)
    seen = rules.stamp
    while True:
        await trio.sleep(every)
        stamp = stamp_of(file)
        if stamp is None or stamp == seen:  # a file that is being replaced may be missing for a moment
            continue
        seen = stamp
        try:
            new = await trio.to_thread.run_sync(load_rules, file)
        except TomlError as error:
            log.error("rules not taken: %s", error)
            mistakes = [str(mistake) for mistake in error.mistakes]
            what = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
            await fleet.apply(Reload(reason=f"{file}: not taken: {what}", evidence={"mistakes": mistakes}))
            continue
        except OSError as error:
            log.error("rules not read: %s", error)
            continue
        try:
            rules = await reload(fleet, rules, new)
        except OrchestraError as error:  # the fleet refuses, for example a limit on bus locks that it can't see
            log.error("rules not taken: %s", error)
            await fleet.apply(Reload(reason=f"{file}: not taken: {error}"))
