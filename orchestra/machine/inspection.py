"""What can be read of a VM: its registers, statistics and profile."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import trio

from ..model.actions import Outcome, State
from ..model.errors import SpecError, StateError
from ..model.spec import Meter, VmSpec
from ..profile import Profile, Samples, Symbols, make_profile
from .budget import Budgets
from .context import InstanceContext
from .desired import Desired
from .instance import Instance
from .memory import MemoryControl
from .pause_levels import Level, PendingIo
from .runs import Runs
from .statistics import VmStatistics, by_bucket, of_vcpu, sums

__all__ = ["Inspection", "check_vcpu"]


class Inspected(Protocol):
    """The VM, as `Inspection` needs it."""

    context: InstanceContext
    spec: VmSpec
    name: str
    tenant: str
    budgets: Budgets
    wanted: Desired
    samples: Samples
    runs: Runs
    memory: MemoryControl

    @property
    def outcome(self) -> Outcome | None: ...
    @property
    def state(self) -> State: ...
    def made(self) -> Instance: ...


def check_vcpu(spec: VmSpec, vcpu: int) -> int:
    """Check an argument that names a vCPU, and return it.

    Raises:
        SpecError: the VM has no such vCPU.
    """
    if isinstance(vcpu, bool) or not isinstance(vcpu, int) or not 0 <= vcpu < spec.vcpus:
        raise SpecError(f"vcpu={vcpu!r}: vm {spec.name!r} has vCPUs 0 to {spec.vcpus - 1}")
    return vcpu


class Inspection:
    """Reads one VM and changes nothing. Fleet's thread."""

    def __init__(self, vm: Inspected) -> None:
        self._vm = vm

    # ---- what the VM does right now

    @property
    def quiesced(self) -> bool:
        """As `Vm.quiesced`."""
        return self._vm.state is State.PAUSED and self._vm.made().life.is_quiesced

    @property
    def pending(self) -> tuple[PendingIo, ...]:
        """The accesses that keep the VM from being quiesced, while it pauses or is paused."""
        guest = self._vm.runs.guest
        return guest.pausing.pending() if guest is not None and self._vm.outcome is None else ()

    @property
    def throttled(self) -> bool:
        """As `Vm.throttled`."""
        guest = self._vm.runs.guest
        return guest is not None and any(c.throttled_since for c in guest.cores.counters())

    def _vcpu_state(self, index: int) -> State:
        vm, guest = self._vm, self._vm.runs.guest
        if guest is not None and vm.outcome is None:
            if guest.has_ended(index):
                return State.STOPPED
            if vm.wanted.paused and guest.pause_levels.level(index) >= Level.PAUSED:
                return State.PAUSED
        return vm.state

    # ---- registers

    def registers(self, vcpu: int) -> Any:
        """As `Vm.registers`."""
        vm, guest = self._vm, self._vm.made()
        index = check_vcpu(vm.spec, vcpu)
        if guest.has_ended(index):
            return self._final_registers(guest, index)
        level = guest.pause_levels.level(index)
        if not vm.wanted.paused or level < Level.PAUSED:
            raise StateError(f"vm {vm.name!r}: vCPU {vcpu} runs: pause() first, or `await vm.inspect({vcpu})`")
        if level is not Level.QUIESCED:
            pending = guest.pausing.pending()
            what = next((str(access) for access in pending if access.vcpu == vcpu), f"vCPU {vcpu} is busy")
            raise StateError(f"vm {vm.name!r}: {what}: its registers change then; `pause()` waits for that")
        return guest.vcpus[index].engine.registers()

    async def inspect(self, vcpu: int) -> Any:
        """As `Vm.inspect`."""
        guest = self._vm.made()
        index = check_vcpu(self._vm.spec, vcpu)
        if guest.has_ended(index):
            await trio.lowlevel.checkpoint()
            return self._final_registers(guest, index)  # `guest`, as the VM may have another run by now
        return await guest.calls.call(index, guest.vcpus[index].engine.registers)

    def _final_registers(self, guest: Instance, index: int) -> Any:
        registers = guest.vcpus[index].final_registers
        if registers is None or isinstance(registers, Exception):
            name = self._vm.name
            raise StateError(f"vm {name!r}: vCPU {index} ended before its registers could be read: {registers}")
        return registers

    # ---- figures

    def statistics(self) -> VmStatistics:
        """As `Vm.statistics`."""
        vm, runs = self._vm, self._vm.runs
        counters, seen = runs.counters(), vm.context.bus_locks
        vcpus = tuple(of_vcpu(index, self._vcpu_state(index), c, seen) for index, c in enumerate(counters))
        return VmStatistics(
            name=vm.name,
            tenant=vm.tenant,
            state=vm.state,
            outcome=vm.outcome,
            restarts=runs.succession.restarts,
            resets=runs.succession.resets,
            dirty_pages=runs.dirty_pages(),
            pending=self.pending,
            limit=vm.budgets[Meter.BUS_LOCKS].limit,
            exit_limit=vm.budgets[Meter.EXITS].limit,
            answer_limit=vm.budgets[Meter.ANSWERS].limit,
            bus_lock_detection=(vm.spec.bus_lock_detection or vm.context.bus_lock_detection) if seen else None,
            vcpus=vcpus,
            throttled_by=by_bucket(c.held for c in counters),
            memory=vm.memory.statistics(),
            **sums(vcpus, seen),
        )

    def profile(self, symbols: Iterable[Symbols]) -> Profile:
        """As `Vm.profile`."""
        vm, guest = self._vm, self._vm.runs.guest
        samples = vm.samples if guest is None else guest.cores.gather()
        return make_profile(
            vm.name,
            samples.places,
            symbols=symbols,
            bus_locks=self.statistics().bus_locks,
            unplaced=samples.unplaced,
            every=vm.wanted.sample_every if vm.context.bus_locks else 0,
        )

    async def kernel_statistics(self) -> dict[str, float]:
        """As `Vm.kernel_statistics`."""
        guest, backend = self._vm.made(), self._vm.context.backend.name
        machine: Any = guest.machine
        await trio.lowlevel.checkpoint()
        why = None if hasattr(machine, "statistics") else f"backend {backend!r} has none"
        for index in range(len(guest.vcpus)):
            if why is None and not guest.has_ended(index):
                # On the vCPU's own thread: the kernel holds the vCPU's mutex during KVM_RUN, which may last for ever,
                # and any other thread would wait for that.
                await guest.calls.call(index, partial(machine.open_statistics, index))
        if guest.life.has_ended:
            why = "it has ended"
        if why is not None:
            raise StateError(f"vm {self._vm.name!r}: no statistics of KVM's: {why}")
        statistics: dict[str, float] = machine.statistics()
        return statistics
