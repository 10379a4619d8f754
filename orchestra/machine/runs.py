"""The runs of a VM, one after another: its task, which starts them, ends them, and waits between them.

    start ─▶ a run ─▶ its outcome ─▶ succession ┬ nothing ─────────▶ the VM's outcome
      ▲                                         └ another ─▶ wait ─┐
      └────────────────────────────────────────────────────────────┘

`lifecycle` has the states of one run and of the VM, `succession` decides what follows a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import trio

from ..model.actions import Failed, Halted, Outcome, Shutdown, Stopped
from ..model.errors import StateError
from ..model.spec import VmSpec
from ..native.core import Counters
from .budget import Budgets
from .contain import contained
from .context import InstanceContext, Owner
from .instance import CLOSED, Instance
from .restart import Next, Succession
from .statistics import add

__all__ = ["Runs", "in_a_line"]


class Supervised(Owner, Protocol):
    """The VM whose runs these are."""

    spec: VmSpec

    def became(self, reason: str) -> None:
        """It came into another state: journal it."""


def in_a_line(outcome: Outcome) -> str:
    """For the journal."""
    match outcome:
        case Halted():
            return "halted"
        case Shutdown(reason=reason, code=code):
            return f"shutdown: {reason}" + ("" if code is None else f", code {code}")
        case Stopped(reason=reason):
            return reason
    return str(outcome)


class Runs:
    """Of one VM; for the fleet's thread.

    Attributes:
        guest: the present run, or the last one while the next is waited for. None: the first one is being built.
        outcome: how the VM ended. None: it has not.
        waits: that its next run is waited for, and why. "": it is not.
        stop_reason: why somebody wants it to stop. None: nobody does.
        succession: how often it was restarted and reset.
        ended: set when it has an outcome.
        logging: held while the log of its memory is switched, so that no run begins with the one before the change.
    """

    def __init__(
        self, house: InstanceContext, vm: Supervised, levels: Sequence[tuple[Budgets, Budgets, Budgets, Budgets]]
    ) -> None:
        self.guest: Instance | None = None
        self.outcome: Outcome | None = None
        self.waits = ""
        self.stop_reason: Stopped | None = None
        self.succession = Succession(vm.spec, house.backend.now())
        self.ended = trio.Event()
        self.logging = trio.Lock()
        self._house = house
        self._vm = vm
        self._name = vm.spec.name
        self._levels = levels
        self._retired: Sequence[Counters] | None = None  # what former runs counted
        self._dirty_before: int | None = None  # pages, in former runs
        self._unmapped: trio.Event | None = None
        self._reset_reason: str | None = None
        self._nudged = trio.Event()  # somebody wants something while the VM waits for its next run
        self._renewed = trio.Event()  # another run has started, or none will

    # ---- what is asked of it

    def stop(self, outcome: Stopped) -> bool:
        """Have it end, and don't wait. Whether nobody wanted that before."""
        first = self.stop_reason is None and self.outcome is None
        self.stop_reason = self.stop_reason or outcome
        self._nudge()
        if self.guest is not None and self.outcome is None:
            self.guest.end(self.stop_reason)
        return first

    async def reset(self, reason: str) -> None:
        """As `Vm.reset`. It has not ended, and was started."""
        renewed = self._renewed
        self._reset_reason = self._reset_reason or reason
        self._nudge()
        assert self.guest is not None
        self.guest.end(Stopped(reason))
        await renewed.wait()
        if self.outcome is not None:
            raise StateError(f"vm {self._name!r} has ended before it was reset: {in_a_line(self.outcome)}")

    def _nudge(self) -> None:
        self._nudged.set()
        self._nudged = trio.Event()

    # ---- the task

    async def supervise(self, *, task_status: Any) -> None:
        """Run it, and again as its spec says or somebody asks, and leave nothing behind."""
        started, following = False, None
        outcome: Outcome = Stopped(CLOSED)
        try:
            while True:
                begun = trio.current_time()
                try:
                    guest = await self._start(following)
                    outcome = Stopped(CLOSED)  # how the run before ended is over
                    if not started:
                        started = True
                        task_status.started()
                    outcome = await guest.run(self._old_is_unmapped)
                except Exception as error:  # whatever it is, it is the end of this VM and of no other
                    what = "launch" if following is None else following.kind
                    outcome = Failed(f"{what}: {type(error).__name__}: {error}")
                    if not started:
                        raise
                try:
                    following = await self._follow(outcome, trio.current_time() - begun)
                except Exception as error:
                    outcome, following = Failed(f"supervision: {type(error).__name__}: {error}"), None
                if following is None:
                    return
        finally:
            if isinstance(outcome, Stopped) or self.succession.is_reset(outcome):  # another run was to come
                outcome = self.stop_reason or Stopped(CLOSED)
            self.outcome = outcome
            with contained(f"vm {self._name}: the journal"):
                self._vm.became(in_a_line(outcome))
            for end in (self._vm.console.close, *(requests.end for requests in self._vm.claims.requests())):
                with contained(f"vm {self._name}: its readers"):
                    end()
            self._renewed.set()
            self.ended.set()

    async def _follow(self, outcome: Outcome, ran: float) -> Next | None:
        """Wait until the next run may start; None: none does."""
        asked, self._reset_reason = self._reset_reason, None
        following = None
        if self.stop_reason is None:
            following = self.succession.after(outcome, ran, self._house.backend.now(), asked)
        if following is None:
            return None
        try:
            return await self._turn(following, outcome, ran)
        finally:
            self.waits = ""

    async def _turn(self, following: Next, outcome: Outcome, ran: float) -> Next | None:
        due = self._wait_for(following, outcome)
        while True:
            with trio.move_on_at(due):
                await self._nudged.wait()
            if self.stop_reason is not None:
                return None
            asked, self._reset_reason = self._reset_reason, None
            if asked is not None and following.kind == "restart":
                again = self.succession.after(outcome, ran, self._house.backend.now(), asked)
                assert again is not None
                following, due = again, self._wait_for(again, outcome)
            elif trio.current_time() >= due:
                return following

    def _wait_for(self, following: Next, outcome: Outcome) -> float:
        """Say so, where there is something to wait for; until when."""
        if following.delay > 0:
            seconds = max(0.01, round(following.delay, 2))
            what, why = ("reset", following.why) if following.kind == "reset" else ("restarted", in_a_line(outcome))
            self.waits = f"waits {seconds:g} s to be {what}: {why}"
            with contained(f"vm {self._name}: the journal"):
                self._vm.became(self.waits)
        return trio.current_time() + following.delay

    async def _start(self, following: Next | None) -> Instance:
        vm = self._vm
        if following is not None:
            vm.claims.reset_devices()
        async with self.logging:  # by now, or in the guest that there will be
            guest = Instance(self._house, vm.wanted.spec(vm.spec), self._levels, vm)
            await guest.start()
            if self.guest is not None:
                with contained(f"vm {self._name}: the run before"):
                    self._retire(self.guest)
            self.guest = guest
        self._reset_reason = None  # whoever asked until now has this run
        why = "" if following is None else self.succession.begin(following)
        if self.stop_reason is not None:
            guest.end(self.stop_reason)
        with contained(f"vm {self._name}: the journal"):
            vm.became(why)
        if following is not None:
            self._renewed.set()
            self._renewed = trio.Event()
        return guest

    async def _old_is_unmapped(self) -> None:
        """Before another run begins, or a guest that is reset all the time would have ever more memory."""
        await trio.lowlevel.checkpoint()
        await self.wait_unmapped()

    async def wait_unmapped(self) -> None:
        """Until the memory that was given back is."""
        if self._unmapped is not None:
            await self._unmapped.wait()

    # ---- what came of them

    def _retire(self, guest: Instance) -> None:
        """Another run has taken its place: keep its figures, and give its memory back."""
        self._dirty_before = self.dirty_pages()
        self._retired = self.counters()
        self._unmapped = self._house.workers.discard(guest.memory)

    def counters(self) -> Sequence[Counters]:
        """By vCPU, over all runs so far."""
        latest = self.guest.cores.counters() if self.guest is not None else []
        if self._retired is None or not latest:
            return self._retired or latest
        return [add(a, b) for a, b in zip(self._retired, latest, strict=True)]

    def dirty_pages(self) -> int | None:
        """Over all runs so far. None: none was ever logged."""
        dirty = None if self.guest is None else self.guest.dirty
        pages, read = (0, 0) if dirty is None else dirty.sums()
        return (self._dirty_before or 0) + pages if read else self._dirty_before

    def close(self) -> None:
        """The VM left the fleet: give its memory back."""
        if self.guest is not None:
            self._unmapped = self._house.workers.discard(self.guest.memory)
        self.succession.close()
