"""A file of rules: read, and checked as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from ..fleet.spec import FleetSpec
from ..model.codec import At, CodecError, Reading, Wrong
from ..model.decoding import BAD
from ..model.mistakes import meant, shown
from ..model.spec import Limit, Tenant
from ..policy import Guard, Policy, PolicySpec
from . import toml as tomlfile
from .forms import dialect, tables

__all__ = ["PolicyRule", "Rules", "load_fleet", "load_rules", "parse_rules", "stamp_of"]

Stamp: TypeAlias = tuple[int, int, int]


@attrs.frozen
class PolicyRule:
    """One policy of a file.

    Attributes:
        name: as in the journal.
        kind: see `orchestra.policy_kinds`.
        says: what the file says of it. Two rules that say the same make the same policy.
        policy: an instance of its own, that has seen nothing yet.
    """

    name: str
    kind: str
    says: PolicySpec | None
    policy: Policy = attrs.field(eq=False)

    @classmethod
    def from_data(cls, data: object, reading: Reading, at: At) -> Any:
        """For the codec."""
        says = PolicySpec.from_data(data, reading, at)
        if says is BAD:
            return BAD
        policy = says.make()
        return cls(policy.name, says.kind, says, policy)


@attrs.frozen
class _File:
    """What a file may say."""

    limit: Limit | None = None
    exit_limit: Limit | None = None
    answer_limit: Limit | None = None
    tenants: Mapping[str, Tenant] = attrs.field(factory=dict)
    guard: Guard | None = None
    policies: tuple[PolicyRule, ...] = ()

    def __attrs_post_init__(self) -> None:
        if mistakes := [*self._mistakes()]:
            raise CodecError(mistakes)

    def _mistakes(self) -> Iterator[Wrong]:
        """What does not go together."""
        names: list[str] = []
        for i, entry in enumerate(self.policies):
            if entry.name in names:
                text = "another policy has that name; give this one a `name` of its own"
                yield Wrong(("policies", i), f"{shown(entry.name)}: {text}")
            names.append(entry.name)
        dry = () if self.guard is None or isinstance(self.guard.dry_run, bool) else self.guard.dry_run
        for pattern in dry:
            if not any(fnmatchcase(name, pattern) for name in names):
                known = ", ".join(names) or "none"
                text = f"no policy has that name; there are: {known}{meant(pattern, names)}"
                yield Wrong(("guard", "dry_run"), f"{shown(pattern)}: {text}")


_RULES = dialect({tuple[PolicyRule, ...]: tables(list, "[[policies]] tables")})


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
    said = tomlfile.structure(text, _File, file, _RULES)
    return Rules(
        file=file,
        entries=said.policies,
        guard=said.guard,
        limit=said.limit,
        exit_limit=said.exit_limit,
        answer_limit=said.answer_limit,
        tenants=said.tenants,
    )


def load_fleet(path: Path | str) -> FleetSpec:
    """A fleet from a TOML file: its keys are the fields of `FleetSpec`, written as in a file of rules.

    Raises:
        TomlError, OSError: as `load_rules`.
    """
    return tomlfile.read(Path(path), FleetSpec, dialect())
