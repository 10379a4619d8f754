"""No limits while no VM suffers, tight limits when one does: additive increase, multiplicative decrease (AIMD).

Sources: Chiu and Jain, "Analysis of the increase and decrease algorithms for congestion avoidance" (1989): of the
linear controls, additive increase with multiplicative decrease converges to a fair and efficient point. CUBIC (RFC
9438) has the idea that growth speeds up once the level that hurt last is passed without harm.

    no level      no VM suffers: all are free
    harm          level = decrease * the events of the noisy VMs together; not in the tick after, whose facts are older
    in the clear  level grows by increase * (level that hurt last) a second; above the level that hurt, twofold a second
    all free      once the level has reached the events of the noisy VMs together at the start
    limits        the floor for each noisy VM, and a part of the rest of the level, by weighted max-min

A worked timeline, of ``Adaptive({"cpu_pressure": 0.5}, increase=1.0)`` and two VMs that want 1200 and 400 bus locks a
second. Other VMs suffer above 1000/s, until 0.6 s:

    time  did: a     b  harm   level  limits: a     b
   0.1 s    1200   400  yes     800        400   400
   0.2 s     400   400  no      960        520   520
   0.3 s     520   400  no     1120        680   680
   0.4 s     680   400  yes     540        270   270
   0.5 s     270   270  no      648        324   324
   0.6 s     324   324  no      756        378   378
   0.7 s     378   378  no      864        432   432
   0.8 s     432   400  no      972        486   486
   0.9 s     486   400  no     1080        540   540
   1.0 s     540   400  no     1158        718   718
   1.1 s     718   400  no     1241        801   801
   1.2 s     801   400  no     1330        890   890
   1.3 s     890   400  no     1425        985   985
   1.4 s     985   400  no     1527       1087  1087
   1.5 s    1087   400  no        -          -     -

- 0.1 s: the level is half of the 1600/s that hurt, and each VM may do 400/s. `b` wants no more.
- 0.2 s: in the clear. The level grows by 160/s in each tick, which is 1600/s, the level that hurt last, in a second.
- 0.4 s: there is harm at 1080/s, so the level falls to half of that.
- 1.0 s: 1080/s have passed without harm. From here on the level doubles each second.
- 1.5 s: the level has reached 1600/s, which the two VMs did at the start.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterator, Mapping
from typing import Any, ClassVar, Final

import attrs

from ..model.actions import Throttle, Unthrottle
from ..model.errors import SpecError
from ..model.spec import Limit
from .facts import Facts, VmFacts
from .harm import HARM, VICTIMS, Signals, calm, check_signal
from .maxmin import divide
from .metered import Memory, Metered, presses
from .rates import FASTEST, LATE, LEAST_BURST
from .validation import above, within

__all__ = ["Adaptive"]

MEMORY: Final = 3
"""Ticks for which the demand of a VM is remembered. The largest of them counts, so that a VM which comes and goes does
not move the limits of the others."""

LOWER: Final = 0.02
HIGHER: Final = 0.1
"""The part by which a new limit must be lower or higher than the old one to be set: each new limit is an action and a
row in the journal. While there is harm, a lower limit is always set."""

SLOWLY: Final = 0.1
"""Between the clear and the threshold the level rises at this part of its speed. If the level stood still there, a host
that became somewhat slower for another reason would hold the VMs for ever."""


@attrs.define(eq=False)
class _Vm:
    """A VM that is held back, or would be once it asks for more. Rates are events per second."""

    name: str
    generation: int
    weight: float
    asked: deque[float] = attrs.field(factory=lambda: deque(maxlen=MEMORY))
    rate: float = 0.0
    limit: Limit | None = None
    here: bool = True


@attrs.define(eq=False, slots=False)
class Adaptive(Metered):
    """Hold the noisy VMs back while a signal shows that another VM suffers, and let them go when the harm is over.

    While every signal is below its threshold, the policy limits nothing. When a signal is over its threshold, the VMs
    that do more than the floor get a common level. The first level is `decrease` times what these VMs did together. At
    each look that still finds harm the level is multiplied by `decrease` again, down to the floor. In the clear the
    level rises, each second by `increase` times the level that hurt last. Once it has passed that level without harm,
    the level doubles each second. Between the clear and the threshold the level rises ten times slower. When the level
    has reached what the VMs did at the start, all are free. So after the harm all VMs are free again within
    ``(1 - decrease) / increase + log2(start / level that hurt last)`` seconds in the clear, whatever the load is. If
    the signal stays between the clear and the threshold, they are free within ten times that.

    The level is shared by weighted max-min on top of the floor: the noisiest VMs lose most, and a VM that stays within
    the floor is not limited at all. The VMs within the floor are also the victims whose signals count. If there is
    still harm when all noisy VMs are at the floor, they are not the reason, and the policy does nothing more.

    ``lock_slowdown``, ``memory_slowdown`` and ``work_drop`` compare with what is usual. That is the best value that was
    seen so far, raised only to what is measured while no VM does more than the floor (`orchestra.policy.harm`). So harm
    that lasts or grows slowly stays harm. If a host or a guest is slow for good, and for another reason, the noisy VMs
    spend half a minute at the floor; then the slow value is usual, and they are let go. What was there from the start
    is taken for usual until something better is seen, and each new policy object starts without memory. If you know
    the good value, use ``lock_ns`` with 1.5 times that value, and `clear`: the policy then has nothing to learn.

    Parameters:
        signals: thresholds by signal. There is harm when any signal is over its own. ``lock_slowdown`` and
            ``memory_slowdown``: how many times as long as usual the host's probe takes. ``lock_ns`` and ``memory_ns``:
            the times of the probe themselves, in nanoseconds. ``cpu_pressure``, ``memory_pressure``, ``io_pressure``:
            PSI, 0 to 1. ``run_delay``: of the victim that fares worst, the part of the time in which the VM could have
            run and had no CPU. ``work_drop``: of the victim that fares worst, the part by which the VM worked slower in
            the last second than is usual for it (by the work that it reports, per second in which it could run). A
            signal that is absent counts as no harm.
        clear: where the clear begins, as a part of the way from the calm to the threshold. Times in nanoseconds are
            never 0: with ``lock_ns`` or ``memory_ns``, choose a `clear` above their values in the calm.
        floor: events per second that every VM may always do.
        increase: a part of the level that hurt last, per second.
        decrease: a factor from 0.1 to 0.9.
        meter: the events that are limited.
        interval: seconds between two ticks.
        max_delay: as of `Limit`, in seconds.
        name: the policy's name in the journal.

    Raises:
        SpecError: a parameter is out of its range, or a signal is not known.
    """

    KIND: ClassVar[str] = "adaptive"

    _signals: Mapping[str, float] | None = None
    _clear: float = attrs.field(default=0.5, kw_only=True)
    _floor: float = attrs.field(default=10.0, kw_only=True)
    _increase: float = attrs.field(default=0.1, kw_only=True)
    _decrease: float = attrs.field(default=0.5, kw_only=True)
    _max_delay: float | None = attrs.field(default=1.0, kw_only=True)

    def __attrs_post_init__(self) -> None:
        over = {"lock_slowdown": 1.5, "memory_slowdown": 1.5} if self._signals is None else dict(self._signals)
        if not over:
            raise SpecError("signals={}: name at least one, with its threshold")
        for signal, threshold in over.items():
            above(f"signals[{signal!r}]", threshold, calm(check_signal(signal, HARM)), "(what it is in the calm)")
        within("clear", self._clear, 0, 1, "of the threshold")
        Limit(rate=self._floor, max_delay=self._max_delay)  # checks both
        within("increase", self._increase, 1e-4, 10, "a second")
        within("decrease", self._decrease, 0.1, 0.9, "of the level")
        super().__attrs_post_init__()
        self._over = over
        self._watches_victims = any(signal in VICTIMS for signal in over)
        self._harm = Signals(over, meter=self.meter, floor=self._floor)
        self._vms: Memory[_Vm] = Memory()
        self._level: float | None = None
        self._start = self._hurt = 0.0
        self._settling = False

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals that the policy needs. The fleet switches on what measures them."""
        return tuple(self._over)

    @property
    def level(self) -> float | None:
        """Events per second that the noisy VMs may do together. None: they are free."""
        return self._level

    def decide(self, facts: Facts) -> list[Throttle | Unthrottle]:
        self._harm.look(facts)
        if self._level is None:
            return self._free_so_far(facts)
        self._look(facts)
        harm, clear, evidence = self._judge(facts, self._vms)
        if not self._vms:  # all that were held are gone, or are new VMs of the same names
            self._level = None
            return []
        total = sum(vm.rate for vm in self._vms.values())
        self._start = max(self._start, total)
        least = self._least()
        if harm and not self._settling:
            self._hurt = max(least, min(self._level, total))
            if self._level > least:
                self._harm.begin()
            self._level = self._hurt * self._decrease
            # The facts of the next tick are about the time before the new limits: harm in them is no new harm.
            self._settling = True
        else:
            self._settling = False
            if not harm:
                passed = facts.interval if clear else facts.interval * SLOWLY
                if self._level < self._hurt:
                    self._level += self._increase * self._hurt * passed
                else:
                    self._level *= 2 ** min(passed, 60)
                if self._level >= self._start:
                    return list(self._free(evidence))
        self._level = max(self._level, least)
        return list(self._limits(evidence))

    # ---- what the VMs do, and which suffer --------------------------------------------------------------------------

    def _free_so_far(self, facts: Facts) -> list[Throttle | Unthrottle]:
        """Decide while no VM is held. This runs for each active VM in each tick, so it remembers no VM before harm."""
        most, count = self._floor * facts.interval, self._count
        noisy = {seen.name: seen for seen in facts.vms.values() if (count(seen) or 0) > most}
        harm, _, evidence = self._judge(facts, noisy)
        if not (harm and noisy):
            return []
        for seen in noisy.values():
            self._add(seen, count(seen) / facts.interval)
        return list(self._begin(evidence))

    def _look(self, facts: Facts) -> None:
        """Remember the VMs above the floor. VMs that are held back already stay, whatever they do."""
        self._vms.end(facts.gone)
        for vm in self._vms.values():
            vm.rate, vm.here = 0.0, False
        for seen in facts.vms.values():
            count = self._count(seen)
            if count is None:
                continue
            rate = count / facts.interval
            known = self._vms.of(seen)
            if known is None:
                if rate > self._floor:
                    self._add(seen, rate)
                continue
            known.rate, known.weight, known.here = rate, seen.weight, True
            wants_more = known.limit is not None and presses(seen, facts.interval)
            known.asked.append(math.inf if wants_more else rate)
        for vm in self._vms.values():
            if not vm.here:
                vm.asked.append(0.0)

    def _add(self, seen: VmFacts, rate: float) -> None:
        vm = self._vms[seen.name] = _Vm(seen.name, seen.generation, seen.weight, rate=rate)
        vm.asked.append(rate)

    def _judge(self, facts: Facts, noisy: Container[str]) -> tuple[bool, bool, dict[str, Any]]:
        """Whether there is harm, whether all signals are in the clear, and the figures. Noisy VMs are no victims."""
        victims: list[str] = []
        if self._watches_victims:
            most = self._floor * facts.interval
            victims = [name for name in facts.vms if name not in noisy]
            victims += [name for name, vm in facts.others.items() if (self._count(vm) or 0) <= most]
        harm, clear = False, True
        evidence: dict[str, Any] = {}
        for name, over in self._over.items():
            value, victim = self._harm.worst(name, victims)
            rest = calm(name)
            bad = value is not None and value > over
            harm = harm or bad
            clear = clear and (value is None or value <= rest + self._clear * (over - rest))
            evidence[name] = None if value is None else round(value, 6)
            if bad:
                evidence["threshold"] = over
                evidence["hurts"] = name
                if victim is not None:
                    evidence["victim"] = victim
        return harm, clear, evidence

    # ---- what to do about it ----------------------------------------------------------------------------------------

    def _begin(self, evidence: dict[str, Any]) -> Iterator[Throttle]:
        self._start = self._hurt = sum(vm.rate for vm in self._vms.values())
        self._level = max(self._start * self._decrease, self._least())
        self._harm.begin()
        self._settling = True
        yield from self._limits(evidence)

    def _free(self, evidence: dict[str, Any]) -> Iterator[Unthrottle]:
        self._level = None
        for vm in self._vms.values():
            if vm.limit is not None:
                yield Unthrottle(
                    vm=vm.name,
                    generation=vm.generation,
                    meter=self.meter,
                    reason="nobody suffers any more",
                    evidence=evidence,
                )
        self._vms.clear()

    def _least(self) -> float:
        """The level at which all are at the floor. A VM that asks for less than the floor leaves nothing to the others.

        Demands count with 10 % more, so that a VM which keeps within its share has room to show that it wants more.
        """
        return max(self._floor, sum(min(self._floor, max(vm.asked) * 1.1) for vm in self._vms.values()))

    def _shares(self, level: float) -> dict[str, float]:
        """The share of each VM: the floor and, by weight, a part of the rest of the level.

        What a VM does not ask for goes to the others. When the VM comes back, its limit is as high as theirs, by
        weight.
        """
        vms = list(self._vms.values())
        wants = [max(vm.asked) * 1.1 for vm in vms]
        base = [min(self._floor, want) for want in wants]
        rest = max(0.0, level - sum(base))
        more = divide(rest, [want - b for want, b in zip(wants, base, strict=True)], [vm.weight for vm in vms])
        level_of = [m / vm.weight for m, vm in zip(more, vms, strict=True)]
        water = max([rest / sum(vm.weight for vm in vms) if sum(more) < rest * (1 - 1e-9) else 0.0, *level_of])
        return {vm.name: self._floor + water * vm.weight for vm in vms}

    def _limits(self, evidence: dict[str, Any]) -> Iterator[Throttle]:
        assert self._level is not None
        total = sum(vm.rate for vm in self._vms.values())
        lower = 0.0 if "hurts" in evidence else LOWER
        for name, share in self._shares(self._level).items():
            vm = self._vms[name]
            rate = min(share, FASTEST)
            old = None if vm.limit is None else vm.limit.rate
            if not vm.here or (old is not None and old * (1 - lower) <= rate <= old * (1 + HIGHER)):
                continue  # an idle VM gets its limit when it comes back
            vm.limit = Limit(rate=rate, burst=min(LEAST_BURST + rate * LATE, FASTEST), max_delay=self._max_delay)
            yield Throttle(
                vm=name,
                generation=vm.generation,
                limit=vm.limit,
                meter=self.meter,
                reason=self._reason(rate, evidence),
                evidence={
                    **evidence,
                    "level": round(self._level, 3),
                    "start": round(self._start, 3),
                    "rate": round(vm.rate, 3),
                    "share": round(vm.rate / total, 4) if total else 0.0,
                    "floor": self._floor,
                    "generation": vm.generation,
                },
            )

    def _reason(self, rate: float, evidence: dict[str, Any]) -> str:
        unit = f"{rate:.6g} {self.meter.replace('_', ' ')}/s"
        if "hurts" not in evidence:
            return f"{unit}: let go step by step, as it hurts less"
        name = evidence["hurts"]
        where = f" of {evidence['victim']}" if "victim" in evidence else ""
        return f"{unit}: {name}{where} is {evidence[name]:.4g}, over {evidence['threshold']:g}"
