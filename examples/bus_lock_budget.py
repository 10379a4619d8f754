"""A budget for a fleet: a noisy guest held to it, changed while it runs.

Its bus locks are seen on any machine: by KVM where the processor reports them, else by the emulated backend. The first
line says which, and why.
"""

import trio

import orchestra as orc

# A split lock and a port write, for ever: lock add dword [0x203e], 1 / out 0x80, al / jmp
NOISY = bytes.fromhex("66f083063e2001 e680 ebf5")


async def main() -> None:
    async with orc.open_fleet(bus_locks="require") as fleet:
        print("backend:", fleet.statistics().why)
        vm = await fleet.launch(orc.VmSpec(name="noisy", boot=orc.FlatImage(code=NOISY)))
        for rate in (200, 50):
            await fleet.set_limit(orc.Limit(rate=rate, burst=10))
            before = vm.statistics().bus_locks or 0
            await trio.sleep(1)
            after = vm.statistics()
            locks = (after.bus_locks or 0) - before
            print(f"limit {rate}/s: {locks} bus locks in a second, throttled: {after.throttled}")
        await fleet.set_limit(None)


if __name__ == "__main__":
    trio.run(main)
