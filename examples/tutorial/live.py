"""Step 6: the policy at work on guests, and the journal that says what it did and why."""

import trio

import orchestra as orc
from fair_part import FairPart
from two_tenants import BUDGET, TENANTS, launch_all, watch


async def main() -> None:
    async with orc.open_fleet(backend="emulated", limit=BUDGET, tenants=TENANTS, policies=[FairPart()]) as fleet:
        opened = fleet.now()
        await launch_all(fleet)
        await trio.sleep(0.5)  # two ticks: the policy has seen enough
        await watch(fleet, seconds=2)

        print("globex stops its VMs")
        for number in range(4):
            await fleet.vms[f"batch-{number}"].stop()
        await trio.sleep(1.5)

        for applied in fleet.actions():
            match applied.action:
                case orc.Throttle() | orc.Unthrottle() as action:
                    print(f"{(applied.time - opened) / 1e9:.1f} s: {type(action).__name__} by {applied.policy}")
                    print(f"  {action.tenant or action.vm} {action.reason}")
                    for what, figure in action.evidence.items():
                        print(f"  {what}: {figure}")


if __name__ == "__main__":
    trio.run(main)
