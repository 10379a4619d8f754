"""What can be seen of a VM, by its users: the part of `Vm` that changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..model.actions import Outcome, State
from ..profile import Profile, Symbols
from .control import VmControl
from .desired import Desired
from .statistics import VmStatistics

__all__ = ["VmView"]


class VmView:
    """What can be seen of a VM. A `Vm` has all of this."""

    name: str
    _control: VmControl

    @property
    def outcome(self) -> Outcome | None:
        """How the VM ended; None: it has not ended."""
        return self._control.outcome

    @property
    def state(self) -> State:
        """Created (being set up), running, waiting (between two runs, for a restart's back-off or a reset's turn),
        paused (also between two runs), stopped or failed. `quiesced` says whether the state of a paused VM may be read
        and saved."""
        return self._control.state

    @property
    def restarts(self) -> int:
        """How often the VM was restarted (`VmSpec.restart`)."""
        return self._control.runs.succession.restarts

    @property
    def quiesced(self) -> bool:
        """Whether the VM is paused and no access is pending: registers and memory stay as they are."""
        return self._control.inspection.quiesced

    @property
    def throttled(self) -> bool:
        """Whether one of the vCPUs is throttled right now."""
        return self._control.inspection.throttled

    @property
    def desired(self) -> Desired:
        """What is desired of the VM now: a pause, caps, isolation, logging, sampling, limits. A frozen record, which
        outlives restarts and resets."""
        return self._control.desired

    def __repr__(self) -> str:
        return f"<Vm {self.name!r} {self.state}>"

    # ---- inspection

    def registers(self, vcpu: int = 0) -> Any:
        """A vCPU's general registers (.rax ... .r15, .rip, .rflags), while the vCPU is quiesced or after it has ended.

        Raises:
            SpecError: the VM has no such vCPU.
            StateError: the vCPU runs: `pause` the VM first, or use `inspect`. Or the vCPU is paused in the middle of an
                access, and its registers change with the answer (`VmStatistics.pending`).
        """
        return self._control.inspection.registers(vcpu)

    async def inspect(self, vcpu: int = 0) -> Any:
        """A running vCPU's general registers, read between two entries of the guest, without a pause. In the middle of
        an access that waits for an answer, these are the registers before the answer."""
        return await self._control.inspection.inspect(vcpu)

    def statistics(self) -> VmStatistics:
        """What the VM did since its launch, as frozen data."""
        return self._control.inspection.statistics()

    async def kernel_statistics(self) -> Mapping[str, float]:
        """KVM's own statistics, in whole units (seconds, bytes), by the kernel's names: of the VM ("pages_4k"), and of
        each vCPU ("vcpu0.exits"). The set of names differs from kernel to kernel. Source:
        Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD.

        The first call of a run opens a descriptor for the VM and for each vCPU. A vCPU's own thread opens it between
        two entries of the guest, so this call waits for a device that answers on that thread.

        Raises:
            StateError: the VM has ended, or does not run on KVM.
            KvmError: this KVM has no statistics.
        """
        return await self._control.inspection.kernel_statistics()

    def profile(self, symbols: Iterable[Symbols] = ()) -> Profile:
        """The instructions that locked the bus since the VM was launched, restarts included; see `Profile`.

        They are disassembled if iced-x86 is installed (``pip install 'orchestra-kvm[profile]'``). This takes about a
        tenth of a millisecond for each instruction.

        Parameters:
            symbols: functions of the guest; the first entry that knows an address names it.
        """
        return self._control.inspection.profile(symbols)
