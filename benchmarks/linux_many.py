"""Linux VMs together: how long each takes to its init, and what memory each costs; and one with 8 vCPUs.

``python -m benchmarks.linux_many FILE.json FILE.svg`` draws the curves of a saved run.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio

import orchestra as orc

from .idle import of_guests
from .linux import BOOTED, Files, made, order, progress, skipped, spec
from .linux_idle import devices
from .row import Options, Row

__all__ = ["Step", "draw", "linux_many", "slope"]

STEPS = (1, 2, 4, 8, 20)
EACH = 0.5
"""MiB of orchestra for each VM, at most."""
SLOPE = 8
"""The bound is on VMs 1 to 8."""


@attrs.frozen
class Step:
    """So many VMs are up.

    Attributes:
        seconds: from the launch of those that were added to the init of the last of them.
        each: from its launch to its init, of each of those that were added.
        mib: memory of the program, without the guests'.
        guests: MiB of the guests that are in RAM.
    """

    vms: int
    seconds: float
    each: list[float]
    mib: float
    guests: float


def slope(steps: Sequence[Step]) -> float:
    """MiB for each VM more: the line of least squares."""
    n = len(steps)
    x, y = sum(step.vms for step in steps) / n, sum(step.mib for step in steps) / n
    return sum((step.vms - x) * (step.mib - y) for step in steps) / sum((step.vms - x) ** 2 for step in steps)


def _pss() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


async def together(files: Files, image: Path, steps: Sequence[int]) -> list[Step]:
    taken: list[Step] = []
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vms: list[orc.Vm] = []

        async def launch(number: int, took: list[float]) -> None:
            begun = time.perf_counter()
            wanted = spec(f"linux-{number}", files, initrd=files.loaded, devices=devices(str(image)))
            vm = await fleet.launch(wanted)
            vms.append(vm)
            await vm.console.wait_for("init\r\n", timeout=BOOTED)
            took.append(time.perf_counter() - begun)
            await vm.console.wait_for("ready\r\n", timeout=BOOTED)

        for many in steps:
            each: list[float] = []
            begun = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for number in range(len(vms), many):
                    nursery.start_soon(launch, number, each)
            seconds = time.perf_counter() - begun
            gc.collect()
            guests = of_guests(vms)
            taken.append(Step(many, seconds, sorted(each), (_pss() - guests) / 2**20, guests / 2**20))
            progress(f"{many} VMs: {seconds:.1f} s, {taken[-1].mib:.2f} MiB")
    return taken


async def many_vcpus(files: Files, vcpus: int) -> float:
    """Seconds to the init of a guest, which has brought all of them up by then."""
    begun = time.perf_counter()
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await fleet.launch(spec("smp", files, vcpus=vcpus))
        await vm.console.wait_for("init\r\n", timeout=BOOTED)
        seconds = time.perf_counter() - begun
        await vm.console.wait_for("ready\r\n", timeout=BOOTED)
        (up,) = await order(vm, "cpus")  # the guest knows: a vCPU that is up may never exit to us
        if up < vcpus:
            raise RuntimeError(f"{up} of {vcpus} vCPUs came up")
    progress(f"{vcpus} vCPUs: {seconds:.1f} s")
    return seconds


async def linux_many(options: Options) -> list[Row]:
    """A bound on memory. The curves of time and memory are in the JSON file, and `draw` draws them."""
    if skipped("linux-many", peer=False):
        return []
    files = made(options.build)
    image = options.build / "many.img"
    image.write_bytes(bytes(1 << 20))
    steps = await together(files, image, STEPS[:2] if options.quick else STEPS)
    each = slope([step for step in steps if step.vms <= SLOPE])
    last = steps[-1]
    rows = [
        Row(
            what=f"memory of orchestra for each Linux VM, {steps[0].vms} to {min(SLOPE, last.vms)} VMs",
            measured=f"{each:.2f} MiB",
            bound=f"{EACH} MiB",
            ok=each <= EACH,
            note="Slope of the process's proportional set size (PSS) without the guests' pages that are in RAM; each "
            "VM with serial port, disk, entropy and console, all drivers loaded, and idle.",
            details={"steps": [attrs.asdict(step) for step in steps]},
        ),
        Row(
            what=f"{last.vms} Linux VMs together, all up",
            measured=f"{last.seconds:.1f} s for the last {len(last.each)}",
            floor=f"{steps[0].seconds:.1f} s for one",
            bound="",
            ok=None,
            note="From the launch of all to the drivers of the last; two CPUs boot them, so they take turns.",
        ),
    ]
    if not options.quick:
        one, eight = await many_vcpus(files, 1), await many_vcpus(files, 8)
        rows.append(
            Row(
                what="a Linux VM with 8 vCPUs, all up",
                measured=f"{eight:.1f} s",
                floor=f"{one:.1f} s with 1",
                ratio=eight / one,
                bound="",
                ok=None,
                details={"seconds": {1: one, 8: eight}},
            )
        )
    return rows


def draw(results: Path, picture: Path) -> None:
    """The curves of boot time and of memory, as an SVG."""
    from orchestra.output import svg
    from orchestra.output.colours import CPU, QUIET
    from orchestra.output.figures import Figure, rc_context

    saved = json.loads(results.read_text())
    steps = next(row["details"]["steps"] for row in saved["rows"] if "steps" in row["details"])
    with rc_context(svg.STYLE):
        figure = Figure(figsize=(8, 3), layout="constrained")
        time_axes, memory_axes = figure.subplots(1, 2)
        svg.heading(figure, f"Linux VMs together: {saved['machine']['cpu']}, {saved['machine']['kvm']}")
        for step in steps:
            time_axes.plot([step["vms"]] * len(step["each"]), step["each"], "o", color=QUIET, markersize=3)
        time_axes.set(title="launch to init, each", xlabel="VMs that are up then", ylabel="s", ylim=(0, None))
        memory_axes.plot([step["vms"] for step in steps], [step["mib"] for step in steps], "o-", color=CPU)
        memory_axes.set(title="memory of orchestra", xlabel="VMs", ylabel="MiB", ylim=(0, None))
        svg.save(figure, picture)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
