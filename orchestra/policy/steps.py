"""The steps of a ladder, as data: the action, its condition, its dwell, and the way back."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import attrs

from ..model.errors import SpecError
from ..model.memory import check_size
from ..model.spec import Limit, Meter, as_meter, optional_limit
from .harm import HARM, OWN, calm, check_signal
from .rates import unfelt
from .validation import above, within

__all__ = ["Condition", "Rung", "Step", "check_steps", "default_steps"]

FEWEST: Final = 5
"""Events in a tick at a threshold. With fewer, one event more or less would decide whether the VM is bad."""


class Rung(StrEnum):
    """What a step does about a VM, from the mildest on. Each VM starts at OBSERVE, on no step."""

    OBSERVE = "observe"
    WARN = "warn"
    THROTTLE = "throttle"
    CAP_CPU = "cap_cpu"
    SET_MEMORY = "set_memory"
    ISOLATE = "isolate"
    PAUSE = "pause"
    EVICT = "evict"
    STOP = "stop"


@attrs.frozen
class Condition:
    """A signal and its threshold.

    Parameters:
        signal: a signal of the VM itself: ``bus_locks``, ``exits`` and ``answers`` (events a second), ``cpu`` (seconds
            per second and vCPU), ``share`` (the VM's part of all events of the ladder's meter), ``dirty_pages`` (pages
            written a second, of VMs whose memory is logged: `VmSpec.log_dirty`). Or a signal of the host or of the
            other VMs: each that `Adaptive` knows.
        over: the VM is bad when the signal is more than this.
        clear: the VM is in the clear when the signal is no more than this. Default: half-way from the calm to `over`.
            Give `clear` with ``lock_ns`` and ``memory_ns``, which are more than 0 in the calm.

    Raises:
        SpecError: the signal is not known, or a number is out of its range.
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
        rung: the action of this step.
        when: the conditions. All of them must hold for the ladder to take this step from the step below. Nothing: the
            time on the step below and `returns` are enough.
        dwell: seconds for which the conditions must have held on the step below. 0: one tick is enough.
        clear: seconds in the clear on this step before the ladder goes one step down. The VM is in the clear while the
            signal of any condition is below its `clear`, and the VM does not press against a limit or a cap that holds
            it on this ladder. Each relapse doubles this time, up to 16 times.
        probation: seconds after leaving this step in which one bad tick is enough to be on it again. Default: `clear`.
        returns: how many times the VM must have come up to the step below since it was last on no step.
        limit: the limit of a throttle.
        cpu: the share of a CPU cap: a part of the time.
        memory: what the guest is asked to keep to (`SetMemory`), in bytes. VMs need a `Balloon` for that.

    Raises:
        SpecError: a number is out of its range, or a figure is missing that the rung needs, or is there and not needed.
    """

    rung: Rung = attrs.field(converter=Rung)
    when: tuple[Condition, ...] = attrs.field(default=(), converter=_conditions)
    dwell: float = 0.0
    clear: float = 10.0
    probation: float | None = None
    returns: int = 0
    limit: Limit | None = None
    cpu: float | None = None
    memory: int | None = None

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
        if (self.memory is None) == (self.rung is Rung.SET_MEMORY):
            raise SpecError(
                f"{self.rung}: memory={self.memory!r}: set_memory needs its bytes of memory, nothing else has any"
            )
        if self.memory is not None:
            check_size("memory", self.memory)

    @property
    def tail(self) -> float:
        return self.clear if self.probation is None else self.probation


def default_steps(
    over: float = 1000.0, *, meter: Meter | str = Meter.BUS_LOCKS, highest: Rung | str = Rung.EVICT
) -> tuple[Step, ...]:
    """The steps against VMs that do more than `over` events a second.

    Each step comes if the step before did not help, and waits longer than it. A VM that is over the threshold gets a
    warning at once. After 1 s the ladder throttles it to half of the threshold, which normally ends the matter. If the
    VM is over the threshold for 5 s more, throttle or not, its CPU time is halved; after 10 s more it is isolated;
    after 20 s more it is paused for 30 s. After the third pause the VM is to leave this host.

    Parameters:
        over: events of the meter a second.
        highest: the last step. STOP must be asked for: it stops a VM that was to leave twice and is still here.
    """
    # Half of the threshold: a VM that keeps to its throttle must be clearly below what is bad (`check_steps`).
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
