"""Twenty Linux VMs in one fleet."""

from __future__ import annotations

import attrs
import pytest
import trio

import linux_kit
import orchestra as orc
from test_linux import PROMPT, SPLIT_LOCKS, answer, had, spec_of

pytestmark = [pytest.mark.kvm, pytest.mark.linux, pytest.mark.slow]

VMS = 20
BOOTED = 1200.0
"""Seconds for all of them. An emulated host has two CPUs, and boots one in 15 s."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A kernel that need not be unpacked by each guest, and an initrd."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "vmlinux").write_bytes(had(linux_kit.vmlinux, had(linux_kit.debian_kernel)))
    more = {"bin/splitlocks": had(linux_kit.program, SPLIT_LOCKS)}
    (folder / "initrd").write_bytes(had(linux_kit.initrd, "", more))
    return folder


async def test_twenty_linux_vms_run_side_by_side_and_leave_nothing(files, nothing_left):
    spec = spec_of(files / "vmlinux", files / "initrd", cmdline="quiet nokaslr")
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vms: list[orc.Vm] = []

        async def boot(number: int) -> None:
            vm = await fleet.launch(attrs.evolve(spec, name=f"linux-{number}", memory=96 * orc.MiB))
            vms.append(vm)
            await vm.console.wait_for(PROMPT, timeout=BOOTED)

        async with trio.open_nursery() as nursery:
            for number in range(VMS):
                nursery.start_soon(boot, number)
        assert {vm.state for vm in fleet.vms.values()} == {orc.State.RUNNING}

        async def asked(number: int, vm: orc.Vm) -> None:
            assert await answer(vm, f"echo $(({number} * 3))") == f"{number * 3}\n"
            locks = vm.statistics().bus_locks
            assert await answer(vm, f"splitlocks {10 * number + 1}") == f"{10 * number + 1} split locks\n"
            if vm.statistics().bus_locks is not None and locks is not None:  # each has its own count
                assert vm.statistics().bus_locks - locks <= 10 * number + 3

        async with trio.open_nursery() as nursery:
            for number, vm in enumerate(vms):
                nursery.start_soon(asked, number, vm)
        killed = vms.pop(VMS // 3)
        await killed.stop()
        assert killed.name not in fleet.vms
        async with trio.open_nursery() as nursery:
            for number, vm in enumerate(vms):
                nursery.start_soon(asked, number + 1, vm)
    nothing_left()
