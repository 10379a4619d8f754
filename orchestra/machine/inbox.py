"""Serves the questions of vCPUs and the calls of devices in turns: one of each tenant in a round of the event loop.

vCPU: question → core → a turn → the task that claimed the address
doorbell, timer ───────→ a turn → the device

While nobody has anything to do, one of two tasks waits for questions: `Inbox.run`, or the task that answered last, in
its place (`stand_in`). So a guest that asks the same task again and again wakes that task and no other.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final, Protocol, TypeAlias

import trio

from ..native import lib
from ..native.core import FleetCore, Question, Settled, Sleeper, VcpuCore
from .devices.bus import Bus, Claim
from .devices.requests import Request, Requests

__all__ = ["Inbox", "Key"]

Key: TypeAlias = tuple[str, str]
"""Tenant and VM."""

Turn: TypeAlias = Callable[[], object]
"""A function that is called when it is a VM's turn."""


Failure: TypeAlias = Callable[[Exception], object]
"""Ends a VM whose turn raised an error."""

# As plain numbers: this is done for each access, and an enum's member costs as much to convert as the call.
ANSWERED, AGAIN, NOBODY = int(Settled.ANSWERED), int(Settled.AGAIN), int(Settled.NOBODY)


class Kicked(Protocol):
    """An engine that has to be kicked after the core has an answer, as `Engine.kick`."""

    def kick(self) -> None: ...


class Asker:
    """A vCPU that may ask questions."""

    __slots__ = ("_buses", "_core", "_engine", "_failed", "_index", "_request", "whose")

    def __init__(
        self, core: VcpuCore, engine: Kicked, index: int, whose: Key, ports: Bus, mmio: Bus, failed: Failure
    ) -> None:
        self._core = core
        self._failed = failed
        self._request: tuple[Requests, Request] | None = None  # the last that was delivered
        self._engine = engine
        self._index = index
        self._buses = {int(lib.ORC_IO): ports, int(lib.ORC_MMIO): mmio}
        self.whose = whose

    def ask(self, question: Question) -> None:
        """Hand a question to the task that has the claim now. If no task has: the core looks the address up again. An
        error ends this VM."""
        try:
            self._ask(question)
        except Exception as error:
            self._failed(error)

    def gone(self) -> None:
        """The vCPU has ended: no task is handed its access any more. In the next run it would be nobody's question."""
        if self._request is not None:
            requests, request = self._request
            requests.drop(request)

    def _ask(self, question: Question) -> None:
        claim = self._buses[question.bus].claimed.get(question.claim)
        number = question.number
        if claim is None or not isinstance(claim.handler, Requests):
            self._settle(number, AGAIN)
            return

        def settle(request: Request) -> None:
            self._settle(number, ANSWERED if request.answered else unanswered(claim), request.answer_bytes)

        request = Request(self._index, question.address, question.size, question.write, question.data, settle)
        self._request = claim.handler, request
        claim.handler.deliver(request)

    def _settle(self, number: int, how: int, answer: bytes = b"") -> None:
        if self._core.settle(number, how, answer):
            self._engine.kick()


def unanswered(claim: Claim) -> int:
    """What becomes of a question that its task gave back."""
    # A task that keeps its claim and does not answer: the guest reads ones. `AGAIN` would ask the same task for ever.
    return NOBODY if claim.live else AGAIN


class Inbox:
    """Hands the questions of vCPUs to tasks, and makes the other calls for a VM (`put`), in a fair order. All methods:
    fleet's thread.

    A vCPU puts its question into the core's list and waits in the core, without the interpreter's lock. The core
    signals this task only if the task sleeps. A tenant's VMs take turns, and each tenant gets one turn in a round of
    the event loop. So a tenant with many VMs, or with many vCPUs, is not served more often than the others, and the
    work of a round is bounded by the number of tenants that ask. The turns of one VM stay in order.
    """

    MOST: Final = 256
    """Questions that one round takes from the core at most, so that a round ends. The others come in the next round."""

    def __init__(self, core: FleetCore) -> None:
        self._core = core
        self._eventfd, self._deputys_eventfd = (core.asked_eventfds[who] for who in (Sleeper.MAIN, Sleeper.DEPUTY))
        self._askers: dict[int, Asker] = {}
        self._tenants: dict[str, dict[str, deque[Turn]]] = {}
        self._waits = False  # `run` waits for its eventfd
        self._deputy: object | None = None  # a task waits in its place: this call of `stand_in`

    def add(
        self, core: VcpuCore, engine: Kicked, index: int, whose: Key, buses: tuple[Bus, Bus], failed: Failure
    ) -> None:
        """Serve this vCPU from now on. `whose`: its tenant and VM."""
        self._askers[core.id] = Asker(core, engine, index, whose, *buses, failed)

    def remove(self, id: int) -> None:
        """Serve this vCPU no more. Questions that still wait for their turn, or for an answer, are dropped. `id`: of
        its core."""
        asker = self._askers.pop(id, None)
        if asker is not None:
            asker.gone()

    def put(self, whose: Key, turn: Turn) -> None:
        """Call `turn` when it is that VM's turn. `turn` must not raise: an error in it ends the fleet."""
        self._append(whose, turn)
        if self._waits:  # otherwise `run` looks before it sleeps; or it has ended, and nobody is there to be woken
            self._core.ring_asked()

    def _append(self, whose: Key, turn: Turn) -> None:
        tenant, vm = whose
        self._tenants.setdefault(tenant, {}).setdefault(vm, deque()).append(turn)

    async def run(self) -> None:
        """Serve until cancelled."""
        core = self._core
        while True:
            if not self.serve() and core.may_sleep_unasked():
                # Sleep at once. A few empty rounds first would answer the next question sooner on idle CPUs. But beside
                # guests that spin, the kernel lets a thread that slept run first, and makes a thread that spins wait.
                await self._sleep()
            else:
                await trio.lowlevel.checkpoint()

    async def _sleep(self) -> None:
        eventfd = self._eventfd
        self._waits = True
        try:
            await trio.lowlevel.wait_readable(eventfd)
            while self._deputy is not None:  # somebody rang just before the deputy came, which found what it was for
                with suppress(BlockingIOError):
                    os.eventfd_read(eventfd)
                await trio.lowlevel.wait_readable(eventfd)
        finally:
            self._waits = False
            self.recall()

    # ---- in the place of `run`

    def may_stand_in(self) -> bool:
        """Whether the calling task may wait in the place of `run`: while `run` waits, nobody else stands in, and no
        device has a turn."""
        return self._waits and self._deputy is None and not self._tenants

    async def stand_in(self) -> None:
        """Wait until there are questions, and serve one round; or until `recall`.

        When it returns or is cancelled, `run` has its place again: the caller may sleep for something else, for as long
        as it likes.

        A guest's next question often comes before the last one's answer has returned: the vCPU's thread takes over the
        CPU that woke it. Then neither task sleeps at all, and the round is in the next pass of the event loop.
        """
        # Each call is an object of its own: one that was recalled may run only after another task has taken the place.
        deputy = self._deputy = object()
        try:
            if self._core.stand_in_unasked():
                await trio.lowlevel.wait_readable(self._deputys_eventfd)
            else:
                await trio.lowlevel.checkpoint()
        except trio.ClosedResourceError:
            pass  # recalled
        finally:
            if self._deputy is deputy:
                self._deputy, more = None, True
                try:
                    if not self._tenants:  # otherwise a device has a turn: what it raises belongs into `run`
                        more = self.serve()
                finally:
                    # After the round: what was taken in it need not wake `run`.
                    self._core.give_back_asked(more)

    def recall(self) -> None:
        """The task that stands in wakes, and does no round. Nothing, if none does."""
        if self._deputy is not None:
            self._deputy = None
            self._core.give_back_asked(more=False)
            # As if the eventfd were closed: this wakes the waiting task now, and not when the event loop polls again.
            trio.lowlevel.notify_closing(self._deputys_eventfd)

    # ---- rounds

    def serve(self) -> bool:
        """Serve one round: one turn of each tenant. Whether the next round has something to do already."""
        arrived, tenants = self._core.asked(self.MOST), self._tenants
        if not tenants and len(arrived) == 1:  # the usual case: there is nothing to take turns with
            self._ask(arrived[0])
            return bool(tenants)
        for question in arrived:
            asker = self._askers.get(question.vcpu)
            if asker is not None:
                self._append(asker.whose, partial(self._ask, question))
        for turn in [self._next(tenant) for tenant in list(tenants)]:
            turn()
        return bool(tenants)

    def _ask(self, question: Question) -> None:
        asker = self._askers.get(question.vcpu)
        if asker is not None:  # else the vCPU has ended meanwhile
            asker.ask(question)

    def _next(self, tenant: str) -> Turn:
        vms = self._tenants[tenant]
        vm = next(iter(vms))
        turns = vms.pop(vm)
        turn = turns.popleft()
        if turns:
            vms[vm] = turns  # at the end of the dict: the tenant's other VMs come first
        elif not vms:
            del self._tenants[tenant]
        return turn
