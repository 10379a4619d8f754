"""A fleet in an asyncio program: the same names, awaited in asyncio, with asyncio's own timeouts and task groups."""

import asyncio
from itertools import pairwise

import orchestra as orc
import orchestra.aio

COUNTER = bytes.fromhex("e680 fec0 ebfa")  # out 0x80, al / inc al / jmp


async def watch(fleet: orc.aio.Fleet, vm: orc.aio.Vm, most: int) -> None:
    counts = []
    async with fleet.exits(orc.Io, vm=vm) as exits:
        async for exit in exits:
            assert isinstance(exit, orc.Io)
            counts.append(exit.data[0])
            if len(counts) == most:
                break
    steps = {(after - before) % 256 for before, after in pairwise(counts)}
    print(f"{vm.name} counted {most} times, in steps of {steps}")


async def main() -> None:
    async with orc.aio.open_fleet() as fleet:
        boot = orc.FlatImage(code=COUNTER)
        vms = [await fleet.launch(orc.VmSpec(name=name, boot=boot)) for name in ("one", "two")]
        await fleet.set_limit(orc.Limit(rate=1000, burst=10), meter="exits")

        async with asyncio.TaskGroup() as group:
            for vm in vms:
                group.create_task(watch(fleet, vm, most=100))

        try:
            async with asyncio.timeout(0.1):
                await vms[0].wait()
        except TimeoutError:
            print("one is", vms[0].state)
        print("one ended:", await vms[0].stop())
    print("two ended:", vms[1].outcome)


if __name__ == "__main__":
    asyncio.run(main())
