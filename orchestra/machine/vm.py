"""A virtual machine, as its users have it: the handle to steer it by. The fleet's own parts have `VmControl`."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio

from ..model.actions import CapCpu, Isolate, Outcome, Pause, Rejoin, Resume, State, Stopped
from ..model.errors import SpecError, StateError
from ..model.spec import Limit, Meter, VmSpec, check_flag
from ..profile import Profile, Symbols
from .budget import Budgets
from .claims import check_device
from .context import InstanceContext
from .control import VmControl
from .desired import Desired
from .devices.bus import Device
from .devices.requests import Requests
from .statistics import VcpuStatistics, VmStatistics

__all__ = ["VcpuStatistics", "Vm", "VmStatistics", "make_vm"]


class Vm:
    """Made by `Fleet.launch`. All methods are for the fleet's thread; those that wait are checkpoints.

    What it holds of the host (descriptors, memory, threads) goes when it is stopped or its fleet is closed. After it
    ended by itself its memory, registers and statistics can still be read; `stop` then gives the memory back.

    Attributes:
        spec: what it was launched from.
        name, tenant: whose it is.
        launch: its number in the fleet, which no other VM ever has (an action's `launch`).
        console: what its guest writes.
    """

    def __init__(self, control: VmControl) -> None:
        self.spec = control.spec
        self.name = control.name
        self.tenant = control.tenant
        self.launch = control.launch
        self.console = control.console
        self._control = control

    # ---- state

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it has not."""
        return self._control.outcome

    @property
    def state(self) -> State:
        """Created (being set up), running, waiting (between two runs, for a restart's back-off or a reset's turn),
        paused (also while it waits so), stopped or failed. Whether a paused one's state may be read and saved is
        `quiesced`."""
        return self._control.state

    @property
    def restarts(self) -> int:
        """How often it was restarted (`VmSpec.restart`)."""
        return self._control.runs.succession.restarts

    @property
    def quiesced(self) -> bool:
        """It is paused, and nothing of an access is left to be done: registers and memory stay as they are."""
        return self._control.inspection.quiesced

    @property
    def throttled(self) -> bool:
        """One of its vCPUs waits for its turn right now."""
        return self._control.inspection.throttled

    @property
    def desired(self) -> Desired:
        """What is desired of it now: a pause, caps, isolation, logging, sampling, limits. It outlives restarts and
        resets. A frozen record."""
        return self._control.desired

    def __repr__(self) -> str:
        return f"<Vm {self.name!r} {self.state}>"

    # ---- steering

    async def wait(self) -> Outcome:
        """Wait until it has ended for good (its restart policy lets it be), and return how."""
        await self._control.runs.ended.wait()
        assert self.outcome is not None
        return self.outcome

    async def pause(self, *, quiesce: bool = True) -> None:
        """Hold it: returns when every vCPU is outside the guest, not waiting for its turn either, and all accesses of
        the guest's are completed, so that its registers and memory may be read and saved.

        An access that a device, or a task (`requests`), has yet to answer keeps it from that: `VmStatistics.pending`
        has what it waits for, and after 5 s the log. So the task that answers requests must not wait for a pause in
        between.

        Parameters:
            quiesce: False: return once no guest code runs, whatever is pending. An answer that comes then is completed
                without running the guest, and changes registers and memory.

        Returns as well if the pause is taken back meanwhile, or the VM ends. Cancelled, the VM pauses all the same, as
        the journal says; call `resume`.

        Raises:
            StateError: it has ended.
        """
        control = self._control
        control.pause_nowait()
        control.house.did(Pause(vm=self.name, reason="pause()"))
        await (control.wait_quiesced() if quiesce else control.wait_paused())

    async def resume(self) -> None:
        """Let it go on. What it still had to wait for its turn, it waits.

        Raises:
            StateError: it has ended.
        """
        self._control.resume_nowait()
        self._control.house.did(Resume(vm=self.name, reason="resume()"))
        await trio.lowlevel.checkpoint()

    async def reset(self, reason: str = "reset()") -> None:
        """Start it afresh from its boot spec, as the reset button does: what it has in memory and registers is lost.
        Returns when it has started.

        It stays the same VM: name, console, claims and devices, limits, caps, a pause and statistics carry on. Devices
        of your own that have a method `reset()` are told. A VM is reset 5 times in a row and then once a second,
        whoever asks, guests included (`VmSpec.on_reset`): this waits for its turn. In a restart's back-off it starts
        without waiting for the rest of that.

        Cancelled, it is reset all the same.

        Raises:
            StateError: it has ended, also meanwhile.
        """
        self._control.alive("reset")
        await self._control.runs.reset(reason)

    async def stop(self, reason: str = "stop()") -> Outcome:
        """End it, wait until nothing of it is left, and return how it ended. Stopping what has ended is no error.

        It leaves `Fleet.vms` and its memory is given back; registers and statistics stay readable.
        Cancelled, it stops all the same.
        """
        self._control.stop_nowait(Stopped(reason), journal=True)
        return await self._control.wait_released()

    async def set_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, vcpu: int | None = None
    ) -> None:
        """Change its limit, or one vCPU's; at once, also for waits in progress. None: no limit.

        Raises:
            SpecError: not a limit, no such meter or vCPU.
            BusLockUnsupported: a bus-lock limit where the fleet can't see bus locks.
            StateError: it has ended.
        """
        if self.outcome is not None:  # by now its name may be another's
            raise StateError(f"vm {self.name!r} has ended: it has no limit to change")
        self._control.house.set_limit_nowait(limit, meter=meter, vm=self.name, vcpu=vcpu)
        await trio.lowlevel.checkpoint()

    def cap_cpu(self, share: float | None) -> None:
        """Let each of its vCPUs use at most this part of a CPU, by CPU time over periods of 50 ms. At once.

        It is one cap for all callers. Policies have their own, and the tightest counts.

        Parameters:
            share: from 0.01 to 1; None: no cap.

        Raises:
            SpecError: not from 0.01 to 1.
            StateError: it has ended, or its backend gives it no thread (scripted).
            ResourceLimit: the host has nothing left for it, or refuses it.
        """
        action = CapCpu(vm=self.name, share=share, reason="cap_cpu()")
        self._control.cap_nowait(None, share)
        self._control.house.did(action)

    def isolate(self, isolated: bool = True) -> None:
        """Have its vCPUs run on the fleet's quarantine CPUs only, or (False) wherever the others do.

        Raises:
            StateError: it has ended, or its backend gives it no thread (scripted).
            ResourceLimit: this host has no CPU to spare for it.
        """
        self._control.isolate_nowait(isolated)
        kind = Isolate if isolated else Rejoin
        self._control.house.did(kind(vm=self.name, reason="isolate()"))

    async def log_dirty(self, on: bool = True) -> None:
        """Have KVM log which pages of 4 KiB the guest writes, in all memory that it may write; or (False) in none. It
        stays over restarts.

        While it is on, `statistics`, the facts of policies and the journal say how many there were. KVM write-protects
        what it logs, and maps it in pages of 4 KiB: after each reading of the log, about one a second, the first write
        to a page costs the guest a fault. Switching it takes the kernel milliseconds for each gigabyte that is in use;
        the guest goes on meanwhile. The first touch of a page may count even if it only reads; what the host writes
        does not.

        Cancelled, it is either as asked for or as it was.

        Raises:
            SpecError: neither True nor False.
            StateError: it has ended, or does not run on KVM.
            ResourceLimit, KvmError: the kernel has no memory for the log, or won't. It is as it was.
        """
        check_flag("on", on)
        await self._control.log_dirty(on)

    def report_work(self, units: float) -> None:
        """Tell how much the guest got done since this was called last, by its own account: requests served, rounds of
        a benchmark. Policies and the journal compare it with what is usual for this VM (`VmFacts.work`), and with
        nothing else, so the unit is yours.

        Raises:
            SpecError: less than 0, or no number.
        """
        if isinstance(units, bool) or not isinstance(units, int | float) or not 0 <= units < math.inf:
            raise SpecError(f"units={units!r}: must be a number, at least 0")
        self._control.house.worked(self._control, units)

    # ---- devices and requests

    def attach(self, device: Device, *, ports: range | None = None, mmio: range | None = None) -> None:
        """Add a device of your own. It is called on vCPU threads, one call at a time; it stays over restarts and
        resets. If it has a method `reset()`, that is called before each run but the first, on the fleet's thread: the
        device is to be as it was at power-on.

        Raises:
            SpecError: no range given, or one that is taken, or not a device.
        """
        check_device(device, ports, mmio)
        self._control.claim(ports, mmio, device)
        self._control.claims.add_device(ports, mmio, device)

    @asynccontextmanager
    async def requests(self, *, ports: range | None = None, mmio: range | None = None) -> AsyncIterator[Requests]:
        """Claim ranges for this task, which answers each access (`Request`).

        When the block is left, unanswered accesses go back to the bus: reads then give ones, as if nobody was there.

        Raises:
            SpecError: no range given, or one that is taken.
        """
        control = self._control
        requests = Requests()
        control.claim(ports, mmio, requests)
        control.claims.add_requests(ports, mmio, requests)
        try:
            await trio.lowlevel.checkpoint()
            yield requests
        finally:
            control.claims.remove_requests(requests)
            if control.guest is not None:  # it may be another one by now: claims stay over a restart
                control.guest.buses.release(requests)
            requests.close()

    # ---- inspection

    def read_memory(self, address: int, size: int) -> bytes:
        """Copy guest-physical memory. Not atomic against a running guest: pause it for a consistent picture.

        Raises:
            GuestMemoryError: outside its memory, or the memory was given back by `stop`.
        """
        return self._control.made().memory.read(address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        """Copy bytes into guest-physical memory, read-only regions included.

        Raises:
            GuestMemoryError: outside its memory; nothing is written then.
        """
        self._control.made().memory.write(address, data)

    def registers(self, vcpu: int = 0) -> Any:
        """A vCPU's general registers (.rax ... .r15, .rip, .rflags), while it is quiesced or after it ended.

        Raises:
            StateError: it runs: `pause` it first, or use `inspect`. Or it is paused in the middle of an access, so that
                its registers change when that is answered (`VmStatistics.pending`).
        """
        return self._control.inspection.registers(vcpu)

    async def inspect(self, vcpu: int = 0) -> Any:
        """A running vCPU's general registers, taken between two entries of the guest; it is not paused for it. In the
        middle of an access that waits for an answer, they are those before the answer."""
        return await self._control.inspection.inspect(vcpu)

    def statistics(self) -> VmStatistics:
        """What it did so far."""
        return self._control.inspection.statistics()

    async def kernel_statistics(self) -> Mapping[str, float]:
        """What KVM itself counts of it, in whole units (seconds, bytes), by the kernel's names: of the VM
        ("pages_4k"), and of each vCPU ("vcpu0.exits"). Which there are differs from kernel to kernel.

        The first call of a run opens a descriptor for the VM and each vCPU. A vCPU's thread does it between two entries
        of the guest, so this waits for a device that answers on it.

        Raises:
            StateError: it has ended, or does not run on KVM.
            KvmError: this KVM has none.
        """
        return await self._control.inspection.kernel_statistics()

    def set_sampling(self, every: int) -> None:
        """Sample one bus lock of so many for `profile` from now on; 0: none. It stays over restarts.

        A lock that is sampled costs its vCPU some microseconds more: with every 100th, a guest that does nothing but
        lock is slowed by 2 % at most (`python -m benchmarks profile`). What is counted and charged stays the same.

        Raises:
            SpecError: not a number from 0 to 1,000,000,000.
            BusLockUnsupported: this fleet does not see bus locks.
        """
        self._control.set_sampling(every)

    def profile(self, symbols: Iterable[Symbols] = ()) -> Profile:
        """Which of its instructions locked the bus since it was launched, restarts included; see `Profile`.

        Disassembled if iced-x86 is installed (``pip install 'orchestra-kvm[profile]'``). Takes a tenth of a millisecond
        or so for each instruction.

        Parameters:
            symbols: functions of the guest; the first that knows an address names it.
        """
        return self._control.inspection.profile(symbols)


def make_vm(
    house: InstanceContext,
    spec: VmSpec,
    tenant: str,
    above: tuple[Budgets, Budgets],
    desired: Desired,
    devices: Iterable[tuple[range | None, range | None, Device]] = (),
) -> VmControl:
    """A VM that is yet to run; its user's handle is the control's `handle`. Parameters as of `VmControl`."""
    control = VmControl(house, spec, tenant, above, desired, devices)
    control.handle = Vm(control)
    return control
