"""How much of its memory a VM's guest is asked to keep to, and what came of that: the balloon, as a VM has it."""

from __future__ import annotations

from typing import Any, Final, Protocol

from ..model.memory import PAGE
from ..model.spec import VmSpec
from .desired import Desired, check_memory
from .instance import Instance
from .runs import Runs
from .statistics import GuestMemoryStatistics, MemoryStatistics

__all__ = ["MemoryControl"]


TAGS: Final = (
    *("swap_in", "swap_out", "major_faults", "minor_faults", "free", "total", "available", "caches"),
    *("huge_page_allocations", "huge_page_failures"),
)
"""The numbers of VIRTIO_BALLOON_S_*, in their order."""


class Sized(Protocol):
    """The VM, as `MemoryControl` needs it."""

    spec: VmSpec
    wanted: Desired
    runs: Runs
    context: Any

    def alive(self, verb: str) -> Instance: ...
    def want(self, **changes: Any) -> None: ...


class MemoryControl:
    """Asks one VM's guest for memory. Fleet's thread."""

    def __init__(self, vm: Sized) -> None:
        self._vm = vm

    def ask_nowait(self, by: str | None, memory: int | None) -> None:
        """As `Vm.set_memory`. `by`: the policy that asks; None: a caller.

        Raises:
            SpecError: there is no balloon, or `memory` is out of its range.
            StateError: the VM has ended.
        """
        vm = self._vm
        if memory is not None:
            check_memory(vm.spec, memory)
        if vm.wanted.memory_of(by) == memory:
            return
        wanted, guest = vm.wanted.with_memory(by, memory), vm.alive("set the memory of")
        if guest.devices is not None and not guest.life.has_ended:  # else the next run begins with it
            guest.devices.keep_to(wanted.memory_target)
        vm.want(memory=wanted.memory)

    def statistics(self) -> MemoryStatistics | None:
        """As `VmStatistics.memory`."""
        vm = self._vm
        guest = vm.runs.guest
        taker = None if guest is None or guest.devices is None else guest.devices.memory_taker
        if taker is None:
            return None
        size, found = vm.spec.backing.size, taker.figures()
        told = None
        if found.updates:
            age = max(0, vm.context.backend.now() - found.updated) / 1e9
            told = GuestMemoryStatistics(age, **{TAGS[tag]: value for tag, value in found.statistic.items()})
        return MemoryStatistics(
            size=size,
            target=vm.wanted.memory_target or size,
            actual=max(0, size - found.actual * PAGE) if found.driver else None,
            given_back=found.given_back,
            reported=found.reported,
            failed=found.failed,
            guest=told,
        )
