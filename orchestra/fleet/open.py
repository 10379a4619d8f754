"""The way into a fleet: arguments checked, backend chosen, and everything given back however the block is left."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal

import trio

from ..backend import Backend, Detection, choose
from ..backend.detection import Asked
from ..host.control.bandwidth import CpuCgroup
from ..host.control.placement import Quarantine, quarantine_cpus
from ..host.control.resources import ControlGroup
from ..host.observe import HostSignals
from ..machine.budget import make_budgets
from ..model.errors import BusLockUnsupported, SpecError
from ..model.spec import Limit, Meter, Tenant, optional_limit
from ..native.core import FleetCore
from ..policy import Guard, Policy
from ..policy.state import check_policies
from .executor import OnEvict
from .fleet import DEFAULT_TENANT, Fleet
from .recorder import Recorder

__all__ = ["open_fleet"]

log: Final = logging.getLogger("orchestra")

LOOKED_AT: Final = 1.0
"""Seconds between two looks at the host, where only a probe asks for them."""

NO_HOST: Final = "the scripted backend runs nothing on this host"


def _as_tenants(tenants: Mapping[str, Limit | Tenant | None] | Iterable[Tenant]) -> dict[str, Tenant]:
    """All the ways to name tenants, and the default one."""
    made: dict[str, Tenant] = {}
    items: Iterator[tuple[Any, Any]]
    items = iter(tenants.items()) if isinstance(tenants, Mapping) else ((getattr(t, "name", None), t) for t in tenants)
    for name, value in items:
        if isinstance(value, Tenant):
            if value.name != name:
                raise SpecError(f"tenants[{name!r}]: its name is {value.name!r}: they must be the same")
            made[name] = value
        elif value is None or isinstance(value, Limit):
            made[name] = Tenant(name, limit=value)
        else:
            raise SpecError(f"tenants[{name!r}]={value!r}: must be a Tenant, a Limit, or None for no limit")
    made.setdefault(DEFAULT_TENANT, Tenant(DEFAULT_TENANT))
    return made


def _detection(backend: Backend, needed: str) -> Detection | None:
    """How this backend sees bus locks; None: not at all. Design rule 3: needed and impossible is an error.

    `needed`: which argument needs them; empty: none does.
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


@asynccontextmanager
async def open_fleet(
    *,
    backend: str | Backend = "auto",
    limit: Limit | None = None,
    exit_limit: Limit | None = None,
    answer_limit: Limit | None = None,
    tenants: Mapping[str, Limit | Tenant | None] | Iterable[Tenant] = (),
    policies: Iterable[Policy] = (),
    bus_locks: Literal["require", "auto", "off"] = "auto",
    strict: bool = False,
    guard: Guard | None = None,
    journal: Recorder | None = None,
    journal_interval: float = 1.0,
    probe: bool | None = None,
    cgroup: str | Path | None = None,
    cap_by: Literal["run-loop", "cgroup"] = "run-loop",
    on_evict: OnEvict | None = None,
    quarantine: Iterable[int] | None = None,
    quarantine_class: str | Path | None = None,
) -> AsyncIterator[Fleet]:
    """Open a fleet; leaving the block stops its VMs and leaves no thread, descriptor or mapping behind.

    Parameters:
        backend: "auto", "kvm", "emulated", "scripted", or a Backend object. "auto" is KVM where /dev/kvm opens, else
            emulated. Where these arguments need bus locks to be seen (a limit on them, a policy for them,
            bus_locks="require") and KVM reports none, it is emulated as well. `Fleet.backend.why` says which and why.
        limit: the host's: bus locks per second of all VMs together; None: only counted.
        exit_limit: the same for exits of any kind.
        answer_limit: the same for accesses that Python answers. (Each VM has a limit of its own by default.)
        tenants: by name, each a `Tenant`, a `Limit`, or None; or `Tenant` objects. VMs that name none belong to
            "default", which may be given here as well.
        policies: asked at each of their ticks; see `orchestra.policy`.
        bus_locks: "require" (fail where they can't be seen), "auto" (see them if they can be), "off".
        strict: a policy that raises ends the fleet instead of being switched off.
        guard: what no policy may do; used by this fleet only. Default: `Guard` with its defaults.
        journal: an `orchestra.journal.Journal`: actions, states, and what the VMs and the host did in each interval.
        journal_interval: seconds.
        probe: time locked operations and memory on this host all the while, for 0.2 to 0.4 % of a CPU. Default: if a
            policy needs it.
        cgroup: a version-2 cgroup: its pressure counts as the host's.
        cap_by: what keeps CPU caps. "run-loop": orchestra, on any host. "cgroup": the kernel, by cpu.max of cgroups
            that come and go below the one this process lives in (`cgroup`, if given, must be that one). A thread that
            the kernel holds may hold the interpreter's lock: docs/engine.md has what to expect of each.
        on_evict: an async function that is called with a VM and an `Evict` to move it to another host, or to raise why
            not.
        quarantine: CPUs for isolated VMs. Default: the last that this process may run on.
        quarantine_class: a resctrl control group for isolated VMs, such as "/sys/fs/resctrl/noisy"; you make it, and
            limit its part of the caches and of the memory bandwidth by its schemata. No CPU that has resctrl has run
            this yet.

    Raises:
        BusLockUnsupported: bus locks are required or limited, and can't be seen here. No guest has run then.
        BackendUnavailable, NoSuchBackend, SpecError: the message says what to do.
    """
    if bus_locks not in ("require", "auto", "off"):
        raise SpecError(f'bus_locks={bus_locks!r}: must be "require", "auto" or "off"')
    if cap_by not in ("run-loop", "cgroup"):
        raise SpecError(f'cap_by={cap_by!r}: must be "run-loop" or "cgroup"')
    _check(guard, journal, journal_interval)
    optional_limit("limit", limit)
    optional_limit("exit_limit", exit_limit)
    optional_limit("answer_limit", answer_limit)
    named = _as_tenants(tenants)
    seats = check_policies(policies)
    limits = {"limit": limit, **{f"tenants[{name!r}]": tenant.limit for name, tenant in named.items()}}
    asking = [what for what, given in limits.items() if given is not None]
    asking += [f"policy {p.name!r}" for p in seats if getattr(p, "meter", None) is Meter.BUS_LOCKS]
    asked = next(iter(asking), "")
    cpus = quarantine_cpus(quarantine)

    if bus_locks == "off" and asked:
        raise SpecError(f"{asked} limits bus locks, but bus_locks='off': leave one of them out")
    needed = asked or ("bus_locks='require'" if bus_locks == "require" else "")
    opened = choose(backend, Asked(needed))
    log.info("backend %s", opened.why)
    core: FleetCore | None = None
    host: HostSignals | None = None
    begun = False
    try:
        detection = None if bus_locks == "off" else _detection(opened, needed)
        folder = None if cgroup is None else Path(cgroup)
        cpu_cgroup = isolated = None
        if opened.blocking:  # scripts have no threads
            cpu_cgroup = CpuCgroup(folder) if cap_by == "cgroup" else None
            isolated = None if quarantine_class is None else ControlGroup(Path(quarantine_class))
        core = FleetCore()
        silent = None if opened.blocking else NO_HOST
        host = HostSignals(
            probe=probe, cgroup=folder, isolated=None if isolated is None else isolated.folder, silent=silent
        )
        if journal is not None:
            await _off_the_loop(journal.begin, opened.now(), opened.name, detection)
            begun = True
        budgets = make_budgets(
            {Meter.BUS_LOCKS: limit, Meter.EXITS: exit_limit, Meter.ANSWERS: answer_limit}, opened.now()
        )
        fleet: Fleet | None = None
        error: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                fleet = Fleet(
                    core=core,
                    backend=opened,
                    detection=detection,
                    budgets=budgets,
                    tenants=named,
                    policies=seats,
                    strict=strict,
                    nursery=nursery,
                    guard=guard or Guard(),
                    host=host,
                    recorder=journal,
                    on_evict=on_evict,
                    quarantine=Quarantine(cpus, isolated, host.add_thread),
                    cpu_cgroup=cpu_cgroup,
                )
                fleet.start(journal_interval if journal is not None else LOOKED_AT if probe else None)
                try:
                    yield fleet
                except BaseException as raised:
                    error = raised
                fleet.closing()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            error = _merge(group, error)
        finally:
            if fleet is not None:
                with trio.CancelScope(shield=True):  # the kernel takes memory back
                    await fleet.close()
            for budget in budgets.values():
                budget.close()
        if error is not None:
            raise error
    finally:
        if journal is not None and begun:
            with trio.CancelScope(shield=True):  # what waits is written
                await _off_the_loop(journal.end, opened.now())
        if host is not None:
            host.close()
        if core is not None:
            core.close()
        if isinstance(backend, str):
            opened.close()


def _check(guard: object, journal: object, journal_interval: object) -> None:
    if guard is not None and not isinstance(guard, Guard):
        raise SpecError(f"guard={guard!r}: must be a Guard, or None for one with its defaults")
    if journal is not None and not isinstance(journal, Recorder):
        raise SpecError(f"journal={journal!r}: must be an orchestra.journal.Journal, or None for none")
    number = isinstance(journal_interval, int | float) and not isinstance(journal_interval, bool)
    if not (number and 0.001 <= journal_interval <= 86400):  # type: ignore[operator]  # it is a number
        raise SpecError(f"journal_interval={journal_interval!r}: must be seconds, from 0.001 to 86400")


async def _off_the_loop(function: Callable[..., object], *arguments: object) -> None:
    """Call what waits for a disk on a worker thread; here if there is none to be had."""
    called: list[bool] = []

    def call() -> None:
        called.append(True)
        function(*arguments)

    try:
        await trio.to_thread.run_sync(call)
    except RuntimeError:
        if called:
            raise
        call()


def _merge(group: BaseExceptionGroup[BaseException], raised: BaseException | None) -> BaseException:
    """The nursery is our affair: one error comes out as itself, so that `except SpecError` around the block works."""
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
