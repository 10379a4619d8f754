"""One budget for the VMs of two processes, changed by one of them for both.

The second process inherits the budget's descriptor. It could as well receive it over a socket. When it is killed, the
first one has all of the budget.
"""

import subprocess
import sys

import trio

import orchestra as orc

# out 0x80, al / jmp: an exit each time
GREEDY = orc.FlatImage(code=bytes.fromhex("e680 ebfc"))


def exits(vm: orc.Vm) -> int:
    return vm.statistics().exits.get("io", 0)


async def second(fd: int) -> None:
    """Run a greedy guest under that budget, and say how often it came out whenever somebody asks."""
    with orc.HostBudget.attach(fd) as budget:
        async with orc.open_fleet(host_budget=budget, bus_locks="off") as fleet:
            vm = await fleet.launch(orc.VmSpec(name="second", boot=GREEDY))
            while await trio.to_thread.run_sync(sys.stdin.readline):
                print(exits(vm), flush=True)


class Second:
    """The other process."""

    def __init__(self, budget: orc.HostBudget) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(budget.fd)],
            pass_fds=[budget.fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def exits(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("how many?", file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


async def first() -> None:
    with orc.HostBudget.create(exit_limit=orc.Limit(rate=1000, burst=10)) as budget:
        other = Second(budget)
        with other.process:
            async with orc.open_fleet(host_budget=budget, bus_locks="off") as fleet:
                vm = await fleet.launch(orc.VmSpec(name="first", boot=GREEDY))
                for rate in (1000, 200):
                    budget.set_limit(orc.Limit(rate=rate, burst=10), meter="exits")
                    theirs, ours = other.exits(), exits(vm)
                    await trio.sleep(1)
                    print(f"{rate}/s for both: {exits(vm) - ours} here, {other.exits() - theirs} there")
                other.process.kill()
                other.process.wait()
                ours = exits(vm)
                await trio.sleep(1)
                print(f"200/s for what is left: {exits(vm) - ours} here")


if __name__ == "__main__":
    trio.run(second, int(sys.argv[1])) if len(sys.argv) > 1 else trio.run(first)
