"""What the demo says, whoever shows it: the lines at its beginning, for each action, and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..actions import Action, Applied, Failed, Throttle, Unthrottle
from ..fleet import Fleet
from ..spec import Meter
from .account import Act, Result
from .numbers import shown
from .story import EVENTS, Plan

__all__ = ["act_line", "action_line", "change", "opening", "verdict"]

SAME: Final = 0.02
"""A change of throughput that no busy host can tell from none."""

BUSY: Final = 0.15
"""So much CPU time lost to others, and they show in the figures."""


def opening(plan: Plan, fleet: Fleet, meter: Meter) -> Iterator[str]:
    quiet = plan.vms - plan.noisy
    vms = f"{quiet} quiet VM{'s' * (quiet != 1)} and {plan.noisy} noisy neighbour{'s' * (plan.noisy != 1)}"
    yield f"{vms} in one fleet, {plan.seconds:g} seconds in three acts."
    yield f"Backend {fleet.backend.why}."
    match fleet.backend.name:
        case "scripted":
            yield "A rehearsal: scripts stand in for the guests, so there is no work to be seen."
        case "emulated":
            yield (
                "Every split lock is seen and counted exactly, but in an emulator none stalls other cores: what the "
                f"noisy VMs take from the others is CPU time{_shared(plan)}."
            )
        case _ if meter is Meter.EXITS:
            yield (
                "Without bus locks, an exit storm (port writes) held to an exit budget tells the same story: what the "
                f"noisy VMs take from the others is CPU time{_shared(plan)}."
            )
        case _ if fleet.bus_lock_detection == "fault-like":
            yield "Bus locks are reported before the instruction (as AMD does); the count is exact to one or two."
        case _:
            yield "Bus locks are reported behind the instruction (as Intel does)."
    if plan.advice:
        yield plan.advice


def _shared(plan: Plan) -> str:
    return "" if plan.cpus is None else f", of the {plan.cpus} CPU{'s' * (plan.cpus != 1)} that they share here"


def change(gain: float | None) -> str:
    """+57%, -3%, or a dash where it is unknown."""
    return "-" if gain is None else f"{gain:+.0%}" if abs(gain) >= 0.005 else "0%"


def act_line(act: Act) -> str:
    return f"Act {act.number}, {act.title}. {act.text}"


def action_line(applied: Applied, time: float) -> str:
    line = f"{time:5.1f} s  {_what(applied.action)}"
    if applied.action is not None and applied.action.reason:
        line += f": {applied.action.reason}"
    return line + (f" (could not be done: {applied.error})" if applied.error else "")


def _what(action: Action | None) -> str:
    match action:
        case Throttle(limit=limit, meter=meter):
            return f"{_where(action)} held to {shown(limit.rate)} {EVENTS[meter]}/s"
        case Unthrottle():
            return f"{_where(action)} is free again"
        case None:
            return "a policy failed"
        case _:
            return f"{action.vm}: {type(action).__name__.lower()}"


def _where(action: Throttle | Unthrottle) -> str:
    return action.vm or (f"tenant {action.tenant}" if action.tenant else "the host")


def verdict(result: Result) -> Iterator[str]:
    """What came of it, a sentence each."""
    noun = EVENTS[result.meter]
    for vm in result.noisy[:3]:
        if len(vm.spans) > 1 and vm.spans[1].limit is not None:
            free, limited = vm.spans[0], vm.spans[1]
            held = "kept to" if limited.held else "BROKE"
            budget = shown(limited.limit.rate) if limited.limit else "-"
            rates = f"from {shown(free.rate)} to {shown(limited.rate)} {noun}/s"
            burst = f" and a burst of {shown(limited.limit.tokens)}" if limited.limit else ""
            yield f"{vm.name}: {rates}; it {held} its budget of {budget}/s{burst}."
    if len(result.noisy) > 3:
        within = sum(all(span.held for span in vm.spans) for vm in result.noisy)
        yield f"Of {len(result.noisy)} noisy VMs, {within} stayed within their budget in every act."
    quiet, waited = result.quiet, sum(vm.throttled_seconds for vm in result.quiet)
    if quiet and len(result.acts) > 1:
        touched = "never waited for a limit" if not waited else f"waited for a limit for {waited:.2f} s in all"
        if result.relief is None:
            yield f"The quiet VMs {touched}."
        else:
            more = "more" if result.relief >= 0 else "less"
            done = f"{abs(result.relief):.0%} {more}" if abs(result.relief) >= SAME else "as much"
            yield f"The quiet VMs {touched}, and got {done} of their own work done with the limits on."
        if result.taken > BUSY:
            yield (
                f"Other programs, or a quota, took up to {result.taken:.0%} of the CPU time meanwhile: on a quiet host "
                "the figures are steadier."
            )
    for vm in result.vms:
        if isinstance(vm.outcome, Failed):
            yield f"{vm.name} failed: {vm.outcome.reason}."
