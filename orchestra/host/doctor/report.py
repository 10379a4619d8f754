"""The findings of the checks and their summary: plain data, for a person and for JSON."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import attrs

from ...backend.detection import Pick
from ...model.codec import encode

__all__ = ["AUTO", "Finding", "Report", "Status", "Verdict"]

Status: TypeAlias = Literal["ok", "note", "problem"]

AUTO = 'backend="auto"'
"""The check that is a problem where no guest can run at all."""


@attrs.frozen
class Finding:
    """The result of one check.

    Attributes:
        check: what was checked, such as "RLIMIT_NOFILE".
        status: "ok"; "note" (works, and you should know); "problem" (something will not work, or will hurt).
        value: what was found.
        meaning: what follows from it.
        remedy: what to do, empty where there is nothing to do.
    """

    check: str
    status: Status
    value: str
    meaning: str
    remedy: str = ""


@attrs.frozen
class Verdict:
    """The findings in three sentences.

    Attributes:
        can: what this host can do.
        auto: what `backend="auto"` takes where bus locks need not be seen, and why.
        auto_bus_locks: what it takes where bus locks must be seen.
        todo: the most important thing to do.
    """

    can: str
    auto: Pick
    auto_bus_locks: Pick
    todo: str

    @property
    def lines(self) -> tuple[str, str, str]:
        """For a person."""
        plain, locks = self.auto, self.auto_bus_locks
        if plain.name is None:
            takes = f"takes none: {plain.why}"
        elif plain.name == locks.name:
            takes = f"takes {locks.why}"
        elif locks.name is None:
            takes = f"takes {plain.why}; where bus locks are needed, it takes none"
        else:
            takes = f"takes {plain.name}, and where bus locks are needed {locks.why}"
        return f"{self.can}.", f'backend="auto" {takes}.', f"{self.todo}."

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**encode(self), "lines": list(self.lines)}


@attrs.frozen
class Report:
    """What `examine` found; `capabilities` has KVM's by the kernel's names (empty without /dev/kvm)."""

    findings: tuple[Finding, ...]
    capabilities: dict[str, int]
    verdict: Verdict | None = None

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == "problem")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "findings": encode(self.findings),
            "capabilities": dict(self.capabilities),
        }
