"""A policy of your own: whoever exits too often is held to 100 a second, until it has been quiet for a while."""

from collections.abc import Iterator

import trio

import orchestra as orc

CALM = 0x2000  # a byte in the guest's memory: while it is 0, the guest storms
GUEST = bytes.fromhex("a00020 84c0 75f9 e680 ebf5")  # mov al, [CALM] / test al, al / jnz / out 0x80, al / jmp


class Strict:
    name = "strict"
    interval = 0.1  # seconds between two decisions

    def __init__(self, most: float, calm: float) -> None:
        self.most = most  # exits a second
        self.calm = calm  # seconds without a wait, after which a VM is released
        self.quiet: dict[str, float] = {}  # of the VMs that are held: seconds since they were last throttled

    def decide(self, facts: orc.Facts) -> Iterator[orc.Action]:
        for name, seconds in list(self.quiet.items()):
            vm = facts.vms.get(name)  # only VMs that did something are listed
            self.quiet[name] = 0.0 if vm is not None and vm.throttled else seconds + facts.interval
            if self.quiet[name] >= self.calm:
                del self.quiet[name]
                yield orc.Unthrottle(vm=name, meter=orc.Meter.EXITS, reason=f"quiet for {self.calm:g} seconds")
        for vm in facts.vms.values():
            rate = vm.exits / facts.interval
            if rate > self.most and vm.name not in self.quiet:
                self.quiet[vm.name] = 0.0
                yield orc.Throttle(
                    vm=vm.name,
                    limit=orc.Limit(rate=100),
                    meter=orc.Meter.EXITS,
                    reason=f"more than {self.most:g} exits a second",
                    evidence={"rate": round(rate)},
                )


async def main() -> None:
    async with orc.open_fleet(policies=[Strict(most=500, calm=0.5)]) as fleet:
        vm = await fleet.launch(orc.VmSpec(name="storm", boot=orc.FlatImage(code=GUEST)))
        await trio.sleep(0.5)  # a few ticks of the policy
        before = sum(vm.statistics().exits.values())
        await trio.sleep(1)
        print("held:", sum(vm.statistics().exits.values()) - before < 150)
        vm.write_memory(CALM, b"\x01")
        await trio.sleep(1)
        for applied in fleet.actions():
            assert applied.action is not None
            print(f"{applied.policy}: {type(applied.action).__name__}, {applied.action.reason}")


if __name__ == "__main__":
    trio.run(main)
