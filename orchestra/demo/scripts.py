"""The demo without guests, for hosts that can't run any: scripts in place of the quiet and the noisy VMs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

from ..backend.scripted import ScriptedExit, bus_lock
from ..model.spec import VmSpec

__all__ = ["scripts"]


def scripts(spec: VmSpec, vcpu: int) -> Iterator[ScriptedExit]:
    """Scripts for `ScriptedBackend`: a noisy VM locks the bus 500 times a second, a quiet VM every 2 seconds."""
    return repeat(bus_lock(after=0.002 if spec.name.startswith("noisy") else 2.0))
