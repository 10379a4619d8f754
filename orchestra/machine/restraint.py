"""What holds a run's threads back from the host's CPUs: caps, and the quarantine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from ..host.control.caps import Caps, CgroupCaps, RunLoopCaps
from ..model.errors import OrchestraError, ResourceLimit, StateError
from ..native.core import VcpuCore
from .context import InstanceContext
from .devices.assembly import Assembly
from .lifecycle import Lifecycle
from .vcpu import Vcpu

__all__ = ["Restraint", "make_caps"]


def make_caps(
    context: InstanceContext,
    name: str,
    cores: Sequence[VcpuCore],
    ask: Callable[[int, Callable[[], None]], object],
    post: Callable[..., object],
    failed: Callable[[OrchestraError], object],
) -> Caps:
    """Make the object that keeps this run's CPU caps; parameters as in `CgroupCaps`."""
    if context.cpu_cgroup is None:
        return RunLoopCaps(cores)
    return CgroupCaps(context.cpu_cgroup, name, ask, post, failed)


class Restrained(Protocol):
    """The run, as `Restraint` needs it."""

    context: InstanceContext
    name: str
    life: Lifecycle
    vcpus: list[Vcpu]
    devices: Assembly | None


class Restraint:
    """Caps and isolation of one run: of its vCPUs' threads, and of those that serve its devices."""

    def __init__(self, run: Restrained, caps: Caps) -> None:
        self.caps = caps
        self._run = run
        self._share: float | None = None

    def cap_cpu(self, share: float | None) -> None:
        """Let each vCPU's thread, and the I/O thread, use at most that share of a CPU (0.01 to 1) from now on; None: no
        cap. The I/O thread never enters Python, so it can't move itself into a cgroup: the core holds it in any case.

        Raises:
            StateError: the backend gives the run no threads.
            ResourceLimit: the host lacks the resources for a cap, or refuses it.
        """
        with self._threads("cap the CPU of") as threads:
            if not self._run.life.has_ended:
                self._cap_io(share)
                try:
                    self.caps.put(share, threads)
                except ResourceLimit:  # all threads or none
                    self._cap_io(self._share)
                    raise
                self._share = share

    def _cap_io(self, share: float | None) -> None:
        if self._run.devices is not None:
            self._run.devices.cap_io(self._run.context.core.handle, share)

    def capped(self, index: int, now: int) -> int:
        """Nanoseconds for which a cap has held that vCPU so far."""
        return 0 if self._run.life.has_ended else self.caps.held(index, now)

    def isolate(self, on: bool) -> None:
        """Move the vCPUs' threads and the I/O thread to the quarantine CPUs, or (False) back to the CPUs of all others.

        Raises:
            StateError: the backend gives the run no threads.
            ResourceLimit: this host has no CPU to spare.
        """
        devices, quarantine = self._run.devices, self._run.context.quarantine
        with self._threads("isolate" if on else "let in") as threads, ExitStack() as stack:
            more = [] if devices is None else stack.enter_context(devices.io_threads())
            (quarantine.confine if on else quarantine.free)([*threads.values(), *more])

    @contextmanager
    def _threads(self, verb: str) -> Iterator[dict[int, int]]:
        """The kernel's thread numbers of the vCPUs that have not ended, by vCPU. No such thread ends within the block:
        otherwise the kernel could give its number to another thread before the number is used."""
        if not all(vcpu.engine.threaded for vcpu in self._run.vcpus):
            name = self._run.context.backend.name
            raise StateError(
                f"can't {verb} vm {self._run.name!r}: not supported by this backend ({name}), it has no threads"
            )
        with ExitStack() as stack:
            numbers = {vcpu.index: stack.enter_context(vcpu.living()) for vcpu in self._run.vcpus}
            yield {index: tid for index, tid in numbers.items() if tid is not None}
