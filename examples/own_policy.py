"""A policy of your own: whoever exits too often is held to 100 a second, until it has been quiet for a while."""

from collections.abc import Iterator

import trio

import orchestra as orc

STORM = bytes.fromhex("e680 ebfc")  # out 0x80, al / jmp


class Strict:
    name = "strict"
    interval = 0.1  # seconds between two decisions

    def __init__(self, most: float) -> None:
        self.most = most
        self.held: set[str] = set()

    def decide(self, facts: orc.Facts) -> Iterator[orc.Action]:
        for vm in facts.vms.values():
            rate = vm.exits / facts.interval
            if rate > self.most and vm.name not in self.held:
                self.held.add(vm.name)
                yield orc.Throttle(
                    vm=vm.name,
                    limit=orc.Limit(rate=100),
                    meter=orc.Meter.EXITS,
                    reason=f"more than {self.most:g} exits a second",
                    evidence={"rate": round(rate)},
                )


async def main() -> None:
    async with orc.open_fleet(policies=[Strict(most=500)]) as fleet:
        vm = await fleet.launch(orc.VmSpec(name="storm", boot=orc.FlatImage(code=STORM)))
        await trio.sleep(0.5)  # a few ticks of the policy
        for applied in fleet.actions():
            assert applied.action is not None
            print(f"{applied.policy}: {applied.action.reason}")
        before = sum(vm.statistics().exits.values())
        await trio.sleep(1)
        print("held:", sum(vm.statistics().exits.values()) - before < 150)


if __name__ == "__main__":
    trio.run(main)
