"""What a guest is asked to keep to of its memory: who asks, when it is asked, and what is said of it."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import attrs
import pytest
import trio

import orchestra as orc
from conftest import blank, play
from orchestra.backend.scripted import ScriptedExit, hlt, io_read
from orchestra.machine.desired import AskedMemory, Desired, check_memory
from orchestra.machine.devices.balloon import BalloonDevice, BalloonFigures
from orchestra.machine.devices.virtio import VirtioState
from orchestra.model import codec
from orchestra.native import ffi, lib
from orchestra.testing import DeviceRig
from orchestra.testing.device import answer

MiB = orc.MiB
FOR_EVER = hlt(after=1e9)
FAIL = ScriptedExit("debug", args=(1, 0, 0, 0))
DEVICE = 0x2000


# ---- the spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"free_page_reporting": 1}, "free_page_reporting=1: must be True or False"),
        ({"deflate_on_oom": None}, "deflate_on_oom=None: must be True or False"),
        ({"must_tell_host": "no"}, "must_tell_host='no': must be True or False"),
        ({"statistics_interval": 0}, "statistics_interval=0: must be from 0.1"),
        ({"statistics_interval": "1"}, "statistics_interval='1': must be a number"),
        ({"floor": 0}, "floor=0: must be"),
        ({"floor": 4097}, "floor=4097: must be a multiple"),
    ],
)
def test_a_balloon_that_can_not_be_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(orc.SpecError, match=message):
        orc.Balloon(**fields)


def pci(*devices: orc.DeviceSpec, memory: int | orc.Memory = 256 * MiB) -> orc.VmSpec:
    return blank(irqchip="full", memory=memory, devices=(orc.PciHostBridge(), *devices))


def test_a_vm_has_one_balloon_and_none_over_the_hosts_huge_pages():
    with pytest.raises(orc.SpecError, match="Balloon and Balloon: a VM has one balloon"):
        pci(orc.Balloon(), orc.Balloon())
    with pytest.raises(orc.SpecError, match="huge_pages=True the pages of the host's pool stay"):
        pci(orc.Balloon(), memory=orc.Memory(256 * MiB, huge_pages=True))
    assert pci(orc.Balloon(floor=32 * MiB)).memory_floor == 32 * MiB
    assert pci(orc.Rng()).memory_floor is None


def test_a_specs_balloon_is_data():
    spec = pci(orc.Balloon(statistics_interval=None, floor=32 * MiB))
    assert codec.decode(orc.VmSpec, json.loads(json.dumps(codec.encode(spec)))) == spec


# ---- the device


def target(rig: DeviceRig) -> int:
    return rig.read(DEVICE)


def test_what_the_guest_shall_do_without_is_in_its_configuration_in_pages():
    with DeviceRig(orc.Balloon()) as rig:
        device = rig.device
        assert isinstance(device, BalloonDevice)
        assert target(rig) == 0
        device.take(100 * MiB)
        assert target(rig) == 100 * MiB // 4096
        device.take(1 << 62)
        assert target(rig) == 0xFFFFFFFF
        assert device.figures() == BalloonFigures(False, 0, 0, 0, 0, 0, 0, 0, 0, {})


def test_a_balloon_goes_on_from_its_state():
    with DeviceRig(orc.Balloon()) as rig:
        assert isinstance(rig.device, BalloonDevice)
        rig.device.take(8 * MiB)
        rig.write(DEVICE + 4, 1000)
        with rig.again() as other:
            assert other.device.state() == rig.device.state()
            assert other.read(DEVICE, 8) == 1000 << 32 | 2048
        rig.device.reset()
        assert rig.read(DEVICE, 8) == 2048
        for wrong in (b"", bytes(129)):
            with pytest.raises(orc.SpecError, match="Balloon: "):
                rig.device.restore(attrs.evolve(rig.device.state(), queue=(), config=wrong))


@pytest.mark.parametrize("backing", ["anonymous", "shared", "file"])
def test_features_are_as_the_spec_and_the_memory_say(backing):
    def offered(spec: orc.Balloon) -> set[int]:
        with DeviceRig(spec) as rig:
            rig.device.hooks = attrs.evolve(rig.device.hooks, backing=backing)
            handle = BalloonDevice._make(rig.device)  # type: ignore[arg-type]
            native = lib.orc_virtio_device(handle)
            answer(native, 0, bytes(4))
            low = int.from_bytes(_read(native, 4, 4), "little")
            lib.orc_device_free(native)
            return {bit for bit in range(24) if low >> bit & 1}

    poison = set() if backing == "file" else {4}  # what is given back comes back as the file has it, and not as zeros
    assert offered(orc.Balloon()) == {1, 2, 5} | poison
    assert offered(orc.Balloon(free_page_reporting=False, deflate_on_oom=False, must_tell_host=True)) == {0, 1}


def _read(native: Any, offset: int, size: int) -> bytes:
    data = bytearray(size)
    assert lib.orc_device_answer(native, offset, size, 1, False, ffi.from_buffer(data))
    return bytes(data)


# ---- who asks, and when it is asked


@attrs.frozen
class Taker(orc.DeviceSpec):
    """A device that takes memory and has no queues, for a backend without a PCI bus."""

    implementation: ClassVar[str] = "test_machine_memory:TakerDevice"
    asked: ClassVar[list[int]] = []

    @property
    def memory_floor(self) -> int:
        return 1 * MiB

    def wiring(self) -> orc.Wiring:
        return orc.Wiring(ports=range(0x700, 0x701))


class TakerDevice(orc.Peripheral[Taker, VirtioState]):
    State = VirtioState
    pages = 0

    def take(self, size: int) -> None:
        self.pages = size // 4096
        Taker.asked.append(size // MiB)

    def figures(self) -> BalloonFigures:
        return BalloonFigures(True, self.pages, 0, 0, 5, 7, 9, 1, 0, {5: 4096, 4: 1024})

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None: ...
    def reset(self) -> None: ...
    def state(self) -> VirtioState:
        return VirtioState()

    def restore(self, state: VirtioState) -> None: ...


@pytest.fixture
def asked() -> list[int]:
    """What the guest was asked to do without, in MiB, each time that it was asked."""
    Taker.asked.clear()
    return Taker.asked


def spec(**more: Any) -> orc.VmSpec:
    return blank(memory=16 * MiB, devices=(Taker(),), **more)


async def test_the_smallest_request_counts_and_each_asker_takes_its_own_back(autojump_clock, asked):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(spec())
        assert asked == [0]
        await vm.set_memory(8 * MiB)
        assert (await fleet.apply(orc.SetMemory(vm="guest", memory=4 * MiB), policy="p")).outcome == "done"
        assert (await fleet.apply(orc.SetMemory(vm="guest", memory=12 * MiB), policy="q")).outcome == "done"
        assert vm.desired.memory == (AskedMemory(None, 8 * MiB), AskedMemory("p", 4 * MiB), AskedMemory("q", 12 * MiB))
        assert vm.statistics().memory.target == 4 * MiB
        await fleet.apply(orc.SetMemory(vm="guest", memory=None), policy="p")
        await vm.set_memory(None)
        assert vm.statistics().memory.target == 12 * MiB
        await fleet.apply(orc.SetMemory(vm="guest", memory=None), policy="q")
        assert asked == [0, 8, 12, 12, 8, 4, 0]
        assert vm.desired.memory == ()
        done = [(applied.action.memory, applied.policy, applied.action.reason) for applied in fleet.actions()]
        assert done[0] == (8 * MiB, None, "set_memory()")
        assert done[-1] == (None, "q", "")


async def test_what_can_not_be_asked_for_says_why(autojump_clock, asked):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(spec())
        for memory, message in (
            (32 * MiB, f"memory={32 * MiB}: vm 'guest' has {16 * MiB} bytes: it can't have more than its spec says"),
            (MiB // 2, f"memory={MiB // 2}: must be at least {MiB} bytes, the floor of the VM's balloon"),
            (8 * MiB + 1, "must be a multiple of 4096 bytes"),
            (0, "memory=0: must be"),
            ("8M", "memory='8M': must be"),
        ):
            with pytest.raises(orc.SpecError, match=message):
                await vm.set_memory(memory)
        assert (await fleet.apply(orc.SetMemory(vm="guest", memory=32 * MiB))).outcome == "failed"
        assert asked == [0]
        assert vm.desired.memory == ()
        other = await fleet.launch(blank(name="other"))
        assert other.statistics().memory is None
        with pytest.raises(orc.SpecError, match=r"vm 'other' has no balloon: add orc\.Balloon\(\) to its devices"):
            await other.set_memory(MiB)
        await other.set_memory(None)
        await vm.stop()
        with pytest.raises(orc.StateError, match="can't set the memory of vm 'guest': it is stopped"):
            await vm.set_memory(8 * MiB)
        assert (await fleet.apply(orc.SetMemory(vm="guest", memory=None), policy="p")).outcome == "done"


def test_a_floor_above_the_memory_lets_the_memory_be_asked_for():
    small = blank(memory=16 * MiB, devices=(orc.PciHostBridge(), orc.Balloon()), irqchip="full")
    check_memory(small, 16 * MiB)
    with pytest.raises(orc.SpecError, match=f"at least {16 * MiB} bytes"):
        check_memory(small, 8 * MiB)


async def test_a_paused_guest_is_asked_when_it_goes_on(autojump_clock, asked):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(spec(), paused=True)
        assert asked == []
        await vm.set_memory(8 * MiB)
        await vm.set_memory(4 * MiB)
        assert asked == []
        await vm.resume()
        assert asked == [12]
        await vm.pause()
        await vm.resume()
        assert asked == [12]
        await vm.pause()
        await vm.set_memory(None)
        await vm.resume()
        assert asked == [12, 0]


@pytest.mark.parametrize("again", ["restart", "reset"])
async def test_each_run_is_asked_as_the_one_before(autojump_clock, asked, again):
    lives = iter([[attrs.evolve(FAIL, after=5)], [FOR_EVER]])
    async with orc.open_fleet(backend=orc.ScriptedBackend(lambda spec, vcpu: next(lives))) as fleet:
        vm = await fleet.launch(spec(restart=orc.Restart("on-failure", backoff=1)))
        await vm.set_memory(8 * MiB)
        if again == "reset":
            await vm.reset()
            assert asked == [0, 8, 8]
        else:
            await trio.sleep(5.5)
            assert vm.state == "waiting"
            await vm.set_memory(4 * MiB)  # while there is nobody to ask
            assert asked == [0, 8]
            await trio.sleep(5)
            assert asked == [0, 8, 12]


async def test_a_vm_that_arrives_is_asked_as_it_was_where_it_left(autojump_clock, asked):
    wanted = Desired(memory=[AskedMemory("p", 4 * MiB), AskedMemory(None, 8 * MiB)])
    assert codec.from_document(Desired, json.loads(json.dumps(codec.to_document(wanted)))) == wanted
    async with play([FOR_EVER]) as fleet:
        vm = (await fleet._context.supervisor.admit(spec(), wanted)).handle
        assert asked == [12]
        assert vm.desired == wanted
        done = [(applied.action.memory, applied.policy) for applied in fleet.actions()]
        assert done == [(4 * MiB, "p"), (8 * MiB, None)]
        await vm.stop()
        for wrong in (32 * MiB, 4096):
            with pytest.raises(orc.SpecError, match=f"memory={wrong}"):
                await fleet._context.supervisor.admit(spec(), Desired(memory=[AskedMemory(None, wrong)]))
    with pytest.raises(orc.SpecError, match="'p' is there twice"):
        Desired(memory=[AskedMemory("p", 4096), AskedMemory("p", 8192)])


async def test_statistics_say_what_it_keeps_to_and_what_it_told(autojump_clock, asked):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(spec())
        await vm.set_memory(12 * MiB)
        memory = vm.statistics().memory
        assert memory.guest.age >= 0
        told = orc.GuestMemoryStatistics(memory.guest.age, total=4096, free=1024)
        assert memory == orc.MemoryStatistics(16 * MiB, 12 * MiB, 12 * MiB, 7, 5, 9, told)
        assert codec.decode(orc.VmStatistics, json.loads(json.dumps(codec.encode(vm.statistics())))) == vm.statistics()


# ---- a policy that asks


async def test_a_ladder_asks_for_memory_and_lets_it_again(autojump_clock, asked):
    rule = orc.Step(rung="set_memory", when=orc.Condition("exits", 1000), memory=4 * MiB, clear=1)
    busy = [attrs.evolve(io_read(0x80), after=0.0005)] * 4000 + [FOR_EVER]
    async with play(busy, policies=[orc.Ladder([rule], meter="exits", name="ladder")]) as fleet:
        vm = await fleet.launch(spec())
        await trio.sleep(1)
        assert vm.statistics().memory.target == 4 * MiB
        await trio.sleep(10)
        assert vm.statistics().memory.target == 16 * MiB
        kinds = [(applied.action.memory, applied.policy) for applied in fleet.actions()]
        assert kinds == [(4 * MiB, "ladder"), (None, "ladder")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rung": "set_memory"}, "set_memory: memory=None: set_memory needs its bytes"),
        ({"rung": "pause", "memory": MiB}, "pause: memory=1048576: set_memory needs"),
        ({"rung": "set_memory", "memory": 5}, "memory=5: must be"),
    ],
)
def test_a_step_that_can_not_be_is_refused_by_name(fields, message):
    with pytest.raises(orc.SpecError, match=message):
        orc.Step(when=orc.Condition("exits", 1000), **fields)
