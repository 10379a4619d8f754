"""Opens a fleet: chooses the backend, makes the parts, and gives everything back however the block is left."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import trio

from ..backend import Backend, Detection, choose
from ..backend.detection import Asked
from ..host.control.bandwidth import CpuCgroup
from ..host.control.placement import Quarantine, quarantine_cpus
from ..host.control.priority import LoopPriority
from ..host.control.resources import ControlGroup
from ..host.observe import HostSignals
from ..machine.workers import at_length
from ..model.errors import BusLockUnsupported, SpecError
from ..model.journalspec import JournalSpec
from ..native.core import FleetCore
from ..policy import Policy
from .context import FleetContext, FleetResources
from .door import door
from .fleet import Fleet
from .recorder import Recorder
from .spec import FleetSpec

__all__ = ["open_fleet"]

log: Final = logging.getLogger("orchestra")

LOOKED_AT: Final = 1.0
"""Seconds between two looks at the host, if only a probe needs them: there is no journal."""

_PRIORITY: Final[trio.lowlevel.RunVar[LoopPriority | None]] = trio.lowlevel.RunVar("orchestra.priority", None)

NO_HOST: Final = "the scripted backend runs nothing on this host"


def _detection(backend: Backend, needed: str) -> Detection | None:
    """How this backend reports bus locks; None: it does not. Design rule 3: needed and impossible is an error.

    Parameters:
        needed: the argument that needs bus locks to be seen; empty: no argument does.

    Raises:
        BusLockUnsupported: an argument needs them, and the backend does not report them.
    """
    detection = backend.bus_lock_detection()
    if detection is not None:
        return detection
    if needed:
        raise BusLockUnsupported(
            f"{needed}: this host's KVM can't report bus locks "
            "(KVM_CAP_X86_BUS_LOCK_EXIT lacks KVM_BUS_LOCK_DETECTION_EXIT). They need an Intel CPU with bus-lock "
            "detection and Linux 5.12, or an AMD one with Bus Lock Threshold and Linux 6.16; see `orchestra doctor`. "
            "backend='emulated' sees them on any host, and backend='auto' takes it where they are needed. "
            'Without limits on bus locks, bus_locks="auto" runs and only can\'t see them; exit_limit works anywhere'
        )
    log.warning("bus locks can't be seen on this host (backend %s); everything else works", backend.name)
    return None


@door(FleetSpec)
@asynccontextmanager
async def open_fleet(spec: FleetSpec) -> AsyncIterator[Fleet]:
    """Open a fleet. Leaving the block stops its VMs, and leaves no thread, descriptor or mapping behind.

    ``open_fleet(limit=..., tenants=...)`` is the short way to ``open_fleet(FleetSpec(limit=..., tenants=...))``: all
    fields of `FleetSpec` may be given by name, and are explained there. Beside a spec they replace what it says.

    Parameters:
        spec: the fleet. You may open a spec several times, if it holds no live policy: each fleet gets new policies,
            and a guard that has seen nothing yet.

    Raises:
        BusLockUnsupported: bus locks are required or limited, and can't be seen here. No guest has run then.
        BackendUnavailable, NoSuchBackend, SpecError: the message says what to do.
    """
    policies = spec.make_policies()
    cpus = quarantine_cpus(spec.quarantine)
    needed = spec.needs_bus_locks(policies)
    async with AsyncExitStack() as stack:
        backend = choose(spec.backend, Asked(needed))
        if isinstance(spec.backend, str):
            stack.callback(backend.close)
        log.info("backend %s", backend.why)
        if spec.host_budget is not None and not backend.blocking:
            raise SpecError(
                f"host_budget: backend {backend.name} has a clock of its own, which other processes don't share; leave "
                "it out, or take backend='kvm' or 'emulated'"
            )
        resources = _resources(spec, backend, needed, cpus, stack)
        if resources.recorder is not None:
            await stack.enter_async_context(_recording(resources.recorder, resources))
        if backend.blocking:
            stack.enter_context(_priority())
        yield await stack.enter_async_context(_running(spec, resources, policies))


def _resources(
    spec: FleetSpec, backend: Backend, needed: str, cpus: frozenset[int], stack: AsyncExitStack
) -> FleetResources:
    """Make what a fleet is opened on. `stack` closes it, the last first."""
    detection = None if spec.bus_locks == "off" else _detection(backend, needed)
    folder = None if spec.cgroup is None else Path(spec.cgroup)
    cpu_cgroup = isolated = None
    if backend.blocking:  # scripts have no threads
        cpu_cgroup = CpuCgroup(folder) if spec.cap_by == "cgroup" else None
        isolated = None if spec.quarantine_class is None else ControlGroup(Path(spec.quarantine_class))
    core = FleetCore()
    stack.callback(core.close)
    if spec.host_budget is not None:
        core.share(spec.host_budget.buckets)
    host = HostSignals(
        probe=spec.probe,
        cgroup=folder,
        isolated=None if isolated is None else isolated.folder,
        silent=None if backend.blocking else NO_HOST,
    )
    stack.callback(host.close)
    return FleetResources(
        backend=backend,
        core=core,
        detection=detection,
        host=host,
        quarantine=Quarantine(cpus, isolated, host.add_thread),
        cpu_cgroup=cpu_cgroup,
        recorder=_recorder(spec.journal),
    )


def _recorder(journal: Recorder | JournalSpec | None) -> Recorder | None:
    if not isinstance(journal, JournalSpec):
        return journal
    from ..journal.writer import Journal  # here, as this loads SQLite, which a fleet without a journal does not need

    return Journal(journal.path, keep_days=journal.keep_days, keep_bytes=journal.keep_bytes)


@contextmanager
def _priority() -> Iterator[None]:
    """This thread runs before busy guests while fleets of this run of trio are open."""
    priority = _PRIORITY.get()
    if priority is None:
        priority = LoopPriority()
        _PRIORITY.set(priority)
    priority.acquire()
    try:
        yield
    finally:
        priority.release()


@asynccontextmanager
async def _recording(recorder: Recorder, resources: FleetResources) -> AsyncIterator[None]:
    """Keep the journal open. It ends after all VMs have ended."""
    backend = resources.backend
    await _off_the_loop(recorder.begin, backend.now(), backend.name, resources.detection)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):  # rows that wait are written, even if cancelled
            await _off_the_loop(recorder.end, backend.now())


@asynccontextmanager
async def _running(spec: FleetSpec, resources: FleetResources, policies: list[Policy]) -> AsyncIterator[Fleet]:
    """The fleet, in a nursery of its own. A single error comes out as itself, and not in a group."""
    observed = spec.journal_interval if resources.recorder is not None else LOOKED_AT if spec.probe else None
    context: FleetContext | None = None
    error: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            context = FleetContext(resources, spec, policies, nursery)
            context.start(observed)
            try:
                yield Fleet(context)
            except BaseException as raised:
                error = raised
            context.supervisor.closing = True
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error = _merge(group, error)
    finally:
        if context is not None:
            with trio.CancelScope(shield=True):  # the kernel takes memory back
                await context.close()
    if error is not None:
        raise error


async def _off_the_loop(function: Callable[..., object], *arguments: object) -> None:
    """Call a function that waits for a disk on a worker thread; on this thread if the host has none left."""
    called: list[bool] = []

    def call() -> None:
        called.append(True)
        function(*arguments)

    try:
        await trio.to_thread.run_sync(at_length, call)
    except RuntimeError:
        if called:
            raise
        call()


def _merge(group: BaseExceptionGroup[BaseException], raised: BaseException | None) -> BaseException:
    """Users don't see the nursery: a single error comes out as itself, so `except SpecError` around the block works."""
    _, others = group.split(trio.Cancelled)
    errors = list(_leaves(others)) if others is not None else []
    if raised is not None and not isinstance(raised, trio.Cancelled):
        errors.append(raised)
    if not errors:
        return group
    return errors[0] if len(errors) == 1 else BaseExceptionGroup("errors in a fleet", errors)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
