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

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs

from ..fleet import open as opening
from ..fleet.door import door
from ..fleet.spec import FleetSpec
from ..machine import vm as machine
from ..model.actions import Evict
from .block import Block
from .callback import ask
from .handles import Fleet, Vm
from .loop import LoopBridge
from .streams import Console, ConsolePort, Exits, Request, Requests, Watch
from .thread import ThreadBridge
from .wrapper import wrapped

__all__ = ["Console", "ConsolePort", "Exits", "Fleet", "Request", "Requests", "Vm", "Watch", "open_fleet"]


@attrs.frozen(kw_only=True)
class _Fields(FleetSpec):
    """What `open_fleet` takes by name."""

    thread: bool = False


@door(_Fields)
@asynccontextmanager
async def open_fleet(spec: FleetSpec) -> AsyncIterator[Fleet]:
    """As `orchestra.open_fleet`, for asyncio programs.

    Leaving the block waits until nothing of the fleet is left, however it is left and however often it is cancelled
    meanwhile. If the fleet fails while the block runs, the block is cancelled and the error comes out of it.

    Parameters:
        spec: the fleet; or its fields by name. Its `on_evict` is an asyncio function, and gets this side's `Vm`.
        thread: run trio in a thread of its own and not on the loop's: for loops that another library drives in its own
            way, or that are blocked for long. Calls that do not wait then take a hop as well. Without it, all fleets of
            a loop share one trio run.

    Raises:
        StateError: the loop's thread runs trio already, for somebody else.
        BusLockUnsupported, BackendUnavailable, NoSuchBackend, SpecError: as `orchestra.open_fleet`.
    """
    bridge = await (ThreadBridge.open() if getattr(spec, "thread", False) else LoopBridge.open())

    moves = spec.on_evict

    async def evict(vm: machine.Vm, action: Evict) -> None:
        assert moves is not None
        await ask(bridge, moves, wrapped(Vm, bridge, vm), action)

    try:
        inner = spec if moves is None else attrs.evolve(spec, on_evict=evict)
        opened = partial(opening.open_fleet, inner)
        async with Block(bridge, opened, partial(Fleet, bridge)) as fleet:
            yield fleet
    finally:
        await bridge.release()
