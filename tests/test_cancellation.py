"""A fleet cancelled anywhere in its life leaves no thread, descriptor or mapping behind (design rule 11)."""

from __future__ import annotations

import pytest
import trio
import trio.lowlevel

import orchestra as orc

pytestmark = pytest.mark.kvm

SPIN = b"\xeb\xfe"
STORM = b"\xe6\x80\xeb\xfc"  # out 0x80, al / jmp
ASK = b"\xe4\x50\xf4"  # in al, 0x50 / hlt
HALT = b"\xf4"


def spec(name: str, code: bytes, **more: object) -> orc.VmSpec:
    return orc.VmSpec(name=name, boot=orc.FlatImage(code=code), **more)  # type: ignore[arg-type]


async def starting(fleet: orc.Fleet, started: trio.Event) -> None:
    async with trio.open_nursery() as nursery:
        for index in range(8):
            nursery.start_soon(fleet.launch, spec(f"vm{index}", STORM))
        started.set()


async def running(fleet: orc.Fleet, started: trio.Event) -> None:
    await fleet.launch(spec("vm", SPIN, vcpus=2))
    started.set()
    await trio.sleep_forever()


async def throttled(fleet: orc.Fleet, started: trio.Event) -> None:
    vm = await fleet.launch(spec("vm", STORM, exit_limit=orc.Limit(rate=0.01, burst=1, max_delay=None)))
    async with fleet.exits(orc.Io, vm=vm) as exits:
        vm_waits = False
        while not vm_waits:
            vm_waits = vm.throttled
            if not vm_waits:
                with trio.move_on_after(0.001):
                    await exits.receive()
    started.set()
    await trio.sleep_forever()


async def pausing(fleet: orc.Fleet, started: trio.Event) -> None:
    vm = await fleet.launch(spec("vm", STORM, vcpus=2))
    started.set()
    while True:
        await vm.pause()
        await vm.resume()


async def answering(fleet: orc.Fleet, started: trio.Event) -> None:
    vm = await fleet.launch(spec("vm", ASK), paused=True)
    async with vm.requests(ports=range(0x50, 0x51)) as requests:
        await vm.resume()
        async for _ in requests:  # and never answers
            started.set()


async def stopping(fleet: orc.Fleet, started: trio.Event) -> None:
    vms = [await fleet.launch(spec(f"vm{index}", STORM)) for index in range(4)]
    started.set()
    for vm in vms:
        await vm.stop()


async def restarting(fleet: orc.Fleet, started: trio.Event) -> None:
    crash = orc.VmSpec(
        name="vm",
        boot=orc.FlatImage(code=b"\xcd\x03", mode=32),
        restart=orc.Restart("on-failure", backoff=0.001, backoff_max=0.001),
    )
    vm = await fleet.launch(crash)
    while vm.restarts < 2 and vm.outcome is None:
        await trio.lowlevel.checkpoint()
    started.set()
    await trio.sleep_forever()


async def subscribed(fleet: orc.Fleet, started: trio.Event) -> None:
    await fleet.launch(spec("vm", STORM))
    async with fleet.exits() as exits:
        async for _ in exits:
            started.set()


LIVES = [starting, running, throttled, pausing, answering, stopping, restarting, subscribed]


@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
async def test_a_fleet_cancelled_in_the_middle_leaves_nothing(life, nothing_left):
    """Cancelled as soon as the moment has come, and then once at each later checkpoint."""
    for later in range(12):
        started = trio.Event()
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def live(started: trio.Event = started) -> None:
                    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
                        await life(fleet, started)

                nursery.start_soon(live)
                await started.wait()
                for _ in range(later):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        nothing_left()


@pytest.mark.parametrize("code", [SPIN, STORM], ids=["spinning", "exiting"])
async def test_a_vcpu_in_a_guest_loop_ends_within_100_ms(code, nothing_left):
    slowest = 0.0
    for _ in range(5):
        async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
            await fleet.launch(spec("vm", code))
            begun = trio.current_time()
        slowest = max(slowest, trio.current_time() - begun)
    assert slowest < 0.1, slowest


async def test_an_exception_in_the_block_comes_out_and_leaves_nothing(nothing_left):
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is what is tested
        async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
            await fleet.launch(spec("vm", SPIN))
            raise ZeroDivisionError
    nothing_left()


async def test_a_cancelled_launch_is_rolled_back_and_the_fleet_lives_on(nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        with trio.CancelScope() as scope:
            scope.cancel()
            await fleet.launch(spec("vm", SPIN))
        assert scope.cancelled_caught
        assert dict(fleet.vms) == {}
        again = await fleet.launch(spec("vm", HALT))
        assert await again.wait() == orc.Halted()


async def test_kicks_from_everywhere_lose_no_command():
    """Pause, resume, limits, inspection and subscriptions from many tasks at once; the VM obeys the last word."""
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(spec("vm", STORM, vcpus=2))
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:

                async def pause_and_resume() -> None:
                    for _ in range(100):
                        await vm.pause()
                        await vm.resume()

                async def change_limits() -> None:
                    for rate in [1000.0, 5.0, 1e6, 0.1] * 25:
                        await vm.set_limit(orc.Limit(rate=rate), meter="exits")
                    await vm.set_limit(None, meter="exits")

                async def inspect() -> None:
                    for index in range(100):
                        assert (await vm.inspect(index % 2)).rip in (0x1000, 0x1002)

                async def listen() -> None:
                    for _ in range(50):
                        async with fleet.exits(orc.Io, vm=vm):
                            await trio.lowlevel.checkpoint()

                for task in (pause_and_resume, pause_and_resume, change_limits, inspect, listen):
                    nursery.start_soon(task)
            await vm.resume()
            assert vm.state == "running"
            await vm.pause()
            assert vm.state == "paused"
            assert await vm.stop() == orc.Stopped("stop()")
