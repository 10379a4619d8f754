"""The memory of Linux guests: their balloon, what they report as free, and what the host has back of it."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

import linux_kit
import orchestra as orc
from orchestra.testing import wait_until
from test_linux import answer, booted, ended, had, spec_of

pytestmark = [pytest.mark.kvm, pytest.mark.linux]

FILL = "dd if=/dev/zero of=/{name} bs=1M count={mib}"
"""The root of an initrd is memory: what is written there takes pages, and `rm` frees them."""
SOON = 90.0
"""Seconds, on an emulated host with other things to do. On a real one, less than one; reports wait for two."""


@pytest.fixture(scope="module")
def initrd(tmp_path_factory) -> Path:
    """An initrd that has loaded the drivers."""
    path = tmp_path_factory.mktemp("linux") / "initrd"
    path.write_bytes(had(linux_kit.initrd, linux_kit.LOAD, had(linux_kit.modules, *linux_kit.MODULES)))
    return path


def resident() -> int:
    """Bytes of memory that this process has, its guests' among it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def spec_with(initrd: Path, balloon: orc.Balloon, memory: orc.Memory | None = None) -> orc.VmSpec:
    spec = spec_of(had(linux_kit.debian_kernel), initrd)
    spec = attrs.evolve(spec, devices=(orc.Serial(), balloon))
    return spec if memory is None else attrs.evolve(spec, memory=memory)


async def meminfo(vm: orc.Vm) -> dict[str, int]:
    lines = (await answer(vm, "cat /proc/meminfo")).splitlines()
    return {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":") for line in lines if ":" in line)}


async def fill_and_free(vm: orc.Vm, mib: int) -> None:
    await answer(vm, f"{FILL.format(name='big', mib=mib)}; rm /big; sync")


def memory_of(vm: orc.Vm) -> orc.MemoryStatistics:
    found = vm.statistics().memory
    assert found is not None
    return found


async def settled(vm: orc.Vm, actual: int) -> None:
    try:
        await wait_until(lambda: memory_of(vm).actual == actual, within=SOON)
    except AssertionError:
        raise AssertionError(f"{memory_of(vm)}; {vm.console.text[-1000:]}") from None


@pytest.mark.parametrize("backing", ["anonymous", "shared"])
async def test_a_balloon_gives_the_host_what_it_takes_and_the_guest_has_it_again_when_it_is_let(initrd, backing):
    balloon = orc.Balloon(free_page_reporting=False, deflate_on_oom=False)
    memory = orc.Memory(256 * orc.MiB, backing=backing)
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_with(initrd, balloon, memory))
        await fill_and_free(vm, 128)
        before, had_before = await meminfo(vm), resident()
        assert memory_of(vm).target == memory_of(vm).actual == 256 * orc.MiB
        await vm.set_memory(128 * orc.MiB)
        await settled(vm, 128 * orc.MiB)
        taken = await meminfo(vm)
        assert before["MemTotal"] - taken["MemTotal"] == 128 * orc.MiB
        assert had_before - resident() > 100 * orc.MiB
        assert memory_of(vm).given_back == 128 * orc.MiB
        assert memory_of(vm).failed == 0
        await vm.set_memory(None)
        await settled(vm, 256 * orc.MiB)
        again = await meminfo(vm)
        assert again["MemTotal"] == before["MemTotal"]
        assert again["MemFree"] - taken["MemFree"] > 100 * orc.MiB
        await fill_and_free(vm, 128)  # it can be used
        await vm.set_memory(160 * orc.MiB)
        await settled(vm, 160 * orc.MiB)
        await vm.reset()  # what is asked for stays
        await vm.console.wait_for("/ # ", timeout=SOON)
        await settled(vm, 160 * orc.MiB)
        assert await answer(vm, "dmesg | grep -E 'BUG:|WARNING:|Call Trace'") == ""
        assert await ended(vm, "poweroff -f") == orc.Shutdown(reason="ACPI power-off")


async def test_memory_that_a_guest_frees_is_the_hosts_without_being_asked_for(initrd):
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_with(initrd, orc.Balloon()))
        await answer(vm, FILL.format(name="big", mib=128))
        full = resident()
        await answer(vm, "rm /big; sync")
        await wait_until(lambda: full - resident() > 100 * orc.MiB, within=SOON)
        assert memory_of(vm).reported >= memory_of(vm).given_back > 100 * orc.MiB
        assert await answer(vm, FILL.format(name="big", mib=128) + " 2>/dev/null; md5sum /big") == (
            "fde9e0818281836e4fc0edfede2b8762  /big\n"
        )
        assert memory_of(vm).actual == 256 * orc.MiB


async def test_a_guest_that_runs_out_of_memory_takes_pages_back_and_kills_nobody(initrd):
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_with(initrd, orc.Balloon(free_page_reporting=False)))
        before = await meminfo(vm)
        await vm.set_memory(96 * orc.MiB)
        await settled(vm, 96 * orc.MiB)
        after = await meminfo(vm)
        assert after["MemTotal"] == before["MemTotal"]  # with deflate_on_oom Linux counts it as used
        assert before["MemFree"] - after["MemFree"] > 140 * orc.MiB
        await answer(vm, FILL.format(name="big", mib=100))
        assert memory_of(vm).actual > 96 * orc.MiB
        assert "Out of memory" not in await answer(vm, "dmesg")
        assert (await answer(vm, "md5sum /big")).split()[0] == "2f282b84e7e608d5852449ed940bfc51"


async def test_statistics_are_what_the_guest_says_of_itself(initrd):
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_with(initrd, orc.Balloon(statistics_interval=0.5)))
        first = (await wait_until(lambda: memory_of(vm).guest, within=SOON)).free
        await answer(vm, FILL.format(name="big", mib=64))
        less = first - 50 * orc.MiB
        guest = await wait_until(lambda: (g := memory_of(vm).guest) and g.free < less and g, within=SOON)
        known = await meminfo(vm)
        assert guest.total == known["MemTotal"]
        assert abs(guest.available - known["MemAvailable"]) < 16 * orc.MiB
        assert guest.caches > 64 * orc.MiB
        assert guest.minor_faults > 1000
        assert 0 <= guest.age < SOON
        assert orc.decode(orc.VmStatistics, orc.encode(vm.statistics())).memory.size == 256 * orc.MiB
        exits = vm.statistics().answers
        await wait_until(lambda: memory_of(vm).guest.age < 0.4, within=SOON)
        assert vm.statistics().answers == exits  # no Python is on the way
