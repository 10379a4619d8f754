"""Two VMs in one fleet: one crashes, and the other does not notice."""

import trio

import orchestra as orc

# inc dword [0x8000] / out 0x80, al / jmp: counts in its memory, and gives the host an exit each time
COUNTER = bytes.fromhex("66ff060080 e680 ebf7")
# ud2 in protected mode, without a handler for any fault: a triple fault
CRASH = bytes.fromhex("0f0b")


async def main() -> None:
    async with orc.open_fleet() as fleet:
        good = await fleet.launch(orc.VmSpec(name="good", boot=orc.FlatImage(code=COUNTER)))
        bad = await fleet.launch(orc.VmSpec(name="bad", boot=orc.FlatImage(code=CRASH, mode=32)))

        print("bad ended:", await bad.wait())
        async with fleet.exits(orc.Io, vm=good, capacity=16) as exits:
            await exits.receive()  # proof of life, after the other's end
        print("good is", good.state)

        await good.pause()
        count = int.from_bytes(good.read_memory(0x8000, 4), "little")
        print("good counted:", "some" if count else "nothing")
        print("good ended:", await good.stop())


if __name__ == "__main__":
    trio.run(main)
