"""A file of rules: read, and checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import attrs

from ..model.errors import SpecError
from ..model.spec import Limit, Meter, Tenant
from ..policy import Guard, Policy, only
from . import toml as tomlfile
from .kinds import build, make_policy, rules_converter, table
from .toml import Inside, Mistaken, meant, shown

__all__ = ["PolicyRule", "Rules", "load_rules", "parse_rules", "read_policy", "stamp_of"]

Stamp: TypeAlias = tuple[int, int, int]


@attrs.frozen
class PolicyRule:
    """One policy of a file.

    Attributes:
        name: as in the journal.
        kind: see `kinds`.
        says: its table, as it stands in the file. Two rules that say the same make the same policy.
        policy: an instance of its own, that has seen nothing yet.
    """

    name: str
    kind: str
    says: Mapping[str, Any] = attrs.field(hash=False)
    policy: Policy = attrs.field(eq=False)


@attrs.frozen
class Rules:
    """What a file says.

    Attributes:
        file: its name.
        entries: the policies, in the order in which their words count.
        guard: None: the file says nothing about it.
        limit, exit_limit, answer_limit, tenants: as `open_fleet` takes them.
        stamp: what the file was when it was read (see `stamp_of`); None: it was no file.
    """

    file: str
    entries: tuple[PolicyRule, ...] = ()
    guard: Guard | None = attrs.field(default=None, eq=False)
    limit: Limit | None = None
    exit_limit: Limit | None = None
    tenants: Mapping[str, Tenant] = attrs.field(factory=dict, hash=False)
    guard_says: Mapping[str, Any] = attrs.field(factory=dict, hash=False, repr=False)
    stamp: Stamp | None = attrs.field(default=None, eq=False, repr=False)
    answer_limit: Limit | None = None

    @property
    def policies(self) -> tuple[Policy, ...]:
        """For `open_fleet`. Policies remember, so give them to one fleet only; read the file again for another."""
        return tuple(entry.policy for entry in self.entries)


def load_rules(path: Path | str) -> Rules:
    """Rules from a file.

    Raises:
        TomlError: it says what can't be; all mistakes at once, each with its line and key.
        OSError: it can't be read.
    """
    path = Path(path)
    stamp = stamp_of(path)  # before it is read: a change that comes between is seen by the next look
    return attrs.evolve(parse_rules(path.read_bytes(), str(path)), stamp=stamp)


def stamp_of(file: Path) -> Stamp | None:
    """What changes when a file does; None: it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def parse_rules(text: str | bytes, file: str = "rules") -> Rules:
    """The same for text that is there already; `file` is what it is called in errors."""
    made = rules_converter()
    made.register_structure_hook(Rules, lambda value, _: _rules(made, value, file))
    return tomlfile.structure(text, Rules, file, made)


_KEYS = (*(meter.field for meter in Meter), "tenants", "guard", "policies")


def _rules(made: Any, said: Mapping[str, Any], file: str) -> Rules:
    mistakes: list[Exception] = [
        Mistaken(f"no such key; there are: {', '.join(_KEYS)}{meant(key, _KEYS)}", key)
        for key in said
        if key not in _KEYS
    ]
    found: dict[str, Any] = {}
    for key in (meter.field for meter in Meter):
        if key in said:
            try:
                found[key] = made.structure(said[key], Limit)
            except Exception as error:
                mistakes.append(Inside(error, key))
    tenants: dict[str, Tenant] = {}
    for name, one in _items(said, "tenants", dict, mistakes):
        try:
            tenants[name] = build(made, Tenant, table(one), name=name)
        except Exception as error:
            mistakes.append(Inside(error, "tenants", name))
    guard: Guard | None = None
    if "guard" in said:
        try:
            guard = made.structure(said["guard"], Guard)
        except Exception as error:
            mistakes.append(Inside(error, "guard"))
    entries: list[PolicyRule] = []
    for i, one in _items(said, "policies", list, mistakes):
        try:
            entry = read_policy(made, one)
        except Exception as error:
            mistakes.append(Inside(error, "policies", i))
            continue
        if entry.name in [other.name for other in entries]:
            text = f"{shown(entry.name)}: another policy has that name; give this one a `name` of its own"
            mistakes.append(Mistaken(text, "policies", i, *(["name"] if "name" in one else [])))
        entries.append(entry)
    if guard is not None and not isinstance(guard.dry_run, bool) and not mistakes:
        mistakes += _unknown_names(guard.dry_run, [entry.name for entry in entries])
    if mistakes:
        raise ExceptionGroup("rules", mistakes)
    return Rules(
        file=file,
        entries=tuple(entries),
        guard=guard,
        tenants=MappingProxyType(tenants),
        guard_says=said.get("guard", {}),
        **found,
    )


def _items(said: Mapping[str, Any], key: str, kind: type[Any], mistakes: list[Exception]) -> list[tuple[Any, Any]]:
    value: Any = said.get(key, kind())
    if not isinstance(value, kind):
        how = "[[policies]] tables" if kind is list else "[tenants.NAME] tables"
        mistakes.append(Mistaken(f"{shown(value)}: must be {how}", key))
        return []
    return list(enumerate(value)) if kind is list else list(value.items())


def read_policy(made: Any, said: Any) -> PolicyRule:
    """One of a file's policies: a table, or just its kind.

    It raises what is wrong as `build` does.
    """
    if isinstance(said, str):
        said = {"kind": said}
    kind = table(said).get("kind")
    if not isinstance(kind, str):
        raise Mistaken("is missing: which policy" if kind is None else f"{shown(kind)}: must be a text", "kind")
    rest = {key: value for key, value in said.items() if key not in ("kind", "only")}
    mistakes: list[Exception] = []
    chosen: Mapping[str, Any] | None = None
    if "only" in said:
        if "name" in rest:  # it is that of the whole
            rest.pop("name")
        try:
            chosen = _only(said["only"])
        except Exception as error:
            mistakes.append(Inside(error, "only"))
    policy: Policy | None = None
    try:
        policy = make_policy(made, kind, rest)
    except Exception as error:
        mistakes.append(error)
    if chosen is not None and policy is not None:
        name = said.get("name")
        if name is not None and not isinstance(name, str):
            mistakes.append(Mistaken(f"{shown(name)}: must be a text", "name"))
        else:
            policy = only(policy, chosen.get("vms"), chosen.get("tenants"), name)
    if mistakes or policy is None:
        raise ExceptionGroup("policy", mistakes)
    return PolicyRule(policy.name, kind, MappingProxyType(dict(said)), policy)


def _only(said: Any) -> Mapping[str, Any]:
    chosen = table(said)
    known = ("vms", "tenants")
    mistakes: list[Exception] = []
    for key, value in chosen.items():
        names = [value] if isinstance(value, str) else value
        if key not in known:
            mistakes.append(Mistaken(f"no such key; there are: {', '.join(known)}{meant(key, known)}", key))
        elif not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
            mistakes.append(Mistaken(f"{shown(value)}: must be a pattern such as 'web-*', or several", key))
    if not chosen:
        mistakes.append(SpecError("say which: vms = 'web-*', tenants = ['acme']"))
    if mistakes:
        raise ExceptionGroup("only", mistakes)
    return chosen


def _unknown_names(patterns: tuple[str, ...], names: list[str]) -> list[Mistaken]:
    known = ", ".join(names) or "none"
    return [
        Mistaken(
            f"{shown(pattern)}: no policy has that name; there are: {known}{meant(pattern, names)}",
            "guard",
            "dry_run",
        )
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
