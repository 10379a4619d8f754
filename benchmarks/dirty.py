"""What it costs to have a guest's written pages counted: the guest, and whoever reads the log."""

from __future__ import annotations

import struct
import time
from statistics import median
from unittest import mock

import trio

import orchestra as orc
from orchestra.backend.kvm.dirty import DirtyLog, read_logs
from orchestra.fleet import dirty as reader

from . import floor
from .row import Options, Row

__all__ = ["dirty"]

PAGES, COUNT = 0x8000, 0x8004
BOUND = 1.05
LITTLE, MUCH = 1_000, 100_000


def _word(vm: orc.Vm, address: int) -> int:
    (value,) = struct.unpack("<I", vm.read_memory(address, 4))
    return int(value)


def _spec(name: str, memory: int) -> orc.VmSpec:
    return orc.VmSpec(name=name, memory=memory, boot=orc.FlatImage(code=floor.guest("pages"), mode=32))


def _log(vm: orc.Vm) -> DirtyLog:
    assert vm.guest is not None
    assert vm.guest.dirty is not None
    return vm.guest.dirty


def _cpu(vm: orc.Vm) -> int:
    """Nanoseconds of CPU time of its vCPU's thread."""
    assert vm.guest is not None
    tid = vm.guest.vcpus[0].tid
    assert tid is not None
    return time.clock_gettime_ns((~tid << 3) | 6)  # clock_getcpuclockid(3): CPUCLOCK_SCHED of a thread


async def _slowed(fleet: orc.Fleet, pages: int, options: Options) -> Row:
    vm = await fleet.launch(_spec("writer", (pages + 1024) * 4096))
    vm.write_memory(PAGES, struct.pack("<I", pages))
    while _word(vm, COUNT) < 2 * pages:  # noqa: ASYNC110  # the guest tells nobody
        await trio.sleep(0.01)
    runs: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(options.pick(6, 1)):
        for on in (False, True) if turn % 2 else (True, False):  # whoever comes first has no advantage
            await vm.log_dirty(on)
            await trio.sleep(0.1)
            count, cpu = _word(vm, COUNT), _cpu(vm)
            await trio.sleep(options.pick(25, 12) / 10)
            runs[on].append((_cpu(vm) - cpu) / max(1, (_word(vm, COUNT) - count) % (1 << 32)))
    told = vm.statistics().dirty_pages
    await vm.stop()
    ratio = median(b / a for a, b in zip(runs[False], runs[True], strict=True))
    return Row(
        what=f"a write of a guest that writes {pages:,} pages in turn, logged",
        measured=f"{median(runs[True]):.1f} ns",
        floor=f"{median(runs[False]):.1f} ns",
        ratio=ratio,
        bound=f"{BOUND}x" if pages == LITTLE else "",
        ok=ratio <= BOUND if pages == LITTLE else None,
        note="Floor: the same, not logged. CPU time of the vCPU's thread; the log is read each second; median of the "
        "rounds' ratios.",
        details={"runs": {str(on): each for on, each in runs.items()}, "pages": told},
    )


async def _read(fleet: orc.Fleet, memory: int, pages: int, options: Options) -> Row:
    """The guest is paused for it: nothing but the kernel and the count."""
    vm = await fleet.launch(_spec("read", memory))
    vm.write_memory(PAGES, struct.pack("<I", pages))
    begun = time.perf_counter()
    await vm.log_dirty(True)
    switched = time.perf_counter() - begun
    took: list[float] = []
    found = 0
    for _ in range(options.pick(20, 2)):
        await vm.resume()
        count = _word(vm, COUNT)
        while (_word(vm, COUNT) - count) % (1 << 32) < pages + 1:  # noqa: ASYNC110
            await trio.sleep(0.001)
        await vm.pause()
        begun, before = time.perf_counter(), _log(vm).sums()[0]
        problem = read_logs([_log(vm)])
        took.append(time.perf_counter() - begun)
        found = _log(vm).sums()[0] - before
        assert problem is None
    await vm.stop()
    return Row(
        what=f"a log of {memory >> 20:,} MiB read, {pages:,} pages in it",
        measured=f"{median(took) * 1e6:,.0f} us (longest {max(took) * 1e6:,.0f})",
        bound="",
        ok=None,
        note="On a worker thread, without the interpreter lock; a tick waits 5 ms for it at most.",
        details={"seconds": took, "found": found, "switched_on": switched},
    )


async def dirty(options: Options) -> list[Row]:
    """The guest's side with few pages and with many; the reader's with little memory and with much."""
    async with orc.open_fleet(backend="kvm") as fleet:
        rows = [await _slowed(fleet, pages, options) for pages in (LITTLE, options.pick(MUCH, LITTLE * 2))]
        with mock.patch.object(reader, "EVERY", 1 << 62):  # nobody else reads
            for memory, pages in ((64 * orc.MiB, 10), (4 * orc.GiB, 10), (4 * orc.GiB, options.pick(MUCH, LITTLE))):
                rows.append(await _read(fleet, memory, pages, options))
    return rows
