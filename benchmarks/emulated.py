"""The emulated backend against bare unicorn, and what its engines cost."""

from __future__ import annotations

import gc
import importlib
import random
import time
from pathlib import Path
from statistics import median, quantiles

import attrs
import trio

import orchestra as orc
from orchestra.backend.emulated.machine import EmulatedBackend
from orchestra.backend.memory import GuestMemory
from orchestra.machine.boot import flat
from orchestra.native.core import FleetCore, VcpuCore

from . import floor
from .idle import of_guests
from .row import Options, Row

__all__ = ["emulated"]

CONSTANTS = ("ARCH_X86", "MODE_16", "MODE_64", "PROT_READ", "PROT_WRITE", "PROT_EXEC", "HOOK_CODE")
FIRST_LOCK = 0x203E  # where guests/buslock.asm locks
ENGINES = 16
LAUNCHERS = 8
NEVER_REACHED = orc.Limit(rate=1e9)
# After its first lock a VM waits for its turn until it is stopped.
ONE_LOCK = orc.Limit(rate=1e-6, burst=1, max_delay=None)
BEST = (
    "CPU time of the thread that runs the guest; each the best of interleaved runs, as what disturbs a run only adds "
    "to it. All runs: in the JSON file."
)


@attrs.frozen
class Bare:
    """bare.c, compiled against the installed unicorn's numbers."""

    program: Path
    library: str

    @classmethod
    def compile(cls, build: Path) -> Bare:
        numbers = vars(importlib.import_module("unicorn.unicorn_const"))
        library = importlib.import_module("unicorn.unicorn_py3.unicorn").uclib._name
        defines = [f"-DUC_{name}={numbers[f'UC_{name}']}" for name in CONSTANTS]
        return cls(floor.compile_c("bare.c", build / "bare", *defines), library)

    async def run(self, what: str, guest: str, count: int) -> float:
        """Nanoseconds of CPU time for each round, or each lock."""
        image = floor.HERE / "guests" / f"{guest}.bin"
        command = [str(self.program), what, self.library, str(image), str(count)]
        done = await trio.run_process(command, capture_stdout=True)
        number, cpu, _ = (int(word) for word in done.stdout.split())
        return cpu / number


def _spec(name: str, guest: str, **more: object) -> orc.VmSpec:
    mode = 16 if guest == "buslock" else 64
    return orc.VmSpec(name=name, boot=orc.FlatImage(code=floor.guest(guest), mode=mode), **more)  # type: ignore[arg-type]


async def _for_each_lock(vm: orc.Vm, seconds: float) -> float:
    """Let a paused VM run for a while: nanoseconds of CPU time for each of its bus locks."""

    def read() -> tuple[int, int]:
        return vm.statistics().bus_locks or 0, time.process_time_ns()

    await vm.resume()
    await trio.sleep(seconds / 10)
    before = read()
    await trio.sleep(seconds)
    count, cpu = (b - a for a, b in zip(before, read(), strict=True))
    await vm.pause()
    return cpu / count


async def _against_bare(options: Options, bare: Bare) -> list[Row]:
    what = {
        "mix": ("compute-bound guest, one split lock per 1000 instructions", 1.5),
        "tight": ("the same in a loop of two instructions", None),
        "buslock": ("bus-lock exit, C loop to C loop, within 4 budgets", 1.3),
    }
    seconds = options.pick(5, 1) / 10
    ours: dict[str, list[float]] = {guest: [] for guest in what}
    floors: dict[str, list[float]] = {guest: [] for guest in what}
    async with orc.open_fleet(backend="emulated", tenants=[orc.Tenant("t", limit=NEVER_REACHED)]) as fleet:
        limits = {"tenant": "t", "limit": NEVER_REACHED, "vcpu_limit": NEVER_REACHED}
        vms = [await fleet.launch(_spec(guest, guest, **limits), paused=True) for guest in what]
        await fleet.set_limit(NEVER_REACHED)
        for _ in range(options.pick(15, 2)):
            for vm in vms:
                run, count = ("locks", 2_000_000) if vm.name == "buslock" else ("mix", 150_000)
                floors[vm.name].append(await bare.run(run, vm.name, count // options.pick(1, 10)))
                ours[vm.name].append(await _for_each_lock(vm, seconds))
    rows = []
    for guest, (name, bound) in what.items():
        measured, base = min(ours[guest]), min(floors[guest])
        ratio = measured / base
        rows.append(
            Row(
                what=name,
                measured=f"{measured:.0f} ns a lock",
                floor=f"{base:.0f} ns",
                ratio=ratio,
                bound=f"{bound}x" if bound else "",
                ok=ratio <= bound if bound else None,
                note=BEST,
                details={
                    "cpu_ns": ours[guest],
                    "floor_cpu_ns": floors[guest],
                    "median_ratio": median(ours[guest]) / median(floors[guest]),
                },
            )
        )
    return rows


def _resident(name: str = "VmRSS") -> int:
    """Bytes of RAM that this process has, or had at most (VmHWM)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


async def _launch(options: Options) -> list[Row]:
    vms = options.pick(1000, 50)
    times, peaks = [], []
    for _ in range(options.pick(3, 1)):
        start = time.perf_counter()
        async with orc.open_fleet(backend=EmulatedBackend(detection="trap-like")) as fleet:
            specs = iter([_spec(f"vm-{n}", "buslock", limit=ONE_LOCK) for n in range(vms)])

            async def launcher(fleet: orc.Fleet = fleet, specs: object = specs) -> None:
                for spec in specs:  # type: ignore[attr-defined]
                    await fleet.launch(spec)

            async with fleet.exits(orc.BusLock) as exits, trio.open_nursery() as nursery:
                for _ in range(LAUNCHERS):
                    nursery.start_soon(launcher)
                for _ in range(vms):
                    await exits.receive()
            peaks.append(_resident())
            done = [vm.read_memory(FIRST_LOCK, 1) for vm in fleet.vms.values()]
            await fleet.stop()
        times.append(time.perf_counter() - start)
        assert done == [b"\1"] * vms, "each has done one lock, and one only"
    best, most = min(times), max(peaks)
    return [
        Row(
            what=f"{vms} VMs launched, one lock each, stopped",
            measured=f"{best:.2f} s, {most / orc.GiB:.2f} GiB",
            bound="5 s, 4 GiB",
            ok=best <= 5 and most <= 4 * orc.GiB,
            note=f"By the clock, {LAUNCHERS} launched at a time, 1 MiB each, all alive until the last had its lock; "
            "the whole process's RSS at that moment. The best of the runs.",
            details={"seconds": times, "rss": peaks},
        )
    ]


def _percentiles(milliseconds: list[float]) -> tuple[float, float]:
    cuts = quantiles(milliseconds, n=100, method="inclusive")
    return cuts[49], cuts[98]


async def _kicks(options: Options) -> list[Row]:
    engines, times, dice = options.pick(ENGINES, 4), options.pick(500, 5), random.Random(16)
    took: dict[str, list[float]] = {"pause": [], "stop": []}
    async with orc.open_fleet(backend="emulated") as fleet:

        async def launch(number: int) -> orc.Vm:
            return await fleet.launch(_spec(f"vm-{number}", "tight" if number % 2 else "mix"))

        vms = [await launch(number) for number in range(engines)]
        for what, milliseconds in took.items():
            for _ in range(times):
                await trio.sleep(dice.random() / 100)
                number = dice.randrange(engines)
                start = time.perf_counter()
                await (vms[number].pause() if what == "pause" else vms[number].stop())
                milliseconds.append((time.perf_counter() - start) * 1000)
                if what == "pause":
                    await vms[number].resume()
                else:
                    vms[number] = await launch(number)
    rows = []
    for what, milliseconds in took.items():
        p50, p99 = _percentiles(milliseconds)
        rows.append(
            Row(
                what=f"{what} of one of {engines} busy engines ({times} times)",
                measured=f"p50 {p50:.2f} ms, p99 {p99:.2f} ms",
                bound="p99 20 ms",
                ok=p99 <= 20,
                note="By the clock, until `await` comes back, on a machine that has more engines than cores.",
                details={"p50_ms": p50, "p99_ms": p99, "max_ms": max(milliseconds)},
            )
        )
    return rows


async def _engine(options: Options) -> list[Row]:
    engines, backend, fleet_core = options.pick(100, 10), EmulatedBackend(), FleetCore()
    took, machines = [], []
    for number in range(engines):
        spec = _spec(f"vm-{number}", "mix")
        core, memory = VcpuCore(fleet_core, number), GuestMemory(spec)
        states = flat.load(spec, memory)
        start = time.perf_counter()
        machine = backend.create(spec, [core], memory, states, bus_locks=True)
        took.append((time.perf_counter() - start) * 1000)
        machines.append((machine, core, memory))
    for machine, core, memory in machines:
        machine.engines[0].close()
        machine.close()
        core.close()
        memory.close()
    fleet_core.close()

    gc.collect()
    before = _resident()
    async with orc.open_fleet(backend="emulated") as fleet:
        vms = [await fleet.launch(_spec(f"vm-{number}", "mix")) for number in range(engines)]
        while any(vm.statistics().bus_locks == 0 for vm in vms):  # noqa: ASYNC110  # nobody tells of all at once
            await trio.sleep(0.01)
        await trio.sleep(options.pick(20, 1) / 10)
        async with trio.open_nursery() as nursery:
            for vm in vms:
                nursery.start_soon(vm.pause)
        each = (_resident() - before - of_guests(vms)) / engines
    middle = median(took)
    return [
        Row(
            what=f"an engine ({engines} of them)",
            measured=f"{each / orc.MiB:.2f} MiB, {middle:.2f} ms to create",
            bound="4 MiB, 2 ms",
            ok=each <= 4 * orc.MiB and middle <= 2,
            note="Memory: growth of the process's RSS for each VM that has run the compute-bound guest, less the "
            "guests' own pages. Time: median, by the clock.",
            details={"bytes_each": each, "create_ms": took},
        )
    ]


async def emulated(options: Options) -> list[Row]:
    """Speed against bare unicorn, launch, kicks, and what an engine takes."""
    bare = Bare.compile(options.build)
    rows = await _engine(options)  # first, while the heap has no room left by others
    rows += await _launch(options)
    rows += await _kicks(options)
    return await _against_bare(options, bare) + rows
