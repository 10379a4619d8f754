"""A VM's memory and first CPU states as the C core takes them, for the backends that execute code."""

from __future__ import annotations

from typing import Any

from ..native import ffi, lib
from . import EntryState
from .memory import GuestMemory

__all__ = ["entry_fields", "memory_slots", "slot_flags"]


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


def entry_fields(state: EntryState) -> dict[str, int]:
    """The fields of a ``struct orc_entry``."""
    base, limit = state.gdt or (0, 0)
    return {
        "mode": state.mode,
        "rip": state.rip,
        "rsp": state.rsp,
        "rdi": state.rdi,
        "cr0": state.cr0,
        "cr3": state.cr3,
        "cr4": state.cr4,
        "efer": state.efer,
        "gdt_base": base,
        "gdt_limit": limit,
        "code_selector": state.code_selector,
        "data_selector": state.data_selector,
    }
