"""Reads a file of rules, and checks it as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from .. import toml as tomlfile
from ..fleet.spec import FleetSpec
from ..model.codec import At, CodecError, Reading, Wrong
from ..model.decoding import BAD
from ..model.mistakes import meant, shown
from ..model.spec import Limit, Tenant
from ..policy import Guard, Policy, PolicySpec
from .forms import dialect, tables

__all__ = ["PolicyRule", "Rules", "load_fleet", "load_rules", "parse_rules", "stamp_of"]

Stamp: TypeAlias = tuple[int, int, int]


@attrs.frozen
class PolicyRule:
    """One policy of a file.

    Attributes:
        name: the policy's name in the journal.
        kind: the policy's kind; see `orchestra.policy_kinds`.
        says: the policy as the file describes it. Two rules with the same description are the same rule.
        policy: a policy made for this rule, which has seen nothing yet.
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
    """The keys that a file of rules may have."""

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
        """The mistakes that only the file as a whole can show."""
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
    """The content of a file of rules.

    Attributes:
        file: the name of the file.
        entries: the policies, in their order; a policy that goes first counts more for the guard.
        guard: the guard. None: the file has none.
        limit, exit_limit, answer_limit, tenants: as `open_fleet` takes them.
        stamp: the file's stamp when it was read (see `stamp_of`). None: the rules are from no file.
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
        """The policies for `open_fleet`. Policies remember VMs, so give them to one fleet only.

        For another fleet read the file again.
        """
        return tuple(entry.policy for entry in self.entries)


def load_rules(path: Path | str) -> Rules:
    """Read rules from a file.

    Raises:
        TomlError: the content is not valid. The error has all mistakes, each with its line and key.
        OSError: the file can't be read.
    """
    path = Path(path)
    stamp = stamp_of(path)  # before the file is read: a change in between is seen at the next look
    return attrs.evolve(parse_rules(path.read_bytes(), str(path)), stamp=stamp)


def stamp_of(file: Path) -> Stamp | None:
    """Time, size and inode of a file, which change when the file changes. None: the file is not there.

    The inode is among them as editors replace a file, and the new file may have the same time and size.
    """
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def parse_rules(text: str | bytes, file: str = "rules") -> Rules:
    """Read rules from text. `file` is the name that errors give the text.

    Raises:
        TomlError: the content is not valid. The error has all mistakes, each with its line and key.
    """
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
    """Read a fleet from a TOML file. Its keys are the fields of `FleetSpec`, written as in a file of rules.

    Raises:
        TomlError, OSError: as `load_rules`.
    """
    return tomlfile.read(Path(path), FleetSpec, dialect())
