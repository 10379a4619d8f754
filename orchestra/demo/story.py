"""The demo's story: quiet tenants and noisy neighbours in one fleet, told in three acts to an `Audience`.

It knows nothing of terminals, and runs on any backend, so tests can tell it in no time on a scripted one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from time import process_time
from typing import Any, Final, Protocol

import attrs
import trio

from ..backend import Backend
from ..fleet.fleet import Fleet
from ..fleet.open import open_fleet
from ..machine.vm import Vm
from ..model.actions import Applied, Pause, Resume, Throttle
from ..model.errors import SpecError
from ..model.spec import Limit, Meter, VmSpec
from ..output.numbers import shown, tidy
from . import guests
from .account import Act, Result, Row, Sample, Span, VmSummary

__all__ = ["Audience", "Plan", "Story"]

FRAME: Final = 0.25
"""Seconds between two looks: often enough for a viewer to follow, and too little load for the guests to notice."""
SPARING: Final = 4
"""On a slow host, the time between two looks is at least this many times as long as the last look and its display
took."""
SHARE: Final = 0.05
"""A noisy VM's budget, as a share of its rate without a limit..."""
MOST: Final = 1000
"""... but no more than this a second: a number that an operator may choose, and so low that the waits themselves cost
almost no CPU."""
MORE: Final = 4
MOST_DELAY: Final = 1.0
"""Seconds of the longest wait: even a VM with the smallest budget still shows that it runs."""
MOST_VMS: Final = 1000

TENANTS: Final = ("acme", "globex")
NOISY_TENANT: Final = "initech"
EVENTS: Final = {Meter.BUS_LOCKS: "bus locks", Meter.EXITS: "exits", Meter.ANSWERS: "answers"}


@attrs.frozen(kw_only=True)
class Plan:
    """What to play.

    Parameters:
        vms: in the fleet, the noisy ones among them.
        noisy: how many are noisy neighbours, at least one.
        limit: events per second that each noisy VM may make from act 2 on; None: a part of what it
            made in act 1, and no more than 1000.
        seconds: of all acts together.
        backend: as for `open_fleet`.
        cpus: how many of the host's CPUs the VMs share, as they do on a host that is full; None: no matter.
        advice: what would make it better, a sentence.
    """

    vms: int = 6
    noisy: int = 2
    limit: float | None = None
    seconds: float = 12.0
    backend: str | Backend = "auto"
    cpus: int | None = None
    advice: str = ""

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.vms <= MOST_VMS:
            raise SpecError(f"vms={self.vms}: must be from 1 to {MOST_VMS}")
        if not 1 <= self.noisy <= self.vms:
            raise SpecError(f"noisy={self.noisy}: must be from 1 to vms={self.vms}, which counts them as well")
        if not 0.05 <= self.seconds <= 86400:
            raise SpecError(f"seconds={self.seconds!r}: must be from 0.05 to 86400")
        if self.limit is not None:
            Limit(rate=self.limit * MORE)


class Audience(Protocol):
    """Shows the story. It is called between two looks, so its methods must not take long."""

    def opened(self, plan: Plan, fleet: Fleet, meter: Meter) -> None: ...
    def act(self, act: Act, time: float) -> None: ...
    def applied(self, applied: Applied, time: float) -> None: ...
    def sample(self, sample: Sample) -> None: ...


@attrs.frozen
class _Mark:
    """The counters of one VM at one time."""

    time: int
    count: int
    work: int
    throttled: float
    released: int


class Story:
    """One telling: `await story.play()`, then `story.result`, which is there however the telling ended, if it began."""

    def __init__(self, plan: Plan, audience: Audience) -> None:
        self.plan = plan
        self.result: Result | None = None
        self._audience = audience
        self._tick = min(FRAME, plan.seconds / 12)
        self._vms: list[Vm] = []
        self._work: dict[str, int] = {}
        self._acts: list[Act] = []
        self._samples: list[Sample] = []
        self._spans: dict[str, list[Span]] = {}
        self._began: dict[str, _Mark] = {}
        self._used: list[float] = []
        self._cpu_time = self._since = 0.0
        self._window: deque[dict[str, _Mark]] = deque(maxlen=3)
        self._complete = False
        self._fleet: Fleet
        self._meter: Meter
        self._start = 0

    async def play(self) -> None:
        """Play all acts. Cancelling it ends the play at once, then the fleet, and leaves a result of what was played.

        A fleet that was cancelled together with the play could be gone before anybody looked at what its guests did.
        """
        play = trio.CancelScope()

        async def end_the_play() -> None:
            try:
                await trio.sleep_forever()
            finally:
                play.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_the_play)
            with trio.CancelScope(shield=True):
                await self._play_acts(play)
            nursery.cancel_scope.cancel()

    async def _play_acts(self, play: trio.CancelScope) -> None:
        tenants = dict.fromkeys((*TENANTS, NOISY_TENANT))
        async with open_fleet(backend=self.plan.backend, bus_locks="auto", tenants=tenants) as fleet:
            self._fleet = fleet
            self._meter = Meter.BUS_LOCKS if fleet.bus_locks else Meter.EXITS
            self._audience.opened(self.plan, fleet, self._meter)
            with play:
                await self._launch()
                self._start = fleet.now()
                try:
                    await self._play()
                finally:
                    self._finish()

    # ---- the play

    async def _launch(self) -> None:
        kind = "locks" if self._meter is Meter.BUS_LOCKS else "exits"
        quiet, noisy = guests.image(f"quiet_{kind}"), guests.image(f"noisy_{kind}")
        names = [f"quiet-{i + 1}" for i in range(self.plan.vms - self.plan.noisy)]
        for i, name in enumerate(names):
            spec = VmSpec(name=name, tenant=TENANTS[i % len(TENANTS)], boot=quiet, memory=guests.MEMORY)
            self._vms.append(await self._fleet.launch(spec, paused=True))
        for i in range(self.plan.noisy):
            spec = VmSpec(name=f"noisy-{i + 1}", tenant=NOISY_TENANT, boot=noisy, memory=guests.MEMORY)
            self._vms.append(await self._fleet.launch(spec, paused=True))
        there = sorted(os.sched_getaffinity(0))
        if self.plan.cpus is not None and self.plan.cpus < len(there):
            self._confine(there[: self.plan.cpus])
        for vm in self._vms:
            await vm.resume()

    def _confine(self, cpus: list[int]) -> None:
        names = {f"{vm.name}/{vcpu}" for vm in self._vms for vcpu in range(vm.spec.vcpus)}
        for thread in Path("/proc/self/task").iterdir():
            if (thread / "comm").read_text().strip() in names:  # they are paused: none ends meanwhile
                os.sched_setaffinity(int(thread.name), cpus)

    async def _play(self) -> None:
        noun, noisy = EVENTS[self._meter], [vm for vm in self._vms if self._is_noisy(vm)]
        self._announce("everybody runs free", f"No limits. The noisy VMs make as many {noun} as they can.")
        await self._run(0.3)

        self._announce("the limits go on", "The noisy VMs are held to a budget; nobody else is touched.")
        await self._limit(noisy)
        await self._run(0.4)

        first = noisy[0]
        self._announce("a limit changes", f"{first.name} gets more, while it runs: no pause, no restart.")
        budget = self._budget(first)
        if budget is not None:
            reason = f"its owner asked for {MORE} times as much"
            evidence = {"before": budget, "after": budget * MORE}
            await self._apply(self._throttle(first.name, Limit(rate=budget * MORE), reason, evidence))
        await self._run(0.3)
        self._complete = any(vm.outcome is None for vm in self._vms)

    def _announce(self, title: str, text: str) -> None:
        act = Act(len(self._acts) + 1, title, text)
        self._acts.append(act)
        self._audience.act(act, self._time())

    async def _run(self, share: float) -> None:
        self._window.clear()
        self._since = self._time()
        self._began = self._look()
        self._cpu_time = process_time()
        self._window.append(self._began)
        spent = 0.0
        end = trio.current_time() + share * self.plan.seconds
        while (left := end - trio.current_time()) > self._tick / 4 and any(vm.outcome is None for vm in self._vms):
            await trio.sleep(min(max(self._tick, spent * SPARING), left))
            looked = trio.current_time()
            self._sample()
            spent = trio.current_time() - looked
        self._end_act()

    async def _limit(self, noisy: list[Vm]) -> None:
        """Act 2's limits, from what act 1 showed."""
        spans = {name: spans[0] for name, spans in self._spans.items()}
        total = sum(span.rate for span in spans.values())
        quiet = sum(span.rate for vm in self._vms if not self._is_noisy(vm) for span in [spans[vm.name]])
        each = sum(spans[vm.name].rate for vm in noisy) / len(noisy)
        budget = self.plan.limit or tidy(min(SHARE * each, MOST))
        # Far above the sum of the budgets and of what quiet VMs need, so that no VM waits for it in this play.
        ceiling = tidy(4 * (MORE * budget * len(noisy) + quiet))
        actions = []
        for vm in noisy:
            rate = spans[vm.name].rate
            share = rate / total if total else 0.0
            reason = f"it made {shown(rate)}/s, {share:.0%} of the fleet's"
            evidence = {"measured": round(rate, 1), "share": round(share, 4)}
            actions.append(self._throttle(vm.name, Limit(rate=budget), reason, evidence))
        top = Limit(rate=ceiling, burst=max(ceiling / 10, 10 * len(self._vms)))
        actions.append(self._throttle(None, top, "a ceiling for the next noisy one", {"measured": round(total, 1)}))
        await self._apply(*actions)

    def _throttle(self, vm: str | None, limit: Limit, reason: str, evidence: Mapping[str, Any]) -> Throttle:
        limit = attrs.evolve(limit, max_delay=MOST_DELAY)
        return Throttle(vm=vm, limit=limit, meter=self._meter, reason=reason, evidence=evidence)

    async def _apply(self, *actions: Throttle) -> None:
        """Apply all actions first, and show them afterwards, as the audience may take its time."""
        for applied in [await self._fleet.apply(action) for action in actions]:
            self._audience.applied(applied, (applied.time - self._start) / 1e9)

    # ---- looking

    def _is_noisy(self, vm: Vm) -> bool:
        return vm.tenant == NOISY_TENANT

    def _time(self) -> float:
        return (self._fleet.now() - self._start) / 1e9

    def _budget(self, vm: Vm) -> float | None:
        limit = self._limit_of(vm)
        return None if limit is None else limit.rate

    def _limit_of(self, vm: Vm) -> Limit | None:
        limit: Limit | None = getattr(vm.statistics(), self._meter.field)
        return limit

    def _mark(self, vm: Vm) -> _Mark:
        statistics = vm.statistics()
        count = statistics.bus_locks if self._meter is Meter.BUS_LOCKS else sum(statistics.exits.values())
        work = guests.work_done(self._work.get(vm.name, 0), vm.read_memory(guests.WORK, 4))
        self._work[vm.name] = work
        return _Mark(self._fleet.now(), count or 0, work, statistics.throttled_seconds, statistics.released)

    def _look(self) -> dict[str, _Mark]:
        return {vm.name: self._mark(vm) for vm in self._vms}

    def _sample(self) -> None:
        before, now = self._window[0], self._look()
        self._window.append(now)
        rows = tuple(self._row(vm, before[vm.name], now[vm.name]) for vm in self._vms)
        quiet = [row for row in rows if not row.noisy]
        gain = self._gain(sum(row.work_rate for row in quiet), *(row.name for row in quiet))
        sample = Sample(round(self._time(), 4), len(self._acts), rows, gain)
        self._samples.append(sample)
        self._audience.sample(sample)

    def _row(self, vm: Vm, before: _Mark, now: _Mark) -> Row:
        seconds = max((now.time - before.time) / 1e9, 1e-9)
        work_rate = (now.work - before.work) / seconds
        return Row(
            name=vm.name,
            tenant=vm.tenant,
            noisy=self._is_noisy(vm),
            state=str(vm.state),
            throttled=vm.throttled,
            count=now.count,
            rate=(now.count - before.count) / seconds,
            work=now.work,
            work_rate=work_rate,
            throttled_seconds=now.throttled,
            throttled_share=min((now.throttled - before.throttled) / seconds, 1.0),
            budget=self._budget(vm),
            gain=self._gain(work_rate, vm.name),
        )

    def _gain(self, work_rate: float, *names: str) -> float | None:
        """By how much that rate is more than what these VMs did in act 1."""
        free = sum(spans[0].work_rate for name, spans in self._spans.items() if name in names)
        return work_rate / free - 1 if free else None

    def _end_act(self, *, cut: bool = False) -> None:
        used, first = process_time() - self._cpu_time, self._began[self._vms[0].name]
        self._used.append(used * 1e9 / max(self._fleet.now() - first.time, 1))
        for vm in self._vms:
            begin, end = self._began[vm.name], self._mark(vm)
            span = Span(
                act=len(self._acts),
                seconds=(end.time - begin.time) / 1e9,
                count=end.count - begin.count,
                work=end.work - begin.work,
                throttled_seconds=end.throttled - begin.throttled,
                limit=self._limit_of(vm),
                cut=cut,
                released=end.released - begin.released,
            )
            self._spans.setdefault(vm.name, []).append(span)
        self._began = {}

    def _finish(self) -> None:
        # The story ended in the middle of an act. An act that had only just begun has no figures.
        if self._began and self._time() - self._since > self._tick / 4:
            self._end_act(cut=True)
        self.result = Result(
            complete=self._complete,
            meter=self._meter,
            backend=self._fleet.backend.name,
            why=self._fleet.backend.why,
            detection=self._fleet.bus_lock_detection,
            began=self._start,
            seconds=self._time(),
            acts=tuple(self._acts),
            samples=tuple(self._samples),
            # The resume by which the guests begin is no part of the story.
            actions=tuple(
                applied for applied in self._fleet.actions() if not isinstance(applied.action, Pause | Resume)
            ),
            ceiling=self._fleet.limit if self._meter is Meter.BUS_LOCKS else self._fleet.exit_limit,
            vms=tuple(self._summary(vm) for vm in self._vms),
            cpus=self.plan.cpus,
            cpus_used=tuple(self._used),
        )

    def _summary(self, vm: Vm) -> VmSummary:
        statistics, mark = vm.statistics(), self._mark(vm)
        return VmSummary(
            name=vm.name,
            tenant=vm.tenant,
            noisy=self._is_noisy(vm),
            state=str(vm.state),
            outcome=vm.outcome,
            count=mark.count,
            work=mark.work,
            throttled_seconds=mark.throttled,
            released=statistics.released,
            spans=tuple(self._spans.get(vm.name, ())),
        )
