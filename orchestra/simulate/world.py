"""One simulated world, tick by tick: guests lock, limits hold them back, other VMs suffer, policies decide and act."""

from __future__ import annotations

from collections.abc import Sequence

from ..policy import Guard
from .arrays import Floats, Ints, generator, np, totals
from .buckets import Buckets, Windows, shared_waits
from .enforcement import SimulatedEnforcement
from .engines import Engines
from .hosts import Hosts
from .layout import Layout
from .metrics import Metrics, Seen
from .policies import Factory, QemuWindow

__all__ = ["World"]

_NONE: Ints = np.empty(0, np.int64)


class World:
    """A layout under one set of policies.

    Attributes:
        now: seconds that have passed.
        locks, throttled, capped, work: the sums of each VM so far: locks made, vCPU seconds of waiting for a bucket,
            vCPU seconds in which a cap held it, and CPU seconds of its own work (for groups that report work).
        bus: for each host, the sum over time of the part of the bus that locks took.
        released: locks that `max_delay` released.
    """

    def __init__(
        self,
        layout: Layout,
        seed: int,
        factories: Sequence[Factory] = (),
        window: QemuWindow | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.layout = layout
        self.scenario = layout.scenario
        self.tick = self.scenario.tick
        self.now = 0.0
        self._step = 0
        groups = self.scenario.vms
        self._crowds = [vms.behaviour.begin(vms.count, generator(seed, 1 + i)) for i, vms in enumerate(groups)]
        self._felt = np.zeros(layout.size)
        self._active: Ints = _NONE
        self.locks, self.throttled, self.capped, self.work = (np.zeros(layout.size) for _ in range(4))
        self.bus = np.zeros(layout.hosts)
        self.released = 0.0
        self.enforcement = SimulatedEnforcement(layout)
        self._windows = None if window is None else Windows(layout.size, window.rate, window.slice)
        self.engines = Engines(layout, self.enforcement, guard or self.scenario.guard, factories)
        self.hosts = Hosts(
            layout,
            factories,
            self,
            engines=self.engines,
            limit=lambda host: self.enforcement.own_limit("host", host),
            engaged=self.enforcement.engaged,
            hindering=self.enforcement.hindering,
        )
        self.tally = Metrics(layout, self.enforcement)
        self._witness_speed = np.array([vms.vcpus * vms.cpu for vms in groups])
        self.hosts.open()
        self.tally.did(self.engines.take())

    def step(self) -> None:
        """One tick."""
        start, tick = self._step * self.tick, self.tick
        end = (self._step + 1) * tick
        vms, wants = self._wants(start)
        layout, enforcement = self.layout, self.enforcement
        vcpus = layout.vcpus[vms]
        host = layout.host[vms]

        # First what a cap, a pause or the quarantine leaves of the demand: limits see only what still runs.
        asked = wants
        if enforcement.hindered:
            duty = enforcement.duty[vms]
            asked = wants * duty
            here = ~enforcement.gone[vms]
            self.capped[vms] += np.where(here & (duty > 0), (1 - duty) * vcpus * tick, 0.0)
        done = self._through(vms, asked, vcpus, host, start)
        waited = (1 - done / np.maximum(asked, 1e-300)) * vcpus * tick
        waited[done >= asked * (1 - 1e-9)] = 0.0
        lost = 1 - done / np.maximum(wants, 1e-300)

        # A bus has only so much time. This comes after the limits: a VM that is slow for that reason is not throttled.
        total = np.bincount(host, done, layout.hosts)
        full = total > layout.capacity * tick
        if full.any():
            done = done * np.where(full, layout.capacity * tick / np.maximum(total, 1e-300), 1.0)[host]
            total = np.minimum(total, layout.capacity * tick)
        share = total / (layout.capacity * tick)

        self.locks[vms] += done
        self.throttled[vms] += waited
        self.bus += share * tick
        self._felt[self._active] = 0.0
        self._active = vms
        self._felt[vms] = lost
        self._suffer(share)
        self.now = end
        self._step += 1
        held = (waited > 0.01 * vcpus * tick) | (asked < 0.99 * wants)
        self.tally.add(Seen(start, end, vms, wants, done, waited, held), share)
        doing = vms[(asked > 0) | (waited > 0)] if enforcement.hindered else vms
        self.engines.end_pauses(end)
        self.hosts.tick(end, doing)
        self.tally.did(self.engines.take())

    def _wants(self, start: float) -> tuple[Ints, Floats]:
        found: list[Ints] = []
        counts: list[Floats] = []
        for crowd, first, vms in zip(self._crowds, self.layout.first, self.scenario.vms, strict=True):
            members, count = crowd.wants(start, self.tick, self._felt[first : first + vms.count])
            if len(members):
                found.append(members + first)
                counts.append(count)
        if not found:
            return _NONE, np.empty(0)
        vms_, wants = np.concatenate(found), np.concatenate(counts)
        if self.enforcement.gone.any():
            here = ~self.enforcement.gone[vms_]
            vms_, wants = vms_[here], wants[here]
        return vms_, wants

    def _through(self, vms: Ints, asked: Floats, vcpus: Floats, host: Ints, start: float) -> Floats:
        """The locks that the limits let through."""
        if not len(vms):
            return asked
        enforcement, tick = self.enforcement, self.tick
        if self._windows is not None:
            limited = np.minimum(asked, self._windows.through(vms, asked, vcpus, start, tick))
        else:
            limited = asked
        levels = [
            (buckets, places)
            for buckets, places in (
                (enforcement.vm, vms),
                (enforcement.pair, self.layout.pair[vms]),
                (enforcement.host, host),
            )
            if buckets.limited
        ]
        if not levels:
            return limited
        think = vcpus * tick / np.maximum(limited, 1e-300)
        wait = np.zeros(len(vms))
        charged: list[tuple[Buckets, Ints, Ints, Ints, Floats]] = []
        for buckets, places in levels:
            under = np.flatnonzero(np.isfinite(buckets.rate[places]) & (limited > 0))
            if not len(under):
                continue
            n, z, least = vcpus[under], think[under], wait[under]
            if buckets is enforcement.vm:  # each has one of its own
                used, index = places[under], np.arange(len(under))
                available = buckets.available(used, start, tick)
                turn = np.maximum(np.maximum(n * tick / available - z, 0.0), buckets.alone(used, n, z))
                wait[under] = np.minimum(turn, buckets.delay[used])
            else:
                used, index = np.unique(places[under], return_inverse=True)
                available = buckets.available(used, start, tick)
                wait[under] = self._shared(buckets, used, index, available, n, z, least)
            charged.append((buckets, under, used, index, available))
        done = np.where(wait > 0, np.minimum(vcpus * tick / (think + wait), limited), limited)
        for buckets, under, used, index, available in charged:
            through = totals(index, done[under], len(used))
            # Rounding must not make locks: an excess over the bucket that is as small as rounding errors is cut.
            over = (through > available) & (through <= available * (1 + 1e-6))
            if over.any():
                done[under] *= np.where(over, available / np.maximum(through, 1e-300), 1.0)[index]
                through = np.where(over, available, through)
            self.released += float(np.maximum(through - available, 0.0).sum())
            buckets.take(used, available, through, start + tick)
        return done

    def _shared(
        self, buckets: Buckets, used: Ints, index: Ints, available: Floats, n: Floats, z: Floats, least: Floats
    ) -> Floats:
        """How long guests wait under shared buckets. `used`: the buckets. `index`: each guest's bucket in `used`."""
        # With one vCPU under a bucket, its own time to think is the bucket's.
        alone = buckets.alone(used, totals(index, n, len(used)), totals(index, z, len(used)))
        least = np.maximum(least, np.minimum(alone, buckets.delay[used])[index])
        short = totals(index, n * self.tick / (z + least), len(used)) > available * (1 + 1e-12)
        if not short.any():
            return least
        some = short[index]
        number = (np.cumsum(short) - 1)[index[some]]
        turns = shared_waits(number, n[some], z[some], least[some], available[short] / self.tick)
        turns = np.minimum(turns, buckets.delay[used[short]])
        waits = least.copy()
        waits[some] = np.maximum(least[some], turns[number])
        return waits

    def _suffer(self, share: Floats) -> None:
        witnesses = self.hosts.witnesses
        if len(witnesses):
            layout = self.layout
            slower = (
                1 + layout.memory_share[layout.group[witnesses]] * ((layout.worst - 1) * share)[layout.host[witnesses]]
            )
            speed = self._witness_speed[layout.group[witnesses]] * self.enforcement.duty[witnesses]
            self.work[witnesses] += speed * self.tick / slower
