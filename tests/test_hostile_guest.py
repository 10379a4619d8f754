"""A guest that does to every device what no driver does: its VM ends by a name or goes on, and nothing else notices.

The guest is tests/guests/hostile_64.asm: random writes to configuration space, to BARs and their vectors, to all ports;
descriptors that loop, overflow or lie outside; indices that go back; resets while requests are in flight. The same seed
does the same again, but for when its devices are done.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import Final

import pytest
import trio

import orchestra as orc
from conftest import guest

pytestmark = pytest.mark.kvm

PARAMETERS: Final = 0x7000
ROUND, GOOD, BROKEN = range(0x7020, 0x7038, 8)
BUFFERS: Final = range(0x100000, 0x200000)
MEMORY: Final = 4 * orc.MiB
ROUNDS: Final = 3000
LASTS: Final = 60.0
"""Seconds. A guest may make its CPU wait for another one, which does not come; then it is stopped."""
NAMED: Final = (
    "triple fault",
    "exit port",
    "ACPI power-off",
    "ACPI reset",
    "keyboard controller reset",
    "the guest's kernel panicked",
)
SEEDS: Final = (1, 0xBAD_5EED, 0x9E37_79B9_7F4A_7C15)
# Adds one to what a port gives, and writes it to the next port, for ever.
ASKS: Final = bytes.fromhex("e550 83c001 e751 ebf7")


def hostile(name: str, image: Path, vcpus: int) -> orc.VmSpec:
    image.write_bytes(bytes(64 * 512))
    chipset = (*orc.LinuxBoot(kernel="any").platform(), orc.Serial())
    return orc.VmSpec(
        name=name,
        boot=orc.FlatImage(code=guest("hostile_64"), mode=64),
        memory=MEMORY,
        vcpus=vcpus,
        irqchip="full",
        devices=(*chipset, orc.DebugConsole(), orc.ExitPort(), orc.Disk(str(image)), orc.Rng(), orc.Console()),
    )


class Bystander:
    """A VM of another tenant, whose port a task answers with the number of the round. It comes back plus one."""

    def __init__(self, vm: orc.Vm) -> None:
        self.vm = vm
        self.rounds = 0
        self.served = trio.Event()
        self.wrong: list[bytes] = []

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with self.vm.requests(ports=range(0x50, 0x55)) as requests:
            task_status.started()
            async for request in requests:
                if not request.write:
                    request.answer(struct.pack("<I", self.rounds))
                    continue
                if request.data != struct.pack("<I", self.rounds + 1):
                    self.wrong.append(request.data)
                request.answer()
                self.rounds += 1
                self.served.set()
                self.served = trio.Event()

    async def goes_on(self) -> None:
        """Until it has been served a few more times."""
        until = self.rounds + 5
        with trio.fail_after(30):
            while self.rounds < until:
                await self.served.wait()


async def run_hostile(
    folder: Path, seeds: tuple[int, ...], tame: bool, vcpus: int
) -> list[tuple[orc.Outcome, tuple[int, int, int], bytes]]:
    """Of each seed: how it ended; its round then, good requests and broken devices that it saw; and its buffers."""
    done = []
    with trio.fail_after(30 + 2 * LASTS):
        async with (
            orc.open_fleet(backend="kvm", bus_locks="off", tenants={"other": None}) as fleet,
            trio.open_nursery() as nursery,
        ):
            spec = orc.VmSpec(name="innocent", tenant="other", boot=orc.FlatImage(code=ASKS, mode=32))
            bystander = Bystander(await fleet.launch(spec, paused=True))
            await nursery.start(bystander.serve)
            await bystander.vm.resume()
            vms = []
            for number, seed in enumerate(seeds):
                name = f"hostile-{number}"
                vm = await fleet.launch(hostile(name, folder / name, vcpus), paused=True)
                vm.write_memory(PARAMETERS, struct.pack("<4Q", seed, ROUNDS, tame, MEMORY))
                vms.append(vm)
            for vm in vms:
                await vm.resume()
            await bystander.goes_on()
            for vm in vms:
                with trio.move_on_after(LASTS):
                    await vm.wait()
                counts = struct.unpack("<3Q", vm.read_memory(ROUND, 24))
                buffers = bytes(vm.read_memory(BUFFERS.start, len(BUFFERS)))
                await vm.stop()
                done.append((await vm.wait(), counts, buffers))
                await bystander.goes_on()
            assert bystander.wrong == []
            assert bystander.vm.state is orc.State.RUNNING
            nursery.cancel_scope.cancel()
    return done


@pytest.mark.parametrize("vcpus", [1, pytest.param(2, marks=pytest.mark.smp)])
@pytest.mark.parametrize("tame", [True, False], ids=["tame", "ends itself"])
@pytest.mark.parametrize("seeds", [SEEDS, None], ids=["fixed", "random"])
async def test_hostile_guest_ends_by_a_name_or_goes_on_and_touches_no_other(
    tmp_path, caplog, nothing_left, seeds, tame, vcpus
):
    seeds = seeds or struct.unpack("<3Q", os.urandom(24))
    print("seeds:", *map(hex, seeds))
    with caplog.at_level(logging.WARNING, "orchestra"):
        done = await run_hostile(tmp_path, seeds, tame, vcpus)
    for outcome, (reached, good, broken), _ in done:
        print(f"{outcome!r:.200} in round {reached}: {good} good requests, {broken} broken devices")
    for outcome, (reached, *_), _ in done:
        assert reached > 0
        match outcome:
            case orc.Shutdown(reason=reason):
                assert reason in NAMED
            case orc.Failed(reason=reason):
                assert reason in NAMED or "emulat" in reason, reason
            case _:
                assert isinstance(outcome, orc.Stopped)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    if tame:
        _, counts, buffers = max(done, key=lambda one: one[1])
        assert counts[0] > ROUNDS / 10
        assert counts[1] > 10
        assert counts[2] > 2  # a queue broke a rule, and its device was used again
        assert len(set(buffers)) > 200  # the entropy device was in earnest
