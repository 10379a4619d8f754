"""Try policies on simulated fleets of up to a million VMs. Model, sources and limits: docs/simulate.md.

It may import `output`, the words, and nothing that runs a guest.
The one to copy: `cpus.py`.
"""

from __future__ import annotations

from .cpus import CPUS, HostCpu, LimitSpec
from .policies import QemuWindow
from .run import Result, WorldResult, simulate
from .scenario import Scenario, load_scenario, read_scenario

__all__ = [
    "CPUS",
    "HostCpu",
    "LimitSpec",
    "QemuWindow",
    "Result",
    "Scenario",
    "WorldResult",
    "load_scenario",
    "read_scenario",
    "simulate",
]
