"""What devices do on the event loop is charged to all levels, and has a part of the loop's time and no more."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from threading import RLock

import pytest
import trio
import trio.lowlevel

import orchestra as orc
from orchestra.machine.budget import Budgets, above, make_budgets
from orchestra.machine.debt import PIECE, Debt, Owed
from orchestra.machine.devices.service import ANSWER, Plugged, Service
from orchestra.machine.pacer import GRID, LOOK, PART, SAVED, STEPS, Pacer, Part
from orchestra.model.devices import Wiring
from orchestra.model.spec import Meter

SECOND = 10**9
ON_IDLE_CPUS = (0, 0, 0)


def level(limit: orc.Limit | None = None) -> Budgets:
    return make_budgets({**dict.fromkeys(Meter), Meter.ANSWERS: limit}, 0)


def close(*levels: Budgets) -> None:
    for budgets in levels:
        for budget in budgets.values():
            budget.close()


# ---- debts


@pytest.mark.parametrize("limited", ["host", "fleet", "tenant", "vm"])
def test_a_debt_waits_for_the_limit_of_each_level(limited):
    rate = orc.Limit(rate=1000, burst=1)
    fleet, tenant, vm = (level(rate if name == limited else None) for name in ("fleet", "tenant", "vm"))
    with orc.HostBudget.create(answer_limit=rate if limited == "host" else None) as host:
        debt = Debt(above(host.buckets, (fleet, tenant, vm), Meter.ANSWERS))
        assert debt.limited
        debt.add(20)
        begun = 3 * 10**18  # long after the budget was made, whose clock is the host's
        assert debt.due(begun) - begun == pytest.approx(0.020 * SECOND, rel=0.01)
        debt.leave()
    close(fleet, tenant, vm)


def test_a_debt_without_limits_is_paid_at_once():
    vm = level()
    debt = Debt(above(None, (vm,), Meter.ANSWERS))
    debt.add(10**9)
    assert not debt.limited
    assert debt.due(5) == 5
    close(vm)


def test_a_vm_that_owes_thousands_makes_its_tenants_others_wait_for_a_piece_only():
    tenant = level(orc.Limit(rate=1000, burst=1))
    owes, other = (Debt(above(None, (tenant,), Meter.ANSWERS)) for _ in range(2))
    owes.add(8000)
    other.add(10)
    assert owes.due(0) > 0
    assert other.due(0) == pytest.approx((PIECE + 10) * SECOND / 1000)
    close(tenant)


def test_a_debt_that_is_left_in_the_middle_goes_on_where_it_was():
    vm = level(orc.Limit(rate=1000, burst=1))
    debt = Debt(above(None, (vm,), Meter.ANSWERS))
    debt.add(3 * PIECE)
    debt.due(0)
    debt.leave()
    assert debt.unpaid == 2 * PIECE
    close(vm)


def test_what_a_run_owes_at_its_end_the_next_one_pays():
    vm = level(orc.Limit(rate=1000, burst=1))
    buckets, owed = above(None, (vm,), Meter.ANSWERS), Owed()
    first, other = owed.debt(buckets), owed.debt(buckets)
    first.add(3 * PIECE)
    assert first.due(0) > 0
    other.add(5)
    owed.keep(first)
    owed.keep(other)
    owed.keep(first)  # again changes nothing
    second = owed.debt(buckets)
    assert second.unpaid == 2 * PIECE + 5
    assert owed.debt(buckets).unpaid == 0
    assert second.due(0) == pytest.approx(2 * PIECE * SECOND / 1000, rel=0.02)  # behind the piece that was reserved
    close(vm)


# ---- the part


class Times:
    """Of the event loop's thread, to be set."""

    def __init__(self) -> None:
        self.passed = self.ran = self.waited = 0

    def __call__(self) -> tuple[int, int, int]:
        return self.passed, self.ran, self.waited


def test_steps_get_their_part_of_all_time_on_idle_cpus():
    times = Times()
    part = Part(times)
    part.spend(SAVED)
    assert part.left() == 0
    times.passed += SAVED
    times.ran += 1000
    assert part.left() == pytest.approx(SAVED * PART)


def test_steps_get_less_where_the_loop_waits_for_a_cpu():
    times = Times()
    part = Part(times)
    part.spend(SAVED)
    part.left()
    times.passed, times.ran, times.waited = SAVED, 1000, 4000
    assert part.left() == pytest.approx(SAVED * PART / 5)


def test_what_steps_leave_is_saved_for_a_short_time_only():
    times = Times()
    part = Part(times)
    times.passed = 100 * SECOND
    assert part.left() == SAVED


# ---- the pacer


async def test_steps_wait_for_the_grid_and_come_again_when_they_want(autojump_clock):
    called: list[int] = []

    def step(now: int) -> int | None:
        called.append(now)
        return now + GRID // 2 if len(called) < 3 else None

    async with running() as pacer:
        await pacer.wait("a", now() + 1, step)
    first = called[0] / GRID
    assert first == pytest.approx(round(first))
    assert called[2] - called[0] == pytest.approx(2 * GRID)


async def test_tenants_take_turns_however_many_steps_each_has(autojump_clock):
    order: list[str] = []

    def step(tenant: str) -> Callable[[int], None]:
        return lambda now: order.append(tenant)

    async with running() as pacer, trio.open_nursery() as nursery:
        for tenant in ["many"] * 10 + ["one"]:
            nursery.start_soon(pacer.wait, tenant, now() + 1, step(tenant))
    assert order.index("one") <= 1  # 0: its task was the first to start, which is left to chance
    assert len(order) == 11


class Rounds(trio.abc.Instrument):
    """Notes the end of each round of the event loop. (In which order tasks run within a round is left to chance.)"""

    def __init__(self, turns: list[str]) -> None:
        self.turns = turns

    def before_io_wait(self, timeout: float) -> None:
        self.turns.append("round")


async def test_many_steps_are_done_in_several_rounds_of_the_loop(autojump_clock):
    turns: list[str] = []
    trio.lowlevel.add_instrument(rounds := Rounds(turns))
    async with running() as pacer, trio.open_nursery() as nursery:
        for _ in range(3 * STEPS):
            nursery.start_soon(pacer.wait, "a", now() + 1, lambda at: turns.append("step"))
    trio.lowlevel.remove_instrument(rounds)
    in_a_round = [len(list(group)) for what, group in itertools.groupby(turns) if what == "step"]
    assert sum(in_a_round) == 3 * STEPS
    assert max(in_a_round) <= STEPS


async def test_nothing_is_done_once_the_part_is_used_up(autojump_clock):
    times = Times()
    called: list[int] = []
    async with running(times) as pacer:
        pacer.spend(10 * SAVED)
        assert not pacer.may()
        with trio.move_on_after(10 * LOOK / 1e9):
            await pacer.wait("a", now() + 1, lambda at: called.append(at))  # type: ignore[func-returns-value]
        assert not called
        times.passed += SECOND
        await pacer.wait("a", now() + 1, lambda at: called.append(at))  # type: ignore[func-returns-value]
    assert len(called) == 1  # and not the one that was cancelled


def now() -> int:
    return int(trio.current_time() * SECOND)


class running:  # used as a function
    """A pacer that serves."""

    def __init__(self, times: Callable[[], tuple[int, int, int]] = lambda: ON_IDLE_CPUS) -> None:
        self._pacer = Pacer(now, times)

    async def __aenter__(self) -> Pacer:
        self._nursery = trio.open_nursery()
        nursery = await self._nursery.__aenter__()
        nursery.start_soon(self._pacer.run)
        self._scope = nursery.cancel_scope
        return self._pacer

    async def __aexit__(self, *error: object) -> None:
        self._scope.cancel()
        await self._nursery.__aexit__(*error)  # type: ignore[arg-type]


# ---- with the service of a VM's devices


async def test_an_expiry_that_the_guest_took_back_delays_no_other(autojump_clock):
    """A guest may set a timer again between its time and the VM's turn. There is nothing to pay for then."""

    def now() -> int:
        return round(trio.current_time() * SECOND)

    def in_turn(function: Callable[[], object]) -> None:
        if not set_again:
            set_again.append(now())
            timer.arm(GRID // 10)
        function()

    set_again: list[int] = []
    expired = trio.Event()
    vm = level(orc.Limit(rate=2000, burst=2000))
    pacer = Pacer(now, lambda: (now(), 0, 0))
    post = trio.lowlevel.current_trio_token().run_sync_soon
    whose = ("acme", "a")
    service = Service(whose, now, pytest.fail, above(None, (vm,), Meter.ANSWERS), in_turn, pacer, post, Owed())
    timer = service.new_timer(Plugged("clock", None, RLock(), Wiring(ports=range(1))), expired.set)  # type: ignore[arg-type]
    begun = now()
    timer.arm(GRID // 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pacer.run)
        nursery.start_soon(service.run, (), trio.Event())
        await expired.wait()
        nursery.cancel_scope.cancel()
    assert set_again == [begun + GRID // 10]
    assert now() == pytest.approx(begun + 2 * GRID // 10, abs=2)
    close(vm)


async def test_a_guest_that_ends_its_run_does_not_go_free(autojump_clock):
    """What a ring has cost is paid by the next run, before anything of it is served."""
    vm = level(orc.Limit(rate=1000, burst=1))
    buckets, owed, served = above(None, (vm,), Meter.ANSWERS), Owed(), []
    pacer = Pacer(now, lambda: (now(), 0, 0), itertools.count(0, 200 * ANSWER).__next__)  # each call costs 200 answers

    rang = trio.Event()

    class Bell:
        def rang(self, doorbell: int, times: int) -> None:
            served.append(now())
            rang.set()

    async def run() -> None:
        post = trio.lowlevel.current_trio_token().run_sync_soon
        service = Service(("acme", "a"), now, pytest.fail, buckets, lambda call: call(), pacer, post, owed)
        bell = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        plugged = Plugged("bell", Bell(), RLock(), Wiring(ports=range(1)), [bell])  # type: ignore[arg-type]
        nonlocal rang
        rang = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run, (plugged,), trio.Event())
            await rang.wait()
            nursery.cancel_scope.cancel()
        os.close(bell)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pacer.run)
        await run()
        await run()
        nursery.cancel_scope.cancel()
    assert served[1] - served[0] >= 200 * SECOND / 1000
    close(vm)


async def test_in_virtual_time_the_machines_own_time_costs_nothing(autojump_clock):
    async with orc.open_fleet(backend=orc.ScriptedBackend({})) as fleet:
        cpu = fleet._context.pacer.cpu
        assert {cpu() for _ in range(1000)} == {0}
