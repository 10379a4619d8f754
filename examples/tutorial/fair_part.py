"""Step 4: a policy. When the host's budget runs short, no tenant takes more than an equal part of it."""

from collections.abc import Iterator

import orchestra as orc


class FairPart:
    name = "fair-part"
    interval = 0.2  # seconds between two decisions
    meter = orc.Meter.BUS_LOCKS  # where bus locks can't be seen, a fleet refuses this policy when it opens

    def __init__(self, *, patience: float = 1.0) -> None:
        self.patience = patience
        self._held: dict[str, int] = {}  # tenant: when it last took as much as it may, by the facts' clock

    def decide(self, facts: orc.Facts) -> Iterator[orc.Action]:
        if facts.limit is None:
            return  # no budget, nothing to share
        rates = dict.fromkeys(facts.tenants, 0.0)
        for vm in facts.vms.values():
            rates[vm.tenant] += (vm.bus_locks or 0) / facts.interval
        part = facts.limit.rate / max(1, sum(rate > 0 for rate in rates.values()))
        short = sum(rates.values()) > 0.9 * facts.limit.rate

        for tenant, rate in rates.items():
            if tenant not in self._held and short and rate > part:
                self._held[tenant] = facts.time
                yield orc.Throttle(
                    tenant=tenant,
                    limit=orc.Limit(rate=part),
                    reason="took more than its part of a budget that ran short",
                    evidence={"rate": round(rate), "part": round(part)},
                )
            elif tenant in self._held and rate > part / 2:
                self._held[tenant] = facts.time
            elif tenant in self._held and facts.time - self._held[tenant] > self.patience * 1e9:
                del self._held[tenant]
                yield orc.Unthrottle(tenant=tenant, reason=f"took little for {self.patience:g} s")
