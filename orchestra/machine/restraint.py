"""What holds a run's vCPU threads back from the host's CPUs: caps, and the quarantine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ..host.control.caps import Caps, CgroupCaps, RunLoopCaps
from ..model.errors import OrchestraError, StateError
from ..native.core import VcpuCore
from .context import InstanceContext
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


class Restraint:
    """Caps and isolation of one run. `vcpus`: a list that the instance fills while it builds the machine."""

    def __init__(self, context: InstanceContext, name: str, life: Lifecycle, vcpus: Sequence[Vcpu], caps: Caps) -> None:
        self.caps = caps
        self._context = context
        self._name = name
        self._life = life
        self._vcpus = vcpus

    def cap_cpu(self, share: float | None) -> None:
        """Let each vCPU's thread use at most that share of a CPU (0.01 to 1) from now on; None: no cap.

        Raises:
            StateError: the backend gives the run no threads.
            ResourceLimit: the host lacks the resources for a cap, or refuses it.
        """
        with self._threads("cap the CPU of") as threads:
            if not self._life.has_ended:
                self.caps.put(share, threads)

    def capped(self, index: int, now: int) -> int:
        """Nanoseconds for which a cap has held that vCPU so far."""
        return 0 if self._life.has_ended else self.caps.held(index, now)

    def isolate(self, on: bool) -> None:
        """Move the vCPUs' threads to the quarantine CPUs, or (False) back to the CPUs of all others.

        Raises:
            StateError: the backend gives the run no threads.
            ResourceLimit: this host has no CPU to spare.
        """
        with self._threads("isolate" if on else "let in") as threads:
            if on:
                self._context.quarantine.confine(threads.values())
            else:
                self._context.quarantine.free(threads.values())

    @contextmanager
    def _threads(self, verb: str) -> Iterator[dict[int, int]]:
        """The kernel's thread numbers of the vCPUs that have not ended, by vCPU. No such thread ends within the block:
        otherwise the kernel could give its number to another thread before the number is used."""
        if not all(vcpu.engine.threaded for vcpu in self._vcpus):
            name = self._context.backend.name
            raise StateError(
                f"can't {verb} vm {self._name!r}: not supported by this backend ({name}), it has no threads"
            )
        with ExitStack() as stack:
            numbers = {vcpu.index: stack.enter_context(vcpu.living()) for vcpu in self._vcpus}
            yield {index: tid for index, tid in numbers.items() if tid is not None}
