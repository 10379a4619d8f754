"""Descriptors of the host: a VM that has ended holds none, and where they are used up, that alone is what fails."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

import orchestra as orc
from conftest import guest
from orchestra.machine.devices.disk import DiskDevice
from orchestra.machine.devices.io import IoThread
from rlimits import so_many_left

pytestmark = pytest.mark.kvm

SPINS = guest("spin")


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    """What is given back must not be left to it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "root.img"
    path.write_bytes(bytes(64 * 512))
    return str(path)


def spec(image: str) -> orc.VmSpec:
    devices = (
        *orc.LinuxBoot(kernel="any").platform(),
        orc.Serial(),
        orc.Disk(image),
        orc.Rng(),
        orc.Console(ports=("agent",)),
        orc.Balloon(),
    )
    return orc.VmSpec(name="a", boot=orc.FlatImage(code=SPINS, mode=16), irqchip="full", devices=devices)


def descriptors() -> Counter[str]:
    """All open descriptors of this process, by what they are."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found[os.readlink(f"/proc/self/fd/{fd}")] += 1
    return found


async def test_vm_that_has_ended_holds_no_descriptor(image: str, nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        before = descriptors()
        vm = await fleet.launch(spec(image))
        await vm.stop()
        assert descriptors() - before == Counter()
        assert next(iter(vm.disks.values())).statistics().errors == 0
        assert vm.statistics().memory is not None


async def test_launch_without_descriptors_is_a_limit_of_the_host_and_can_be_tried_again(image: str, nothing_left):
    """With each number of them that is too few."""
    refused = 0
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        await (await fleet.launch(spec(image))).stop()  # what a fleet keeps it has now
        before, wanted = descriptors(), spec(image)
        with trio.fail_after(120):
            for number in range(200):
                try:
                    with so_many_left(number):
                        vm = await fleet.launch(wanted)
                except orc.ResourceLimit:  # which lives on here, with all that its traceback knows
                    refused += 1
                    await (await fleet.launch(wanted)).stop()
                    assert descriptors() - before == Counter(), number
                else:
                    await vm.stop()
                    break
    assert refused > 30


@pytest.mark.parametrize(("owner", "step"), [(IoThread, "stop"), (DiskDevice, "drained"), (DiskDevice, "stop")])
async def test_whatever_fails_at_the_end_of_queues_is_that_vms_alone(owner, step, image, monkeypatch, nothing_left):
    """Each step raises once, when it has done its work: the VM has failed, and holds nothing."""
    real, failed = getattr(owner, step), []

    def fails(*args: object) -> None:
        real(*args)
        if not failed:
            failed.append(step)
            raise ZeroDivisionError("injected")

    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        before = descriptors()
        vm = await fleet.launch(spec(image))
        monkeypatch.setattr(owner, step, fails)
        outcome = await vm.stop()
        assert isinstance(outcome, orc.Failed)
        assert "ZeroDivisionError: injected" in outcome.reason
        assert descriptors() - before == Counter()
        await (await fleet.launch(spec(image))).stop()
