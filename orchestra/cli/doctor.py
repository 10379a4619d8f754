"""``orchestra doctor``: what this host can do, and what to do about the rest."""

from __future__ import annotations

import json

from ..host.doctor import AUTO, Report, examine

__all__ = ["doctor"]


def doctor(*, as_json: bool, capabilities: bool, report: Report | None = None) -> int:
    """Look, and show it; the exit status."""
    report = examine() if report is None else report
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        from .render import show_report

        show_report(report, capabilities)
    # Other problems than this one slow guests down or bound how many there can be.
    return 1 if any(finding.check == AUTO for finding in report.problems) else 0
