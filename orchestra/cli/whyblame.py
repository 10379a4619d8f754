"""What ``orchestra why`` says of a VM that nothing holds: whether something else slows it, and who is behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from ..journal.explain import Explanation, Fared, Surroundings
from ..model.codec import encode
from ..output.times import duration
from ..policy.suspects import FEWEST, Suspect, Suspicion

__all__ = ["suspicion_document", "verdict"]

MUCH: Final = 0.1
"""Share of a VM's time from which a wait is mentioned."""

SLOWER: Final = 1.5

SUFFERS: Final = {
    "work": "the work that it gets done",
    "run_delay": "its waiting for a CPU",
    "lock_ns": "what a locked operation takes the host",
    "memory_ns": "what a read of memory takes the host",
    "cpu_pressure": "the host's tasks waiting for a CPU",
    "memory_pressure": "the host's tasks waiting for memory",
}
DOES: Final = {"bus_locks": "bus locks", "cpu": "CPU time"}


def suspicion_document(suspicion: Suspicion) -> dict[str, Any]:
    """For JSON."""
    found = [
        {**encode(one), "share": one.share, "named": one.named, "very_likely": one.sure} for one in suspicion.suspects
    ]
    return {**encode(suspicion), "suspects": found}


def verdict(explained: Explanation) -> Iterator[str]:
    """Of one that nothing held for long, by the counters: whether something else slows it, and who."""
    if sum(cause.share for cause in explained.causes) >= MUCH:
        return
    fared, host = explained.fared, explained.host
    signals = ["work"]
    if fared is not None and fared.delayed is not None and fared.queued is not None and fared.queued >= MUCH:
        signals += ["run_delay", "cpu_pressure"]
        yield f"That it gets no CPU for {fared.delayed:.0%} of the time that it could run slows it by as much."
    if host is not None and host.lock_times is not None and host.lock_times >= SLOWER:
        signals += ["lock_ns", "memory_ns"]
        yield f"What crosses the memory bus takes {host.lock_times:.2g} times as long as in the calm."
    named = [signal for signal in SUFFERS if signal in signals and explained.suspicion.named(signal)]
    for signal in named:
        yield _blame(explained, signal)
    if not named and len(signals) > 1:
        yield _no_blame(explained)
    elif not named and fared is not None:
        unknown = _unknown(fared, host)
        but = f" ({unknown} not known here)" if unknown else ""
        yield (
            f"Nothing {'else ' if explained.causes else ''}that is known here slows it{but}: if it is slow, look "
            f"inside the guest, and at the devices and tasks that answer it.{_asleep(explained, fared)}"
        )


def _asleep(explained: Explanation, fared: Fared) -> str:
    paused = sum(cause.share for cause in explained.causes if cause.kind in ("pause", "waiting"))
    asleep = 0.0 if fared.asleep is None else fared.asleep - paused
    if asleep < MUCH:
        return ""
    return (
        f" For {asleep:.0%} of its vCPUs' time it neither ran nor waited for a CPU: it idled, or waited for an answer."
    )


def _whose(suspect: Suspect, victim: str) -> str:
    return f"{'its own' if suspect.vm == victim else suspect.vm + chr(39) + 's'} {DOES[suspect.activity]}"


def _blame(explained: Explanation, signal: str) -> str:
    first, *others = explained.suspicion.named(signal)
    how = "very likely" if first.sure else "likely"
    also = ", ".join(f"{_whose(one, explained.vm)} ({one.correlation:.2f})" for one in others[:2])
    too = f"; {also} went up and down at the same times, and can't be told apart from it" if also else ""
    return (
        f"Of the ups and downs of {SUFFERS[signal]}, {first.share:.0%} go along with {_whose(first, explained.vm)} "
        f"(correlation {first.correlation:.2f} over {_windows(explained, first.windows)}: {how} no chance{too})."
    )


def _no_blame(explained: Explanation) -> str:
    suspicion = explained.suspicion
    if suspicion.windows < FEWEST:
        some = _windows(explained, suspicion.windows)
        return f"Who is behind it can't be told from {some}: that takes {FEWEST} at least."
    if not suspicion.suspects:
        return "Who is behind it can't be told: there were no ups and downs to compare."
    others = f"{suspicion.asked} other VM{'s' * (suspicion.asked != 1)}"
    return (
        f"Who is behind it can't be told: over {_windows(explained, suspicion.windows)}, what {others} did goes along "
        "with it no more than chance would have it."
    )


def _windows(explained: Explanation, count: int) -> str:
    return f"{count} window{'s' * (count != 1)} of {duration(explained.suspicion.seconds)}"


def _unknown(fared: Fared, host: Surroundings | None) -> str:
    names = []
    if fared.delayed is None:
        names.append("its waiting for a CPU")
    if host is None or host.lock_times is None:
        names.append("the memory bus")
    return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'}" if names else ""
