"""orchestra for asyncio programs: the same names, awaited in asyncio.

`open_fleet` opens a fleet whose methods any task of the loop may call. trio, which runs the fleet, is a guest of the
loop, on the loop's thread; with ``thread=True`` it has a thread of its own.

It may import a fleet and everything below.
The one to copy: `streams.py`.
"""

# Down the room, each uses those after it only:
#   handles, streams   Fleet and Vm; what comes from them
#   wrapper, block     what these are made of
#   loop, thread       the two ways to run trio for an asyncio program
#   callback           what the fleet asks its owner
#   bridge             calls and cancellation

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from ..backend import Backend
from ..fleet import open as opening
from ..fleet.recorder import Recorder
from ..machine import vm as machine
from ..model.actions import Evict
from ..model.spec import Limit, Tenant
from ..policy import Guard, Policy
from .block import Block
from .callback import ask
from .handles import Fleet, Vm
from .loop import LoopBridge
from .streams import Console, Exits, Request, Requests, Watch
from .thread import ThreadBridge
from .wrapper import wrapped

__all__ = ["Console", "Exits", "Fleet", "Request", "Requests", "Vm", "Watch", "open_fleet"]

OnEvict = Callable[[Vm, Evict], Awaitable[object]]
"""What moves a VM to another host, or raises why not."""


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
    thread: bool = False,
) -> AsyncIterator[Fleet]:
    """As `orchestra.open_fleet`, for asyncio programs.

    Leaving the block waits until nothing of the fleet is left, however it is left and however often it is cancelled
    meanwhile. If the fleet fails while the block runs, the block is cancelled and the error comes out of it.

    Parameters:
        thread: run trio in a thread of its own and not on the loop's: for loops that another library drives in its own
            way, or that are blocked for long. Calls that do not wait then take a hop as well. Without it, all fleets of
            a loop share one trio run.
        on_evict: as `orchestra.open_fleet`, and an asyncio function.
        backend, limit, exit_limit, answer_limit, tenants, policies, bus_locks, strict: as `orchestra.open_fleet`.
        guard, journal, journal_interval, probe, cgroup, cap_by: as `orchestra.open_fleet`.
        quarantine, quarantine_class: as `orchestra.open_fleet`.

    Raises:
        StateError: the loop's thread runs trio already, for somebody else.
        BusLockUnsupported, BackendUnavailable, NoSuchBackend, SpecError: as `orchestra.open_fleet`.
    """
    bridge = await (ThreadBridge.open() if thread else LoopBridge.open())

    async def evict(vm: machine.Vm, action: Evict) -> None:
        assert on_evict is not None
        await ask(bridge, on_evict, wrapped(Vm, bridge, vm), action)

    try:
        opened = partial(
            opening.open_fleet,
            backend=backend,
            limit=limit,
            exit_limit=exit_limit,
            answer_limit=answer_limit,
            tenants=tenants,
            policies=policies,
            bus_locks=bus_locks,
            strict=strict,
            guard=guard,
            journal=journal,
            journal_interval=journal_interval,
            probe=probe,
            cgroup=cgroup,
            cap_by=cap_by,
            on_evict=None if on_evict is None else evict,
            quarantine=quarantine,
            quarantine_class=quarantine_class,
        )
        async with Block(bridge, opened, partial(Fleet, bridge)) as fleet:
            yield fleet
    finally:
        await bridge.release()
