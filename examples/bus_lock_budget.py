"""A budget for a fleet: a noisy guest held to it, changed while it runs.

Where the host's KVM reports no bus locks the same is shown with exits, which every host can meter.
"""

import trio

import orchestra as orc

# A split lock and a port write, for ever: lock add dword [0x203e], 1 / out 0x80, al / jmp
NOISY = bytes.fromhex("66f083063e2001 e680 ebf5")


async def main() -> None:
    try:
        fleet_context = orc.open_fleet(limit=orc.Limit(rate=200, burst=10), bus_locks="require")
        async with fleet_context as fleet:
            await show(fleet, orc.Meter.BUS_LOCKS)
    except orc.BusLockUnsupported:
        print("this host reports no bus locks: the budget is one of exits")
        async with orc.open_fleet(exit_limit=orc.Limit(rate=200, burst=10)) as fleet:
            await show(fleet, orc.Meter.EXITS)


async def show(fleet: orc.Fleet, meter: orc.Meter) -> None:
    vm = await fleet.launch(orc.VmSpec(name="noisy", boot=orc.FlatImage(code=NOISY)))
    for rate in (200, 50):
        await fleet.set_limit(orc.Limit(rate=rate, burst=10), meter=meter)
        before = count(vm, meter)
        await trio.sleep(1)
        after = vm.statistics()
        print(f"limit {rate}/s: {count(vm, meter) - before} {meter} in a second, throttled: {after.throttled}")
    await fleet.set_limit(None, meter=meter)


def count(vm: orc.Vm, meter: orc.Meter) -> int:
    statistics = vm.statistics()
    return statistics.bus_locks or 0 if meter is orc.Meter.BUS_LOCKS else sum(statistics.exits.values())


if __name__ == "__main__":
    trio.run(main)
