"""One budget over several processes: who may share it, what it holds, whose the waits are, and what a death leaves."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import given, strategies as st

import orchestra as orc
from benchmarks.budget import survive
from orchestra.backend.kvm.machine import KvmBackend
from orchestra.cli.why import sentences
from orchestra.journal import Journal, read_journal
from orchestra.journal.explain import explain

KILLS = int(os.environ.get("ORCHESTRA_KILLS", "25"))
F_ADD_SEALS, SHRINK = 1033, 2
CHANGES = slice(64, 68)
EXITS_SLOTS = slice(128 + 384 + 128, 128 + 384 + 128 + 256)  # native/budget.h
SLOW = orc.Limit(rate=0.01, burst=1, max_delay=None)
GREEDY = orc.FlatImage(code=bytes.fromhex("e680 ebfc"))  # out 0x80, al / jmp
LIMITS = st.builds(
    orc.Limit,
    rate=st.floats(1e-6, 1e9),
    burst=st.floats(1, 1e9),
    max_delay=st.none() | st.floats(1e-6, 1e6),
)


@pytest.fixture
def budget() -> Iterator[orc.HostBudget]:
    with orc.HostBudget.create() as made:
        yield made


@pytest.fixture(
    params=[pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("emulated", marks=pytest.mark.emulated)]
)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def memfd(data: bytes, seals: int = SHRINK) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def refused(call: Callable[[], object]) -> str:
    """What it says; empty: it does not refuse."""
    try:
        call()
    except orc.StateError as error:
        return str(error)
    return ""


def refusal(source: int | str | Path) -> str:
    with pytest.raises(orc.SpecError) as raised:
        orc.HostBudget.attach(source)
    return str(raised.value)


# ---- the file


def test_limits_are_those_that_were_set_last_whoever_set_them(budget):
    assert (budget.limit, budget.exit_limit, budget.answer_limit) == (None, None, None)
    with orc.HostBudget.attach(budget.fd) as other, orc.HostBudget.attach(f"/proc/self/fd/{budget.fd}") as third:
        other.set_limit(orc.Limit(rate=100, burst=5))
        third.set_limit(orc.Limit(rate=7, burst=2, max_delay=None), meter="exits")
        assert budget.limit == orc.Limit(rate=100, burst=5)
        assert budget.exit_limit == orc.Limit(rate=7, burst=2, max_delay=None)
        budget.set_limit(None)
        assert other.limit is third.limit is None
        assert budget.statistics().changes == 3
    assert budget.exit_limit == orc.Limit(rate=7, burst=2, max_delay=None)


def test_budget_is_made_with_its_limits():
    limits = orc.Limit(rate=1, burst=1), orc.Limit(rate=2, burst=2), orc.Limit(rate=3, burst=3)
    with orc.HostBudget.create(limits[0], exit_limit=limits[1], answer_limit=limits[2]) as made:
        assert (made.limit, made.exit_limit, made.answer_limit) == limits
        # With a burst of 1 an event waits for its own token.
        assert list(made.statistics().wait.values()) == [pytest.approx(1.0), 0.0, 0.0]
    for wrong in ({"limit": 100}, {"exit_limit": "fast"}, {"answer_limit": 1.5}):
        with pytest.raises(orc.SpecError, match=next(iter(wrong))):
            orc.HostBudget.create(**wrong)


@given(LIMITS)
def test_any_limit_is_read_as_it_was_set(limit):
    with orc.HostBudget.create(limit) as made:
        read = made.limit
        assert read is not None
        assert read.rate == pytest.approx(limit.rate, rel=1e-9)
        assert read.tokens == pytest.approx(limit.tokens, abs=1e-4, rel=1e-9)
        assert read.max_delay == pytest.approx(limit.max_delay, abs=1e-9)


def test_descriptor_that_was_attached_to_may_be_closed_and_the_file_goes_with_the_last_who_has_it(budget):
    fd = os.dup(budget.fd)
    other = orc.HostBudget.attach(fd)
    os.close(fd)
    budget.set_limit(orc.Limit(rate=5))
    budget.close()
    assert other.limit is not None
    with orc.HostBudget.attach(other.fd) as third:
        other.close()
        assert third.limit is not None


def test_what_is_no_budget_is_refused_by_name(budget, tmp_path, nothing_left):
    image = os.pread(budget.fd, 1 << 16, 0)
    plain = tmp_path / "plain"
    plain.write_bytes(image)
    assert "not a memfd that is sealed against shrinking" in refusal(plain)
    assert "can't be opened" in refusal(tmp_path / "missing")
    assert "can't be opened" in refusal(tmp_path)
    assert "can't be opened" in refusal("a\0b")
    assert "HostBudget.create" in refusal(-1)
    for wrong in (None, True, 1.5, b"path"):
        assert "must be a descriptor or a path" in refusal(wrong)  # type: ignore[arg-type]
    for data, seals, why in [
        (image, 0, "not a memfd that is sealed against shrinking"),
        (image[:-1], SHRINK, "its size"),
        (image + b"\0", SHRINK, "its size"),
        (b"", SHRINK, "its size"),
        (b"x" + image[1:], SHRINK, "does not begin as a budget"),
        (image[:8] + b"\xff" + image[9:], SHRINK, "another version"),
    ]:
        fd = memfd(data, seals)
        assert why in refusal(fd)
        os.close(fd)
    read_only = os.open(f"/proc/self/fd/{budget.fd}", os.O_RDONLY)
    with pytest.raises(orc.OrchestraError, match="mapped for reading and writing"):
        orc.HostBudget.attach(read_only)
    os.close(read_only)


@given(st.data())
def test_whatever_a_file_holds_it_is_refused_or_does_no_harm(data):
    with orc.HostBudget.create(orc.Limit(rate=10)) as made:
        image = bytearray(os.pread(made.fd, 1 << 16, 0))
    for at in data.draw(st.lists(st.integers(0, len(image) - 1), min_size=1, max_size=40)):
        image[at] = data.draw(st.integers(0, 255))
    fd = memfd(bytes(image[: data.draw(st.sampled_from([len(image), len(image), len(image) // 2]))]))
    try:
        attached = orc.HostBudget.attach(fd)
    except orc.SpecError as error:
        said = [str(error)]
    else:
        with attached:
            said = [refused(attached.statistics)]
            said += [refused(partial(attached.set_limit, orc.Limit(rate=1), meter=meter)) for meter in orc.Meter]
    finally:
        os.close(fd)
    assert all(re.search("^$|size|layout|begin|version|clock|what is no limit|without end", text) for text in said)


def test_host_that_has_no_descriptor_left_is_named_as_such(budget):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(orc.ResourceLimit, match="open files"):
            orc.HostBudget.attach(budget.fd)
        with pytest.raises(orc.ResourceLimit, match="open files"):
            orc.HostBudget.create()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_closed_budget_says_so(budget):
    budget.close()
    budget.close()
    for use in (
        lambda: budget.fd,
        lambda: budget.limit,
        lambda: budget.set_limit(None),
        budget.statistics,
    ):
        with pytest.raises(orc.StateError, match="closed"):
            use()
    assert "fd=-1" in repr(budget)


@pytest.mark.parametrize(("limit", "meter"), [(5, "exits"), (None, "disks"), (orc.Limit(rate=1), None)])
def test_what_is_no_limit_or_meter_is_refused(budget, limit, meter):
    with pytest.raises(orc.SpecError):
        budget.set_limit(limit, meter=meter)


# ---- fleets


async def test_fleet_refuses_what_it_cannot_share(budget):
    with pytest.raises(orc.SpecError, match="host_budget=5: must be a HostBudget"):
        async with orc.open_fleet(host_budget=5):  # type: ignore[arg-type]
            pass
    with pytest.raises(orc.SpecError, match="clock of its own"):
        async with orc.open_fleet(backend="scripted", host_budget=budget):
            pass
    budget.set_limit(orc.Limit(rate=5))
    with pytest.raises(orc.SpecError, match="host_budget limits bus locks, but bus_locks='off'"):
        async with orc.open_fleet(backend="scripted", host_budget=budget, bus_locks="off"):
            pass
    budget.close()
    with pytest.raises(orc.StateError, match="closed"):
        async with orc.open_fleet(host_budget=budget):
            pass


async def waits_for(fleet: orc.Fleet, vm: str) -> set[str]:
    """The buckets that it waits for, as soon as it does."""
    async with fleet.watch(0.02) as watch:
        async for facts in watch:
            if vm in facts.vms and (found := {name for name, much in facts.vms[vm].throttled_by.items() if much > 0}):
                return found
    raise AssertionError("the fleet has ended")


def greedy(name: str, **more: object) -> orc.VmSpec:
    return orc.VmSpec(name=name, boot=GREEDY, **more)  # type: ignore[arg-type]


async def test_waits_are_the_hosts_the_fleets_or_narrower_ones(backend, budget, nothing_left):
    tenants = {"acme": orc.Tenant("acme", exit_limit=orc.Limit(rate=40, burst=1))}
    async with orc.open_fleet(backend=backend, bus_locks="off", host_budget=budget, tenants=tenants) as fleet:
        await fleet.launch(greedy("a"))
        await fleet.set_limit(orc.Limit(rate=50, burst=1), meter="exits")
        with trio.fail_after(30):
            assert await waits_for(fleet, "a") == {"fleet.exits"}
            budget.set_limit(orc.Limit(rate=30, burst=1), meter="exits")
            while await waits_for(fleet, "a") != {"host.exits"}:
                pass
            budget.set_limit(None, meter="exits")
            await fleet.set_limit(None, meter="exits")
            await fleet.launch(greedy("b", tenant="acme"))
            assert await waits_for(fleet, "b") == {"tenant.exits"}
            with pytest.raises(orc.StateError, match=r"fleets use \(1\)"):
                budget.close()
            assert budget.statistics().fleets == 1
    assert budget.statistics().fleets == 0
    nothing_left()


async def test_two_fleets_have_one_budget(backend, budget):
    budget.set_limit(orc.Limit(rate=400, burst=1, max_delay=None), meter="exits")
    async with (
        orc.open_fleet(backend=backend, bus_locks="off", host_budget=budget) as one,
        orc.open_fleet(backend=backend, bus_locks="off", host_budget=budget) as other,
    ):
        vms = [await one.launch(greedy("a")), await other.launch(greedy("a"))]
        assert budget.statistics().fleets == 2

        def exits() -> int:
            return sum(sum(vm.statistics().exits.values()) for vm in vms)

        begun, before = one.now(), exits()
        with trio.fail_after(30):
            while exits() < before + 100:  # noqa: ASYNC110  # within its limit a guest tells nobody
                await trio.sleep(0.01)
        # The burst, what is in flight in each, and the time between two lines of this.
        assert exits() - before <= 400 * (one.now() - begun) / 1e9 + 4


async def test_limit_that_another_process_sets_ends_a_wait_here(backend, budget):
    budget.set_limit(SLOW, meter="exits")
    async with orc.open_fleet(backend=backend, bus_locks="off", host_budget=budget) as fleet:
        vm = await fleet.launch(greedy("a"))
        with trio.fail_after(60):
            assert await waits_for(fleet, "a") == {"host.exits"}
            program = (
                "import sys, orchestra as orc; budget = orc.HostBudget.attach(int(sys.argv[1])); "
                "budget.set_limit(orc.Limit(rate=1e6), meter='exits')"
            )
            before = sum(vm.statistics().exits.values())
            await trio.run_process([sys.executable, "-c", program, str(budget.fd)], pass_fds=[budget.fd])
            async with fleet.exits(orc.Io, vm=vm) as exits:
                for _ in range(50):
                    await exits.receive()
            assert sum(vm.statistics().exits.values()) >= before + 50


async def test_pause_and_stop_end_a_wait_for_the_hosts_budget(backend, budget):
    budget.set_limit(SLOW, meter="exits")
    async with orc.open_fleet(backend=backend, bus_locks="off", host_budget=budget) as fleet:
        vm = await fleet.launch(greedy("a"))
        with trio.fail_after(30):
            await waits_for(fleet, "a")
            await vm.pause()
            await vm.resume()
            await waits_for(fleet, "a")
            assert isinstance(await vm.stop(), orc.Stopped)


@pytest.mark.kvm
async def test_bus_lock_limit_of_the_host_needs_a_fleet_that_sees_them(budget, monkeypatch):
    monkeypatch.setattr(KvmBackend, "bus_lock_detection", lambda self: None)
    budget.set_limit(orc.Limit(rate=5))
    with pytest.raises(orc.BusLockUnsupported, match="host_budget"):
        async with orc.open_fleet(backend="kvm", host_budget=budget):
            pass


async def test_a_fleet_that_sees_no_bus_locks_says_so_when_the_host_gets_a_limit_on_them(
    backend, budget, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("orchestra.fleet.recording.LOOKED_AT", 0.01)
    path = tmp_path / "fleet.db"
    async with orc.open_fleet(backend=backend, bus_locks="off", host_budget=budget, journal=Journal(path)) as fleet:
        assert not caplog.records
        budget.set_limit(orc.Limit(rate=5))
        with trio.fail_after(20):
            while not fleet.actions():  # noqa: ASYNC110  # another process could have done this: it tells nobody
                await trio.sleep(0.01)
        budget.set_limit(orc.Limit(rate=9), meter="exits")  # another meter: it is said once
        with trio.fail_after(20):
            while fleet._context.recording._host_changes != budget.statistics().changes:  # noqa: ASYNC110
                await trio.sleep(0.01)
        (said,) = fleet.actions()
    assert said.outcome == "failed"
    assert said.error is not None
    assert "does not see bus locks" in said.error
    (warning,) = [record.getMessage() for record in caplog.records if "host budget" in record.getMessage()]
    assert "rate=5" in warning
    with read_journal(path) as journal:
        assert [row.details["meter"] for row in journal.actions(outcome="failed")] == ["bus_locks"]


async def test_a_fleet_without_a_journal_says_so_as_well(backend, budget, caplog, monkeypatch):
    monkeypatch.setattr("orchestra.fleet.recording.LOOKED_AT", 0.01)
    async with orc.open_fleet(backend=backend, bus_locks="off", host_budget=budget):
        budget.set_limit(orc.Limit(rate=5))
        with trio.fail_after(20):
            while not caplog.records:  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert "does not see bus locks" in caplog.text


async def test_what_a_hostile_process_writes_into_the_file_ends_no_fleet(backend, budget, tmp_path, nothing_left):
    budget.set_limit(orc.Limit(rate=50, burst=1), meter="exits")
    journal = Journal(tmp_path / "fleet.db")
    async with orc.open_fleet(
        backend=backend, bus_locks="off", host_budget=budget, journal=journal, journal_interval=0.02
    ) as fleet:
        vm = await fleet.launch(greedy("a"))
        with trio.fail_after(30):
            await waits_for(fleet, "a")
            with mmap.mmap(budget.fd, os.fstat(budget.fd).st_size) as file:
                file[EXITS_SLOTS] = b"\xff" * 256
                file[CHANGES] = b"\xff" * 4
            async with fleet.watch(0.1) as watch:  # the journal looks at it meanwhile
                await anext(aiter(watch))
            with pytest.raises(orc.StateError, match="what is no limit"):
                budget.statistics()
            with pytest.raises(orc.StateError, match="without end"):
                budget.set_limit(None, meter="exits")
            assert isinstance(await vm.stop(), orc.Stopped)
    nothing_left()


# ---- the journal


async def test_journal_and_why_tell_the_hosts_budget_from_the_fleets_limit(backend, budget, tmp_path):
    path = tmp_path / "fleet.db"
    budget.set_limit(orc.Limit(rate=20, burst=1, max_delay=None), meter="exits")
    async with orc.open_fleet(
        backend=backend,
        bus_locks="off",
        host_budget=budget,
        exit_limit=orc.Limit(rate=1000, burst=1),
        journal=Journal(path),
        journal_interval=0.05,
    ) as fleet:
        await fleet.launch(greedy("a"))
        with trio.fail_after(60):
            await waits_for(fleet, "a")
            async with fleet.watch(0.3) as watch:  # some intervals of the journal
                await anext(aiter(watch))
            with orc.HostBudget.attach(budget.fd) as other:
                other.set_limit(orc.Limit(rate=500, burst=1), meter="exits")
                await fleet.set_limit(orc.Limit(rate=25, burst=1), meter="exits")
            while await waits_for(fleet, "a") != {"fleet.exits"}:
                pass
            async with fleet.watch(0.3) as watch:
                await anext(aiter(watch))
    with read_journal(path) as journal:
        rows = [row for row in journal.actions() if row.given == "host_budget" and row.details["meter"] == "exits"]
        assert [row.details["limit"]["rate"] for row in rows] == [20, 500]
        found = explain(journal, "a")
        places = {(cause.where, cause.meter) for cause in found.causes if cause.kind == "limit"}
        assert places == {("host", "exits"), ("fleet", "exits")}
        text = " ".join(sentences(found))
    assert "the budget that the host's processes share" in text
    assert "held the whole host to" in text
    assert "a caller held its fleet to 25 exits/s" in text
    assert "held its fleet to 20" not in text


# ---- death


@pytest.mark.timed
@pytest.mark.kvm
async def test_one_that_is_killed_in_the_middle_of_everything_leaves_the_other_its_exact_rate():
    await outlives("kvm", KILLS)


@pytest.mark.timed
@pytest.mark.emulated
async def test_one_that_is_killed_leaves_the_other_its_exact_rate_of_bus_locks():
    await outlives("emulated", max(2, KILLS // 5))


async def outlives(name: str, kills: int) -> None:
    # A rate at which a busy machine has 200 ms to give each vCPU its turn, and windows until one was left in peace.
    found = await survive(name, kills, 2.0, rate=500, windows=10)
    assert found.rate == pytest.approx(1.0, abs=0.01)
    assert found.jain >= 0.99
    assert found.after.is_within(found.before), found
