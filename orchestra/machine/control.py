"""A VM as its fleet's own parts see it: what executor, fleet and observer do with it. Its users have a `Vm`.

Each command is in one place. A method that does not wait (`..._nowait`) commands. The part that asked journals the
command, so that the journal tells a caller's request from a policy's. A method `wait_...` waits for the effect, for
those callers that want to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

import attrs
import trio

from ..model.actions import CapCpu, Outcome, Rejoin, State, Stop, Stopped
from ..model.errors import BusLockUnsupported, OrchestraError, StateError
from ..model.platform import POWER_BUTTON
from ..model.spec import Meter, VmSpec, check_sampling
from ..profile import Samples
from .budget import Budget, Budgets, make_budgets
from .claims import Claims, check_ranges
from .context import REFUSED, InstanceContext
from .desired import UNLIMITED, Desired, PlacedLimits
from .devices.bus import Device, Handler
from .devices.console import Console
from .devices.consoleport import Ports
from .inspection import Inspection, check_vcpu
from .instance import Instance
from .lifecycle import state_of
from .memory import MemoryControl
from .pause_levels import Level
from .runs import Runs

__all__ = ["VmControl"]

log: Final = logging.getLogger("orchestra")

PATIENCE: Final = 5.0
"""Seconds until the log says that a pause waits for a device or a task; each further line comes after twice the time.
A device that works answers within milliseconds, and a reader of the log needs to see a hang once, not each second."""


class VmControl:
    """Controls one VM; for the fleet's thread. Methods that wait are checkpoints.

    Attributes:
        handle: the `Vm` of the users, which is made from this.
        generation: the VM's number in the fleet, which no other VM ever has.
        budgets, vcpu_budgets: the limits of the VM, and of each vCPU.
        claims: the addresses that the user's devices and tasks have claimed.
        wanted: what is desired of the VM, without its limits: each budget has its own part of the record. `desired` is
            the whole record.
        samples: the instructions that locked the bus, in all runs.
        inspection: what can be read of the VM.
        memory: asks the guest for memory.
        runs: the VM's task, its present run, and the figures of all runs.
        was_capped: whether the VM ever had a CPU cap.

    Parameters:
        above: budgets of the host and of the tenant.
        desired: what is desired from the first moment on: what the spec says (`Desired.of`), or the record of a VM that
            ran before or elsewhere.
        devices: the user's own devices.
    """

    handle: Any

    def __init__(
        self,
        context: InstanceContext,
        spec: VmSpec,
        tenant: str,
        above: tuple[Budgets, Budgets],
        desired: Desired,
        devices: Iterable[tuple[range | None, range | None, Device]] = (),
    ) -> None:
        desired.check_for(spec)
        now = context.backend.now()
        self.context = context
        self.spec = spec
        self.name = spec.name
        self.tenant = tenant
        self.generation = context.next_id()
        self.console = Console(context.post, spec.name)
        self.ports = Ports(context.post, spec.machine_devices, spec.name)
        self.claims = Claims(devices)
        self.samples = Samples()
        self.was_capped = desired.cap is not None
        placed = {(one.meter, one.vcpu): one.limits for one in desired.limits}
        self.budgets, *self.vcpu_budgets = (
            make_budgets({meter: placed.get((meter, place), UNLIMITED) for meter in Meter}, now)
            for place in (None, *range(spec.vcpus))
        )
        self.wanted = attrs.evolve(desired, limits=())
        self._released = False
        self.inspection = Inspection(self)
        self.memory = MemoryControl(self)
        self.runs = Runs(context, self, [(*above, self.budgets, budgets) for budgets in self.vcpu_budgets])

    def __repr__(self) -> str:
        return f"<VmControl {self.name!r} {self.state}>"

    # ---- state

    @property
    def outcome(self) -> Outcome | None:
        return self.runs.outcome

    @property
    def guest(self) -> Instance | None:
        return self.runs.guest

    @property
    def state(self) -> State:
        guest = self.runs.guest
        life = None if guest is None else guest.life
        return state_of(self.runs.outcome, life, paused=self.wanted.paused, waits=bool(self.runs.waits))

    @property
    def desired(self) -> Desired:
        """What is desired of the VM now: the whole record, limits included."""
        places: list[tuple[int | None, Budgets]] = [(None, self.budgets), *enumerate(self.vcpu_budgets)]
        limits = tuple(
            PlacedLimits(meter, vcpu, budget.limits)
            for vcpu, budgets in places
            for meter, budget in budgets.items()
            if budget.limits != UNLIMITED
        )
        return attrs.evolve(self.wanted, limits=limits)

    def want(self, **changes: Any) -> None:
        """Change the desired record. Whoever does so puts the change into force, too."""
        self.wanted = attrs.evolve(self.wanted, **changes)

    def made(self) -> Instance:
        """The present run, or the last run.

        Raises:
            StateError: the first run is still being built.
        """
        if self.runs.guest is None:
            raise StateError(f"vm {self.name!r} is still being set up")
        return self.runs.guest

    def alive(self, verb: str) -> Instance:
        """The present run, for a command.

        Raises:
            StateError: the first run is still being built, or the VM has ended.
        """
        if self.outcome is not None or self.runs.guest is None:
            raise StateError(f"can't {verb} vm {self.name!r}: it is {self.state}")
        return self.runs.guest

    def became(self, reason: str) -> None:
        """Journal the state that the VM is in now."""
        self.context.changed(self, self.state, reason)

    # ---- pauses

    def pause_nowait(self) -> None:
        """Tell the VM to pause. Each vCPU is held when it leaves the guest; a resume may come before that."""
        guest = self.alive("pause")
        if not self.wanted.paused:
            self.want(paused=True)
            guest.pausing.pause()
            if self.runs.waits:  # no vCPU runs between two runs, so none will report a level
                self.became(self.runs.waits)

    async def wait_paused(self) -> None:
        """Wait until no guest code runs, or the pause is taken back, or the run has ended."""
        with self.context.core.urgently():
            await self.made().pause_levels.paused.wait()

    async def wait_quiesced(self) -> None:
        """Wait until also no access is pending, or the pause is taken back, or the run has ended."""
        quiesced, patience = self.made().pause_levels.quiesced, PATIENCE  # of this pause, even if another comes
        await self.wait_paused()
        while not quiesced.is_set():
            with trio.move_on_after(patience):
                await quiesced.wait()
                return
            what = "; ".join(map(str, self.inspection.pending)) or "a vCPU completes an access"
            log.warning("vm %s: a pause has waited for %.0f s or more: %s", self.name, patience, what)
            patience *= 2

    def resume_nowait(self) -> None:
        guest = self.alive("resume")
        if self.wanted.paused:
            self.want(paused=False)
            guest.pausing.resume()
            self.became(self.runs.waits or "resumed")

    def on_pause_level(self, level: Level) -> None:
        if self.wanted.paused and self.outcome is None:
            self.became("; ".join(map(str, self.inspection.pending)) if level is Level.PAUSED else "")

    # ---- its end

    async def power_button(self) -> None:
        """As `Vm.power_button`."""
        guest = self.alive("press the power button of")
        if guest.life.has_ended:
            raise StateError(f"vm {self.name!r} is between two runs: wait until it runs, or use stop()")
        devices = guest.devices
        button = None if devices is None else devices.event_device
        if devices is None or button is None:
            raise StateError(f"vm {self.name!r} has no power button: boot it with LinuxBoot, or use stop()")
        self.became("power button pressed")
        await devices.tell(button, POWER_BUTTON)

    def stop_nowait(self, outcome: Stopped, *, journal: bool = False) -> None:
        """Tell the VM to end; no restart follows.

        Parameters:
            journal: journal a `Stop`, if this is the first. For callers that stop the VM without an action.
        """
        if self.runs.stop(outcome) and journal:
            self.context.did(Stop(vm=self.name, reason=outcome.reason))

    @property
    def stopping(self) -> bool:
        """Whether the VM was told to stop."""
        return self.runs.stop_reason is not None

    async def wait_released(self) -> Outcome:
        """After `stop_nowait`: wait until the VM has given everything back. Returns its outcome."""
        with self.context.core.urgently():
            await self.runs.ended.wait()
        self.release()  # the VM's task does so too, but a VM that ended by itself has no task any more
        await self.runs.wait_unmapped()
        assert self.outcome is not None
        return self.outcome

    def release(self) -> None:
        """Leave the fleet and give the memory back. After the VM has ended; a second call does nothing."""
        if not self._released:
            self._released = True
            self.context.released(self)

    def close(self) -> None:
        """Give the memory back and free the buckets. After the VM has left the fleet."""
        self._released = True
        self.runs.close()
        for budgets in (self.budgets, *self.vcpu_budgets):
            for budget in budgets.values():
                budget.close()

    # ---- limits, caps, isolation

    def budget(self, meter: Meter, vcpu: int | None) -> Budget:
        """The budget of the whole VM (vcpu=None), or of one vCPU."""
        return self.budgets[meter] if vcpu is None else self.vcpu_budgets[check_vcpu(self.spec, vcpu)][meter]

    def cap_nowait(self, by: str | None, share: float | None) -> None:
        """As `Vm.cap_cpu`. `by`: the policy that asks; None: a caller."""
        wanted = self.wanted.with_cap(by, share)
        if self.wanted.cap_of(by) != share:
            self.alive("cap the CPU of").restraint.cap_cpu(wanted.cap)
            self.want(caps=wanted.caps)
            self.was_capped = True

    async def wait_capped(self) -> None:
        """Wait until the cap is in force; no checkpoint if it is already.

        Raises:
            ResourceLimit: the host refuses the cap; no cap is in force then.
        """
        if self.runs.guest is not None:
            await self.runs.guest.restraint.caps.settled()

    def on_cap_failed(self, error: OrchestraError) -> None:
        log.error("vm %s is not capped any more: %s", self.name, error)
        caps = self.wanted.caps
        self.want(caps=())
        for cap in caps:  # otherwise the journal would show them in force for ever
            self.context.did(CapCpu(vm=self.name, share=None, reason=f"{REFUSED}: {error}"), cap.by)

    def isolate_nowait(self, on: bool) -> None:
        """As `Vm.isolate`."""
        guest = self.alive("isolate" if on else "let in")
        if on != self.wanted.isolated:
            guest.restraint.isolate(on)
            self.want(isolated=on)

    def on_isolation_failed(self, error: OrchestraError) -> None:
        log.error("vm %s is not isolated any more: %s", self.name, error)
        self.want(isolated=False)
        self.context.did(Rejoin(vm=self.name, reason=f"{REFUSED}: {error}"))

    # ---- logging, sampling, claims

    async def log_dirty(self, on: bool) -> None:
        """As `Vm.log_dirty`."""
        async with self.runs.logging:
            guest, workers = self.alive("log the memory of"), self.context.workers
            dirty, backend = guest.dirty, self.context.backend.name
            if dirty is None:
                raise StateError(f"can't log the memory of vm {self.name!r}: not supported by this backend ({backend})")
            if not guest.life.has_ended:
                # On a worker thread: the kernel walks the guest's page tables, which takes milliseconds for gigabytes.
                await workers.run(partial(dirty.log, on), workers.dirty)
                if not guest.life.has_ended:
                    self.context.logged(guest)
            self.want(log_dirty=on)

    def set_sampling(self, every: int) -> None:
        """As `Vm.set_sampling`."""
        check_sampling("every", every)
        if every and not self.context.bus_locks:
            raise BusLockUnsupported(f"vm {self.name!r}: this fleet does not see bus locks: there is nothing to sample")
        self.want(sample_every=every)
        if self.runs.guest is not None:
            self.runs.guest.cores.sample(every)

    def claim(self, ports: range | None, mmio: range | None, handler: Handler) -> None:
        """Let a device or a task answer at these addresses, in this run."""
        check_ranges(ports, mmio)
        self.alive("claim addresses of").buses.claim(ports, mmio, handler)
