"""orchestra.aio: the whole API from asyncio tasks, with trio as a guest of their loop or on a thread of its own."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterable
from contextlib import AsyncExitStack
from types import ModuleType

import pytest
import trio

import aio_kit
import orchestra as orc
import orchestra.aio
from aio_kit import LIMIT, Door, descriptors, idle, reached, run
from conftest import blank, guest
from orchestra.aio.loop import LoopBridge
from orchestra.aio.wrapper import wrapped
from orchestra.backend.scripted import bus_lock, hlt, io_read, io_write
from orchestra.machine.devices.consoleport import ConsolePort
from orchestra.native import ffi, lib

door, nothing_stays = aio_kit.door, aio_kit.nothing_stays  # fixtures

# ---- the same API


def test_a_fleet_program_as_the_design_shows_it(door):
    script = {"web-1": [io_write(0xE9, b"h"), io_read(0x500), *[bus_lock(after=0.0001, rip=0x1234)] * 10]}

    async def main() -> None:
        async with door.open(script, limit=orc.Limit(rate=1e6), tenants={"acme": None}, bus_locks="require") as fleet:
            spec = blank("web-1", tenant="acme", limit=orc.Limit(rate=200, burst=20), devices=[orc.DebugConsole()])
            vm = await fleet.launch(spec, paused=True)
            assert (vm.state, vm.name, vm.tenant, vm.spec, vm.restarts) == ("paused", "web-1", "acme", spec, 0)
            async with vm.requests(ports=range(0x500, 0x510)) as requests:
                async with fleet.exits(orc.BusLock, vm=vm) as locks:
                    assert (locks.vm, locks.kinds) == ("web-1", (orc.BusLock,))
                    await vm.resume()
                    request = await anext(requests)
                    assert (request.vcpu, request.address, request.size, request.write) == (0, 0x500, 1, False)
                    assert (request.data, request.answered, request.returned) == (b"", False, False)
                    applied = await fleet.apply(orc.Throttle(vm="web-1", limit=orc.Limit(rate=1e6), reason="noisy"))
                    assert fleet.actions()[-1] == applied
                    await vm.set_limit(orc.Limit(rate=1e6))
                    assert not vm.throttled
                    request.answer(b"\x2a")
                    assert request.answered
                    seen = [(lock.vm, lock.vcpu, lock.rip) async for lock in locks]
            assert seen == [("web-1", 0, 0x1234)] * 10
            assert locks.statistics() == orc.ExitsStatistics(received=10, missed=0, waiting=0)
            assert await vm.wait() == vm.outcome == orc.Halted()
            assert (vm.statistics().bus_locks, fleet.statistics().bus_locks) == (10, 10)
            assert (vm.console.text, vm.console.log(), vm.console.total) == ("h", b"h", 1)
            assert (fleet.limit, fleet.exit_limit) == (orc.Limit(rate=1e6), None)
            assert fleet.tenants["acme"].name == "acme"
            assert (fleet.bus_locks, fleet.bus_lock_detection) == (True, "fault-like")
            assert fleet.backend.name == "scripted"
            assert fleet.now() > 0

    run(main)


@pytest.mark.kvm
def test_a_real_guest_is_steered_and_read(nothing_left, door):
    async def main() -> None:
        async with door.open(backend="kvm") as fleet:
            boot = orc.FlatImage(code=guest("ask_twice"))
            vm = await fleet.launch(orc.VmSpec(name="asks", boot=boot), paused=True)
            vm.write_memory(0x8000, b"hello")
            assert vm.read_memory(0x8000, 5) == b"hello"
            assert vm.registers().rip == (await vm.inspect()).rip == 0x1000
            async with vm.requests(ports=range(0x500, 0x501)) as requests:
                await vm.resume()
                async for request in requests:
                    await vm.pause(quiesce=False)  # while it waits for the answer
                    assert (vm.state, vm.quiesced) == ("paused", False)
                    assert [access.address for access in vm.statistics().pending] == [0x500]
                    request.answer(b"\x07" * request.size)
                    await vm.pause()
                    assert (vm.quiesced, vm.statistics().pending) == (True, ())
                    await vm.reset()
                    assert (vm.statistics().resets, vm.restarts, vm.outcome) == (1, 0, None)
                    await vm.pause()
                    assert vm.registers().rip == 0x1000
                    break
            assert await vm.stop("enough") == vm.outcome
            assert dict(fleet.vms) == {}

    run(main)


def test_an_own_device_is_attached(door):
    class Register:
        def read(self, offset: int, size: int) -> int:
            return 7

        def write(self, offset: int, size: int, value: int) -> None:
            pass

    async def main() -> None:
        async with door.open([io_read(0x600, 1), io_read(0x601, 1)]) as fleet:
            vm = await fleet.launch(blank(), paused=True, devices=[(range(0x601, 0x602), None, Register())])
            vm.attach(Register(), ports=range(0x600, 0x601))
            await vm.resume()
            await vm.wait()
            assert fleet.backend.machines["guest"].engines[0].answers == [(0x600, b"\x07"), (0x601, b"\x07")]

    run(main)


def test_a_vm_is_one_object_wherever_it_comes_from(door):
    async def main() -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank("a"))
            await fleet.launch(blank("b"))
            vms = fleet.vms
            assert fleet.vm("a") is vm
            assert vms["a"] is vm
            assert vm.console is vm.console
            assert (list(vms), len(vms), "a" in vms, "c" in vms) == (["a", "b"], 2, True, False)
            assert repr(vms) == "{'a': <Vm 'a' running>, 'b': <Vm 'b' running>}"
            await vm.stop()
            assert list(vms) == ["b"]  # as it is now
            with pytest.raises(KeyError):
                vms["a"]

    run(main)


def test_any_task_of_the_loop_may_call(door):
    async def one(fleet: orc.aio.Fleet, name: str) -> orc.Outcome:
        vm = await fleet.launch(blank(name))
        await vm.pause()
        await vm.resume()
        return await vm.stop(name)

    async def main() -> None:
        async with door.open() as fleet:
            names = [f"vm{n}" for n in range(20)]
            outcomes = await asyncio.gather(*(one(fleet, name) for name in names))
            assert outcomes == [orc.Stopped(name) for name in names]
            assert fleet.statistics().launched == 20

    run(main)


def test_limits_are_set_and_vms_told_without_waiting(door):
    async def main() -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank())
            fleet.set_limit_nowait(orc.Limit(rate=5), vm="guest")
            assert vm.statistics().limit == orc.Limit(rate=5)
            await fleet.apply(orc.Stop(vm="guest", reason="soon"))
            assert await vm.wait() == orc.Stopped("soon")
            await fleet.launch(blank("other"))
            assert await fleet.stop("all") == {"other": orc.Stopped("all")}

    run(main)


def test_exits_are_received_in_every_way(door):
    many = 1000  # several batches

    async def main() -> None:
        async with door.open([io_write(port, b"x") for port in range(many)] + [hlt()]) as fleet:
            vm = await fleet.launch(blank(), paused=True)
            async with fleet.exits(orc.Io, vm=vm) as exits:
                with pytest.raises(trio.WouldBlock):
                    exits.receive_nowait()
                await vm.resume()
                await vm.wait()
                assert exits.statistics() == orc.ExitsStatistics(received=many, missed=0, waiting=many)
                ports = [exits.receive_nowait().port, (await exits.receive()).port]
                assert exits.statistics().waiting == many - 2
                ports += [exit.port async for exit in exits]
                assert ports == list(range(many))
                with pytest.raises(trio.EndOfChannel):
                    await exits.receive()
                with pytest.raises(trio.EndOfChannel):
                    exits.receive_nowait()

    run(main)


def test_exits_cross_in_batches_as_they_are(door):
    many = 700
    script = [io_write(n, b"x") for n in range(many)]

    async def main() -> None:
        async with door.open({"guest": script}) as fleet:
            vm = await fleet.launch(blank(), paused=True)
            async with fleet.exits(orc.Io, vm=vm) as exits:
                await vm.resume()
                await vm.wait()
                ports = [(await exits.receive()).port]  # and with it some cross that nobody asked for yet
                sizes = []
                async for batch in exits.batches(most=100):
                    sizes.append(len(batch))
                    ports += batch.address
                    waiting = exits.statistics().waiting
                    assert waiting == many - len(ports)
                assert ports == list(range(many))
                assert max(sizes) == 100
                with pytest.raises(orc.SpecError, match="most=0"):
                    await anext(exits.batches(0))

    run(main)


def test_a_cancelled_wait_for_a_batch_loses_none(door):
    async def main() -> None:
        script = {"guest": [io_write(n, b"x", after=0.001) for n in range(200)]}
        async with door.open(script) as fleet, fleet.exits(orc.Io, vm="guest") as exits:
            await fleet.launch(blank())
            ports: list[int] = []

            async def take() -> None:
                async for batch in exits.batches():
                    ports.extend(batch.address)

            while len(ports) < 200:
                task = asyncio.create_task(take())
                await asyncio.wait([task], timeout=0.003)
                task.cancel()
                await asyncio.wait([task])
            assert ports == list(range(200))

    run(main)


def test_exits_that_are_closed_end_for_whoever_waits(door):
    async def main() -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank())
            async with fleet.exits(vm="guest") as exits:
                waiting = asyncio.create_task(exits.receive())
                await reached(fleet)
                with pytest.raises(trio.BusyResourceError):
                    await exits.receive()
                async with exits:
                    pass
                with pytest.raises(trio.ClosedResourceError):
                    await waiting
                assert [exit async for exit in exits] == []
            assert vm.state == "running"

    run(main)


def test_a_lagging_subscriber_misses_what_its_capacity_says(door):
    async def main() -> None:
        async with door.open([io_write(port, b"x") for port in range(10)] + [hlt()]) as fleet:
            vm = await fleet.launch(blank(), paused=True)
            async with fleet.exits(orc.Io, vm=vm, capacity=3) as newest, fleet.exits(orc.Io, drop="newest") as all_:
                async with fleet.exits(orc.Io, vm="guest", capacity=3, drop="newest") as oldest:
                    await vm.resume()
                    await vm.wait()
                    assert ([e.port async for e in newest], newest.missed) == ([7, 8, 9], 7)
                    assert ([e.port async for e in oldest], oldest.missed) == ([0, 1, 2], 7)
                    assert all_.statistics().waiting == 10

    run(main)


def test_iterating_over_what_is_waiting_lets_other_tasks_run(door):
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        async with door.open([io_write(0x80, b"x")] * 256 + [hlt()]) as fleet:
            vm = await fleet.launch(blank(), paused=True)
            async with fleet.exits(orc.Io, vm=vm) as exits:
                await vm.resume()
                await vm.wait()
                await exits.receive()  # the whole batch is here now
                task = asyncio.create_task(other())
                for _ in range(255):
                    await anext(exits)
                assert turns >= 3
                task.cancel()

    run(main)


def test_console_is_followed(door):
    script = [*(io_write(0xE9, bytes([letter])) for letter in b"hello"), hlt()]

    async def main() -> None:
        async with door.open(script) as fleet:
            vm = await fleet.launch(blank(devices=[orc.DebugConsole()]), paused=True)
            follower = asyncio.create_task(_join(vm))
            await reached(fleet)
            await vm.resume()
            assert await follower == b"hello"
            async for chunk in vm.console.follow():
                assert chunk == b"hello"
                break
            assert await idle(fleet)

    async def _join(vm: orc.aio.Vm) -> bytes:
        return b"".join([chunk async for chunk in vm.console.follow()])

    run(main)


def test_port_is_read_and_written_and_a_cancelled_read_loses_nothing(door):
    def says(port: ConsolePort, data: bytes) -> None:
        lib.orc_port_say(port.handle, ffi.NULL, data, len(data))
        port.changed()

    async def main() -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank(), paused=True)
            assert not vm.ports
            inner = ConsolePort(vm._inner._control.context.post, "agent")
            port = wrapped(orc.aio.ConsolePort, vm._bridge, inner)
            assert (port.name, port.is_open, await port.read()) == ("agent", False, b"")
            opened = asyncio.create_task(port.wait_open())
            await reached(fleet)
            lib.orc_port_set_open(inner.handle, ffi.NULL, True)
            inner.changed()
            await opened
            waits = asyncio.create_task(port.read())
            await reached(fleet)
            waits.cancel()
            says(inner, b"hello")
            with pytest.raises(asyncio.CancelledError):
                await waits
            assert await port.read(3) + await port.read(9) == b"hello"
            says(inner, b"world")
            assert await port.read() == b"world"
            lib.orc_port_set_open(inner.handle, ffi.NULL, False)
            with pytest.raises(orc.StateError, match="no program"):
                await port.write(b"x")
            vm.console.resize(100, 40)
            assert vm.console.size == (100, 40)
            assert await idle(fleet)

    run(main)


def test_what_was_closed_can_still_be_asked(door):
    async def main() -> None:
        async with door.open([hlt()]) as fleet:
            vm = await fleet.launch(blank())
            await vm.wait()
        assert vm.outcome == orc.Halted()
        assert await vm.wait() == await vm.stop() == orc.Halted()
        assert vm.statistics().exits == {"hlt": 1}
        assert fleet.statistics().launched == 1
        with pytest.raises(orc.StateError, match="closing"):
            await fleet.launch(blank())
        with pytest.raises(orc.StateError, match="closed"):
            async with fleet.exits():
                raise AssertionError("not reached")
        with pytest.raises(orc.StateError):
            await vm.pause()

    run(main)


# ---- errors


def test_errors_come_out_as_themselves(door):
    async def main() -> None:
        with pytest.raises(orc.NoSuchBackend):
            async with door.open(backend="quantum"):
                raise AssertionError("not reached")
        async with door.open() as fleet:
            with pytest.raises(orc.SpecError):
                await fleet.launch("web")
            with pytest.raises(orc.UnknownVm):
                fleet.vm("web")
            vm = await fleet.launch(blank())
            with pytest.raises(orc.VmExists):
                await fleet.launch(blank())
            with pytest.raises(orc.GuestMemoryError):
                vm.read_memory(1 << 50, 4)
            with pytest.raises(orc.SpecError):
                async with vm.requests():
                    raise AssertionError("not reached")
            with pytest.raises(orc.SpecError):
                async with fleet.exits(int):
                    raise AssertionError("not reached")
            await vm.stop()
            with pytest.raises(orc.StateError):
                await vm.pause()

    run(main)


def test_an_error_in_the_block_comes_out_and_the_fleet_is_closed(door):
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is what is tested
            async with door.open() as fleet:
                vm = await fleet.launch(blank())
                raise ZeroDivisionError
        assert vm.outcome == orc.Stopped("the fleet was closed")

    run(main)


class Bad:
    """A policy that raises once the block is entered."""

    name, interval = "bad", 0.001

    def __init__(self) -> None:
        self.now = False

    def decide(self, facts: orc.Facts) -> Iterable[orc.Action]:
        if self.now:
            raise ZeroDivisionError("in the policy")
        return []


def test_a_fleet_that_fails_cancels_its_block_and_its_error_comes_out(nothing_left, door):
    async def main() -> None:
        task = asyncio.current_task()
        with pytest.raises(ZeroDivisionError, match="in the policy"):  # noqa: PT012 - the block is what is tested
            async with door.open(policies=[bad := Bad()], strict=True) as fleet:
                await fleet.launch(blank())
                bad.now = True
                await asyncio.Event().wait()
        assert task.cancelling() == 0
        await asyncio.sleep(0)  # no cancellation is left over

    run(main)


def test_a_fleet_that_fails_under_an_error_of_the_block_raises_both(door):
    async def main() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012 - the block is what is tested
            async with door.open(policies=[bad := Bad()], strict=True):
                bad.now = True
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    raise KeyError("in the block") from None
        assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError, KeyError]
        assert asyncio.current_task().cancelling() == 0

    run(main)


def test_a_fleet_that_fails_when_its_block_is_cancelled_as_well_is_the_cause_of_the_cancellation(door):
    async def owner() -> None:
        async with door.open(policies=[bad := Bad()], strict=True):
            bad.now = True
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                asyncio.current_task().cancel()  # as if another had come at the same time
                await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(owner())
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert task.cancelling() == 1

    run(main)


def test_a_fleet_that_fails_in_a_block_that_shrugs_still_raises(door):
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is what is tested
            async with door.open(policies=[bad := Bad()], strict=True):
                bad.now = True
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    pass
        assert asyncio.current_task().cancelling() == 0

    run(main)


def test_a_fleet_that_fails_before_its_block_is_entered_says_why():
    class AtOnce(Bad):
        interval = 1e-6

        def __init__(self) -> None:
            self.now = True

    async def main() -> None:
        before = descriptors()
        for _ in range(20):  # on a thread, so it may be too late sometimes
            with pytest.raises(ZeroDivisionError):
                async with Door(True).open(policies=[AtOnce()], strict=True):
                    await asyncio.Event().wait()
        assert descriptors() == before

    run(main)


def test_trio_falling_over_is_told_to_everybody(nothing_left, door):
    async def crash() -> None:
        raise ZeroDivisionError("a system task")

    async def main() -> None:
        with pytest.raises(trio.TrioInternalError) as caught:  # noqa: PT012 - the block is what is tested
            async with door.open() as fleet:
                waiting = asyncio.create_task(_wait(fleet))
                await reached(fleet)
                fleet._bridge.sync(trio.lowlevel.spawn_system_task, crash)
                await asyncio.Event().wait()
        assert caught.value.__cause__.subgroup(ZeroDivisionError)
        with pytest.raises(trio.TrioInternalError):
            await waiting
        async with door.open() as fleet:  # and another can be opened
            await reached(fleet)

    async def _wait(fleet: orc.aio.Fleet) -> None:
        async with fleet.exits() as exits:
            await exits.receive()

    run(main)


# ---- several fleets, several runs


def test_fleets_of_a_loop_share_one_guest():
    async def main() -> None:
        async with Door(False).open() as first:
            async with Door(False).open() as second:
                assert first._bridge is second._bridge
                await second.launch(blank())
            vm = await first.launch(blank())  # goes on after the other was closed
            assert await vm.stop() == orc.Stopped("stop()")
            async with Door(True).open() as third:
                assert third._bridge is not first._bridge
                await third.launch(blank())

    run(main)


def test_the_first_fleet_may_be_closed_first():
    async def main() -> None:
        opened, left = asyncio.Event(), asyncio.Event()

        async def second() -> orc.Outcome:
            async with Door(False).open() as fleet:
                vm = await fleet.launch(blank())
                opened.set()
                await left.wait()
                return await vm.stop()

        async with Door(False).open():
            task = asyncio.create_task(second())
            await opened.wait()
        left.set()
        assert await task == orc.Stopped("stop()")

    run(main)


def test_fleets_come_and_go_while_others_end(nothing_left, door):
    async def one(turns: int) -> None:
        for _ in range(turns):
            async with door.open() as fleet:
                await fleet.launch(blank())

    async def main() -> None:
        await asyncio.gather(*(one(turns) for turns in (1, 5, 3, 8)))

    run(main)


def test_a_fleet_is_opened_at_any_moment_of_anothers_life(door):
    async def one(steps: int) -> orc.Outcome:
        for _ in range(steps):
            await asyncio.sleep(0)
        async with door.open() as fleet:
            vm = await fleet.launch(blank())
        return vm.outcome

    async def main() -> None:
        for steps in range(60):
            assert await asyncio.gather(one(0), one(steps)) == [orc.Stopped("the fleet was closed")] * 2

    run(main)


def test_one_asyncio_run_after_the_other_and_then_trio(door):
    async def main() -> None:
        async with door.open() as fleet:
            await fleet.launch(blank())

    for _ in range(5):
        run(main)
    assert trio.run(trio.lowlevel.checkpoint) is None


def test_a_block_is_entered_and_left_in_different_tasks(door):
    async def enter(stack: AsyncExitStack) -> orc.aio.Vm:
        fleet = await stack.enter_async_context(door.open())
        await stack.enter_async_context(fleet.exits())
        return await fleet.launch(blank())

    async def main() -> None:
        stack = AsyncExitStack()
        vm = await asyncio.create_task(enter(stack))
        await asyncio.create_task(vm.pause())
        await asyncio.create_task(stack.aclose())
        assert vm.outcome == orc.Stopped("the fleet was closed")

    run(main)


def test_a_block_that_is_never_left_is_closed_with_its_loop(nothing_left, door):
    abandoned = []

    async def main() -> None:
        block = door.open()
        fleet = await block.__aenter__()
        abandoned.extend([block, await fleet.launch(blank())])

    run(main)
    assert abandoned[1].outcome == orc.Stopped("the fleet was closed")


def test_a_fleet_of_a_task_that_is_never_awaited_is_closed_with_its_loop(nothing_left, door):
    outcomes = []

    async def owner(opened: asyncio.Event) -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank())
            opened.set()
            try:
                await asyncio.Event().wait()
            finally:
                outcomes.append(await vm.stop("in the end"))  # the fleet is still there for it

    async def main() -> None:
        opened = asyncio.Event()
        main.task = asyncio.create_task(owner(opened))
        await opened.wait()

    run(main)
    assert outcomes == [orc.Stopped("in the end")]


def test_a_thread_that_runs_trio_for_somebody_else_is_refused_and_another_can_be_had():
    async def main() -> None:
        loop = asyncio.get_running_loop()
        done, stop = asyncio.Event(), trio.Event()
        trio.lowlevel.start_guest_run(
            stop.wait,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=lambda outcome: done.set(),
            host_uses_signal_set_wakeup_fd=True,
        )
        with pytest.raises(orc.StateError, match="thread=True"):
            async with Door(False).open():
                raise AssertionError("not reached")
        async with Door(True).open() as fleet:
            await fleet.launch(blank())
        stop.set()
        await done.wait()

    run(main)


def test_a_guest_run_that_can_not_start_leaves_the_loop_as_it_was(monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise trio.TrioInternalError("no")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(trio.lowlevel, "start_guest_run", refuse)
            with pytest.raises(trio.TrioInternalError):
                await LoopBridge.open()
        async with Door(False).open() as fleet:
            await fleet.launch(blank())

    run(main)


def test_a_thread_that_can_not_run_trio_says_why(monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise trio.TrioInternalError("no")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(trio, "run", refuse)
            with pytest.raises(trio.TrioInternalError, match="no"):
                async with Door(True).open():
                    raise AssertionError("not reached")

    run(main)


def test_tasks_that_still_subscribe_when_the_fleet_closes_see_the_end_of_their_exits(door):
    async def main() -> None:
        async with door.open([io_write(0x80, b"x")] * 3 + [hlt()]) as fleet:
            vm = await fleet.launch(blank(), paused=True)
            subscribed, ended = asyncio.Event(), asyncio.Event()

            async def subscriber() -> tuple[int, bool]:
                async with fleet.exits(orc.Io) as exits:
                    subscribed.set()
                    await ended.wait()
                    return len([exit async for exit in exits]), asyncio.current_task().cancelling() == 0

            task = asyncio.create_task(subscriber())
            await subscribed.wait()
            await vm.resume()
            await vm.wait()
        ended.set()
        assert await task == (3, True)

    run(main)


def test_context_of_the_caller_is_that_of_the_call(door):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    async def read() -> str:
        return variable.get()

    async def main() -> None:
        async with door.open() as fleet:
            variable.set("the caller's")
            assert await fleet._bridge.call(read) == "the caller's"

    run(main)


@pytest.fixture(scope="module")
def uvloop() -> ModuleType:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed: pip install uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))  # the first loop of a process opens descriptors that stay
    return uvloop


def test_uvloop_works_as_well(door, uvloop):
    async def main() -> None:
        async with door.open([hlt(after=0.001)]) as fleet:
            vm = await fleet.launch(blank())
            async with asyncio.timeout(LIMIT):
                assert await vm.wait() == orc.Halted()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# ---- what a fleet asks its owner


def test_an_eviction_asks_an_asyncio_function(door):
    asked = []

    async def move(vm: orc.aio.Vm, action: orc.Evict) -> None:
        await asyncio.sleep(0)
        asked.append((vm is fleets[0].vm("guest"), action.reason, asyncio.current_task() is not None))
        if action.reason == "no room":
            raise ConnectionError("no host has room")
        await vm.stop("it runs elsewhere now")

    fleets: list[orc.aio.Fleet] = []

    async def main() -> None:
        async with door.open(on_evict=move) as fleet:
            fleets.append(fleet)
            vm = await fleet.launch(blank())
            assert "no host has room" in (await fleet.apply(orc.Evict(vm="guest", reason="no room"))).error
            vm.report_work(5)
            assert (await fleet.apply(orc.Evict(vm="guest", reason="loud"))).outcome == "done"
            assert await vm.wait() == orc.Stopped("it runs elsewhere now")
            await fleet.set_policies([orc.StaticLimits(host=orc.Limit(rate=5))])

    run(main)
    assert asked == [(True, "no room", True), (True, "loud", True)]


def test_an_eviction_that_is_cancelled_is_cancelled_in_asyncio_too(door):
    told = []

    async def move(vm: orc.aio.Vm, action: orc.Evict) -> None:
        told.append("begun")
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    async def main() -> None:
        async with door.open(on_evict=move) as fleet:
            await fleet.launch(blank())
            with pytest.raises(asyncio.TimeoutError):
                async with asyncio.timeout(0.1):
                    await fleet.apply(orc.Evict(vm="guest"))

    run(main)
    assert told == ["begun", "cancelled"]
