"""Step 3: two tenants share the host's budget, and one of them takes nearly all of it."""

from collections.abc import Mapping

import trio

import orchestra as orc
from orchestra import testing

BUDGET = orc.Limit(rate=100, burst=10)  # bus locks per second, all guests of this host together
TENANTS: Mapping[str, None] = {"acme": None, "globex": None}  # no limits of their own: they are counted


async def launch_all(fleet: orc.Fleet) -> None:
    """acme has one VM, with a moderate use for locks; globex has four that can't get enough."""
    await fleet.launch(testing.split_locking("shop", rate=40, tenant="acme"))
    for number in range(4):
        await fleet.launch(testing.split_locking(f"batch-{number}", rate=1000, tenant="globex"))


async def watch(fleet: orc.Fleet, seconds: float) -> None:
    """Print what each tenant got, and how long its guests were kept waiting for it."""
    before = fleet.statistics().tenants
    await trio.sleep(seconds)
    after = fleet.statistics().tenants
    for name in TENANTS:
        locks = (after[name].bus_locks or 0) - (before[name].bus_locks or 0)
        waited = after[name].throttled_seconds - before[name].throttled_seconds
        print(f"  {name:6}  {locks / seconds:3.0f} locks a second, waited {waited / seconds:4.2f} s in each second")


async def main() -> None:
    async with orc.open_fleet(backend="emulated", limit=BUDGET, tenants=TENANTS) as fleet:
        await launch_all(fleet)
        await watch(fleet, seconds=2)


if __name__ == "__main__":
    trio.run(main)
