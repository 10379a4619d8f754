"""A Linux guest's reads of a disk, beside QEMU's: the same image, the same program in the guest, in turns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import attrs

import orchestra as orc

from .linux import BOOTED, Guest, made, order, peer, skipped, spec
from .qemu import cpu, disk
from .row import Options, Row

__all__ = ["READS", "Taken", "linux_disk"]

READS: Mapping[str, tuple[int, int, int, float]] = {
    "sequential, 1 MiB": (1 << 20, 1, 0, 1.0),
    "random, 4 KiB, 1 deep": (4096, 1, 1, 0.9),
    "random, 4 KiB, 32 deep": (4096, 32, 1, 0.9),
}
"""Bytes, how many at the same time, whether random; and the bound on the throughput's ratio."""
FILES = {"direct": "/dev/vda", "cached": "/dev/vdb"}
SIZE = 256 << 20
CPU = 1.2
"""Bound on the ratio of CPU time for each byte."""


@attrs.define
class Taken:
    """Bytes a second, and the VMM's CPU seconds for each GiB."""

    rate: list[float] = attrs.field(factory=list)
    cpu: list[float] = attrs.field(factory=list)


def _image(path: Path) -> Path:
    with path.open("wb") as file:  # written, as holes are read otherwise
        for _ in range(SIZE >> 20):
            file.write(os.urandom(4096) * 256)
        os.fsync(file.fileno())
    return path


async def read(
    guest: Guest, pid: int, file: str, how: tuple[int, int, int, float], milliseconds: int
) -> tuple[float, float]:
    size, deep, random, _ = how
    before = cpu(pid)
    done, nanoseconds = await order(guest, f"read {file} {size} {deep} {random} {milliseconds}")
    return done / nanoseconds * 1e9, (cpu(pid) - before) / (done / 2**30)


async def linux_disk(options: Options) -> list[Row]:
    """A bound each on throughput, and on CPU time for the same bytes."""
    if skipped("linux-disk", peer=True):
        return []
    files = made(options.build)
    images = {how: _image(options.build / f"{how}.img") for how in FILES}
    try:
        os.close(os.open(images["direct"], os.O_RDONLY | os.O_DIRECT))
    except OSError:
        print(f"linux-disk: no O_DIRECT on the file system of {options.build}: set TMPDIR to another; not measured")
        del images["direct"]
    more = [
        option
        for how, path in images.items()
        for option in disk(how, path, {"direct": "none", "cached": "writeback"}[how], "pci")
    ]
    specs = tuple(orc.Disk(str(path), readonly=True, direct=how == "direct") for how, path in images.items())
    names = dict(zip(images, FILES.values(), strict=False))  # /dev/vda is the first that there is
    taken = {(how, what, side): Taken() for how in images for what in READS for side in ("ours", "theirs")}
    async with (
        orc.open_fleet(backend="kvm", bus_locks="auto") as fleet,
        peer(files, "q35", initrd=files.loaded, more=tuple(more)) as other,
    ):
        vm = await fleet.launch(spec("disk", files, initrd=files.loaded, devices=specs))
        await vm.console.wait_for("ready\r\n", timeout=BOOTED)
        await other.wait_for(b"ready\r\n")
        sides: dict[str, tuple[Guest, int]] = {"ours": (vm, os.getpid()), "theirs": (other, other.pid)}
        for turn in range(-1, options.pick(5, 1)):  # the first one brings files and code in
            for how, file in names.items():
                for what, request in READS.items():
                    for side, (guest, pid) in sides.items():
                        milliseconds = options.pick(1500, 100) if turn >= 0 else 100
                        rate, used = await read(guest, pid, file, request, milliseconds)
                        if turn >= 0:
                            taken[how, what, side].rate.append(rate)
                            taken[how, what, side].cpu.append(used)
    return [row for how in images for what in READS for row in judge(f"{how}: {what}", what, taken, how)]


def judge(title: str, what: str, taken: Mapping[tuple[str, str, str], Taken], how: str) -> list[Row]:
    mine, other = taken[how, what, "ours"], taken[how, what, "theirs"]
    least = READS[what][3]
    rate, used = (median(mine.rate) / median(other.rate), median(mine.cpu) / median(other.cpu))
    details = {"ours": attrs.asdict(mine), "theirs": attrs.asdict(other)}
    return [
        Row(
            what=f"disk, {title}",
            measured=f"{median(mine.rate) / 2**20:.1f} MiB/s",
            floor=f"{median(other.rate) / 2**20:.1f} MiB/s",
            ratio=rate,
            bound=f"{least}x at least",
            ok=rate >= least,
            note="virtio-blk of QEMU's q35 with aio=io_uring and an I/O thread, the same image, both VMs up, in turns. "
            "direct: cache=none; cached: cache=writeback, the image in the host's page cache. CPU of the VMM without "
            "the guest's, for each GiB read.",
            details=details,
        ),
        Row(
            what=f"disk, {title}: CPU of the VMM",
            measured=f"{median(mine.cpu):.2f} s/GiB",
            floor=f"{median(other.cpu):.2f} s/GiB",
            ratio=used,
            bound=f"{CPU}x",
            ok=used <= CPU,
        ),
    ]
