"""Hosts whose KVM reports no bus locks: said before any guest runs, and never pretended."""

from __future__ import annotations

import struct

import pytest
import trio

import orchestra as orc
from conftest import ROUNDS, bus_lock_problem, lock_spec

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(bus_lock_problem() is None, reason="this host reports bus locks"),
]


async def test_require_refuses_before_any_guest_runs():
    with pytest.raises(orc.BusLockUnsupported, match="orchestra doctor"):
        async with orc.open_fleet(backend="kvm", bus_locks="require"):
            pytest.fail("the fleet opened")


async def test_auto_runs_and_says_that_it_only_cant_see_them(caplog):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(lock_spec("add", 32), paused=True)
        vm.write_memory(ROUNDS, struct.pack("<I", 20))
        await vm.resume()
        with trio.fail_after(30):
            assert await vm.wait() == orc.Halted()
        assert vm.statistics().bus_locks is None
        assert fleet.statistics().bus_locks is None
        assert fleet.statistics().bus_lock_detection is None
    assert "bus locks can't be seen" in caplog.text


@pytest.mark.parametrize("where", ["host", "tenant", "vm", "live"])
async def test_a_limit_on_what_cant_be_seen_is_refused_wherever_it_is_asked_for(where):
    limit = orc.Limit(rate=10)
    with pytest.raises(orc.BusLockUnsupported, match="limit"):  # noqa: PT012 - where it comes from is what varies
        async with orc.open_fleet(
            backend="kvm", limit=limit if where == "host" else None, tenants={"t": limit if where == "tenant" else None}
        ) as fleet:
            assert where in ("vm", "live")
            if where == "live":
                await fleet.set_limit(limit)
            await fleet.launch(lock_spec("add", 32, limit=limit))
