"""For the tests of your own control plane: a fleet without a host, in virtual time, and guests with a known behaviour.

    async def test_the_noisy_one_is_slowed(autojump_clock):  # pytest-trio's
        async with orc.open_fleet(backend=testing.backend(), limit=orc.Limit(rate=100)) as fleet:
            noisy = await fleet.launch(testing.split_locking(rate=1000))
            await testing.wait_until(lambda: noisy.throttled)

With the pytest plugin (fixtures ``orchestra_fleet``, ``orchestra_backend``; marker ``orchestra``) it is shorter. See
docs/testing.md.

It may import a fleet and everything below.
The one to copy: `waiting.py`.
"""

from __future__ import annotations

from ..backend.scripted import (
    ScriptedBackend,
    ScriptedExit,
    bus_lock,
    failed_run,
    hlt,
    io_read,
    io_write,
    mmio_read,
    mmio_write,
    triple_fault,
)
from .device import DeviceRig
from .guests import crashing, halting, io_heavy, quiet, spinning, split_locking
from .scripts import backend, script
from .waiting import run, wait_state, wait_until

__all__ = [
    "DeviceRig",
    "ScriptedBackend",
    "ScriptedExit",
    "backend",
    "bus_lock",
    "crashing",
    "failed_run",
    "halting",
    "hlt",
    "io_heavy",
    "io_read",
    "io_write",
    "mmio_read",
    "mmio_write",
    "quiet",
    "run",
    "script",
    "spinning",
    "split_locking",
    "triple_fault",
    "wait_state",
    "wait_until",
]
