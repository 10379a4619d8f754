"""A ladder of steps, from a warning to the end of a VM: each when the one before did not help, each with a way back.

Source of the patience that grows with each relapse: route flap damping (RFC 2439).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Final

import attrs

from ..model.actions import Action, CapCpu, Evict, Isolate, Pause, Rejoin, Resume, Stop, Throttle, Unthrottle, Warn
from ..model.spec import Limit, Meter, as_meter
from .facts import Facts, VmFacts, count_of
from .harm import HARM, OWN, Signals
from .steps import Condition, Rung, Step, check_steps, default_steps
from .validation import within

__all__ = ["Ladder"]

WAITED: Final = 0.05
"""Part of a tick that a VM waited for its turn, from which it counts as pressing against its limit."""

LEAK: Final = 0.25
"""How fast the time in which it was bad is forgotten while it is not: one that misbehaves for more than
LEAK / (1 + LEAK), a fifth of the time, gets caught in the long run."""

PATIENCE: Final = 16
"""The most by which relapses multiply the time in the clear that is asked for."""


@attrs.define(eq=False)
class _Climber:
    """One VM that is on the ladder. `at` steps are in force: the last is ``steps[at - 1]``."""

    name: str
    launch: int
    vcpus: int
    since: int
    at: int = 0
    bad: float = 0.0
    good: float = 0.0
    absent: float = 0.0
    busy: int = 0
    relapses: int = 0
    probation: dict[int, int] = attrs.field(factory=dict)  # step: until when one bad tick is enough
    visits: dict[int, int] = attrs.field(factory=dict)
    moved: int = 0  # in this tick: 1 up, -1 down
    risen: bool = True  # its last move was up

    @property
    def factor(self) -> int:
        """By how much its relapses multiply the time in the clear that is asked for."""
        return min(PATIENCE, 1 << min(self.relapses, 30))


class Ladder:
    """Take steps against a VM that hurts others: one at a time, each with its condition, and back the same way.

    The steps taken stack: a VM on the third is held by all three. Time that was bad counts up, and is forgotten four
    times slower, so pausing now and then does not help. On the way back a relapse is answered at once, and doubles the
    time in the clear that is asked for from then on, so that nothing goes up and down for ever. A VM that presses
    against its throttle is neither bad (it is held) nor in the clear (it still wants): it stays where it is.

    A paused VM does nothing, and so it is in the clear: a pause ends by itself. If somebody lets it go on earlier, that
    counts as a step down.

    Each action's evidence names the step, the signals with their thresholds, how long it took, and the VM's `launch`.

    Parameters:
        steps: in the order of `Rung`, each at most once; those left out are not part of this ladder. Default:
            `default_steps`.
        meter: what throttles and ``share`` are about.
        interval: seconds between two ticks.
        name: in the journal.

    Raises:
        SpecError: the steps are out of order, can never be taken, or would punish a VM for keeping to its throttle.
    """

    def __init__(
        self,
        steps: Iterable[Step] | None = None,
        *,
        meter: Meter | str = Meter.BUS_LOCKS,
        interval: float = 0.1,
        name: str | None = None,
    ) -> None:
        self._meter = as_meter(meter)
        self._interval = within("interval", interval, 1e-4, 3600, "seconds")
        self.steps = default_steps(meter=self._meter) if steps is None else tuple(steps)
        check_steps(self.steps, self._meter, self._interval)
        self._name = name or ("ladder" if self._meter is Meter.BUS_LOCKS else f"ladder-{self._meter}")
        over: dict[str, float] = {}
        for condition in (condition for step in self.steps for condition in step.when):
            if condition.signal in HARM:
                over[condition.signal] = min(condition.over, over.get(condition.signal, condition.over))
        self._signals = Signals(over)
        self._over = tuple(over)
        self._vms: dict[str, _Climber] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def meter(self) -> Meter:
        return self._meter

    @property
    def signals(self) -> tuple[str, ...]:
        """What it listens to beside the VM itself: the fleet switches on what that needs."""
        return self._over

    @property
    def interval(self) -> float | None:
        return self._interval

    def rung(self, vm: str) -> Rung:
        """Where a VM is."""
        climber = self._vms.get(vm)
        return Rung.OBSERVE if climber is None or not climber.at else self.steps[climber.at - 1].rung

    def decide(self, facts: Facts) -> list[Action]:
        self._signals.look(facts)
        for name, launch in facts.gone:
            if name in self._vms and self._vms[name].launch == launch:
                del self._vms[name]
        reading = _Reading(facts, self._meter, self._signals)
        for vm in facts.vms.values():
            climber = self._vms.get(vm.name)
            if climber is not None and climber.launch != vm.launch:  # another of that name: nothing holds it yet
                del self._vms[vm.name]
                climber = None
            if climber is None and reading.holds(self.steps[0], vm):
                self._vms[vm.name] = _Climber(vm.name, vm.launch, vm.vcpus, facts.time)
        actions: list[Action] = []
        for climber in list(self._vms.values()):
            actions += self._step(climber, facts, reading)
        return actions

    def refused(self, action: Action, reason: str) -> None:
        """An action of this ladder was not carried out: the VM is where it was, and the time starts anew."""
        climber = self._vms.get(action.vm or "")
        if climber is None:
            return
        if climber.moved > 0 and climber.at and isinstance(action, _UP[self.steps[climber.at - 1].rung]):
            climber.visits[climber.at] -= 1
            climber.at -= 1
        elif climber.moved < 0 and climber.at < len(self.steps):
            if not isinstance(action, _DOWN.get(self.steps[climber.at].rung, ())):
                return
            climber.at += 1
            climber.probation.pop(climber.at, None)
        else:
            return
        climber.bad = climber.good = 0.0
        climber.moved = 0

    # ---- up and down ------------------------------------------------------------------------------------------------

    def _step(self, climber: _Climber, facts: Facts, reading: _Reading) -> Iterator[Action]:
        vm = facts.vms.get(climber.name)
        climber.absent = 0.0 if vm is not None else climber.absent + facts.interval
        climber.moved = 0
        if self._let_go(climber, vm):
            self._leave(climber, facts)
            climber.probation.pop(climber.at + 1)  # whoever let it go on knows why
            climber.visits[climber.at + 1] -= 1
            return
        bad = self._is_bad(climber, vm, reading)
        if bad:
            climber.bad += facts.interval
        else:
            climber.bad = max(0.0, climber.bad - LEAK * facts.interval)
        climber.good = climber.good + facts.interval if self._is_clear(climber, vm, facts, reading) else 0.0
        if bad and self._may_rise(climber, facts.time):
            yield self._up(climber, vm, facts, reading)
        elif climber.at and climber.good >= self._patience(climber) - 1e-9:
            if self.steps[climber.at - 1].rung is Rung.STOP:
                del self._vms[climber.name]  # there is nothing left to go back
            else:
                yield from self._down(climber, facts)
        elif not (climber.at or bad or climber.bad) and facts.time >= max(climber.probation.values(), default=0):
            del self._vms[climber.name]

    def _let_go(self, climber: _Climber, vm: VmFacts | None) -> bool:
        """It does something, so it is not paused any more. (The first ticks may still tell of the time before.)"""
        paused = any(step.rung is Rung.PAUSE for step in self.steps[: climber.at])
        climber.busy = climber.busy + 1 if paused and vm is not None and vm.exits else 0
        return climber.busy > 2

    def _is_bad(self, climber: _Climber, vm: VmFacts | None, reading: _Reading) -> bool:
        if climber.at == len(self.steps):
            return False
        step = self.steps[climber.at]
        if climber.visits.get(climber.at, 0) < step.returns:
            return False
        if not step.when:
            return climber.risen  # on the way down there is nothing that calls for it again
        return vm is not None and reading.holds(step, vm)

    def _may_rise(self, climber: _Climber, time: int) -> bool:
        step = self.steps[climber.at]
        return climber.bad >= step.dwell - 1e-9 or bool(step.when and time < climber.probation.get(climber.at + 1, 0))

    def _is_clear(self, climber: _Climber, vm: VmFacts | None, facts: Facts, reading: _Reading) -> bool:
        if not climber.at:
            return True
        steps = self.steps[: climber.at]
        throttle = next((step.limit for step in steps if step.limit is not None), None)
        if vm is None:
            return throttle is None or climber.absent > _longest_wait(throttle, climber.vcpus)
        if throttle is not None and vm.throttled > WAITED * facts.interval:
            rate = reading.own(self._meter, vm) or 0.0
            # Two events more or less in a tick say nothing about a rate. What waits at a lower rate waits for others.
            if rate + 2 / facts.interval >= throttle.rate / 2:
                return False
        cap = next((step.cpu for step in steps if step.cpu is not None), 1.0)
        factor = 1 / cap if (vm.capped or 0.0) > WAITED * facts.interval else 1.0
        when = next((step.when for step in reversed(steps) if step.when), ())
        return any(reading.clear(condition, vm, factor) for condition in when)

    def _patience(self, climber: _Climber) -> float:
        """Seconds in the clear that are asked for."""
        step = self.steps[climber.at - 1]
        return step.clear if step.rung is Rung.STOP else step.clear * climber.factor

    def _up(self, climber: _Climber, vm: VmFacts | None, facts: Facts, reading: _Reading) -> Action:
        step = self.steps[climber.at]
        relapse = facts.time < climber.probation.get(climber.at + 1, 0)
        climber.relapses += relapse
        evidence = self._evidence(climber, facts) | {
            "step": step.rung.value,
            "from": Rung.OBSERVE.value if not climber.at else self.steps[climber.at - 1].rung.value,
            "relapses": climber.relapses,
            "times": climber.visits.get(climber.at + 1, 0) + 1,
        }
        parts = []
        for condition in step.when:
            value = None if vm is None else reading.value(condition.signal, vm)
            evidence[condition.signal] = None if value is None else round(value, 6)
            evidence[f"{condition.signal}_over"] = condition.over
            if value is not None:
                parts.append(f"{condition.signal} {value:.6g} over {condition.over:g}")
        if step.returns:
            parts.append(f"{evidence['from']} for the {climber.visits.get(climber.at, 0)}. time")
        why = " and ".join(parts) or "still here"
        how = "a relapse on probation" if relapse else f"for {climber.bad:.3g} s"
        climber.at += 1
        climber.visits[climber.at] = climber.visits.get(climber.at, 0) + 1
        climber.moved, climber.risen, climber.since = 1, True, facts.time
        climber.bad = climber.good = 0.0
        return _take(step, climber, self._meter, f"{step.rung.value}: {why}, {how}", evidence)

    def _down(self, climber: _Climber, facts: Facts) -> Iterator[Action]:
        step = self.steps[climber.at - 1]
        evidence = self._evidence(climber, facts) | {
            "step": step.rung.value,
            "clear": round(climber.good, 6),
            "asked": self._patience(climber),
            "relapses": climber.relapses,
        }
        self._leave(climber, facts)
        climber.moved = -1
        below = Rung.OBSERVE if not climber.at else self.steps[climber.at - 1].rung
        reason = f"back to {below.value}: {evidence['clear']:.4g} s in the clear"
        yield from _undo(step, climber, self._meter, reason, evidence)

    def _leave(self, climber: _Climber, facts: Facts) -> None:
        tail = self.steps[climber.at - 1].tail * climber.factor
        climber.probation[climber.at] = facts.time + round(tail * 1e9)
        climber.at -= 1
        climber.risen, climber.since, climber.busy = False, facts.time, 0
        climber.bad = climber.good = 0.0

    def _evidence(self, climber: _Climber, facts: Facts) -> dict[str, Any]:
        stayed = round((facts.time - climber.since) / 1e9, 6)
        return {"launch": climber.launch, "on_step_for": stayed, "interval": facts.interval}


class _Reading:
    """One tick's signals."""

    def __init__(self, facts: Facts, meter: Meter, signals: Signals) -> None:
        self._facts, self._meter, self._signals = facts, meter, signals

    @functools.cached_property
    def _total(self) -> float:
        counts = (count_of(vm, self._meter) for vm in self._facts.vms.values())
        return sum(count for count in counts if count is not None)

    @functools.cached_property
    def _worst(self) -> dict[str, list[tuple[float, str]]]:
        """The two VMs that suffer most: a VM is no victim of its own."""
        told = ((name, self._signals.victims(name)) for name in ("run_delay", "work_drop"))
        return {
            name: sorted(((value, vm) for vm, value in victims.items()), reverse=True)[:2] for name, victims in told
        }

    def own(self, signal: str, vm: VmFacts) -> float | None:
        """What the VM itself does."""
        seconds = self._facts.interval
        match signal:
            case "bus_locks":
                return None if vm.bus_locks is None else vm.bus_locks / seconds
            case "exits" | "answers":
                return float(getattr(vm, signal)) / seconds
            case "cpu":
                return None if vm.cpu is None else vm.cpu / seconds / vm.vcpus
            case "dirty_pages":
                return vm.dirty_rate
        # "share"
        count = count_of(vm, self._meter)
        return None if count is None else count / self._total if self._total else 0.0

    def value(self, signal: str, vm: VmFacts) -> float | None:
        if signal in OWN:
            return self.own(signal, vm)
        if signal in self._worst:
            return next((value for value, name in self._worst[signal] if name != vm.name), None)
        return self._signals.host(signal)

    def holds(self, step: Step, vm: VmFacts) -> bool:
        values = ((self.value(condition.signal, vm), condition.over) for condition in step.when)
        return all(value is not None and value > over for value, over in values)

    def clear(self, condition: Condition, vm: VmFacts, factor: float) -> bool:
        """`factor`: what a cap took from the VM's own figures. What is absent is no reason to hold anybody."""
        value = self.value(condition.signal, vm)
        if value is None:
            return True
        return value * (factor if condition.signal in OWN else 1.0) <= condition.clear_at


_UP: Final[dict[Rung, type]] = {
    Rung.WARN: Warn,
    Rung.THROTTLE: Throttle,
    Rung.CAP_CPU: CapCpu,
    Rung.ISOLATE: Isolate,
    Rung.PAUSE: Pause,
    Rung.EVICT: Evict,
    Rung.STOP: Stop,
}
_DOWN: Final[dict[Rung, type]] = {
    Rung.THROTTLE: Unthrottle,
    Rung.CAP_CPU: CapCpu,
    Rung.ISOLATE: Rejoin,
    Rung.PAUSE: Resume,
}


def _take(step: Step, vm: _Climber, meter: Meter, reason: str, evidence: dict[str, Any]) -> Action:
    match step.rung:
        case Rung.THROTTLE:
            assert step.limit is not None
            return Throttle(
                vm=vm.name, launch=vm.launch, limit=step.limit, meter=meter, reason=reason, evidence=evidence
            )
        case Rung.CAP_CPU:
            return CapCpu(vm=vm.name, launch=vm.launch, share=step.cpu, reason=reason, evidence=evidence)
        case Rung.ISOLATE:
            return Isolate(vm=vm.name, launch=vm.launch, reason=reason, evidence=evidence)
        case Rung.PAUSE:
            return Pause(vm=vm.name, launch=vm.launch, reason=reason, evidence=evidence)
        case Rung.EVICT:
            return Evict(vm=vm.name, launch=vm.launch, reason=reason, evidence=evidence)
        case Rung.STOP:
            return Stop(vm=vm.name, launch=vm.launch, reason=reason, evidence=evidence)
    return Warn(vm=vm.name, launch=vm.launch, reason=reason, evidence=evidence)


def _undo(step: Step, vm: _Climber, meter: Meter, reason: str, evidence: dict[str, Any]) -> Iterator[Action]:
    match step.rung:
        case Rung.THROTTLE:
            yield Unthrottle(vm=vm.name, launch=vm.launch, meter=meter, reason=reason, evidence=evidence)
        case Rung.CAP_CPU:
            yield CapCpu(vm=vm.name, launch=vm.launch, share=None, reason=reason, evidence=evidence)
        case Rung.ISOLATE:
            yield Rejoin(vm=vm.name, launch=vm.launch, reason=reason, evidence=evidence)
        case Rung.PAUSE:
            yield Resume(vm=vm.name, launch=vm.launch, reason=reason, evidence=evidence)


def _longest_wait(limit: Limit, vcpus: int) -> float:
    """A VM with a low limit can be silent because every one of its vCPUs waits for its turn."""
    longest = 2 * vcpus / limit.rate
    return longest if limit.max_delay is None else min(longest, 2 * limit.max_delay)
