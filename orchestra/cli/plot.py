"""A picture of a demo's run. The only module that imports matplotlib."""

from __future__ import annotations

from pathlib import Path

from ..errors import OrchestraError
from .account import Result
from .story import EVENTS

try:
    # mypy may well be run where this extra is not installed.
    from matplotlib import rc_context  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
except ImportError as error:
    raise OrchestraError(f"--plot needs matplotlib ({error}): pip install 'orchestra[plot]'") from None

__all__ = ["draw"]

NOISY = ("#b3261e", "#e0701a", "#8a3ffc", "#c2185b")
QUIET = "#1f6f8b"


def draw(result: Result, path: Path) -> None:
    """Write an SVG: above, the noisy VMs' events a second and their budgets; below, what the quiet ones got done.

    Raises:
        OrchestraError: the file can't be written.
    """
    with rc_context({"svg.hashsalt": "orchestra", "font.size": 9}):
        figure = Figure(figsize=(8, 5.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        times = [sample.time for sample in result.samples]
        for i, vm in enumerate(result.noisy[: len(NOISY)]):
            rows = [next(row for row in sample.rows if row.name == vm.name) for sample in result.samples]
            above.plot(times, [max(row.rate, 0.1) for row in rows], color=NOISY[i], label=vm.name)
            budgets = [float("nan") if row.budget is None else row.budget for row in rows]
            above.step(times, budgets, color=NOISY[i], linestyle=":", linewidth=1, where="pre")
        above.set_yscale("log")
        above.set_ylabel(f"{EVENTS[result.meter]} a second (budgets dotted)")
        above.legend(loc="upper right", frameon=False)
        for vm in result.quiet:
            rows = [next(row for row in sample.rows if row.name == vm.name) for sample in result.samples]
            below.plot(times, [row.work_rate for row in rows], color=QUIET, linewidth=0.7, alpha=0.5)
        if result.quiet:
            each = [[row.work_rate for row in sample.rows if not row.noisy] for sample in result.samples]
            means = [sum(rates) / len(rates) for rates in each]
            below.plot(times, means, color=QUIET, linewidth=2.2, label="mean of the quiet VMs")
            below.legend(loc="upper left", frameon=False)
        below.set_ylim(bottom=0)
        below.set_ylabel("quiet VMs: own work a second")
        below.set_xlabel("seconds")
        for act in result.acts:
            start = next((sample.time for sample in result.samples if sample.act == act.number), None)
            if start is not None:
                for axes in (above, below):
                    axes.axvline(start, color="#999999", linewidth=0.6)
                above.annotate(
                    f"{act.number}: {act.title}",
                    (start, 1.02),
                    xycoords=("data", "axes fraction"),
                    fontsize=8,
                )
        try:
            figure.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise OrchestraError(f"--plot {path}: {error.strerror or error}") from None
