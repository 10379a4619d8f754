"""The runs of a VM, one after another. The VM's task starts each run, waits for its end, and waits between two runs.

    start ─▶ a run ─▶ its outcome ─▶ succession ┬ nothing ─────────▶ the VM's outcome
      ▲                                         └ another ─▶ wait ─┐
      └────────────────────────────────────────────────────────────┘

`lifecycle` has the states of one run and of the VM; `restart.Succession` decides what follows a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import attrs
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
        """Journal that the VM came into another state."""


def in_a_line(outcome: Outcome) -> str:
    """An outcome in one line, for the journal."""
    match outcome:
        case Halted():
            return "halted"
        case Shutdown(reason=reason, code=code):
            return f"shutdown: {reason}" + ("" if code is None else f", code {code}")
        case Stopped(reason=reason):
            return reason
        case Failed():  # the console's lines are the guest's, and would be kept once more for each restart
            return str(attrs.evolve(outcome, console=""))
    return str(outcome)


class Renewal:
    """What callers of `Runs.reset` wait for. `over` is set when another run has started, or could not be started, or
    none will be. `error` says why a run could not be started."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.error: Exception | None = None


class Runs:
    """The runs of one VM; for the fleet's thread.

    Attributes:
        guest: the present run, or the last run while the VM waits for the next. None: the first run is being built.
        outcome: how the VM ended. None: it has not.
        waits: why the VM waits for its next run, for the journal. "": it does not wait.
        stop_reason: the outcome that a stop asks for. None: nothing asked the VM to stop.
        succession: decides what follows a run, and counts restarts and resets.
        ended: set when the VM has an outcome.
        logging: held while the dirty log is switched and while a run starts, so that no run starts with the setting
            from before the change.
    """

    def __init__(
        self, context: InstanceContext, vm: Supervised, levels: Sequence[tuple[Budgets, Budgets, Budgets, Budgets]]
    ) -> None:
        self.guest: Instance | None = None
        self.outcome: Outcome | None = None
        self.waits = ""
        self.stop_reason: Stopped | None = None
        self.succession = Succession(vm.spec, context.backend.now())
        self.ended = trio.Event()
        self.logging = trio.Lock()
        self._context = context
        self._vm = vm
        self._name = vm.spec.name
        self._levels = levels
        self._retired: Sequence[Counters] | None = None  # what former runs counted
        self._dirty_before: int | None = None  # pages, in former runs
        self._unmapped: trio.Event | None = None
        self._reset_reason: str | None = None
        self._nudged = trio.Event()  # a stop or a reset came; it ends the wait for the next run
        self._renewal = Renewal()

    # ---- requests

    def stop(self, outcome: Stopped) -> bool:
        """End the VM, and don't wait for that. Returns whether this is the first stop."""
        first = self.stop_reason is None and self.outcome is None
        self.stop_reason = self.stop_reason or outcome
        self._nudge()
        if self.guest is not None and self.outcome is None:
            self.guest.end(self.stop_reason)
        return first

    async def reset(self, reason: str) -> None:
        """As `Vm.reset`. The VM must have started, and must not have ended.

        Raises:
            StateError: the VM could not be reset, or ended before the reset.
        """
        renewal = self._renewal
        self._reset_reason = self._reset_reason or reason
        self._nudge()
        assert self.guest is not None
        self.guest.end(Stopped(reason))
        await renewal.over.wait()
        if self.outcome is not None:
            raise StateError(f"vm {self._name!r} has ended before it was reset: {in_a_line(self.outcome)}")
        if (error := renewal.error) is not None:
            raise StateError(
                f"vm {self._name!r} could not be reset: {type(error).__name__}: {error}; `restart` says what follows"
            ) from error

    def _renewed(self, error: Exception | None = None) -> None:
        """A run has started, or a reset failed: all who asked for a reset until now have their answer."""
        self._reset_reason = None
        renewal, self._renewal = self._renewal, Renewal()
        renewal.error = error
        renewal.over.set()

    def _nudge(self) -> None:
        self._nudged.set()
        self._nudged = trio.Event()

    # ---- the task

    async def supervise(self, *, task_status: Any) -> None:
        """The VM's task: start a run, and another as its spec says or a caller asks, until none follows.

        Order at the end: the outcome is set before anything is woken, so every waiter finds it.

        Parameters:
            task_status: `started` is called when the first run is set up.

        Raises:
            Exception: the first run could not be set up. Later errors become the outcome (`Failed`).
        """
        started, following = False, None
        outcome: Outcome = Stopped(CLOSED)
        try:
            while True:
                begun = trio.current_time()
                try:
                    guest = await self._start(following)
                    outcome = Stopped(CLOSED)  # the outcome of the run before no longer counts
                    if not started:
                        started = True
                        task_status.started()
                    outcome = await guest.run(self._old_is_unmapped)
                except Exception as error:  # any error ends this VM, and no other
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
            for end in (
                self._vm.console.close,
                self._vm.ports.close,
                *(requests.end for requests in self._vm.claims.requests()),
            ):
                with contained(f"vm {self._name}: its readers"):
                    end()
            self._renewal.over.set()
            self.ended.set()

    async def _follow(self, outcome: Outcome, ran: float) -> Next | None:
        """Wait until the next run may start, and return it; None: there is no other run."""
        asked, self._reset_reason = self._reset_reason, None
        following = None
        if self.stop_reason is None:
            following = self.succession.after(outcome, ran, self._context.backend.now(), asked)
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
                again = self.succession.after(outcome, ran, self._context.backend.now(), asked)
                assert again is not None
                following, due = again, self._wait_for(again, outcome)
            elif trio.current_time() >= due:
                return following

    def _wait_for(self, following: Next, outcome: Outcome) -> float:
        """Journal the wait, if there is one. Returns the time when the next run may start."""
        if following.delay > 0:
            seconds = max(0.01, round(following.delay, 2))
            what, why = ("reset", following.why) if following.kind == "reset" else ("restarted", in_a_line(outcome))
            self.waits = f"waits {seconds:g} s to be {what}: {why}"
            with contained(f"vm {self._name}: the journal"):
                self._vm.became(self.waits)
        return trio.current_time() + following.delay

    async def _start(self, following: Next | None) -> Instance:
        try:
            return await self._make(following)
        except Exception as error:
            if following is not None and following.kind == "reset":
                self._renewed(error)  # a restart may follow, for ever: nobody waits for that
            raise

    async def _make(self, following: Next | None) -> Instance:
        vm = self._vm
        if following is not None:
            vm.claims.reset_devices()
        try:  # `log_dirty` changes the old guest before this, or the new one after it
            self.logging.acquire_nowait()  # without a turn of the loop: nobody has it at a launch
        except trio.WouldBlock:
            await self.logging.acquire()
        try:
            if self.guest is not None and vm.spec.backing.upfront:  # the host can't be asked for it twice
                await self._context.workers.discard(self.guest.memory).wait()
            guest = Instance(self._context, vm.wanted.spec(vm.spec), self._levels, vm)
            await guest.start()
            if self.guest is not None:
                with contained(f"vm {self._name}: the run before"):
                    self._retire(self.guest)
            self.guest = guest
        finally:
            self.logging.release()
        why = "" if following is None else self.succession.begin(following)
        if self.stop_reason is not None:
            guest.end(self.stop_reason)
        with contained(f"vm {self._name}: the journal"):
            vm.became(why)
        self._renewed()
        return guest

    async def _old_is_unmapped(self) -> None:
        """Wait until the last run's memory is unmapped: a guest that resets itself all the time never has a third. No
        checkpoint if there was none."""
        await self.wait_unmapped()

    async def wait_unmapped(self) -> None:
        """Wait until the memory that was given back is unmapped."""
        if self._unmapped is not None:
            await self._unmapped.wait()

    # ---- figures of all runs

    def _retire(self, guest: Instance) -> None:
        """Another run takes the place of `guest`: keep its figures, and give its memory back."""
        self._dirty_before = self.dirty_pages()
        self._retired = self.counters()
        self._unmapped = self._context.workers.discard(guest.memory)

    def counters(self) -> Sequence[Counters]:
        """The counters of each vCPU, over all runs so far."""
        latest = self.guest.cores.counters() if self.guest is not None else []
        if self._retired is None or not latest:
            return self._retired or latest
        return [add(a, b) for a, b in zip(self._retired, latest, strict=True)]

    def dirty_pages(self) -> int | None:
        """Pages of 4 KiB that were written, over all runs so far. None: no run was ever logged."""
        dirty = None if self.guest is None else self.guest.dirty
        pages, read = (0, 0) if dirty is None else dirty.sums()
        return (self._dirty_before or 0) + pages if read else self._dirty_before

    def close(self) -> None:
        """The VM left the fleet: give its memory back."""
        if self.guest is not None:
            self._unmapped = self._context.workers.discard(self.guest.memory)
        self.succession.close()
