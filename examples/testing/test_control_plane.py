"""Minutes of a control plane in milliseconds: no KVM, and no time but the fleet's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import trio

import orchestra as orc
from orchestra import testing

from .control_plane import PLANS, ControlPlane


@pytest.fixture
def alerts() -> list[str]:
    return []


@pytest.fixture
async def plane(orchestra_fleet: orc.Fleet, nursery: trio.Nursery, alerts: list[str]) -> ControlPlane:
    plane = ControlPlane(orchestra_fleet, alerts.append)
    nursery.start_soon(plane.watch)
    return plane


async def test_a_quiet_machine_is_left_alone(plane: ControlPlane, alerts: list[str]) -> None:
    vm = await plane.create("acme", "web", testing.quiet().boot)
    await trio.sleep(600)
    assert vm.state is orc.State.RUNNING
    assert vm.statistics().throttled_seconds == 0
    assert alerts == []


async def test_a_noisy_machine_is_slowed_at_once_and_paused_after_a_minute(
    plane: ControlPlane, alerts: list[str]
) -> None:
    vm = await plane.create("acme", "batch", testing.split_locking(rate=1000).boot)
    await testing.wait_until(lambda: vm.throttled)
    assert trio.current_time() < 0.1
    await testing.wait_until(lambda: alerts, within=61)
    assert vm.state is orc.State.PAUSED
    assert alerts == [f"acme.batch is paused: {vm.statistics().bus_locks} bus locks"]
    (applied,) = plane.fleet.actions()
    assert isinstance(applied.action, orc.Pause)
    assert applied.action.reason == "held back for a minute"


@pytest.mark.parametrize("plan", PLANS)
async def test_a_machine_has_no_more_bus_locks_than_its_plan_allows(plane: ControlPlane, plan: str) -> None:
    vm = await plane.create("acme", "batch", testing.split_locking(rate=2000).boot, plan)
    await trio.sleep(10)
    limit = PLANS[plan]
    assert vm.statistics().bus_locks == pytest.approx(limit.tokens + limit.rate * 10, rel=0.01)


async def test_a_machine_that_crashes_is_restarted_three_times(plane: ControlPlane) -> None:
    vm = await plane.create("acme", "web", testing.crashing(after=5).boot)
    await testing.wait_state(vm, "failed")
    assert vm.restarts == 3
    assert trio.current_time() > 4 * 5


async def test_a_neighbour_does_not_notice_a_crash(plane: ControlPlane) -> None:
    good = await plane.create("acme", "web", testing.quiet(rate=10).boot)
    bad = await plane.create("initech", "web", testing.crashing(how="triple-fault", after=1).boot)
    assert await bad.wait() == orc.Shutdown(reason="triple fault")
    await trio.sleep(1)
    assert good.statistics().exits["io"] == pytest.approx(20, abs=1)


# ---- a machine whose code no ready guest stands for: say what it does


def starts_up_and_locks(spec: orc.VmSpec, vcpu: int) -> Iterator[testing.ScriptedExit]:
    yield testing.io_write(0x3F8, b"!", after=2.0)
    for _ in range(5):
        yield testing.bus_lock(after=0.1)
    yield testing.hlt()


@pytest.mark.orchestra(scripts=starts_up_and_locks)
async def test_a_machine_of_ones_own_making(plane: ControlPlane) -> None:
    vm = await plane.create("acme", "own", orc.FlatImage(code=b"\xf4"))
    assert await vm.wait() == orc.Halted()
    assert vm.statistics().bus_locks == 5


# ---- options of the fleet, made anew for each test


class TestHost:
    """The host has a limit as well."""

    @pytest.fixture
    def orchestra_options(self, orchestra_options: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"limit": orc.Limit(rate=60, burst=10), **orchestra_options}

    async def test_two_machines_share_what_the_host_allows(self, plane: ControlPlane) -> None:
        for customer in ("acme", "initech"):
            await plane.create(customer, "batch", testing.split_locking(rate=1000).boot)
        await trio.sleep(10)
        assert plane.fleet.statistics().bus_locks == pytest.approx(610, rel=0.01)

    @pytest.mark.orchestra(limit=None)
    async def test_without_it_each_has_its_plan(self, plane: ControlPlane) -> None:
        for customer in ("acme", "initech"):
            await plane.create(customer, "batch", testing.split_locking(rate=1000).boot)
        await trio.sleep(10)
        assert plane.fleet.statistics().bus_locks == pytest.approx(2 * 510, rel=0.01)
