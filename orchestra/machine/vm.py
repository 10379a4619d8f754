"""A virtual machine, as its users see it: the handle that steers it. The fleet's own parts use `VmControl`."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio

from ..model.actions import CapCpu, Isolate, Outcome, Pause, Rejoin, Resume, SetMemory, Stopped
from ..model.checks import fail, number
from ..model.errors import SpecError, StateError
from ..model.spec import Limit, Meter, VmSpec, check_flag
from .budget import Budgets
from .claims import check_device
from .context import InstanceContext
from .control import VmControl
from .desired import Desired
from .devices.bus import Device
from .devices.requests import Requests
from .statistics import VcpuStatistics, VmStatistics
from .view import VmView

__all__ = ["VcpuStatistics", "Vm", "VmStatistics", "make_vm"]


class Vm(VmView):
    """Made by `Fleet.launch`. All methods are for the fleet's thread; those that wait are checkpoints.

    A VM gives back what it holds of the host (descriptors, memory, threads) when it is stopped or its fleet is closed.
    After a VM has ended by itself, its memory, registers and statistics can still be read; `stop` then gives the memory
    back.

    Attributes:
        spec: the spec that the VM was launched from.
        name, tenant: the VM's name, and the tenant to whom it belongs.
        generation: the VM's number in the fleet, which no other VM ever has (an action's `generation`).
        console: what the guest writes, and what you type for it.
        ports: byte streams to programs in the guest, by name (`orc.Console(ports=...)`).
    """

    def __init__(self, control: VmControl) -> None:
        self.spec = control.spec
        self.name = control.name
        self.tenant = control.tenant
        self.generation = control.generation
        self.console = control.console
        self.ports = control.ports
        self._control = control

    # ---- steering

    async def wait(self) -> Outcome:
        """Wait until the VM has ended for good (no restart follows), and return its outcome."""
        await self._control.runs.ended.wait()
        assert self.outcome is not None
        return self.outcome

    async def pause(self, *, quiesce: bool = True) -> None:
        """Pause the VM. Returns when every vCPU is outside the guest, none is throttled, and all accesses of the
        guest are completed, so that registers and memory may be read and saved.

        A pause waits for every access that a device or a task (`requests`) has yet to answer.
        `VmStatistics.pending` names these accesses, and after 5 s the log does so too. So the task that answers
        requests must not itself wait for a pause.

        Parameters:
            quiesce: False: return once no guest code runs, even if accesses are pending. An answer that comes later
                changes registers and memory without running the guest.

        Returns as well if the pause is taken back meanwhile, or the VM ends. If this call is cancelled, the VM pauses
        all the same, and the journal says so; call `resume`.

        Raises:
            StateError: the VM has ended.
        """
        control = self._control
        control.pause_nowait()
        control.context.did(Pause(vm=self.name, reason="pause()"))
        await (control.wait_quiesced() if quiesce else control.wait_paused())

    async def resume(self) -> None:
        """Let the VM go on. A vCPU that was throttled before the pause waits for the rest of that time.

        Raises:
            StateError: the VM has ended.
        """
        self._control.resume_nowait()
        self._control.context.did(Resume(vm=self.name, reason="resume()"))
        await trio.lowlevel.checkpoint()

    async def reset(self, reason: str = "reset()") -> None:
        """Start the VM afresh from its boot spec, as a reset button does: memory and registers are lost. Returns when
        the VM has started.

        The VM stays the same: name, console, claims and devices, limits, caps, a pause and statistics carry on. The
        method `reset()` of your own devices is called. Resets are limited to 5 in a row and then one a second, those
        of the guest (`VmSpec.on_reset`) included: this call waits for its turn. In a restart's back-off the VM starts
        without waiting for the rest of the back-off.

        If this call is cancelled, the VM is reset all the same.

        Raises:
            StateError: the VM has ended, or ends before the reset. Or it could not be reset: a device's `reset()`
                raised, or the host lacks what a new run needs. `VmSpec.restart` says what follows then.
        """
        self._control.alive("reset")
        await self._control.runs.reset(reason)

    async def stop(self, reason: str = "stop()") -> Outcome:
        """End the VM, wait until it has given everything back, and return its outcome. Stopping a VM that has ended is
        no error.

        The VM leaves `Fleet.vms`, and its memory is given back; registers and statistics stay readable. If this call is
        cancelled, the VM stops all the same.
        """
        self._control.stop_nowait(Stopped(reason), journal=True)
        return await self._control.wait_released()

    async def power_button(self) -> None:
        """Press the power button, and return when the guest is told. The guest decides what to do: a Linux powers off
        if a program of it, such as systemd-logind or acpid, acts on the button.

        A paused VM is told once it is resumed; this call waits for that.

        Raises:
            StateError: the VM has no power button (only `LinuxBoot` brings one), has ended or waits for its next run.
        """
        await self._control.power_button()

    async def shutdown(self, *, timeout: float = 10.0) -> Outcome:  # noqa: ASYNC109 (what comes then is no error)
        """Press the power button, wait for the guest to power off, and stop the VM by force if it does not. Gives
        everything back, as `stop` does, and returns the outcome: ``Shutdown(reason="ACPI power-off")`` if the guest
        did it itself, ``Stopped`` with the reason if it was forced.

        A VM without a power button, or between two runs, is stopped at once. If this call is cancelled, the guest knows
        of the button and may power off, and nothing is forced.

        Parameters:
            timeout: seconds that the guest has.

        Raises:
            SpecError: the timeout is no number, or less than 0.
        """
        if number("timeout", timeout) < 0:
            raise fail("timeout", timeout, "must be at least 0 seconds")
        why = f"did not power off within {timeout:g} s"
        with trio.move_on_after(timeout):
            try:
                await self._control.power_button()
                await self._control.runs.ended.wait()
            except StateError as error:
                why = f"shutdown(): {error}"
        return await self.stop(why)

    async def set_memory(self, memory: int | None) -> None:
        """Ask the guest to keep to so much of its memory: it puts the rest into its balloon, and the host has it back.

        Returns once the guest is asked; a paused VM is asked when it goes on. Its driver does so in its own time, as
        far as it can, and `VmStatistics.memory` says how far it is. What is asked for outlives restarts and resets. All
        callers share one request. Each policy has its own (`SetMemory`), and the smallest counts.

        Parameters:
            memory: bytes, a multiple of 4096, from `Balloon.floor` to the memory of the spec. None: all of it.

        Raises:
            SpecError: the VM has no `Balloon`, or `memory` is out of that range.
            StateError: the VM has ended.
        """
        self._control.memory.ask_nowait(None, memory)
        self._control.context.did(SetMemory(vm=self.name, memory=memory, reason="set_memory()"))
        await trio.lowlevel.checkpoint()

    async def set_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, vcpu: int | None = None
    ) -> None:
        """Change a limit of the VM or of one vCPU. The change takes effect at once, also for waits in progress.

        Parameters:
            limit: events per second, with a burst. None: no limit.
            meter: what is limited: bus locks, exits or answers.
            vcpu: the number of a vCPU. None: the limit of the whole VM.

        Raises:
            SpecError: not a limit, no such meter or vCPU.
            BusLockUnsupported: a bus-lock limit where the fleet can't see bus locks.
            StateError: the VM has ended.
        """
        if self.outcome is not None:  # another VM may have this name by now
            raise StateError(f"vm {self.name!r} has ended: it has no limit to change")
        self._control.context.set_limit_nowait(limit, meter=meter, vm=self.name, vcpu=vcpu)
        await trio.lowlevel.checkpoint()

    def cap_cpu(self, share: float | None) -> None:
        """Let each vCPU use at most this share of a CPU, measured as CPU time over periods of 50 ms. At once.

        All callers share one cap. Each policy has its own, and the tightest counts.

        Parameters:
            share: from 0.01 to 1; None: no cap.

        Raises:
            SpecError: not from 0.01 to 1.
            StateError: the VM has ended, or its backend gives it no thread (scripted).
            ResourceLimit: the host lacks the resources for a cap, or refuses it.
        """
        action = CapCpu(vm=self.name, share=share, reason="cap_cpu()")
        self._control.cap_nowait(None, share)
        self._control.context.did(action)

    def isolate(self, isolated: bool = True) -> None:
        """Let the vCPUs run on the fleet's quarantine CPUs only, or (False) on the CPUs of all other VMs again.

        Raises:
            StateError: the VM has ended, or its backend gives it no thread (scripted).
            ResourceLimit: this host has no CPU to spare for isolation.
        """
        self._control.isolate_nowait(isolated)
        kind = Isolate if isolated else Rejoin
        self._control.context.did(kind(vm=self.name, reason="isolate()"))

    async def log_dirty(self, on: bool = True) -> None:
        """Let KVM log which pages of 4 KiB the guest writes, in all memory that the guest may write; or (False) in
        none. The setting holds over restarts.

        While the log is on, `statistics`, the facts of policies and the journal say how many pages were written. KVM
        write-protects the pages that it logs, and maps them in 4 KiB: after each reading of the log, about one a
        second, the first write to a page costs the guest a fault. To switch the log takes the kernel milliseconds for
        each gigabyte in use; the guest goes on meanwhile. The first touch of a page may count even if it only reads.
        Writes of the host do not count.

        If this call is cancelled, the log is either as asked for or as before.

        Raises:
            SpecError: neither True nor False.
            StateError: the VM has ended, or does not run on KVM.
            ResourceLimit, KvmError: the kernel has no memory for the log, or refuses. The log is as before.
        """
        check_flag("on", on)
        await self._control.log_dirty(on)

    def report_work(self, units: float) -> None:
        """Report how much work the guest has done since the last call, by its own account: requests served, rounds of a
        benchmark. Policies and the journal compare this only with what is usual for this VM (`VmFacts.work`), so the
        unit is yours.

        Raises:
            SpecError: less than 0, or no number.
        """
        if isinstance(units, bool) or not isinstance(units, int | float) or not 0 <= units < math.inf:
            raise SpecError(f"units={units!r}: must be a number, at least 0")
        self._control.context.worked(self._control, units)

    # ---- devices and requests

    def attach(self, device: Device, *, ports: range | None = None, mmio: range | None = None) -> None:
        """Add a device of your own. The device is called on vCPU threads, one call at a time, and stays over restarts
        and resets. If it has a method `reset()`, that is called on the fleet's thread before each run but the first,
        and must bring the device back to power-on.

        Raises:
            SpecError: no range is given, a range is taken, or this is no device.
            StateError: the VM has ended.
        """
        check_device(device, ports, mmio)
        self._control.claim(ports, mmio, device)
        self._control.claims.add_device(ports, mmio, device)

    @asynccontextmanager
    async def requests(self, *, ports: range | None = None, mmio: range | None = None) -> AsyncIterator[Requests]:
        """Claim ranges for this task, which answers each access (`Request`).

        When the block is left, unanswered accesses go back to the bus: reads then give ones, as from an address that
        nobody has claimed.

        Raises:
            SpecError: no range is given, or a range is taken.
            StateError: the VM has ended.
        """
        control = self._control
        requests = Requests(control.context.inbox)
        control.claim(ports, mmio, requests)
        control.claims.add_requests(ports, mmio, requests)
        try:
            await trio.lowlevel.checkpoint()
            yield requests
        finally:
            control.claims.remove_requests(requests)
            if control.guest is not None:  # perhaps another run by now: claims hold over a restart
                control.guest.buses.release(requests)
            requests.close()

    # ---- inspection

    def read_memory(self, address: int, size: int) -> bytes:
        """Copy guest-physical memory. The copy is not atomic against a running guest: pause the VM for a consistent
        one.

        Raises:
            GuestMemoryError: outside the guest's memory, or `stop` has given the memory back.
            StateError: the VM is still being set up.
        """
        return self._control.made().memory.read(address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        """Copy bytes into guest-physical memory, read-only regions included.

        Raises:
            GuestMemoryError: outside the guest's memory, or `stop` has given the memory back; nothing is written then.
            StateError: the VM is still being set up.
        """
        self._control.made().memory.write(address, data)

    def set_sampling(self, every: int) -> None:
        """Sample one bus lock of each `every` for `profile` from now on; 0: none. The setting holds over restarts.

        A sampled lock costs its vCPU some microseconds more: if every 100th lock is sampled, a guest that does nothing
        but lock is slowed by 2 % at most (`python -m benchmarks profile`). Counts and charges stay the same.

        Raises:
            SpecError: not a number from 0 to 1,000,000,000.
            BusLockUnsupported: this fleet does not see bus locks.
        """
        self._control.set_sampling(every)


def make_vm(
    context: InstanceContext,
    spec: VmSpec,
    tenant: str,
    above: tuple[Budgets, Budgets],
    desired: Desired,
    devices: Iterable[tuple[range | None, range | None, Device]] = (),
) -> VmControl:
    """Make a VM that is yet to run; the control's `handle` is the users' `Vm`. Parameters as in `VmControl`."""
    control = VmControl(context, spec, tenant, above, desired, devices)
    control.handle = Vm(control)
    return control
