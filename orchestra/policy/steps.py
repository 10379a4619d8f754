"""The steps of a ladder, as data: what is done, on which condition, for how long, and when it goes back."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import attrs

from ..model.errors import SpecError
from ..model.spec import Limit, Meter, as_meter, optional_limit
from .harm import HARM, OWN, calm, check_signal
from .rates import unfelt
from .validation import above, within

__all__ = ["Condition", "Rung", "Step", "check_steps", "default_steps"]

FEWEST: Final = 5
"""Events in a tick at a threshold: with fewer, one more or less would decide."""


class Rung(StrEnum):
    """What can be done about a VM, from the mildest on. Observing is where each one starts."""

    OBSERVE = "observe"
    WARN = "warn"
    THROTTLE = "throttle"
    CAP_CPU = "cap_cpu"
    ISOLATE = "isolate"
    PAUSE = "pause"
    EVICT = "evict"
    STOP = "stop"


@attrs.frozen
class Condition:
    """What is over which threshold.

    Parameters:
        signal: of the VM itself ``bus_locks``, ``exits`` and ``answers`` (a second), ``cpu`` (seconds per second and
            vCPU), ``share`` (its part of all events of the ladder's meter), ``dirty_pages`` (written a second, of VMs
            that are logged: `VmSpec.log_dirty`); of the host or the other VMs all that `Adaptive` knows.
        over: it is bad when the signal is more than this.
        clear: it is in the clear when the signal is no more than this. Default: half-way from the calm to `over`. Give
            it with ``lock_ns`` and ``memory_ns``: in the calm they are more than 0.
    """

    signal: str
    over: float
    clear: float | None = None

    def __attrs_post_init__(self) -> None:
        rest = calm(check_signal(self.signal, (*OWN, *HARM)))
        above(f"{self.signal}: over", self.over, rest, "(what it is in the calm)")
        if self.clear is not None:
            within(f"{self.signal}: clear", self.clear, rest, self.over, "(its threshold)")

    @property
    def clear_at(self) -> float:
        rest = calm(self.signal)
        return rest + (self.over - rest) / 2 if self.clear is None else self.clear


def _conditions(given: Any) -> Any:
    return (given,) if isinstance(given, Condition) else tuple(given)


@attrs.frozen(kw_only=True)
class Step:
    """One step of a ladder.

    Parameters:
        rung: what is done.
        when: what must be over its threshold, all of it, for this step to be taken from the one below. Nothing: the
            time on the step below and `returns` are enough.
        dwell: seconds for which it must have been so on the step below. 0: at the first tick.
        clear: seconds in the clear on this step before the way back, one step down: any of `when` is below its
            `clear`, and the VM does not press against a limit or a cap that holds it on this ladder. Doubled by each
            relapse, up to 16 times.
        probation: seconds after leaving this step in which one bad tick is enough to be back on it. Default: `clear`.
        returns: the VM must have come up to the step below so many times since it was last at the bottom.
        limit: of a throttle.
        cpu: of a CPU cap: the part of the time.
    """

    rung: Rung = attrs.field(converter=Rung)
    when: tuple[Condition, ...] = attrs.field(default=(), converter=_conditions)
    dwell: float = 0.0
    clear: float = 10.0
    probation: float | None = None
    returns: int = 0
    limit: Limit | None = None
    cpu: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.rung is Rung.OBSERVE:
            raise SpecError("rung='observe': leave it out; it is where each VM starts")
        within(f"{self.rung}: dwell", self.dwell, 0, 1e6, "seconds")
        within(f"{self.rung}: clear", self.clear, 0.01, 1e6, "seconds")
        if self.probation is not None:
            within(f"{self.rung}: probation", self.probation, 0, 1e6, "seconds")
        within(f"{self.rung}: returns", self.returns, 0, 1000, "times")
        optional_limit("limit", self.limit)
        if (self.limit is None) == (self.rung is Rung.THROTTLE):
            raise SpecError(f"{self.rung}: limit={self.limit!r}: a throttle needs a Limit, and nothing else has one")
        if (self.cpu is None) == (self.rung is Rung.CAP_CPU):
            raise SpecError(
                f"{self.rung}: cpu={self.cpu!r}: a CPU cap needs its part of the time, nothing else has one"
            )
        if self.cpu is not None:
            within("cpu", self.cpu, 0.01, 1, "of the time")

    @property
    def tail(self) -> float:
        return self.clear if self.probation is None else self.probation


def default_steps(
    over: float = 1000.0, *, meter: Meter | str = Meter.BUS_LOCKS, highest: Rung | str = Rung.EVICT
) -> tuple[Step, ...]:
    """The ladder for VMs that do more than `over` events a second: each step if the one before did not help for longer.

    Over it: a warning at once, and after a second a throttle to half of it, which normally ends the matter. A VM that
    is over it for 5 s more, throttle or not, has its CPU time halved; 10 s more, it is isolated; 20 s more, it is
    paused for 30 s; when that is the third time, it is to leave this host. `highest` says where to end; stopping a VM
    that was to leave twice and is still here has to be asked for.
    """
    bad = Condition(as_meter(meter).value, over)
    steps = (
        Step(rung=Rung.WARN, when=bad),
        Step(rung=Rung.THROTTLE, when=bad, dwell=1, limit=unfelt(Limit(rate=over / 2, max_delay=1.0))),
        Step(rung=Rung.CAP_CPU, when=bad, dwell=5, clear=20, cpu=0.5),
        Step(rung=Rung.ISOLATE, when=bad, dwell=10, clear=30),
        Step(rung=Rung.PAUSE, when=bad, dwell=20, clear=30),
        Step(rung=Rung.EVICT, dwell=10, clear=120, returns=3),
        Step(rung=Rung.STOP, dwell=60, clear=600, returns=2),
    )
    order = list(Rung)
    return tuple(step for step in steps if order.index(step.rung) <= order.index(Rung(highest)))


def check_steps(steps: tuple[Step, ...], meter: Meter, interval: float) -> None:
    """Check steps together.

    Raises:
        SpecError: they are out of order, can never be taken, or would punish a VM for keeping to its throttle.
    """
    order = [list(Rung).index(step.rung) for step in steps]
    if not order or order != sorted(set(order)):
        raise SpecError(f"steps={[step.rung.value for step in steps]}: must be in the order of Rung, each at most once")
    if not steps[0].when:
        raise SpecError(f"{steps[0].rung}: when=(): the first step needs a condition")
    limit: Limit | None = None
    for below, step in zip((None, *steps), steps, strict=False):
        for condition in step.when:
            if condition.signal in {*Meter} and condition.over * interval < FEWEST:
                raise SpecError(
                    f"{step.rung}: {condition.signal} over {condition.over:g}: must be {FEWEST} events in a tick of "
                    f"{interval:g} s or more; make the ladder's interval longer"
                )
            if limit is not None and condition.signal == meter.value and limit.rate >= condition.over:
                raise SpecError(
                    f"{step.rung}: {condition.signal} over {condition.over:g}: a VM that keeps to its throttle of "
                    f"{limit.rate:g}/s would be punished; throttle to less"
                )
        if below is not None and not step.when and step.dwell > below.clear:
            raise SpecError(
                f"{step.rung}: dwell={step.dwell!r}: must be at most the clear={below.clear!r} of the step below, "
                "or it is never taken"
            )
        limit = limit or step.limit
