"""Makes the machine of one run: memory, cores, the VM of the backend; and gives all of it back if that fails.

    quick, and the core can make it   memory and image here ─▶ the kernel's part in the core (`builder`) ─▶ devices here
    all else that may take long       all of it on a worker thread (`workers`)
    virtual time                      all of it here

To hand work to a worker thread and back takes about 0.3 ms, and two threads then want the interpreter's lock. So the
first way is for what takes Python less than that.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio

from ..backend import EntryState, Machine, Planner
from ..backend.memory import GuestMemory
from ..model.errors import OrchestraError, ResourceLimit
from ..model.spec import VmSpec
from ..native.core import VcpuCore
from . import boot
from .budget import Budgets, connect
from .context import InstanceContext
from .devices.assembly import close_back_ends, connect_back_ends
from .devices.bus import Bus
from .prefault import Claim, check_room, is_small

if TYPE_CHECKING:
    from .devices.vhost.backend import BackEnd

__all__ = ["Making"]

NO_THREAD: Final = "can't start new thread"  # threading's RuntimeError has no type of its own
THREADS: Final = "see ulimit -u and cgroup pids.max"


class Run(Protocol):
    """The run whose machine is made."""

    context: InstanceContext
    spec: VmSpec
    name: str
    levels: Sequence[tuple[Budgets, Budgets, Budgets, Budgets]]
    ports: Bus
    mmio: Bus
    memory: GuestMemory
    back_ends: Mapping[int, BackEnd]

    def equip(self, machine: Machine) -> None:
        """Take over the machine, plug the devices in and start the threads, which are held. If that fails, the machine
        is closed. Any thread."""


def is_quick(spec: VmSpec) -> bool:
    """Whether all but the kernel's part takes microseconds: no file is read, little is copied, and no device takes
    long to make."""
    devices = spec.machine_devices
    return spec.boot.quick and all(device.quick for device in devices) and not spec.regions and is_small(spec)


class Making:
    """Makes one run's machine, once.

    Parameters:
        cores: a list that is filled with the vCPUs' cores.
    """

    def __init__(self, run: Run, cores: list[VcpuCore]) -> None:
        self._run = run
        self._context = run.context
        self._cores = cores
        self._memory: GuestMemory | None = None

    async def make(self, mine: Claim) -> None:
        """Make the machine where that delays nobody: ioctls that create VMs take from 0.3 to 30 ms.

        If this is cancelled, it first waits until the machine is made, and gives it back.

        Raises:
            OrchestraError: the host can't give the run what it needs. Everything is given back.
        """
        run, context = self._run, self._context
        if not context.backend.blocking:
            await trio.lowlevel.checkpoint()
            self._make_here(mine)
        elif context.planner is not None and is_quick(run.spec):
            await self._make_in_core(mine, context.planner)
        else:
            await self._make_elsewhere(mine)

    async def _make_elsewhere(self, mine: Claim) -> None:
        run, workers = self._run, self._context.workers
        try:
            if run.spec.has_back_ends:
                run.back_ends = await workers.run(partial(connect_back_ends, run.spec), workers.files)
            await workers.run(partial(self._make_here, mine), workers.setup)
        except BaseException as error:
            if run.back_ends:
                with trio.CancelScope(shield=True):
                    await workers.run(partial(close_back_ends, run.back_ends), workers.files)
            if not isinstance(error, RuntimeError) or NO_THREAD not in str(error):
                raise
            raise ResourceLimit(errno.EAGAIN, f"vm {run.name!r}: {error}; {THREADS}") from error

    async def _make_in_core(self, mine: Claim, planner: Planner) -> None:
        run, context = self._run, self._context
        with self._or_give_back():
            states = self._prepare(mine)
            plan = planner.plan(run.spec, self._cores, run.memory, states, bus_locks=context.bus_locks)
            try:
                await context.builder.make(plan)
            except BaseException:
                with suppress(OrchestraError):  # it could not be made either
                    plan.machine().close()
                raise
            run.equip(plan.machine())

    def _make_here(self, mine: Claim) -> None:
        run, context = self._run, self._context
        with self._or_give_back():
            states = self._prepare(mine)
            create = context.backend.create
            run.equip(create(run.spec, self._cores, run.memory, states, bus_locks=context.bus_locks))

    @contextmanager
    def _or_give_back(self) -> Iterator[None]:
        """If the block fails, memory and cores are given back."""
        try:
            yield
        except BaseException:
            for core in self._cores:
                core.close()
            if self._memory is not None:
                self._memory.close()
            raise

    def _prepare(self, mine: Claim) -> list[EntryState]:
        """Make memory and cores, and load what is booted. Returns where the vCPUs start."""
        run, context = self._run, self._context
        check_room(run.spec, mine)
        self._memory = run.memory = GuestMemory(run.spec, open_file=context.open_file)
        for index in range(run.spec.vcpus):
            core = VcpuCore(context.core, context.next_id())
            self._cores.append(core)
            connect(core, run.levels[index])
            core.set_buses(run.ports.handle, run.mmio.handle)
        return boot.load(run.spec, run.memory)
