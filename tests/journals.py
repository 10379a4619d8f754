"""Journals of made-up afternoons, as a fleet would have written them; times are seconds since `BEGIN`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import orchestra as orc
from orchestra.journal import Journal

SECOND = 1_000_000_000
BEGIN = 1_760_000_000 * SECOND
"""Some day in October 2025."""


class Afternoon:
    """Writes a journal second by second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path, keep_days=36500)
        self.journal.begin(time.time_ns(), "kvm", "fault-like")
        self.journal._offset = 0  # its fleet's clock is that of the wall, to the nanosecond
        self.seconds = 0

    @property
    def now(self) -> int:
        return BEGIN + self.seconds * SECOND

    def state(self, vm: str, state: str, *, generation: int = 1, tenant: str = "acme", reason: str = "") -> None:
        self.journal.state(self.now, vm, generation, tenant, state, reason)

    def applied(self, action: orc.Action | None, policy: str | None = None, **more: object) -> None:
        self.journal.action(orc.Applied(time=self.now, action=action, policy=policy, **more))  # type: ignore[arg-type]

    def second(self, *vms: orc.VmFacts, limit: orc.Limit | None = None, **host: object) -> orc.Facts:
        """What happened in one more second."""
        self.seconds += 1
        facts = orc.Facts(
            self.now,
            1.0,
            limit,
            None,
            {},
            {vm.name: vm for vm in vms},
            orc.HostFacts(cpus=4, **host),  # type: ignore[arg-type]
        )
        self.journal.aggregate(facts)
        return facts

    def close(self) -> None:
        self.journal.end(self.now)


def vm(name: str, locks: float | None = 0, *, tenant: str = "acme", exits: int = 100, **more: object) -> orc.VmFacts:
    fields: dict[str, object] = {"weight": 1.0, "vcpus": 1, "throttled": 0.0, "generation": 1, **more}
    count = None if locks is None else round(locks)
    return orc.VmFacts(name=name, tenant=tenant, bus_locks=count, exits=exits, **fields)  # type: ignore[arg-type]


def lived(
    afternoon: Afternoon,
    seconds: int,
    wants: Mapping[str, Callable[[int], float]],
    policies: Iterable[orc.Policy] = (),
    *,
    lock_ns: float | None = 14.0,
) -> None:
    """VMs that want so many locks a second at a time, under policies; throttles of VMs are kept to, to the event.

    Each lock of the others costs a VM 100 microseconds of waiting for a CPU, and the host's probe 0.01 ns.
    """
    limits: dict[tuple[str, str], float] = {}
    policies = list(policies)
    for second in range(seconds):
        did, facts = {}, []
        for name, want in wants.items():
            held = min([rate for (of, _), rate in limits.items() if of == name], default=float("inf"))
            wanted = want(second)  # once: it may be drawn by lot
            did[name] = (min(wanted, held), wanted)
        for name, (got, wanted) in did.items():
            others = sum(other for of, (other, _) in did.items() if of != name)
            waited = 1 - got / wanted if wanted else 0.0
            facts.append(
                vm(
                    name,
                    got,
                    throttled=waited,
                    throttled_by={"vm.bus_locks": waited} if waited else {},
                    cpu=0.5 * (1 - waited),
                    run_delay=0.01 + 1e-4 * others,
                    capped=0.0,
                )
            )
        total = sum(got for got, _ in did.values())
        probe = {} if lock_ns is None else {"lock_ns": lock_ns + 0.01 * total}
        told = afternoon.second(*facts, cpu_pressure=0.1, **probe)
        for policy in policies:
            for action in policy.decide(told):
                afternoon.applied(action, policy.name)
                if isinstance(action, orc.Throttle) and action.vm:
                    limits[action.vm, policy.name] = action.limit.rate
                elif isinstance(action, orc.Unthrottle) and action.vm:
                    limits.pop((action.vm, policy.name), None)
