"""Other rules for a fleet that runs: what has changed is changed, and what has not keeps its memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import attrs
import trio

from ..model.actions import Reload
from ..model.errors import OrchestraError
from ..model.spec import Limit, Meter, Tenant
from ..policy import Guard, Policy
from .file import Rules, load_rules, stamp_of
from .toml import TomlError

__all__ = ["Change", "Reloadable", "compare", "reload", "watch_rules"]

log: Final = logging.getLogger("orchestra.policy")


class Reloadable(Protocol):
    """What a fleet offers for it."""

    async def set_policies(self, policies: Sequence[Policy], guard: Guard | None = None) -> None:
        """Have these policies decide from now on, in this order.

        One that is there already (the same object) keeps its seat, its next tick and what it holds. What one that is
        not there any more holds is let go (`orchestra.model.effects.Holdings`) before the others decide. `guard`
        None: it stays; another one goes on with what was done so far.
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
    """What is different in other rules.

    Attributes:
        policies: of each, whether it is "new", "changed", "gone" or "kept".
        order: of those that stay, another one goes first now.
        guard: it has other settings.
        limits: limits that are different, as (meter, tenant or None for the host, limit).
        later: what takes another fleet: tenants that come or go or weigh something else.
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
    """What is different."""
    before = {entry.name: entry for entry in old.entries}
    after = {entry.name: entry for entry in new.entries}
    became = {
        name: "new" if name not in before else "kept" if before[name] == entry else "changed"
        for name, entry in after.items()
    }
    # A rehearsal remembers what was not done: it does not become real, nor the other way round.
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
        guard=old.guard_says != new.guard_says,
        limits=tuple(limits),
        later=tuple(later),
    )


async def reload(fleet: Reloadable, old: Rules, new: Rules) -> Rules:
    """Put other rules in force. Policies of which the file says the same keep their memory and what they hold.

    It is journaled as a `Reload`, with what has changed.

    Parameters:
        old: what is in force: what the fleet was opened with, or what the last reload returned.

    Returns:
        What is in force now: `new`, with the instances that were kept, and the tenants that the fleet was opened with.

    Raises:
        OrchestraError: the fleet can't, such as limit bus locks where it does not see them. Nothing has changed then.

    Cancelled, all of it is done, or nothing.
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
    # What a fleet may refuse comes first, and what it was not refused is done to the end.
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
    """A tenant of a fleet: its weight, and that it is one, stay until the fleet is opened anew."""
    return old if new is None else attrs.evolve(new, weight=old.weight)


async def watch_rules(fleet: Reloadable, rules: Rules, path: Path | str | None = None, *, every: float = 1.0) -> None:
    """Reload a file whenever it has changed since `rules` were read, until cancelled. Rules that can't be are journaled
    and not taken.

    Parameters:
        rules: what the fleet was opened with.
        path: the file. Default: the one that `rules` are from.
        every: seconds between two looks at it.
    """
    file = Path(rules.file if path is None else path)
    seen = rules.stamp
    while True:
        await trio.sleep(every)
        stamp = stamp_of(file)
        if stamp is None or stamp == seen:  # one that is being replaced may be away for a moment
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
        except OrchestraError as error:  # this fleet can't, such as limit bus locks where they are not seen
            log.error("rules not taken: %s", error)
            await fleet.apply(Reload(reason=f"{file}: not taken: {error}"))
