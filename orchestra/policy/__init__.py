"""Policies: facts and the time go in, actions come out. Pure: no trio, no clock, no I/O.

The same object runs live, in the simulator and in a replay, so a policy takes the time from its facts and never from
a clock. A policy keeps what it remembers between two ticks in itself.

It may import `model`, and of Python's library only what knows of no time, files, threads or chance.
The one to copy: `static.py`.
"""

from __future__ import annotations

from .adaptive import Adaptive
from .bustime import BusTime
from .compose import Only, only
from .cpus import CPU_MODELS, CpuModel
from .credits import BurstCredits
from .facts import Facts, HostFacts, Policy, TenantFacts, VcpuFacts, VmFacts
from .guard import Guard, Ruling, Verdict
from .kinds import Chosen, PolicySpec, policy_kinds
from .ladder import Ladder
from .share import WeightedShare
from .static import StaticLimits
from .steps import Condition, Rung, Step, default_steps

__all__ = [
    "CPU_MODELS",
    "Adaptive",
    "BurstCredits",
    "BusTime",
    "Chosen",
    "Condition",
    "CpuModel",
    "Facts",
    "Guard",
    "HostFacts",
    "Ladder",
    "Only",
    "Policy",
    "PolicySpec",
    "Ruling",
    "Rung",
    "StaticLimits",
    "Step",
    "TenantFacts",
    "VcpuFacts",
    "Verdict",
    "VmFacts",
    "WeightedShare",
    "default_steps",
    "only",
    "policy_kinds",
]
