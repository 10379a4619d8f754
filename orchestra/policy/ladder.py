"""A ladder of steps, from a warning to the end of a VM. Each step comes when the step before did not help.

Each step has a way back. The idea that a VM must be in the clear for longer after each relapse is that of
route flap damping (RFC 2439).

`standing` has the states and the table of transitions. A worked timeline, of a VM on
``Ladder(default_steps(over=1000, highest="cap_cpu"))`` that wants 5000 bus locks a second for 4 s, rests for 12 s, and
comes back for 1 s:

    time    does  step      standing   action
   0.1 s  5000/s  warn      held       Warn
   1.1 s  5000/s  throttle  held       Throttle to 500/s
  14.0 s     0/s  warn      returning  Unthrottle
  16.1 s  5000/s  throttle  held       Throttle to 500/s
  37.0 s     0/s  warn      returning  Unthrottle

- 0.1 s: the first tick over 1000/s is answered by a warning. From here on the throttle's dwell, 1 s, is counted.
- 1.1 s: the VM is throttled to 500/s. It presses against that limit. So the VM is neither bad, as it is held, nor in
  the clear, as it wants more. The VM stays on this step.
- 14.0 s: the VM has been in the clear since 4 s, for the 10 s that the step asks for. For 10 s more it is on probation.
- 16.1 s: on probation one bad tick is enough. That is a relapse: from now on the step asks for 20 s in the clear.
- 37.0 s: the VM is back at the warning, and 20 s later on no step. When its probation is over, the ladder forgets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final

import attrs

from ..model.actions import Action, CapCpu, Evict, Isolate, Pause, SetMemory, Stop, Throttle, Warn
from ..model.effects import inverse
from .facts import Facts, VmFacts
from .harm import HARM, Signals
from .metered import WAITED, Memory, Metered, longest_wait, presses
from .reading import Reading
from .standing import TRANSITIONS, Event, LadderState, Move, Standing
from .steps import Rung, Step, check_steps, default_steps

__all__ = ["Ladder"]

LEAK: Final = 0.25
"""The speed at which bad time is forgotten while the VM is not bad. A VM that is bad for more than LEAK / (1 + LEAK),
a fifth of the time, gains more bad time than it forgets, and takes the next step in the end."""

CLEAR_FOR: Final = 1e-9
"""Seconds by which sums of ticks may be off: ten ticks of 0.1 s must count as a second, though they add up to less."""

FIRST_TICKS: Final = 2
"""Ticks after a pause whose facts may still be about the time before the pause."""


@attrs.define(eq=False, slots=False)
class Ladder(Metered):
    """Take steps against a VM that hurts others: one step at a time, each with its condition, and back the same way.

    The steps stack: all steps up to the third hold a VM on the third step. Bad time counts up, and the ladder forgets
    it four times slower, so a VM gains nothing by pausing now and then. On the way back the ladder answers a relapse at
    once, and asks for twice the time in the clear from then on: without that, a VM could go up and down for ever. A VM
    that presses against its throttle stays on its step: it is not bad, as it is held, and not in the clear, as it wants
    more.

    A paused VM does nothing, so it is in the clear, and its pause ends by itself. If a caller or another policy resumes
    the VM earlier, the VM stands one step lower.

    The evidence of each action names the step, the signals with their thresholds, the time that it took, and the VM's
    `generation`.

    Parameters:
        steps: the steps in the order of `Rung`, each at most once. Rungs that are left out are not part of this ladder.
            Default: `default_steps`.
        meter: the meter of the throttles and of ``share``.
        interval: seconds between two ticks.
        name: the policy's name in the journal.

    Raises:
        SpecError: the steps are out of order, can never be taken, or would punish a VM for keeping to its throttle.
    """

    KIND: ClassVar[str] = "ladder"

    _steps: Iterable[Step] | None = None

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.steps = default_steps(meter=self.meter) if self._steps is None else tuple(self._steps)
        check_steps(self.steps, self.meter, self._interval)
        over: dict[str, float] = {}
        for condition in (condition for step in self.steps for condition in step.when):
            if condition.signal in HARM:
                over[condition.signal] = min(condition.over, over.get(condition.signal, condition.over))
        self._harm = Signals(over)
        self._over = tuple(over)
        self._vms: Memory[LadderState] = Memory()

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals of the host and of other VMs that the steps need. The fleet switches on what measures them."""
        return self._over

    def rung(self, vm: str) -> Rung:
        """The highest step on which a VM is."""
        state = self._vms.get(vm)
        return Rung.OBSERVE if state is None else self._rung(state.at)

    def _rung(self, at: int) -> Rung:
        return self.steps[at - 1].rung if at else Rung.OBSERVE

    def decide(self, facts: Facts) -> list[Action]:
        self._harm.look(facts)
        self._vms.end(facts.gone)
        reading = Reading(facts, self.meter, self._harm)
        first = self.steps[0]
        for vm in facts.vms.values():
            # A state is made at the first bad tick: the ladder keeps nothing about VMs that behave.
            if self._vms.of(vm) is None and reading.holds(first, vm):
                self._vms[vm.name] = LadderState(vm.name, vm.generation, vm.vcpus, facts.time)
        # A copy, as a state that is forgotten leaves the table in between.
        return [action for state in list(self._vms.values()) for action in self._step(state, facts, reading)]

    def refused(self, action: Action, reason: str) -> None:
        """Take back the move whose action was not carried out. The VM's times start anew at 0."""
        state = self._vms.get(action.vm or "")
        if state is not None and state.asked is type(action):
            state.stay()

    # ---- what happens to a VM, and what follows ---------------------------------------------------------------------

    def _step(self, state: LadderState, facts: Facts, reading: Reading) -> Iterator[Action]:
        vm = facts.vms.get(state.name)
        event = self._event(state, vm, facts, reading)
        state.asked = None
        move = None if event is None else TRANSITIONS.get((state.standing, event))
        if move is Move.FORGET:
            del self._vms[state.name]
        elif event is Event.RELEASED:
            step = state.at
            state.fall(facts.time, self.steps[step - 1].tail)
            del state.probation[step]  # whoever resumed the VM had a reason, so one bad tick must not pause it again
            state.visits[step] -= 1
        elif move is not None:
            action = self._up(state, vm, facts, reading) if move is Move.UP else self._down(state, facts)
            if action is not None:
                state.asked = type(action)
                yield action

    def _event(self, state: LadderState, vm: VmFacts | None, facts: Facts, reading: Reading) -> Event | None:
        """Count the VM's times, and return what happened to it.

        WORSE goes before BETTER: a VM that is bad now must not go down.
        """
        interval = facts.interval
        state.absent = 0.0 if vm is not None else state.absent + interval
        if self._is_released(state, vm):
            return Event.RELEASED
        bad = self._is_bad(state, vm, reading)
        state.bad = state.bad + interval if bad else max(0.0, state.bad - LEAK * interval)
        state.good = state.good + interval if self._is_clear(state, vm, facts, reading) else 0.0
        if bad and self._may_rise(state, facts.time):
            return Event.WORSE
        if state.at:
            return Event.BETTER if state.good >= self._patience(state) - CLEAR_FOR else None
        probation = max(state.probation.values(), default=0)
        return Event.CALM if not (bad or state.bad) and facts.time >= probation else None

    def _is_released(self, state: LadderState, vm: VmFacts | None) -> bool:
        paused = any(step.rung is Rung.PAUSE for step in self.steps[: state.at])
        state.busy = state.busy + 1 if paused and vm is not None and vm.exits else 0
        return state.busy > FIRST_TICKS

    def _is_bad(self, state: LadderState, vm: VmFacts | None, reading: Reading) -> bool:
        if state.at == len(self.steps):
            return False
        step = self.steps[state.at]
        if state.visits.get(state.at, 0) < step.returns:
            return False
        if not step.when:  # a step without a condition comes by time alone: on the way down that would lead up again
            return state.standing is not Standing.RETURNING
        return vm is not None and reading.holds(step, vm)

    def _may_rise(self, state: LadderState, time: int) -> bool:
        step = self.steps[state.at]
        return state.bad >= step.dwell - CLEAR_FOR or bool(step.when and state.on_probation(state.at + 1, time))

    def _is_clear(self, state: LadderState, vm: VmFacts | None, facts: Facts, reading: Reading) -> bool:
        if not state.at:
            return True
        steps = self.steps[: state.at]
        throttle = next((step.limit for step in steps if step.limit is not None), None)
        if vm is None:
            return throttle is None or state.absent > longest_wait(throttle, state.vcpus)
        if throttle is not None and presses(vm, facts.interval):
            rate = reading.own(self.meter, vm) or 0.0
            # Two events more or less in a tick say nothing about a rate. A VM that waits at less than half of its
            # throttle's rate waits for another limit.
            if rate + 2 / facts.interval >= throttle.rate / 2:
                return False
        cap = next((step.cpu for step in steps if step.cpu is not None), 1.0)
        factor = 1 / cap if (vm.capped or 0.0) > WAITED * facts.interval else 1.0
        when = next((step.when for step in reversed(steps) if step.when), ())
        return any(reading.clear(condition, vm, factor) for condition in when)

    def _patience(self, state: LadderState) -> float:
        """Seconds in the clear that the VM's step asks for. A stopped VM is gone, so relapses do not count there."""
        step = self.steps[state.at - 1]
        return step.clear if step.rung is Rung.STOP else step.clear * state.patience

    # ---- up and down ------------------------------------------------------------------------------------------------

    def _up(self, state: LadderState, vm: VmFacts | None, facts: Facts, reading: Reading) -> Action:
        step, below = self.steps[state.at], self._rung(state.at)
        relapse = state.on_probation(state.at + 1, facts.time)
        state.relapses += relapse
        evidence = self._evidence(state, facts) | {
            "step": step.rung.value,
            "from": below.value,
            "relapses": state.relapses,
            "times": state.visits.get(state.at + 1, 0) + 1,
        }
        parts = []
        for condition in step.when:
            value = None if vm is None else reading.value(condition.signal, vm)
            evidence[condition.signal] = None if value is None else round(value, 6)
            evidence[f"{condition.signal}_over"] = condition.over
            if value is not None:
                parts.append(f"{condition.signal} {value:.6g} over {condition.over:g}")
        if step.returns:
            parts.append(f"{below.value} for the {state.visits.get(state.at, 0)}. time")
        why = " and ".join(parts) or "still here"
        how = "a relapse on probation" if relapse else f"for {state.bad:.3g} s"
        state.rise(facts.time, Standing.STOPPED if step.rung is Rung.STOP else Standing.HELD)
        return self._take(step, state, f"{step.rung.value}: {why}, {how}", evidence)

    def _down(self, state: LadderState, facts: Facts) -> Action | None:
        """Go one step down, and return the action that undoes the step. None: there is nothing to undo."""
        step, good = self.steps[state.at - 1], state.good
        evidence = self._evidence(state, facts) | {
            "step": step.rung.value,
            "clear": round(good, 6),
            "asked": self._patience(state),
            "relapses": state.relapses,
        }
        state.fall(facts.time, step.tail)
        back = inverse(self._take(step, state, "", {}))
        reason = f"back to {self._rung(state.at).value}: {round(good, 6):.4g} s in the clear"
        return None if back is None else attrs.evolve(back, reason=reason, evidence=evidence)

    def _take(self, step: Step, state: LadderState, reason: str, evidence: dict[str, Any]) -> Action:
        about: Any = {"vm": state.name, "generation": state.generation, "reason": reason, "evidence": evidence}
        if step.limit is not None:
            return Throttle(limit=step.limit, meter=self.meter, **about)
        if step.cpu is not None:
            return CapCpu(share=step.cpu, **about)
        if step.memory is not None:
            return SetMemory(memory=step.memory, **about)
        return _ACTIONS[step.rung](**about)

    def _evidence(self, state: LadderState, facts: Facts) -> dict[str, Any]:
        stayed = round((facts.time - state.since) / 1e9, 6)
        return {"generation": state.generation, "on_step_for": stayed, "interval": facts.interval}


_ACTIONS: Final[Mapping[Rung, Callable[..., Action]]] = {
    Rung.WARN: Warn,
    Rung.ISOLATE: Isolate,
    Rung.PAUSE: Pause,
    Rung.EVICT: Evict,
    Rung.STOP: Stop,
}
"""The actions that need nothing but the VM. The others need the figures of their step."""
