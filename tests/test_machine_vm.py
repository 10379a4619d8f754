"""A VM's handle: pause, resume and stop in any state, registers and memory, requests answered by a task, restarts."""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import orchestra as orc
from conftest import Stage, blank, play, word
from orchestra.backend.scripted import ScriptedExit, bus_lock, hlt, io_read, io_write, mmio_read, triple_fault
from orchestra.machine.pause_levels import Level
from orchestra.model.effects import ActionsInForce
from test_fleet import Kept

FAIL = ScriptedExit("debug", args=(1, 0, 0, 0))
FOR_EVER = hlt(after=1e9)


@pytest.fixture
async def soon():
    """Nothing here may take long in real time."""
    with trio.fail_after(20):
        yield


# ---- pause, resume, stop


async def test_a_paused_vm_does_nothing_until_it_is_resumed(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("exit_port"), paused=True)
        assert vm.state == "paused"
        assert vm.statistics().exits == {}
        await vm.resume()
        assert await vm.wait() == orc.Shutdown("exit port", 42)


async def test_pause_holds_a_guest_that_never_exits(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin"))
        assert vm.state == "running"
        await vm.pause()
        assert vm.state == "paused"
        before = word(vm, 0x8000)
        assert vm.registers().rip in range(0x1000, 0x1010)
        assert word(vm, 0x8000) == before
        await vm.resume()
        assert vm.state == "running"


async def test_pause_and_resume_and_stop_are_idempotent(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin"))
        await vm.resume()
        await vm.pause()
        await vm.pause()
        assert vm.state == "paused"
        await vm.resume()
        await vm.resume()
        assert vm.state == "running"
        assert await vm.stop() == orc.Stopped("stop()")
        assert await vm.stop("again") == orc.Stopped("stop()")
        assert vm.state == "stopped"


async def test_stop_ends_a_paused_vm(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", vcpus=stage.vcpus), paused=True)
        assert await vm.stop("enough") == orc.Stopped("enough")


async def test_stop_of_a_vm_that_ended_by_itself_gives_its_outcome(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("exit_port"))
        await vm.wait()
        assert await vm.stop() == orc.Shutdown("exit port", 42)
        assert "guest" not in fleet.vms


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_pausing_and_resuming_what_has_ended_is_an_error_that_says_so(stage: Stage, soon, verb):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("halt"))
        await vm.wait()
        with pytest.raises(orc.StateError, match="it is stopped"):
            await getattr(vm, verb)()


async def test_many_tasks_may_pause_resume_and_stop_at_once(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", vcpus=stage.vcpus))

        async def steer(verb: Callable) -> None:
            for _ in range(30):
                await verb()

        async with trio.open_nursery() as nursery:
            for verb in (vm.pause, vm.resume, vm.pause, vm.resume):
                nursery.start_soon(steer, verb)
        await vm.pause()
        assert vm.state == "paused"
        await vm.resume()
        assert vm.state == "running"
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(vm.stop)
        assert vm.outcome == orc.Stopped("stop()")


async def test_stop_ends_a_pause_that_is_waited_for(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.pause)
            nursery.start_soon(vm.stop)
        assert vm.state == "stopped"


async def test_pause_and_stop_end_a_long_wait_for_ones_turn_at_once(autojump_clock):
    async with play(itertools.repeat(bus_lock()), limit=orc.Limit(rate=0.01, burst=1, max_delay=None)) as fleet:
        vm = await fleet.launch(blank())
        await wait_all_tasks_blocked()
        assert vm.throttled
        begun = trio.current_time()
        await vm.pause()
        assert vm.state == "paused"
        assert not vm.throttled
        await vm.resume()
        await wait_all_tasks_blocked()
        assert vm.throttled
        await vm.stop()
        assert trio.current_time() == begun
        assert vm.statistics().bus_locks == 1
        assert vm.statistics().released == 0


@pytest.mark.kvm
async def test_pause_and_stop_end_a_long_wait_on_a_thread_at_once(nothing_left, soon):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("storm", exit_limit=orc.Limit(rate=0.01, burst=1, max_delay=None)))
        while not vm.throttled:  # nothing tells: the wait is in C
            await trio.lowlevel.checkpoint()
        await vm.pause()
        assert not vm.throttled
        count = vm.statistics().exits["io"]
        await vm.resume()
        assert vm.statistics().exits["io"] == count
        await vm.stop()
        assert vm.statistics().exits["io"] == count


async def test_statistics_tell_by_whose_limit_it_was_held(stage):
    async with stage.open(exit_limit=orc.Limit(rate=1e6)) as fleet:
        vm = await fleet.launch(stage.spec("storm", exit_limit=orc.Limit(rate=0.01, burst=1, max_delay=None)))
        while vm.statistics().throttled_seconds < 0.01:  # nothing tells: the wait is in C
            await trio.lowlevel.checkpoint()
        await vm.stop()
        told = vm.statistics()
        assert told.throttled_by == {"vm.exits": pytest.approx(told.throttled_seconds)}


async def test_what_was_left_of_a_wait_is_waited_after_a_pause(autojump_clock):
    async with play([bus_lock(), hlt()], limit=orc.Limit(rate=0.1, burst=1, max_delay=None)) as fleet:
        vm = await fleet.launch(blank())
        begun = trio.current_time()
        await trio.sleep(4)
        await vm.pause()
        await trio.sleep(3)
        await vm.resume()
        await vm.wait()
        assert trio.current_time() - begun == pytest.approx(10)
        assert vm.statistics().throttled_seconds == pytest.approx(7)


async def test_a_limit_may_change_while_it_is_paused(autojump_clock):
    async with play([bus_lock(), hlt()], limit=orc.Limit(rate=0.01, burst=1, max_delay=None)) as fleet:
        vm = await fleet.launch(blank())
        await wait_all_tasks_blocked()
        await vm.pause()
        await fleet.set_limit(None)
        begun = trio.current_time()
        await vm.resume()
        await vm.wait()
        assert trio.current_time() == begun


async def test_a_cancelled_pause_pauses_all_the_same(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank())
        with trio.CancelScope() as scope:
            scope.cancel()
            await vm.pause()
        assert scope.cancelled_caught
        await wait_all_tasks_blocked()
        assert vm.state == "paused"
        await vm.resume()
        assert vm.state == "running"


async def test_many_tasks_may_wait_for_one_end(stage: Stage, soon):
    outcomes = []
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin"))

        async def wait() -> None:
            outcomes.append(await vm.wait())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(wait)
            await vm.stop("now")
    assert outcomes == [orc.Stopped("now")] * 5


# ---- registers and memory


async def test_registers_are_for_paused_and_ended_vcpus(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("registers"))
        with pytest.raises(orc.StateError, match=r"pause\(\) first"):
            vm.registers()
        await vm.pause()
        paused = vm.registers()
        await vm.resume()
        with pytest.raises(orc.StateError, match="inspect"):
            vm.registers()
        await vm.stop()
        assert vm.registers().rip >= paused.rip  # they stay readable


@pytest.mark.kvm
async def test_registers_are_the_guests(nothing_left, soon):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("registers"))
        while (await vm.inspect()).rdx != 0x44444444:
            pass
        await vm.pause()
        registers = vm.registers()
        values = registers.rax, registers.rbx, registers.rcx, registers.rdx
        assert values == (0x11111111, 0x22222222, 0x33333333, 0x44444444)
        await vm.stop()
        assert vm.registers() == registers


@pytest.mark.smp
async def test_inspect_reads_a_running_vcpu_and_leaves_it_running(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", vcpus=stage.vcpus))
        for vcpu in (0, 1, 0):
            assert (await vm.inspect(vcpu)).rip in range(0x1000, 0x1010)
        assert vm.state == "running"
        await vm.pause()
        assert (await vm.inspect()) == vm.registers()
        await vm.stop()
        assert (await vm.inspect()) == vm.registers()


async def test_inspect_answers_while_the_vcpu_waits_for_a_task(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            request = await requests.__anext__()
            assert (await vm.inspect()).rip in range(0x1000, 0x1020)
            request.answer(b"\1\2\3\4")
            assert await vm.wait() == orc.Halted()


async def test_inspect_answers_while_the_vcpu_waits_for_its_turn(autojump_clock):
    async with play([bus_lock()], limit=orc.Limit(rate=0.01, burst=1, max_delay=None)) as fleet:
        vm = await fleet.launch(blank())
        await wait_all_tasks_blocked()
        begun = trio.current_time()
        assert (await vm.inspect()).rip == 0x1000
        assert trio.current_time() == begun


async def test_inspecting_while_the_vm_ends_gets_an_answer(stage: Stage, soon):
    async with stage.open() as fleet:
        for _ in range(20):
            vm = await fleet.launch(stage.spec("spin"))
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(vm.inspect)
                nursery.start_soon(vm.stop)
                nursery.start_soon(vm.inspect)


async def test_inspecting_while_the_fleet_closes_ends(stage: Stage, soon):
    ended = []
    async with trio.open_nursery() as nursery:

        async def inspect() -> None:
            try:
                await vm.inspect()
            except orc.StateError as error:
                ended.append(error)
            else:
                ended.append(None)

        async with stage.open() as fleet:
            vm = await fleet.launch(stage.spec("spin"))
            nursery.start_soon(inspect)
            await trio.lowlevel.checkpoint()
    assert len(ended) == 1


@pytest.mark.smp
async def test_a_vcpu_that_does_not_exist_is_named(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", vcpus=stage.vcpus), paused=True)
        for wrong in (2, -1, True, "0"):
            with pytest.raises(orc.SpecError, match="vCPUs 0 to 1"):
                vm.registers(wrong)
            with pytest.raises(orc.SpecError, match="vCPUs 0 to 1"):
                await vm.set_limit(None, vcpu=wrong)


async def test_memory_is_readable_after_the_end_and_given_back_by_stop(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("halt"))
        await vm.wait()
        vm.write_memory(0x3000, b"after")
        assert vm.read_memory(0x3000, 5) == b"after"
        assert vm.read_memory(0x1000, 1) == b"\xf4"
        await vm.stop()
        with pytest.raises(orc.GuestMemoryError, match="released"):
            vm.read_memory(0x1000, 1)
        with pytest.raises(orc.GuestMemoryError, match="released"):
            vm.write_memory(0x1000, b"x")
        assert vm.statistics().exits == {"hlt": 1}
        assert vm.registers().rip >= 0x1000


async def test_memory_outside_the_guests_is_an_error_with_the_address(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", memory=64 * orc.KiB), paused=True)
        with pytest.raises(orc.GuestMemoryError, match="0x10000"):
            vm.read_memory(0xFFFF, 2)
        with pytest.raises(orc.GuestMemoryError, match="0x10000"):
            vm.write_memory(0xFFFF, b"xx")
        assert vm.read_memory(0xFFFF, 1) == b"\0"


# ---- requests answered by a task


async def test_ports_are_answered_by_a_task_at_every_size(stage: Stage, soon):
    seen = []
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ports"), paused=True)
        async with vm.requests(ports=range(0x500, 0x504)) as requests:
            await vm.resume()
            async for request in requests:
                seen.append((request.address, request.size, request.write, request.data))
                request.answer(None if request.write else b"\xaa\xbb\xcc\xdd"[: request.size])
        assert await vm.wait() == orc.Halted()
        if stage.executes:
            assert vm.read_memory(0x8000, 12) == bytes.fromhex("aa000000 aabb0000 aabbccdd")
    assert seen == [
        (0x500, 1, False, b""),
        (0x500, 2, False, b""),
        (0x500, 4, False, b""),
        (0x500, 1, True, b"\x11"),
        (0x500, 2, True, b"\x11\x22"),
        (0x500, 4, True, b"\x11\x22\x33\x44"),
    ]


@pytest.mark.kvm
async def test_mmio_is_answered_by_a_task_at_every_size(nothing_left, soon):
    stage = Stage("kvm")
    seen = []
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("mmio_64", mode=64), paused=True)
        async with vm.requests(mmio=range(0xD0000000, 0xD0000008)) as requests:
            await vm.resume()
            async for request in requests:
                seen.append((request.address, request.size, request.data))
                request.answer(None if request.write else bytes(range(1, 9))[: request.size])
        assert await vm.wait() == orc.Halted()
        for index, size in enumerate((1, 2, 4, 8)):
            assert vm.read_memory(0x8000 + 8 * index, 8) == bytes(range(1, size + 1)).ljust(8, b"\0")
    data = bytes.fromhex("1122334455667788")
    assert seen == [(0xD0000000, n, b"") for n in (1, 2, 4, 8)] + [(0xD0000000, n, data[:n]) for n in (1, 2, 4, 8)]


@pytest.mark.kvm
async def test_string_io_is_asked_element_by_element(nothing_left, soon):
    stage = Stage("kvm")
    written: list[bytes] = []
    numbers = itertools.count(1)
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("strings"), paused=True)
        async with vm.requests(ports=range(0x500, 0x502)) as requests:
            await vm.resume()
            async for request in requests:
                if request.write:
                    written.append(request.data)
                    request.answer()
                else:
                    request.answer(next(numbers).to_bytes(request.size, "little"))
        assert await vm.wait() == orc.Halted()
        assert vm.read_memory(0x8000, 5) == bytes([1, 2, 3, 4, 5])
        assert vm.read_memory(0x8010, 4) == bytes([6, 0, 7, 0])
    assert written == [b"a", b"b", b"c", b"d", b"e", b"ab", b"cd"]


class Tape:
    """Counts up when read, remembers writes."""

    def __init__(self) -> None:
        self.reads = 0
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return self.reads

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


@pytest.mark.kvm
async def test_string_io_reaches_a_device_element_by_element(nothing_left, soon):
    stage = Stage("kvm")
    tape = Tape()
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("strings"), devices=[(range(0x4F0, 0x510), None, tape)])
        assert await vm.wait() == orc.Halted()
        assert vm.read_memory(0x8000, 5) == bytes([1, 2, 3, 4, 5])
        assert vm.read_memory(0x8010, 4) == bytes([6, 0, 7, 0])
    letters = [(0x10, 1, ord(letter)) for letter in "abcde"]
    assert tape.written == [
        *letters,
        (0x10, 2, int.from_bytes(b"ab", "little")),
        (0x10, 2, int.from_bytes(b"cd", "little")),
    ]


async def test_pause_holds_while_a_request_is_unanswered(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            request = await requests.__anext__()
            await vm.pause(quiesce=False)
            assert vm.state == "paused"
            request.answer(b"\1\2\3\4")
            await vm.pause()
            assert vm.registers().rip in range(0x1000, 0x1020)
            assert vm.state == "paused"
            assert vm.outcome is None
            await vm.resume()
            assert await vm.wait() == orc.Halted()
        if stage.executes:
            assert word(vm, 0x8000) == 0x04030201


async def test_paused_is_not_quiesced_while_a_request_is_unanswered(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), paused=True)
        assert (vm.quiesced, vm.statistics().pending) == (True, ())
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            request = await anext(requests)
            assert (vm.quiesced, vm.statistics().pending) == (False, ())  # nothing is to wait for, as nobody pauses it
            before = fleet.now()
            await vm.pause(quiesce=False)
            assert (vm.state, vm.quiesced) == ("paused", False)
            (access,) = vm.statistics().pending
            assert (access.vcpu, access.bus, access.address, access.size) == (0, "ports", 0x500, 4)
            assert (access.write, access.waits_for) == (False, "a task")
            assert 0 < access.since <= before
            assert vm.statistics().pending == (access,)
            with pytest.raises(orc.StateError, match="a read of 4 bytes at ports 0x500 waits for a task"):
                vm.registers()
            paused = []

            async def pause() -> None:
                await vm.pause()
                paused.append(vm.registers())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(pause)
                await vm.inspect()  # the runner has had its turn
                await vm.inspect()
                assert paused == []
                request.answer(b"\1\2\3\4")
            assert (vm.state, vm.quiesced, vm.statistics().pending) == ("paused", True, ())
            before = paused[0]
            for _ in range(3):
                await vm.inspect()
                assert vm.registers() == before
            if stage.executes:
                assert before.rax & 0xFFFFFFFF == 0x04030201  # the kernel completed it, and the guest did no more
                assert word(vm, 0x8000) == 0
            await vm.resume()
            assert await vm.wait() == orc.Halted()


async def test_a_pause_that_waits_for_an_answer_ends_with_the_pause(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            request = await anext(requests)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.pause)
                await wait_all_tasks_blocked()
                await vm.resume()
            assert (vm.state, vm.statistics().pending) == ("running", ())
            request.answer(bytes(4))
            assert await vm.wait() == orc.Halted()


async def test_stop_ends_a_pause_that_waits_for_an_answer(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            await anext(requests)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.pause)
                await wait_all_tasks_blocked()
                assert await vm.stop() == orc.Stopped("stop()")
            assert vm.statistics().pending == ()


async def test_a_cancelled_wait_for_an_answer_leaves_it_paused(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            request = await anext(requests)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.pause)
                await vm.pause(quiesce=False)
                nursery.cancel_scope.cancel()
            assert (vm.state, vm.quiesced) == ("paused", False)
            request.answer(bytes(4))
            await vm.pause()
            assert vm.quiesced
            assert vm.outcome is None


async def test_a_pause_that_waits_long_says_in_the_log_for_what(autojump_clock, caplog):
    async with play([io_read(0x500, 2)]) as fleet:
        vm = await fleet.launch(blank(), paused=True)
        async with vm.requests(ports=range(0x500, 0x502)) as requests:
            await vm.resume()
            request = await anext(requests)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.pause)
                await trio.sleep(4)
                assert caplog.messages == []
                await trio.sleep(12)
                assert [message.split(":")[0] for message in caplog.messages] == ["vm guest"] * 2
                assert "a read of 2 bytes at ports 0x500 waits for a task" in caplog.messages[0]
                request.answer(b"ab")


async def test_an_action_that_pauses_does_not_wait_for_an_answer_and_the_journal_says_so(autojump_clock):
    async with play([io_read(0x500, 2)], journal=(kept := Kept())) as fleet:
        vm = await fleet.launch(blank(), paused=True)
        async with vm.requests(ports=range(0x500, 0x502)) as requests:
            await vm.resume()
            request = await anext(requests)
            assert (await fleet.apply(orc.Pause(vm="guest"))).outcome == "done"
            assert (vm.state, vm.quiesced) == ("paused", False)
            request.answer(b"ab")
            await vm.pause()
    paused = [reason for _, state, reason in kept.states if state == "paused"]
    assert paused == ["", "vCPU 0: a read of 2 bytes at ports 0x500 waits for a task", ""]


class Slow:
    """A device that answers when it is let go."""

    def __init__(self) -> None:
        self.asked, self.release = threading.Event(), threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.asked.set()
        assert self.release.wait(20)
        return 0x04030201

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing: it is only read."""


@pytest.mark.parametrize("backend", [pytest.param(b, marks=getattr(pytest.mark, b)) for b in ("emulated", "kvm")])
async def test_a_device_that_takes_its_time_holds_up_the_second_level_alone(backend, nothing_left, soon):
    stage, device = Stage(backend), Slow()
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), devices=[(range(0x500, 0x508), None, device)])
        try:
            await trio.to_thread.run_sync(device.asked.wait)
            await vm.pause(quiesce=False)
            assert (vm.state, vm.quiesced) == ("paused", False)
            (access,) = vm.statistics().pending
            assert (access.address, access.size, access.waits_for) == (0x500, 4, "Slow")
            with pytest.raises(orc.StateError, match="waits for Slow"):
                vm.registers()
        finally:
            device.release.set()
        await vm.pause()
        assert vm.registers().rax & 0xFFFFFFFF == 0x04030201
        assert word(vm, 0x8000) == 0


@pytest.mark.smp
async def test_a_vm_is_as_far_as_its_last_vcpu(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice", vcpus=2), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            asked = {request.vcpu: request for request in [await anext(requests), await anext(requests)]}
            await vm.pause(quiesce=False)
            assert [access.vcpu for access in vm.statistics().pending] == [0, 1]
            asked[0].answer(bytes(4))
            while vm._control.guest.pause_levels.level(0) is not Level.QUIESCED:  # an inner state that nothing tells
                await trio.lowlevel.checkpoint()
            assert (vm.quiesced, [access.vcpu for access in vm.statistics().pending]) == (False, [1])
            vm.registers(0)
            with pytest.raises(orc.StateError, match="vCPU 1"):
                vm.registers(1)
            asked[1].answer(bytes(4))
            await vm.pause()
            assert vm.quiesced


async def test_stop_ends_while_a_request_is_unanswered(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            request = await requests.__anext__()
            assert await vm.stop() == orc.Stopped("stop()")
            request.answer(b"\1\2\3\4")  # nobody needs it any more, and that is no error
            with pytest.raises(StopAsyncIteration):
                await requests.__anext__()


@pytest.mark.smp
async def test_two_vcpus_may_ask_at_once_and_be_answered_in_any_order(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice", vcpus=2), paused=True)
        async with vm.requests(ports=range(0x500, 0x510)) as requests:
            await vm.resume()
            held = {request.vcpu: request for request in [await requests.__anext__(), await requests.__anext__()]}
            assert {vcpu: request.address for vcpu, request in held.items()} == {0: 0x500, 1: 0x501}
            held[1].answer(b"one.")
            held[0].answer(b"zero")
            assert await vm.wait() == orc.Halted()
        if stage.executes:
            assert vm.read_memory(0x8000, 8) == b"zeroone."


async def test_an_access_left_outstanding_goes_back_to_the_bus_and_reads_ones(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ask_twice"), paused=True)
        vm.write_memory(0x8000, b"keep")
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            await requests.__anext__()
        assert await vm.wait() == orc.Halted()
        if stage.executes:
            assert vm.read_memory(0x8000, 4) == b"\xff" * 4


async def test_an_access_left_outstanding_goes_to_whoever_claims_the_range_next():
    backend = orc.ScriptedBackend({"guest": [io_read(0x500, 2)]})
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(blank(), paused=True)
        async with vm.requests(ports=range(0x500, 0x502)) as requests:
            await vm.resume()
            await requests.__anext__()
            await vm.pause(quiesce=False)  # it is asked again only when it goes on
        vm.attach(Tape(), ports=range(0x500, 0x502))
        await vm.resume()
        await vm.wait()
        # Whether the bus is asked before or after the new claim is a matter of who comes first.
        assert backend.machines["guest"].engines[0].answers in ([(0x500, b"\1\0")], [(0x500, b"\xff\xff")])


async def test_a_second_claim_of_a_range_is_refused_and_names_the_first(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin"), paused=True)
        async with vm.requests(ports=range(0x500, 0x510)):
            with pytest.raises(orc.SpecError, match="0x500-0x50f is claimed by Requests"):
                async with vm.requests(ports=range(0x50F, 0x520)):
                    pytest.fail("claimed twice")
            with pytest.raises(orc.SpecError, match="claimed"):
                vm.attach(Tape(), ports=range(0x500, 0x501))
        vm.attach(Tape(), ports=range(0x500, 0x501))
        with pytest.raises(orc.SpecError, match="claimed by ExitDevice"):
            vm.attach(Tape(), ports=range(0xF0, 0xF8))


async def test_a_claim_of_two_ranges_is_all_or_nothing(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin"), paused=True)
        vm.attach(Tape(), mmio=range(0xD0000000, 0xD0001000))
        with pytest.raises(orc.SpecError, match="mmio"):
            vm.attach(Tape(), ports=range(0x500, 0x510), mmio=range(0xD0000FFF, 0xD0002000))
        vm.attach(Tape(), ports=range(0x500, 0x510))


async def test_a_claim_of_nothing_or_by_no_device_is_refused(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin"), paused=True)
        with pytest.raises(orc.SpecError, match="name the ports"):
            vm.attach(Tape())
        with pytest.raises(orc.SpecError, match="read"):
            vm.attach(object(), ports=range(0x500, 0x501))
        with pytest.raises(orc.SpecError, match="step 1"):
            async with vm.requests(ports=range(0x500, 0x500)):
                pytest.fail("claimed nothing")
        with pytest.raises(orc.SpecError, match="0xffff"):
            vm.attach(Tape(), ports=range(0xFFFF, 0x10001))


async def test_claiming_on_a_vm_that_has_ended_is_an_error(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("halt"))
        await vm.wait()
        with pytest.raises(orc.StateError, match="stopped"):
            vm.attach(Tape(), ports=range(0x500, 0x501))
        with pytest.raises(orc.StateError, match="stopped"):
            async with vm.requests(ports=range(0x500, 0x501)):
                pytest.fail("claimed")


async def test_requests_end_when_the_vm_does(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("exit_port"), paused=True)
        async with vm.requests(ports=range(0x500, 0x501)) as requests:
            await vm.resume()
            assert [request async for request in requests] == []
        assert vm.outcome == orc.Shutdown("exit port", 42)


async def test_a_request_is_answered_once_and_with_its_size():
    async with play([io_read(0x500, 2), io_write(0x500, b"x")]) as fleet:
        vm = await fleet.launch(blank(), paused=True)
        async with vm.requests(ports=range(0x500, 0x502)) as requests:
            await vm.resume()
            read = await requests.__anext__()
            for wrong in (b"", b"x", b"xxx", None, 5, "xx"):
                with pytest.raises(orc.SpecError, match="exactly 2 bytes"):
                    read.answer(wrong)
            read.answer(b"ok")
            with pytest.raises(orc.StateError, match="answered already"):
                read.answer(b"ok")
            write = await requests.__anext__()
            with pytest.raises(orc.SpecError, match="without data"):
                write.answer(b"x")
            write.answer()


# ---- restarts


def restart(**more: object) -> orc.Restart:
    return orc.Restart("on-failure", **more)


async def test_never_restarts_unless_asked_to(autojump_clock):
    async with play([FAIL]) as fleet:
        vm = await fleet.launch(blank())
        assert isinstance(await vm.wait(), orc.Failed)
        assert vm.statistics().restarts == 0


async def test_restarts_back_off_and_give_up_after_the_most(autojump_clock):
    begun: list[float] = []

    def script(spec: orc.VmSpec, vcpu: int) -> list[ScriptedExit]:
        begun.append(trio.current_time())
        return [FAIL]

    async with orc.open_fleet(backend=orc.ScriptedBackend(script)) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=1, backoff_max=5, most=5)))
        assert isinstance(await vm.wait(), orc.Failed)
        assert [round(b - a, 6) for a, b in itertools.pairwise(begun)] == [1, 2, 4, 5, 5]
        assert vm.statistics().restarts == 5
        assert vm.state == "failed"


async def test_the_back_off_starts_over_once_it_ran_for_long(autojump_clock):
    lives = iter([[FAIL], [FAIL], [attrs.evolve(FAIL, after=100)], [FAIL], [hlt()]])
    begun: list[float] = []

    def script(spec: orc.VmSpec, vcpu: int) -> list[ScriptedExit]:
        begun.append(trio.current_time())
        return next(lives)

    async with orc.open_fleet(backend=orc.ScriptedBackend(script)) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=1, backoff_max=10, most=2)))
        assert await vm.wait() == orc.Halted()
        assert [round(b - a, 6) for a, b in itertools.pairwise(begun)] == [1, 2, 101, 2]


@pytest.mark.parametrize("end", [hlt(), io_write(0xF4, b"\0"), ScriptedExit("shutdown")])
async def test_only_failures_restart(autojump_clock, end):
    async with play([end]) as fleet:
        vm = await fleet.launch(blank(restart="on-failure", devices=[orc.ExitPort()]))
        assert not isinstance(await vm.wait(), orc.Failed)
        assert vm.statistics().restarts == 0


async def test_counts_add_up_over_restarts(autojump_clock):
    async with play([bus_lock(), bus_lock(), io_write(0x80, b"x"), FAIL]) as fleet:
        vm = await fleet.launch(blank(vcpus=2, restart=restart(backoff=1, most=3)))
        await trio.sleep(0.5)
        assert vm.statistics().bus_locks == fleet.statistics().bus_locks == 4
        await vm.wait()
        statistics = vm.statistics()
        assert statistics.bus_locks == 4 * 4
        assert statistics.exits["x86_bus_lock"] == 4 * 4
        assert [vcpu.bus_locks for vcpu in statistics.vcpus] == [8, 8]
        assert fleet.statistics().bus_locks == 16
        await vm.stop()
        assert vm.statistics().bus_locks == fleet.statistics().bus_locks == 16


async def test_a_restarted_guest_starts_with_fresh_memory_and_the_same_devices(autojump_clock):
    lives = iter([[io_write(0x500, b"1"), FAIL], [io_write(0x500, b"2"), hlt()]])
    tape = Tape()
    async with orc.open_fleet(backend=orc.ScriptedBackend(lambda spec, vcpu: next(lives))) as fleet:
        vm = await fleet.launch(blank(restart=restart()), paused=True)
        vm.attach(tape, ports=range(0x500, 0x501))
        vm.write_memory(0x3000, b"gone")
        await vm.resume()
        assert await vm.wait() == orc.Halted()
        assert vm.read_memory(0x3000, 4) == bytes(4)
        assert vm.read_memory(0x1000, 1) == b"\xf4"
    assert [value for _, _, value in tape.written] == [ord("1"), ord("2")]


async def test_requests_are_answered_over_restarts(autojump_clock):
    lives = iter([[io_read(0x500), FAIL], [io_read(0x500), FAIL], [io_read(0x500), hlt()]])
    async with orc.open_fleet(backend=orc.ScriptedBackend(lambda spec, vcpu: next(lives))) as fleet:
        vm = await fleet.launch(blank(restart=restart()), paused=True)
        async with vm.requests(ports=range(0x500, 0x501)) as requests:
            await vm.resume()
            answered = 0
            async for request in requests:
                request.answer(b"x")
                answered += 1
        assert answered == 3


async def test_a_range_is_free_again_when_its_block_is_left_after_a_restart(autojump_clock):
    lives = iter([[FAIL], [io_read(0x500, after=10), io_read(0x500), hlt()]])
    backend = orc.ScriptedBackend(lambda spec, vcpu: next(lives))
    with trio.fail_after(60):
        async with orc.open_fleet(backend=backend) as fleet:
            vm = await fleet.launch(blank(restart=restart(backoff=1)), paused=True)
            async with vm.requests(ports=range(0x500, 0x501)):
                await vm.resume()
                await trio.sleep(5)
                assert vm.statistics().restarts == 1
            vm.attach(Tape(), ports=range(0x500, 0x501))
            assert await vm.wait() == orc.Halted()
            assert backend.machines["guest"].engines[0].answers == [(0x500, b"\1"), (0x500, b"\2")]


async def test_a_block_left_during_the_back_off_leaves_no_claim(autojump_clock):
    lives = iter([[FAIL], [io_read(0x500), hlt()]])
    backend = orc.ScriptedBackend(lambda spec, vcpu: next(lives))
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=10, backoff_max=20)), paused=True)
        async with vm.requests(ports=range(0x500, 0x501)):
            await vm.resume()
            await trio.sleep(5)
        assert await vm.wait() == orc.Halted()
        assert backend.machines["guest"].engines[0].answers == [(0x500, b"\xff")]


async def test_what_is_attached_during_the_back_off_is_there_after_it(stage: Stage, soon):
    tape = Tape()
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ports", restart=restart(backoff=0.05, most=1)), paused=True)
        async with fleet.exits(orc.Io, vm=vm) as exits:
            vm.attach(Breaks(), ports=range(0x500, 0x504))
            await vm.resume()
            await exits.receive()
        # Its guest has failed or is about to: both are fine.
        while not vm._control.guest.life.has_ended:  # an inner state that nothing tells
            await trio.lowlevel.checkpoint()
        vm.attach(tape, ports=range(0x600, 0x604))
        async with vm.requests(ports=range(0x610, 0x614)):
            await vm.wait()
        assert vm.restarts == 1


class Breaks:
    broken = True

    def read(self, offset: int, size: int) -> int:
        if self.broken:
            raise ValueError("broken")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if self.broken:
            raise ValueError("broken")


async def test_stop_ends_the_back_off(autojump_clock):
    async with play([FAIL]) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=10, backoff_max=10)))
        await trio.sleep(5)
        begun = trio.current_time()
        outcome = await vm.stop()
        assert trio.current_time() == begun
        assert isinstance(outcome, orc.Failed)
        assert vm.statistics().restarts == 0


async def test_stop_from_inside_ends_it_for_good(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank(restart="on-failure"))
        assert await vm.stop("enough") == orc.Stopped("enough")
        await trio.sleep(100)
        assert vm.state == "stopped"


async def test_a_vm_paused_during_the_back_off_comes_back_paused(autojump_clock):
    lives = iter([[FAIL], [hlt()]])
    async with orc.open_fleet(backend=orc.ScriptedBackend(lambda spec, vcpu: next(lives))) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=10, backoff_max=10)))
        await trio.sleep(5)
        await vm.pause()
        await trio.sleep(20)
        assert vm.statistics().restarts == 1
        assert vm.state == "paused"
        assert vm.outcome is None
        await vm.resume()
        assert await vm.wait() == orc.Halted()


async def test_a_paused_vm_is_quiesced_from_the_first_moment_of_its_next_run(autojump_clock):
    kept = Kept()
    lives = iter([[FAIL], [FOR_EVER]])
    async with orc.open_fleet(backend=orc.ScriptedBackend(lambda spec, vcpu: next(lives)), journal=kept) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=10, backoff_max=10)))
        await trio.sleep(5)
        await vm.pause()
        await trio.sleep(5)
        while not vm.restarts:  # an inner state that nothing tells
            assert (vm.state, vm.quiesced) == ("paused", True)
            await trio.lowlevel.checkpoint()
        assert (vm.state, vm.quiesced) == ("paused", True)
        assert vm.registers().rip == 0x1000
        await vm.resume()
        await vm.pause()
        states = [(state, reason) for _, state, reason in kept.states]
        assert states[-3:] == [("paused", "restart 1"), ("running", "resumed"), ("paused", "")]


async def test_a_pause_that_meets_the_end_of_a_run_holds_the_next(autojump_clock):
    """A guest that resets itself is paused in each moment of that."""
    backend = orc.ScriptedBackend(lambda spec, vcpu: [triple_fault(after=1)])
    async with orc.open_fleet(backend=backend) as fleet:
        for moment in range(40):
            vm = await fleet.launch(blank(f"vm-{moment}", on_reset="reset"))
            await trio.sleep(1)
            for _ in range(moment):
                await trio.lowlevel.checkpoint()
            await vm.pause()
            for _ in range(20):
                assert (vm.state, vm.quiesced) == ("paused", True)
                vm.registers()
                await trio.lowlevel.checkpoint()
            await vm.stop()


@pytest.mark.kvm
async def test_pause_resume_limits_and_inspection_are_safe_during_the_back_off(nothing_left, soon):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(
            stage.spec("ports", restart=restart(backoff=0.2, backoff_max=0.2, most=1)),
            devices=[(range(0x500, 0x504), None, Breaks())],
        )
        while not vm._control.guest.life.has_ended:  # an inner state that nothing tells
            await trio.lowlevel.checkpoint()
        await vm.pause()
        await vm.resume()
        await vm.set_limit(orc.Limit(rate=5), meter="exits")
        assert (await vm.inspect()).rdx == 0x500
        assert vm.registers().rdx == 0x500
        assert vm.statistics().exits == {"io": 1}
        async with fleet.exits(orc.Io, vm=vm) as exits:
            assert isinstance(await vm.wait(), orc.Failed)
            assert len([exit async for exit in exits]) == 1


@pytest.mark.kvm
async def test_a_restart_that_the_host_refuses_counts_as_a_failure_of_that_vm(nothing_left, soon, monkeypatch):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        other = await fleet.launch(stage.spec("spin", "other"))
        vm = await fleet.launch(
            stage.spec("ports", restart=restart(backoff=0.01, most=2)),
            paused=True,
            devices=[(range(0x500, 0x504), None, Breaks())],
        )
        errors = iter([MemoryError("none"), RuntimeError("can't start new thread")])

        def plan(*args: object, **more: object) -> None:
            raise next(errors)

        monkeypatch.setattr(fleet.backend, "plan", plan)
        await vm.resume()
        outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert "restart" in outcome.reason
        assert other.state == "running"
        assert vm.statistics().exits == {"io": 1}


@pytest.mark.parametrize("backend", [pytest.param(b, marks=getattr(pytest.mark, b)) for b in ("emulated", "kvm")])
async def test_what_is_desired_changes_in_the_back_off_and_comes_into_force_with_the_restart(
    backend, nothing_left, soon, monkeypatch
):
    told: list[tuple[str, object]] = []
    stage = Stage(backend)
    async with stage.open() as fleet:
        vm = await fleet.launch(
            stage.spec("ports", restart=restart(backoff=0.2, backoff_max=0.2, most=1)),
            devices=[(range(0x500, 0x504), None, breaks := Breaks())],
        )
        first = vm._control.guest
        while not first.life.has_ended:  # an inner state that nothing tells
            await trio.lowlevel.checkpoint()
        for action in (orc.CapCpu(vm="guest", share=0.5), orc.CapCpu(vm="guest", share=0.2)):
            assert (await fleet.apply(action, policy="a")).error is None
        vm.cap_cpu(0.4)
        assert (await fleet.apply(orc.CapCpu(vm="guest", share=None), policy="a")).error is None
        assert vm.desired.cap == 0.4
        restraint = "orchestra.machine.restraint.Restraint"
        monkeypatch.setattr(f"{restraint}.isolate", lambda guest, on: told.append(("isolate", on)))
        for action in (orc.Isolate, orc.Rejoin, orc.Isolate):
            assert (await fleet.apply(action(vm="guest"))).error is None
        await vm.pause()
        assert (vm.state, vm.desired.isolated, vm.quiesced) == ("paused", True, True)
        capped = []
        monkeypatch.setattr(f"{restraint}.cap_cpu", lambda guest, share: capped.append(share))
        told.clear()
        breaks.broken = False
        while vm._control.guest is first:  # noqa: ASYNC110  # an inner state that nothing tells
            await trio.sleep(0.01)
        await vm.pause()
        assert (vm.state, vm.restarts) == ("paused", 1)
        assert (capped, told) == ([0.4], [("isolate", True)])


@pytest.mark.kvm
async def test_a_cap_taken_off_in_the_back_off_does_not_come_back(nothing_left, soon, monkeypatch):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(
            stage.spec("ports", restart=restart(backoff=0.1, backoff_max=0.1, most=1)),
            paused=True,
            devices=[(range(0x500, 0x504), None, breaks := Breaks())],
        )
        vm.cap_cpu(0.1)
        await vm.resume()
        first = vm._control.guest
        while not first.life.has_ended:  # an inner state that nothing tells
            await trio.lowlevel.checkpoint()
        vm.cap_cpu(None)
        put: list[float | None] = []
        monkeypatch.setattr("orchestra.machine.restraint.Restraint.cap_cpu", lambda guest, share: put.append(share))
        breaks.broken = False
        while vm._control.guest is first:  # noqa: ASYNC110  # an inner state that nothing tells
            await trio.sleep(0.01)
        assert (vm.desired.cap, vm.restarts, put) == (None, 1, [])


async def test_what_a_restart_cant_put_into_force_is_logged_and_not_said_to_be(autojump_clock, monkeypatch, caplog):
    lives = iter([[attrs.evolve(FAIL, after=5)], [FOR_EVER]])
    with monkeypatch.context() as patch:
        for name in ("cap_cpu", "isolate"):
            patch.setattr(f"orchestra.machine.restraint.Restraint.{name}", lambda *args: None)
        backend = orc.ScriptedBackend(lambda spec, vcpu: next(lives))
        async with orc.open_fleet(backend=backend) as fleet:
            vm = await fleet.launch(blank(restart=restart(backoff=1)))
            vm.cap_cpu(0.1)
            vm.isolate()
            await fleet.apply(orc.CapCpu(vm="guest", share=0.5), policy="p")

            def refuse(*args: object) -> None:
                raise orc.ResourceLimit(1, "no room")

            for name in ("cap_cpu", "isolate"):
                patch.setattr(f"orchestra.machine.restraint.Restraint.{name}", refuse)
            await trio.sleep(10)
            assert (vm.restarts, vm.state, vm.desired.cap, vm.desired.isolated) == (1, "running", None, False)
            held = ActionsInForce()
            for applied in fleet.actions():  # as the journal has them
                assert isinstance(applied.action, orc.Action)
                held.note(applied.action, applied.policy)
            assert not held
            ended = [applied for applied in fleet.actions() if "no room" in applied.action.reason]
            assert {(type(a.action), a.policy) for a in ended} == {
                (orc.CapCpu, None),
                (orc.CapCpu, "p"),
                (orc.Rejoin, None),
            }
    assert [message.count("no room") for message in caplog.messages] == [1, 1]


# ---- reset


async def test_a_guest_that_resets_itself_starts_afresh_where_its_spec_wants_that(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("triple_fault", mode=32, on_reset="reset"), paused=True)
        generation = vm.generation
        vm.write_memory(0x8000, b"gone")
        await vm.resume()
        while vm.statistics().resets < 3:  # noqa: ASYNC110  # the guest tells nobody
            await trio.sleep(0.001)
        assert (vm.outcome, vm.restarts, vm.generation) == (None, 0, generation)
        assert fleet.vms["guest"] is vm
        assert vm.statistics().exits["shutdown"] >= 3  # those before count
        assert vm.statistics().resets >= 3
        assert await vm.stop() == orc.Stopped("stop()")


async def test_it_ends_otherwise(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("triple_fault", mode=32))
        assert await vm.wait() == orc.Shutdown("triple fault")
        assert vm.statistics().resets == 0


async def test_a_guest_that_does_nothing_but_reset_keeps_to_one_a_second(autojump_clock):
    kept = Kept()
    async with play([triple_fault()], journal=kept) as fleet:
        vm = await fleet.launch(blank(on_reset="reset"))
        await trio.sleep(0.5)
        assert vm.statistics().resets == 5
        await trio.sleep(60)
        assert 60 <= vm.statistics().resets <= 66
        assert vm.restarts == 0
        begun = trio.current_time()
        await vm.pause()  # while it waits for its turn
        assert vm.state == "paused"
        resets = vm.statistics().resets
        await trio.sleep(10)
        assert (vm.state, vm.statistics().resets) == ("paused", resets + 1)
        assert trio.current_time() == begun + 10
        await vm.resume()
        await trio.sleep(10)
        assert vm.statistics().resets > resets + 1
        begun = trio.current_time()
        assert await vm.stop() == orc.Stopped("stop()")
        assert trio.current_time() == begun
    reasons = [reason for _, _, reason in kept.states]
    assert "reset 1: triple fault" in reasons
    assert ("guest", "waiting", "waits 1 s to be reset: triple fault") in kept.states
    assert "reset 7: triple fault" in reasons


async def test_the_fleets_end_does_not_wait_for_a_resets_turn(autojump_clock):
    async with play([triple_fault()]) as fleet:
        vm = await fleet.launch(blank(on_reset="reset"))
        await trio.sleep(5.5)
        begun = trio.current_time()
    assert trio.current_time() == begun
    assert vm.outcome == orc.Stopped("the fleet was closed")


async def test_somebody_outside_may_reset_it(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", vcpus=stage.vcpus))
        first = vm._control.guest
        await vm.reset()
        assert vm._control.guest is not first
        assert (vm.state, vm.statistics().resets, vm.restarts, vm.outcome) == ("running", 1, 0, None)
        await vm.pause()
        await vm.reset("again")
        await vm.pause()
        assert (vm.state, vm.statistics().resets) == ("paused", 2)
        assert vm.registers().rip == 0x1000  # as its boot spec says
        await vm.resume()
        await vm.stop()
        with pytest.raises(orc.StateError, match="stopped"):
            await vm.reset()


async def test_inspecting_what_ends_and_starts_again_meanwhile_gets_an_answer(autojump_clock):
    lives = iter([[FAIL], [FOR_EVER]])
    async with orc.open_fleet(backend=orc.ScriptedBackend(lambda spec, vcpu: next(lives))) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=5, backoff_max=5)))
        await trio.sleep(1)
        ended, inspected = vm._control.guest, []

        async def inspect() -> None:
            inspected.append(await vm.inspect())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(inspect)
            nursery.start_soon(vm.reset)
        assert vm._control.guest is not ended
        assert inspected[0].rip == 0x1000


async def test_many_who_reset_it_at_once_reset_it_once(stage: Stage, soon):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin"))
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(vm.reset)
        assert vm.statistics().resets == 1
        await vm.pause()
        assert vm.state == "paused"


async def test_a_reset_ends_the_back_off_and_what_was_asked_is_done_once(autojump_clock):
    lives = iter([[FAIL], [attrs.evolve(FAIL, after=5)], [FOR_EVER]])
    async with orc.open_fleet(backend=orc.ScriptedBackend(lambda spec, vcpu: next(lives))) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=10, backoff_max=20)))
        await trio.sleep(3)
        await vm.reset()
        assert (vm.statistics().resets, vm.restarts) == (1, 0)
        await trio.sleep(6)
        assert (vm.statistics().resets, vm.restarts) == (1, 0)
        await trio.sleep(20)
        assert (vm.statistics().resets, vm.restarts, vm.state) == (1, 1, "running")


async def test_a_cancelled_reset_is_done_all_the_same(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank())
        with trio.CancelScope() as scope:
            scope.cancel()
            await vm.reset()
        await trio.sleep(1)
        assert (vm.statistics().resets, vm.state) == (1, "running")


async def test_whoever_waits_for_a_reset_of_what_ends_meanwhile_is_told(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.stop)
            with pytest.raises(orc.StateError, match="ended before it was reset"):
                await vm.reset()


class Counts(Tape):
    """A device that has a state, and a reset."""

    resets = 0

    def reset(self) -> None:
        self.resets += 1
        self.written.clear()


async def test_devices_and_claims_and_console_stay_over_a_reset_and_devices_are_told(stage: Stage, soon):
    device = Counts()
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ports"), paused=True)
        vm.attach(device, ports=range(0x500, 0x504), mmio=range(0xD0000000, 0xD0000004))
        console = vm.console
        async with vm.requests(ports=range(0x510, 0x514)):
            await vm.reset()
            await vm.pause()
            assert (device.resets, vm.console) == (1, console)
            await vm.resume()
            assert await vm.wait() == orc.Halted()
        assert len(device.written) == 3


async def test_a_device_whose_reset_fails_fails_its_vm_alone(autojump_clock, monkeypatch):
    device = Counts()
    monkeypatch.setattr(Counts, "reset", lambda self: 1 / 0)
    async with play({"guest": [FOR_EVER], "other": [FOR_EVER]}) as fleet:
        other = await fleet.launch(blank("other"))
        vm = await fleet.launch(blank(), devices=[(range(0x500, 0x504), None, device)])
        with pytest.raises(orc.StateError, match="division by zero"):
            await vm.reset()
        assert isinstance(vm.outcome, orc.Failed)
        assert vm.outcome.reason.startswith("reset: ")
        assert other.state == "running"


async def test_whoever_waits_for_a_reset_that_fails_is_told_though_restarts_go_on(autojump_clock, monkeypatch):
    device, works = Counts(), Counts.reset
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank(restart=restart(backoff=1)), devices=[(range(0x500, 0x504), None, device)])
        monkeypatch.setattr(Counts, "reset", lambda self: 1 / 0)
        with trio.fail_after(60), pytest.raises(orc.StateError, match="could not be reset: ZeroDivisionError"):
            await vm.reset()
        assert vm.outcome is None
        assert vm.state == "waiting"
        monkeypatch.setattr(Counts, "reset", works)
        await vm.reset()
        assert (vm.state, device.resets) == ("running", 1)


async def test_a_device_that_exits_at_its_reset_fails_its_vm_alone(autojump_clock, monkeypatch):
    async with play({"guest": [FOR_EVER], "other": [FOR_EVER]}) as fleet:
        other = await fleet.launch(blank("other"))
        vm = await fleet.launch(blank(), devices=[(range(0x500, 0x504), None, Counts())])
        monkeypatch.setattr(Counts, "reset", lambda self: sys.exit("bye"))
        with pytest.raises(orc.StateError, match="bye"):
            await vm.reset()
        assert isinstance(vm.outcome, orc.Failed)
        assert "bye" in vm.outcome.reason
        assert other.state == "running"


async def test_a_mistake_in_what_follows_a_run_fails_that_vm_alone(autojump_clock, monkeypatch):
    async with play({"guest": [hlt(after=1)], "other": [FOR_EVER]}) as fleet:
        other = await fleet.launch(blank("other"))
        vm = await fleet.launch(blank())
        monkeypatch.setattr("orchestra.machine.restart.Succession.after", lambda *args: 1 / 0)
        assert await vm.wait() == orc.Failed("supervision: ZeroDivisionError: division by zero")
        monkeypatch.undo()
        assert other.state == "running"


# ---- more than one task of each


async def test_vms_end_each_for_itself(autojump_clock):
    scripts = {
        "fails": [attrs.evolve(FAIL, after=1)],
        "halts": [hlt(after=2)],
        "shuts": [io_write(0xF4, b"\3", after=3)],
        "stays": [FOR_EVER],
        "reads": [mmio_read(0xD0000000, 4, after=1), hlt(after=3)],
    }
    async with play(scripts) as fleet:
        vms = [await fleet.launch(blank(name, devices=[orc.ExitPort()])) for name in scripts]
        await trio.sleep(10)
        kinds = Counter(type(vm.outcome).__name__ for vm in vms)
        assert kinds == {"Failed": 1, "Halted": 2, "Shutdown": 1, "NoneType": 1}
        assert fleet.vms["stays"].state == "running"


async def test_what_the_kernel_counts_is_told_where_there_is_a_kernel_that_does(stage: Stage):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", vcpus=stage.vcpus))
        if stage.backend != "kvm":
            with pytest.raises(orc.StateError, match=f"{stage.backend}"):
                await vm.kernel_statistics()
            return
        await vm.pause()
        counted = await vm.kernel_statistics()
        assert counted["vcpu0.exits"] >= 0
        assert {"vcpu0.exits", "vcpu1.exits"} <= set(counted)
        assert any("." not in name for name in counted)
        await vm.stop()
        with pytest.raises(orc.StateError, match="has ended"):
            await vm.kernel_statistics()
