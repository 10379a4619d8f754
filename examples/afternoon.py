"""An afternoon with noisy neighbours, in a minute: quiet, one VM makes a noise, then a second one, then it is over.

Choose a policy to live it under, and ask the journal afterwards:

    python examples/afternoon.py --policy ladder --journal afternoon.db
    orchestra why noisy-1 --journal afternoon.db --at 14:05:06
    orchestra guilty noisy-1 --journal afternoon.db
    orchestra journal afternoon.db
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import trio

import orchestra as orc
from orchestra.journal import Journal

# A guest that asks, at port 0x500, how many locks it is to make, makes them, and asks again:
#         mov dx, 0x500
# ask:    in ax, dx
#         mov cx, ax
#         jcxz ask
# refill: lock add dword [0x203e], 1      it crosses a cache line
#         loop refill
#         jmp ask
GUEST = bytes.fromhex("ba0005 ed 89c1 e3fb 66f083063e2001 e2f7 ebf0")
GUILTY = 0x1008
ASKS = range(0x500, 0x502)

QUIET = 20.0
BATCHES = 50  # how often a second a guest hears that there is work

SHOWN = 20  # actions, for a person

NAMES = ("quiet-1", "quiet-2", "noisy-1", "noisy-2")


@attrs.frozen
class Phase:
    """A part of the afternoon: seconds, and what VMs want that want more than they do when it is quiet."""

    name: str
    seconds: float
    wants: Mapping[str, float]


def phases(noise: float, length: float) -> list[Phase]:
    return [
        Phase("quiet", length, {}),
        Phase("one is noisy", length, {"noisy-1": noise}),
        Phase("two are noisy", length, {"noisy-1": noise, "noisy-2": noise}),
        Phase("recovery", 2 * length, {}),
    ]


def policies(noise: float) -> dict[str, list[orc.Policy]]:
    """Each kind of policy, for guests that want so many locks a second when they are noisy."""
    bad = orc.Condition("bus_locks", over=noise / 4)
    steps = [
        orc.Step(rung="warn", when=bad, clear=0.5),
        orc.Step(rung="throttle", when=bad, dwell=0.5, clear=1.0, limit=orc.Limit(rate=noise / 8, max_delay=1.0)),
        orc.Step(rung="cap_cpu", when=bad, dwell=2, clear=1.0, cpu=0.5),
    ]
    budget = orc.Limit(rate=noise / 4, burst=noise / 20, max_delay=1.0)
    return {
        "none": [],
        "static": [orc.StaticLimits({"noisy-*": attrs.evolve(budget, rate=noise / 8)})],
        "share": [orc.WeightedShare(budget)],
        # What this budget is of the bus of a CPU of 2 GHz, at 7,000 cycles a lock.
        "bus-time": [orc.BusTime(share=noise / 4 * 7000 / 2e9)],
        "credits": [orc.BurstCredits(baseline=noise / 8, most=noise)],
        # Somebody suffers when somebody waits for a CPU a twelfth of the time: two storms are enough for two CPUs, and
        # one is not. (Measured: 2 to 6 % without them, 10 to 19 % with both.)
        "adaptive": [orc.Adaptive({"cpu_pressure": 0.08}, floor=2 * QUIET, increase=0.5)],
        "ladder": [orc.Ladder(steps)],
    }


@attrs.define
class Client:
    """Whoever a guest works for: wants so many locks a second, and has them made in small batches."""

    wants: float = QUIET

    async def serve(self, vm: orc.Vm, *, task_status: trio.TaskStatus[None]) -> None:
        async with vm.requests(ports=ASKS) as requests:
            await vm.resume()  # not before, as a port that nobody has claimed reads as 0xffff
            task_status.started()
            due, since = 0.0, trio.current_time()
            async for request in requests:
                while due < 1:
                    await trio.sleep(max(1 / BATCHES, (1 - due) / self.wants))
                    now = trio.current_time()
                    # What a guest could not do for being held is not asked of it later.
                    due, since = min(due + self.wants * (now - since), max(1.0, 2 * self.wants / BATCHES)), now
                request.answer(int(due).to_bytes(2, "little"))
                due -= int(due)


@attrs.frozen
class Lived:
    """A phase as it was: from and to on the wall clock, locks a second by VM, and whose vCPUs were made to wait."""

    phase: Phase
    begin: float
    end: float
    rates: Mapping[str, float]
    held: frozenset[str]


@attrs.frozen
class Afternoon:
    """All of it. `counted`: bus locks by VM, as the fleet counted them. `done`: its memory of what was done."""

    lived: tuple[Lived, ...]
    counted: Mapping[str, int]
    done: tuple[orc.Applied, ...]


async def live(
    journal: Path,
    chosen: list[orc.Policy],
    plan: list[Phase],
    backend: str | orc.EmulatedBackend = "auto",
) -> Afternoon:
    """Live through it; the journal is whole when this returns."""
    lived: list[Lived] = []
    counted: dict[str, int] = {}
    async with orc.open_fleet(
        backend=backend, bus_locks="require", policies=chosen, journal=Journal(journal), journal_interval=0.25
    ) as fleet:
        print(f"backend {fleet.backend.why}\n")
        async with trio.open_nursery() as nursery:
            clients = {name: Client() for name in NAMES}
            for name, client in clients.items():
                spec = orc.VmSpec(name=name, boot=orc.FlatImage(code=GUEST), sample_every=20)
                await nursery.start(client.serve, await fleet.launch(spec, paused=True))
            for phase in plan:
                for name, client in clients.items():
                    client.wants = phase.wants.get(name, QUIET)
                lived.append(await watch(fleet, phase))
            for vm in list(fleet.vms.values()):
                await vm.stop("the afternoon is over")  # with it ends its client
                counted[vm.name] = vm.statistics().bus_locks or 0
        done = fleet.actions()
    return Afternoon(tuple(lived), counted, done)


async def watch(fleet: orc.Fleet, phase: Phase) -> Lived:
    """Wait until it is over, and tell what the VMs did."""
    begin, before = time.time(), {name: vm.statistics() for name, vm in fleet.vms.items()}
    await trio.sleep(phase.seconds)
    end, rates, held = time.time(), {}, set()
    for name, vm in fleet.vms.items():
        now, then = vm.statistics(), before[name]
        rates[name] = ((now.bus_locks or 0) - (then.bus_locks or 0)) / (end - begin)
        if now.throttled_seconds - then.throttled_seconds > 0.05 * (end - begin):
            held.add(name)
    return Lived(phase, begin, end, rates, frozenset(held))


def told(afternoon: Afternoon) -> Iterator[str]:
    """For a person: what each VM did in each phase, * where it was held; and what was done about it."""
    yield f"{'bus locks/s':15}" + "".join(f"{name:>10} " for name in NAMES)
    for lived in afternoon.lived:
        cells = (f"{lived.rates[name]:10,.0f}{'*' if name in lived.held else ' '}" for name in NAMES)
        yield f"{lived.phase.name:15}" + "".join(cells).rstrip()
    yield ""
    actions = [done.action for done in afternoon.done if done.policy is not None and done.action is not None]
    for action in actions[:SHOWN]:
        yield f"{type(action).__name__:10} {action.vm or 'the host':9} {action.reason}"
    if len(actions) > SHOWN:
        yield f"and {len(actions) - SHOWN} more"


async def show(arguments: argparse.Namespace) -> None:
    chosen, plan = policies(arguments.noise)[arguments.policy], phases(arguments.noise, arguments.length)
    journal = arguments.journal or Path(tempfile.mkdtemp(prefix="afternoon-")) / "afternoon.db"
    afternoon = await live(journal, chosen, plan, arguments.backend)
    print(*told(afternoon), sep="\n")
    when = time.localtime(afternoon.lived[1].end)
    print(f"\norchestra why noisy-1 --journal {journal} --at {time.strftime('%H:%M:%S', when)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="An afternoon with noisy neighbours.")
    parser.add_argument("--policy", choices=list(policies(1000)), default="ladder")
    parser.add_argument("--journal", type=Path, help="a file; it may be there already (default: one in a new folder)")
    parser.add_argument("--noise", type=float, default=2000, help="locks a second that a noisy VM wants")
    parser.add_argument("--length", type=float, default=5, help="seconds of each phase; the recovery has twice that")
    parser.add_argument("--backend", choices=["auto", "kvm", "emulated"], default="auto")
    trio.run(show, parser.parse_args())


if __name__ == "__main__":
    main()
