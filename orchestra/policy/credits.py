"""Burst credits: earn at a baseline rate, spend above it, and fall back to the baseline when they are used up.

Source: burstable instances of Amazon EC2 ("Key concepts for burstable performance instances", EC2 User Guide): credits
accrue at the baseline rate up to a maximum, usage spends them, launch credits are there from the start, and without
credits an instance in standard mode gets its baseline. Here a credit is one event (a bus lock, an exit).

A token bucket with a large burst is just that, and the C core has one: so the core spends and refuses at the very
event, and this policy keeps a copy of the books to show them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from ..model.actions import Action, Throttle
from ..model.spec import Limit, Meter, as_meter
from .facts import Facts, VmFacts, count_of
from .retry import Once
from .validation import within

__all__ = ["BurstCredits"]

WAITED: Final = 0.05
"""Part of a tick that it waited, from which a VM without credits counts as held back."""

WELL: Final = 0.1
"""Part of the most credits that it may have, from which a VM that had none counts as recovered."""


@attrs.define(eq=False)
class _Account:
    launch: int
    seen: int  # ns: the balance is as of then
    balance: float
    out: bool = False
    gone: bool = False


class BurstCredits:
    """Let each VM do `baseline` events a second for good, and more for as long as it has saved for.

    A VM earns a credit with each event that the baseline gives it and that it leaves, up to `most`; above the baseline
    it spends them. When they are used up it is held to the baseline. So in any window of *t* seconds it does at most
    ``most + baseline * t`` events, whatever it tries. Meanwhile nothing but other limits bounds its speed: have a host
    limit.

    A VM is found at the first tick in which it did something, and what it did in it is taken off its credits. One that
    is launched again under its name keeps its balance: launching anew earns nothing. A limit that was refused is asked
    for again, first after a second and then ever more seldom.

    Parameters:
        baseline: events per second that each VM always has.
        most: the largest balance, in events; at least 2, or one that keeps to the baseline would wait for it.
        launch: credits that a VM starts with, at most `most`. Default: `most`.
        max_delay: as of `Limit`.
        meter: what is counted.
        interval: seconds between two ticks. Enforcement does not wait for them; the balances shown do.
        name: in the journal.

    Raises:
        SpecError: a parameter is out of its range.
    """

    def __init__(
        self,
        baseline: float,
        most: float,
        *,
        launch: float | None = None,
        max_delay: float | None = 10.0,
        meter: Meter | str = Meter.BUS_LOCKS,
        interval: float = 0.1,
        name: str | None = None,
    ) -> None:
        self._most = within("most", most, 2, 1e9, "credits")
        self._limit = Limit(rate=baseline, burst=most, max_delay=max_delay)
        self._launch = self._most if launch is None else within("launch", launch, 0, most, "credits")
        self._interval = within("interval", interval, 1e-4, 3600, "seconds")
        self._meter = as_meter(meter)
        self._name = name or ("burst-credits" if self._meter is Meter.BUS_LOCKS else f"burst-credits-{self._meter}")
        self._accounts: dict[str, _Account] = {}
        self._opened = Once()
        self._time = 0
        self._closing: list[tuple[int, str]] = []  # when an account of one that is gone is worth what a new one is

    @property
    def name(self) -> str:
        return self._name

    @property
    def meter(self) -> Meter:
        return self._meter

    @property
    def interval(self) -> float | None:
        return self._interval

    @property
    def balances(self) -> Mapping[str, float]:
        """Credits of each VM that has an account, as of the tick in which it last did something."""
        return {name: account.balance for name, account in self._accounts.items()}

    def balance(self, vm: str, time: int | None = None) -> float:
        """Credits of a VM; at `time` (ns on the fleet's clock) if it did nothing since. One never seen has `launch`."""
        account = self._accounts.get(vm)
        if account is None:
            return self._launch
        return account.balance if time is None else self._earned(account, time)

    def decide(self, facts: Facts) -> list[Throttle]:
        self._time = facts.time
        return list(self._actions(facts))

    def refused(self, action: Action, reason: str) -> None:
        """It may not be in force, so it is asked for again."""
        account = self._accounts.get(action.vm or "")
        if account is not None:
            self._opened.refused((action.vm, account.launch), self._time)

    def _earned(self, account: _Account, time: int) -> float:
        return min(self._most, account.balance + max(0, time - account.seen) / 1e9 * self._limit.rate)

    def _actions(self, facts: Facts) -> Iterator[Throttle]:
        for vm in facts.vms.values():
            used = count_of(vm, self._meter)
            if used is None:
                continue
            account = self._accounts.get(vm.name)
            start = facts.time - round(facts.interval * 1e9)
            if account is None:
                account = self._accounts[vm.name] = _Account(-1, start, self._launch)
            account.gone = False
            before = self._earned(account, start)
            # Earned and spent within the tick: in which order is not known, so the balance stops at `most` at its end.
            account.balance = min(self._most, max(0.0, before + self._limit.rate * facts.interval - used))
            account.seen = facts.time
            account.launch = vm.launch
            if self._opened.due((vm.name, vm.launch), facts.time):
                account.out = False
                yield from self._open(vm, account, used, facts)
            else:
                yield from self._turn(vm, account, used, facts)
        self._close(facts)

    def _close(self, facts: Facts) -> None:
        """Who would start with no less if it came as a stranger needs no account. That of one that is gone stays until
        then, or launching anew would earn what was spent."""
        self._opened.forget(facts.gone)
        for name, launch in facts.gone:
            account = self._accounts.get(name)
            if account is not None and account.launch == launch:
                account.gone = True
                owes = max(0.0, self._launch - self._earned(account, facts.time))
                heapq.heappush(self._closing, (facts.time + math.ceil(owes / self._limit.rate * 1e9), name))
        while self._closing and self._closing[0][0] <= facts.time:
            _, name = heapq.heappop(self._closing)
            account = self._accounts.get(name)
            if account is not None and account.gone and self._earned(account, facts.time) >= self._launch * (1 - 1e-9):
                del self._accounts[name]

    def _open(self, vm: VmFacts, account: _Account, used: int, facts: Facts) -> Iterator[Throttle]:
        # A new bucket is full, and a burst that grows later is earned and not given: so it first gets as large as the
        # balance is, and then as large as it may grow.
        now = max(1.0, account.balance)
        if now < self._most:
            yield self._say(vm, account, used, facts, attrs.evolve(self._limit, burst=now), "burst credits so far")
        yield self._say(vm, account, used, facts, self._limit, "burst credits, and the baseline when they are used up")

    def _turn(self, vm: VmFacts, account: _Account, used: int, facts: Facts) -> Iterator[Throttle]:
        spent = account.balance < max(1.0, self._limit.rate * facts.interval)
        if not account.out and spent and vm.throttled > WAITED * facts.interval:
            account.out = True
            reason = f"burst credits used up: held to the baseline of {self._limit.rate:g}/s"
            yield self._say(vm, account, used, facts, self._limit, reason)
        elif account.out and account.balance >= WELL * self._most:
            account.out = False
            yield self._say(vm, account, used, facts, self._limit, "burst credits earned back")

    def _say(self, vm: VmFacts, account: _Account, used: int, facts: Facts, limit: Limit, reason: str) -> Throttle:
        evidence: dict[str, Any] = {
            "balance": round(account.balance, 3),
            "most": self._most,
            "baseline": self._limit.rate,
            "rate": round(used / facts.interval, 3),
            "throttled": round(vm.throttled, 6),
            "interval": facts.interval,
            "launch": vm.launch,
        }
        return Throttle(vm=vm.name, launch=vm.launch, limit=limit, meter=self._meter, reason=reason, evidence=evidence)
