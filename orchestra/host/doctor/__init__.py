"""What this host can do for orchestra, and what to change where it could do more. Reads only, and never raises.

The checks run one after another. Each gives a few lines: what was found, what follows, what to do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ...backend.detection import DETECTION, Found, pick
from ...backend.emulated import library
from ...backend.kvm.system import Kvm
from . import backends, buslocks, costs, limits, software
from .files import Host
from .report import AUTO, Finding, Report, Verdict

__all__ = ["AUTO", "Finding", "Report", "Verdict", "examine"]

CHECKS: Final[tuple[Callable[[Host], Iterator[Finding]], ...]] = (
    backends.dev_kvm,
    backends.linux,
    backends.cpu_templates,
    backends.unicorn,
    backends.picked,
    backends.kernel,
    backends.cpu,
    backends.virtualised,
    buslocks.bus_lock_exits,
    buslocks.bus_lock_flags,
    buslocks.split_lock_detect,
    buslocks.split_lock_mitigate,
    costs.nx_huge_pages,
    costs.favordynmods,
    costs.cpu_caps,
    costs.loop_priority,
    limits.open_files,
    limits.threads,
    limits.memory,
    limits.mappings,
    software.headers,
    software.extras,
    software.storage,
)
"""The checks in their order: later checks use what earlier checks found of the backends."""


def examine(
    root: Path = Path("/"),
    *,
    open_kvm: Callable[[Path], Kvm] = Kvm.open,
    importable: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
    load_unicorn: Callable[[], object] = library.load,
) -> Report:
    """Look at everything that decides what orchestra can do on this host.

    Parameters:
        root: where /proc, /sys, /dev and /usr are looked for.
        open_kvm: how KVM is opened.
        importable: whether a Python module of that name can be imported.
        load_unicorn: how the emulated backend's library is loaded.
    """
    host = Host(root, open_kvm, importable, load_unicorn)
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(host)
        except Exception as error:  # a broken check must not hide what the others found
            name = check.__name__.replace("_", " ")
            findings.append(Finding(name, "note", "unknown", f"could not be looked at: {error!r}"))
    return Report(tuple(findings), host.capabilities, _verdict(host, findings))


def _verdict(host: Host, findings: list[Finding]) -> Verdict:
    kvm, unicorn = host.found
    auto, locks = pick(host.found), pick(host.found, backends.BUS_LOCKS)
    names = [name for name, one in (("on KVM", kvm), ("on the emulated backend", unicorn)) if one.opens]
    if not names:
        can = "This host can run no guest: neither KVM nor the emulated backend works"
    else:
        sees = "on both" if len(names) == 2 and kvm.bus_locks else "there" if len(names) == 1 else f"only {names[-1]}"
        seen = f"bus locks are seen {sees}" if locks.name else "bus locks can't be seen, exits can be limited"
        can = f"This host can run guests {' and '.join(names)}; {seen}"
    return Verdict(can, auto, locks, _todo(kvm, findings))


def _todo(kvm: Found, findings: list[Finding]) -> str:
    """The worst that has a remedy: what keeps all guests from running, the other problems, a KVM without bus locks."""
    first = [finding for finding in findings if finding.check == AUTO]
    for finding in (*first, *findings):
        if finding.status == "problem" and finding.remedy:
            return f"First of all, {finding.check}: {finding.remedy}"
    if not kvm.bus_locks:
        return f"Nothing has to be done. To see bus locks on KVM, {DETECTION}"
    return "Nothing has to be done"
