"""Which instruction is guilty: a guest that locks the bus at two places, and the profile that names them."""

import trio

import orchestra as orc
from orchestra.profile.folded import folded

# mov cx, 3 / refcount_get: lock add dword [0x203e], 1 / loop refcount_get / spin_lock: xchg [0x203e], ebx / jmp
GUEST = bytes.fromhex("b90300 66f083063e2001 e2f7 66871e3e20 ebed")
# From the guest's own file: orc.Symbols.load("vmlinux"), or "System.map". Here by hand: address, size, name.
SYMBOLS = orc.Symbols([(0x1003, 9, "refcount_get"), (0x100C, 5, "spin_lock")])


async def main() -> None:
    async with orc.open_fleet(bus_locks="require") as fleet:
        # One lock of 20, and not of 100, as this is a short run.
        vm = await fleet.launch(orc.VmSpec(name="web-1", boot=orc.FlatImage(code=GUEST), sample_every=20))
        await trio.sleep(1)
        profile = vm.profile(symbols=[SYMBOLS])
        print(f"{profile.bus_locks} bus locks, {profile.samples} of them sampled")
        for guilty in profile.instructions:
            print(f"{guilty.share:4.0%}  {guilty.place:14} {guilty.text}")
        print("\nfor a flame graph:")
        for line in folded(profile):
            print(line)


if __name__ == "__main__":
    trio.run(main)
