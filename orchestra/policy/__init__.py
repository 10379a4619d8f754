"""Policies: facts and the time go in, actions come out. Pure: no trio, no clock, no I/O.

The same object runs live, in the simulator and in a replay, so a policy takes the time from its facts and never from
a clock. What it remembers between two ticks it keeps in itself.
"""

from __future__ import annotations

from .facts import Facts, HostFacts, Policy, VmFacts
from .share import WeightedShare
from .static import StaticLimits

__all__ = ["Facts", "HostFacts", "Policy", "StaticLimits", "VmFacts", "WeightedShare"]
