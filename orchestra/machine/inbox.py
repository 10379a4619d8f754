"""Serves the questions of vCPUs and the calls of devices in turns: one of each tenant in a round of the event loop.

vCPU: question → core → a turn → the task that claimed the address
doorbell, timer ───────→ a turn → the device
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeAlias

import trio

from ..native import lib
from ..native.core import FleetCore, Question, Settled, VcpuCore
from .devices.bus import Bus, Claim
from .devices.requests import Request, Requests

__all__ = ["Inbox", "Key"]

Key: TypeAlias = tuple[str, str]
"""Tenant and VM."""

Turn: TypeAlias = Callable[[], object]
"""A function that is called when it is a VM's turn."""


Failure: TypeAlias = Callable[[Exception], object]
"""Ends a VM whose turn raised an error."""


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
        if claim is None or not isinstance(claim.handler, Requests):
            self._settle(question.number, Settled.AGAIN)
            return

        def settle(request: Request) -> None:
            self._settle(question.number, settled(request, claim), request.answer_bytes)

        request = Request(self._index, question.address, question.size, question.write, question.data, settle)
        self._request = claim.handler, request
        claim.handler.deliver(request)

    def _settle(self, number: int, how: int, answer: bytes = b"") -> None:
        if self._core.settle(number, how, answer):
            self._engine.kick()


def settled(request: Request, claim: Claim) -> int:
    """What became of a question, as the core needs it."""
    if request.answered:
        return Settled.ANSWERED
    # A task that keeps its claim and does not answer: the guest reads ones. `AGAIN` would ask the same task for ever.
    return Settled.NOBODY if claim.live else Settled.AGAIN


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
        self._askers: dict[int, Asker] = {}
        self._tenants: dict[str, dict[str, deque[Turn]]] = {}
        self._asleep = False

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
        if self._asleep:
            # Wakes the task as a question would. The task empties the eventfd before it sleeps again.
            self._asleep = False
            os.eventfd_write(self._core.asked_eventfd, 1)

    def _append(self, whose: Key, turn: Turn) -> None:
        tenant, vm = whose
        self._tenants.setdefault(tenant, {}).setdefault(vm, deque()).append(turn)

    async def run(self) -> None:
        """Serve until cancelled."""
        core = self._core
        while True:
            self.serve()
            if not self._tenants and core.may_sleep_unasked():
                # Sleep at once. A few empty rounds first would answer the next question sooner on idle CPUs. But beside
                # guests that spin, the kernel lets a thread that slept run first, and makes a thread that spins wait.
                self._asleep = True
                try:
                    await trio.lowlevel.wait_readable(core.asked_eventfd)
                finally:
                    self._asleep = False
            else:
                await trio.lowlevel.checkpoint()

    def serve(self) -> None:
        """Serve one round: one turn of each tenant."""
        arrived, tenants = self._core.asked(self.MOST), self._tenants
        if not tenants and len(arrived) == 1:  # the usual case: there is nothing to take turns with
            self._ask(arrived[0])
            return
        for question in arrived:
            asker = self._askers.get(question.vcpu)
            if asker is not None:
                self._append(asker.whose, partial(self._ask, question))
        for turn in [self._next(tenant) for tenant in list(tenants)]:
            turn()

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
