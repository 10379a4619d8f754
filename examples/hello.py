"""Hello from a guest: 16-bit code that writes to a debug console and halts."""

import trio

import orchestra as orc

# mov si, text / again: lodsb / test al, al / jz done / out 0xe9, al / jmp again / done: hlt / text: "..."
CODE = bytes.fromhex("be0e10 ac 84c0 7404 e6e9 ebf7 f4 f4") + b"Hello from a guest!\n\0"


async def main() -> None:
    async with orc.open_fleet() as fleet:
        vm = await fleet.launch(
            orc.VmSpec(
                name="hello",
                boot=orc.FlatImage(code=CODE, load=0x1000, mode=16),
                devices=[orc.DebugConsole()],
            )
        )
        outcome = await vm.wait()
        print(vm.console.text, end="")
        print(outcome)


if __name__ == "__main__":
    trio.run(main)
