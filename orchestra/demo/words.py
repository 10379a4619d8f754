"""The texts of the demo, for every audience: the lines at its beginning, for each action, and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..fleet.fleet import Fleet
from ..model.actions import Action, Applied, Failed, Throttle, Unthrottle
from ..model.spec import Meter
from ..output.numbers import shown
from .account import Act, Result, Span, VmSummary
from .story import EVENTS, MOST_DELAY, Plan

__all__ = ["act_line", "action_line", "change", "opening", "verdict"]

SAME: Final = 0.02
"""A change of throughput smaller than this can't be told from noise on a busy host."""

BUSY: Final = 0.15
"""If other programs took at least this share of the CPU time, the figures show it."""


def opening(plan: Plan, fleet: Fleet, meter: Meter) -> Iterator[str]:
    quiet = plan.vms - plan.noisy
    vms = f"{quiet} quiet VM{'s' * (quiet != 1)} and {plan.noisy} noisy neighbour{'s' * (plan.noisy != 1)}"
    yield f"{vms} in one fleet, {plan.seconds:g} seconds in three acts."
    yield f"Backend {fleet.backend.why}."
    match fleet.backend.name:
        case "scripted":
            yield "A demonstration without guests: scripts stand in for them, so there is no work to be seen."
        case "emulated":
            yield (
                "Every split lock is seen and counted exactly. In an emulator it stalls no other core: the noisy VMs "
                f"take CPU time from the others{_shared(plan)}."
            )
        case _ if meter is Meter.EXITS:
            yield (
                "Without bus locks, an exit storm (port writes) held to an exit budget tells the same story: the noisy "
                f"VMs take CPU time from the others{_shared(plan)}."
            )
        case _ if fleet.bus_lock_detection == "fault-like":
            yield "Bus locks are reported before the instruction (as AMD does); the count is exact to one or two."
        case _:
            yield "Bus locks are reported behind the instruction (as Intel does)."
    if plan.advice:
        yield plan.advice


def _shared(plan: Plan) -> str:
    return "" if plan.cpus is None else f", as all share {plan.cpus} CPU{'s' * (plan.cpus != 1)} here"


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
    """What came of it, a sentence each: of every act that was seen, and of nothing else."""
    noun = EVENTS[result.meter]
    if not result.complete:
        yield _ending(result)
    for vm in result.noisy[:3]:
        if vm.spans:
            yield f"{vm.name}: {'; '.join(_part(span, noun) for span in vm.spans)}.{_kept(vm)}"
    if len(result.noisy) > 3 and any(span.limit is not None for vm in result.noisy for span in vm.spans):
        within = sum(all(span.held for span in vm.spans) for vm in result.noisy)
        yield f"Of {len(result.noisy)} noisy VMs, {within} stayed within their budget in every act."
    yield from _neighbours(result)
    for vm in result.vms:
        if isinstance(vm.outcome, Failed):
            yield f"{vm.name} failed: {vm.outcome.reason}."


def _ending(result: Result) -> str:
    why = "every VM had ended" if all(vm.outcome is not None for vm in result.vms) else "it was interrupted"
    last = result.acts[-1].number if result.acts else 0
    cut = result.cut
    if cut is not None:
        where = f"in act {cut.act}, after {cut.seconds:.1f} s of it"
    else:
        played = max((span.act for vm in result.vms for span in vm.spans), default=0)
        where = f"before act {last} began" if played < last else f"after act {last}"
    return f"The run ended early, {where}: {why}."


def _part(span: Span, noun: str) -> str:
    """What a VM did in an act."""
    rate = f"{shown(span.rate)} {noun}/s in act {span.act}"
    if span.limit is None:
        return f"{rate} without a limit"
    return f"{rate} with a budget of {shown(span.limit.rate)}/s and a burst of {shown(span.limit.tokens)}"


def _kept(vm: VmSummary) -> str:
    """Whether a VM kept to its budgets, as far as it had one."""
    limited = [span for span in vm.spans if span.limit is not None]
    over = [span for span in limited if not span.held]
    if not limited:
        return ""
    if not over:
        return " It kept to its budget" + (" in both acts." if len(limited) > 1 else ".")
    acts = " and ".join(f"act {span.act}" for span in over)
    if all(span.released for span in over):
        return f" It went over its budget in {acts}, as no wait may be longer than {MOST_DELAY:g} s."
    return f" It BROKE its budget in {acts}."


def _neighbours(result: Result) -> Iterator[str]:
    """How the quiet VMs fared, once there were limits."""
    quiet, waited = result.quiet, sum(vm.throttled_seconds for vm in result.quiet)
    limited = any(span.limit is not None for vm in result.noisy for span in vm.spans)
    if not (quiet and limited):
        return
    touched = "never waited for a limit" if not waited else f"waited for a limit for {waited:.2f} s in all"
    reliefs = [(act.number, result.relief_in(act.number)) for act in result.acts if act.number > 1]
    parts = [f"{_compared(relief)} in act {act}" for act, relief in reliefs if relief is not None]
    if parts:
        done = " and ".join(parts)
        yield f"The quiet VMs {touched}. Of their own work they got {done}, compared with act 1."
    else:
        yield f"The quiet VMs {touched}."
    if result.taken > BUSY:
        yield (
            f"Other programs, or a quota, took up to {result.taken:.0%} of the CPU time meanwhile: on a quiet host "
            "the figures are steadier."
        )


def _compared(relief: float) -> str:
    if abs(relief) < SAME:
        return "as much done"
    return f"{abs(relief):.0%} {'more' if relief > 0 else 'less'} done"
