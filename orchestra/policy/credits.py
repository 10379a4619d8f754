"""Burst credits: a VM earns credits at a baseline rate, spends them above it, and then falls back to the baseline.

Source: burstable instances of Amazon EC2 ("Key concepts for burstable performance instances", EC2 User Guide): credits
accrue at the baseline rate up to a maximum, usage spends them, launch credits are there from the start, and without
credits an instance in standard mode gets its baseline. Here a credit is one event (a bus lock, an exit).

A token bucket with a large burst does exactly this, and the C core has one. So the core spends credits and holds the VM
at the very event. This policy keeps a copy of the balances to show them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

import attrs

from ..model.actions import Action, Throttle
from ..model.spec import Limit
from .facts import Facts, VmFacts
from .metered import Metered, presses
from .retry import Once
from .validation import within

__all__ = ["BurstCredits"]

WELL: Final = 0.1
"""Part of the largest balance. A VM that had no credits counts as recovered from here on. With a lower one, a VM at its
baseline could be used up and recovered in turn, with a row in the journal each time."""


@attrs.define(eq=False)
class _Account:
    generation: int
    seen: int  # nanoseconds: the time of the balance
    balance: float
    out: bool = False
    gone: bool = False


@attrs.define(eq=False, slots=False)
class BurstCredits(Metered):
    """Let each VM do `baseline` events a second for good, and more for as long as it has credits.

    A VM earns a credit for each event that the baseline allows and the VM does not do, up to `most`. Above the baseline
    the VM spends credits. When the credits are used up, the VM is held to the baseline. So in any window of *t* seconds
    a VM does at most ``most + baseline * t`` events, whatever it tries. While it has credits, only other limits bound
    its speed: give the fleet a host limit.

    The policy finds a VM at the first tick in which the VM was active, and takes the events of that tick off its
    credits. A VM that is launched again under its name keeps its balance, so a new launch earns nothing. If a limit was
    refused, the policy asks for it again after a second, and then after twice as long each time, up to 64 s.

    Parameters:
        baseline: events per second that each VM always has.
        most: the largest balance, in events; at least 2: with less, a VM that keeps to the baseline would wait.
        launch: credits that a VM starts with, at most `most`. Default: `most`.
        max_delay: as of `Limit`, in seconds.
        meter: the events that are counted.
        interval: seconds between two ticks. The core enforces at each event; only the balances shown wait for a tick.
        name: the policy's name in the journal.

    Raises:
        SpecError: a parameter is out of its range.
    """

    KIND: ClassVar[str] = "burst-credits"

    _baseline: float
    _most: float
    _launch: float | None = attrs.field(default=None, kw_only=True)
    _max_delay: float | None = attrs.field(default=10.0, kw_only=True)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        within("most", self._most, 2, 1e9, "credits")
        self._limit = Limit(rate=self._baseline, burst=self._most, max_delay=self._max_delay)
        self._first = self._most if self._launch is None else within("launch", self._launch, 0, self._most, "credits")
        self._accounts: dict[str, _Account] = {}
        self._opened = Once()
        self._time = 0
        self._closing: list[tuple[int, str]] = []  # when the balance of a VM that is gone reaches that of a new one

    @property
    def balances(self) -> Mapping[str, float]:
        """Credits of each VM that has an account, as of the last tick in which the VM was active."""
        return {name: account.balance for name, account in self._accounts.items()}

    def balance(self, vm: str, time: int | None = None) -> float:
        """Credits of a VM. A VM that was never seen has `launch`.

        Parameters:
            time: nanoseconds on the fleet's clock: the balance at that time, if the VM was idle since its last tick.
                None: the balance as of that last tick.
        """
        account = self._accounts.get(vm)
        if account is None:
            return self._first
        return account.balance if time is None else self._earned(account, time)

    def decide(self, facts: Facts) -> list[Throttle]:
        self._time = facts.time
        return list(self._actions(facts))

    def refused(self, action: Action, reason: str) -> None:
        """Note that a limit may not be in force, so that the policy asks for it again."""
        account = self._accounts.get(action.vm or "")
        if account is not None:
            self._opened.refused((action.vm, account.generation), self._time)

    def _earned(self, account: _Account, time: int) -> float:
        return min(self._most, account.balance + max(0, time - account.seen) / 1e9 * self._limit.rate)

    def _actions(self, facts: Facts) -> Iterator[Throttle]:
        """Update the balances. This runs for each active VM in each tick, so it does no more than it has to."""
        start = facts.time - round(facts.interval * 1e9)
        most, rate, gained = self._most, self._limit.rate, self._limit.rate * facts.interval
        few = max(1.0, gained)
        count, accounts = self._count, self._accounts
        for vm in facts.vms.values():
            used = count(vm)
            if used is None:
                continue
            account = accounts.get(vm.name)
            if account is None:
                account = accounts[vm.name] = _Account(-1, start, self._first)
            account.gone = False
            before = account.balance
            if account.seen < start:
                before = min(most, before + (start - account.seen) / 1e9 * rate)
            # The order in which credits were earned and spent within the tick is not known. So the balance is cut to
            # `most` only at the end of the tick.
            account.balance = min(most, max(0.0, before + gained - used))
            account.seen = facts.time
            account.generation = vm.generation
            if self._opened.due((vm.name, vm.generation), facts.time):
                account.out = False
                yield from self._open(vm, account, used, facts)
            elif account.out or account.balance < few:
                yield from self._turn(vm, account, used, facts)
        self._close(facts)

    def _close(self, facts: Facts) -> None:
        """Drop the accounts of VMs that are gone, once their balance is no less than that of a new VM.

        Until then an account stays: else a new launch would earn what was spent.
        """
        self._opened.forget(facts.gone)
        for name, generation in facts.gone:
            account = self._accounts.get(name)
            if account is not None and account.generation == generation:
                account.gone = True
                owes = max(0.0, self._first - self._earned(account, facts.time))
                heapq.heappush(self._closing, (facts.time + math.ceil(owes / self._limit.rate * 1e9), name))
        while self._closing and self._closing[0][0] <= facts.time:
            _, name = heapq.heappop(self._closing)
            account = self._accounts.get(name)
            if account is not None and account.gone and self._earned(account, facts.time) >= self._first * (1 - 1e-9):
                del self._accounts[name]

    def _open(self, vm: VmFacts, account: _Account, used: int, facts: Facts) -> Iterator[Throttle]:
        # A new bucket is full, and a bucket earns the tokens of a burst that grows later. So the bucket first gets a
        # burst as large as the balance, and then one as large as the balance may grow.
        now = max(1.0, account.balance)
        if now < self._most:
            yield self._say(vm, account, used, facts, attrs.evolve(self._limit, burst=now), "burst credits so far")
        yield self._say(vm, account, used, facts, self._limit, "burst credits, and the baseline when they are used up")

    def _turn(self, vm: VmFacts, account: _Account, used: int, facts: Facts) -> Iterator[Throttle]:
        spent = account.balance < max(1.0, self._limit.rate * facts.interval)
        if not account.out and spent and presses(vm, facts.interval):
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
            "generation": vm.generation,
        }
        return Throttle(
            vm=vm.name, generation=vm.generation, limit=limit, meter=self.meter, reason=reason, evidence=evidence
        )
