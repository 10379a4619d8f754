"""A port answered by async code: the guest asks for a number, a task fetches it and answers."""

import trio

import orchestra as orc

# in al, 0x50 / add al, 1 / out 0x51, al / hlt
CODE = bytes.fromhex("e450 0401 e651 f4")


async def fetch_number() -> int:
    await trio.sleep(0.01)  # a database, an HTTP call, another VM
    return 41


async def main() -> None:
    async with orc.open_fleet() as fleet:
        vm = await fleet.launch(orc.VmSpec(name="asks", boot=orc.FlatImage(code=CODE)), paused=True)
        async with vm.requests(ports=range(0x50, 0x52)) as requests:
            await vm.resume()
            async for request in requests:
                if request.write:
                    print("the guest says", request.data[0])
                    request.answer()
                else:
                    request.answer((await fetch_number()).to_bytes(request.size, "little"))
        print(await vm.wait())


if __name__ == "__main__":
    trio.run(main)
