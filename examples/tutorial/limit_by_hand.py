"""Step 2: a guest that locks the bus as fast as it can, and a limit set, changed and taken away while it runs."""

import trio

import orchestra as orc

# lock add dword [0x203e], 1 / jmp: the loop of step 1, without an end
CODE = bytes.fromhex("f06683063e2001 ebf7")


async def watch(vm: orc.Vm) -> str:
    before = vm.statistics()
    await trio.sleep(1)
    after = vm.statistics()
    locks = (after.bus_locks or 0) - (before.bus_locks or 0)
    return f"{locks} locks in a second, waited {after.throttled_seconds - before.throttled_seconds:.2f} s of it"


async def main() -> None:
    async with orc.open_fleet(backend="emulated") as fleet:
        vm = await fleet.launch(orc.VmSpec(name="noisy", boot=orc.FlatImage(code=CODE)))
        print("no limit:", await watch(vm))

        await vm.set_limit(orc.Limit(rate=100, burst=10))
        print("100 a second:", await watch(vm))

        await vm.set_limit(None)
        print("no limit again:", await watch(vm))


if __name__ == "__main__":
    trio.run(main)
