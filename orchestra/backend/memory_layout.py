"""A VM's memory and first CPU states as the C core takes them, for the backends that execute code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..native import ffi, lib
from .entry import EntryState, Mode
from .memory import GuestMemory
from .registers import new_struct

__all__ = ["entries", "memory_slots", "slot_flags"]


def slot_flags(readonly: bool, log_dirty: bool) -> int:
    """The flags of a memory slot."""
    return int((lib.KVM_MEM_READONLY if readonly else 0) | (lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0))


def memory_slots(memory: GuestMemory) -> Any:
    """A ``struct kvm_userspace_memory_region[]`` for its regions."""
    slots = ffi.new("struct kvm_userspace_memory_region[]", len(memory.regions))
    for number, (slot, region) in enumerate(zip(slots, memory.regions, strict=True)):
        slot.slot, slot.flags = number, slot_flags(region.readonly, region.log_dirty)
        slot.guest_phys_addr, slot.memory_size = region.span.start, len(region.span)
        slot.userspace_addr = region.host
    return slots


@functools.lru_cache(maxsize=64)  # making one takes 20 us; a fleet's VMs start in few modes
def _special(mode: Mode) -> Any:
    """``struct kvm_sregs *``, to be read only."""
    return mode.special.to_struct()


def _msrs(msrs: tuple[tuple[int, int], ...]) -> Any:
    entries = [{"index": index, "data": value} for index, value in msrs]
    return new_struct("struct kvm_msrs *", {"nmsrs": len(msrs), "entries": entries})


def entries(states: Sequence[EntryState]) -> tuple[Any, list[Any]]:
    """A ``struct orc_entry[]``, and what it points to, which must be kept as long.

    Raises:
        SpecError: a value does not fit its register.
    """
    made = ffi.new("struct orc_entry[]", len(states))
    kept: list[Any] = []  # the objects that own the memory; pointers read from a structure own nothing

    def keep(pointer: Any) -> Any:
        kept.append(pointer)
        return pointer

    for entry, state in zip(made, states, strict=True):
        entry.bits, entry.waits = state.mode.bits, state.waits
        entry.registers = state.registers.to_struct()[0]
        entry.special = keep(_special(state.mode))
        if state.msrs:
            entry.msrs = keep(_msrs(state.msrs))
    return made, kept
