"""Step 1: a guest that locks the bus five times and halts. Every lock is seen."""

import trio

import orchestra as orc

COUNTER = 0x203E  # 4 bytes in the guest's memory; a cache line ends after the second

# mov cx, 5 / again: lock add dword [COUNTER], 1 / dec cx / jnz again / hlt
CODE = bytes.fromhex("b90500 f0668306") + COUNTER.to_bytes(2, "little") + bytes.fromhex("01 49 75f6 f4")


async def main() -> None:
    async with orc.open_fleet(backend="emulated") as fleet:
        spec = orc.VmSpec(name="first", boot=orc.FlatImage(code=CODE, load=0x1000, mode=16))
        vm = await fleet.launch(spec, paused=True)  # so that nothing happens before we look
        async with fleet.exits(orc.BusLock, vm=vm) as locks:
            await vm.resume()
            async for lock in locks:  # until the guest ends
                print(f"a bus lock at {lock.rip:#x}")
        print(await vm.wait())
        print(vm.statistics().bus_locks, "bus locks")
        print("the guest counted to", int.from_bytes(vm.read_memory(COUNTER, 4), "little"))


if __name__ == "__main__":
    trio.run(main)
