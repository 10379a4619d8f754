"""A small control plane: customers' machines on one host, each with the limit of its plan.

It restarts what crashes, and pauses a machine that was held back for most of a minute, until somebody has looked at it.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

import orchestra as orc

PLANS = {
    "small": orc.Limit(rate=50, burst=10),
    "large": orc.Limit(rate=500, burst=100),
}
LOOK = 10.0  # seconds from one look at the machines to the next
LOOKS = 6  # held back at so many in a row: paused
HELD_BACK = 0.5  # of the time in between


class ControlPlane:
    """Run `watch` beside it."""

    def __init__(self, fleet: orc.Fleet, alert: Callable[[str], None]) -> None:
        self.fleet = fleet
        self.alert = alert
        self._seen: dict[str, tuple[float, int]] = {}  # seconds throttled until the last look, and looks in a row

    async def create(self, customer: str, name: str, image: orc.BootSpec, plan: str = "small") -> orc.Vm:
        return await self.fleet.launch(
            orc.VmSpec(
                name=f"{customer}.{name}",
                boot=image,
                limit=PLANS[plan],
                labels={"customer": customer, "plan": plan},
                restart=orc.Restart(when="on-failure", most=3),
            )
        )

    async def watch(self) -> None:
        while True:
            await trio.sleep(LOOK)
            for vm in list(self.fleet.vms.values()):
                if vm.state is orc.State.RUNNING:
                    await self._look_at(vm)

    async def _look_at(self, vm: orc.Vm) -> None:
        throttled = vm.statistics().throttled_seconds
        before, looks = self._seen.get(vm.name, (0.0, 0))
        looks = looks + 1 if throttled - before > HELD_BACK * LOOK else 0
        self._seen[vm.name] = throttled, looks
        if looks == LOOKS:
            self._seen[vm.name] = throttled, 0
            await self.fleet.apply(orc.Pause(vm=vm.name, reason="held back for a minute"))
            self.alert(f"{vm.name} is paused: {vm.statistics().bus_locks} bus locks")
