"""What a VM costs that does nothing: memory of ours, and CPU."""

from __future__ import annotations

import gc
import struct
import time
from collections.abc import Iterable

import trio

import orchestra as orc

from . import floor
from .row import Options, Row

__all__ = ["halted", "paused"]

PAGE = 4096
PRESENT = 1 << 63  # Documentation/admin-guide/mm/pagemap.rst


def anonymous() -> int:
    """Bytes of this process's own anonymous memory (Pss_Anon, or Anonymous on kernels before 5.10's smaps_rollup)."""
    with open("/proc/self/smaps_rollup") as lines:
        figures = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB\n")}
    return figures.get("Pss_Anon:", figures["Anonymous:"])


def present(address: int, size: int) -> int:
    """Bytes of that range of this process's memory that are in RAM."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        pages.seek(address // PAGE * 8)
        entries = pages.read(size // PAGE * 8)
    return sum(1 for (entry,) in struct.iter_unpack("Q", entries) if entry & PRESENT) * PAGE


def of_guests(vms: Iterable[orc.Vm]) -> int:
    """Bytes of guest memory that are in RAM: the guests', not ours."""
    total = 0
    for vm in vms:
        assert vm._control.guest is not None
        total += sum(present(region.host, len(region.span)) for region in vm._control.guest.memory.regions)
    return total


async def _measure(options: Options, halted: bool) -> list[Row]:
    vms, seconds = options.pick(500, 20), options.pick(10, 1)
    how = "halted" if halted else "paused"
    boot = orc.FlatImage(code=floor.guest("halt" if halted else "write"))
    async with orc.open_fleet(backend="kvm") as fleet:

        async def launch(name: str) -> orc.Vm:
            return await fleet.launch(orc.VmSpec(name=name, boot=boot, irqchip=halted), paused=not halted)

        await launch("first")  # what the first VM brings in (threads, tables, imports) is not each VM's
        gc.collect()
        before = anonymous()
        many = [await launch(f"vm-{n}") for n in range(vms)]
        await trio.sleep(0.5)
        gc.collect()
        each = (anonymous() - before - of_guests(many)) / vms
        cpu, start = time.process_time(), time.perf_counter()
        await trio.sleep(seconds)
        share = (time.process_time() - cpu) / (time.perf_counter() - start)
        states = {vm.state for vm in many}
    assert states == {orc.State.RUNNING if halted else orc.State.PAUSED}, states
    return [
        Row(
            what=f"memory of orchestra for each of {vms} {how} VMs",
            measured=f"{each / 1024:.1f} KiB",
            bound="150 KiB",
            ok=each <= 150 * 1024,
            note="Growth of the process's anonymous memory less the guests' pages that are in RAM (pagemap): Python "
            "objects, C core, the vCPU thread's stack. The kernel's own is not in it.",
            details={"bytes_each": each},
        ),
        Row(
            what=f"CPU of {vms} {how} VMs, {seconds} s",
            measured=f"{share:.3%} of a core",
            bound="1 %",
            ok=share < 0.01,
            details={"share": share},
        ),
    ]


async def halted(options: Options) -> list[Row]:
    """VMs whose only vCPU waits in KVM_RUN for an interrupt."""
    return await _measure(options, halted=True)


async def paused(options: Options) -> list[Row]:
    """VMs that were launched paused."""
    return await _measure(options, halted=False)
