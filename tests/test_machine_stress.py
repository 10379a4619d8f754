"""Commands at every step of a VM's life, at once and cancelled: all are obeyed, and nothing is left."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio

import orchestra as orc
from conftest import Stage
from orchestra.machine.lifecycle import TRANSITIONS, Event, Lifecycle, Phase


class Breaks:
    """Answers, but for so many accesses at first, which end their runs."""

    def __init__(self, times: float) -> None:
        self.times = times

    def read(self, offset: int, size: int) -> int:
        if self.times > 0:
            self.times -= 1
            raise ValueError("so that it is restarted")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


BUILDING = 6
"""Steps of the kvm backend that are before the end of the launch."""
PORTS = range(0x500, 0x504)
OFTEN = orc.Restart("on-failure", backoff=0.001, backoff_max=0.001)


async def pause(vm: orc.Vm) -> None:
    await vm.pause(quiesce=False)


async def cancelled_pause(vm: orc.Vm) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await vm.pause()


async def cancelled_stop(vm: orc.Vm) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await vm.stop()


async def cancelled_reset(vm: orc.Vm) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await vm.reset()


async def resume(vm: orc.Vm) -> None:
    await vm.resume()


async def reset(vm: orc.Vm) -> None:
    await vm.reset()


async def stop(vm: orc.Vm) -> None:
    await vm.stop()


async def inspect(vm: orc.Vm) -> None:
    """A kick that wants something of a vCPU's thread."""
    await vm.inspect()


async def limit(vm: orc.Vm) -> None:
    await vm.set_limit(orc.Limit(rate=1e6), meter="exits")


Command = Callable[[orc.Vm], Awaitable[None]]
COMMANDS: list[Command] = [pause, resume, reset, stop, inspect, limit, cancelled_pause, cancelled_reset, cancelled_stop]
STOPS = {stop, cancelled_stop}
PAUSES = {pause, cancelled_pause}


def name_of(command: object) -> str:
    return getattr(command, "__name__", str(command))


async def tell(vm: orc.Vm, command: Command) -> bool:
    """Whether it could be told: a VM that has ended, or ends meanwhile, says so."""
    with suppress(orc.StateError):
        await command(vm)
        return True
    return False


@pytest.fixture
async def soon():
    """Nothing here may take long in real time."""
    with trio.fail_after(60):
        yield


@pytest.fixture
def ways(monkeypatch) -> set[tuple[Phase, Event]]:
    """What happened to runs, and where."""
    seen: set[tuple[Phase, Event]] = set()
    real = Lifecycle._happen

    def happen(self: Lifecycle, event: Event) -> Phase:
        seen.add((self.phase, event))
        return real(self, event)

    monkeypatch.setattr(Lifecycle, "_happen", happen)
    return seen


# ---- one command, at each step


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
@pytest.mark.parametrize("backend", ["scripted", pytest.param("kvm", marks=pytest.mark.kvm)])
async def test_a_command_at_any_step_of_a_life_is_obeyed(backend, command, nothing_left, soon):
    """From set-up over two restarts to the end: told at the first checkpoint, at the second, and so on."""
    stage = Stage(backend)
    spec = stage.spec("ports", restart=OFTEN, exit_limit=orc.Limit(rate=5000, burst=1))
    steps = 24
    told = 0
    for step in range(steps):
        async with stage.open() as fleet, trio.open_nursery() as nursery:
            devices = [(PORTS, None, Breaks(2))]
            launched: list[orc.Vm] = []

            async def launch(fleet: orc.Fleet = fleet, devices: list = devices, launched: list = launched) -> None:
                launched.append(await fleet.launch(spec, devices=devices))

            nursery.start_soon(launch)
            if backend == "kvm" and step >= BUILDING:  # its set-up takes a worker thread hundreds of checkpoints
                while not launched:
                    await trio.lowlevel.checkpoint()
                step = 15 * (step - BUILDING)
            for _ in range(step):
                await trio.lowlevel.checkpoint()
            while "guest" not in fleet.vms:
                await trio.lowlevel.checkpoint()
            vm = fleet.vms["guest"]
            if await tell(vm, command):
                told += 1
                if command in PAUSES and vm.outcome is None:
                    for _ in range(20):
                        state = vm.state
                        assert state == "paused" or (state == "running" and command is cancelled_pause), state
                        await trio.lowlevel.checkpoint()
                    await vm.pause()
                    assert (vm.state, vm.quiesced) == ("paused", True)
                    await vm.resume()
            while not launched:
                await trio.lowlevel.checkpoint()
            outcome = await vm.wait()
            if command in STOPS:
                ended = outcome in (orc.Stopped("stop()"), orc.Halted())
                assert ended or isinstance(outcome, orc.Failed)  # a stop that meets a failure makes it the last
            else:
                assert outcome == orc.Halted()
        nothing_left()
    assert told >= 5  # not all of them come after its end


@pytest.mark.parametrize("backend", ["scripted", pytest.param("kvm", marks=pytest.mark.kvm)])
async def test_a_launch_that_is_cancelled_at_any_step_is_undone(backend, nothing_left, soon):
    stage = Stage(backend)
    for paused, step in itertools.product((False, True), range(25)):
        async with stage.open() as fleet:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def launch(fleet: orc.Fleet = fleet, paused: bool = paused) -> None:
                        await fleet.launch(stage.spec("spin", vcpus=stage.vcpus), paused=paused)

                    nursery.start_soon(launch)
                    for _ in range(step):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            again = await fleet.launch(stage.spec("halt", "again"))
            assert await again.wait() == orc.Halted()
        nothing_left()


# ---- two at once, in each condition


@asynccontextmanager
async def in_condition(stage: Stage, condition: str) -> AsyncIterator[orc.Vm]:
    vcpus = 2 if stage.backend == "kvm" else 1
    async with stage.open() as fleet:
        match condition:
            case "running":
                yield await fleet.launch(stage.spec("storm", vcpus=vcpus))
            case "paused":
                yield await fleet.launch(stage.spec("storm", vcpus=vcpus), paused=True)
            case "throttled":
                slow = orc.Limit(rate=0.01, burst=1, max_delay=None)
                vm = await fleet.launch(stage.spec("storm", vcpus=vcpus, exit_limit=slow))
                while not vm.throttled:  # noqa: ASYNC110  # nothing tells: the wait is in C
                    await trio.sleep(0.001)
                yield vm
            case "asking":
                vm = await fleet.launch(stage.spec("ask_twice", vcpus=vcpus), paused=True)
                async with vm.requests(ports=range(0x500, 0x508)) as requests:
                    await vm.resume()
                    await anext(requests)  # and nobody answers
                    yield vm
            case "back-off":
                never = orc.Restart("on-failure", backoff=1000, backoff_max=1000)
                vm = await fleet.launch(stage.spec("ports", restart=never), devices=[(PORTS, None, Breaks(1e9))])
                while vm.state != "waiting":  # noqa: ASYNC110  # the guest tells nobody
                    await trio.sleep(0.001)
                yield vm


@pytest.mark.parametrize("condition", ["running", "paused", "throttled", "asking", "back-off"])
@pytest.mark.parametrize("backend", ["scripted", pytest.param("kvm", marks=pytest.mark.kvm)])
async def test_of_two_commands_at_once_both_return_and_the_vm_obeys_the_next(
    backend, condition, nothing_left, soon, ways
):
    stage = Stage(backend)
    # One that is stopped in its back-off ended as the run before.
    ends = (orc.Failed, orc.Stopped) if condition == "back-off" else (orc.Stopped,)
    # Trio runs tasks that are ready together in random order, so that each pair covers both orders.
    for pair in itertools.combinations_with_replacement(COMMANDS, 2):
        async with in_condition(stage, condition) as vm:
            async with trio.open_nursery() as nursery:
                for command in pair:
                    nursery.start_soon(tell, vm, command)
            if STOPS & set(pair):
                assert type(await vm.wait()) in ends, pair
                await vm.stop()
                with pytest.raises(orc.StateError):
                    await vm.resume()
            else:
                assert vm.outcome is None, pair
                await pause(vm)
                assert vm.state == "paused", pair
                await vm.resume()
                assert vm.state in ("running", "waiting"), pair
                assert type(await vm.stop()) in ends, pair
        nothing_left()
    assert ways <= {(phase, event) for phase, events in TRANSITIONS.items() for event in events}
    if condition != "back-off":
        assert (Phase.STOPPING, Event.GONE) in ways


# ---- a storm of them


@pytest.mark.kvm
@pytest.mark.parametrize("seed", range(6))
async def test_a_storm_of_commands_loses_none_and_leaves_nothing(seed, nothing_left, soon):
    """Six tasks give 40 random commands each, cancelled at random; then the VM obeys one after the other."""
    chance = random.Random(seed)
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("storm", vcpus=2, restart=OFTEN))
        resets = iter(range(4))  # more of them in a row would wait for their turn, a second each
        words: list[Command] = [pause, resume, inspect, limit, cancelled_pause, vm_logs, vm_caps, reads]

        async def tells(chance: random.Random) -> None:
            for _ in range(40):
                command = chance.choice(words)
                if chance.random() < 0.02 and next(resets, None) is not None:
                    command = reset
                with trio.CancelScope() as scope:
                    if chance.random() < 0.2:
                        scope.deadline = trio.current_time() + chance.random() * 0.002
                    await tell(vm, command)

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(tells, random.Random(chance.random()))
        assert vm.outcome is None
        await vm.resume()
        await vm.pause()
        assert (vm.state, vm.quiesced, vm.statistics().pending) == ("paused", True, ())
        before = vm.statistics().exits
        assert vm.registers(1).rip == vm.registers(1).rip
        assert vm.statistics().exits == before  # nothing runs
        await vm.set_limit(None, meter="exits")
        vm.cap_cpu(None)
        await vm.resume()
        async with fleet.exits(orc.Io, vm=vm) as exits:
            await exits.receive()  # it runs
        assert await vm.stop() == orc.Stopped("stop()")
    nothing_left()


async def vm_logs(vm: orc.Vm) -> None:
    await vm.log_dirty(vm.desired.log_dirty is not True)


async def vm_caps(vm: orc.Vm) -> None:
    vm.cap_cpu(0.5 if vm.desired.cap is None else None)
    await trio.lowlevel.checkpoint()


async def reads(vm: orc.Vm) -> None:
    vm.statistics()
    assert vm.desired.paused or vm.state != "paused"
    await trio.lowlevel.checkpoint()
