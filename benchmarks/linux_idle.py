"""A Linux guest that has all devices and nothing to do: what still enters Python, and what it costs."""

from __future__ import annotations

import os

import trio

import orchestra as orc

from .linux import BOOTED, made, skipped, spec
from .qemu import cpu
from .row import Options, Row

__all__ = ["devices", "linux_idle"]

MOST = 0.2
SETTLE = 5.0
"""Seconds for what a kernel still does after it has loaded its drivers."""


def devices(image: str) -> tuple[orc.DeviceSpec, ...]:
    """One of each that a Linux guest can have, beside the serial port; the image may be shared."""
    return orc.Disk(image, readonly=True), orc.Rng(), orc.Console()


async def linux_idle(options: Options) -> list[Row]:
    """A bound on the exits that enter Python."""
    if skipped("linux-idle", peer=False):
        return []
    files = made(options.build)
    image = options.build / "idle.img"
    image.write_bytes(bytes(1 << 20))
    seconds = options.pick(60, 2)
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await fleet.launch(spec("idle", files, initrd=files.loaded, devices=devices(str(image))))
        await vm.console.wait_for("ready\r\n", timeout=BOOTED)
        await trio.sleep(SETTLE if not options.quick else 0.5)
        before, used, begun = vm.statistics(), cpu(os.getpid()), trio.current_time()
        await trio.sleep(seconds)
        after, took = vm.statistics(), trio.current_time() - begun
        used = cpu(os.getpid()) - used
    exits = {name: count - before.exits[name] for name, count in after.exits.items() if count != before.exits[name]}
    rate = (after.answers - before.answers) / took
    return [
        Row(
            what="exits of an idle Linux guest that enter Python",
            measured=f"{rate:.2f} a second",
            bound=f"{MOST} a second",
            ok=rate <= MOST,
            note=f"Of {seconds} s, with serial port, disk, entropy, console and the chipset, their drivers loaded. All "
            f"its exits to the VMM meanwhile: {sum(exits.values())}. CPU of the program without the guest's: "
            f"{used / took:.2%} of a core.",
            details={"answers": after.answers - before.answers, "exits": exits, "seconds": took, "cpu": used},
        )
    ]
