"""What an exit costs: in the C loop, answered by a Python device, answered by a task."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from statistics import median

import attrs
import trio

import orchestra as orc

from . import floor
from .machine import sees_bus_locks
from .row import Options, Row

__all__ = ["Register", "answer_all", "device", "exit_in_c", "task"]

PORT = 0x80
NO_LIMIT_EVER_REACHED = orc.Limit(rate=1e9)


@attrs.frozen
class Cost:
    """Nanoseconds for one exit: CPU time of the process, and by the clock."""

    cpu: float
    wall: float


async def _window(vm: orc.Vm, seconds: float, reason: str) -> Cost:
    """Let a paused VM run for a while; what one of its exits cost from one reading of the counters to the other."""

    def read() -> tuple[int, int, int]:
        return vm.statistics().exits.get(reason, 0), time.process_time_ns(), time.perf_counter_ns()

    await vm.resume()
    await trio.sleep(seconds / 10)
    before = read()
    await trio.sleep(seconds)
    count, cpu, wall = (b - a for a, b in zip(before, read(), strict=True))
    await vm.pause()
    return Cost(cpu / count, wall / count)


def _median(costs: list[Cost]) -> Cost:
    return Cost(median(c.cpu for c in costs), median(c.wall for c in costs))


def _spec(name: str, guest: str, **more: object) -> orc.VmSpec:
    """What is measured here is what an answer costs: no limit on them."""
    boot = orc.FlatImage(code=floor.guest(guest))
    return orc.VmSpec(name=name, boot=boot, answer_limit=None, **more)  # type: ignore[arg-type]


async def exit_in_c(options: Options) -> list[Row]:
    """An exit that the C loop handles by itself, within budgets at all levels, and without any."""
    locks = sees_bus_locks()
    guest, reason, field = ("buslock", "x86_bus_lock", "limit") if locks else ("write", "io", "exit_limit")
    bare, inside, within, without = [], [], [], []
    library = floor.compile_c("floor.c", options.build / "floor.so", "-shared", "-fPIC")
    tenant = orc.Tenant("budgeted", **{field: NO_LIMIT_EVER_REACHED})  # type: ignore[arg-type]
    async with orc.open_fleet(backend="kvm", tenants=[tenant]) as fleet:
        limits = {field: NO_LIMIT_EVER_REACHED, f"vcpu_{field}": NO_LIMIT_EVER_REACHED}
        limited = await fleet.launch(_spec("limited", guest, tenant="budgeted", **limits), paused=True)
        free = await fleet.launch(_spec("free", guest), paused=True)
        seconds = options.pick(6, 1) / 10
        for _ in range(options.pick(15, 2)):
            bare.append(Cost(*await floor.exits(options.floor, guest, seconds, locks)))
            inside.append(Cost(*await floor.exits_inside(library, guest, seconds, locks)))
            within.append(await _window(limited, seconds, reason))
            without.append(await _window(free, seconds, reason))
    base, here, ours, unlimited = _median(bare), _median(inside), _median(within), _median(without)
    ratio = ours.cpu / base.cpu
    return [
        Row(
            what=f"exit handled in the C loop ({'bus lock' if locks else 'port write'} within 3 budgets)",
            measured=f"{ours.cpu / 1000:.2f} us",
            floor=f"{base.cpu / 1000:.2f} us",
            ratio=ratio,
            bound="1.05x",
            ok=ratio <= 1.05,
            note=f"{CPU_TIME} The same bare loop on a thread of this process: {here.cpu / 1000:.2f} us, "
            f"{here.cpu / base.cpu:.3f} of the floor; ours without budgets: {unlimited.cpu / base.cpu:.3f}.",
            details={
                "cpu_ns": ours.cpu,
                "wall_ns": ours.wall,
                "floor_cpu_ns": base.cpu,
                "floor_wall_ns": base.wall,
                "wall_ratio": ours.wall / base.wall,
                "floor_inside_cpu_ns": here.cpu,
                "floor_inside_ratio": here.cpu / base.cpu,
                "ratio_to_floor_inside": ours.cpu / here.cpu,
                "without_budgets_cpu_ns": unlimited.cpu,
                "without_budgets_ratio": unlimited.cpu / base.cpu,
                "runs": [[cost.cpu for cost in costs] for costs in zip(bare, inside, within, without, strict=True)],
            },
        )
    ]


CPU_TIME = (
    "CPU time of the thread that runs the guest, median of interleaved runs: it does not count when the machine gives "
    "the core to somebody else. By the clock: in the JSON file."
)


class Register:
    """The least that a device can do."""

    def read(self, offset: int, size: int) -> int:
        return 0x2A

    def write(self, offset: int, size: int, value: int) -> None:
        pass


async def device(options: Options) -> list[Row]:
    """A port read answered by a Python device on the vCPU thread."""
    bare, answered = [], []
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(_spec("reader", "read"), paused=True)
        vm.attach(Register(), ports=range(PORT, PORT + 1))
        seconds = options.pick(6, 1) / 10
        for _ in range(options.pick(15, 2)):
            bare.append(Cost(*await floor.exits(options.floor, "read", seconds)))
            answered.append(await _window(vm, seconds, "io"))
    base, ours = _median(bare), _median(answered)
    more = (ours.cpu - base.cpu) / 1000
    return [
        Row(
            what="exit answered by a Python device on the vCPU thread",
            measured=f"{ours.cpu / 1000:.2f} us",
            floor=f"{base.cpu / 1000:.2f} us",
            ratio=ours.cpu / base.cpu,
            bound=f"floor + 1.5 us (is + {more:.2f})",
            ok=more <= 1.5,
            note=CPU_TIME,
            details={
                "cpu_ns": ours.cpu,
                "wall_ns": ours.wall,
                "floor_cpu_ns": base.cpu,
                "floor_wall_ns": base.wall,
                "more_cpu_us": more,
                "more_wall_us": (ours.wall - base.wall) / 1000,
            },
        )
    ]


async def _nothing() -> None:
    pass


async def _hop(seconds: float) -> float:
    """Nanoseconds for one trio.from_thread.run from a worker thread."""

    def worker() -> float:
        hops, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            for _ in range(50):
                trio.from_thread.run(_nothing)
            hops += 50
        return passed / hops * 1e9

    return await trio.to_thread.run_sync(worker)


async def answer_all(requests: object) -> None:
    async for request in requests:  # type: ignore[attr-defined]
        request.answer(b"\x2a")


async def task(options: Options) -> list[Row]:
    """A port read answered by a task."""
    hops, answered, bare, in_c, in_trio = [], [], [], [], []
    library = floor.compile_c("floor.c", options.build / "floor.so", "-shared", "-fPIC")
    async with orc.open_fleet(backend="kvm") as fleet, AsyncExitStack() as stack:
        vm = await fleet.launch(_spec("reader", "read"), paused=True)
        requests = await stack.enter_async_context(vm.requests(ports=range(PORT, PORT + 1)))
        seconds = options.pick(4, 1) / 10
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_all, requests)
            for _ in range(options.pick(15, 2)):
                bare.append(Cost(*await floor.exits(options.floor, "read", seconds)))
                in_c.append(await floor.ping_pong(library, seconds))
                in_trio.append(await floor.ping_task(library, seconds))
                hops.append(await _hop(seconds))
                answered.append(await _window(vm, seconds, "io"))
            nursery.cancel_scope.cancel()
    hop, ours, base = median(hops), _median(answered), _median(bare)
    kernel, empty = median(in_c), median(in_trio)
    ratio = ours.wall / hop
    return [
        Row(
            what="exit answered by an async task",
            measured=f"{ours.wall / 1000:.1f} us",
            floor=f"{hop / 1000:.1f} us",
            ratio=ratio,
            bound="0.5x",
            ok=ratio <= 0.5,
            note="By the clock; the floor is one trio.from_thread.run hop in the same process, while the VM is paused. "
            f"Nothing is subtracted: without the bare exit ({base.wall / 1000:.1f} us) the ratio is "
            f"{(ours.wall - base.wall) / hop:.2f}. The least that this way takes, an eventfd there and a futex back: "
            f"{kernel / 1000:.1f} us between two C threads, {empty / 1000:.1f} us from a C thread to a trio task that "
            f"does nothing else. That and a bare exit: {(empty + base.wall) / hop:.2f} of a hop; ours is "
            f"{ours.wall / (empty + base.wall):.2f} times as much.",
            details={
                "wall_ns": ours.wall,
                "cpu_ns": ours.cpu,
                "hop_ns": hop,
                "bare_exit_ns": base.wall,
                "ratio_without_bare_exit": (ours.wall - base.wall) / hop,
                "ping_pong_ns": kernel,
                "ping_task_ns": empty,
                "least_ratio": (empty + base.wall) / hop,
                "runs": [
                    [bare.wall, *others, answered.wall]
                    for bare, *others, answered in zip(bare, in_c, in_trio, hops, answered, strict=True)
                ],
            },
        )
    ]
