"""Free while nobody suffers, tight when somebody does: additive increase, multiplicative decrease (AIMD).

Sources: Chiu and Jain, "Analysis of the increase and decrease algorithms for congestion avoidance" (1989): of the
linear controls, additive increase with multiplicative decrease converges to a fair and efficient point. That growth
speeds up once the level that last hurt is passed without harm is CUBIC's idea (RFC 9438).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from ..model.actions import Throttle, Unthrottle
from ..model.errors import SpecError
from ..model.spec import Limit, Meter, as_meter
from .facts import Facts, VmFacts, count_of
from .harm import HARM, Signals, calm, check_signal
from .maxmin import max_min
from .validation import above, within

__all__ = ["Adaptive"]

WAITED: Final = 0.05
"""Part of a tick that a VM waited for its turn, from which it counts as wanting more than it got."""

LATE: Final = 0.05
"""Seconds by which a vCPU may come late to its turn and still catch up: what the bursts are made for."""

AHEAD: Final = 2
"""Events that a limit lets pass at once in any case. With one, a guest waits after each of its events until the next
has been earned, and works only then: one that asks for no more than its limit would get half of it."""

MEMORY: Final = 3
"""Ticks for which what a VM asked for counts: the largest one does."""

LOWER: Final = 0.02
HIGHER: Final = 0.1
"""By which part a limit has to be off before it is set again. While it hurts a lower one is always set."""

SLOWLY: Final = 0.1
"""Between the clear and the threshold the level rises at this part of its speed: nothing stays for ever."""

FASTEST: Final = 1e9


@attrs.define(eq=False)
class _Vm:
    """One that is held back."""

    name: str
    launch: int
    weight: float
    asked: deque[float] = attrs.field(factory=lambda: deque(maxlen=MEMORY))
    rate: float = 0.0
    limit: Limit | None = None
    here: bool = True


class Adaptive:
    """Hold the noisy back while a signal says that somebody suffers, and let them go when it is over.

    While every signal is below its threshold nothing is limited. When one is over it, those VMs that do more than the
    floor get a common level: at first `decrease` times what they did together, again `decrease` times that at each look
    that still finds harm, down to the floor. In the clear the level rises, by `increase` times the level that hurt
    last each second; once that is passed without harm, it doubles each second. Between the clear and the threshold it
    rises ten times slower. When the level has reached what it was at the start, all are free. So after the harm is over
    everybody is free again within ``(1 - decrease) / increase + log2(start / level that hurt last)`` seconds in the
    clear, whatever the load is, or ten times that short of it.

    The level is shared by weighted max-min on top of the floor: the noisiest pay first, and whoever stays within the
    floor is not limited at all. Those are also the victims that are listened to. If it still hurts with everybody at
    the floor, the reason is another, and nothing more is done.

    ``lock_slowdown``, ``memory_slowdown`` and ``work_drop`` compare with what is usual: the best that was seen so far,
    raised only to what is measured while nobody does more than the floor (`orchestra.policy.harm`). Harm that lasts
    or grows slowly stays harm. A host, or a guest, that is slow for good and for another reason costs the noisy half a
    minute at the floor; then that is usual, and they are let go. What was there from the start is taken for usual until
    something better is seen, and a policy that is made anew starts anew. Who knows what is good says it: ``lock_ns``
    with 1.5 times that, and `clear`, is the same with nothing to learn.

    Parameters:
        signals: thresholds by signal; it hurts when any is over its own. ``lock_slowdown`` and ``memory_slowdown``: how
            many times as long as usual the host's probe takes; ``lock_ns``, ``memory_ns``: its times themselves;
            ``cpu_pressure``, ``memory_pressure``, ``io_pressure``: PSI, 0 to 1; ``run_delay``: of the victim that fares
            worst, the part of the time that it could have run and had no CPU; ``work_drop``: of the victim that fares
            worst, the part by which it worked slower in the last second than is usual with it (by what it reports, per
            second that it could run). A signal that is absent counts as no harm.
        clear: where the clear begins, as a part of the way from nothing to the threshold. Times in ns never are 0: with
            ``lock_ns`` or ``memory_ns``, have it above what they are in the calm.
        floor: events per second that every VM may always do.
        increase: a part of the level that hurt last, per second.
        decrease: from 0.1 to 0.9.
        meter: what is limited.
        interval: seconds between two ticks.
        max_delay: as of `Limit`.
        name: in the journal.

    Raises:
        SpecError: a parameter is out of its range, or a signal is not known.
    """

    def __init__(
        self,
        signals: Mapping[str, float] | None = None,
        *,
        clear: float = 0.5,
        floor: float = 10.0,
        increase: float = 0.1,
        decrease: float = 0.5,
        meter: Meter | str = Meter.BUS_LOCKS,
        interval: float = 0.1,
        max_delay: float | None = 1.0,
        name: str | None = None,
    ) -> None:
        over = {"lock_slowdown": 1.5, "memory_slowdown": 1.5} if signals is None else dict(signals)
        if not over:
            raise SpecError("signals={}: name at least one, with its threshold")
        for signal, threshold in over.items():
            above(f"signals[{signal!r}]", threshold, calm(check_signal(signal, HARM)), "(what it is in the calm)")
        self._over = over
        self._clear = within("clear", clear, 0, 1, "of the threshold")
        self._floor = Limit(rate=floor, max_delay=max_delay).rate
        self._max_delay = max_delay
        self._increase = within("increase", increase, 1e-4, 10, "a second")
        self._decrease = within("decrease", decrease, 0.1, 0.9, "of the level")
        self._meter = as_meter(meter)
        self._interval = within("interval", interval, 1e-4, 3600, "seconds")
        self._name = name or ("adaptive" if self._meter is Meter.BUS_LOCKS else f"adaptive-{self._meter}")
        self._signals = Signals(over, meter=self._meter, floor=self._floor)
        self._vms: dict[str, _Vm] = {}
        self._level: float | None = None
        self._start = self._hurt = 0.0
        self._settling = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def meter(self) -> Meter:
        return self._meter

    @property
    def signals(self) -> tuple[str, ...]:
        """What it listens to: the fleet switches on what that needs."""
        return tuple(self._over)

    @property
    def interval(self) -> float | None:
        return self._interval

    @property
    def level(self) -> float | None:
        """Events per second that the noisy may do together; None: they are free."""
        return self._level

    def decide(self, facts: Facts) -> list[Throttle | Unthrottle]:
        self._signals.look(facts)
        self._look(facts)
        harm, clear, evidence = self._judge(facts)
        if self._level is None:
            if not harm:
                self._vms.clear()
            return list(self._begin(facts, evidence)) if harm and self._vms else []
        if not self._vms:  # others of the same names have taken their places
            self._level = None
            return []
        total = sum(vm.rate for vm in self._vms.values())
        self._start = max(self._start, total)
        least = self._least()
        if harm and not self._settling:
            self._hurt = max(least, min(self._level, total))
            if self._level > least:
                self._signals.begin()
            self._level = self._hurt * self._decrease
            self._settling = True  # what was decided now shows at the tick after the next
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

    # ---- who does what, and who suffers -----------------------------------------------------------------------------

    def _look(self, facts: Facts) -> None:
        """Keep book of those above the floor; all of those that are held back already stay on it."""
        for name, launch in facts.gone:
            if (ended := self._vms.get(name)) is not None and ended.launch == launch:
                del self._vms[name]
        for vm in self._vms.values():
            vm.rate, vm.here = 0.0, False
        for told in facts.vms.values():
            count = self._count(told)
            if count is None:
                continue
            rate = count / facts.interval
            known = self._vms.get(told.name)
            if known is not None and known.launch != told.launch:
                del self._vms[told.name]  # another VM of that name starts without limits
                known = None
            if known is None and rate <= self._floor:
                continue
            vm = self._vms[told.name] = known or _Vm(told.name, told.launch, told.weight)
            vm.rate, vm.weight, vm.here = rate, told.weight, True
            vm.asked.append(math.inf if self._waited(vm, told, facts.interval) else rate)
        for vm in self._vms.values():
            if not vm.here:
                vm.asked.append(0.0)

    def _count(self, vm: VmFacts) -> int | None:
        return count_of(vm, self._meter)

    def _waited(self, vm: _Vm, told: VmFacts, interval: float) -> bool:
        return vm.limit is not None and told.throttled > WAITED * interval

    def _judge(self, facts: Facts) -> tuple[bool, bool, dict[str, Any]]:
        victims = [name for name in facts.vms if name not in self._vms]
        victims += [name for name, vm in facts.others.items() if (self._count(vm) or 0) <= self._floor * facts.interval]
        harm, clear = False, True
        evidence: dict[str, Any] = {}
        for name, over in self._over.items():
            value, victim = self._signals.worst(name, victims)
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

    def _begin(self, facts: Facts, evidence: dict[str, Any]) -> Iterator[Throttle]:
        self._start = self._hurt = sum(vm.rate for vm in self._vms.values())
        self._level = max(self._start * self._decrease, self._least())
        self._signals.begin()
        self._settling = True
        yield from self._limits(evidence)

    def _free(self, evidence: dict[str, Any]) -> Iterator[Unthrottle]:
        self._level = None
        for vm in self._vms.values():
            if vm.limit is not None:
                yield Unthrottle(
                    vm=vm.name,
                    launch=vm.launch,
                    meter=self._meter,
                    reason="nobody suffers any more",
                    evidence=evidence,
                )
        self._vms.clear()

    def _least(self) -> float:
        """The level at which everybody is at the floor. Who asks for less leaves nothing to the others there."""
        return max(self._floor, sum(min(self._floor, max(vm.asked) * 1.1) for vm in self._vms.values()))

    def _shares(self, level: float) -> dict[str, float]:
        """What each is entitled to: the floor and, by weight, a part of the rest. Who asks for less leaves it to the
        others, and finds as much as they have when it comes back."""
        vms = list(self._vms.values())
        wants = [max(vm.asked) * 1.1 for vm in vms]
        base = [min(self._floor, want) for want in wants]
        rest = max(0.0, level - sum(base))
        more = max_min(rest, [want - b for want, b in zip(wants, base, strict=True)], [vm.weight for vm in vms])
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
                continue  # who is idle, or gone, is told when it comes back
            vm.limit = Limit(rate=rate, burst=min(AHEAD + rate * LATE, FASTEST), max_delay=self._max_delay)
            yield Throttle(
                vm=name,
                launch=vm.launch,
                limit=vm.limit,
                meter=self._meter,
                reason=self._reason(rate, evidence),
                evidence={
                    **evidence,
                    "level": round(self._level, 3),
                    "start": round(self._start, 3),
                    "rate": round(vm.rate, 3),
                    "share": round(vm.rate / total, 4) if total else 0.0,
                    "floor": self._floor,
                    "launch": vm.launch,
                },
            )

    def _reason(self, rate: float, evidence: dict[str, Any]) -> str:
        unit = f"{rate:.6g} {self._meter.replace('_', ' ')}/s"
        if "hurts" not in evidence:
            return f"{unit}: let go step by step, as it hurts less"
        name = evidence["hurts"]
        where = f" of {evidence['victim']}" if "victim" in evidence else ""
        return f"{unit}: {name}{where} is {evidence[name]:.4g}, over {evidence['threshold']:g}"
