"""Boot Linux, run a command in its shell, and let it power off: python linux.py vmlinuz initrd.cpio"""

import sys

import trio

import orchestra as orc

PROMPT = "# "


async def main(kernel: str, initrd: str) -> None:
    spec = orc.VmSpec(
        name="linux",
        memory=256 * orc.MiB,
        boot=orc.LinuxBoot(kernel=kernel, initrd=initrd, cmdline="quiet"),
        devices=[orc.Serial()],
    )
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await fleet.launch(spec)
        await vm.console.wait_for(PROMPT, timeout=120)
        await vm.console.write("uname -sm\n")
        answer = await vm.console.wait_for(PROMPT, timeout=60)
        print(answer.decode().splitlines()[1])  # the first line is the echo of what we typed
        await vm.console.write("poweroff -f\n")
        print(await vm.wait())
        print(vm.statistics().exits)


kernel, initrd = sys.argv[1:]
trio.run(main, kernel, initrd)
