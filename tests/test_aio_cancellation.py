"""orchestra.aio: whatever is cancelled, timed out or interrupted, and whenever, unwinds on both sides."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trio

import aio_kit
import orchestra as orc
import orchestra.aio
from aio_kit import LIMIT, Door, idle, reached, run
from conftest import blank
from orchestra.aio.block import Block
from orchestra.backend.scripted import hlt, io_read, io_write

door, nothing_stays = aio_kit.door, aio_kit.nothing_stays  # fixtures

Waiting = Callable[[orc.aio.Fleet, orc.aio.Vm], Coroutine[Any, Any, object]]
STEPS = range(60)
"""After so many rounds of the loop a task is cancelled: before, in and behind whatever it does."""


async def rounds(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def waits_for_the_end(fleet: orc.aio.Fleet, vm: orc.aio.Vm) -> object:
    return await vm.wait()


async def waits_for_an_exit(fleet: orc.aio.Fleet, vm: orc.aio.Vm) -> object:
    async with fleet.exits() as exits:
        return await exits.receive()


async def iterates_over_exits(fleet: orc.aio.Fleet, vm: orc.aio.Vm) -> object:
    async with fleet.exits() as exits:
        return [exit async for exit in exits]


async def waits_for_a_request(fleet: orc.aio.Fleet, vm: orc.aio.Vm) -> object:
    async with vm.requests(ports=range(0x500, 0x501)) as requests:
        return [request async for request in requests]


async def follows_the_console(fleet: orc.aio.Fleet, vm: orc.aio.Vm) -> object:
    return [chunk async for chunk in vm.console.follow()]


async def opens_a_second_fleet(fleet: orc.aio.Fleet, vm: orc.aio.Vm) -> object:
    async with Door(False).open() as second:
        return await (await second.launch(blank())).wait()


WAITING = [
    waits_for_the_end,
    waits_for_an_exit,
    iterates_over_exits,
    waits_for_a_request,
    follows_the_console,
    opens_a_second_fleet,
]


@pytest.mark.parametrize("waiting", WAITING)
def test_a_task_that_waits_is_cancelled_and_nothing_of_it_stays(door, waiting: Waiting):
    async def main() -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank())
            task = asyncio.create_task(waiting(fleet, vm))
            await reached(fleet)
            assert not task.done()
            task.cancel("enough")
            with pytest.raises(asyncio.CancelledError, match="enough"):
                await task
            assert await idle(fleet)
            assert await vm.stop() == orc.Stopped("stop()")

    run(main)


@pytest.mark.parametrize("waiting", WAITING)
def test_a_timeout_ends_what_waits(door, waiting: Waiting):
    async def main() -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await waiting(fleet, vm)
            assert asyncio.current_task().cancelling() == 0
            assert await idle(fleet)

    run(main)


@pytest.mark.parametrize("waiting", WAITING)
def test_a_task_is_cancelled_at_any_moment(door, waiting: Waiting):
    async def main() -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank())
            for steps in STEPS:
                task = asyncio.create_task(waiting(fleet, vm))
                await rounds(steps)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await idle(fleet)

    run(main)


def test_a_launch_that_is_cancelled_gives_its_vm_back_whenever_that_is(nothing_left, door):
    """Or else it returns it: never is there a VM that nobody got."""

    async def main() -> None:
        kept = given_back = 0
        async with door.open() as fleet:
            for steps in range(60):
                launch = asyncio.create_task(fleet.launch(blank()))
                await rounds(steps)
                launch.cancel()
                try:
                    vm = await launch
                except asyncio.CancelledError:
                    given_back += 1
                    assert dict(fleet.vms) == {}
                else:
                    kept += 1
                    assert dict(fleet.vms) == {"guest": vm}
                    await vm.stop()
            assert given_back
            assert kept or door.thread  # there the loop may go round as often as it likes before the thread is done

    run(main)


def test_no_exit_is_lost_when_receiving_is_cancelled_again_and_again(door):
    many = 2000

    async def main() -> None:
        async with door.open([io_write(0x80, b"x")] * many + [hlt()]) as fleet:
            vm = await fleet.launch(blank(), paused=True)
            received, cancelled, rest = 0, 0, 0
            async with fleet.exits(orc.Io, vm=vm) as exits:
                await vm.resume()
                while True:
                    task = asyncio.create_task(exits.receive())
                    rest = (rest + 7) % 31
                    await rounds(rest)
                    task.cancel()
                    try:
                        await task
                        received += 1
                    except asyncio.CancelledError:
                        cancelled += 1
                    except trio.EndOfChannel:
                        break
            assert (received, exits.missed) == (many, 0)
            assert cancelled

    run(main)


def test_no_request_is_lost_when_iterating_is_cancelled_again_and_again(door):
    many = 200

    async def main() -> None:
        async with door.open([io_read(0x500)] * many) as fleet:
            vm = await fleet.launch(blank(), paused=True)
            answered, cancelled, rest = 0, 0, 0
            async with vm.requests(ports=range(0x500, 0x501)) as requests:
                await vm.resume()
                while True:
                    task = asyncio.create_task(anext(requests))
                    rest = (rest + 7) % 31
                    await rounds(rest)
                    task.cancel()
                    try:
                        (await task).answer(b"\x01")
                        answered += 1
                    except asyncio.CancelledError:
                        cancelled += 1
                    except StopAsyncIteration:
                        break
            assert answered == many
            assert cancelled
            assert fleet.backend.machines["guest"].engines[0].answers == [(0x500, b"\x01")] * many

    run(main)


def test_a_request_that_was_returned_to_the_bus_meanwhile_is_not_handed_out(door):
    async def main() -> None:
        async with door.open([io_read(0x500), hlt()]) as fleet:
            vm = await fleet.launch(blank(), paused=True)
            async with vm.requests(ports=range(0x500, 0x501)) as requests:
                await vm.resume()
                request = await anext(requests)
                requests._crossed.append(request._inner)  # as if the task had been cancelled just then
            assert request.returned
            with pytest.raises(StopAsyncIteration):
                await anext(requests)
            assert await vm.wait() == orc.Halted()

    run(main)


def test_a_call_that_fails_just_when_it_is_cancelled_does_not_eat_the_cancellation(door):
    """Else a task that handles the error would go on, and whoever waits for it would wait for ever."""

    async def tries(fleet: orc.aio.Fleet) -> None:
        while True:
            try:
                await fleet.launch(blank())
            except orc.VmExists:
                pass

    async def main() -> None:
        async with door.open() as fleet:
            await fleet.launch(blank())
            for steps in range(60):
                task = asyncio.create_task(tries(fleet))
                await rounds(steps)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    run(main)


# ---- the join


async def sleeps(fleet: orc.aio.Fleet, vm: orc.aio.Vm) -> object:
    return await asyncio.Event().wait()


@pytest.mark.parametrize("waiting", [sleeps, *WAITING])
def test_a_block_that_is_cancelled_all_the_time_while_it_closes_still_closes(nothing_left, door, waiting: Waiting):
    vms = []

    async def owner(opened: asyncio.Event) -> None:
        async with door.open() as fleet:
            vms.append(await fleet.launch(blank()))
            opened.set()
            await waiting(fleet, vms[0])

    async def main() -> None:
        opened = asyncio.Event()
        task = asyncio.create_task(owner(opened))
        await opened.wait()
        cancellations = 0
        while not task.done():
            cancellations += task.cancel("again")
            await asyncio.sleep(0)
        assert task.cancelled()
        assert cancellations > 2
        assert vms[0].outcome == orc.Stopped("the fleet was closed")
        if not door.thread:
            assert not trio.lowlevel.in_trio_run()

    run(main)


def test_opening_is_cancelled_at_any_moment(nothing_left, door):
    async def main() -> None:
        for steps in range(40):
            task = asyncio.create_task(door.open().__aenter__())
            await rounds(steps)
            task.cancel()
            try:
                fleet = await task
            except asyncio.CancelledError:
                continue
            assert fleet.statistics().vms == 0
            break
        else:
            assert door.thread
        await rounds(1)

    run(main)


def test_a_block_cancelled_while_it_closes_by_itself_closes_and_is_cancelled(door):
    async def owner(closing: asyncio.Event) -> None:
        async with door.open() as fleet:
            await fleet.launch(blank())
            closing.set()

    async def main() -> None:
        closing = asyncio.Event()
        task = asyncio.create_task(owner(closing))
        await closing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)


def test_an_error_of_the_block_gives_way_to_a_cancellation_while_it_closes(door):
    async def owner(closing: asyncio.Event) -> None:
        async with door.open():
            closing.set()
            raise ZeroDivisionError

    async def main() -> None:
        closing = asyncio.Event()
        task = asyncio.create_task(owner(closing))
        await closing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert isinstance(caught.value.__context__, ZeroDivisionError)

    run(main)


@pytest.mark.kvm
def test_a_fleet_of_real_guests_is_cancelled_at_any_moment(nothing_left, door):
    spec = orc.VmSpec(name="vm", boot=orc.FlatImage(code=b"\xe6\x80\xeb\xfc"), vcpus=2)  # out 0x80, al / jmp

    async def owner() -> None:
        async with door.open(backend="kvm", bus_locks="off") as fleet, fleet.exits() as exits:
            vm = await fleet.launch(spec)
            await exits.receive()
            while True:
                await vm.pause()
                await vm.inspect()
                await vm.resume()

    async def main() -> None:
        for steps in (*range(0, 100, 9), 300, 1000):
            task = asyncio.create_task(owner())
            await rounds(steps)
            task.cancel()
            await rounds(steps % 7)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            nothing_left()

    run(main)


def test_a_timeout_around_the_block_is_a_timeout(door):
    async def main() -> None:
        with pytest.raises(TimeoutError):  # noqa: PT012 - the block is what is tested
            async with asyncio.timeout(0.01):
                async with door.open() as fleet:
                    await (await fleet.launch(blank())).wait()
        assert asyncio.current_task().cancelling() == 0

    run(main)


def test_a_task_group_around_fleets_is_cancelled_by_the_error_of_one(door):
    vms = []

    async def quiet(opened: asyncio.Event) -> None:
        async with door.open() as fleet:
            vms.append(await fleet.launch(blank()))
            opened.set()
            await vms[0].wait()

    async def loud(opened: asyncio.Event) -> None:
        async with door.open():
            await opened.wait()
            raise ZeroDivisionError

    async def main() -> None:
        opened = asyncio.Event()
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the block is what is tested
            async with asyncio.TaskGroup() as group:
                group.create_task(quiet(opened))
                group.create_task(loud(opened))
        assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]
        assert vms[0].outcome == orc.Stopped("the fleet was closed")

    run(main)


def test_a_call_whose_coroutine_is_thrown_away_is_taken_back(door):
    async def main() -> None:
        async with door.open() as fleet:
            vm = await fleet.launch(blank())
            call = vm.wait()
            call.send(None)
            await reached(fleet)
            call.close()
            assert await idle(fleet)

    run(main)


def test_an_error_while_unwinding_is_the_cause_of_the_cancellation(door):
    async def stubborn() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError

    async def main() -> None:
        async with door.open() as fleet:
            task = asyncio.create_task(fleet._bridge.call(stubborn))
            await reached(fleet)
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert isinstance(caught.value.__cause__, ZeroDivisionError)

    run(main)


def test_an_error_while_opening_is_the_cause_of_the_cancellation(door):
    class Stubborn:
        async def __aenter__(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError

        async def __aexit__(self, *_: object) -> None:
            raise AssertionError("not reached")

    async def main() -> None:
        async with door.open() as fleet:
            block: Block[None, None] = Block(fleet._bridge, Stubborn, lambda inner: inner)
            task = asyncio.create_task(block.__aenter__())
            await reached(fleet)
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert isinstance(caught.value.__cause__, ZeroDivisionError)

    run(main)


# ---- Ctrl-C


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("when", ["in the block", "twice in the block", "while it closes", "twice while it closes"])
def test_the_block_is_joined_however_often_it_is_interrupted(nothing_left, door, when: str):
    vms = []
    times = 2 if "twice" in when else 1

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with door.open() as fleet:
            vms.append(await fleet.launch(blank()))
            for _ in range(times):
                loop.call_soon(interrupt)
            if "in the block" in when:
                await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())  # not run(): its task would be another than the one that Ctrl-C cancels
    assert vms[0].outcome == orc.Stopped("the fleet was closed")


def test_a_keyboard_interrupt_raised_in_the_block_joins_it(nothing_left, door):
    vms = []

    async def main() -> None:
        async with door.open() as fleet:
            vms.append(await fleet.launch(blank()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert vms[0].outcome == orc.Stopped("the fleet was closed")


def test_an_interrupt_never_comes_in_the_middle_of_trio(nothing_left):
    """asyncio's handler raises at the second: there, it would lose a tick, and trio would stand still."""

    class Impatient:
        name, interval = "impatient", 0.001
        survived, armed = 0, False

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            if self.armed and self.survived < 2:
                interrupt()
                self.survived += 1
            return []

    impatient = Impatient()

    async def main() -> None:
        async with Door(False).open(policies=[impatient]) as fleet:
            await fleet.launch(blank())
            impatient.armed = True
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert impatient.survived == 2


def test_a_loop_that_is_stuck_can_be_interrupted_all_the_same():
    async def main() -> None:
        async with Door(False).open():
            for _ in range(3):  # the loop does not get to pass on the first
                interrupt()
            raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


SCRIPT = """
import asyncio, signal, sys
import orchestra as orc, orchestra.aio

async def main():
    async with orc.aio.open_fleet(bus_locks="off", thread=sys.argv[1] == "True") as fleet:
        spec = orc.VmSpec(name="vm", boot=orc.FlatImage(code=bytes.fromhex("ebfe")), vcpus=2)
        vm = await fleet.launch(spec)
        print("up", flush=True)
        try:
            await vm.wait()
        finally:
            print(vm.state, flush=True)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that comes as the interpreter ends would end it otherwise
    print("interrupted")
"""


@pytest.mark.kvm
@pytest.mark.parametrize("times", [1, 5])
def test_a_program_ends_when_it_is_interrupted(door, times: int):
    command = [sys.executable, "-c", SCRIPT, str(door.thread)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            # Stopped meanwhile: otherwise it depends on who has the CPU how many of them are one to the kernel. A third
            # in the middle of what the second does would abandon trio, as asyncio.run then raises from anywhere.
            process.send_signal(signal.SIGSTOP)
            for _ in range(times):
                process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()  # one that did not hear would be waited for at the end of the block, for ever
    assert err == ""
    assert out.splitlines()[-1] == "interrupted"
    assert process.returncode == 0


ELSEWHERE = """
import asyncio, os, signal, threading
import orchestra as orc
from orchestra.aio import open_fleet

async def main():
    async with open_fleet(backend=orc.ScriptedBackend({})):
        # The main thread takes no SIGINT any more, so another one gets it, as it may in any program.
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        await asyncio.sleep(LIMIT)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", signal.set_wakeup_fd(-1))
"""


def test_a_signal_that_another_thread_gets_interrupts_the_program_as_well():
    script = ELSEWHERE.replace("LIMIT", str(LIMIT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert (done.stdout, done.stderr) == ("interrupted -1\n", "")


def test_a_program_that_handles_signals_by_its_loop_goes_on_doing_so():
    script = """
import asyncio, os, signal
import orchestra as orc
from orchestra.aio import open_fleet

async def main():
    loop, got = asyncio.get_running_loop(), asyncio.Event()
    async with open_fleet(backend=orc.ScriptedBackend({})):
        loop.add_signal_handler(signal.SIGUSR1, got.set)
    os.kill(os.getpid(), signal.SIGUSR1)
    await asyncio.wait_for(got.wait(), LIMIT)
    print("handled")

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script.replace("LIMIT", str(LIMIT))], capture_output=True, text=True, timeout=2 * LIMIT
    )
    assert (done.stdout, done.stderr) == ("handled\n", "")


def test_a_host_whose_descriptor_for_signals_is_full_gets_no_warning_of_it():
    script = """
import asyncio, os, signal
import orchestra as orc
from orchestra.aio import open_fleet

reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
try:
    while True:
        os.write(writer, bytes(4096))
except BlockingIOError:
    pass
signal.signal(signal.SIGUSR1, lambda *_: None)

async def main():
    async with open_fleet(backend=orc.ScriptedBackend({})):
        pass

signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # as uvloop has it
asyncio.run(main())
signal.raise_signal(signal.SIGUSR1)
assert signal.set_wakeup_fd(-1) == writer
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=2 * LIMIT)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_host_without_descriptors_keeps_its_handler_of_ctrl_c(monkeypatch):
    def none_left(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        before = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(os, "pipe2", none_left)
        with pytest.raises(OSError, match="Too many open files"):
            async with orchestra.aio.open_fleet(backend=orc.ScriptedBackend({})):
                pytest.fail("opened")
        assert signal.getsignal(signal.SIGINT) == before

    asyncio.run(main())
