"""``orchestra policy check``: reports all mistakes in a file of rules, or else what the rules ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Rules, TomlError, load_rules
from ..model.codec import encode
from ..model.spec import Meter, Tenant

__all__ = ["check"]


def check(path: Path, *, as_json: bool) -> int:
    """Check the file. Returns the exit status: 1 if the file has a mistake.

    Raises:
        TomlError: without `as_json`: what is wrong with it.
    """
    try:
        rules = load_rules(path)
    except TomlError as error:
        if not as_json:
            raise
        mistakes = encode(error.mistakes)
        print(json.dumps({"file": str(path), "ok": False, "mistakes": mistakes}))
        return 1
    if as_json:
        print(json.dumps({"file": str(path), "ok": True, "mistakes": [], **document(rules)}))
    else:
        print(f"{path}: no mistakes")
        print(*(f"  {line}" for line in summary(rules)), sep="\n")
    return 0


def document(rules: Rules) -> dict[str, Any]:
    """For JSON."""
    return {
        **{meter.field: encode(getattr(rules, meter.field)) for meter in Meter},
        "tenants": encode(rules.tenants),
        "guard": encode(rules.guard),
        "policies": [
            {"name": entry.name, "kind": entry.kind, "interval": entry.policy.interval} for entry in rules.entries
        ],
    }


def summary(rules: Rules) -> Iterator[str]:
    """What the rules ask for, one line for each."""
    limits = _limits(rules)
    if limits:
        yield f"host: {limits}"
    for name, tenant in rules.tenants.items():
        yield f"tenant {name}: weight {tenant.weight:g}{_limits(tenant, ', ')}"
    guard = rules.guard
    for i, entry in enumerate(rules.entries, 1):
        every = entry.policy.interval
        when = "once" if every is None else f"every {every:g} s"
        dry = ", a dry run" if guard is not None and guard.is_dry(entry.name) else ""
        yield f"policy {i}: {entry.name} ({entry.kind}), {when}{dry}"
    if not rules.entries:
        yield "no policies"
    if guard is not None:
        yield (
            f"guard: at least {guard.floor:g} locks/s and {guard.exit_floor:g} exits/s and answers/s for each VM, "
            f"{100 * guard.cpu_floor:g} % of its CPU time; nothing waits longer than {guard.max_delay:g} s"
        )


def _limits(of: Rules | Tenant, before: str = "") -> str:
    nouns = {Meter.BUS_LOCKS: "locks", Meter.EXITS: "exits", Meter.ANSWERS: "answers"}
    known = ((getattr(of, meter.field), noun) for meter, noun in nouns.items())
    parts = [f"{limit.rate:g} {noun}/s" for limit, noun in known if limit is not None]
    return before + ", ".join(parts) if parts else ""
