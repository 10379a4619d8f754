"""What a guest finds in memory and registers when it starts. One module for each kind of image.

It may import the backends' memory and entry states, and the words. The one to copy: `flat.py`.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

from ...backend.entry import EntryState
from ...backend.memory import GuestMemory
from ...model.errors import SpecError
from ...model.spec import VmSpec

__all__ = ["load"]


def load(spec: VmSpec, memory: GuestMemory) -> list[EntryState]:
    """Write what the VM boots into its memory, and return the entry state of each vCPU.

    Raises:
        SpecError: the boot spec's loader is missing, does not return a state for every vCPU, or makes a vCPU wait for
            an INIT that can't come.
        OrchestraError: what the loader raises.
    """
    boot, name = spec.boot, type(spec.boot).__name__
    try:
        loader: Any = resolve_name(boot.loader)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(f"boot: the loader of {name}, {boot.loader!r}, can't be imported: {error}") from error
    states: list[EntryState] = loader(boot, spec.layout, memory)
    if len(states) != spec.vcpus:
        raise SpecError(f"boot: {boot.loader!r} told where {len(states)} vCPUs start, and the VM has {spec.vcpus}")
    if states[0].waits or (spec.irqchip_kind == "none" and any(state.waits for state in states)):
        raise SpecError(
            f"boot: {boot.loader!r} has vCPUs wait for INIT and SIPI: not the first can, and the others need an irqchip"
        )
    return states
